r"""Sets of real numbers: intervals, unions, inequalities and what they leave out, as one list of intervals.

    region("x<3, x\\ne 2")      ("x", [Interval(-inf, 2), Interval(2, 3)])
"""

import functools
import math
import re
from fractions import Fraction
from typing import NamedTuple

from grading.brackets import cut, inside
from grading.scalars import number, value_of

_NAME = r"[A-Za-z](?:_[0-9a-z])?|\\(?!pi|infty|frac|sqrt)[a-z]+|[A-Za-z]\([a-z]\)"
_RELATION = r"<|>|\\[lgn]e(?![a-z])\s?"
_AND = r"\\text\{(?:and|but|with|where)\}|\\(?:cap|land)(?![a-z])\s?"
_OR = r"\\cup(?![a-z])\s?|\\text\{or\}"
_REALS = re.compile(r"\\mathbb\{R\}|(?:\\text\{)?(?:the )?(?:set of )?(?:all )?real ?(?:numbers|values)?"
                    r"(?: [a-z])?\}?|(?:\\text\{)?all ?reals(?: [a-z])?\}?|\(-\\infty,\\infty\)", re.I)
_TERM = re.compile(rf"(?:(.*?)(?:\\cdot)?({_NAME})|\\frac\{{(.*?)({_NAME})\}}\{{([0-9]+)\}})(?:/([0-9]+))?")


class Interval(NamedTuple):
    low: float             # or a Fraction
    open_low: bool
    high: float
    open_high: bool
    texts: tuple           # of the two ends


ALL = Interval(-math.inf, True, math.inf, True, (r"-\infty", r"\infty"))


@functools.lru_cache(4096)
def region(s):
    """(a name or "", the intervals in order, as few as can be) of a set of real numbers, or None of anything
    else and where an end has no value."""
    found = _region(s)
    if found is None or found[1] and all(i.low == i.high for i in found[1]):
        return None
    return found[0], merged(found[1])


def is_plain(s):
    """Whether s is one pair of brackets, which may be an interval or a point."""
    return _interval(s) is not None


def merged(intervals):
    """Intervals in order, joined where they meet."""
    out = []
    for i in sorted(intervals, key=lambda i: (i.low, i.open_low)):
        last = out[-1] if out else None
        touching = last and (i.low < last.high or i.low == last.high and not (i.open_low and last.open_high))
        if not touching:
            out.append(i)
        elif (i.high, not i.open_high) > (last.high, not last.open_high):
            out[-1] = last._replace(high=i.high, open_high=i.open_high, texts=(last.texts[0], i.texts[1]))
    return out


def intersection(a, b):
    """Of two lists of intervals."""
    out = []
    for x in a:
        for y in b:
            low = max(x, y, key=lambda i: (i.low, i.open_low))
            high = min(x, y, key=lambda i: (i.high, not i.open_high))
            both = Interval(low.low, low.open_low, high.high, high.open_high, (low.texts[0], high.texts[1]))
            if both.low < both.high or both.low == both.high and not (both.open_low or both.open_high):
                out.append(both)
    return out


def complement(intervals):
    out, low = [], (-math.inf, True, r"-\infty")
    for i in merged(intervals):
        out.append(Interval(low[0], low[1], i.low, not i.open_low, (low[2], i.texts[0])))
        low = i.high, not i.open_high, i.texts[1]
    out.append(Interval(low[0], low[1], math.inf, True, (low[2], r"\infty")))
    return [i for i in out if i.low < i.high or i.low == i.high and abs(i.low) < math.inf
            and not (i.open_low or i.open_high)]


def _region(s):
    builder = re.fullmatch(r"\\\{(.+?)[|:](.*)\\\}", s)   # \{x\in\mathbb{R} | x > 3\}
    if builder and (domain := re.fullmatch(rf"({_NAME})(?:\\in\s?(.*))?", builder[1])):
        return _all(r"\land", [builder[2], *([rf"{domain[1]}\in {domain[2]}"] if domain[2] else [])])
    for separators, join in ((_OR, _any), (_AND, _all), ("[,;]", _comma)):
        parts = cut(s, separators)
        if len(parts) > 1:
            return join(parts[1], [part.strip(",") for part in parts[::2]])
    outer, found, inner = s.partition(r"\setminus")
    if not found and re.search(r"[)\]}]-\\\{", s):
        outer, found, inner = s.partition(r"-\{")
        inner = r"\{" + inner
    if found:
        whole, without = _region(outer), _region(inner.strip())
        if whole is None or without is None:
            return None
        return whole[0], intersection(whole[1], complement(without[1]))
    member = re.fullmatch(rf"({_NAME})\\in\s?(.*)", s)
    if member:
        found = _region(member[2])
        return found and (member[1], found[1])
    return _atom(s)


def _atom(s):
    if _REALS.fullmatch(s):
        return "", [ALL]
    if s in (r"\mathbb{R}^+", r"\mathbb{R}^{+}", r"\mathbb{R}_+", r"\mathbb{R}_{>0}"):
        return "", [ALL._replace(low=0, texts=("0", r"\infty"))]
    if s == r"\emptyset":
        return "", []
    if points := inside(s, r"\{", r"\}"):
        signed = [point.replace(r"\pm", sign) for point in cut(points, "[,;]")[::2]
                  for sign in (("", "-") if point.startswith(r"\pm") else ("",))]
        ends = [_end(point) for point in signed]
        return None if None in ends else ("", [_point(end) for end in ends])
    interval = _interval(s)
    return ("", [interval]) if interval else _inequality(s)


def _any(separator, parts):
    """A union. Pairs joined by "or" are points, not intervals."""
    found = [_region(part) for part in parts]
    if None in found or len({name for name, _ in found if name}) > 1:
        return None
    if "or" in separator and all(re.fullmatch(r"\((?!.*infty).*\)", part) for part in parts):
        return None
    return max(name for name, _ in found), [i for _, intervals in found for i in intervals]


