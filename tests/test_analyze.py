"""analyze.py's commands on small checkpoints: what they write is the mathematics (test_analyze_maths.py) of
the files, and bad input ends in one line."""

import json
import shutil

import pytest
import torch
from processes import Process

import analyze
from analyze import linear_cka, noise_null, weight_change
from model import load, save


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """base; mt: all weights moved by a tenth; rl, rl2: mt moved a little, in bfloat16; other: by a tenth."""
    folder, model = tmp_path_factory.mktemp("stages"), load("random:toy-h")
    torch.manual_seed(0)
    for name, scale in (("base", 0), ("mt", 0.1), ("rl", 1e-3), ("rl2", 1e-3), ("other", 0.1)):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(scale * p.std().nan_to_num() * torch.randn_like(p))
        save(model, str(folder / name / "model"), torch.bfloat16 if name[:2] == "rl" else None)
    return folder


def call(tmp_path, *args):
    process = Process(tmp_path, *map(str, args), f"--out={tmp_path / 'out'}", stage="analyze")
    return process.wait(120), process.text("stdout"), process.text("stderr")


def test_weights(stages, tmp_path):
    a, b, c = (stages / name / "model" for name in ("base", "mt", "other"))
    status, out, errors = call(tmp_path, "weights", a, b, c, "--rank=sampled")
    assert status == 0 and "base to mt" in out and "base to other" in out, errors
    with open(tmp_path / "out" / "weights.json") as f:
        pairs = json.load(f)["pairs"]
    flat = [torch.cat([p.detach().double().flatten() for p in load(str(path)).parameters()])
            for path in (a, b, c)]
    for pair, new in zip(pairs, flat[1:], strict=True):
        total = next(row for row in pair["rows"] if row["by"] == "total")
        mine = weight_change(flat[0], new)
        assert total["relative_l2"] == pytest.approx(mine["relative_l2"], rel=1e-6)
        assert total["unchanged"]["0.01"] == pytest.approx(mine["unchanged"][0.01], abs=1e-5)
    x, y = flat[1] - flat[0], flat[2] - flat[0]
    total = next(row for row in pairs[0]["rows"] if row["by"] == "total")
    assert total["cosine"] == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-6)
    assert {row["sub"] for row in pairs[0]["rows"] if row["by"] == "component+sub"} >= {
        "Q", "K", "V", "O", "gate", "up", "down", "in_proj", "out_proj", "conv1d", "A/dt", "embed", "norm"}
    assert all(1 <= g["stable_rank"] and 0 <= g["left"] <= 1 for g in pairs[0]["geometry"])
    call(tmp_path, "weights", b, stages / "rl" / "model")                # a third pair joins the two
    with open(tmp_path / "out" / "weights.json") as f:
        names = [pair["names"] for pair in json.load(f)["pairs"]]
    assert names == [["base", "mt"], ["base", "other"], ["mt", "rl"]]


