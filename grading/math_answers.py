r"""Math: whether the answer of a response equals the gold one.

What a mathematician who reads the box would say decides, and where that is in doubt the answer is wrong:
  - a bare list ("1, 2", "1 or 2", "\pm 1") is unordered and of equal length; a set \{1, 2\} too, and it
    counts no item twice; what stands in brackets is ordered and the brackets must agree, so (1, 2) is not
    [1, 2) nor the list
  - sets of real numbers are equal as sets: x\ne 2, \mathbb{R}\setminus\{2\} and (-\infty,2)\cup(2,\infty)
  - x=1, y=2 is (1, 2) in the order of the names; x = 5 is 5, but not y = 5
  - a quantity's name goes before its value (P(A) = 1/6, a+b+c = 7, f^{-1}(x) = x/2); every other side of an
    equation must be right: 10/2 = 5 is 5, 4 = 5 is not. Where the gold is an equation, its value alone is
    right only if the other side names a quantity: |AB| = 7 is 7, 2x+3y = 6 is not 6. Two identities are
    equal only if both say the same
  - numbers are exact: 0.5 is 1/2, 0.33 is not 1/3. \sqrt{2} \approx 1.414 is \sqrt{2} (if it is about that),
    and 1.414 where the gold is that; \approx 1.414 alone is 1.414
  - a unit, percent or degree sign, or currency is left out when the number agrees, and is not compared;
    units.py says which words are units
  - matrices and vectors are compared entry by entry, a factor multiplied in; a determinant is its value
  - 3:5 is 6:10, and 3/5; (B) 7 is 7, and B where letters are asked for
  - words are compared as words (case and articles aside), never as products of letters
"""

import functools
import re

from grading import Undecided, Verdict
from grading.brackets import cut, inside, unparenthesised
from grading.latex import boxes_of, hedged, tidy, unboxed
from grading.matrices import determinant, ordered
from grading.regions import is_plain, region
from grading.scalars import estimate, names_of, number, readable, value_of
from grading.units import factor, is_unit

LONGEST = 1000             # characters of an answer; a longer one must be the gold, letter by letter
ITEMS = 64                 # of a list, likewise
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")

# -- lists, sets, names --------------------------------------------------------------------------------------

_LIST = r",|;|\\cup(?![a-z])|\\text\{(?:or|and)\}"
_NAME = (r"(?:\\(?:angle|triangle)\s?)?(?:[A-Za-z]{1,3}|\\text\{[^{}]*\}|\\[a-z]+|\([A-Za-z](?:,[A-Za-z])+\))"
         r"(?:_\{?[A-Za-z0-9]+\}?)?'*(?:\([A-Za-z0-9,]*\))?")
_SETS = r"[A-Z](?: ?\\(?:cap|cup|setminus|times) ?[A-Z])+"
# a side that says which quantity the other is: \frac{dy}{dx}, f^{-1}(x), \lim.., P(A), |AB|, AB:CD, \sin A
_QUANTITY = re.compile(
    rf"{_NAME}|{_SETS}|.*\\ldots.*|[A-Z]\^(?:\{{-1\}}|T)"
    r"|\\(?:lim|int|iint|oint|sum|prod|det|nabla|max|min|sup|inf|gcd|arg|dim|Pr)(?![a-z]).*"
    r"|\\frac\{(?:d(?:\^?[0-9n])?[A-Za-z]?|\\partial.*)\}\{(?:d|\\partial ?)[A-Za-z].*\}.*|m?\\angle.*"
    r"|[A-Za-z](?:'+|\^\{?-?[0-9(n)]+\}?)?(?:_[0-9a-z])?\(.*\)"
    r"|(?:\\mathbb\{[PE]\}|\\text\{[A-Za-z ]+\}|[A-Z][a-z]+)(?:[(\[].*[)\]])"
    r"|\([a-z]\\circ ?[a-z]\)\([a-z0-9]\)|\\(?:overline|overrightarrow|vec|hat|bar)\{[A-Za-z]+\}"
    r"|\|\|?(?:[A-Z]{1,2}|[zw])\|\|?(?:\^2)?|[A-Z]{2,4}(?:\^2|:[A-Z]{2})?"
    r"|\[[A-Z]{3,}\]|\\frac\{\|?[A-Z]{2,3}\|?\}\{\|?[A-Z]{2,3}\|?\}"
    r"|\\(?:sin|cos|tan|cot|sec|csc)(?:\^2)? ?(?:[A-Z]+|\\angle ?[A-Z]+|\\(?:alpha|beta|gamma|theta))")


