r"""Is this answer right? Math, code, science; the reward of RL and the score of every benchmark.

    grade("math", r"<think> 2 + 3 </think> \boxed{5}", "5")    # Verdict(correct=True, answer='5', reason=...)
    run_code("print(input())", {"kind": "stdio", "tests": [{"input": "7", "output": "7"}]}).verdict    # 'AC'

Only what follows the last </think> counts. A response that opened <think> and did not close it, or that did
not end by itself (finish_reason other than "stop"), has no answer; one without tags counts as a whole. No
response, however hostile, makes grade() raise or take longer than its limits. It raises for a broken
installation only: ModuleNotFoundError without math-verify, SandboxMissing without bubblewrap.

Math: the last \boxed or \fbox; no box, no answer. The structure of an answer (lists, sets, tuples, intervals,
unions, matrices, equations, units) is compared here, numbers as exact fractions, and what is left, scalar
expressions, by sympy through math-verify in worker processes with a deadline. Policies:
  - a bare list ("1, 2", "1 or 2", "\pm 1", "\{1, 2\}") is unordered and of equal length; what stands in
    brackets is ordered and the brackets must agree, so (1, 2) is not [1, 2) nor the list 1, 2
  - an inequality in one name is its interval; x = 5 is 5, but not y = 5; 10/2 = 5 is 5, as every part is
  - a unit, percent or degree sign, or currency is left out when the number agrees. Of an answer only known
    units and one-word plurals are: "5 apples" is 5, "5 million" is not
  - numbers are exact: 0.5 is 1/2, but 0.33 is not 1/3 and 1.414 is not \sqrt{2}, whichever of them is gold
  - 1,000 is a number, (1,000) too, (1,234) a pair; 1\frac{1}{2} and 1 1/2 are 3/2
  - words are compared as words (case aside), never as products of letters
Science: a letter from a box, "Answer: C", "the answer is (C)", a bold or a lone letter, or an option's text
where the options are given; the last of them wins. truth is the letter, or {"letter": "C", "options": [...]};
with the letter alone A to J are taken for options.
Code: the last fenced block (```python, ```py, ```); every test must pass. See run_code().

grade() and grade_batch() may be called from any thread.
"""

import atexit
import concurrent.futures
import contextlib
import functools
import importlib.util
import json
import math
import os
import platform
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
from decimal import Decimal
from fractions import Fraction
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np


class Verdict(NamedTuple):
    correct: bool
    answer: str | None     # what was taken for the answer; None if there is none
    reason: str            # one line for the logs


class Run(NamedTuple):
    verdict: str           # AC | WA | TLE | MLE | OLE (output) | RE (error) | CE (does not compile)
    test: int | None       # index of the first test not passed
    detail: str            # one line
    stdout: str            # of the last test run, its last 2,000 characters
    stderr: str
    seconds: float         # wall, all tests


class SandboxMissing(RuntimeError):
    """There is no bubblewrap that works here: the message says what to install."""


def grade(domain, response, truth, finish_reason="stop", unsafe_sandbox=False) -> Verdict:
    """The verdict on one response.

    domain: "math" | "code" | "science"; truth: LaTeX without a box | see run_code() | see above
    unsafe_sandbox: as in run_code()
    Whatever response and truth hold, it returns, with a reason; SandboxMissing and ModuleNotFoundError apart.
    """
    return _grade(domain, response, truth, finish_reason, lambda kind, *question: (
        _pool.ask(*question) if kind == "math" else run_code(*question, unsafe_sandbox)))


def grade_batch(items, workers=None, progress=None, unsafe_sandbox=False) -> list[Verdict]:
    """grade() of many, in their order: items are (domain, response, truth) or (..., finish_reason).

    workers: how many at a time (None: one a core); progress(done, total) is called after each, in the
        caller's thread.
    """
    def later(*_):
        raise _Undecided

    items, verdicts, done = list(items), {}, 0
    threads = concurrent.futures.ThreadPoolExecutor(workers or CORES)
    try:
        for i, (domain, response, truth, *reason) in enumerate(items):
            try:                                          # what needs no other process, without threads
                verdicts[i] = _grade(domain, response, truth, *(reason or ["stop"]), later)
            except _Undecided:
                verdicts[i] = threads.submit(grade, *items[i], unsafe_sandbox=unsafe_sandbox)
                continue
            done += 1
            if progress:
                progress(done, len(items))
        waiting = [v for v in verdicts.values() if isinstance(v, concurrent.futures.Future)]
        for _ in concurrent.futures.as_completed(waiting):
            done += 1
            if progress:
                progress(done, len(items))
    finally:
        threads.shutdown(cancel_futures=True)
    return [v.result() if isinstance(v, concurrent.futures.Future) else v for v in verdicts.values()]


def _grade(domain, response, truth, finish_reason, ask):
    """grade(), with another process asked by ask("math", gold, answers) and ask("code", code, truth)."""
    if not isinstance(domain, str) or domain not in _GRADERS:
        return Verdict(False, None, f"unknown domain {domain!r:.40}, known are: {', '.join(_GRADERS)}")
    text, problem = final_text(response, finish_reason)
    if text is None:
        return Verdict(False, None, problem)
    try:
        return _GRADERS[domain](text, truth, ask)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RecursionError, TypeError,
            ValueError) as e:
        return Verdict(False, None, f"cannot be graded: {type(e).__name__}: {e!s:.200}")


class _Undecided(Exception):
    """What only another process can decide."""


def final_text(response, finish_reason="stop"):
    """(what counts of a response, "") or (None, why there is no answer)."""
    if not isinstance(response, str):
        return None, f"the response is a {type(response).__name__}, not a text"
    if finish_reason != "stop":
        return None, f"no answer: ended by {finish_reason!r:.40}, not by itself"
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None, "no answer: <think> was not closed"
    return text, ""


def timed_out(reason) -> bool:
    """Whether a verdict's reason says that there was no time to grade, or that a program took too much. Such
    words stand first (what follows them may be a program's output, and hold any word)."""
    return reason.startswith(("TLE", "not decided in time", "not decided: all workers are busy"))


