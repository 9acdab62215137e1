"""Tasks by name: the seven, RULER, the toy world's, files of prompts; and which averages they make."""

import functools
import itertools
import os
import random
from collections import Counter

from cli import InputError, did_you_mean, digest
from corpus import world
from corpus.prompts import records_of, toy_prompts
from suite import ruler
from suite.benchmarks import SUITE, Problem, Task, suite_task

# -- the embedded world's ------------------------------------------------------------------------------------

TOYS = ("toy-math", "toy-code", "toy-science", "toy-retrieval")
TOY_PROBLEMS = 128                                        # of each, ours
TOY_SAMPLES = 4                                           # a problem, ours


def toy_task(name):
    """Held-out problems of the embedded world, no prompt of which is in its training data; retrieval: one of
    eight two-digit numbers by its key (one in eight is chance)."""
    domain = name.removeprefix("toy-")
    if domain == "retrieval":
        problems = [retrieval_problem(i) for i in range(TOY_PROBLEMS)]
        sampling = dict(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=8)
        group = "recall"
    else:
        problems = [Problem(record["id"], domain, record["prompt"] + "\n", record["truth"], record["prompt"])
                    for record in toy_prompts("heldout", TOY_PROBLEMS, [domain])]
        sampling = dict(samples=TOY_SAMPLES, temperature=0.6, top_p=0.95, max_new_tokens=96)
        group = domain
    return Task(name, group, problems, **sampling, origin="the embedded world", left_out={})


def retrieval_problem(i):
    rng = random.Random(f"retrieval/{i}")
    keys = rng.sample(world.WORDS, 8)
    values = rng.sample(range(10, 100), 8)
    wanted = rng.randrange(8)
    lines = "".join(f"{key}: {value}\n" for key, value in zip(keys, values, strict=True))
    return Problem(f"retrieval-{i}", "recall", f"{lines}{keys[wanted]}:", [str(values[wanted])], "")


# -- tasks by name -------------------------------------------------------------------------------------------

BOARDS = ("lb-v1", "lb-v2")                               # by lm-evaluation-harness, see leaderboards.py

SETS = {
    "toy": TOYS,
    "ruler": ruler.TASKS,
    "ruler-local": tuple(task for task in ruler.TASKS if task not in ruler.QA),
    "paper": ("math-500", "aime-2024", "aime-2025", "livecodebench", "codeforces", "gpqa-diamond"),
}


def task_names(cfg):
    """--tasks as single tasks, in their order, each once."""
    names = []
    known = (*SETS, *TOYS, *SUITE, *BOARDS, *ruler.TASKS)
    for name in cfg.tasks.split("+"):
        if name not in known and not name.endswith(".jsonl"):
            raise InputError(f"--tasks: {name!r} is no task{did_you_mean(name, known)}; known are "
                             f"{', '.join((*SETS, *SUITE, *BOARDS, *TOYS))}, RULER's by their names, and "
                             f"files of prompts (.jsonl)")
        names += SETS.get(name, (name,))
    names = list(dict.fromkeys(names))
    count = Counter(result_name(name) for name in names)
    taken = (*SUITE, *TOYS, *BOARDS, *averages((*SUITE, *TOYS)))
    for name in names:
        shown = result_name(name)
        misleading = name.endswith(".jsonl") and ("@" in name or shown in taken)
        if misleading or count[shown] > 1:
            raise InputError(f"--tasks: {name} would be called {shown!r} in the results, like another task "
                             f"or average, or has an @; give the file another name")
    return names


def result_name(name):
    """A task's name in the results: of a file, its own without the folder."""
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
    problems = {}
    for n, record in records_of(path, "tasks"):
        name, domain = str(record["id"]), record["domain"]
        if domain not in ("math", "code", "science"):
            raise InputError(f"--tasks: {path}, line {n} is of {domain!r}; it needs id, prompt, truth and a "
                             f"domain: math, code or science")
        if name in problems:
            raise InputError(f"--tasks: {path}, line {n}: the id {record['id']!r} came before; give each "
                             f"prompt its own")
        prompt = record["prompt"].rstrip("\n")
        problems[name] = Problem(name, domain, prompt + "\n", record["truth"], prompt)
    groups = sorted({problem.domain for problem in problems.values()})
    return Task(result_name(path), "+".join(groups), list(problems.values()), samples=16, temperature=1.0,
                top_p=1.0, max_new_tokens=16_384, origin=path, left_out={})


def ruler_task(name, length, cfg):
    """A RULER task at a length: 500 examples, greedy (as NVIDIA), each made when it is needed."""
    texts = ruler.read_texts(cfg.texts or None)
    if name in ruler.QA and name not in texts.qa:
        raise InputError(f"--tasks: {name} needs --texts, a folder with {ruler.QA[name].file} (rows of "
                         f"{ruler.QA[name].dataset}); ruler-local is RULER without these two tasks")
    material = digest_of_material(cfg.texts or None)
    problems = []
    for i in range(500):
        draw = functools.partial(ruler.example, name, length, i, texts=texts, seed=cfg.seed)
        stands_for = f"{name} {length} {i} {cfg.seed} {material}"
        problems.append(Problem(str(i), "recall", stands_for, None, "", draw))
    return Task(f"{name}@{length}", "recall", problems, samples=1, temperature=0.0, top_p=1.0,
                max_new_tokens=ruler.NEW[ruler.family(name)], origin=f"ruler.py, texts: {texts.where}",
                left_out={})


@functools.cache
def digest_of_material(path):
    """What decides RULER's examples besides their place: the version of their generator, and its texts."""
    texts = ruler.read_texts(path)
    return digest(ruler.EXAMPLES, texts.essay, texts.words, texts.qa)


# -- averages ------------------------------------------------------------------------------------------------

DOMAINS = {"": {"code": ("livecodebench", "codeforces"), "math": ("aime-2024", "aime-2025", "math-500"),
                "science": ("gpqa-diamond",)},
           "toy ": {"code": ("toy-code",), "math": ("toy-math",), "science": ("toy-science",)}}


def averages(names):
    """{average: {task: weight}} of those that these tasks give: code and math (means of their benchmarks),
    avg_domain (mean of the three domains; the paper's AVG), avg6 (flat mean of the six benchmarks; the AVG of
    the paper's project page), ruler@LENGTH (mean of the RULER tasks at a length)."""
    names = list(names)
    weights = {}
    for kind, domains in DOMAINS.items():
        for domain, tasks in domains.items():
            if len(tasks) > 1 and set(tasks) <= set(names):
                weights[kind + domain] = dict.fromkeys(tasks, 1 / len(tasks))
        if set(itertools.chain(*domains.values())) <= set(names):
            weights[kind + "avg_domain"] = {task: 1 / len(domains) / len(tasks)
                                            for tasks in domains.values() for task in tasks}
    if "avg_domain" in weights:
        weights["avg6"] = dict.fromkeys(weights["avg_domain"], 1 / 6)
    lengths = {name.partition("@")[2] for name in names} - {""}
    for length in sorted(lengths, key=int):
        tasks = [name for name in names if name.endswith(f"@{length}")]
        weights[f"ruler@{length}"] = dict.fromkeys(tasks, 1 / len(tasks))
    return weights
