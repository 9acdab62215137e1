"""Math: from a response to one line of LaTeX, its structure, and whether it equals the gold answer's."""

import functools
import math
import re
import unicodedata
from fractions import Fraction

from grading import Undecided, Verdict

# -- from a response to one line of LaTeX ----------------------------------------------------------------

LONGEST = 1000             # characters of an answer; a longer one must be the gold, letter by letter
ITEMS = 64                 # of a list, likewise
_TEX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")


def boxes_of(text):
    r"""[(start, inside)] of the outermost \boxed and \fbox, in order; inside is None where one is not closed.
    Linear in the text."""
    spans, open_ = [], []
    for match in _TEX.finditer(text):
        if match[0] == "}":
            if open_ and (box := open_.pop()):
                spans.append((*box, match.start()))
        elif match[0][-1] == "{" and match[0] != r"\{":
            open_.append((match.start(), match.end()) if match[0] != "{" else None)
    boxes, end = [], 0
    for start, inside, stop in sorted(spans + [(*box, None) for box in open_ if box]):
        if start >= end:                                  # else it lies within the one before
            boxes.append((start, None if stop is None else text[inside:stop]))
            end = stop or 0                               # one never closed holds nothing
    return boxes


END = "(?![A-Za-z])"       # behind a command's name: it ends there


def _rules(*pairs):
    """Substitutions, one after the other: [(compiled pattern, what stands in its place)]."""
    return [(re.compile(pattern), to) for pattern, to in pairs]


_SYMBOLS = str.maketrans(
    dict(zip("−–—÷⁄∕′’£€¥\xa0\0", [*"---///''", "", "", "", " ", "?"], strict=True))
    | {symbol: rf"\{name} " for symbol, name in zip(
        "×·⋅∗π∞±≤≥⩽⩾≠∪∈∅∨⟨⟩αβγδθλμσφω",
        """times cdot cdot cdot pi infty pm le ge le ge ne cup in emptyset lor langle rangle
        alpha beta gamma delta theta lambda mu sigma phi omega""".split(), strict=True)}
    | {"°": r"^\circ ", "ℝ": r"\mathbb{R}", "\u2009": r"\,", "\u202f": r"\,", "½": r"\frac{1}{2}",
       "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"})


_RAISED = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)|([₀₁₂₃₄₅₆₇₈₉]+)|√ *([0-9]*)")
_SPELLING = _rules(
    (r"\\\$", ""),
    (r"\\%", "%"),
    (r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:bf|rm|it)" + END, ""),
    (r"\\[dtc]frac" + END, r"\\frac"),
    (r"\\(?:text[a-z]{2,6}|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{|\\text\s+\{", r"\\text{"),
    (r"\\(?:left|right|[bB]igg?[lr]?)" + END + r"\.?|\\(?:display|text)style" + END + r"|\\limits" + END, ""),
    (r"(\\\\)|\$|\\[()\[\]]|\\q?quad" + END, lambda m: m[1] or " "),
    (r"\\l(?:eq|e|eqslant)" + END + r"|<=", r"\\le "),
    (r"\\g(?:eq|e|eqslant)" + END + r"|>=", r"\\ge "),
    (r"\\neq" + END, r"\\ne "),
    (r"\\lt" + END, "<"),
    (r"\\gt" + END, ">"),
    (r"\\lbrace" + END, r"\\{"),
    (r"\\rbrace" + END, r"\\}"),
    (r"\\[lr]?vert" + END + r"|\\mid" + END, "|"),
    (r"\\lor" + END, r"\\text{or}"),
    (r"\\varnothing" + END + r"|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\R" + END, r"\\mathbb{R}"),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
    (r"\\degree" + END + r"|\^\s*\{?\s*\\circ\s*\}?(?:\s*[CF](?![A-Za-z]))?", r"^\\circ "),
    (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    (r"\\bar\s*\{", r"\\overline{"),
    (r"\\log[_]\{?e\}?(?![a-z])", r"\\ln "),
    # m/s
    (r"\\frac\s*\{\\text\{([^{}]*)\}\}\s*\{\\text\{([^{}]*)\}[\^{}0-9]*\}", r"\\text{\1/\2}"),
    (r"\\text\{([^{}]*)\}", lambda m: m[0] if _prose(m[1]) else m[1]),
    # 10\,000
    (r"(?<![0-9.])[0-9]{1,3}(?:(?:\{,\}|\\!,|,\\!|\\[,;:! ]|~|\s)[0-9]{3})+(?![0-9])",
     lambda m: re.sub("[^0-9]", "", m[0])),
    (r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])", lambda m: _thousands(m)),
    (r"\{,\}", ","),
    (r"(\\\\)|\\[,;:! ]|~", lambda m: m[1] or " "),
    # 1 1/2
    (r"(?<![0-9.])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)", r"\1\\frac{\2}{\3}"),
    (r"([_^])\s*([0-9])\s+(?=[0-9])", r"\1{\2}"),
    # "1 2" is not 12
    (r"(?<=[0-9])\s+(?=[0-9])", "?"))