def transient(reason) -> bool:
    """Whether a verdict's reason says that the machine, not the answer, was at fault: no memory, no time, no
    place to run a program. Asked again, it may be another."""
    return (reason.startswith(("not decided", "cannot be graded: OSError", "cannot be graded: MemoryError"))
            or reason.startswith("RE") and ": bwrap: " in reason)


# -- shaping: terms of the reward beside correctness --------------------------------------------------------

def think_format(response, opened=False) -> bool:
    """Whether a response has the form <think> thoughts </think> response: it begins with the tag, there is
    one pair, and what follows is not blank. opened: the prompt ended with <think>, the response starts behind
    it."""
    text = ("<think>" if opened else "") + response
    return (text.count("<think>") == text.count("</think>") == 1 and text.lstrip().startswith("<think>")
            and bool(text.partition("</think>")[2].strip()))


def stop_penalty(finish_reason, size=1.0) -> float:
    """0.0 for a response that ended by itself, else -size."""
    return 0.0 if finish_reason == "stop" else -size


def repetition(ids, n=4) -> float:
    """1 - distinct n-grams / n-grams, of token ids: 0 where nothing recurs, near 1 in a loop; 0 if shorter
    than n. The penalty is a negative multiple of it."""
    ids = np.asarray(ids, dtype=np.int64)
    if len(ids) < n:
        return 0.0
    grams = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(ids, n))
    return 1.0 - len(np.unique(grams.view(f"V{8 * n}"))) / len(grams)


# -- science ------------------------------------------------------------------------------------------------

_LETTER = r"\(?(?:\\(?:text|textbf|mathrm|mathbf)\{)?[(\[]?([A-Za-z])(?![A-Za-z0-9'])[)\]}]*"
_CHOSEN = re.compile("|".join((                            # the answer is (C); C is correct; **C) 5 N**; C
    r"(?:(?i:answer)|(?i:correct)\s+(?i:option|choice|letter))[\s*_]*(?:(?i:is)\b|[:=])[\s*_:$]*"
    r"(?:(?i:option|choice)\s+)?" + _LETTER,
    r"\b([A-Z])\)?\**\s+is\s+(?:the\s+)?(?i:correct|right)\b",
    r"\*\*[\s$]*(?:(?i:answer|option|choice)\s*:?\s*)?" + _LETTER + r"(?=[\s$]*[*.:)])",
    r"^[ \t]*\(?([A-Z])\)?[ \t.]*$")), re.M)
_ANOTHER = re.compile(r"[\s*.$)]*(?:\b(?:or|and)\b|[,/&+])[\s*$(]*(?:\\text\{)?[(]?[A-HJ]\b")


def letter_of(text, options=None):
    """(the letter that a text chooses, or None; a reason). options: their texts where known."""
    chosen, skip = [], 0                                  # (position, letter or None where it is not one)
    boxes = _boxes(text)
    if boxes:
        start, inside = boxes[-1]
        chosen.append((start, _boxed_letter(inside or "", options)))
        text = text[:start] + text[start:].replace(inside or "", " " * len(inside or ""), 1)
    for match in _CHOSEN.finditer(text):
        letter, rest = next(g for g in match.groups() if g), text[match.end() : match.end() + 40]
        if match.start() >= skip and (letter.isupper() or re.match(r"[\s.*)\]}$]*(?:\n|$)", rest)):
            another = _ANOTHER.match(rest)                # "A or C"; "the answer is a sum" has no A
            skip = match.end() + another.end() if another else 0
            chosen.append((match.start(), None if another else letter.upper()))
    whole = re.fullmatch(r"\s*\(?([A-Za-z])\)?[\s.]*", text)                   # nothing but "c"
    if not chosen and whole:
        chosen.append((0, whole[1].upper()))
    if not chosen and options:
        line = text.strip().rpartition("\n")[2]
        chosen.append((0, _option(re.split(r"(?i:answer)[\s*_]*(?:is\b|[:=])", line)[-1], options)))
    if not chosen:
        return None, "no letter"
    letter = max(chosen, key=lambda c: c[0])[1]
    last = chr(64 + len(options)) if options else "J"
    if letter is None or letter > last:
        return None, f"letter {letter} is beyond {last}" if letter else "the last answer is not one letter"
    return letter, f"letter {letter}"


def _boxed_letter(inside, options):
    """The letter of a box like C, (C), \\text{C}, C. 5 N, or of one with the text of an option."""
    bare = _TEXT.sub(r"\1", inside).replace("$", "").replace("\\", " ").strip(" .*")
    match = re.match(r"(?i:(?:option|choice|answer)\s*:?\s*)?[(\[]?\s*([A-Za-z])\s*(?:[)\].:]|$)", bare)
    if not match:
        return _option(inside, options)
    another = re.match(r"[,/&(]|(?:or|and)\b|[A-Za-z][).\]]?$", bare[match.end() :].strip())
    return None if another else match[1].upper()


def _option(text, options):
    def plain(s):
        return re.sub(r"[\s$*.]+", "", _TEXT.sub(r"\1", str(s))).casefold()
    same = [i for i, option in enumerate(options or ()) if plain(option) == plain(text) != ""]
    return chr(65 + same[0]) if len(same) == 1 else None


def _science(text, truth, _):
    options = None
    if isinstance(truth, dict):
        truth, options = truth["letter"], truth.get("options")
    gold = _boxed_letter(str(truth), None)
    if gold is None:
        return Verdict(False, None, f"the truth is not a letter: {truth!r:.60}")
    letter, reason = letter_of(text, options)
    return Verdict(letter == gold, letter, reason)


# -- math: from a response to one line of LaTeX --------------------------------------------------------------

LONGEST = 1000             # characters of an answer; a longer one must be the gold, letter by letter
ITEMS = 64                 # of a list, likewise

_TEX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")


def _boxes(text):
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


