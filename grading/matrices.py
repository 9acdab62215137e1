r"""Tuples, vectors and matrices of a tidy answer, their factors and transposes, and determinants.

    ordered(r"\\frac{1}{2}\\begin{pmatrix}2\\\\4\\end{pmatrix}")      Ordered("matrix", [["1"], ["2"]])
"""

import re
from typing import NamedTuple

from grading.brackets import cut, inside
from grading.scalars import number

_BLOCK = re.compile(r"\\begin\{([pbvBV]?)(matrix|array)\}(?:\{[^{}]*\})?(.*?)(?:\\\\)?\\end\{\1\2\}")
_CASES = re.compile(r"\\begin\{[dr]?cases\*?\}(.*?)(?:\\\\)?\\end\{[dr]?cases\*?\}")
_TRANSPOSED = re.compile(r"\^\{?(?:T|\\top|\\intercal|\\text\{T\}|t|\\prime|')\}?$")
_BEFORE = re.compile(r"-|\\det ?|(?:[-0-9A-Za-z./+()^{} ]|\\(?:frac|sqrt|pi|cdot|times))*")
LARGEST = 6                # rows of a determinant that is worked out here


class Ordered(NamedTuple):
    brackets: str          # "()", "[)", .. | "matrix" | "cases" | "determinant" | "norm"
    rows: list             # of lists of items


def ordered(s):
    """The rows of a tuple, an interval, a vector, a matrix, or a function given by cases; None of others."""
    if found := _CASES.fullmatch(s):
        return Ordered("cases", [_case(row) for row in found[1].split(r"\\") if row])
    transposed = _TRANSPOSED.search(s)
    if transposed:
        found = ordered(s[: transposed.start()])
        if not found or found.brackets not in ("matrix", "()", "[]") or len(set(map(len, found.rows))) > 1:
            return None
        return Ordered("matrix", [list(column) for column in zip(*found.rows, strict=True)])
    if block := _BLOCK.search(s):
        return _matrix(s, block)
    for opening, closing in (("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), (r"\langle", r"\rangle")):
        content = inside(s, opening, closing)
        items = cut(content.strip(), "[,;]")[::2] if content else ()
        if len(items) > 1:
            return Ordered(opening + closing, [items])
    return None


def _matrix(s, block):
    """The matrix of a block with its brackets, and a scalar before it."""
    before, kind, after = s[: block.start()], block[1], s[block.end() :]
    if not kind and after[:1] and before[-1:] + after in ("()", "[]", "||"):
        before, kind = before[:-1], "v" if after == "|" else "p"
        after = ""
    elif not kind and before.endswith(r"\|") and after == r"\|":
        before, kind, after = before[:-2], "V", ""
    if after or not _BEFORE.fullmatch(before):
        return None
    rows = [row.split("&") for row in re.split(r"\\\\", block[3])]
    if before.strip() == r"\det" and kind not in ("v", "V"):
        before, kind = "", "v"
    factor = re.sub(r"(?:\\cdot|\\times) ?$", "", before)
    if factor and kind == "v":
        return None
    if factor:
        rows = [[_times(factor, entry) for entry in row] for row in rows]
    return Ordered({"v": "determinant", "V": "norm"}.get(kind, "matrix"), rows)


def _times(factor, entry):
    a, b = number("-1" if factor == "-" else factor), number(entry)
    if a is None or b is None:
        return rf"({'-1' if factor == '-' else factor})({entry})"
    return str(a * b)


def _case(row):
    r"""[value, condition] of a row of cases, without what joins the two."""
    value, _, condition = row.partition("&")
    if not condition:
        parts = cut(row, r",|\\text\{(?:if|for|when|where)[^{}]*\}")
        value, condition = parts[0], "".join(parts[2:])
    words = re.compile(r"^,|,$|^\\text\{,?\s*(?:if|for|when|where)\s*\}|^(?:if|for|when)(?=[A-Za-z0-9\\])"
                       r"|\\text\{,\}")
    for _ in range(3):
        value, condition = (words.sub("", part) for part in (value, condition))
    return [value, re.sub(r"\\text\{(?:if|for|when) ", r"\\text{", condition)]


def determinant(rows):
    """The exact determinant, a Fraction, of rows of numbers; None of others and of large ones."""
    values = [[number(entry) for entry in row] for row in rows]
    n = len(values)
    if n > LARGEST or any(len(row) != n or None in row for row in values):
        return None
    result = 1
    for i in range(n):
        pivot = next((k for k in range(i, n) if values[k][i] != 0), None)
        if pivot is None:
            return values[0][0] * 0
        if pivot != i:
            values[i], values[pivot] = values[pivot], values[i]
            result = -result
        result *= values[i][i]
        for k in range(i + 1, n):
            ratio = values[k][i] / values[i][i]
            values[k] = [a - ratio * b for a, b in zip(values[k], values[i], strict=True)]
    return result