def _items(s):
    """(kind, items) of an unordered list, set or union; kind is "union", "set" or "list"."""
    builder = re.fullmatch(r"\\\{([a-z])(?:\\in\s?\\mathbb\{R\})?[|:](.*)\\\}", s)            # \{x | x > 3\}
    s = builder[2] if builder else re.sub(r"^(?:[A-Za-z]|\([a-z](?:,[a-z])+\))\\in(?![a-z])\s?", "", s)
    named = re.fullmatch(rf"(?:{_NAME}|{_SETS})=([^=]*)", s)             # x = 1, 2 and S = \{1, 2\}
    if named and (inside(named[1], r"\{", r"\}") or ordered(named[1])
                  or len(cut(named[1], _LIST + r"|\\pm(?![a-z])")) > 1):
        s = named[1]
    content = inside(s, r"\{", r"\}")
    parts = cut(s if content is None else content, _LIST)
    items = [p for p in parts[::2] if p] + [""] * (len(parts) > 1 and not (parts[0] and parts[-1]))   # "5 or"
    union = r"\cup" in parts[1::2] or r"\text{or}" in parts[1::2] and all(_range(p) for p in items)
    both = [signed for item in items for signed in _both_signs(item)]
    return "set" if content is not None else "union" if union else "list", both


def _distinct(items):
    return list({number(item) or item: item for item in items}.values())


_SIGNS = re.compile(r"\\(pm|mp)(?![a-z])")


def _both_signs(item):
    r"""[3+x, 3-x] of 3\pm x, and [item] of an item without."""
    if not _SIGNS.search(item):
        return [item]
    upper, lower = (_SIGNS.sub(lambda m, signs=signs: signs[m[1]], item)
                    for signs in ({"pm": "+", "mp": "-"}, {"pm": "-", "mp": "+"}))
    return [re.sub(r"(^|[=(,{])\+", r"\1", signed) for signed in (upper, lower)]


def _range(s):
    r"""(name, the interval it is in) of x<a, a>x, 1<x\le b; None of anything else."""
    parts = cut(s, r"<|>|\\[lg]e(?![a-z])\s?")
    terms, signs = parts[::2], [sign.strip() for sign in parts[1::2]]
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


@functools.lru_cache(4096)
def _assignments(s):
    r"""[{name: value}] of x=1, y=2 or of (x,y)=(1,2), several of them by "or"; () of anything else."""
    groups = []
    for part in cut(s, r"\\text\{or\}|;")[::2]:
        groups.append({})
        for item in filter(None, cut(part, r",|\\text\{and\}")[::2]):
            name, _, value = item.partition("=")
            if "=" in value or not value or not re.fullmatch(_NAME, name):
                return ()
            names, values = [name], [value]
            if name[0] == "(":
                content = inside(value, "(", ")")
                names, values = name[1:-1].split(","), cut(content, "[,;]")[::2] if content else []
            if len(names) != len(values):
                return ()
            if groups[-1].keys() & set(names):            # the next solution
                groups.append({})
            groups[-1] |= dict(zip(names, values, strict=True))
    groups = [group for group in groups if group]
    alike = {tuple(sorted(group)) for group in groups}
    letters = {name.partition("_")[0] for group in groups for name in group}      # x_1, x_2 are two of one
    return groups if len(alike) == 1 and len(letters) > 1 else ()


def _tuple(group):
    """(1,2) of {"x": 1, "y": 2}; None where the order of the names is anyone's guess."""
    names, rising = list(group), sorted(group)
    letters = "".join(rising)
    if names != rising and (letters not in "abcdefghijklmnopqrstuvwxyz" or len(letters) != len(names)):
        return None
    return f"({','.join(group[name] for name in rising)})"


# -- equality ------------------------------------------------------------------------------------------------

