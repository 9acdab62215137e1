"""rl.py as a whole on the toy world: one process equals two, a resumed run an uninterrupted one, gradients do
not depend on rows, groups stay whole, rollouts are replayed, bad input ends readably."""

import dataclasses
import glob
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter

import easy_rl
import numpy as np
import pytest
import torch
from processes import Process

import rl
from cli import InputError, parse
from corpus.prompts import toy_prompts
from engines.contract import EngineError, Sample
from engines.embedded import TorchEngine
from grading import sympy_workers
from model import load, save
from rl import Response, pack, row_logprobs, row_tensors
from runtime import join_ranks
from verify import grade

SMALL = ["--model=toy", "--domains=math", "--steps=3", "--batch=4", "--group=4", "--context=64",
         "--row_tokens=128", "--eval_every=0", "--eval_prompts=4", "--eval_samples=2", "--lr=1e-3",
         "--eps=1e-6"]
SHORT = ["--heldout=none", "--ref_every=2", "--context=48"]
LONG = ["--steps=6", "--ref_every=2", "--context=48", "--eval_every=2", "--eval_prompts=8"]


def run(folder, *flags, stage=easy_rl):
    stage.main(parse(rl.Config, [*SMALL, f"--run={folder}", *flags], rl.recipe))
    return folder


def weights(folder):
    return {n: p.detach().clone() for n, p in load(str(folder / "model")).named_parameters()}


def lines(folder, name="metrics.jsonl"):
    with open(folder / name) as f:
        return [json.loads(line) for line in f]


def steps(folder):
    """The numbers of metrics.jsonl that do not depend on the clock."""
    return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines(folder)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """An untrained toy, of whose answers easy_rl.py calls some right, and prompts."""
    folder = tmp_path_factory.mktemp("rl") / "start"
    save(load("random:toy"), str(folder))
    prompt_file(folder, *toy_prompts("rl", 12, ["math"]))
    return folder


def begin(start):
    return [f"--init={start}", f"--prompts={start}/prompts.jsonl"]


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    return run(tmp_path_factory.mktemp("rl") / "whole", *begin(start), *LONG, "--export_at=2,4")


@pytest.fixture(scope="module")
def short(start, tmp_path_factory):
    """Three steps, nothing held out; the reference changes before the third."""
    return run(tmp_path_factory.mktemp("rl") / "short", *begin(start), *SHORT)


def test_what_a_run_leaves(whole):
    m = [line for line in lines(whole) if "eval" not in line]
    assert [line["step"] for line in m] == list(range(1, 7))
    assert all(line["push_gap"] < 1e-5 and line["mismatch"] < 1e-5 for line in m)
    assert all(line["ratio"] == line["ratio_max"] == 1 and line["clip_high"] == 0 for line in m)
    assert m[0]["k3"] < 1e-9 < m[1]["k3"]                 # the reference starts as the policy
    assert [line["step"] for line in lines(whole) if "eval" in line] == [0, 2, 4, 6]
    assert sorted(os.listdir(whole / "models")) == ["step_000002", "step_000004"]
    made = lines(whole, "samples.jsonl")
    assert len(made) == 6 * 4 * 4 and len({(r["step"], r["group"]) for r in made}) == 24
    correct = Counter((r["step"], r["group"]) for r in made if r["correct"])
    assert 12 < sum(0 < count < 4 for count in correct.values()) < 24
    for r in made:
        assert len(r["tokens"]) == len(r["gen"])
        if 0 < correct[r["step"], r["group"]] < 4:        # a group that is trained on
            assert abs(np.array(r["gen"]) - np.array(r["old"])).max() < 1e-5
        else:
            assert r["old"] is None
        assert r["reward"] == pytest.approx(sum(r["terms"].values()))
    by_step = {line["step"]: line for line in m}
    for step in range(1, 7):
        mine = [r for r in made if r["step"] == step]
        assert by_step[step]["reward"] == pytest.approx(np.mean([r["reward"] for r in mine]))
        assert by_step[step]["truncated"] == np.mean([r["finish"] != "stop" for r in mine])


# -- the same numbers however it is run ----------------------------------------------------------------------

def test_two_ranks_equal_one(start, short, tmp_path):
    two = Process(tmp_path / "two", *SMALL, *begin(start), *SHORT, f"--run={tmp_path / 'two'}", world=2,
                  stage="easy_rl", OMP_NUM_THREADS="1")
    assert two.wait(120) == 0, two.text("stderr")
    ours, theirs = lines(short, "samples.jsonl"), lines(tmp_path / "two", "samples.jsonl")
    key = {"step", "id", "tokens", "reward"}
    first = [sorted(([r[k] for k in sorted(key)] for r in made_ if r["step"] == 1), key=str)
             for made_ in (ours, theirs)]
    assert first[0] == first[1]
    one, two = ([line for line in steps(f) if "eval" not in line] for f in (short, tmp_path / "two"))
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], abs=1e-6)
    assert one[0]["gnorm"] == pytest.approx(two[0]["gnorm"], rel=1e-5)


