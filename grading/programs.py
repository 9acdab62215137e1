"""Does a program solve its problem? Its tests, run in the sandbox, and how outputs are compared."""

import json
import re
import signal
import textwrap
import time
from decimal import Decimal
from typing import NamedTuple

from grading import Verdict
from grading.sandbox import OUTPUT, run_program


class Run(NamedTuple):
    verdict: str           # AC | WA | TLE | MLE | OLE (output) | RE (error) | CE (does not compile)
    test: int | None       # index of the first test not passed
    detail: str            # one line
    stdout: str            # of the last test run, its last 2,000 characters
    stderr: str
    seconds: float         # wall, all tests


# -- the verdict -----------------------------------------------------------------------------------------

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
    status, out, err = run_program(_CHECK.encode(), "stdio", "", json.dumps(texts).encode(), CHECK_S,
                                   CHECK_MEMORY, unsafe)
    if status:
        return "checker: " + (f"over {CHECK_S} s" if status in LATE else
                              f"exit status {status}: {_last_line(err)}")
    return "" if re.fullmatch(rb"\s*1(?:\.0*)?\s*", out) else f"checker: said {out[:60]!r}"


def _last_line(err):
    return err[-2000:].decode("utf-8", "replace").strip().rpartition("\n")[2][:200]


_DECIMAL = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?")
HUNDREDTH, LEETCODE = Decimal("0.01"), Decimal("1e-5")


def _near(got, expected, tolerance):
    """Two finite numbers, as Decimals; exactly equal unless there is a tolerance."""
    return got == expected if tolerance is None else abs(got - expected) <= tolerance * max(1, abs(expected))


def _near_rounded(got, expected, loosest=None):
    """Whether a number is what was expected, which is taken for a rounded one if it has digits behind the
    point. The usual judges allow 1e-6, absolutely or relative to the expected number (1e-5 where 5 digits are
    shown, as at LeetCode); here never more than a hundredth, nor than half a unit of the last of 4 digits."""
    digits = -expected.as_tuple().exponent
    if digits <= 0 or got == expected:
        return got == expected
    allowed = (loosest or Decimal(10) ** (-5 if digits == 5 else -6)) * max(1, abs(expected))
    most = Decimal(5).scaleb(-digits - 1) if digits <= 4 else HUNDREDTH
    return abs(got - expected) <= min(allowed, most, HUNDREDTH)


def _tokens_agree(checker, tolerance, got, expected):
    if got == expected or checker == "tokens":
        return got == expected and (checker == "tokens" or got.lower().lstrip("+-") != "nan")
    if not (_DECIMAL.fullmatch(got) and _DECIMAL.fullmatch(expected)):
        return False
    got, expected = Decimal(got), Decimal(expected)
    return _near_rounded(got, expected) if checker == "decimal" else _near(got, expected, tolerance)


def _texts_agree(checker, tolerance, got, expected):
    """Token by token, apart by white space; numbers as numbers unless the checker is "tokens"."""
    got, expected = got.split(), expected.split()
    return len(got) == len(expected) and all(
        _tokens_agree(checker, tolerance, a, b) for a, b in zip(got, expected, strict=True))


def _lines_agree(got, expected):
    """Line by line, but for blanks around the text and each line; a line is the same text or numbers."""
    got, expected = got.strip().split("\n"), expected.strip().split("\n")
    return len(got) == len(expected) and all(
        a.strip() == b.strip() or _numbers_agree(a.split(), b.split())
        for a, b in zip(got, expected, strict=True))