def equal(gold, answer, leaf):
    """Whether two tidy answers mean the same. leaf(gold, answer) is asked of scalars that are neither equal
    as text nor both numbers."""
    return same(gold, answer, leaf) or _same_choice(gold, answer, leaf)


def same(gold, answer, leaf):
    """equal(), but for the letters of options."""
    a, b = number(gold), number(answer)
    if a is not None and b is not None:
        return a == b
    text = r"\text" in gold + answer
    if gold == answer or _words(gold, text) == _words(answer, text) != "":
        return gold != ""
    for decide in (_same_region, _same_assignments):
        decided = decide(gold, answer, leaf)
        if decided is not None:
            return decided
    (gold_kind, golds), (kind, answers) = _items(gold), _items(answer)
    if len(golds) != len(answers) or gold_kind == kind == "set":         # a set has no item twice
        golds, answers = (_distinct(items) if of == "set" else items
                          for of, items in ((gold_kind, golds), (kind, answers)))
    if len(golds) != len(answers) or not 0 < len(golds) <= ITEMS:
        return False
    if len(golds) > 1 and "union" in (gold_kind, kind) and gold_kind != kind:
        return False
    if "set" in (gold_kind, kind) and gold_kind != kind and re.search(r"\\begin|\\emptyset", gold + answer):
        return False                                      # a brace about a matrix is none of its brackets
    for item in golds:
        match = next((a for a in answers if _same_item(item, a, leaf)), None)
        if match is None:
            return False
        answers.remove(match)
    return True


_CHOICE = re.compile(r"(?:\\text\{\(?([A-E])[).:]*\}|\(([A-E])\)|([A-E])\))[:.]?"
                     r"([^-+*/^_=,;:)<>|].*|-[^-+].*)")
_LETTER = re.compile(r"(?:\\text\{)?(?:(?:[Oo]ption|[Cc]hoice) ?)?\(?([A-E])\)?\}?")


def _same_choice(gold, answer, leaf):
    """An option with its letter, (B) 7: as B where the gold is a letter, as 7 where it is none."""
    gold_letter, gold_value = _choice(gold)
    letter, value = _choice(answer)
    if gold_letter and letter:
        return gold_letter == letter and (None in (gold_value, value) or same(gold_value, value, leaf))
    if gold_value is None or value is None or not (gold_letter or letter):
        return False
    return same(gold_value, value, leaf)


def _choice(s):
    """(letter or None, value or None)."""
    if letter := _LETTER.fullmatch(s):
        return letter[1], None
    found = _CHOICE.fullmatch(s)
    if not found or re.search(r"\([A-E]\)|\\text\{[A-E]\}", found[4]):
        return None, s                                    # (A), (C) and (A)(C) are no option with its value
    return found[1] or found[2] or found[3], found[4]


def _same_region(gold, answer, leaf):
    """Sets of reals; None where one is none, or where both may be points."""
    if is_plain(gold) and is_plain(answer):
        return None
    golds, answers = region(gold), region(answer)
    if golds is None or answers is None:
        return None
    (gold_name, golds), (name, answers) = golds, answers
    if gold_name and name and gold_name != name or len(golds) != len(answers):
        return False
    ends = []
    for a, b in zip(golds, answers, strict=True):
        if (a.open_low, a.open_high) != (b.open_low, b.open_high):
            return False
        ends += [(a.low, b.low, a.texts[0], b.texts[0]), (a.high, b.high, a.texts[1], b.texts[1])]
    near = all(a == b or abs(a - b) <= 1e-6 * abs(a) for a, b, _, _ in ends)
    return near and all(a == b or _same_item(text, other, leaf) for a, b, text, other in ends)


