r"""Scalars without sympy: exact numbers, estimates, and what sympy may be asked.

    number(s)           the exact value of a decimal, fraction, mixed number, repeating decimal, power of ten
    estimate(s)         a float for what is made of short numbers, names, roots, powers and products
    value_of(s)         either, where it is real and without names
    readable(a, b)      whether sympy is to look at two scalars
"""

import functools
import math
import re
from fractions import Fraction

_DIGITS = r"[0-9]+(?:\.[0-9]*)?"
_DECIMALS, _MIXED, _REPEATING, _POWER = (re.compile(rf"([-+]?){pattern}") for pattern in (
    rf"({_DIGITS})(?:/({_DIGITS}))?", rf"([0-9]*)\\frac\{{([-+]?{_DIGITS})\}}\{{([-+]?{_DIGITS})\}}",
    r"([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}",
    rf"(?:({_DIGITS})(?:\\times|\\cdot|(?=e)))?(?:10\^|(?<=[0-9.])e)\{{?([-+]?[0-9]{{1,3}})\}}?"))


@functools.lru_cache(8192)
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


def value_of(s):
    """A real value: an exact number, or a float's estimate; None of what has none, as of what has names."""
    value = number(s)
    if value is None and not names_of(s):
        value = estimate(s)
    if isinstance(value, complex):
        return value.real if abs(value.imag) < 1e-12 * abs(value) else None
    return value


COMMANDS = """frac sqrt pi cdot times div sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln
    exp binom infty circ lfloor rfloor lceil rceil le ge""".split()
_GREEK = "alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi psi omega".split()
_READABLE = re.compile(rf"(?:\\(?:{'|'.join(COMMANDS + _GREEK)})(?![A-Za-z])|"
                       r"[-0-9A-Za-z+*/^_{}()\[\]|!.=<> ])*")
_UNREADABLE = re.compile(                                 # words, x2, 12_5, (x)2; 10^{99999}, 9^{9^9}; 9!!
    r"(?<![\\A-Za-z])(?:[A-Za-z]{4}|[A-Za-z][0-9])|[0-9]_|\)[0-9]|(?<!_)\{[^{}]*\}[0-9]"
    r"|[0-9]{150}|\^\{?[-+]?[0-9]{5}|\^(?!\{[1-4]\^[1-4]\})\{?\(?[0-9.]+\^"
    r"|[0-9]{4}\)*!|!\)*!|\}\)?!|\\binom\{?[0-9]{5}")


def names_of(s):
    """The names in a tidy scalar: letters and Greek ones, without e, i and commands."""
    return set(re.findall(r"\\[a-z]+|[A-Za-z]", s)) - {"e", "i", *(f"\\{c}" for c in COMMANDS)}


def readable(gold, answer):
    """Whether sympy is to look at two scalars: both can be read to the last character, the answer names
    nothing that the gold does not, and there is no number too large to look at."""
    return names_of(answer) <= names_of(gold) and all(
        _READABLE.fullmatch(s) and not _UNREADABLE.search(s)
        and all(s.count(x) == s.count(y) for x, y in ("()", "{}")) for s in (gold, answer))


def estimate(s):
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