def _rules(*pairs):
    """Substitutions, one after the other; in a pattern, _ behind a command's name ends the name."""
    return [(re.compile(re.sub(r"(?<=[A-Za-z)?])_(?![A-Za-z^])", "(?![A-Za-z])", pattern)), to)
            for pattern, to in pairs]


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
    (r"\\\$", ""), (r"\\%", "%"), (r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:bf|rm|it)_", ""),
    (r"\\[dtc]frac_", r"\\frac"),
    (r"\\(?:text[a-z]{2,6}|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{|\\text\s+\{", r"\\text{"),
    (r"\\(?:left|right|[bB]igg?[lr]?)_\.?|\\(?:display|text)style_|\\limits_", ""),
    (r"(\\\\)|\$|\\[()\[\]]|\\q?quad_", lambda m: m[1] or " "),
    (r"\\l(?:eq|e|eqslant)_|<=", r"\\le "), (r"\\g(?:eq|e|eqslant)_|>=", r"\\ge "), (r"\\neq_", r"\\ne "),
    (r"\\lt_", "<"), (r"\\gt_", ">"), (r"\\lbrace_", r"\\{"), (r"\\rbrace_", r"\\}"),
    (r"\\[lr]?vert_|\\mid_", "|"),
    (r"\\lor_", r"\\text{or}"), (r"\\varnothing_|\\\{\s*\\\}", r"\\emptyset "), (r"\\R_", r"\\mathbb{R}"),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
    (r"\\degree_|\^\s*\{?\s*\\circ\s*\}?(?:\s*[CF](?![A-Za-z]))?", r"^\\circ "), (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    (r"\\bar\s*\{", r"\\overline{"), (r"\\log[_]\{?e\}?(?![a-z])", r"\\ln "),
    (r"\\frac\s*\{\\text\{([^{}]*)\}\}\s*\{\\text\{([^{}]*)\}[\^{}0-9]*\}", r"\\text{\1/\2}"),       # m/s
    (r"\\text\{([^{}]*)\}", lambda m: m[0] if _prose(m[1]) else m[1]),
    (r"(?<![0-9.])[0-9]{1,3}(?:(?:\{,\}|\\!,|,\\!|\\[,;:! ]|~|\s)[0-9]{3})+(?![0-9])",               # 10\,000
     lambda m: re.sub("[^0-9]", "", m[0])),
    (r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])", lambda m: _thousands(m)),
    (r"\{,\}", ","), (r"(\\\\)|\\[,;:! ]|~", lambda m: m[1] or " "),
    (r"(?<![0-9.])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)", r"\1\\frac{\2}{\3}"),                 # 1 1/2
    (r"([_^])\s*([0-9])\s+(?=[0-9])", r"\1{\2}"), (r"(?<=[0-9])\s+(?=[0-9])", "?"))      # "1 2" is not 12
_OUTSIDE_TEXT = _rules(
    (r"(?:(?<=\s)|(?<=[0-9]))(or|and)(?=\s|$)", r"\\text{\1}"),
    (r"(?<=[0-9)}])\s*([A-Za-z]+(?:(?:\s+|/|\^\{?[0-9]\}?)[A-Za-z]*)*)",                     # 5 cm, 5 km/h
     lambda m: r"\text{" + "\0".join(m[1].split()) + "}" if _BARE.match(m[1]) and _is_unit(m[1]) else m[0]),
    (r"(?<![\\A-Za-z])((?:arc)?(?:sin|cos|tan)|sqrt|log|ln|exp|pi|infty|infinity)_",
     lambda m: "\\" + m[1].replace("infinity", "infty") + " "),
    (r"(\\[A-Za-z]+)\s+(?=[A-Za-z])", "\\1\0"), (r"\s+", ""), ("\0", " "))
_BRACES = _rules(
    (r"\\(frac|sqrt) ?([0-9A-Za-z])", r"\\\1{\2}"),
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})([0-9A-Za-z])", r"\1{\2}"),
    (r"\\sqrt\(([^()]*)\)", r"\\sqrt{\1}"), (r"([\^_])\{([0-9A-Za-z])\}(?![0-9])", r"\1\2"),
    (r"([\^_])(-?[0-9]{2,}|-[0-9])", r"\1{\2}"), (r"(?<![A-Za-z])\\text\{([A-Za-z])\}(?=[-+=^_])", r"\1"),
    (r"(^|[-+/=(,|])\{([0-9.]+)\}", r"\1\2"), (r"(?<![0-9.])(?=\.[0-9])", "0"), (r"\+(?=\\infty)", ""),
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


# -- math: the structure of an answer ------------------------------------------------------------------------

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
    gold, answer = _unparenthesised(gold), _unparenthesised(answer)
    if gold == answer:
        return gold != ""
    (gold_name, gold_range), (name, range_) = _interval(gold) or ("", gold), _interval(answer) or ("", answer)
    if gold_name and name and gold_name != name:
        return False
    a, b = _ordered(gold_range), _ordered(range_)
    if a or b:
        return (bool(a and b) and a[0] == b[0] and [len(row) for row in a[1]] == [len(row) for row in b[1]]
                and all(same(tidy(x), tidy(y), leaf) for rows in zip(a[1], b[1], strict=True)
                        for x, y in zip(*rows, strict=True)))
    gold_sides, sides = (
        x[::-1] if len(x) == 2 and re.fullmatch("[A-Za-z]", x[1]) and not re.fullmatch(_NAME, x[0]) else x
        for x in (_cut(gold, "=")[::2], _cut(answer, "=")[::2]))                                 # 5 = x
    gold_named, named = (len(x) > 1 and re.fullmatch(_NAME, x[0]) is not None for x in (gold_sides, sides))
    if len(gold_sides) == len(sides) == 1:
        return _same_scalar(gold, answer, leaf)
    if len(gold_sides) == 1 or gold_named and len(gold_sides) == 2 and (
            len(sides) == 1 or named and sides[0] == gold_sides[0]):
        return all(same(gold_sides[-1], side, leaf) for side in (sides[1:] if named else sides))
    return len(sides) > 1 and leaf(gold, answer)


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
    plain = re.sub(r"\s", "", _TEXT.sub(r"\1", s))
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


# -- math: scalars, by sympy ---------------------------------------------------------------------------------

_SILENT = """frac sqrt pi cdot times div sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln
    exp binom infty circ lfloor rfloor lceil rceil le ge""".split()