def _all(_, parts):
    found = [_region(part) for part in parts]
    if None in found or len({name for name, _ in found if name}) > 1:
        return None
    both = [ALL]
    for _, intervals in found:
        both = intersection(both, intervals)
    return max(name for name, _ in found), both


def _comma(_, parts):
    r"""x<3, x\ne 1, 2: a comma between conditions is "and", unless nothing is in all of them."""
    conditions = []
    for part in parts:
        if not re.search(rf"{_RELATION}|\\in(?![a-z])|\\mathbb", part):
            if not conditions or r"\ne" not in conditions[-1]:
                return None
            part = conditions[-1].partition(r"\ne")[0] + r"\ne " + part
        conditions.append(part)
    found = _all("", conditions)
    return found if found is None or found[1] else _any("", conditions)


def _end(text):
    """(value, text) of an end of an interval, or None."""
    text = text.strip()
    if text in (r"\infty", r"-\infty"):
        return (-math.inf if text[0] == "-" else math.inf), text
    value = value_of(text)
    return None if value is None else (value, text)


def _point(end):
    return Interval(end[0], False, end[0], False, (end[1], end[1]))


def _interval(s):
    if s[:1] not in ("(", "[") or s[-1:] not in (")", "]"):
        return None
    ends = [_end(part) for part in cut(s[1:-1], "[,;]")[::2]]
    if len(ends) != 2 or None in ends or not ends[0][0] < ends[1][0]:
        return None
    return Interval(ends[0][0], s[0] == "(", ends[1][0], s[-1] == ")", (ends[0][1], ends[1][1]))


def _inequality(s):
    r"""Of x<3, 1\le 2x+1<5, |x-1|>2, x\ne\pm 2."""
    parts = cut(s, _RELATION)
    terms, signs = parts[::2], [sign.strip() for sign in parts[1::2]]
    if len(signs) not in (1, 2) or not all(terms) or len({sign[:2] in (">", r"\g") for sign in signs}) > 1:
        return None
    if r"\ne" in signs:
        return _unequal(*terms) if len(signs) == 1 else None
    if signs[0][:2] in (">", r"\g"):                      # the larger on the left: turn round
        terms, signs = terms[::-1], signs[::-1]
    halves = [_less(low, high, sign in ("<", ">"))
              for low, high, sign in zip(terms, terms[1:], signs, strict=False)]
    if None in halves or len({name for name, _ in halves}) > 1:
        return None
    both = [ALL]
    for _, intervals in halves:
        both = intersection(both, intervals)
    return halves[0][0], both


def _unequal(left, right):
    if not re.fullmatch(_NAME, left):
        zero = _linear_zero(left, right)
        return zero and (zero[0], complement([_point(zero[1])]))
    texts = [right.replace(r"\pm", ""), right.replace(r"\pm", "-")] if right.startswith(r"\pm") else [right]
    ends = [_end(text) for text in texts]
    return None if None in ends else (left, complement([_point(end) for end in ends]))


def _less(low, high, strict):
    """(name, intervals) where low < high, one of which names something; None if it cannot be solved here."""
    if re.fullmatch(_NAME, low) and (end := _end(high)):
        return low, [Interval(-math.inf, True, end[0], strict, (r"-\infty", end[1]))]
    if re.fullmatch(_NAME, high) and (end := _end(low)):
        return high, [Interval(end[0], strict, math.inf, True, (end[1], r"\infty"))]
    if (content := inside(low, "|", "|")) and (end := _end(high)):
        above = _less(content, high, strict)
        below = _less(_negative(high), content, strict)
        return above and below and (above[0], intersection(above[1], below[1])) if end[0] >= 0 else None
    if (content := inside(high, "|", "|")) and (end := _end(low)):
        above = _less(low, content, strict)
        below = _less(content, _negative(low), strict)
        return above and below and (above[0], merged(above[1] + below[1])) if end[0] >= 0 else None
    zero = _linear_zero(low, high)
    if zero is None:
        return None
    name, end, slope = zero
    if slope > 0:
        return name, [Interval(-math.inf, True, end[0], strict, (r"-\infty", end[1]))]
    return name, [Interval(end[0], strict, math.inf, True, (end[1], r"\infty"))]


def _negative(text):
    value = number(text)
    return f"-{text}" if value is None else str(-value)


def _linear_zero(left, right):
    """(name, (value, text) where left = right, the slope of left - right), both linear in one name."""
    a, b = _linear(left), _linear(right)
    if a is None or b is None or not (a[0] or b[0]) or a[0] and b[0] and a[0] != b[0]:
        return None
    slope, constant = a[1] - b[1], b[2] - a[2]
    if slope == 0:
        return None
    value = Fraction(constant, 1) / slope
    return a[0] or b[0], (value, str(value)), slope


def _linear(s):
    """(name or "", slope, constant), exact, of 3, 2x-1, 3-x/2."""
    name, slope, constant = "", Fraction(0), Fraction(0)
    parts = cut(s, "[-+]")
    signs = ["+", *parts[1::2]]
    for term, sign in zip(parts[::2], signs, strict=True):
        if not term and term is parts[0]:
            continue
        factor = Fraction(-1 if sign == "-" else 1)
        if (value := number(term)) is not None:
            constant += factor * value
            continue
        match = _TERM.fullmatch(term)
        if not match:
            return None
        found, times = (match[2], match[1]) if match[2] else (match[4], match[3])
        times = number(times or "1")
        if times is None or name not in ("", found):
            return None
        name = found
        slope += factor * times / int(match[5] or 1) / int(match[6] or 1)
    return name, slope, constant