_OUTSIDE_TEXT = _rules(
    (r"(?:(?<=\s)|(?<=[0-9]))(or|and)(?=\s|$)", r"\\text{\1}"),
    # 5 cm, 5 km/h
    (r"(?<=[0-9)}])\s*([A-Za-z]+(?:(?:\s+|/|\^\{?[0-9]\}?)[A-Za-z]*)*)",
     lambda m: r"\text{" + "\0".join(m[1].split()) + "}" if _BARE.match(m[1]) and _is_unit(m[1]) else m[0]),
    (r"(?<![\\A-Za-z])((?:arc)?(?:sin|cos|tan)|sqrt|log|ln|exp|pi|infty|infinity)" + END,
     lambda m: "\\" + m[1].replace("infinity", "infty") + " "),
    (r"(\\[A-Za-z]+)\s+(?=[A-Za-z])", "\\1\0"),
    (r"\s+", ""),
    ("\0", " "))


_BRACES = _rules(
    (r"\\(frac|sqrt) ?([0-9A-Za-z])", r"\\\1{\2}"),
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})([0-9A-Za-z])", r"\1{\2}"),
    (r"\\sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"([\^_])\{([0-9A-Za-z])\}(?![0-9])", r"\1\2"),
    (r"([\^_])(-?[0-9]{2,}|-[0-9])", r"\1{\2}"),
    (r"(?<![A-Za-z])\\text\{([A-Za-z])\}(?=[-+=^_])", r"\1"),
    (r"(^|[-+/=(,|])\{([0-9.]+)\}", r"\1\2"),
    (r"(?<![0-9.])(?=\.[0-9])", "0"),
    (r"\+(?=\\infty)", ""),
    (r"^[.,;:]+|[.,;:]+$", ""))


_UNITS = frozenset("""
    m cm mm km nm in ft mi yd g kg mg lb lbs oz t s ms h hr hrs min sec l ml n j kj w kw v a k c f pa kpa
    mol hz ev mph inch inches foot feet yard mile meter metre centimeter centimetre millimeter kilometer
    kilometre gram kilogram milligram pound ounce ton tonne second minute hour day week month year liter
    litre gallon quart pint cup newton joule watt volt ampere amp kelvin celsius fahrenheit pascal mole
    hertz radian rad degree deg percent dollar cent buck usd euro rupee yuan square sq cubic unit units per
    point way people person children men women""".split())

# without \text, where mg is m times g
_BARE = re.compile(r"[a-z]{3}|(?:cm|mm|km|kg|ft|in|lb|hr)(?![a-z])|m/s")

# what turns a number into another one, or into none, and so is never a unit
_NO_UNITS = frozenset("""
    or and not no to than more less least most about around approximately plus minus over under between from
    mod base hundred thousand million billion trillion dozen half third quarter fourth fifth tenth double
    twice if when only else except without times perhaps sometimes guess maybe always others is are even odd
    for any all every some""".split())


