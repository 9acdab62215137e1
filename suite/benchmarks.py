"""The paper's seven benchmarks: where they are published, a row to its problem, prompts of all protocols."""

import base64
import itertools
import json
import os
import pickletools
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from cli import InputError
from corpus.files import matches, read_rows
from corpus.formats import Drop, number_of, text_of
from corpus.hashes import shuffle_key
from corpus.hub import Hub, get_part, is_there, raw_files, read_lock
from corpus.prompts import BENCHMARKS, called, decoded, identity
from corpus.registry import Part
from grading.programs import gradable

# -- problems ------------------------------------------------------------------------------------------------

class Problem(NamedTuple):
    """One question. id: its own in the task. domain: who grades (verify.grade's; recall: ruler.score)."""
    id: str
    domain: str
    prompt: str                          # all that the model reads
    truth: object                        # as verify.grade takes it; recall: the strings to find
    text: str                            # the question alone, which contamination is searched for
    draw: Callable | None = None         # RULER: makes the Example, prompt is then only its name
    what: str = ""                       # a hash of prompt and truth


class Task(NamedTuple):
    """A benchmark, ready to be sampled."""
    name: str
    group: str                           # math, code, science, recall
    problems: list
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    origin: str                          # data set and revision, or file
    left_out: dict                       # {reason: problems}


# -- the paper's seven benchmarks ----------------------------------------------------------------------------
#
# A reader is one function of (row, protocol). All protocols are graded by verify.py: evalchemy's extractors
# (the last letter A to D anywhere, the article "a" included; math as strings) are not reproduced.
class Benchmark(NamedTuple):
    part: Part | None      # where it is published; None: only as a file of one's own
    columns: tuple         # that `read` needs
    read: Callable[[dict, str], Problem]                  # (row, protocol); Drop: no problem of the benchmark
    samples: int           # of a problem; paper, section 13; GPQA: our inference
    temperature: float
    top_p: float
    max_new_tokens: int
    group: str             # math | code | science, of the averages
    size: int              # problems of the published scores


# The published prompts: data of github.com/mlfoundations/evalchemy at 6ed6741 (Apache-2.0), files
# eval/chat_benchmarks/{MATH500,GPQADiamond,LiveCodeBenchv5,CodeForces}/eval_instruct.py; AIME24 and AIME25
# ask as MATH500. They decide scores, missing spaces included: keep them.
TEMPLATES = {
    "math": "Problem: {problem}\nMark your solution with \\boxed\nAnswer:",
    "gpqa": "Return your final response within \\boxed{{}} and only include the letter choice (A, B, C, or "
            "D) as your final response.\nProblem: {problem}\nOptions: {options}\nAnswer:",
    "lcb-stdio": "Generate an executable Python function generated from the given prompt. The function "
                 "should take stdin as input and print the output. Simply call the function after the "
                 "definition.",
    "lcb-function": "Generate an executable Python function generated from the given prompt. Return the "
                    "function body without invoking it at the final solution.",
    "codeforces": "You are a coding expert. Given a competition-level coding problem, you need to write a "
                  "Python program to solve it. You may start by outlining your thought process. In the end, "
                  "please provide the complete code in a code block enclosed with ``` ```. The code should "
                  "take stdin as input and print the output. Your program should be a Python function "
                  "generated from the given prompt. Simply call the function after the definition.\n\n",
}

FLAWS = {
    "gpqa-diamond": "the options are shuffled with seed 42 for every question: the right one is always D",
    "livecodebench": "no prompt shows the starter code: the program's first function is called, whatever its "
                     "name (a class fails); private tests only",
    "codeforces": "the prompt has the editorial; incomplete or missing tests count; no checker, so the "
                  "output must be the sample's; problems that read files are asked as if they read stdin",
}

DEVIATIONS = ("answers are read by verify.py: the last box after the thoughts, also of an answer that was "
              "cut; no chat template")


def math_500(row, protocol="strict"):
    answer = text_of(row, "answer").strip()
    return math_problem(text_of(row, "problem"), answer, protocol, text_of(row, "unique_id"))


INTEGER = re.compile(r"0*([0-9]{1,3})(?:\.0*)?")


def aime(row, protocol="strict"):
    r"""The answer is an integer of 0 to 999, published as 33, 33.0 or "033". verify.py finds \boxed{033},
    33.0 and, as it leaves units out, 33\% and 33^\circ equal to 33."""
    answer = INTEGER.fullmatch(str(row.get("answer")).strip())
    if not answer:
        raise Drop("answer is no integer of 0 to 999")
    return math_problem(text_of(row, "problem"), answer[1], protocol)