@pytest.mark.parametrize("flags", [
    ["--row_tokens=1000", "--recompute=full", "--ref_offload=True"],
    *(pytest.param([flag], marks=pytest.mark.slow)
      for flag in ("--row_tokens=64", "--row_tokens=1000", "--recompute=full", "--ref_offload=True"))])
def test_how_a_step_is_computed(flags, start, short, tmp_path):
    """Other rows, recomputation, the reference elsewhere: the same losses and gradients."""
    folder = run(tmp_path / "run", *begin(start), *SHORT, *flags)
    one, two = ([line for line in steps(f) if "eval" not in line] for f in (short, folder))
    for a, b in zip(one[:2], two[:2], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6) and a["k3"] == pytest.approx(b["k3"], abs=1e-6)
        assert a["gnorm"] == pytest.approx(b["gnorm"], rel=1e-4)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one(world, start, whole, tmp_path):
    """Three steps, kill -9 in the middle of the fourth, and on: every number and weight the same bits, on one
    rank and on two, with some held-out prompts that were solved before the first step."""
    def process(folder):
        return Process(folder, *SMALL, *begin(start), *LONG, f"--run={folder}", world=world, stage="easy_rl",
                       OMP_NUM_THREADS="1")

    folder = tmp_path / "run"
    if world > 1:
        whole = tmp_path / "whole"
        straight = process(whole)
        assert straight.wait(120) == 0, straight.text("stderr")
    right = [line["pass_rate"] for line in steps(whole) if "eval" not in line]
    assert 0 < min(right) and max(right) < 1
    assert 0 < steps(whole)[0]["eval"]["frontier"]["unsolved"] < 8
    killed = process(folder)
    end = time.monotonic() + 60
    while latest(folder) < 3 and time.monotonic() < end:
        time.sleep(0.002)
    killed.kill()
    assert latest(folder) >= 3 and not (folder / "model").exists()
    again = process(folder)
    assert again.wait(120) == 0, again.text("stderr")
    assert "goes on at step" in again.text("stdout")
    same_run(folder, whole)


def latest(folder):
    """The step of the newest complete checkpoint."""
    return max((int(path[-6:]) for path in glob.glob(f"{folder}/checkpoints/step_??????")), default=0)


@pytest.mark.slow
def test_killed_at_ten_random_moments(start, whole, tmp_path):
    """Each time no more is lost than the step whose checkpoint is being written, and the one in flight; in
    the end nothing is."""
    folder, rng = tmp_path / "run", np.random.default_rng(0)
    flags = [*SMALL, *begin(start), *LONG, f"--run={folder}"]
    for _ in range(10):
        before = latest(folder)
        process = Process(folder, *flags, stage="easy_rl", OMP_NUM_THREADS="1")
        time.sleep(rng.uniform(0.1, 2.0))
        done = process.running()
        process.kill()
        after = latest(folder)
        assert after >= before
        if not done and (folder / "rl.json").exists():
            break
        if not (folder / "stdout.0").exists():  # killed before its first breath
            continue
        told = re.findall(r"step +(\d+)/", process.text("stdout"))
        if told:
            assert after >= int(told[-1]) - 1   # it was written when the checkpoint of the last line began
    again = Process(folder, *flags, stage="easy_rl", OMP_NUM_THREADS="1")
    assert again.wait(120) == 0, again.text("stderr")
    assert steps(folder) == steps(whole)
    assert lines(folder, "samples.jsonl") == lines(whole, "samples.jsonl")


def test_replay_trains_without_an_engine(start, short, tmp_path):
    """The same rollouts, the same updates, to the rounding of the written log-probs (which AdamW would blow
    up with a smaller eps, where a gradient is almost 0)."""
    folder = run(tmp_path / "run", *begin(start), *SHORT, f"--replay={short / 'samples.jsonl'}")
    one, two = ([line for line in steps(f) if "eval" not in line] for f in (short, folder))
    assert len(two) == 3 and all(line["push_gap"] is None for line in two)
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["reward"] == pytest.approx(b["reward"])
    ours, theirs = weights(folder), weights(short)
    assert all((ours[n] - theirs[n]).abs().max() < 1e-4 for n in theirs)


def test_one_step_ahead(start, short, tmp_path):
    """The first batch is the same; the second was sampled with the weights before the first update."""
    two = run(tmp_path / "two", *begin(start), *SHORT, "--ahead=1")
    a, b = ([line for line in steps(f) if "eval" not in line] for f in (short, two))
    assert a[0]["loss"] == b[0]["loss"] and b[0]["mismatch"] < 1e-5
    assert all(line["mismatch"] > 1e-4 for line in b[1:]) and all(line["mismatch"] < 1e-5 for line in a)


# -- what can break in the middle ----------------------------------------------------------------------------

