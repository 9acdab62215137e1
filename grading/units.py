r"""Words behind a number: a unit leaves it what it is, "million" and "halves" make another one of it.

A word is a unit if it is on the list here, or, of nouns that count (5 apples, 3 real solutions), a plural.
One letter is a unit only where it stands upright (5\text{ m}) and is one: 2k, 3n and 5m are products. No
word that can change a number's value ("or", "less", "squared", "dozen") is a unit. A gold answer is trusted
to mean a unit by any other word.
"""

import functools
import re
from fractions import Fraction

_UNITS = frozenset("""
    cm mm km nm um dm in ft mi yd kg mg ug lb lbs oz ms us ns hr hrs min sec ml dl kj mj kcal cal kw mw kwh
    mv kv ma pa kpa mpa atm bar torr mol hz khz mhz ghz ev kev mev mph kph rpm psi kn kb mb gb tb ha acre
    hectare knot ohm tesla weber henry farad coulomb siemens lumen candela bit byte inch inches foot feet
    yard mile meter metre centimeter centimetre millimeter millimetre micrometer nanometer kilometer
    kilometre gram kilogram milligram pound ounce ton tonne second millisecond minute hour day week month
    year liter litre milliliter millilitre gallon quart pint cup newton joule kilojoule calorie watt
    kilowatt volt ampere amp kelvin celsius fahrenheit pascal mole hertz radian rad degree deg percent
    dollar cent buck usd euro rupee yuan yen pound peso franc square sq cubic cu unit units per point way
    people person child children man men woman women mouse mice solution root value pair triple time line
    piece digit""".split())
_UPRIGHT = frozenset("m g s h l t L N J W V A K C F T H".split())      # one letter, in a font of words
_DESCRIBING = frozenset("""
    real non nonreal complex imaginary
    distinct different possible integer integral rational irrational whole natural
    prime positive negative nonnegative ordered unordered unique valid such equal consecutive lattice total
    square right left red blue green black white small large big long short full linear""".split())
_BEHIND = frozenset("old each total altogether long tall wide high deep away apart".split())

# what turns a number into another one, or into none, and so is never a unit
_NEVER = frozenset("""
    or and not no to than more less least most about around approximately plus minus over under between from
    mod base double twice thrice if when only else except without times fold perhaps sometimes guess maybe
    always others is are even odd for any all every some squared cubed factorial power two three four five six
    seven eight nine one eleven twelve twenty""".split())
_MULTIPLES = {
    "ten": 10, "dozen": 12, "score": 20, "hundred": 100, "gross": 144, "thousand": 1000, "myriad": 10 ** 4,
    "lakh": 10 ** 5, "lac": 10 ** 5, "crore": 10 ** 7, "googol": 10 ** 100} | {
    prefix + "illion": 10 ** (3 * n + 3) for n, prefix in enumerate(
        "m b tr quadr quint sext sept oct non dec undec duodec".split(), 1)} | {
    prefix + "illiard": 10 ** (6 * n + 3) for n, prefix in enumerate("m b".split(), 1)}
_ORDINALS = dict(zip(
    """half third quarter fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth
    fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth thirtieth fortieth fiftieth
    sixtieth seventieth eightieth ninetieth hundredth thousandth millionth billionth trillionth""".split(),
    [2, 3, 4, *range(4, 21), *range(30, 100, 10), 100, 1000, 10 ** 6, 10 ** 9, 10 ** 12], strict=True))
_FACTORS = {word: Fraction(n) for word, n in _MULTIPLES.items()} | {
    word: Fraction(1, n) for word, n in _ORDINALS.items()}


def _stems(word):
    """A word without the endings of a plural: halves as half, inches as inch, too."""
    stems = {word}
    if word.endswith("s") and len(word) > 2:
        stems.add(word[:-1])
    if word.endswith("es") and len(word) > 4:
        stems |= {word[:-2], word[:-3] + "f" if word.endswith("ves") else word[:-2]}
    return stems


@functools.lru_cache(4096)
def factor(word):
    """What a word multiplies the number before it by: 10**6 for million, 1/2 for halves; None for others."""
    return next((_FACTORS[stem] for stem in _stems(word.lower()) if stem in _FACTORS), None)


@functools.lru_cache(4096)
def is_unit(phrase, gold=False):
    """Whether the words behind a number leave it what it is."""
    words = re.findall("[A-Za-z]+", phrase)
    if words[-1:] in (["squared"], ["cubed"]) and len(words) > 1 and all(map(_known, words[:-1])):
        return True
    if any(factor(word) or _NEVER.intersection(_stems(word.lower())) for word in words):
        return False
    if gold:
        return True
    if words and all(map(_known, words)):
        return True
    lower = [word.lower() for word in words]
    while lower and lower[0] in _DESCRIBING:
        lower = lower[1:]
    while lower and lower[-1] in _BEHIND:
        lower = lower[:-1]
    if "of" in lower[1:-1] and (_known(lower[0]) or _plural(lower[0])):       # 3 pieces of cake
        return True
    return bool(lower) and (all(map(_known, lower)) or len(lower) == 1 and _plural(lower[0]))


def _known(word):
    if len(word) == 1:
        return word in _UPRIGHT
    return bool(_UNITS.intersection(_stems(word.lower())))


def _plural(word):
    return word.endswith("s") and not word.endswith("ss") and len(word) > 3


_SIGNS = re.compile(r"\^\s*(?:\{\s*-?[0-9]\s*\}|[0-9])|\\(?:cdot|times)(?![A-Za-z])|[\s{}/.*]")


@functools.lru_cache(4096)
def as_unit(latex):
    r"""The words of a unit written with signs, m\cdot s^{-1} or \mu m; "" of what is none."""
    if not re.search(r"[\\^/]", latex):
        return ""
    named = latex.replace(r"\Omega", " ohm ").replace(r"\mu", "u")
    words = re.sub(r"\bu\s+(?=[A-Za-z])", "u", _SIGNS.sub(" ", named)).split()
    good = words and all(re.fullmatch("[A-Za-z]+", word) and is_unit(word) for word in words)
    return " ".join(words) if good else ""
