"""Does a program solve its problem? Its tests, run in the sandbox, and how outputs are compared."""

import json
import math
import re
import signal
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
        return bool(Task.of(truth))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return False


class Task(NamedTuple):
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


def grade_code(text, truth, ask):
    code, problem = code_of(text)
    if code is None:
        return Verdict(False, None, problem)
    run = ask("code", code, truth)
    where = "" if run.test is None else f" on test {run.test}"
    return Verdict(run.verdict == "AC", code, f"{run.verdict}{where}: {run.detail}")