def same_run(one, two):
    assert steps(one) == steps(two)
    assert lines(one, "samples.jsonl") == lines(two, "samples.jsonl")
    ours, theirs = weights(one), weights(two)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_the_engine_dies_in_a_step(start, short, tmp_path, monkeypatch):
    """In the third. The two before are kept; the same command goes on from there, bit for bit."""
    flags, generate = [*begin(start), *SHORT], TorchEngine.generate

    def dies(self, *args, keys=None, **more):
        if keys and keys[0][:2] == ("train", 2):
            raise EngineError("the engine died in generate, status -9")
        return generate(self, *args, keys=keys, **more)

    monkeypatch.setattr(TorchEngine, "generate", dies)
    with pytest.raises(InputError, match="the engine died in generate"):
        run(tmp_path / "run", *flags)
    assert latest(tmp_path / "run") == 2 and not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    same_run(run(tmp_path / "run", *flags), short)


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("where, size, what", [
    ("run", "34m", "the checkpoint of step 3"),
    pytest.param("samples", "32k", "samples.jsonl", marks=pytest.mark.slow)])
def test_a_full_disk(where, size, what, start, short, tmp_path):
    """Of the run folder (a checkpoint has 14 MB, two are kept while a third is written), or for samples.jsonl
    alone (17 kB a step). With room the same command goes on, bit for bit."""
    disk, folder = tmp_path / where, tmp_path / "run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "x", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount")
    try:
        if where == "samples":
            folder.mkdir()
            (folder / "samples.jsonl").symlink_to(disk / "samples.jsonl")
        flags = [*SMALL, *begin(start), *SHORT, f"--run={folder}"]
        process = Process(tmp_path / "out", *flags, stage="easy_rl", OMP_NUM_THREADS="1")
        assert process.wait(60) == 2
        errors = process.text("stderr")
        assert errors.startswith("error: ") and errors.count("\n") == 1 and "Traceback" not in errors
        assert what in errors and str(folder) in errors
        assert "No space" in errors or "0 MB are free" in errors
        before = latest(folder)
        assert before >= 1 and not (folder / "model").exists()
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        again = Process(tmp_path / "out", *flags, stage="easy_rl", OMP_NUM_THREADS="1")
        assert again.wait(60) == 0, again.text("stderr")
        assert f"goes on at step {before}" in again.text("stdout")
        same_run(folder, short)
    finally:
        subprocess.run(["umount", disk])


# -- rows ----------------------------------------------------------------------------------------------------

def some_responses(model, n, seed=0):
    rng = np.random.default_rng(seed)
    responses = []
    for _ in range(n):
        prompt = rng.integers(0, 500, rng.integers(1, 20)).tolist()
        tokens = rng.integers(0, 500, rng.integers(1, 30)).astype(np.int32)
        gen = -rng.random(len(tokens), dtype=np.float32)
        responses.append(Response(0, prompt, tokens, gen, "stop", ""))
    return responses


@pytest.mark.parametrize("name", ["toy", "toy-mistral", "toy-h", "toy-nemotron-h"])
def test_packed_log_probs_are_those_of_responses_alone(name):
    model = load(f"random:{name}")
    responses = some_responses(model, 12)
    packed = pack([len(r.prompt_ids) + len(r.tokens) for r in responses], 100)[0]
    assert len(packed) > 2
    with torch.no_grad():
        for indices in packed:
            row = row_tensors(indices, responses, "cpu")
            logp, entropy = row_logprobs(model, row, 0.7)
            for i in indices:
                r = responses[i]
                logits = model(torch.tensor([[*r.prompt_ids, *r.tokens.tolist()]]))
                alone = (logits[0, len(r.prompt_ids) - 1:-1] / 0.7).log_softmax(-1)
                own = row.owner == i
                assert row.gen[own].tolist() == r.gen.tolist()
                expected = alone.gather(1, torch.tensor(r.tokens, dtype=torch.int64)[:, None])[:, 0]
                assert (logp[own] - expected).abs().max() < 1e-5
                assert (entropy[own] + (alone.exp() * alone).sum(-1)).abs().max() < 1e-4
    empty = row_logprobs(model, row_tensors([], responses, "cpu"), 1.0)[0]
    assert empty.shape == (0,) and empty.sum() == 0
    empty.sum().backward()                                # a rank without responses takes part all the same


# -- prompts, groups, rewards --------------------------------------------------------------------------------

def made(text, tokens=(1, 2, 3), finish="stop"):
    return Response(0, [1], np.array(tokens, dtype=np.int32), np.zeros(3, dtype=np.float32), finish, text)


def test_rewards_term_by_term():
    cfg, records = rl.Config(), [{"domain": "math", "truth": "5"}]
    loop = (1, 2, 3, 4) * 4
    cases = [(made("<think> 2 + 3 </think> \\boxed{5}"), True, 1.0),
             (made("\\boxed{5}"), True, 0.0),           # right, but not of the form
             (made("<think> x </think> \\boxed{6}"), False, 0.0),
             (made("<think> x </think> \\boxed{5}", finish="length"), False, -0.5),
             (made("<think> 2 + 3 </think> \\boxed{5}", loop), True, 1 - 0.5 * 9 / 13)]
    rl.judge([r for r, *_ in cases], records, cfg)
    for r, correct, reward in cases:
        assert r.correct == correct and r.reward == pytest.approx(reward), r
    cfg.format = False
    r, = rl.judge([made("\\boxed{5}")], records, cfg)
    assert r.reward == 1.0