def _numbers_agree(got, expected):
    return len(got) == len(expected) and all(
        _DECIMAL.fullmatch(a) and _DECIMAL.fullmatch(b) and Decimal(a) == Decimal(b)
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
        return isinstance(got, (int, float, Decimal)) and _values_near(checker, tolerance, got, expected)
    return isinstance(got, str) and (
        got == expected if checker in ("json", "exact") else _texts_agree(checker, tolerance, got, expected))


def _values_near(checker, tolerance, got, expected):
    """Numbers of JSON. inf is inf; an overflow is not, nan is nothing."""
    got, expected = (Decimal(repr(x)) if isinstance(x, float) else Decimal(x) for x in (got, expected))
    if checker == "exact" or not (got.is_finite() and expected.is_finite()):
        return got == expected
    if checker in ("json", "decimal"):                    # a float does not say how many digits were shown
        return _near_rounded(got, expected, LEETCODE)
    return _near(got, expected, tolerance)


def _integer(digits):
    """A JSON integer; a long one as a Decimal, which Python reads in no quadratic time."""
    return int(digits) if len(digits) < 4000 else Decimal(digits)


def gradable(truth) -> bool:
    """Whether programs can be graded against this code truth."""
    try:
        return bool(Task.of(truth))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return False


class Task(NamedTuple):
    """A code truth, checked."""
    kind: str
    name: str
    tests: list
    checker: str
    tolerance: Decimal | None
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
        if (checker not in ("tokens", "lines", "decimal", "float", "json", "exact", "program")
                or (checker == "float") != bool(tolerance) or checker == "lines" and kind != "stdio"):
            raise ValueError(f"truth: checker is {truth['checker']!r:.40}; known are: tokens, lines (stdio), "
                             "decimal, float:TOL, json, exact, program")
        program = truth.get("program") if checker == "program" else ""
        if checker == "program" and (kind != "stdio" or not isinstance(program, str) or not program.strip()):
            raise ValueError("truth: checker program is of kind stdio, and has its source as program")
        seconds, memory = float(truth.get("time_limit_s") or 6), int(truth.get("memory_limit_mb") or 1024)
        if not (0 < seconds < 1e6 and 0 < memory < 1e6):
            raise ValueError(f"truth: time_limit_s is {seconds}, memory_limit_mb is {memory}")
        if tolerance and not 0 <= float(tolerance) < 1e6:
            raise ValueError(f"truth: the tolerance is {tolerance:.40}")
        tolerance = Decimal(float(tolerance)) if tolerance else None
        name = truth.get("fn_name") or ""
        return cls(kind, name, tests, checker, tolerance, seconds, memory << 20, program)

    def agrees(self, stdout, expected):
        """Whether what a program wrote is what was expected. Bytes that are no UTF-8 equal nothing."""
        if len(stdout) > 4 * self.size(expected) + (1 << 20):
            return False                                  # cannot be right, and is not worth our memory
        text = stdout.decode("utf-8", "surrogateescape")
        if self.checker == "lines":
            return _lines_agree(text, expected)
        if self.kind == "stdio" and self.checker not in ("json", "exact"):
            return _texts_agree(self.checker, self.tolerance, text, expected)
        try:
            expected = json.loads(expected, parse_int=_integer) if self.kind == "stdio" else expected
            got = json.loads(text, parse_int=_integer)
            return _values_agree(self.checker, self.tolerance, got, expected)
        except (ValueError, RecursionError):
            return False

    def size(self, expected):
        """Characters of an expected output."""
        if self.kind == "stdio":
            return len(expected)
        try:
            return len(json.dumps(expected))
        except ValueError:                                # an integer too long for Python to spell
            return OUTPUT


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
        "lines"      line by line: the same text, or numbers that are equal as exact decimals (stdio only)
        "decimal"    token by token, and numbers are equal: 1 is 1.0 and 1e0; an expected one with digits
                     behind the point is a rounded one, see _near_rounded()
        "float:TOL"  the same, and numbers differ by TOL at most, absolutely or relative to the expected one
        "json"       equal JSON values (default of function): 1 is 1.0, true is not 1, a tuple is a list; an
                     expected float is a rounded one
        "exact"      the same, floats to the last bit
        nan equals nothing under these last four.
        "program"    truth["program"], Python, accepts it (stdio only): run as `checker.py input.txt
            correct_output.txt solution_output.txt` it prints 1 (or 1.0), with exit status 0. Of unknown
            origin itself, it has a sandbox and a process of its own, 10 s and 1 GB, after the program's end.
    time_limit_s: seconds of CPU a test may take (default 6), however loaded the machine; on the clock twice
        as long and one more, waits for a core not counted. memory_limit_mb: data beside the interpreter's own
        and numpy's (default 1024); the C stack has 256 MB more.
    unsafe_sandbox: run without bubblewrap, with limits only. Say so to whoever owns the machine.

    The expected outputs never enter the program's sandbox. A program can reach the harness that calls its
    function (it is the same interpreter) and so forge what is returned; to no end, as that must still be what
    is expected, in plain JSON types, compared in this process.
    Raises ValueError (KeyError, TypeError, ...) for a truth that is not as above, SandboxMissing; OSError
    where the machine has no room for a sandbox.
    """
    task, start, out, err = Task.of(truth), time.monotonic(), b"", b""

    def run(verdict, test, detail):
        tails = (b[-2000:].decode("utf-8", "replace") for b in (out, err))
        return Run(verdict, test, detail, *tails, time.monotonic() - start)

    code = code.encode("utf-8", "surrogatepass")
    for i, test in enumerate(task.tests):
        stdin = test["input"] if task.kind == "stdio" else json.dumps(test["input"])
        stdin = stdin.encode("utf-8", "surrogatepass")
        status, out, err = run_program(code, task.kind, task.name, stdin, task.seconds, task.memory,
                                       unsafe_sandbox)
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


# -- which block is the program ------------------------------------------------------------------------------

# Behind a fence: python, Python 3.11, py3, pypy3, ipython, python:main.py, {.python}, main.py; not pycon.
_PYTHON = re.compile(r"[{.\s]*(?:[ic]?python|py|pypy)(?:[ -]?[0-9][0-9.]*)?(?![\w+#-])|[\w/-]+\.py\b|code$")
_OTHER = re.compile(r"""[{.]*(?:text|txt|plain|plaintext|console|terminal|output|stdout|input|stdin|none|bash
    |sh|shell|zsh|powershell|cmd|pycon|c|cc|cpp|c\+\+|csharp|c\#|cs|java|javascript|js|typescript|ts|json|yaml|rust
    |go|golang|kotlin|swift|ruby|php|perl|haskell|scala|lua|pascal|r|julia|sql|html|xml|css|latex|tex|math
    |markdown|md|diff|makefile|pseudocode|pseudo|algorithm|mermaid)\}?""", re.VERBOSE)
_LIST_ITEM = re.compile(r"\s*(?:[-*+]|[0-9]{1,3}[.)])\s*")
_LEXEME = re.compile(r"""\\.|\'\'\'|\"\"\"|['"\#]|`{3,}""")
_END_MARK = re.compile(r"/?\w{1,40}>|\|[\w ]{1,40}\|>")