_GREEK = "alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi omega".split()
_READABLE = re.compile(rf"(?:\\(?:{'|'.join(_SILENT + _GREEK)})(?![A-Za-z])|"
                       r"[-0-9A-Za-z+*/^_{}()\[\]|!.=<> ])*")
_UNREADABLE = re.compile(                                 # words, x2, 12_5, (x)2; 10^{99999}, 9^{9^9}; 9!!
    r"(?<![\\A-Za-z])(?:[A-Za-z]{4}|[A-Za-z][0-9])|[0-9]_|\)[0-9]|(?<!_)\{[^{}]*\}[0-9]"
    r"|[0-9]{150}|\^\{?[-+]?[0-9]{5}|\^(?!\{[1-4]\^[1-4]\})\{?\(?[0-9.]+\^"
    r"|[0-9]{4}\)*!|!\)*!|\}\)?!|\\binom\{?[0-9]{5}")


def readable(gold, answer):
    """Whether sympy is to look at two scalars: both can be read to the last character, the answer names
    nothing that the gold does not, and there is no number too large to look at."""
    a, b = (set(re.findall(r"\\[a-z]+|[A-Za-z]", s)) - {"e", "i", *(f"\\{c}" for c in _SILENT)}
            for s in (gold, answer))
    return b <= a and all(_READABLE.fullmatch(s) and not _UNREADABLE.search(s)
                          and all(s.count(x) == s.count(y) for x, y in ("()", "{}")) for s in (gold, answer))


@functools.lru_cache(2048)
def _expression(s):
    """The sympy expression of a tidy scalar. latex2sympy takes 2(3) for a mixed number, R for r, decimals for
    floats and i for a name: so these are spelled otherwise, or replaced."""
    import sympy
    from latex2sympy2_extended import latex2sympy
    s = re.sub(r"([0-9.]+)\^\\circ", r"(\1\\cdot\\frac{\\pi}{180})", s)
    s = re.sub(r"([0-9]+)\.([0-9]+)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", s)
    s = re.sub(r"(?<![0-9}])([0-9]+)(\\frac\{[0-9]+\}\{[0-9]+\})", r"(\1+\2)", s)
    s = re.sub(r"(?<![\^_0-9])([0-9]+)(?=\()", r"\1\\cdot ", s)
    s = re.sub(r"(\\[A-Za-z]+)|([A-Z])(?:_\{?([A-Za-z0-9]+)\}?)?",
               lambda m: m[1] or f"{m[2].lower()}_{{9{m[3] or ''}}}", s)
    found = latex2sympy(s, is_real=True, convert_degrees=False, normalization_config=None)
    return found.xreplace({x: sympy.I for x in found.free_symbols if x.name == "i"})


def _equal_scalars(gold, answer):
    """Whether two readable scalars are equal: numbers to 45 digits; expressions at points where the gold is
    defined (no root or logarithm of a negative number, unless it is about i), equations as multiples of each
    other there; what has no values (relations) as math-verify says. For the workers: it may take for ever."""
    import math_verify
    import sympy
    a, b = _expression(gold), _expression(answer)
    if a == b:
        return not a.has(sympy.nan, sympy.zoo)
    equations = {isinstance(x, sympy.Eq) for x in (a, b)}
    if equations == {True}:
        a, b = a.lhs - a.rhs, b.lhs - b.rhs
    if len(equations) > 1 or a.is_Rational and b.is_Rational:
        return False
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return math_verify.verify(a, b, timeout_seconds=None)
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    points, agreed, ratio = 7 if names else 1, 0, None if equations == {True} else 1
    tiny, positive = sympy.Float("1e-45", 60), () if a.has(sympy.I) else [
        e for e in (*(p.base for p in a.atoms(sympy.Pow) if not p.exp.is_integer),
                    *(log.args[0] for log in a.atoms(sympy.log))) if e.free_symbols]
    for point in range(points):                           # of either sign, about 0.1 to 2, nothing special
        at = {x: (-1) ** (point * (i + 1) // 2) * sympy.Rational(
            104729 * (i + 1) * (point + 2) % 7907 + 401, 3571) for i, x in enumerate(names)}
        x, y = (sympy.N(e.subs(at), 60) for e in (a, b))
        if not (x.is_number and y.is_number and x.is_finite) or any(e.subs(at).is_negative for e in positive):
            continue
        if ratio is None:
            ratio = x / y if y != 0 else None
        elif not y.is_finite or abs(x - y * ratio) > tiny * (1 + abs(x)):
            return False
        else:
            agreed += 1
    return agreed >= min(points, 2) or agreed == 0 and math_verify.verify(a, b, timeout_seconds=None)


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
    raise _Undecided


def _math(text, truth, ask):
    if isinstance(truth, bool) or not isinstance(truth, (str, int, float)):
        return Verdict(False, None, f"the truth is a {type(truth).__name__}, not LaTeX")
    boxes, gold = _boxes(text), str(truth).strip()
    if not boxes or boxes[-1][1] is None:
        return Verdict(False, None, "the last box is not closed" if boxes else "no box")
    answer = re.sub(r"\\(?:boxed|fbox)(?=\s*\{)", "", boxes[-1][1])
    if gold_boxes := _boxes(gold):
        gold = gold_boxes[-1][1] or ""
    if len(gold) > LONGEST or len(answer) > LONGEST:
        return Verdict(gold == answer.strip() != "", answer, f"over {LONGEST:,} characters: compared as text")
    golds, answers = tidy(gold), [tidy(answer)]
    if golds in ("", r"\text{}"):
        return Verdict(False, answer, "the truth is empty")
    if re.search("[0-9],[0-9]", answer) and len(_cut(golds, ",")) > 1:
        answers.append(tidy(answer.replace(",", ", ")))   # 100,200 is a list where the gold is one
    try:
        found, how = any(same(golds, a, _undecided) for a in answers), ""
    except _Undecided:
        found, how = ask("math", golds, answers), " (sympy)"
    how = found if isinstance(found, str) else f"{'' if found else 'not '}equal{how}"
    return Verdict(found is True, answer, how)


# -- math: the worker processes ------------------------------------------------------------------------------