def math_problem(problem, answer, protocol, name=None):
    if protocol == "paper":
        prompt = TEMPLATES["math"].format(problem=problem)
    else:
        prompt = f"{problem.strip()}\n\nReason step by step, and put the final answer in \\boxed{{}}."
    return Problem(name or identity("math", problem), "math", prompt, answer, problem)


OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def gpqa(row, protocol="strict"):
    """The letter of the right option: strict, by a hash of question and option, so that other questions and
    their order do not matter; paper, D for every question, as each has a fresh Random(42)."""
    question = text_of(row, "Question")
    stripped = question.strip()
    options = [text_of(row, column) for column in OPTIONS]
    if protocol == "paper":                               # neither question nor options are stripped
        right = options[0]
        random.Random(42).shuffle(options)
        prompt = TEMPLATES["gpqa"].format(problem=question, options=", ".join(lettered(options)))
    else:
        options = [option.strip() for option in options]
        right = options[0]
        options.sort(key=lambda option: shuffle_key(stripped, option))
        listed = "\n".join(lettered(options))
        prompt = (f"{stripped}\n\n{listed}\n\nReason step by step, and put the letter of the right option in "
                  "\\boxed{}.")
    truth = {"letter": "ABCD"[options.index(right)], "options": [option.strip() for option in options]}
    name = optional(row, "Record ID") or identity("science", question)
    return Problem(name, "science", prompt, truth, stripped)


def lettered(options):
    """A) and the first option, ..."""
    return [f"{letter}) {option}" for letter, option in zip("ABCD", options, strict=True)]


WINDOW = ("2024-08-01", "2025-02-01")                     # both days included: LiveCodeBench v5, 279 problems
UNPACKED = 1 << 30                                        # bytes of a problem's tests (they take tens of MB)

PROGRAM = "Reason step by step, then give the whole program in one ```python block."
STDIO = f"The program reads standard input and writes to standard output. {PROGRAM}"


def livecodebench(row, protocol="strict"):
    """paper, as evalchemy's LiveCodeBenchv5 does: private tests only; of a function neither the starter code
    nor the name is told, and verify.py calls the first one of the program (no fn_name). "tokens" is nearest
    to its comparison, of texts stripped at both ends: white space within is free here. livecodebench: the
    tests, the names and the comparison of its own runner, exact and line by line. strict: the same tests, as
    the problem's own judge would compare: numbers with a point are rounded ones."""
    day = str(row.get("contest_date"))[:10]               # 2024-08-03T00:00:00
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", day):
        raise Drop("contest_date is no date")
    if not WINDOW[0] <= day <= WINDOW[1]:
        raise Drop("contest_date out of the window")
    question = text_of(row, "question_content")
    starter = optional(row, "starter_code")
    public = unpacked(row, "public_test_cases")
    private = unpacked(row, "private_test_cases")
    kinds = {str(case.get("testtype")) for case in public + private}
    if kinds not in ({"stdin"}, {"functional"}):
        raise Drop("tests of several or unknown kinds")
    function = kinds == {"functional"}
    name = None                                           # of the function
    if protocol == "paper":
        prompt = TEMPLATES["lcb-function" if function else "lcb-stdio"] + question
    elif function:
        name = function_name(row)
        if not name or not starter:
            raise Drop("no function name or starter code")
        prompt = f"{question.strip()}\n\nUse this starter code:\n```python\n{starter}\n```\n\n{PROGRAM}"
    else:
        prompt = f"{question.strip()}\n\n{STDIO}"
    cases = private if protocol == "paper" else public + private
    tests = [(case["input"], case["output"]) for case in cases]
    if function:
        tests, checker = called(tests), "json" if protocol == "strict" else "exact"
    else:
        checker = {"paper": "tokens", "livecodebench": "lines", "strict": "decimal"}[protocol]
    truth = {"kind": "function" if function else "stdio", "fn_name": name,
             "tests": [{"input": argument, "output": expected} for argument, expected in tests],
             "checker": checker,
             "time_limit_s": 6, "memory_limit_mb": 1024}  # time: LiveCodeBench's; memory: ours
    if not gradable(truth):
        raise Drop("tests cannot be graded")
    return Problem(text_of(row, "question_id"), "code", prompt, truth, question)


def function_name(row):
    """What a row's metadata calls the function; None where that is no name."""
    metadata = decoded(row.get("metadata"), "metadata")
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    return name if isinstance(name, str) and name.isidentifier() else None