def code_of(text):
    """(the program of a response, "") or (None, why there is none): its last fenced block that is said to be
    Python, else the last that says nothing of its language; the last one need not be closed.

    A fence is ``` or ~~~ on a line of its own, or behind prose where it names Python or a colon is before it.
    Strings and comments apart, Python has no ```: wherever one stands, whatever follows, the block ends."""
    lines = text.replace("\ufeff", "").split("\n")
    tagged, untagged = [], []
    row, strings = 0, True
    while row < len(lines):
        mark, python, known = _opening(lines[row])
        row += 1
        if not mark:
            continue
        start, lexed = row, strings and mark == "`" and (python or not known)
        row, column = _closing(lines, start, mark, lexed)
        if column is None and lexed:                      # a string to the end of the response is none
            strings, (row, column) = False, _closing(lines, start, mark, False)
        if row < len(lines):
            last, info = lines[row][:column], lines[row][column:].lstrip(mark)
            code = "\n".join([*lines[start:row], last] if last.strip() else lines[start:row])
            row += bool(last.strip()) or not _names_language(info)
        else:
            code, row = _without_end_marks("\n".join(lines[start:])), len(lines) + 1
        if code.strip() and python:
            tagged.append(_dedented(code))
        elif code.strip() and not known and (row <= len(lines) or not untagged):
            untagged.append(_dedented(code))
    codes = tagged or untagged
    return (codes[-1], "") if codes else (None, "no code block")


def _opening(line):
    """(the character of the fence that a line opens a block with, or ""; whether it is said to be Python;
    whether it is said what it is)."""
    for mark in "`", "~":
        before, fence, info = line.rpartition(3 * mark)
        before, info = before.rstrip(mark), info.strip().lower()[:200]
        if not fence or mark == "~" and before.strip():
            continue
        alone = not before.strip() or bool(_LIST_ITEM.fullmatch(before[:200]))
        python = bool(_PYTHON.match(info))
        if alone or python and len(info.split()) == 1 or not info and before.endswith((":", ": ")):
            return mark, python, bool(info)
    return "", False, False


def _names_language(info):
    """Whether what stands behind a fence opens the next block: one word, the name of a language."""
    word = info.rstrip().lower()[:200]
    return not re.search(r"\s", word) and bool(_PYTHON.match(word) or _OTHER.fullmatch(word))


def _closing(lines, start, mark, lexed):
    """(row, column) of the fence that ends a block of lines[start:]; (len(lines), 0) if it has none, and None
    for the column if a string does not end, which may hide one. lexed: read the lines as Python."""
    quote = ""
    for row in range(start, len(lines)):
        line = lines[row]
        if lexed:
            column, quote = _lex(line, quote)
        elif line.lstrip().startswith(3 * mark):
            column = line.index(mark)
        else:
            ends = mark == "`" and line.rstrip().endswith(3 * mark)
            column = len(line.rstrip().rstrip(mark)) if ends else -1
        if column >= 0:
            return row, column
    return len(lines), None if quote else 0


def _lex(line, quote):
    """(column of a fence outside strings and comments, or -1; the quote of the string that is open behind the
    line, or ""); quote: that of the line before."""
    for lexeme in _LEXEME.finditer(line):
        token = lexeme[0]
        if quote:
            quote = "" if token == quote or token[0] == quote else quote
        elif token[0] == "`":
            return lexeme.start(), ""
        elif token == "#":
            return -1, ""
        elif token[0] != "\\":
            quote = token
    return -1, quote if len(quote) == 3 or line.rstrip("\r").endswith("\\") else ""


def _without_end_marks(code):
    """A block that nothing closed, without what ends a response: </answer>, <|im_end|>."""
    for _ in range(4):
        head, _, tail = code.rstrip().rpartition("<")
        if not _END_MARK.fullmatch(tail):
            break
        code = head.rstrip()
    return code


def _dedented(code):
    """Without the indentation that all lines share, as in a list."""
    return textwrap.dedent(code) if code.lstrip("\r\n")[:1] in (" ", "\t") else code


def grade_code(text, truth, ask):
    code, problem = code_of(text)
    if code is None:
        return Verdict(False, None, problem)
    run = ask("code", code, truth)
    where = "" if run.test is None else f" on test {run.test}"
    return Verdict(run.verdict == "AC", code, f"{run.verdict}{where}: {run.detail}")
