"""Tasks by name: the seven, RULER, the toy world's, files of prompts; and which averages they make."""

import functools
import os
import random
from collections import Counter

from cli import InputError, did_you_mean, digest
from corpus import world
from corpus.prompts import records_of, toy_prompts
from suite import ruler
from suite.benchmarks import SUITE, Problem, Task, suite_task

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
BOARDS = ("lb-v1", "lb-v2")                               # by lm-evaluation-harness, see leaderboards.py

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