def starved(monkeypatch, fails):
    """Mathematics that needs sympy finds no memory, fails[letter in gold] times; then it is what it was."""
    ask, left = sympy_workers.ask, Counter(fails)

    def first_fails(gold, *answers):
        [letter] = set(gold) & set(fails)
        left[letter] -= 1
        if left[letter] >= 0:
            raise MemoryError("no room")
        return ask(gold, *answers)

    monkeypatch.setattr(sympy_workers, "ask", first_fails)
    sympy_workers.workers.known.clear()


def test_what_the_machine_could_not_grade_is_asked_again_or_masked(monkeypatch, tmp_path):
    records = [{"id": x, "domain": "math", "truth": f"\\sin(2{x})"} for x in "xy"]
    starved(monkeypatch, {"x": 1, "y": 8})
    texts = ["<think> a </think> \\boxed{2\\sin(x)\\cos(x)}", "<think> b </think> \\boxed{2\\sin(y)\\cos(y)}",
             "<think> c </think> none", "<think> d </think> \\boxed{1}"]
    groups = []
    for prompt in range(2):
        group = [made(text) for text in texts]
        for r in group:
            r.prompt = prompt
        groups.append(group)
    cfg = rl.Config(group=4)
    responses = rl.judge([r for group in groups for r in group], records, cfg)
    ungraded = [r for r in responses if not r.graded]
    assert ungraded and all(r.prompt == 1 and r.verdict.startswith("cannot be graded: MemoryError")
                            for r in ungraded)
    assert responses[0].correct and not responses[2].correct and responses[2].graded
    assert [rl.counted_tokens(r, cfg) for r in responses] == [3 if r.graded else 0 for r in responses]
    rollouts = rl.Rollouts(groups, groups, {}, 0)
    assert rl.has_signal(groups[0]) and not rl.has_signal(groups[1])
    metrics = rl.rollout_metrics(rollouts, records, cfg)
    graded = [r for r in responses if r.graded]
    assert metrics["ungraded"] == len(ungraded) and metrics["responses"] == 8
    assert metrics["pass_rate"] == metrics["pass_math"] == 1 / len(graded)
    assert metrics["solve_none"] == 0.5 and metrics["solve_all"] == 0
    line = rl.step_line(1, metrics | dict(tok_s=1, score_s=0, train_s=0), cfg)
    assert line.endswith(f" | {len(ungraded)} not graded")
    # The filter leaves such a prompt for the next call.
    assert rl.append_verdicts(tmp_path / "verdicts.jsonl", responses, records) == 1
    assert lines(tmp_path, "verdicts.jsonl") == [{"id": "x", "verdicts": [True, False, False, False]}]


def test_prompts_come_all_before_any_comes_again():
    drawn, cursor = [], 0
    for _ in range(4):
        indices, cursor = rl.draw_prompts(cursor, 10, 5, seed=3)
        drawn += indices
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] and cursor == 20
    assert rl.draw_prompts(3, 10, 12, seed=3) == (drawn[3:15], 15)


class Oracle:
    """An engine whose answers to a prompt are right as often as `rates` says, by the prompt's first id."""

    def __init__(self, rates):
        self.rates, self.calls = rates, 0

    def generate(self, prompts, n, **more):
        self.calls += 1
        texts = [[f"<think> x </think> \\boxed{{{int(j >= self.rates[p[0]] * n)}}}" for j in range(n)]
                 for p in prompts]
        return [[Sample([1, 2, 3], [-1.0] * 3, "stop", text) for text in own] for own in texts]


def test_groups_without_a_difference_are_replaced():
    """Filtered on correctness, whole groups; new prompts come in their place, in order."""
    rates = {0: 0.0, 1: 1.0, 2: 0.5, 3: 0.25, 4: 0.5, 5: 0.0, 6: 0.75, 7: 1.0}
    records = [{"id": str(i), "domain": "math", "truth": "0", "ids": [i]} for i in rates]
    cfg = dataclasses.replace(rl.Config(), batch=4, group=4, refill=2)
    with join_ranks("cpu") as ranks:
        engine = Oracle(rates)
        rollouts = rl.sample_step(0, 0, engine, records, cfg, ranks)
        groups = rollouts.groups
        assert len(groups) == 4 and all(len(g) == 4 and len({r.prompt for r in g}) == 1 for g in groups)
        assert all(0 < sum(r.correct for r in g) < 4 for g in groups)
        assert 2 <= engine.calls <= 3 and rollouts.cursor == len(rollouts.sampled) > 4
        prompts = [g[0].prompt for g in rollouts.sampled]
        assert prompts == rl.draw_prompts(0, 8, rollouts.cursor, cfg.seed)[0]
        cfg.refill = 0
        rollouts = rl.sample_step(1, rollouts.cursor, engine, records, cfg, ranks)
        assert len(rollouts.sampled) == 4 and len(rollouts.groups) <= 4


