"""Runs of midtrain.py: any layout of ranks trains the same, a killed run ends as if nothing had happened, and the run folder
says what was done.

Runs are processes (processes.py forks them from one that has imported midtrain; one is started by torchrun). Sizes are
chosen so that a step takes a few 10 ms.
"""

import dataclasses
import glob
import inspect
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import Future

import numpy as np
import pytest
import runtime
import torch
import torch.distributed.checkpoint as dcp
from processes import Process
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import data
import midtrain
from model import PRESETS, load, parameter_counts, preset
from runtime import InputError, parse
from tokenizer import toy_tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = ["--dtype=float32", "--seq_len=32", "--batch=8", "--micro_batch=8", "--steps=20", "--warmup=3", "--eval_rows=1",
         "--eval_every=0", "--checkpoint_every=0", "--peak_tflops=1"]


def config(folder, world_data, *flags):
    """For main(cfg) in this process."""
    return parse(midtrain.Config, [*SMALL, f"--data={world_data}", f"--run={folder}", *flags], midtrain.recipe)


def start(folder, world_data, *flags, world=1):
    return Process(f"{folder}.output", *SMALL, f"--data={world_data}", f"--run={folder}", *flags, world=world)


@pytest.fixture(autouse=True)
def no_group_left():
    """A run in this process that ended in an error keeps its process group."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(folder, world_data, *flags, world=1):
    """A run to its end; returns its folder."""
    process = start(folder, world_data, *flags, world=world)
    assert process.wait(100) == 0, process.text("stderr")
    return folder


def lines(folder):
    with open(folder / "metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def losses(folder):
    return [line["loss"] for line in lines(folder) if "loss" in line]


def heldout(folder):
    return [loss for line in lines(folder) if "eval" in line for loss in line["eval"].values()]


def close(a, b, bound):
    return len(a) == len(b) > 0 and max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True)) <= bound


def what_counts(folder):
    """Everything of metrics.jsonl that does not measure time or memory, in order, as it was written."""
    return [{k: v for k, v in line.items() if k not in ("tok_s", "mfu", "mfu_full", "step_s", "memory")} for line in lines(folder)]


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def tensors(folder, step):
    """Checkpoint `step` as one flat {name: tensor or number}."""
    file = str(folder / f"{step}.pt")
    dcp_to_torch_save(str(folder / "checkpoints" / f"step_{step:06d}"), file)

    def flat(at, name):
        if not isinstance(at, dict):
            return {name: at}
        return {k: v for key, value in at.items() for k, v in flat(value, f"{name}/{key}").items()}
    return flat(torch.load(file, weights_only=False), "")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


@pytest.fixture(scope="session")
def reference(tmp_path_factory, world_data):
    """reference(*flags): the folder of an uninterrupted run of one process with these flags, made once."""
    made = {}

    def get(*flags):
        if flags not in made:
            made[flags] = run(tmp_path_factory.mktemp("reference") / "run", world_data, *flags)
        return made[flags]
    return get


# -- the same numbers however it is run ------------------------------------------------------------------------------

LAYOUTS = [("toy", 2, ["--replicate=1"]), ("toy", 2, ["--replicate=2", "--micro_batch=4"]),
           ("toy", 4, ["--replicate=2", "--micro_batch=2"]), ("toy-h", 4, ["--replicate=2", "--micro_batch=1"])]


@pytest.mark.parametrize("model, world, flags", LAYOUTS, ids=["1x2", "2x1", "2x2", "2x2 hybrid"])
def test_ranks(model, world, flags, tmp_path, world_data, reference):
    """replicate x shard processes against one, with documents masked, so that ranks count unequal numbers of tokens."""
    one = reference(f"--model={model}")
    many = run(tmp_path / "run", world_data, f"--model={model}", *flags, f"--micro_batch={8 // world}", *flags, world=world)
    assert close(losses(one), losses(many), 1e-6) and len(losses(one)) == 20
    assert close(heldout(one), heldout(many), 1e-5) and len(heldout(one)) == 10
    tokenizer = toy_tokenizer()
    stream = data.Stream(str(world_data), data.read_mixture("math+code+science"), 1, 32, tokenizer, 512)
    counts = np.array([(stream.read(8 * step, 8).targets >= 0).reshape(world, -1).sum(1) for step in range(20)])
    assert (counts.min(1) < counts.max(1)).mean() > 0.7
    for folder in (one, many):
        assert [line["counted"] for line in lines(folder) if "counted" in line] == counts.sum(1).tolist()
    assert close([1.0, *(t.norm().item() for t in load_file(one / "model" / "model.safetensors").values())],
                 [1.0, *(t.norm().item() for t in load_file(many / "model" / "model.safetensors").values())], 1e-5)


VARIANTS = [("toy", "--micro_batch=1", 1e-6), ("toy", "--micro_batch=4", 1e-6), ("toy-h", "--micro_batch=4", 1e-6),
            ("toy", "--recompute=full", 1e-6), ("toy", "--recompute=selective", 1e-6), ("toy-h", "--recompute=full", 1e-6),
            ("toy-h", "--recompute=selective", 1e-6),
            pytest.param("toy", "--compile=True", 1e-4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("model, flag, bound", VARIANTS)
def test_how_a_step_is_computed(model, flag, bound, tmp_path, world_data, reference):
    """Accumulation, recomputation and compilation: other memory and speed, the same numbers."""
    folder = run(tmp_path / "run", world_data, f"--model={model}", flag)
    assert close(losses(reference(f"--model={model}")), losses(folder), bound)
    assert close(heldout(reference(f"--model={model}")), heldout(folder), 10 * bound)


# -- killed and started again ----------------------------------------------------------------------------------------

RESUME = ["--steps=30", "--checkpoint_every=3", "--keep=2", "--eval_every=10"]


def checkpoints(folder, pattern="step_??????"):
    return sorted(glob.glob(f"{folder}/checkpoints/{pattern}"))


def killed(folder, world_data, *flags, when, world=1):
    """Starts the run, kills it as soon as when() is true; False if it ended before."""
    process = start(folder, world_data, *flags, world=world)
    while process.running() and not when():
        time.sleep(0.0005)
    alive = process.running()
    process.kill()
    return alive


def assert_uninterrupted(folder, whole, keep):
    assert weights(folder) == weights(whole)
    assert what_counts(folder) == what_counts(whole)
    assert json.loads((folder / "retention.json").read_text()) == json.loads((whole / "retention.json").read_text())
    names = [name for _, folders, files in os.walk(folder) for name in folders + files]
    assert not [name for name in names if ".tmp" in name]
    assert len(checkpoints(folder)) == keep == len(os.listdir(folder / "checkpoints"))


@pytest.mark.parametrize("model", ["toy", "toy-h"])
def test_killed_run_ends_the_same(model, tmp_path, world_data, reference):
    """Killed while a checkpoint is being written, then between two: weights bit by bit, every line of metrics.jsonl."""
    flags, folder = [f"--model={model}", *RESUME], tmp_path / "run"
    assert killed(folder, world_data, *flags, when=lambda: checkpoints(folder, "step_000009.tmp"))
    assert killed(folder, world_data, *flags, when=lambda: checkpoints(folder, "step_000018"))
    first = [line for line in open(folder / "log.txt") if "goes on at step" in line]
    assert len(first) == 1 and int(first[0].split()[-1]) in (6, 9)
    run(folder, world_data, *flags)
    assert_uninterrupted(folder, reference(*flags), keep=2)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toy", "toy-h"])
def test_killed_at_twenty_moments(model, tmp_path, world_data, reference):
    """Half the moments drawn at random, half while a checkpoint is being written."""
    flags, folder, rng, kills = [f"--model={model}", *RESUME, "--steps=60"], tmp_path / "run", random.Random(model), 0
    for kill in range(20):
        end = time.monotonic() + rng.uniform(0.05, 1.5)
        if kill % 2:
            kills += killed(folder, world_data, *flags, when=lambda: checkpoints(folder, "*.tmp") and time.monotonic() > end)
        else:
            kills += killed(folder, world_data, *flags, when=lambda: time.monotonic() > end)
    assert kills >= 10
    run(folder, world_data, *flags)
    assert_uninterrupted(folder, reference(*flags), keep=2)


def test_other_number_of_processes(tmp_path, world_data, reference):
    """Two processes of torchrun for the first half, ended; one goes on and finishes."""
    flags, folder = ["--model=toy", "--checkpoint_every=10", "--micro_batch=4"], tmp_path / "run"
    with subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"{ROOT}/midtrain.py", *SMALL,
                           *flags, "--shard=2", f"--data={world_data}", f"--out={folder}", "--log_every=1"],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not checkpoints(folder):
            time.sleep(0.001)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)               # torchrun ends its processes
    assert not (folder / "retention.json").exists() and os.path.basename(checkpoints(folder)[-1]) == "step_000010"
    assert "2 x cpu (1 x 2)" in (folder / "log.txt").read_text()
    run(folder, world_data, *flags, "--shard=1")
    assert "goes on at step 10" in (folder / "log.txt").read_text()
    assert close(losses(reference("--model=toy")), losses(folder), 1e-6)
    assert close(heldout(reference("--model=toy")), heldout(folder), 1e-5)


# -- checkpoints -----------------------------------------------------------------------------------------------------

STEPS = ["--model=toy", "--steps=12", "--checkpoint_every=3", "--keep=0"]


def unfinished(folder, whole):
    """A copy of a finished run, without its result."""
    shutil.copytree(whole, folder)
    os.remove(folder / "retention.json")
    shutil.rmtree(folder / "model")
    return folder


def test_incomplete_checkpoint_is_ignored_and_removed(tmp_path, world_data, reference):
    whole = reference(*STEPS)
    folder = unfinished(tmp_path / "run", whole)
    os.rename(folder / "checkpoints" / "step_000012", folder / "checkpoints" / "step_000012.tmp")
    os.remove(folder / "checkpoints" / "step_000012.tmp" / ".metadata")
    os.rename(folder / "checkpoints" / "step_000003", folder / "checkpoints" / "step_000003.tmp")
    for name in ("model.tmp-save", "model.tmp-old", "model"):                     # a save that was killed at its last lines
        shutil.copytree(whole / "model", folder / name)
    run(folder, world_data, *STEPS)
    assert "goes on at step 9" in (folder / "log.txt").read_text()
    assert [os.path.basename(c) for c in checkpoints(folder)] == ["step_000006", "step_000009", "step_000012"]
    assert_uninterrupted(folder, whole, keep=3)


def damage_data(folder):
    os.truncate(folder / "__0_0.distcp", 5000)


def damage_bit(folder):
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "__0_0.distcp").write_bytes(content)


def damage_metadata(folder):
    os.truncate(folder / ".metadata", 100)


def lose_data(folder):
    os.remove(folder / "__0_0.distcp")


def lose_metadata(folder):
    os.remove(folder / ".metadata")


@pytest.mark.parametrize("damage", [damage_data, damage_bit, damage_metadata, lose_data, lose_metadata])
def test_damaged_checkpoint(damage, tmp_path, world_data, reference):
    """Refused by name; with it deleted, as the message says, the run goes on from the one before."""
    whole = reference(*STEPS)
    folder = unfinished(tmp_path / "run", whole)
    newest = folder / "checkpoints" / "step_000012"
    damage(newest)
    process = start(folder, world_data, *STEPS)
    assert process.wait() == 2 and "Traceback" not in process.text("stderr")
    error = process.text("stderr").splitlines()[-1]
    assert error.startswith("error: ") and f"{newest}" in error and "delete it to go on from the one before" in error
    shutil.rmtree(newest)
    run(folder, world_data, *STEPS)
    assert_uninterrupted(folder, whole, keep=4)


def test_checkpoint_holds_its_step_whatever_comes_after(tmp_path, world_data, monkeypatch):
    """Written in the background with the disk made so slow that the next step is over before the first byte: every tensor and
    number must be those of a run that writes its checkpoints at once."""
    flags = ["--model=toy", "--steps=6", "--checkpoint_every=1", "--keep=0"]
    write = dcp.FileSystemWriter.write_data
    with monkeypatch.context() as patch:
        slept = []

        def slow(*args):
            slept.append(time.sleep(0.3))
            return write(*args)
        patch.setattr(dcp.FileSystemWriter, "write_data", slow)
        midtrain.main(config(tmp_path / "background", world_data, *flags))
        assert len(slept) == 6
    with monkeypatch.context() as patch:
        def at_once(state, checkpoint_id, process_group, **more):
            dcp.save(state, checkpoint_id=checkpoint_id, process_group=process_group)
            done = Future()
            done.set_result(None)
            return done
        patch.setattr(runtime.dcp, "async_save", at_once)
        midtrain.main(config(tmp_path / "at_once", world_data, *flags))
    for step in range(1, 7):
        a, b = (tensors(tmp_path / name, step) for name in ("background", "at_once"))
        assert same(a, b) and len(a) > 100 and a["/progress/step"] == step
        assert step == 1 or not same(a, before)
        before = a


# -- non-finite steps ------------------------------------------------------------------------------------------------

def poisoned(monkeypatch, steps):
    """Makes the loss of these training steps (from 1) nan."""
    forward, calls = midtrain.Model.forward, []

    def poison(self, *args):
        loss = forward(self, *args)
        if torch.is_grad_enabled():
            calls.append(None)
            loss = loss * (float("nan") if len(calls) in steps else 1.0)
        return loss
    monkeypatch.setattr(midtrain.Model, "forward", poison)


def test_one_poisoned_step_is_skipped(tmp_path, world_data, monkeypatch):
    poisoned(monkeypatch, {5})
    result = midtrain.main(config(tmp_path / "run", world_data, "--model=toy", "--steps=8", "--checkpoint_every=1", "--keep=0"))
    assert "step 5: loss nan, gradient norm nan: skipped (1 in a row)" in (tmp_path / "run" / "log.txt").read_text()
    assert [line["skips"] for line in lines(tmp_path / "run") if "skips" in line] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert math.isfinite(result["loss"])
    assert all(t.isfinite().all() for t in load_file(tmp_path / "run" / "model" / "model.safetensors").values())
    a, b, c = ({k: v for k, v in tensors(tmp_path / "run", step).items() if "progress" not in k} for step in (4, 5, 6))
    assert same(a, b) and not same(b, c)                  # weights, moments and the optimizer's own count


def test_too_many_poisoned_steps(tmp_path, world_data, monkeypatch, reference):
    """The run stops and says how to go on; from its last checkpoint, with the fault gone, it ends as if there had been none."""
    whole = reference(*STEPS)
    flags = [*STEPS, "--max_skips=1"]
    with monkeypatch.context() as patch:
        poisoned(patch, set(range(7, 100)))
        with pytest.raises(InputError, match=r"2 non-finite steps in a row at step 8 \(--max_skips=1\).* lower --lr"):
            midtrain.main(config(tmp_path / "run", world_data, *flags))
    run(tmp_path / "run", world_data, *flags)
    assert "goes on at step 6" in (tmp_path / "run" / "log.txt").read_text()
    assert_uninterrupted(tmp_path / "run", whole, keep=4)


def test_absurd_learning_rate(tmp_path, world_data):
    process = start(tmp_path / "run", world_data, "--model=toy", "--lr=1e30", "--max_skips=2")
    assert process.wait() == 2 and "Traceback" not in process.text("stderr")
    assert "3 non-finite steps in a row" in process.text("stderr") and "--max_skips=2" in process.text("stderr")
    assert process.text("stdout").count("skipped") == 3
    assert not (tmp_path / "run" / "model").exists()


# -- the run folder --------------------------------------------------------------------------------------------------

def test_run_folder(reference, world_data):
    folder = reference(*STEPS)
    assert {"config.json", "source.zip", "log.txt", "metrics.jsonl", "checkpoints", "model", "figures",
            "retention.json"} == set(os.listdir(folder))
    with zipfile.ZipFile(folder / "source.zip") as z:
        names = z.namelist()
        assert {"midtrain.py", "runtime.py", "data.py", "model.py", "kernels/loss.py"} <= set(names)
        for name in names:
            with open(f"{ROOT}/{name}", "rb") as f:
                assert z.read(name) == f.read()
    saved = json.loads((folder / "config.json").read_text())
    assert saved == dataclasses.asdict(config(folder, world_data, *STEPS))
    assert [line["step"] for line in lines(folder)] == [0, *range(1, 13), 12]
    assert all(len(line) <= 115 for line in (folder / "log.txt").read_text().splitlines() if line.startswith("step "))


def test_finished_run_is_left_alone(reference, world_data, tmp_path):
    folder = shutil.copytree(reference(*STEPS), tmp_path / "run")
    before = {path: os.stat(path).st_mtime_ns for path in glob.glob(f"{folder}/**", recursive=True) if os.path.isfile(path)}
    result = midtrain.main(config(folder, world_data, *STEPS))
    assert json.loads(json.dumps(result)) == json.loads((folder / "retention.json").read_text())
    after = {path: os.stat(path).st_mtime_ns for path in before}
    changed = {os.path.relpath(path, folder) for path in before if before[path] != after[path]}
    assert changed <= {"log.txt", "config.json", "source.zip"}


def test_result_is_whole_when_killed_at_the_very_end(reference, world_data, tmp_path):
    """After the last checkpoint there is nothing to train, yet the result holds the last loss."""
    folder = unfinished(tmp_path / "run", reference(*STEPS))
    run(folder, world_data, *STEPS)
    assert_uninterrupted(folder, reference(*STEPS), keep=4)


def test_tokens_per_source(reference):
    mixture = data.read_mixture("math+code+science")
    planned = data.planned_rows(mixture, 1, 20 * 8) * 32
    result = json.loads((reference("--model=toy") / "retention.json").read_text())
    assert result["tokens"] == dict(zip(mixture, planned.tolist(), strict=True)) and planned.sum() == 20 * 8 * 32
    assert set(result["curve"][0][1]) == set(data.DOMAINS) and result["curve"][-1][0] == 20


def test_attention_only(tmp_path, world_data):
    """--train=attention moves q, k, v, o and nothing else."""
    run(tmp_path / "run", world_data, "--model=toy-h", "--train=attention", "--steps=4")
    before, after = dict(load("toy-h").named_parameters()), load_file(tmp_path / "run" / "model" / "model.safetensors")
    moved = {name for name, p in before.items() if not torch.equal(p.detach(), after[name])}
    assert moved == {f"model.layers.2.self_attn.{x}_proj.weight" for x in "qkvo"}


# -- config, schedule, plan ------------------------------------------------------------------------------------------

def test_learning_rate():
    cfg = midtrain.Config(steps=110, warmup=10, lr=1.0, final_lr=0.1)
    assert [round(midtrain.lr_at(s, cfg), 12) for s in (0, 1, 8, 9)] == [0.1, 0.2, 0.9, 1.0]
    assert midtrain.lr_at(10, cfg) == 1.0                 # 0.1 + 0.9 * (1 + cos(pi t)) / 2 from here
    assert midtrain.lr_at(60, cfg) == pytest.approx(0.55)
    assert midtrain.lr_at(35, cfg) == pytest.approx(0.1 + 0.9 * (2 + 2 ** 0.5) / 4)
    assert midtrain.lr_at(110, cfg) == pytest.approx(0.1) and 0.1 < midtrain.lr_at(109, cfg) < 0.1003
    cfg.schedule = "exponential"                          # 0.1 ** t
    assert midtrain.lr_at(4, cfg) == 0.5
    assert [midtrain.lr_at(s, cfg) for s in (10, 60, 110)] == pytest.approx([1.0, 0.1 ** 0.5, 0.1])
    assert midtrain.lr_at(0, midtrain.Config(warmup=0, lr=2.0)) == 2.0


def test_every_flag_has_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")                  # no comment broken in two
    source = inspect.getsource(midtrain.Config)
    comments = {line.split(":")[0].strip(): line.partition("  # ")[2].strip() for line in source.splitlines() if "  # " in line}
    assert list(comments) == [f.name for f in dataclasses.fields(midtrain.Config)]
    with pytest.raises(SystemExit) as exit:
        parse(midtrain.Config, ["--help"], midtrain.recipe)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert exit.value.code == 0
    for name, comment in comments.items():
        assert f"--{name} " in text and " ".join(comment.split()) in text, name


def test_parse(tmp_path):
    read = lambda *argv: parse(midtrain.Config, argv, midtrain.recipe)
    assert read() == midtrain.Config(**midtrain.recipe("toy"))
    cfg = read("--lr=1e-3", "--doc_mask=False", "--init=0.5*a + 0.5*b", "--out=x=y")
    assert (cfg.lr, cfg.doc_mask, cfg.init, cfg.run, cfg.steps) == (1e-3, False, "0.5*a + 0.5*b", "x=y", 600)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(read("--model=mistral-7b", "--steps=7", "--lr=0.5"))))
    cfg = read(str(tmp_path / "config.json"), "--steps=8")
    assert (cfg.model, cfg.steps, cfg.lr, cfg.seq_len) == ("mistral-7b", 8, 0.5, 8192)
    with pytest.raises(InputError, match="--batchs is not a flag; did you mean '--batch'?"):
        read("--batchs=3")


def test_recipes():
    """The paper's, table 16, for the seven models; the toys' own."""
    for model in [name for name in PRESETS if not name.startswith("toy")]:
        cfg = parse(midtrain.Config, [f"--model={model}"], midtrain.recipe)
        assert (cfg.lr, cfg.steps, cfg.seq_len, cfg.batch, cfg.warmup) == (5e-5, 25_000, 8192, 128, 500)
        assert (cfg.weight_decay, cfg.beta1, cfg.beta2, cfg.eps, cfg.final_lr) == (0.1, 0.9, 0.95, 1e-10, 0.1)
        assert (cfg.schedule, cfg.dtype, cfg.micro_batch, cfg.mixture) == ("cosine", "bfloat16", 1, "math+code+science")
    assert parse(midtrain.Config, ["--model=toy-h"], midtrain.recipe).steps == 600


@pytest.mark.parametrize("model", [name for name in PRESETS if not name.startswith("toy")])
def test_dry_run(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [f"--model={model}", "--dry_run=True", "--replicate=16", "--shard=8"]
    assert midtrain.main(parse(midtrain.Config, argv, midtrain.recipe)) == {}
    plan = capsys.readouterr().out
    counts = parameter_counts(preset(model))
    for number in (sum(counts.values()), *counts.values()):
        assert f"{number:,}" in plan
    assert "= 26.2B tokens on 128 devices (16 x 8)" in plan and "days at 40%" in plan and "400 rows a period" in plan
    assert all(f"  {source} " in plan for source in data.MIXTURES["math+code+science"])
    assert os.listdir(tmp_path) == []