THINK, ALL = 4.0, 5.5      # seconds sympy may take for an answer, and an answer with the wait for a worker
MEMORY = 2 << 30           # bytes of address space of a worker
MOST = 32                  # workers at a time; beyond one a core, they start when all are busy for 0.2 s
CORES = os.cpu_count() or 1


class _Pool:
    """Workers that are forked from one process which has imported sympy (and nothing else: no torch, no
    threads; it is this file run as a script). So a new one takes milliseconds and a killed one is no loss.
    Each keeps the golds it has parsed, and a gold goes to a worker that had it, if idle.

    The parent keeps the deadlines and kills; the workers' own alarm is for the case that the parent is gone.
    All end when the parent does, however it ends: their sockets close.
    """

    def __init__(self):
        self.free, self.idle, self.count, self.server, self.known = threading.Condition(), [], 0, None, {}

    def ask(self, gold, answers):
        """True, False, or a text if there was no time or no memory."""
        key = gold, *answers
        if key in self.known:
            return self.known[key]
        self.start()
        end = time.monotonic() + ALL
        worker = self.take(gold, end)
        if worker is None:
            return "not decided: all workers are busy"
        pid, pipe, golds = worker
        try:
            pipe.send_bytes(json.dumps(key).encode())
            if pipe.poll(max(0.0, min(THINK, end - time.monotonic()))):
                found = json.loads(pipe.recv_bytes())
                golds.add(gold)
                with self.free:
                    if len(self.known) > 20_000:
                        self.known.clear()
                    self.known[key] = found
                    if self.count <= CORES:
                        self.idle.append(worker)
                        self.free.notify()
                        return found
            else:
                found = "not decided in time"
        except (OSError, EOFError):
            found = "not decided: the worker ran out of memory"
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)                  # stuck, or one more than the cores need
        pipe.close()
        self.gone()
        return found

    def gone(self):
        with self.free:
            self.count -= 1
            self.free.notify()

    def take(self, gold, end):
        """An idle worker, by preference one that knows the gold, or a new one; None if there is no time."""
        with self.free:
            patience = min(end, time.monotonic() + 0.2)
            while not self.idle and self.count >= CORES:
                now = time.monotonic()
                if now >= end:
                    return None
                if now >= patience and self.count < MOST:
                    break
                self.free.wait((patience if now < patience else end) - now)
            if self.idle:
                worker = next((w for w in self.idle if gold in w[2]), self.idle[-1])
                self.idle.remove(worker)
                return worker
            self.count += 1
        try:
            ours, theirs = socket.socketpair()
            pipe = Connection(ours.detach())
            with theirs:
                socket.send_fds(self.server[1], [b"w"], [theirs.fileno()])
            if pipe.poll(max(0.0, end - time.monotonic())):
                return int(pipe.recv_bytes()), pipe, set()
            pipe.close()
        except (OSError, EOFError, TypeError):            # the server is gone: the next call starts another
            self.close()
        self.gone()
        return None

    def start(self):
        """Starts the server, once; waits for its imports (not part of any answer's time)."""
        with self.free:
            if self.server is not None and self.server[0].poll() is None:
                return
            if importlib.util.find_spec("math_verify") is None:
                raise ModuleNotFoundError("math needs a package: pip install math-verify==0.9.0")
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker"],
                                           stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.server, self.idle, self.count = (process, ours), [], 0
            if ours.recv(1) != b"r":
                raise ModuleNotFoundError("the process that imports sympy and math-verify ended at once; see "
                                          f"{sys.executable} -c 'import math_verify'")

    def close(self):
        with self.free:
            if self.server is not None:
                process, pipe = self.server
                for connection in (pipe, *(worker[1] for worker in self.idle)):
                    connection.close()
                self.server, self.idle, self.count = None, [], 0
                process.kill()
                process.wait()


def _serve():
    """The server: forks a worker for each socket it is sent; ends when the parent's end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)         # nobody waits for the workers
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for scalar in (r"\frac{x^2-1}{x+1}-\sqrt[3]{2}", r"\frac{10}{3}", r"e^{i\pi}", "y=2x_{1}+3", "(x-1)(x+1)",
                   r"\ln(2)+\sin\frac{\pi}{3}", r"2^{10}\cdot 5!", r"\log_2 8+|x|"):
        _compare(f"{scalar}+a", f"a+{scalar}")            # imports, and tables that all workers will share
    parent = socket.socket(fileno=0)
    parent.send(b"r")
    while sockets := socket.recv_fds(parent, 1, 1)[1]:
        if os.fork() == 0:
            parent.close()
            _work(Connection(sockets[0]))
        os.close(sockets[0])


def _work(pipe):
    try:
        pipe.send_bytes(str(os.getpid()).encode())
        while True:
            gold, *answers = json.loads(pipe.recv_bytes())
            signal.setitimer(signal.ITIMER_REAL, ALL)     # not caught: it ends the process
            pipe.send_bytes(json.dumps(any(same(gold, answer, _compare) for answer in answers)).encode())
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        os._exit(0)


def _compare(gold, answer):
    try:
        return readable(gold, answer) and bool(_equal_scalars(gold, answer))
    except (MemoryError, ImportError):
        raise
    except Exception:                                     # sympy and its parser raise anything, bare ones too
        return False


def _forget():
    """After a fork: the workers are the parent's."""
    global _pool
    old, _pool = _pool, _Pool()
    for pipe in [w[1] for w in old.idle] + ([old.server[1]] if old.server else []):
        pipe.close()


_pool = _Pool()
atexit.register(lambda: _pool.close())
os.register_at_fork(after_in_child=_forget)


# -- code: the sandbox ---------------------------------------------------------------------------------------

OUTPUT = 16 << 20          # bytes a program may write, to stdout or to one file
SCRATCH = 32 << 20         # bytes of /tmp and of /dev/shm
PROCESSES = 8              # and threads, of a program
BASE = 64 << 20            # bytes of address space for the interpreter, beside the program's

