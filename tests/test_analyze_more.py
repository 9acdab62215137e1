"""The landscape, the trajectory, table 15 and merging: against the checkpoints themselves, float64 arithmetic
on loaded tensors, and a run of rl.py."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze
import evaluate
import rl
from analyze import (
    TOY,
    behaviour_table,
    combination,
    landscape_scores,
    merge,
    noise_null,
    path_and_grid,
    sampled_weights,
    weight_trajectory,
    whole_tensors,
)
from cli import InputError, parse, read_lines
from generate import engine
from grading import Verdict
from model import Init, load, save
from suite.intervals import interval

SMALL = TOY | dict(path=3, grid=3, problems=6, samples=3, max_new_tokens=8)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """{base, mt, rl}: folders of a random toy and two steps away from it, as training leaves them."""
    folder, model, found = tmp_path_factory.mktemp("stages"), load("random:toy"), {}
    rng = torch.Generator().manual_seed(1)
    for name, size in (("base", 0), ("mt", 0.3), ("rl", 0.1)):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + size * torch.randn(p.shape, generator=rng))
        found[name] = str(folder / name)
        save(model, found[name])
    return found


def weights(folder):
    return dict(load(folder).named_parameters())


@pytest.fixture
def lottery(monkeypatch):
    """Answers are right by the parity of their length: scores that differ from weights to weights. The list
    counts how many answers were graded at a time."""
    calls = []

    def grade(items, *_, **__):
        calls.append(len(items))
        return [Verdict(len(text) % 2 == 0, text, "") for _, text, *_ in items]

    monkeypatch.setattr(analyze, "grade_batch", grade)
    return calls


# -- weights of a point --------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False])
def test_points_by_hand(stages, tmp_path, tied):
    folders = [stages[name] for name in ("base", "mt", "rl")]
    if not tied:
        folders = []
        for i in range(3):
            model = load("random:toy-nemotron-h")         # an untied head, Mamba's vectors
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.1 * i * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
            folders.append(str(tmp_path / str(i)))
            save(model, folders[-1])
    w0, w1, w2 = map(weights, folders)
    for dtype in (torch.float32, torch.bfloat16):
        door = engine(load(folders[1], dtype=dtype))
        for alpha, beta in ((0.25, 0.75), (1.0, 0.2), (0.6, 0.0), (0.0, 1.0)):
            door.load_weights(whole_tensors(Init(combination((alpha, beta), *folders)), dtype))
            for name, p in door.model.named_parameters():
                a, b, c = (w[name].double() for w in (w0, w1, w2))
                exact = a + alpha * (b - a) + beta * (c - b)
                size = 3e-7 * (a.abs() + b.abs() + c.abs())          # float32 sums; bf16: half an ulp at most
                size += 2 ** -8 * exact.abs() * (dtype == torch.bfloat16)
                assert ((p.double() - exact).abs() <= size).all()


def test_a_corner_is_the_checkpoint(stages):
    for point, text in (((0.0, 0.0), "1.0*b"), ((1.0, 0.0), "1.0*m"), ((1.0, 1.0), "1.0*r"),
                        ((0.0, 1.0), "1.0*b + -1.0*m + 1.0*r")):
        assert combination(point, "b", "m", "r") == text
    for dtype in (torch.float32, torch.bfloat16):
        running, how = engine(load(stages["mt"], dtype=dtype)), dict(n=4, max_new_tokens=24, temperature=0.8)
        prompts, texts = [[1, 2, 3], [7, 8]], set()
        for point, name in (((0.0, 0.0), "base"), ((1.0, 0.0), "mt"), ((1.0, 1.0), "rl"), ((0.5, 0.5), "")):
            init = combination(point, stages["base"], stages["mt"], stages["rl"])
            running.load_weights(whole_tensors(Init(init), dtype))
            streamed = running.generate(prompts, **how)
            assert streamed == engine(load(stages.get(name, init), dtype=dtype)).generate(prompts, **how)
            texts.add(str(streamed))
        assert len(texts) == 4


def test_where():
    path, grid = path_and_grid(11, 5)
    assert path[0] == (0, 0) and path[5] == (1, 0) and path[-1] == (1, 1) and len(set(path)) == 11
    assert path[2] == (0.4, 0) and path[7] == (1, 0.4) and all(b == 0 or a == 1 for a, b in path)
    assert sorted(grid) == [(i / 4, j / 4) for i in range(5) for j in range(5)]
    assert path_and_grid(3, 0)[1] == [] and len({*path, *grid}) == 33        # three points are of both


# -- the landscape -------------------------------------------------------------------------------------------

def test_landscape_is_each_checkpoints_own_score(stages, lottery, tmp_path):
    found = landscape_scores(stages["base"], stages["mt"], stages["rl"], str(tmp_path / "land"), **SMALL)
    assert found == json.load(open(tmp_path / "land" / "landscape.json"))
    assert len(found["path"]) == 3 and len(found["grid"]) == 9 and found["problems"] == 6
    assert [(p["alpha"], p["beta"]) for p in found["path"]] == [(0, 0), (1, 0), (1, 1)]
    tokenizer = load(stages["mt"]).tokenizer
    records, _ = rl.read_prompts("toy", "prompts", ["math", "science"], tokenizer, 256, "heldout", 128)
    records = sorted(records, key=lambda r: analyze.shuffle_key(r["id"]))[:6]
    for point in (*found["path"], found["grid"][4]):      # by an engine of its own
        init = combination((point["alpha"], point["beta"]), *(stages[name] for name in ("base", "mt", "rl")))
        made = engine(load(init), context=256).generate(
            [r["ids"] for r in records], 3, max_new_tokens=8, temperature=0.6, top_p=0.95, seed=1,
            keys=[("landscape", r["id"]) for r in records])
        shares = [np.mean([len(s.text) % 2 == 0 for s in own]) for own in made]
        assert (point["score"], point["low"], point["high"]) == pytest.approx(interval(shares, 3))
    assert len({p["score"] for p in found["grid"]}) > 2
    assert found["grid"][2] == found["path"][1] and found["grid"][8] == found["path"][2]


def test_a_killed_landscape_goes_on(stages, lottery, tmp_path, monkeypatch):
    three, grade = (stages["base"], stages["mt"], stages["rl"]), analyze.grade_batch
    whole = landscape_scores(*three, str(tmp_path / "whole"), **SMALL)
    lottery.clear()

    def killed(items, *_, **__):
        if len(lottery) == 3:                             # in the fourth point
            raise KeyboardInterrupt
        return grade(items)

    folder, file = str(tmp_path / "cut"), tmp_path / "cut" / "landscape.jsonl"
    monkeypatch.setattr(analyze, "grade_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        landscape_scores(*three, folder, **SMALL)
    assert len(read_lines(file)) == 3
    with open(file, "a") as f:
        f.write('{"key": "abc", "alpha')                  # the kill was in the middle of a line
    monkeypatch.setattr(analyze, "grade_batch", grade)
    lottery.clear()
    assert landscape_scores(*three, folder, **SMALL) == whole and lottery == [18] * 6
    keys = [line["key"] for line in read_lines(file)]
    assert len(keys) == len(set(keys)) == 9
    monkeypatch.setattr(analyze, "make_engine", None)    # nothing is missing: no engine
    assert landscape_scores(*three, folder, **SMALL) == whole
    assert len(landscape_scores(*three, folder, **SMALL | dict(path=3, grid=0))["path"]) == 3
    for changed in (dict(seed=2), dict(problems=5), dict(samples=2)):
        with pytest.raises(TypeError):                    # other points: they need the engine
            landscape_scores(*three, folder, **SMALL | changed)
    with pytest.raises(TypeError):
        landscape_scores(three[0], three[2], three[1], folder, **SMALL)
    file.write_text("{}\nno json\n")
    with pytest.raises(InputError, match="landscape.jsonl, line 2"):
        landscape_scores(*three, folder, **SMALL)


def test_a_point_that_was_not_graded_is_not_kept(stages, tmp_path, monkeypatch):
    """Samples that have no verdict, asked for again though they were, are counted."""
    calls = []

    def half(items, **flags):
        calls.append(flags["again"])
        return [Verdict(True, "", ""), Verdict(False, None, "not decided: no memory")] * (len(items) // 2)

    monkeypatch.setattr(analyze, "grade_batch", half)
    cfg = analyze.Landscape("", "", "", "", **SMALL | dict(samples=2))
    me = SimpleNamespace(rank=0, world=1, sum=lambda *numbers: list(numbers))
    records = [{"id": str(i), "domain": "math", "truth": "1", "ids": [i + 1]} for i in range(2)]
    door = engine(load(stages["mt"]))
    rates = analyze.pass_rates(door, Init(stages["mt"]), records, cfg, me)
    assert rates == ([0.5, 0.5], 2) and calls == [1]
    monkeypatch.setattr(analyze, "grade_batch",
                        lambda items, *_, **__: [Verdict(False, None, "not decided: no memory")] * len(items))
    three = [stages[name] for name in ("base", "mt", "rl")]
    found = landscape_scores(*three, str(tmp_path), **SMALL | dict(grid=0))
    assert [p["score"] for p in found["path"]] == [0, 0, 0] and not read_lines(tmp_path / "landscape.jsonl")


# -- the trajectory ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(stages, tmp_path_factory):
    """Three steps of rl.py, by answers that an untrained model gets right now and then."""
    folder = str(tmp_path_factory.mktemp("rl") / "run")
    with pytest.MonkeyPatch.context() as patch:
        def judge(responses, *_):
            for r in responses:
                r.correct = bool(r.tokens[0] % 2 == 0)
                r.reward, r.terms = float(r.correct), {}
            return responses

        patch.setattr(rl, "judge", judge)
        rl.main(parse(rl.Config, ["--model=toy", f"--init={stages['mt']}", "--steps=3", "--export_at=1,2",
                                  "--batch=4", "--group=4", "--context=64", "--row_tokens=256",
                                  "--eval_every=0", "--heldout=none", "--export_dtype=float32", "--lr=1e-3",
                                  f"--run={folder}"], rl.recipe))
    return folder


def test_trajectory_in_float64(stages, run):
    found = weight_trajectory(run, stages["mt"], stages["base"], thresholds=(0.01, 0.1), count=10 ** 9)
    assert [s["step"] for s in found["steps"]] == [1, 2, 3]
    assert [os.path.relpath(s["model"], run) for s in found["steps"]] == ["models/step_000001",
                                                                         "models/step_000002", "model"]
    lrs = [1e-3, 1e-3 * 2 / 3, 1e-3 / 3]                  # linear decay to 0 after the last
    for n, s in enumerate(found["steps"], 1):
        assert s["lr_sum"] == pytest.approx(sum(lrs[:n]))
        new = weights(s["model"])
        for of in ("start", "base"):
            pairs = [(w.double(), new[name].double()) for name, w in
                     weights(stages["mt" if of == "start" else "base"]).items()]
            old = torch.cat([w.flatten() for w, _ in pairs])
            dw = torch.cat([(v - w).flatten() for w, v in pairs])
            assert s[of]["relative_l2"] == pytest.approx((dw.norm() / old.norm()).item(), rel=1e-6)
            assert s[of]["values"] == (dw != 0).sum().item()
            for t in (0.01, 0.1):
                assert s[of]["unchanged"][t] == pytest.approx(
                    1 - (dw.abs() > t * old.abs()).double().mean().item(), abs=1e-12)
        w0 = torch.cat([p.detach().flatten() for _, p in sorted(weights(stages["mt"]).items())])
        null = noise_null(w0, lrs[:n], dtype=torch.float32, thresholds=(0.01, 0.1))["masters"]
        assert s["null"]["relative_l2"] == pytest.approx(null["relative_l2"], rel=1e-6)
        assert s["null"]["unchanged"] == pytest.approx(null["unchanged"])
    sizes = [s["start"]["relative_l2"] for s in found["steps"]]
    assert sizes == sorted(sizes) and all(s["base"]["relative_l2"] > 0.2 for s in found["steps"])
    sampled, last = weight_trajectory(run, stages["mt"])["steps"][-1], found["steps"][-1]
    assert sampled["base"] is None
    assert sampled["null"]["relative_l2"] == pytest.approx(last["null"]["relative_l2"], rel=0.02)


def test_rounding_a_float32_start_is_no_noise(stages, run, tmp_path):
    """A run that exports bfloat16 from float32 changes every weight by rounding: there is no null of that."""
    copy = shutil.copytree(run, tmp_path / "run")
    cfg = json.loads((copy / "config.json").read_text()) | {"export_dtype": "bfloat16"}
    (copy / "config.json").write_text(json.dumps(cfg))
    assert all(s["null"] is None for s in weight_trajectory(str(copy), stages["mt"])["steps"])


def test_merge_keeps_what_is_no_checkpoint(stages, run, tmp_path):
    """A run folder has a config.json too; a folder that holds a term is not replaced."""
    for name in ("run", "other"):
        shutil.copytree(run, tmp_path / name)
    with pytest.raises(InputError, match="is no checkpoint alone: it has"):
        merge(f"0.5*{stages['base']} + 0.5*{stages['mt']}", str(tmp_path / "run"))
    shutil.copytree(stages["mt"], tmp_path / "holder" / "tokenizer_x")
    shutil.copy(tmp_path / "holder" / "tokenizer_x" / "config.json", tmp_path / "holder")
    with pytest.raises(InputError, match="no checkpoint alone|is or holds a term"):
        merge(f"0.5*{stages['base']} + 0.5*{tmp_path / 'holder' / 'tokenizer_x'}", str(tmp_path / "holder"))
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(run))


def test_steps_without_an_update_are_no_noise(run, tmp_path):
    lines = [dict(step=1, lr=0.1, gnorm=1.0), dict(step=1, eval={}), dict(step=2, lr=0.2, gnorm=0.0),
             dict(step=3, lr=0.3, gnorm=2.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.json").write_text(json.dumps({"updates": 2}))
    assert analyze.learning_rates(str(tmp_path))[1] == {1: [0.1, 0.1], 2: [], 3: [0.3, 0.3]}


def test_some_weights(stages):
    every = torch.cat([p.detach().flatten() for _, p in sorted(weights(stages["mt"]).items())])
    assert torch.equal(sampled_weights(stages["mt"], 10 ** 9), every)
    some = sampled_weights(stages["mt"], 20_000)
    assert len(some) == 20_000 and np.isin(some.numpy(), every.numpy()).all()
    assert some.std().item() == pytest.approx(every.std().item(), rel=0.05)


# -- behaviour -----------------------------------------------------------------------------------------------

def test_behaviour_and_compare(stages, tmp_path):
    folders = {}
    for stage in ("base", "MT"):
        folders[stage] = str(tmp_path / stage)
        cfg = parse(evaluate.Config, [
            "--model=toy", f"--init={stages['mt' if stage == 'MT' else 'base']}", "--tasks=toy-math",
            "--problems=5", "--samples=2", f"--max_new_tokens={4 if stage == 'MT' else 6}",
            f"--run={folders[stage]}"], evaluate.recipe)
        evaluate.main(cfg)
    found = behaviour_table(folders)
    assert [(r["task"], r["stage"]) for r in found["rows"]] == [("toy-math", "base"), ("toy-math", "MT")]
    for row in found["rows"]:
        samples = read_lines(os.path.join(folders[row["stage"]], "samples.jsonl"))
        assert row["all"]["samples"] == 10 and row["problems"] == 5 and row["samples"] == 2
        assert row["all"]["median_tokens"] == np.median([s["tokens"] for s in samples])
        assert row["all"]["nll"] == pytest.approx(np.mean([s["nll"] for s in samples]))
        assert row["right"] == {"samples": 0, "median_tokens": None, "nll": None} and row["low"] == 0
    assert found["differ"] == {"toy-math": {"max_new_tokens": {"base": 6, "MT": 4}}}
    analyze.compare(tuple(folders.values()), str(tmp_path / "compared"))
    evaluate.compare_command(["--compare", *folders.values(), f"--out={tmp_path / 'old-spelling'}"])
    results = [(tmp_path / out / "compare.json").read_text() for out in ("compared", "old-spelling")]
    assert results[0] == results[1] and '"base to MT"' in results[0]
    with pytest.raises(InputError, match="no results.json"):
        behaviour_table({"base": folders["base"], "MT": str(tmp_path)})
    with pytest.raises(InputError, match="no task"):
        behaviour_table({})


# -- merging -------------------------------------------------------------------------------------------------

def test_merge_by_hand(stages, tmp_path):
    text, out = f"0.15*{stages['base']} + 0.85*{stages['mt']}", str(tmp_path / "merged")
    a, b = weights(stages["base"]), weights(stages["mt"])
    for dtype in ("bfloat16", "float32"):
        assert merge(text, out, dtype) == out             # the second time it replaces its own
        model = load(out, dtype=getattr(torch, dtype))
        for name, p in model.named_parameters():
            by_hand = (0.15 * a[name] + 0.85 * b[name]).to(p.dtype)
            assert torch.equal(p, by_hand) and torch.equal(p, Init(text).read(name, 0, len(p)).to(p.dtype))
            assert Init(out).read(name, 0, len(p)).dtype == p.dtype
    assert model.tokenizer.decode(model.tokenizer.encode("one")) == "one"
    assert json.load(open(os.path.join(out, "config.json")))["torch_dtype"] == "float32"


# -- refusals ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, says", [
    (dict(path=4), "--path=4"), (dict(path=1), "--path=1"), (dict(grid=1), "--grid=1"),
    (dict(samples=-1), "--samples=-1"), (dict(problems=-1), "--problems=-1"),
    (dict(dtype="half"), "--dtype='half'"), (dict(engine="sglang"), "--engine='sglang'"),
    (dict(context=10 ** 6), "--context=1000000"), (dict(prompts="nothing.jsonl"), "nothing.jsonl"),
    (dict(domains="maths"), "--domains=maths: 'maths'"),
    (dict(base="nowhere"), "'nowhere'"), (dict(mt="random:toy-h"), "different architectures"),
    (dict(rl="0.5*random:toy + 0.5*random:toy"), "--rl=.* sum of 2"),
])
def test_landscape_refuses(stages, tmp_path, change, says):
    with pytest.raises(InputError, match=says) as told:
        landscape_scores(**stages | dict(out=str(tmp_path / "land")) | SMALL | change)
    assert "\n" not in str(told.value)


def test_others_refuse(stages, run, tmp_path):
    (tmp_path / "file").mkdir()
    text = f"0.5*{stages['base']} + 0.5*{stages['mt']}"
    for act, says in (
            (lambda: merge(text, str(tmp_path / "m"), "int8"), "--dtype='int8'"),
            (lambda: merge(text, str(tmp_path / "file")), "is there and is no checkpoint"),
            (lambda: merge(text, stages["mt"] + "/"), "is or holds a term of"),
            (lambda: merge(f"0.5*{stages['base']}", str(tmp_path / "m")), "sum to 0.5"),
            (lambda: weight_trajectory(str(tmp_path), stages["mt"]), "is no run of"),
            (lambda: weight_trajectory(run, str(tmp_path)), "no config.json")):
        with pytest.raises(InputError, match=says) as told:
            act()
        assert "\n" not in str(told.value)
    cfg, lines = open(f"{run}/config.json").read(), read_lines(f"{run}/metrics.jsonl")
    (tmp_path / "config.json").write_text(cfg)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(InputError, match="--export_at"):
        weight_trajectory(str(tmp_path), stages["mt"])
    (tmp_path / "models").mkdir()
    os.symlink(stages["rl"], tmp_path / "models" / "step_000002")
    with pytest.raises(InputError, match="no step 2"):
        weight_trajectory(str(tmp_path), stages["mt"])
    (tmp_path / "rl.json").write_text("{")
    with pytest.raises(InputError, match="rl.json is damaged"):
        weight_trajectory(str(tmp_path), stages["mt"])
    assert math.isfinite(lines[0]["gnorm"]) and lines[0]["lr"] == 1e-3       # what learning_rates relies on