def _is_unit(phrase, gold=False):
    """Whether the words behind a number leave it what it is. A gold is trusted to mean a unit by any word."""
    words = [(w, w[:-1] if w.endswith("s") and len(w) > 2 else w)
             for w in re.findall("[a-z]+", phrase.lower())]
    return not any(_NO_UNITS.intersection(w) for w in words) and (
        gold or all(_UNITS.intersection(w) for w in words) or len(words) == 1 and words[0][0] != words[0][1]
        and len(words[0][0]) > 3)


def _prose(s):
    """Whether the inside of a \\text is text, and not a number, or letters in parentheses or a list."""
    return re.search("[A-Za-z]", s) and not re.search("[0-9]", s) and (
        re.search("[A-Za-z]{2}", s) or not re.search("[(,]", s))


@functools.lru_cache(8192)
def tidy(latex):
    """One spelling for what is written in many: no spaces nor sizes, unicode as LaTeX, braces where TeX
    implies them, thousands joined."""
    def raised(match):                                    # x², x₁, √12: all of the digits
        up, down, under = (part and unicodedata.normalize("NFKC", part) for part in match.groups())
        return (f"^{{{up}}}" if up else f"_{{{down}}}" if down else rf"\sqrt{{{under}}}" if under else
                r"\sqrt ")

    s = unicodedata.normalize("NFKC", _RAISED.sub(raised, latex).translate(_SYMBOLS))
    for pattern, to in _SPELLING:
        s = pattern.sub(to, s)
    parts = re.split(r"\\text\{([^{}]*)\}", s)
    for i, part in enumerate(parts):
        for pattern, to in _OUTSIDE_TEXT if i % 2 == 0 else ():
            part = pattern.sub(to, part)
        parts[i] = part if i % 2 == 0 else rf"\text{{{' '.join(part.split())}}}"
    s = "".join(parts)
    for pattern, to in _BRACES:
        s = pattern.sub(to, s)
    return _unparenthesised(s)


def _thousands(match):
    """1,000 as 1000; in brackets only where no item could begin so: (1,000), but not (1,234)."""
    before = match.string[: match.start()]
    inside = len(re.findall(r"[(\[]|\\\{", before)) > len(re.findall(r"[)\]]|\\\}", before))
    return match[0].replace(",", "") if not inside or ",0" in match[0] else match[0]


# -- the structure of an answer --------------------------------------------------------------------------

_BRACKET = r"\\[{}]|\\(?:begin|end|[lr]angle)(?![a-z])|[()\[\]{}]"
_OPEN = ("(", "[", "{", r"\{", r"\begin", r"\langle")
_NAME = (r"(?:\\(?:angle|triangle)\s?)?(?:[A-Za-z]{1,3}|\\text\{[^{}]*\}|\\[a-z]+|\([A-Za-z](?:,[A-Za-z])+\))"
         r"(?:_\{?[A-Za-z0-9]+\}?)?'*(?:\([A-Za-z0-9,]*\))?")


_LIST = r",|;|\\cup(?![a-z])|\\text\{(?:or|and)\}"