@pytest.mark.parametrize("start, name, variant", [("rl", "rl2", "masters"), ("mt", "other", "float32")])
def test_the_null_is_of_the_runs_own_learning_rates(stages, tmp_path, start, name, variant):
    """Its rounding is that of the file: bfloat16 or none."""
    lrs = [1e-3, 1e-3, 5e-4]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(dict(beta1=0.9, beta2=0.95, eps=1e-10)))
    lines = [dict(step=0, eval={})] + [dict(step=i + 1, lr=lr, gnorm=1) for i, lr in enumerate(lrs)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    old = stages / start / "model"
    status, _, errors = call(tmp_path, "weights", old, stages / name / "model", f"--null={tmp_path / 'run'}")
    assert status == 0, errors
    with open(tmp_path / "out" / "weights.json") as f:
        found = json.load(f)["pairs"][0]["nulls"]
    mine = noise_null(analyze.sampled_weights(str(old), 1 << 17, "MLP"), lrs)[variant]
    assert found["MLP"]["relative_l2"] == pytest.approx(mine["relative_l2"]) and "total" in found
    mixed = call(tmp_path, "weights", stages / "mt" / "model", stages / "rl" / "model",
                 f"--null={tmp_path / 'run'}")
    assert mixed[0] == 2 and "rounding alone changes every weight" in mixed[2]


def test_names_tell_checkpoints_apart():
    assert analyze.names_by_path(["runs/base/model", "runs/mt/model"]) == {
        "runs/base/model": "base", "runs/mt/model": "mt"}
    assert list(analyze.names_by_path(["x/mt/model", "y/mt/model", "0.5*a + 0.5*b"]).values()) == [
        "x/mt", "y/mt", "0.5*a + 0.5*b"]
    with pytest.raises(analyze.InputError, match="given twice"):
        analyze.names_by_path(["runs/mt", "runs/x/../mt"])


def test_cka(stages, tmp_path):
    texts = [f"The number {i} is {i * i % 7}." for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
    paths = [stages / name / "model" for name in ("base", "mt", "rl")]
    status, out, errors = call(tmp_path, "cka", *paths, f"--texts={tmp_path / 'texts.jsonl'}", "--count=12",
                               "--resamples=50")
    assert status == 0 and "mt rl" in out, errors
    with open(tmp_path / "out" / "cka.json") as f:
        [found] = json.load(f).values()
    features = []
    for path in paths:
        model = load(str(path))
        with torch.no_grad():
            streams = [model.hidden_states(torch.tensor([model.tokenizer.encode(t)])) for t in texts]
        features.append([torch.stack([s[layer][0].mean(0) for s in streams])
                         for layer in range(len(streams[0]))])
    assert set(found["pairs"]) == {"base mt", "base rl", "mt rl"} and found["texts"] == 12
    for layer, c in enumerate(found["pairs"]["base mt"]):
        x, y = features[0][layer], features[1][layer]
        assert c["biased"] == pytest.approx(linear_cka(x, y), abs=1e-5)
        assert c["debiased"] == pytest.approx(linear_cka(x, y, debiased=True), abs=1e-5)
        assert c["low"] <= c["high"] and c["null_low"] < c["null_high"]
    least = {pair: min(c["debiased"] for c in curve) for pair, curve in found["pairs"].items()}
    assert least["mt rl"] > least["base mt"]


def test_bad_input(stages, tmp_path):
    base, mt = stages / "base" / "model", stages / "mt" / "model"
    broken = shutil.copytree(mt, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    gone = shutil.copytree(mt, tmp_path / "gone")
    (gone / "model.safetensors").unlink()
    save(load("random:toy"), str(tmp_path / "dense"))
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "file").write_text("")
    for args, said in (
            (("weights", base, "/nowhere"), "'/nowhere' has no config.json"),
            (("weights", base, tmp_path / "dense"), "different architectures"),
            (("weights", base, broken), "truncated or corrupted"),
            (("weights", base, gone), "is missing"), (("weights", base, mt, "--rank=full"), "not one of off"),
            (("weights", base, mt, f"--null={tmp_path}"), "no run of midtrain.py"),
            (("compare", base), "two folders of results"), (("compare", base, mt), "has no results.json"),
            (("cka", base), "two checkpoints or more"), (("cka", base, mt, "--tokens=0"), "at least 1"),
            (("weights", base, mt, base), "given twice"), (("cka", base, mt, "--dtype=bf16"), "bfloat16 or"),
            (("cka", base, mt, "--texts=wiki"), "give toy, wikipedia"),
            (("cka", base, mt, f"--texts={tmp_path / 'few.jsonl'}"), "has 1 texts"),
            (("cka", base, "random:toy-nemotron-h", "--count=8"), "models of one depth"),
            (("weights", base, mt, f"--out={tmp_path / 'file' / 'x'}"), "cannot write there")):
        folder = tmp_path / "process"
        out = () if "--out" in str(args[-1]) else (f"--out={tmp_path / 'o'}",)
        process = Process(folder, *map(str, args), *out, stage="analyze")
        assert process.wait(60) == 2, (args, process.text("stderr"))
        assert said in process.text("stderr") and "Traceback" not in process.text("stderr"), (
            args, process.text("stderr"))