def unpacked(row, column):
    """A list of {"input", "output", "testtype"}, published as JSON or as base64 of zlib of a pickle of JSON.
    Nothing is unpickled: the one text is read from the pickle's instructions, which may hold no others."""
    packed = value = text_of(row, column)
    if not packed.lstrip().startswith("["):
        try:
            stream = zlib.decompressobj()
            pickled = stream.decompress(base64.b64decode(packed), UNPACKED)
            if not stream.eof:
                raise Drop(f"{column} is cut off, or over {UNPACKED >> 20} MB")
            value, = texts_in(pickled)
        except (ValueError, zlib.error):
            raise Drop(f"{column} is neither JSON nor packed JSON") from None
    try:
        return check_tests(json.loads(value), column)
    except (ValueError, RecursionError):
        raise Drop(f"{column} is no JSON") from None


def texts_in(pickled):
    """The texts of a pickle that does nothing but hold texts, else ValueError."""
    for op, value, _ in itertools.islice(pickletools.genops(pickled), 9):
        if "UNICODE" in op.name:
            yield value
        elif op.name not in ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "STOP"):
            raise ValueError(op.name)


def codeforces(row, protocol="strict"):
    """paper: a problem without tests stays, and counts as failed. Its comparison takes line breaks for blanks
    and the rest exactly; "tokens" is nearest, where several blanks are one. strict: the problem's own checker
    where it has one, else numbers as numbers."""
    if optional(row, "interaction_format"):
        raise Drop("interactive")
    if protocol != "paper":
        if row.get("input_mode") != "stdio":
            raise Drop("input_mode is not stdio")
        if row.get("official_tests_complete") is not True:
            raise Drop("official_tests are not complete")
        if not row.get("official_tests"):
            raise Drop("no tests")
    seconds, megabytes = number_of(row, "time_limit"), number_of(row, "memory_limit")
    program = optional(row, "generated_checker") if protocol != "paper" else ""
    if protocol == "paper":
        checker = "tokens"
    else:
        checker = "program" if program else "decimal"
    tests = check_tests(row.get("official_tests") or [], "official_tests")
    truth = {"kind": "stdio",
             "tests": [{"input": test["input"], "output": test["output"]} for test in tests],
             "checker": checker, "program": program or None, "time_limit_s": seconds,
             "memory_limit_mb": megabytes}
    if tests and not gradable(truth):
        raise Drop("tests cannot be graded")
    name, title, description = (text_of(row, column) for column in ("id", "title", "description"))
    examples = check_tests(row.get("examples") or [], "examples")
    if protocol == "paper":
        prompt = TEMPLATES["codeforces"] + html(row, examples)
    else:
        limits = f"Time limit: {seconds:g} s a test. Memory limit: {megabytes:g} MB."
        parts = [title.strip(), limits, description.strip(), *headed(row, "Input", "input_format"),
                 *headed(row, "Output", "output_format")]
        for i, example in enumerate(examples, 1):
            parts.append(f"Example {i}\nInput:\n{example['input'].strip()}\n"
                         f"Output:\n{example['output'].strip()}")
        parts += [*headed(row, "Note", "note"), STDIO]
        prompt = "\n\n".join(parts)
    return Problem(name, "code", prompt, truth, description)


def headed(row, head, column):
    """[the column's text under its head], or [] where it is blank."""
    text = optional(row, column)
    return [f"{head}\n{text}"] if text else []


def html(row, examples):
    """A Codeforces problem as evalchemy shows it; a null input or output format reads None."""
    def part(head, column):
        return f"<h2>{head}</h2><div>{row.get(column)}</div>"

    parts = [f"<html><body><h1>{row['title']}</h1><div>Time limit per test: {row['time_limit']} s</div>",
             part("Description", "description"), part("Input Format", "input_format"),
             part("Output Format", "output_format")]
    for example in examples:
        parts.append(f"<h2>Example</h2><h3>Input</h3><div>{example['input']}</div>"
                     f"<h3>Output</h3><div>{example['output']}</div>")
    for head, column in (("Note", "note"), ("Editorial", "editorial")):
        if row.get(column):
            parts.append(part(head, column))
    return "".join([*parts, "</body></html>"])


def optional(row, column):
    """The column's text, stripped; "" where it is null or blank."""
    value = row.get(column)
    blank = value is None or isinstance(value, str) and not value.strip()
    return "" if blank else text_of(row, column).strip()