def _same_assignments(gold, answer, leaf):
    """x=1, y=2 beside the same, or beside tuples or a list in the order of the names; else None."""
    golds, answers = _assignments(gold), _assignments(answer)
    if golds and answers:
        left = list(answers)
        for group in golds:
            match = next((a for a in left if a.keys() == group.keys()
                          and all(same(group[name], a[name], leaf) for name in group)), None)
            if match is None:
                return False
            left.remove(match)
        return not left
    if not golds and not answers:
        return None
    tuples, other = [_tuple(group) for group in golds or answers], answer if golds else gold
    if None in tuples:
        return False
    items = cut(other, r",|\\text\{and\}")[::2]
    bare = not inside(other, r"\{", r"\}") and "(" not in gold and "=" not in other
    if golds and len(tuples) == 1 and len(items) == len(golds[0]) and bare:
        other = f"({','.join(filter(None, items))})"      # a bare list is in their order
    if not all(ordered(item) for item in _items(other)[1]):
        return False if golds else None
    return same(",".join(tuples), other, leaf) if golds else same(other, ",".join(tuples), leaf)


_MODULUS = re.compile(r"(.*?)\\pmod\{([^{}]*)\}")


def _same_item(gold, answer, leaf):
    """Whether two items of a list are the same: ranges, then the sides of equations, then values."""
    gold, answer = unparenthesised(gold), unparenthesised(answer)
    if gold == answer:
        return gold != ""
    gold_modulus, modulus = _MODULUS.fullmatch(gold), _MODULUS.fullmatch(answer)
    if gold_modulus or modulus:
        return _same_residue(gold, answer, gold_modulus, modulus, leaf)
    gold_name, gold_range = _range(gold) or ("", gold)
    name, range_ = _range(answer) or ("", answer)
    if gold_name or name:
        if gold_name and name and gold_name != name:
            return False
        return _same_value(gold_range, range_, leaf) if ordered(gold_range) and ordered(range_) else (
            bool(gold_name and name) and leaf(gold, answer))
    gold_sides, sides = _sides(gold), _sides(answer)
    if len(gold_sides) == len(sides) == 1:
        return _same_value(gold, answer, leaf)
    if len(gold_sides) > 1:
        return _same_equation(gold, answer, gold_sides, sides, leaf)
    return _has_value(gold, sides, leaf)


def _same_equation(gold, answer, gold_sides, sides, leaf):
    """Where the gold is an equation: for a value, under its name or alone, else as a whole."""
    value = gold_sides[-1]
    if all(map(_is_numeric, gold_sides)):                 # 5! = 120 is 120; 1 = 1 says nothing of it
        said = {re.sub(r"[(){} ]", "", side) for side in sides}
        repeated = re.sub(r"[(){} ]", "", gold_sides[0]) in said
        if len(sides) > 1 and not repeated and all(map(_is_numeric, sides)):
            return False
        return _has_value(value, sides, leaf)
    if len(gold_sides) > 2 or not (_QUANTITY.fullmatch(gold_sides[0]) or ordered(value)):
        return len(sides) > 1 and leaf(gold, answer)      # an equation, no value
    if len(sides) > 1:
        sides = _renamed(gold_sides[0], sides)
        if _bare_name(sides[0]) != _bare_name(gold_sides[0]):
            return leaf(gold, answer)                     # x = 5 is not y = 5, but 2y = 10 is y = 5
        sides = sides[1:]
    return _has_value(value, sides, leaf)


def _has_value(value, sides, leaf):
    """Whether all sides that have a value have this one; the others say of which quantity it is."""
    if not _is_numeric(value):
        values = sides[1:] if len(sides) > 1 and _QUANTITY.fullmatch(sides[0]) else sides
        return bool(values) and all(same(value, side, leaf) for side in values)
    named = len(sides) > 1 and not _QUANTITY.fullmatch(sides[0])
    standing = number(_without_unit(value, True, "")[0]) in (0, 1)
    if named and standing and names_of(sides[0]) & set("xyz"):
        return False                                      # 2x-y = 0 is a line, x^2-y^2 = 1 a curve
    if named and len(sides) == 2 and _is_equation(sides[0]) or any(map(hedged, sides)):
        return False                                      # 2x+1 = 7 says that x is 3
    values = [side for side in sides if _is_numeric(side)]
    return bool(values) and all(same(value, side, leaf) for side in values)


def _sides(s):
    """The sides of an equation, or [s]; the name first, also of 5 = x."""
    sides = cut(s, r"=|\\equiv(?![a-z])\s?")[::2]
    turned = len(sides) == 2 and re.fullmatch("[A-Za-z]", sides[1]) and not re.fullmatch(_NAME, sides[0])
    return sides[::-1] if turned else sides