class Saved:
    """Replays saved texts: one list of them a prompt, by its first id."""

    def __init__(self, texts):
        self.texts = texts

    def generate(self, prompts, n, **more):
        return [[Sample([1] * (p[0] + 1), [-1.0] * (p[0] + 1), "stop", text) for text in self.texts[p[0]]]
                for p in prompts]


def test_evaluation_by_hand():
    """Four samples a prompt. Right before: m0 2, m1 0, m2 0, s3 1, s4 0; after: m0 1, m1 4, m2 0, s3 0, s4 2.
    So m1, m2, s4 were unsolved; of them m1 and s4 are solved now. s3, lost meanwhile, was never unsolved."""
    held = [{"id": id, "domain": domain, "truth": truth, "ids": [i]} for i, (id, domain, truth) in enumerate([
        ("m0", "math", "5"), ("m1", "math", "\\frac{1}{2}"), ("m2", "math", "7"), ("s3", "science", "C"),
        ("s4", "science", "A")])]
    box = "<think> x </think> \\boxed{%s}"
    before = [[box % 5, box % 5, box % 6, "5"], [box % 2] * 4, [""] * 4, [box % "C", *[box % "B"] * 3],
              ["<think> \\boxed{A}"] * 4]
    after = [[box % 5, "", "", ""], [box % "0.5"] * 4, [box % 6] * 4, [box % "D"] * 4,
             [box % "A", box % "A", box % "B", ""]]
    cfg, progress = rl.Config(eval_samples=4), {"unsolved": None}
    with join_ranks("cpu") as ranks:
        first = rl.evaluate(0, Saved(before), held, progress, cfg, ranks)
        assert progress["unsolved"] == ["m1", "m2", "s4"]
        last = rl.evaluate(50, Saved(after), held, progress, cfg, ranks)
    assert progress["unsolved"] == ["m1", "m2", "s4"]
    assert first == {"math": {"pass@1": pytest.approx(2 / 12), "pass@4": pytest.approx(1 / 3)},
                     "science": {"pass@1": pytest.approx(1 / 8), "pass@4": 0.5},
                     "frontier": {"unsolved": 3, "solved": 0, "pass": 0}, "pass": 3 / 20, "length": 3,
                     "ungraded": 0}
    assert last == {"math": {"pass@1": pytest.approx(5 / 12), "pass@4": pytest.approx(2 / 3)},
                    "science": {"pass@1": pytest.approx(2 / 8), "pass@4": 0.5},
                    "frontier": {"unsolved": 3, "solved": 2, "pass": 0.5}, "pass": 7 / 20, "length": 3,
                    "ungraded": 0}
    assert rl.evaluation_line(50, last) == (
        "held-out    50 | pass 0.350 | math pass@1 0.417 pass@4 0.667 | science pass@1 0.250 pass@4 0.500 | "
        "solved 2 of 3 unsolved at first | len 3")


@pytest.mark.filterwarnings("ignore:unsafe_sandbox")
def test_timeouts_are_told_by_the_verdict():
    slow = {"kind": "stdio", "tests": [{"input": "", "output": "1"}], "time_limit_s": 0.2}
    verdict = grade("code", "```python\nwhile True: pass\n```", slow, unsafe_sandbox=True).reason
    assert verdict.startswith("TLE on test 0") and rl.timed_out(verdict)
    out = "raise RuntimeError('time is not decided in time')"
    raised = grade("code", f"```python\n{out}\n```", slow, unsafe_sandbox=True).reason
    assert "RuntimeError" in raised and not rl.timed_out(raised)
    assert rl.timed_out("not decided in time") and rl.timed_out("not decided: all workers are busy")
    assert not rl.timed_out("not decided: the worker ran out of memory")