def check_tests(tests, column):
    """The tests, a list of objects with the texts input and output; else Drop."""
    def whole(test):
        return (isinstance(test, dict) and isinstance(test.get("input"), str)
                and isinstance(test.get("output"), str))

    if not isinstance(tests, list) or not all(map(whole, tests)):
        raise Drop(f"{column} are no inputs and outputs")
    return tests


MATH = dict(samples=64, temperature=0.6, top_p=0.95, max_new_tokens=32_768, group="math")
OTHERS = dict(samples=3, temperature=0.7, top_p=1.0, max_new_tokens=32_768)
AIME_COLUMNS = ("problem", "answer")


def make_benchmark(name, size, columns, read, files=None, **sampling):
    part = BENCHMARKS.get(name)
    if part is not None:
        part = replace(part, columns=columns, files=files or part.files)
    return Benchmark(part, columns, read, size=size, **sampling)


SUITE = {
    "math-500": make_benchmark("math-500", 500, ("problem", "answer", "unique_id"), math_500, **MATH),
    "aime-2024": make_benchmark("aime-2024", 30, AIME_COLUMNS, aime, **MATH),
    "aime-2025": make_benchmark("aime-2025", 30, AIME_COLUMNS, aime, **MATH),
    "aime-2026": make_benchmark("aime-2026", 30, AIME_COLUMNS, aime, **MATH),  # no data set of it is verified
    # not test6.jsonl: release v6 has 175 problems more, from January 2025 on, some of them in the window
    "livecodebench": make_benchmark("livecodebench", 279, (
        "question_id", "question_content", "contest_date", "starter_code", "public_test_cases",
        "private_test_cases", "metadata"), livecodebench, files="test[2-5].jsonl", group="code", **OTHERS),
    "codeforces": make_benchmark("codeforces", 453, (
        "id", "title", "description", "input_format", "output_format", "interaction_format", "note",
        "editorial", "examples", "official_tests", "official_tests_complete", "input_mode",
        "generated_checker", "time_limit", "memory_limit"), codeforces, group="code", **OTHERS),
    "gpqa-diamond": make_benchmark("gpqa-diamond", 198, ("Question", *OPTIONS), gpqa, group="science",
                                   **OTHERS),
}


def suite_task(name, cfg, truths):
    """One of the seven: of --data, of what is under --raw, or downloaded to it. truths: False on ranks that
    do not grade (LiveCodeBench's tests take gigabytes)."""
    benchmark = SUITE[name]
    files, origin = benchmark_files(name, benchmark, cfg)
    problems = {}
    left_out = Counter()
    for row in rows_of(files, benchmark.columns):
        try:
            problem = benchmark.read(row or {}, cfg.protocol)
        except Drop as e:
            left_out[str(e)] += 1
            continue
        if problem.id in problems:
            left_out["came before"] += 1
            continue
        if cfg.protocol != "paper":                       # ours: as in mid-training, question and line break
            problem = problem._replace(prompt=problem.prompt + "\n")
        problems[problem.id] = problem if truths else problem._replace(truth=None)
    if len(problems) != benchmark.size:
        origin += f" ({benchmark.size} were published)"
    return Task(name, benchmark.group, list(problems.values()), benchmark.samples, benchmark.temperature,
                benchmark.top_p, benchmark.max_new_tokens, origin, dict(left_out))


def benchmark_files(name, benchmark, cfg):
    """(files of a benchmark's rows, where they come from in words)."""
    part, columns = benchmark.part, ", ".join(benchmark.columns)
    if cfg.data:
        file = os.path.join(cfg.data, f"{name}.jsonl")
        if not os.path.exists(file):
            raise InputError(f"--data={cfg.data} has no {name}.jsonl (with {columns}); put it there, or "
                             f"leave {name} out of --tasks")
        return [file], cfg.data
    if part is None:
        raise InputError(f"--tasks: {name} is on no hub that was verified; give --data=FOLDER with "
                         f"{name}.jsonl ({columns}), or leave it out")
    folder = os.path.join(cfg.raw, name)
    if not is_there(cfg.raw, name):
        get_part(Hub(), name, part, None, cfg.raw, 1)
    files = [file for file in raw_files(cfg.raw, name, part)
             if matches(os.path.relpath(file, folder), part.files)]
    revision = (read_lock(folder) or {}).get("revision", "what was put there")
    return files, f"{part.repo} at {revision[:12]}"


def rows_of(files, columns):
    for file in files:
        for _, row in read_rows(file, columns):
            yield row