def _is_numeric(side):
    """Whether a side names nothing and so has a value."""
    value = side
    for part in cut(side, r"\\approx(?![a-z])\s?")[::2]:
        value, _, _ = _without_unit(part, True, "")
    value = re.sub(r"\\(?:begin|end)\{[^{}]*\}|\\text\{[^{}]*\}", "", value)
    return not names_of(value) and bool(re.search(r"[0-9ei]|\\pi|\\infty", value))


def _bare_name(side):
    """|AB| and \\overline{AB} as AB."""
    return re.sub(r"^(?:\|([A-Z]{2})\||\\overline\{([A-Z]{2})\})$", r"\1\2", side)


def _is_equation(side):
    """Whether a side beside a number is one of an equation for the one letter in it, or of a curve."""
    if len(names_of(side) & set("xyz")) > 1 and re.search("[0-9]", side):
        return True
    letters = set(re.findall(r"[A-Za-z](?:_(?:\{[^{}]*\}|[0-9A-Za-z]))?", side))
    return len(letters) == 1 and "\\" not in side


def _renamed(gold_name, sides):
    """sides with the name in f(t) as the gold's f(x) has it."""
    pattern = r"(.*)\(([a-z](?:,[a-z])*)\)"              # of P(A), A is no variable
    gold_call, call = (re.fullmatch(pattern, name) for name in (gold_name, sides[0]))
    if not gold_call or not call or gold_call[1] != call[1] or len(gold_call[2]) != len(call[2]):
        return sides
    renamed = dict(zip(call[2].split(","), gold_call[2].split(","), strict=True))
    body = "=".join(sides[1:])
    free = names_of(body) - renamed.keys()
    if r"\text" in body or free & set(renamed.values()) or len(set(renamed.values())) < len(renamed):
        return sides
    body = re.sub(r"\\[A-Za-z]+|[A-Za-z]", lambda m: renamed.get(m[0], m[0]), body)
    return [gold_name, *body.split("=")]


def _same_residue(gold, answer, gold_modulus, modulus, leaf):
    r"""10\pmod{13} beside 10, 23\pmod{13} and x\equiv 10: of two moduli, they must agree."""
    gold, answer = (m[1] if m else s for m, s in ((gold_modulus, gold), (modulus, answer)))
    if not (gold_modulus and modulus):
        plain = gold if modulus else answer
        return "=" not in plain and r"\text" not in plain and _same_item(gold, answer, leaf)
    if gold_modulus[2] != modulus[2]:
        return False
    a, b, n = (number(s) for s in (_sides(gold)[-1], _sides(answer)[-1], modulus[2]))
    named = {sides[0] for sides in (_sides(gold), _sides(answer)) if len(sides) > 1}
    return None not in (a, b, n) and n > 0 and (a - b) % n == 0 and len(named) < 2


def _same_value(gold, answer, leaf):
    """Whether two sides without equation signs have the same value."""
    golds, answers = (cut(s, r"\\approx(?![a-z])\s?")[::2] for s in (gold, answer))
    if len(golds) > 1 or len(answers) > 1:
        return _same_about(golds, answers, leaf)
    gold_rows, rows = ordered(gold), ordered(answer)
    if gold_rows and rows:
        return _same_rows(gold_rows, rows, leaf)
    if not gold_rows and not rows:
        return _same_scalar(gold, answer, leaf)
    found = gold_rows or rows
    value = determinant(found.rows) if found.brackets == "determinant" else None
    if value is None:
        return False
    return _same_scalar(str(value), answer, leaf) if gold_rows else _same_scalar(gold, str(value), leaf)


def _same_about(golds, answers, leaf):
    r"""exact \approx decimal: the exact value where the decimal is about that, or the decimal where it is the
    gold and the exact one rounds to it."""
    def meant(parts):
        named = parts[0] == "" or re.fullmatch(_NAME, parts[0]) and not _is_numeric(parts[0])
        return parts[1:] if named else parts

    golds, answers = meant(golds), meant(answers)
    if not answers:
        return False
    exact, *decimals = answers
    if not _consistent(exact, decimals):
        return False
    if any(same(gold, exact, leaf) for gold in golds):
        return True
    decimal = decimals[-1] if decimals else ""
    rounds = decimal and _rounds_to(exact, decimal) and not (_is_decimal(exact) and "." not in decimal)
    return bool(rounds) and any(same(gold, decimal, leaf) for gold in golds)