# What runs in the sandbox. The first process keeps the clock, as the init of the namespace: when it ends, all
# do, and it leaves no orphan to the host. Its child is the program, with a few lines before and after, in the
# same interpreter. argv: kind, function, file descriptor of the program, seconds, bytes of memory, bytes of
# output, processes (0: no limit).
_HARNESS = r"""
import builtins, os, resource, signal, sys
kind, name, fd, seconds, *limits = sys.argv[1:]
fd, seconds, (memory, output, processes) = int(fd), float(seconds), map(int, limits)
sys.argv[:] = ["program.py"]
child = os.fork()
if child:
    signal.signal(signal.SIGALRM, lambda *_: os._exit(124))
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)
    while (ended := os.wait())[0] != child:
        pass
    code = os.waitstatus_to_exitcode(ended[1])
    os._exit(code if code >= 0 else 128 - code)
for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, output), (resource.RLIMIT_CORE, 0),
                   (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_NPROC, processes)):
    if what != resource.RLIMIT_NPROC or most:
        resource.setrlimit(what, (most, most))
resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
signal.setitimer(signal.ITIMER_PROF, seconds)
with open(fd, "rb") as file:
    source = file.read()
builtins.exit = builtins.quit = sys.exit
sys.stdout.reconfigure(errors="strict")
try:
    program = compile(source, "program.py", "exec", dont_inherit=True)
except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(121)
main = sys.modules["__main__"] = type(sys)("__main__")
try:
    if kind == "stdio":
        exec(program, main.__dict__)
    else:
        import json
        arguments, result = json.loads(sys.stdin.read()), os.dup(1)
        os.dup2(2, 1)
        if b"Solution" in source:
            for module in ("typing", "collections", "functools", "itertools", "math", "heapq", "bisect"):
                exec(f"import {module}\nfrom {module} import *", main.__dict__)
        main.__name__ = "program"
        exec(program, main.__dict__)
        if name:
            function = main.__dict__.get(name) or getattr(main.Solution(), name)
        else:
            function = main.__dict__[source.partition(b"(")[0].split()[-1].decode()]
        def plain(value):
            kind = type(value)
            if kind in (list, tuple):
                return [plain(item) for item in value]
            if kind is dict and all(type(key) in (str, int) for key in value):
                return {str(key): plain(item) for key, item in value.items()}
            if value is None or kind in (bool, int, float, str):
                return value
            print(f"returned a {kind.__name__}, which JSON does not have", file=sys.stderr, flush=True)
            os._exit(123)
        text = json.dumps(plain(function(*arguments))).encode()
        while text:
            text = text[os.write(result, text):]
        os._exit(0)
except MemoryError:
    os._exit(122)
"""


@functools.cache
def _bwrap():
    """((arguments of bubblewrap, a Python for the sandbox), "") or (None, why there is none)."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return None, "bubblewrap is not installed"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return None, "setpriv, which lets root become nobody, is not installed (package util-linux)"
    known = subprocess.run([bwrap, "--help"], capture_output=True, text=True).stdout
    # RLIMIT_NPROC means nothing to root, and root in a namespace is root to the files of the host
    nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups --".split() if os.geteuid() == 0 else []
    small = ["--size", str(SCRATCH)] if "--size" in known else []
    box = [*nobody, bwrap, *"""--unshare-all --die-with-parent --new-session --as-pid-1 --hostname sandbox
           --uid 65534 --gid 65534 --cap-drop ALL --ro-bind /usr /usr""".split(),
           "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
           *(["--unshare-user", "--disable-userns"] if "--disable-userns" in known else [])]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(name):
            box += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            box += ["--ro-bind", name, name]
    problem = ""
    for python in dict.fromkeys((os.path.realpath(sys.executable), "/usr/bin/python3")):
        home = os.path.dirname(os.path.dirname(python))   # nobody may not be let in there; then the system's
        command = [*box, *(() if python.startswith("/usr/") else ("--ro-bind", home, home)),
                   *"--proc /proc --dev /dev".split(), *small, "--tmpfs", "/dev/shm", *small, "--tmpfs",
                   *"/tmp --remount-ro /dev --remount-ro / --chdir /tmp".split()]
        done = subprocess.run([*command, python, "-I", "-S", "-c", "print(1)"], env={}, capture_output=True,
                              text=True)
        if done.stdout == "1\n":
            return (command, python), ""
        problem = problem or done.stderr.strip()[-200:]
    return None, f"bubblewrap does not work here ({problem}); a container must allow user namespaces"


def check_sandbox(unsafe_sandbox=False):
    """Raises SandboxMissing where programs cannot be run: to be called when a job starts."""
    if not unsafe_sandbox and _bwrap()[0] is None:
        raise SandboxMissing(f"{_bwrap()[1]}. Install the package (apt-get install bubblewrap), or give "
                             "unsafe_sandbox=True to run programs of unknown origin with your own rights")


def _seccomp():
    """A filter, as bytes for bwrap, of calls that get memory past the limits (memfd, System V, io_uring) or
    reach far into the kernel; b"" on a machine whose numbers are not listed."""
    arch, calls = {"x86_64": (0xC000003E, (29, 64, 68, 101, 248, 250, 298, 319, 321, 323, 425, 447)),
                   "aarch64": (0xC00000B7, (194, 190, 186, 117, 217, 219, 241, 279, 280, 282, 425, 447)),
                   }.get(platform.machine(), (0, ()))
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0),
            (0x35, len(calls) + 1, 0, 0x40000000)]        # arch: another one kills; number: x32 is refused
    code += [(0x15, len(calls) - i, 0, number) for i, number in enumerate(calls)]
    code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]                          # allow; EPERM
    return b"".join(struct.pack("HBBI", *line) for line in code) if calls else b""


def _run_once(code, kind, name, stdin, seconds, memory, unsafe):
    """(exit status, stdout, stderr) of a program on one input; bytes. 124: out of time. Its outputs are files
    in memory: nothing to pump, and nothing that fills up."""
    check_sandbox(unsafe)
    if unsafe:
        warnings.warn("unsafe_sandbox: programs run with resource limits only; they can read and write your "
                      "files and use the network", stacklevel=4)
    with contextlib.ExitStack() as stack:
        files = []
        for content in (stdin, b"", b"", code, b"" if unsafe else _seccomp()):
            files.append(os.memfd_create("file"))
            stack.callback(os.close, files[-1])
            with open(files[-1], "wb", closefd=False) as file:
                file.write(content)
            os.lseek(files[-1], 0, os.SEEK_SET)
        box, python = ([], sys.executable) if unsafe else _bwrap()[0]
        box = [*box, "--seccomp", str(files[4])] if box and _seccomp() else box
        process = subprocess.Popen(
            [*box, python, *"-I -S -B -X utf8 -c".split(), _HARNESS, kind, name, str(files[3]), str(seconds),
             str(memory + BASE), str(OUTPUT), "0" if unsafe else str(PROCESSES)],
            stdin=files[0], stdout=files[1], stderr=files[2], pass_fds=files[3:], start_new_session=True,
            env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1"})
        try:
            pidfd = os.pidfd_open(process.pid)
            stack.callback(os.close, pidfd)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            late = not poll.poll(1000 * (2 * seconds + 3))               # the first process is stuck too
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)    # not reaped yet, so the number is still its own
            status = process.wait()
        outputs = [os.pread(fd, OUTPUT + 1, 0) for fd in files[1:3]]
    return 124 if late else 128 - status if status < 0 else status, *outputs


def _run(*question):
    """_run_once(), again where the machine was out of namespaces."""
    for _ in range(3):
        status, out, err = _run_once(*question)
        if status != 1 or not err.startswith(b"bwrap: "):
            break
    return status, out, err


# -- code: the verdict ---------------------------------------------------------------------------------------

LATE = (124, 128 + signal.SIGPROF, 128 + signal.SIGXCPU)
CHECK_S, CHECK_MEMORY = 10, 1 << 30                       # CPU and memory of a checker, a test; ours

# What runs the checker of a problem, as a program of its own in the sandbox; stdin: the four files' texts. A
# folder of its own is needed without bubblewrap, where the current one is the user's.
_CHECK = r"""
import json, os, runpy, sys, tempfile
names = ["checker.py", "input.txt", "correct_output.txt", "solution_output.txt"]
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    for name, text in zip(names, json.load(sys.stdin)):
        with open(name, "w", newline="", errors="surrogateescape") as file:
            file.write(text)
    sys.argv[:] = names
    runpy.run_path(names[0], run_name="__main__")