def test_the_filter_writes_the_papers_mixes(start, tmp_path):
    records = [{"id": f"m{i}", "domain": "math", "prompt": f"What is {i} + 1?", "truth": str(i + 1)}
               for i in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    flags = [f"--prompts={tmp_path / 'train.jsonl'}", f"--init={start}", "--filter=True", "--group=16",
             "--context=32"]
    run(tmp_path / "out", *flags)
    verdicts = lines(tmp_path / "out", "verdicts.jsonl")
    assert sorted(v["id"] for v in verdicts) == [f"m{i}" for i in range(6)]
    assert all(len(v["verdicts"]) == 16 for v in verdicts)
    # cut short and called again: the same file
    text = (tmp_path / "out" / "verdicts.jsonl").read_text()
    (tmp_path / "out" / "verdicts.jsonl").write_text(text[:len(text) // 2])
    run(tmp_path / "out", *flags)
    assert sorted(lines(tmp_path / "out", "verdicts.jsonl"), key=str) == sorted(verdicts, key=str)
    assert {f for f in os.listdir(tmp_path / "out") if f.endswith(".jsonl")} == {
        "verdicts.jsonl", "unbalanced-MC.jsonl", "unbalanced-MCS.jsonl", "balanced-MC.jsonl",
        "balanced-MCS.jsonl"}


def test_verdicts_that_cannot_be_written(start, tmp_path):
    """A file has no room for the third batch of prompts: the two before are kept."""
    records = [GOOD | {"id": f"m{i}"} for i in range(6)]
    flags = [*SMALL, prompt_file(tmp_path, *records), f"--init={start}", "--filter=True", "--group=16",
             "--context=32", "--batch=2", f"--run={tmp_path / 'run'}"]
    for more, limit in (["--run=pyproject.toml/run"], "10000"), ([], "700"):
        process = Process(tmp_path / "out", *flags, *more, stage="easy_rl", OMP_NUM_THREADS="1",
                          FILE_LIMIT=limit)
        assert process.wait(60) == 2
        errors = process.text("stderr")
        assert errors.startswith("error: --run=") and "verdicts could not be written" in errors, errors
    run(tmp_path / "run", *flags)
    assert [v["id"] for v in lines(tmp_path / "run", "verdicts.jsonl")] == [f"m{i}" for i in range(6)]


# -- worked examples -----------------------------------------------------------------------------------------

def with_diff(name, folder, monkeypatch):
    """rl.py with a diff of study/ablations, as a module."""
    shutil.copy(rl.__file__, folder)
    diff = os.path.join(os.path.dirname(rl.__file__), "study", "ablations", f"{name}.diff")
    subprocess.run(["git", "apply", diff], cwd=folder, check=True,
                   env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)})
    spec = importlib.util.spec_from_file_location(f"rl_{name}", folder / "rl.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)   # its responses are pickled between ranks
    spec.loader.exec_module(module)
    return module


def test_the_sequence_mask_is_by_response_not_by_row(tmp_path, monkeypatch):
    """A row of a response in range and one out of it: a mean over the row would keep, or drop, both."""
    in_range = with_diff("sequence-mask", tmp_path, monkeypatch).in_range
    old, gen = torch.zeros(5), torch.tensor([0.02, -0.02, -1.0, -1.5, -0.5])
    row = rl.Row(None, None, None, None, owner=torch.tensor([7, 7, 3, 3, 3]), gen=gen)
    assert in_range(row, old, 0.5, 2.0).tolist() == [True, True, False, False, False]
    assert in_range(row, old, 0.5, 2.8).all()                                 # e^1 = 2.72
    assert in_range(rl.row_tensors([], [], "cpu"), torch.zeros(0), 0.5, 2.0).shape == (0,)


@pytest.mark.slow
def test_retired_prompts_are_not_drawn_again(start, tmp_path, monkeypatch):
    """Those that were right each time, on a resumed run too."""
    retiring = with_diff("retire", tmp_path, monkeypatch)
    assert sorted(retiring.draw_prompts(0, 10, 7, 3, [1, 2, 3])[0]) == [0, 4, 5, 6, 7, 8, 9]
    retiring.judge = easy_rl.judge
    flags = [*begin(start), *SHORT, "--group=2", "--batch=2"]
    for steps in ("--steps=5", "--steps=8"):
        run(tmp_path / "run", *flags, steps, "--allow_changed=True", stage=retiring)
    right = Counter((r["step"], r["id"]) for r in lines(tmp_path / "run", "samples.jsonl") if r["correct"])
    retired = {id_: step for (step, id_), n in right.items() if n == 2}
    assert min(retired.values()) < 5
    for r in lines(tmp_path / "run", "samples.jsonl"):
        assert r["step"] <= retired.get(r["id"], 8)


# -- with the real vLLM -------------------------------------------------------------------------------------

VLLM = """
import sys, torch
import rl
from cli import parse
torch.set_num_threads(1)

def judge(responses, records, cfg):              # an easy task: ids that 8 divides, at first one in eight
    for r in responses:
        r.reward = float((r.tokens % 8 == 0).mean())
        r.correct, r.terms = r.reward > 0.5, {"correct": r.reward}
    return responses

rl.judge = judge
rl.has_signal = lambda group: True               # rewards differ where no answer is right
rl.main(parse(rl.Config, sys.argv[1:], rl.recipe))
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None and os.environ.get("VLLM") != "required",
                    reason="no vLLM here; under VLLM=required that is a failure")
@pytest.mark.slow
@pytest.mark.parametrize("model, count, least", [("toy", 15, 0.9), ("toy-h", 25, 0.2)])
def test_with_the_real_vllm(model, count, least, tmp_path):
    """Every rollout and every push through vLLM: the reward rises (the hybrid's residual factor of
    0.22 makes it slow), and trainer and vLLM agree at every step."""
    save(load(f"random:{model}"), str(tmp_path / "start"))
    (tmp_path / "script.py").write_text(VLLM)
    flags = [f"--model={model}", f"--init={tmp_path / 'start'}", f"--run={tmp_path / 'run'}", "--engine=vllm",
             "--domains=math", f"--steps={count}", "--batch=4", "--group=16", "--context=48",
             "--row_tokens=512", "--eval_every=0", "--heldout=none", "--lr=1e-2", "--beta=0"]
    root = os.path.dirname(os.path.abspath(rl.__file__))
    env = os.environ | dict(PYTHONPATH=root, TORCH_COMPILE_DISABLE="1")
    done = subprocess.run([sys.executable, str(tmp_path / "script.py"), *flags], capture_output=True,
                          text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    m = lines(tmp_path / "run")
    assert len(m) == count and m[0]["reward"] < 0.2 and m[-1]["reward"] > least
    assert max(line["mismatch"] for line in m) < 1e-5 and max(line["push_gap"] for line in m) < 1e-5


# -- bad input -----------------------------------------------------------------------------------------------

def prompt_file(folder, *records):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return f"--prompts={path}"


GOOD = {"id": "a", "domain": "math", "prompt": "What is 1 + 1?", "truth": "2"}


@pytest.mark.parametrize("records, flags, message", [
    ([], [], "no prompt is left \\(the file is empty\\)"),
    ([{**GOOD, "truth": ""}], [], "line 1 lacks truth"),
    ([GOOD, GOOD], [], "line 2: the id 'a' came before"),
    ([{**GOOD, "prompt": "word " * 200}], [], "1 as long as --context=64"),
    ([{**GOOD, "truth": "\\frac{"}], [], "1 with a gold answer that cannot be read"),
    ([{**GOOD, "domain": "code", "truth": {}}], [], "1 of code"),
    ([GOOD], ["--batch=4"], "--batch=4: .* has only 1 prompts"),
    ([GOOD], ["--group=1"], "--group=1 must be .* at least 2: a group of one has nothing to compare"),
    ([GOOD], ["--lr=nan"], "--lr=nan"),
    ([GOOD], ["--kl=k4"], "--kl='k4' is not one of k1, k2, k3"),
    ([GOOD], ["--temperature=0"], "--temperature=0.0: RL needs samples that differ"),
    ([GOOD], ["--export_at=2,abc"], "--export_at=2,abc: give steps"),
    ([GOOD], ["--export_at=2,20"], "give steps of 1 to --steps=3"),
    ([GOOD], ["--temperature=inf"], "--temperature=inf: RL needs"),
    ([GOOD], ["--beta1=2"], "--beta1=2.0 must be in"),
    ([{**GOOD, "id": ["a"]}], [], "an id is a text or a whole number"),
    ([{**GOOD, "prompt": 5}], [], "line 1: id is 'a', prompt is 5"),
    ([{**GOOD, "truth": {"x": 1}}], [], "1 with a gold answer that cannot be read"),
    ([{**GOOD, "domain": "code", "truth": "x"}], ["--domains=code"], "1 with a gold answer that cannot"),
    ([GOOD], ["--domains=math+art"], "'art' is not one of math, code, science"),
    ([GOOD], ["--engine=vlm", "--batch=1"], "--engine=vlm; did you mean 'vllm'"),
    ([GOOD], ["--row_tokens=10"], "--row_tokens=10 does not hold a text of --context=64"),
    ([GOOD], ["--replay=nowhere.jsonl", "--batch=1"], "--replay: nowhere.jsonl cannot be read"),
    ([], ["--prompts=nowhere.jsonl"], "--prompts: nowhere.jsonl cannot be read \\(No such file"),
    ([{**GOOD, "domain": "art"}], [], "no prompt is left \\(1 of art \\(--domains\\)\\)"),
    ([GOOD], ["--heldout=nowhere.jsonl"], "--heldout: nowhere.jsonl cannot be read"),
    ([GOOD], ["--heldout=pyproject.toml"], "--heldout: pyproject.toml, line 1 is no JSON object"),
    ([GOOD], ["--init=nowhere"], "--init=nowhere|--init: .*nowhere"),
    ([GOOD], ["--init=random:toyy"], "did you mean 'toy'"),
])
def test_bad_input(records, flags, message, start, tmp_path):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", f"--init={start}", "--heldout=none", prompt_file(tmp_path, *records), *flags)


ROLLOUT = dict(step=1, group=0, id="a", tokens=[5, 6], gen=[-1.0, -2.0], text="", finish="stop", correct=True,
               verdict="", terms={}, reward=1.0)


@pytest.mark.parametrize("line, message", [
    ("{", "JSON object"),
    ({"id": "b"}, "rollout .*KeyError..b"),
    ({"step": None}, "rollout .*NoneType"),
    ({"reward": None}, "rollout .*NoneType"),
    ({"reward": math.inf}, "rollout .*reward inf"),
    ({"gen": [-1.0]}, "rollout .*2 tokens and 1 log-probs"),
    ({"gen": None}, "rollout .*2 tokens and 1 log-probs"),
    ({"gen": [-1.0, None]}, "rollout .*must be as many finite numbers"),
    ({"tokens": [], "gen": []}, "rollout .*0 tokens"),
    ({"tokens": [5, 512]}, "rollout .*ids from 0 to 5.."),
    ({"tokens": [5, -1]}, "rollout .*ids from 0 to 5.."),
    ({"tokens": [5, 2**40]}, "rollout .*OverflowError"),
])
def test_a_replay_of_something_else(line, message, start, tmp_path):
    path = tmp_path / "samples.jsonl"
    second = line if isinstance(line, str) else json.dumps(ROLLOUT | line)
    path.write_text(f"{json.dumps(ROLLOUT)}\n{second}\n")
    with pytest.raises(InputError, match=f"--replay: {path}, line 2 is no {message}"):
        run(tmp_path / "run", f"--init={start}", "--heldout=none", "--batch=1", f"--replay={path}",
            prompt_file(tmp_path, GOOD))


def test_a_replay_that_is_too_short_or_its_own(start, whole, tmp_path):
    flags = [*begin(start), *SHORT]
    with pytest.raises(InputError, match="has no step 7: give --steps of at most 6"):
        run(tmp_path / "run", *flags, "--steps=8", f"--replay={whole / 'samples.jsonl'}")
    size = (whole / "samples.jsonl").stat().st_size
    os.makedirs(tmp_path / "own")
    (tmp_path / "own" / "samples.jsonl").write_bytes((whole / "samples.jsonl").read_bytes())
    with pytest.raises(InputError, match="is what this run writes"):
        run(tmp_path / "own", *flags, f"--replay={tmp_path / 'own' / 'samples.jsonl'}")
    assert (tmp_path / "own" / "samples.jsonl").stat().st_size == size


def test_what_a_kill_between_checkpoint_and_result_leaves(start, whole, tmp_path):
    """Exports that are missing are written, the result has its reward; a samples.jsonl that was taken away is
    asked for."""
    folder, flags = shutil.copytree(whole, tmp_path / "run"), [*begin(start), *LONG, "--export_at=2,6"]
    reward = json.loads((folder / "rl.json").read_text())["reward"]
    (folder / "rl.json").unlink()
    run(folder, *flags)
    assert (folder / "models" / "step_000006" / "config.json").exists()
    assert json.loads((folder / "rl.json").read_text())["reward"] == reward
    (folder / "rl.json").unlink()
    (folder / "samples.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match="samples.jsonl has 0 bytes, it had"):
        run(folder, *flags)


def test_masked_tokens_are_in_no_average(start, tmp_path):
    """Of responses that were cut, entropy is nobody's: a mean over counted tokens is at most log V."""
    folder = run(tmp_path / "run", *begin(start), *SHORT, "--steps=1", "--mask_truncated=True")
    assert all(0 < line["entropy"] < math.log(512) for line in steps(folder))


def test_a_replay_of_another_group_size(start, tmp_path):
    (tmp_path / "samples.jsonl").write_text((json.dumps(ROLLOUT) + "\n") * 3)
    with pytest.raises(InputError, match="group 0 has 3 responses to 1 prompts, not --group=4 to one"):
        run(tmp_path / "run", f"--init={start}", "--heldout=none", "--batch=1",
            f"--replay={tmp_path}/samples.jsonl", prompt_file(tmp_path, GOOD))


def test_prompts_that_do_not_fit_are_left_out_and_counted(start, tmp_path, capsys):
    long, unread = {**GOOD, "id": "b", "prompt": "word " * 200}, {**GOOD, "id": "c", "truth": "\\frac{"}
    run(tmp_path / "run", f"--init={start}", "--heldout=none", "--batch=1", "--steps=1",
        prompt_file(tmp_path, GOOD, long, unread, {**unread, "id": "d"}))
    assert ("1 prompts, 1 left out as long as --context=64 or longer, 2 left out with a gold answer that "
            "cannot be read" in capsys.readouterr().out)


@pytest.mark.parametrize("replay", [False, True])
def test_weights_that_are_not_numbers(replay, start, tmp_path):
    model = load(str(start))
    with torch.no_grad():
        next(model.parameters())[7, 3] = math.nan
    save(model, str(tmp_path / "start"))
    right, wrong = (json.dumps(ROLLOUT | {"tokens": [7, 7], "correct": correct}) for correct in (True, False))
    (tmp_path / "samples.jsonl").write_text(f"{right}\n{wrong}\n" * 2)
    flags = ["--steps=1", f"--replay={tmp_path}/samples.jsonl"] * replay
    with pytest.raises(InputError, match="step 1: loss nan.*not finite; .* lower --lr" if replay else
                       "not a number: its weights hold NaN"):
        run(tmp_path / "run", f"--init={tmp_path / 'start'}", "--heldout=none", "--batch=1",
            prompt_file(tmp_path, GOOD), *flags)
    assert not (tmp_path / "run" / "model").exists()


def test_zero_reward_everywhere_is_told_and_changes_nothing(start, tmp_path, capsys):
    folder = run(tmp_path / "run", *begin(start), *SHORT, "--steps=2", stage=rl)
    assert capsys.readouterr().out.count("nothing to learn from: no group differs") == 2
    before = {n: p for n, p in load(str(start)).named_parameters()}
    assert all(torch.equal(p, before[n]) for n, p in weights(folder).items())


def test_every_flag_has_a_help_comment():
    source = [line for line in inspect.getsource(rl.Config).splitlines() if re.match(r"    \w+:", line)]
    names = [f.name for f in dataclasses.fields(rl.Config)]
    assert len(source) == len(names)
    bare = [line for line in source if "  # " not in line]
    assert [line.split(":")[0].strip() for line in bare] == ["beta2", "eps"]