def _consistent(exact, decimals):
    """Whether decimals are about the value before them, as far as it has one."""
    value = _plain_value(exact)
    others = [_plain_value(decimal) for decimal in decimals]
    if None in others:
        return False
    return value is None or all(abs(value - other) <= 0.02 * abs(value) or _rounds_to(exact, decimal)
                                for decimal, other in zip(decimals, others, strict=True))


def _rounds_to(exact, decimal):
    value, digits = _plain_value(exact), len(decimal.partition(".")[2])
    rounded = number(_without_unit(decimal, True, "")[0])
    return value is not None and rounded is not None and abs(value - rounded) <= 0.501 * 10.0 ** -digits


def _plain_value(s):
    value, _, times = _without_unit(s, True, "")
    found = value_of(value)
    return None if found is None else found * times


def _is_decimal(s):
    return re.fullmatch(r"-?[0-9]*\.[0-9]+", s) is not None


def _same_rows(gold, answer, leaf):
    """Whether two results of ordered() have the same brackets, shape and items; of cases in any order."""
    if gold.brackets != answer.brackets or list(map(len, gold.rows)) != list(map(len, answer.rows)):
        return False
    if gold.brackets == "determinant":
        a, b = determinant(gold.rows), determinant(answer.rows)
        if a is not None and b is not None:
            return a == b
    rows = list(answer.rows)
    if gold.brackets == "cases":
        for row in gold.rows:
            match = next((r for r in rows if all(same(tidy(a), tidy(b), leaf)
                                                 for a, b in zip(row, r, strict=True))), None)
            if match is None:
                return False
            rows.remove(match)
        return True
    golds = [item for row in gold.rows for item in row]
    answers = [item for row in rows for item in row]
    return all(same(tidy(a), tidy(b), leaf) for a, b in zip(golds, answers, strict=True))


# -- scalars, with what stands behind them -------------------------------------------------------------------

_TAIL = re.compile(r"(?:\\text\{[^{}]*\}(?:\^\{?-?[0-9]\}?)?(?:/|\\cdot ?)?|\^\\circ ?|%)+$")
_BARE = re.compile(r"(.*[0-9}])([A-Za-z]{1,3}(?:/[a-z](?:\^[23])?)?)")


def _without_unit(s, gold, trusted):
    """(the value, whether in percent, what a word like million multiplies it by) of a scalar with a unit
    behind it; (s, False, 1) where it is none. gold: any word may be a unit; trusted: those of this may."""
    tail = _TAIL.search(s)
    if not tail or not tail.start():
        return s, False, 1
    value = s[: tail.start()]
    phrases = re.findall(r"\{([^{}]*[A-Za-z][^{}]*)\}", tail[0])
    times, words = 1, phrases[0].split() if phrases else []
    while words and (by := factor(words[0])):
        times, words = times * by, words[1:]
    phrases = [" ".join(words), *phrases[1:]] if words else phrases[1:]
    if times != 1 and number(value) is None:
        return s, False, 1
    good = (re.search(r"[0-9]|\\pi", value) and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", value)
            and all(is_unit(phrase, gold) or rf"\text{{{phrase}}}" in trusted for phrase in phrases))
    return (unparenthesised(value), "%" in tail[0], times) if good else (s, False, 1)