def _cut(s, separators):
    """s cut at the separators (a pattern) that stand outside all brackets: parts and separators in turn."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(rf"(?P<cut>{separators})|{_BRACKET}", s):
        if match["cut"] is None:
            depth += 1 if match[0] in _OPEN else -1
        elif depth == 0:
            parts += [s[start : match.start()], match[0]]
            start = match.end()
    return [*parts, s[start:]]


def _inside(s, opening, closing):
    """What stands between an opening bracket and a closing one that ends s and belongs to it, or None."""
    if not (s.startswith(opening) and s.endswith(closing) and len(s) >= len(opening) + len(closing)):
        return None
    inside, depth = s[len(opening) : len(s) - len(closing)], 0
    for match in re.finditer(_BRACKET, inside):
        depth += 1 if match[0] in _OPEN else -1
        if depth < 0:
            return None
    return inside if depth == 0 else None


def _unparenthesised(s):
    while (inside := _inside(s, "(", ")") or _inside(s, "{", "}")) and len(_cut(inside, ",")) == 1:
        s = inside
    return s


def _items(s):
    """(kind, items) of an unordered list, set or union; kind is "union" or "list"."""
    builder = re.fullmatch(r"\\\{([a-z])(?:\\in\s?\\mathbb\{R\})?[|:](.*)\\\}", s)            # \{x | x > 3\}
    s = builder[2] if builder else re.sub(r"^[A-Za-z]\\in(?![a-z])\s?", "", s)
    named = re.fullmatch(rf"{_NAME}=([^=]*)", s)          # x = 1, 2 and S = \{1, 2\}
    if named and (_inside(named[1], r"\{", r"\}") or _ordered(named[1])
                  or len(_cut(named[1], _LIST + r"|\\pm")) > 1):
        s = named[1]
    if s in (r"\mathbb{R}", r"\text{all real numbers}", "allrealnumbers"):
        s = r"(-\infty,\infty)"
    inside = _inside(s, r"\{", r"\}")
    parts = _cut(s if inside is None else inside, _LIST)
    items = [p for p in parts[::2] if p] + [""] * (len(parts) > 1 and not (parts[0] and parts[-1]))   # "5 or"
    union = r"\cup" in parts[1::2] or r"\text{or}" in parts[1::2] and all(_interval(p) for p in items)
    both = [re.sub(r"(^|[=(,{])\+", r"\1", item.replace(r"\pm", plus).replace(r"\mp", minus))
            for item in items
            for plus, minus in (("+", "-"), ("-", "+"))[: 2 if r"\pm" in item or r"\mp" in item else 1]]
    return "union" if union else "list", both


def _interval(s):
    r"""(name, the interval it is in) of x<3, 3>x, 1<x\le2; None of anything else."""
    terms, signs = (parts := _cut(s, r"<|>|\\[lg]e(?![a-z])\s?"))[::2], [p.strip() for p in parts[1::2]]
    if len(terms) not in (2, 3) or not all(terms) or len({sign in (">", r"\ge") for sign in signs}) > 1:
        return None
    if signs[0] in (">", r"\ge"):                         # larger on the left: turn round
        terms, signs = terms[::-1], signs[::-1]
    low, high = "([", ")]"
    shut = [sign in (r"\le", r"\ge") for sign in signs]
    named = [re.fullmatch(r"[A-Za-z](?:_[0-9a-z])?|\\(?!pi|infty)[a-z]+", term) for term in terms]
    if len(terms) == 3:
        return (terms[1], f"{low[shut[0]]}{terms[0]},{terms[2]}{high[shut[1]]}") if named[1] else None
    if named[0]:
        return terms[0], rf"(-\infty,{terms[1]}{high[shut[0]]}"
    return (terms[1], rf"{low[shut[0]]}{terms[0]},\infty)") if named[1] else None


def _ordered(s):
    """(brackets, rows of items) of a tuple, an interval, a vector, a matrix; None of anything else."""
    matrix = re.fullmatch(r"\\begin\{([pbvVB]?)(matrix|array)\}(?:\{[^{}]*\})?(.*?)(?:\\\\)?\\end\{\1\2\}", s)
    if matrix:
        return matrix[1] if matrix[1] in ("v", "V") else "", [r.split("&") for r in matrix[3].split(r"\\")]
    for opening, closing in (("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), (r"\langle", r"\rangle")):
        inside = _inside(s, opening, closing)
        parts = _cut(inside.strip(), ",")[::2] if inside else ()
        if len(parts) > 1:
            return opening + closing, [parts]
    return None


def same(gold, answer, leaf):
    """Whether two tidy answers mean the same. leaf(gold, answer) is asked of scalars that are neither equal
    as text nor both numbers."""
    text = r"\text" in gold + answer
    if gold == answer or _words(gold, text) == _words(answer, text) != "":
        return gold != ""
    (gold_kind, golds), (kind, answers) = _items(gold), _items(answer)
    if len(golds) != len(answers) or not 0 < len(golds) <= ITEMS or len(golds) > 1 and gold_kind != kind:
        return False
    for item in golds:
        match = next((a for a in answers if _same_item(item, a, leaf)), None)
        if match is None:
            return False
        answers.remove(match)
    return True


def _same_item(gold, answer, leaf):
    """Whether two items of a list are the same: intervals, then what is ordered in brackets, then the sides
    of equations, then scalars."""
    gold, answer = _unparenthesised(gold), _unparenthesised(answer)
    if gold == answer:
        return gold != ""
    gold_name, gold_range = _interval(gold) or ("", gold)
    name, range_ = _interval(answer) or ("", answer)
    if gold_name and name and gold_name != name:
        return False
    gold_ordered, ordered = _ordered(gold_range), _ordered(range_)
    if gold_ordered and ordered:
        return _same_rows(gold_ordered, ordered, leaf)
    if gold_ordered or ordered:
        return False
    gold_sides, sides = _sides(gold), _sides(answer)
    if len(gold_sides) == len(sides) == 1:
        return _same_scalar(gold, answer, leaf)
    gold_named, named = _named(gold_sides), _named(sides)
    is_value = gold_named and len(gold_sides) == 2        # the gold is x = 5: 5 will do, and x = 5, not y = 5
    if len(gold_sides) == 1 or is_value and (len(sides) == 1 or named and sides[0] == gold_sides[0]):
        return all(same(gold_sides[-1], side, leaf) for side in (sides[1:] if named else sides))
    return len(sides) > 1 and leaf(gold, answer)


def _same_rows(gold, answer, leaf):
    """Whether two results of _ordered have the same brackets, shape and items."""
    gold_brackets, gold_rows = gold
    brackets, rows = answer
    if gold_brackets != brackets or [len(row) for row in gold_rows] != [len(row) for row in rows]:
        return False
    golds = [item for row in gold_rows for item in row]
    answers = [item for row in rows for item in row]
    return all(same(tidy(a), tidy(b), leaf) for a, b in zip(golds, answers, strict=True))


def _sides(s):
    """The sides of an equation, or [s]; the name first, also of 5 = x."""
    sides = _cut(s, "=")[::2]
    turned = len(sides) == 2 and re.fullmatch("[A-Za-z]", sides[1]) and not re.fullmatch(_NAME, sides[0])
    return sides[::-1] if turned else sides


def _named(sides):
    return len(sides) > 1 and re.fullmatch(_NAME, sides[0]) is not None


_TAIL = re.compile(r"(?:\\text\{[^{}]*\}(?:\^\{?-?[0-9]\}?)?(?:/|\\cdot)?|\^\\circ|%)+$")


def _same_scalar(gold, answer, leaf):
    """Scalars, with units left out of both."""
    values = []
    for s in (gold, answer):
        tail = _TAIL.search(s)
        value = s[: tail.start()] if tail else ""
        words = re.findall(r"\{([^{}]*[A-Za-z][^{}]*)\}", tail[0]) if tail else []
        unit = (re.search(r"[0-9]|\\pi", value) and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", value)
                and all(_is_unit(word, s is gold) or rf"\text{{{word}}}" in gold for word in words))
        values.append((_unparenthesised(value), "%" in tail[0]) if unit else (s, False))
    (gold, gold_percent), (answer, percent) = values
    if gold == answer:
        return gold != ""
    a, b = number(gold), number(answer)
    if a is not None and b is None:                       # 5m is 5, but not where the gold has letters too
        bare = re.fullmatch(r"(.*[0-9}])([A-Za-z]{1,2})", answer)
        b = number(bare[1]) if bare and _is_unit(bare[2]) else None
    if a is None or b is None:
        return leaf(gold, answer)
    hundredths = [x / 100 if is_percent else x for x, is_percent in ((a, gold_percent), (b, percent))]
    return a == b or gold_percent != percent and hundredths[0] == hundredths[1]       # 50% is 50, and is 0.5


def _words(s, fold):
    """An answer without \\text and spaces; where it is words, without punctuation and (fold) case."""
    plain = re.sub(r"\s", "", TEXT.sub(r"\1", s))
    if (not fold and not re.search("[A-Za-z]{4}", plain) or not re.fullmatch("[A-Za-z().,'-]+", plain)
            or len(_cut(s, _LIST)) > 1):
        return plain
    plain = re.sub("[().,']", "", plain)
    return plain.casefold() if len(plain) > 1 else plain


_DIGITS = r"[0-9]+(?:\.[0-9]*)?"
_DECIMALS, _MIXED, _REPEATING, _POWER = (re.compile(rf"([-+]?){pattern}") for pattern in (
    rf"({_DIGITS})(?:/({_DIGITS}))?", rf"([0-9]*)\\frac\{{([-+]?{_DIGITS})\}}\{{([-+]?{_DIGITS})\}}",
    r"([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}",
    rf"(?:({_DIGITS})(?:\\times|\\cdot|(?=e)))?(?:10\^|(?<=[0-9.])e)\{{?([-+]?[0-9]{{1,3}})\}}?"))


def number(s):
    """The exact value, a Fraction, of a tidy decimal, fraction, mixed number, repeating decimal or power of
    ten; None of anything else."""
    def exact(digits):
        return Fraction(digits.rstrip("."))

    if m := _DECIMALS.fullmatch(s):
        value, under = exact(m[2]), exact(m[3] or "1")
    elif m := _MIXED.fullmatch(s):
        value, under = exact(m[3]), exact(m[4])
        if m[2] and not (0 <= value < under):             # 2\frac{3}{2} is anyone's guess
            return None
        value += int(m[2] or 0) * under
    elif m := _REPEATING.fullmatch(s):
        value = Fraction(int(m[2] + m[3] + m[4]) - int(m[2] + m[3] or 0))
        under = Fraction(10 ** len(m[3]) * (10 ** len(m[4]) - 1))
    elif m := _POWER.fullmatch(s):
        value, under = exact(m[2] or "1") * Fraction(10) ** int(m[3]), Fraction(1)
    else:
        return None
    return (-value if m[1] == "-" else value) / under if under else None


# -- scalars, by sympy -----------------------------------------------------------------------------------

SILENT = """frac sqrt pi cdot times div sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln
    exp binom infty circ lfloor rfloor lceil rceil le ge""".split()


_GREEK = "alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi omega".split()
_READABLE = re.compile(rf"(?:\\(?:{'|'.join(SILENT + _GREEK)})(?![A-Za-z])|"
                       r"[-0-9A-Za-z+*/^_{}()\[\]|!.=<> ])*")


_UNREADABLE = re.compile(                                 # words, x2, 12_5, (x)2; 10^{99999}, 9^{9^9}; 9!!
    r"(?<![\\A-Za-z])(?:[A-Za-z]{4}|[A-Za-z][0-9])|[0-9]_|\)[0-9]|(?<!_)\{[^{}]*\}[0-9]"
    r"|[0-9]{150}|\^\{?[-+]?[0-9]{5}|\^(?!\{[1-4]\^[1-4]\})\{?\(?[0-9.]+\^"
    r"|[0-9]{4}\)*!|!\)*!|\}\)?!|\\binom\{?[0-9]{5}")


def readable(gold, answer):
    """Whether sympy is to look at two scalars: both can be read to the last character, the answer names
    nothing that the gold does not, and there is no number too large to look at."""
    a, b = (set(re.findall(r"\\[a-z]+|[A-Za-z]", s)) - {"e", "i", *(f"\\{c}" for c in SILENT)}
            for s in (gold, answer))
    return b <= a and all(_READABLE.fullmatch(s) and not _UNREADABLE.search(s)
                          and all(s.count(x) == s.count(y) for x, y in ("()", "{}")) for s in (gold, answer))


def _estimate(s):
    """A float, perhaps complex, for a scalar of short numbers, names (each has a value of its own),
    fractions, roots, powers and products; None for others, and where a reader hesitates: 1/2x."""
    tokens, at = [*re.findall(r"\\[a-z]+|[0-9]+(?:\.[0-9]+)?|[^ ]", s), ""], 0

    def take(*known):
        nonlocal at
        if known and tokens[at] not in known:
            raise ValueError
        at += 1
        return tokens[at - 1]

    def total(end):
        value = 0.0
        while True:
            sign = -1 if tokens[at] in ("+", "-") and take() == "-" else 1
            value += sign * product()
            if tokens[at] not in ("+", "-"):
                take(end)
                return value

    def product():
        value, last = power(), tokens[at - 1]
        while tokens[at] not in ("+", "-", ")", "}", "]", ""):
            if tokens[at] == "/":
                take()
                value /= power()
                if tokens[at] not in ("+", "-", ")", "}", "]", ""):
                    raise ValueError
            else:
                if tokens[at] in (r"\cdot", r"\times"):
                    take()
                elif last[-1].isdigit() and (tokens[at] == r"\frac" or tokens[at].isdigit()):
                    raise ValueError
                value *= power()
            last = tokens[at - 1]
        return value

    def power():
        value = atom()
        return value ** atom() if tokens[at] == "^" and take() else value

    def atom():
        token = take()
        if token in ("(", "{"):
            return total(")" if token == "(" else "}")
        if token == r"\frac":
            take("{")
            value = total("}")
            take("{")
            return value / total("}")
        if token == r"\sqrt":
            degree = total("]") if tokens[at] == "[" and take() else 2.0
            take("{")
            return total("}") ** (1 / degree)
        if token[:1].isdigit() and len(token) < 7:
            return float(token)
        if token in (r"\pi", "e", "i") or len(token) == 1 and token.isalpha():
            return {r"\pi": math.pi, "e": math.e, "i": 1j}.get(token) or math.sqrt(ord(token)) - 7
        raise ValueError

    try:
        value = total("")
        return value if 1e-4 < abs(value) < 1e6 else None
    except (ArithmeticError, IndexError, RecursionError, ValueError):
        return None


def _undecided(gold, answer):
    """What is asked of scalars in the parent: no, or sympy is to say."""
    if not readable(gold, answer):
        return False
    a, b = _estimate(gold), _estimate(answer)
    if a is not None and b is not None and abs(a - b) > 1e-6 * abs(a):
        return False
    raise Undecided


def grade_math(text, truth, ask):
    if isinstance(truth, bool) or not isinstance(truth, (str, int, float)):
        return Verdict(False, None, f"the truth is a {type(truth).__name__}, not LaTeX")
    boxes, gold = boxes_of(text), str(truth).strip()
    if not boxes or boxes[-1][1] is None:
        return Verdict(False, None, "the last box is not closed" if boxes else "no box")
    answer = re.sub(r"\\(?:boxed|fbox)(?=\s*\{)", "", boxes[-1][1])
    if gold_boxes := boxes_of(gold):
        gold = gold_boxes[-1][1] or ""
    if len(gold) > LONGEST or len(answer) > LONGEST:
        return Verdict(gold == answer.strip() != "", answer, f"over {LONGEST:,} characters: compared as text")
    golds, answers = tidy(gold), [tidy(answer)]
    if golds in ("", r"\text{}"):
        return Verdict(False, answer, "the truth is empty")
    if re.search("[0-9],[0-9]", answer) and len(_cut(golds, ",")) > 1:
        answers.append(tidy(answer.replace(",", ", ")))   # 100,200 is a list where the gold is one
    try:
        equal = any(same(golds, a, _undecided) for a in answers)
        by = ""
    except Undecided:
        equal = ask("math", golds, answers)
        by = " (sympy)"
    if isinstance(equal, str):                            # why there was no answer
        return Verdict(False, answer, equal)
    return Verdict(equal, answer, f"equal{by}" if equal else f"not equal{by}")