"""


def _refused(program, test, stdout, unsafe):
    """Why the program that checks a problem does not accept what a submission wrote, "" where it does. What
    was written is data to it, hostile or not; one that evaluates its files could be talked into a 1."""
    texts = [program, test["input"], test["output"], stdout.decode("utf-8", "surrogateescape")]
    status, out, err = _run(_CHECK.encode(), "stdio", "", json.dumps(texts).encode(), CHECK_S, CHECK_MEMORY,
                            unsafe)
    if status:
        return "checker: " + (f"over {CHECK_S} s" if status in LATE else
                              f"exit status {status}: {_last_line(err)}")
    return "" if re.fullmatch(rb"\s*1(?:\.0*)?\s*", out) else f"checker: said {out[:60]!r}"


def _last_line(err):
    return err[-2000:].decode("utf-8", "replace").strip().rpartition("\n")[2][:200]


_DECIMAL = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?")


def _near(got, expected, tolerance):
    """Two numbers, or Decimals; exactly equal unless there is a tolerance."""
    if tolerance is None:
        return got == expected
    a, b = float(got), float(expected)
    if not (math.isfinite(a) and math.isfinite(b)):
        return a == b == got == expected                  # inf is inf; an overflow is not, nan is nothing
    return abs(a - b) <= tolerance * max(1.0, abs(b))


def _texts_agree(checker, tolerance, got, expected):
    """Token by token, apart by white space; numbers as numbers unless the checker is "tokens"."""
    got, expected = got.split(), expected.split()
    return len(got) == len(expected) and all(
        _near(Decimal(a), Decimal(b), tolerance)
        if checker != "tokens" and _DECIMAL.fullmatch(a) and _DECIMAL.fullmatch(b) else
        a == b and (checker == "tokens" or a.lower().lstrip("+-") != "nan")
        for a, b in zip(got, expected, strict=True))


def _values_agree(checker, tolerance, got, expected):
    """JSON values: lists (and tuples) item by item, objects key by key; true is not 1, but 1 is 1.0."""
    if isinstance(expected, (list, tuple)):
        return (isinstance(got, list) and len(got) == len(expected)
                and all(_values_agree(checker, tolerance, a, b) for a, b in zip(got, expected, strict=True)))
    if isinstance(expected, dict):
        expected = {str(key): value for key, value in expected.items()}
        return (isinstance(got, dict) and got.keys() == expected.keys()
                and all(_values_agree(checker, tolerance, got[key], expected[key]) for key in expected))
    if isinstance(expected, bool) or expected is None or isinstance(got, bool):
        return got is expected
    if isinstance(expected, (int, float)):
        return isinstance(got, (int, float)) and _near(got, expected, tolerance)
    return isinstance(got, str) and (
        got == expected if checker == "json" else _texts_agree(checker, tolerance, got, expected))


def gradable(truth) -> bool:
    """Whether programs can be graded against this code truth."""
    try:
        return bool(_Task.of(truth))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return False


class _Task(NamedTuple):
    """A code truth, checked."""
    kind: str
    name: str
    tests: list
    checker: str
    tolerance: float | None
    seconds: float
    memory: int            # bytes
    program: str           # of checker "program", else ""

    @classmethod
    def of(cls, truth):
        kind, tests = truth.get("kind"), truth.get("tests")
        if kind not in ("stdio", "function"):
            raise ValueError(f"truth: kind is {kind!r:.40}; known are: stdio, function")
        if not isinstance(tests, (list, tuple)) or not tests:
            raise ValueError("truth: there are no tests")
        for test in tests:
            if kind == "stdio" and not (isinstance(test["input"], str) and isinstance(test["output"], str)):
                raise ValueError("truth: input and output of a stdio test are texts")
            if kind == "function" and not (isinstance(test["input"], (list, tuple)) and "output" in test):
                raise ValueError("truth: a function test has an input, its list of arguments, and an output")
        default = "tokens" if kind == "stdio" else "json"
        checker, _, tolerance = (truth.get("checker") or default).partition(":")
        if (checker not in ("tokens", "decimal", "float", "json", "program")
                or (checker == "float") != bool(tolerance)):
            raise ValueError(f"truth: checker is {truth['checker']!r:.40}; known are: tokens, decimal, "
                             "float:TOL, json, program")
        program = truth.get("program") if checker == "program" else ""
        if checker == "program" and (kind != "stdio" or not isinstance(program, str) or not program.strip()):
            raise ValueError("truth: checker program is of kind stdio, and has its source as program")
        seconds, memory = float(truth.get("time_limit_s") or 6), int(truth.get("memory_limit_mb") or 1024)
        if not (0 < seconds < 1e6 and 0 < memory < 1e6):
            raise ValueError(f"truth: time_limit_s is {seconds}, memory_limit_mb is {memory}")
        return cls(kind, truth.get("fn_name") or "", tests, checker, float(tolerance) if tolerance else None,
                   seconds, memory << 20, program)

    def agrees(self, stdout, expected):
        """Whether what a program wrote is what was expected. Bytes that are no UTF-8 equal nothing."""
        if len(stdout) > 4 * len(expected if self.kind == "stdio" else json.dumps(expected)) + (1 << 20):
            return False                                  # cannot be right, and is not worth our memory
        text = stdout.decode("utf-8", "surrogateescape")
        if self.kind == "stdio" and self.checker != "json":
            return _texts_agree(self.checker, self.tolerance, text, expected)
        try:
            expected = json.loads(expected) if self.kind == "stdio" else expected
            return _values_agree(self.checker, self.tolerance, json.loads(text), expected)
        except (ValueError, RecursionError):
            return False


def run_code(code, truth, unsafe_sandbox=False) -> Run:
    """Runs a Python program on the tests of a problem, each in a sandbox and a process of its own, up to the
    first that fails.

    truth: {"kind": "stdio" | "function", "fn_name", "tests": [{"input", "output"}], "checker",
        "time_limit_s", "memory_limit_mb"}. stdio: input and output are texts, and exit status 0 is required.
        function: input is the list of arguments, output the value returned; fn_name is a function or a method
        of class Solution; without it, the function whose name is the word before the program's first
        parenthesis, as evalchemy has it.
    checker, for what is printed, and for texts and numbers in what is returned:
        "tokens"     what stands between white space is the same (default of stdio)
        "decimal"    the same, and numbers are equal as exact decimals: 1 is 1.0 and 1e0
        "float:TOL"  the same, and numbers differ by TOL at most, absolutely or relative to the expected one
        "json"       equal JSON values (default of function): 1 is 1.0, true is not 1, a tuple is a list
        nan equals nothing under these last three.
        "program"    truth["program"], Python, accepts it (stdio only): run as `checker.py input.txt
            correct_output.txt solution_output.txt` it prints 1 (or 1.0), with exit status 0. Of unknown
            origin itself, it has a sandbox and a process of its own, 10 s and 1 GB, after the program's end.
    time_limit_s: seconds of CPU a test may take (default 6), however loaded the machine; on the clock twice
        as long and one more. memory_limit_mb: address space beside the interpreter's own (default 1024).
    unsafe_sandbox: run without bubblewrap, with limits only. Say so to whoever owns the machine.

    The expected outputs never enter the program's sandbox. A program can reach the harness that calls its
    function (it is the same interpreter) and so forge what is returned; to no end, as that must still be what
    is expected, in plain JSON types, compared in this process.
    Raises ValueError (KeyError, TypeError, ...) for a truth that is not as above, SandboxMissing.
    """
    task, start, out, err = _Task.of(truth), time.monotonic(), b"", b""

    def run(verdict, test, detail):
        tails = (b[-2000:].decode("utf-8", "replace") for b in (out, err))
        return Run(verdict, test, detail, *tails, time.monotonic() - start)

    code = code.encode("utf-8", "surrogatepass")
    for i, test in enumerate(task.tests):
        given = test["input"] if task.kind == "stdio" else json.dumps(test["input"])
        given = given.encode("utf-8", "surrogatepass")
        status, out, err = _run(code, task.kind, task.name, given, task.seconds, task.memory, unsafe_sandbox)
        last = _last_line(err)
        if max(len(out), len(err)) >= OUTPUT:
            return run("OLE", i, f"over {OUTPUT >> 20} MB of output")
        if status in LATE:
            return run("TLE", i, f"over {task.seconds:g} s of CPU, or {2 * task.seconds + 1:g} s")
        if status == 121:
            return run("CE", i, last)
        if status in (122, 128 + signal.SIGKILL) or status and last.startswith("MemoryError"):
            return run("MLE", i, f"over {task.memory >> 20} MB")
        if status not in (0, 123):
            return run("RE", i, f"exit status {status}: {last}")
        if task.kind == "function" and not out and not status:
            return run("RE", i, "ended before its function returned")
        if status:
            return run("WA", i, last)
        if task.program:
            wrong = _refused(task.program, test, out, unsafe_sandbox)
        else:
            wrong = "" if task.agrees(out, test["output"]) else f"gave {out[:60]!r}"
        if wrong:
            return run("WA", i, wrong)
    return run("AC", None, f"{len(task.tests)} tests")


def code_of(text):
    """(the last fenced block that is Python or says nothing of its language, or None; why none)."""
    code, block, python = None, None, False
    for line in text.split("\n"):
        fence = re.match(r"\s{0,3}```+\s*([^`\s]*)[^`]*$", line) if len(line) < 200 else None
        if fence and block is None:
            block, python = [], fence[1].lower() in ("", "py", "python", "python3")
        elif fence and not fence[1]:
            code, block = "\n".join(block) if python else code, None
        elif block is not None:
            block.append(line)
    if block is not None and python:
        return None, "the last code block is not closed"
    return code, "no code block"


def _code(text, truth, ask):
    code, problem = code_of(text)
    if code is None:
        return Verdict(False, None, problem)
    run = ask("code", code, truth)
    where = "" if run.test is None else f" on test {run.test}"
    return Verdict(run.verdict == "AC", code, f"{run.verdict}{where}: {run.detail}")


_GRADERS = {"math": _math, "code": _code, "science": _science}

if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _serve()