def _same_scalar(gold, answer, leaf):
    """Scalars, with units left out of both."""
    gold_value, gold_percent, gold_times = _without_unit(gold, True, gold)
    value, percent, times = _without_unit(answer, False, gold)
    if gold_value == value and gold_times == times:
        return value != ""
    ratio, other = _ratio(gold), _ratio(value)
    if ratio:
        return other == ratio or len(ratio) == 2 and number(answer) == ratio[0]
    a, b = number(gold_value), number(value)
    if a is not None and b is None and gold_value != gold:       # the gold has a unit: 5m may have one
        bare = _BARE.fullmatch(value)
        b = number(bare[1]) if bare and all(is_unit(word) for word in bare[2].split("/")) else None
    if a is None or b is None:
        return gold_times == times == 1 and leaf(gold_value, value)
    a, b = a * gold_times, b * times
    hundredths = [x / 100 if is_percent else x for x, is_percent in ((a, gold_percent), (b, percent))]
    return a == b or gold_percent != percent and hundredths[0] == hundredths[1]       # 50% is 50, and is 0.5


def _ratio(s):
    """The terms of 3:5, or of 3 to 5, over the last one; None of others, as of a time."""
    terms = cut(s, r":|\\text\{to\}")[::2]
    values = [number(term) for term in terms]
    if len(terms) < 2 or not all(values) or any(re.match("0[0-9]", term) for term in terms):
        return None
    return [value / values[-1] for value in values[:-1]] + [1]


_SAME_WORDS = {
    "doesnotexist": "dne", "thelimitdoesnotexist": "dne", "limitdoesnotexist": "dne",
    "nosolutions": "nosolution",
    "therearenosolutions": "nosolution", "thereisnosolution": "nosolution", "nosolutionsexist": "nosolution",
    "nosolutionexists": "nosolution", "norealsolutions": "norealsolution", "noneoftheabove": "noneofthese"}


def _words(s, fold):
    """An answer without \\text and spaces; words also without punctuation, articles and (fold) case."""
    bare = TEXT.sub(r"\1", s)
    plain = re.sub(r"\s", "", bare)
    if (not fold and not re.search("[A-Za-z]{4}", plain) or not re.fullmatch("[A-Za-z().,'-]+", plain)
            or len(cut(s, _LIST)) > 1):
        return plain
    plain = re.sub(r"\s", "", re.sub(r"^\s*(?:an?|the)\s+(?=[A-Za-z]{3})", "", bare, flags=re.I))
    plain = re.sub("[().,']", "", plain)
    plain = plain.casefold() if len(plain) > 1 else plain
    return _SAME_WORDS.get(plain, plain)


def _undecided(gold, answer):
    """What is asked of scalars in the parent: no, or sympy is to say."""
    if not readable(gold, answer):
        return False
    a, b = estimate(gold), estimate(answer)
    if a is not None and b is not None and abs(a - b) > 1e-6 * abs(a):
        return False
    raise Undecided


@functools.lru_cache(16384)
def _decided(gold, answers):
    """Whether an answer is equal to the gold, where no sympy is needed; else it raises Undecided."""
    return any(equal(gold, answer, _undecided) for answer in answers)


def grade_math(text, truth, ask):
    if isinstance(truth, bool) or not isinstance(truth, (str, int, float)):
        return Verdict(False, None, f"the truth is a {type(truth).__name__}, not LaTeX")
    boxes, gold = boxes_of(text), str(truth).strip()
    if not boxes or boxes[-1][1] is None:
        return Verdict(False, None, "the last box is not closed" if boxes else "no box")
    answer = unboxed(boxes[-1][1])
    if gold_boxes := boxes_of(gold):
        gold = gold_boxes[-1][1] or ""
    if len(gold) > LONGEST or len(answer) > LONGEST:
        return Verdict(gold == answer.strip() != "", answer, f"over {LONGEST:,} characters: compared as text")
    golds, answers = tidy(gold), [tidy(answer)]
    if golds in ("", r"\text{}"):
        return Verdict(False, answer, "the truth is empty")
    if "," in answer and len(cut(golds, ",")) > 1:        # 100,200 is a list where the gold is one
        answers.append(tidy(re.sub(r"(?<=[0-9]),(?:\\[,;:! ])*\s*(?=[0-9])", ", ", answer)))
    try:
        right = _decided(golds, tuple(answers))
        by = ""
    except Undecided:
        right = ask("math", golds, answers)
        by = " (sympy)"
    if isinstance(right, str):                            # why there was no answer
        return Verdict(False, answer, right)
    return Verdict(right, answer, f"equal{by}" if right else f"not equal{by}")
