"""Runs of midtrain.py: any layout of ranks trains the same, a killed run ends as if nothing had happened, and
the run folder says what was done.

Runs are processes (processes.py forks them from one that has imported midtrain; one is started by torchrun).
Sizes are chosen so that a step takes a few 10 ms. Runs that shall give the same numbers are compared after 6
steps: a wrong sum shows in the first, and more steps would only let Adam blow up what rounding differs by.
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
import torch
import torch.distributed.checkpoint as dcp
from processes import Process
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import FSDPModule

import data
import midtrain
import presets
import runtime
from cli import InputError, parse
from corpus import registry
from corpus.tokenizer import toy_tokenizer
from model import load, parameter_counts, preset

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
N = 6                                                     # steps of a run that gives no other number
SMALL = ["--dtype=float32", "--lr=1e-3", "--seq_len=32", "--batch=8", "--micro_batch=8", f"--steps={N}",
         "--warmup=2", "--eval_rows=1", "--eval_every=0", "--checkpoint_every=0", "--peak_tflops=1"]


def config(folder, world_data, *flags):
    """For main(cfg) in this process."""
    argv = [*SMALL, f"--data={world_data}", f"--run={folder}", *flags]
    return parse(midtrain.Config, argv, midtrain.recipe)


def start(folder, world_data, *flags, world=1):
    return Process(f"{folder}.output", *SMALL, f"--data={world_data}", f"--run={folder}", *flags, world=world)


@pytest.fixture(autouse=True)
def no_group_left():
    """A run in this process that ended in an error keeps its process group."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(folder, world_data, *flags, world=1, timeout=100):
    """A run to its end; returns its folder."""
    process = start(folder, world_data, *flags, world=world)
    assert process.wait(timeout) == 0, process.text("stderr")
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
    measured = ("tok_s", "mfu", "mfu_full", "step_s", "memory")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines(folder)]


def log_text(folder):
    return (folder / "log.txt").read_text()


def exported(folder):
    return load_file(folder / "model" / "model.safetensors")


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
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


@pytest.fixture(scope="session")
def reference(tmp_path_factory, world_data):
    """reference(*flags): the folder of an uninterrupted run of one process with these flags, made once."""
    folders = {}

    def get(*flags):
        if flags not in folders:
            folders[flags] = run(tmp_path_factory.mktemp("reference") / "run", world_data, *flags)
        return folders[flags]
    return get


STEPS = ["--model=toy", "--steps=12", "--checkpoint_every=3", "--keep=0"]     # of most tests below


# -- the same numbers however it is run ----------------------------------------------------------------------

LAYOUTS = [("toy-h", 2, 2), *(pytest.param("toy", *layout, marks=pytest.mark.slow)
                              for layout in ((1, 2), (2, 1), (2, 2)))]


@pytest.mark.parametrize("model, replicate, shard", LAYOUTS)
def test_ranks(model, replicate, shard, tmp_path, world_data, reference):
    """Against one process, with documents masked, so that the ranks count unequal numbers of tokens."""
    world = replicate * shard
    flags = [f"--model={model}", f"--replicate={replicate}", f"--micro_batch={8 // world}"]
    one = reference(f"--model={model}")
    many = run(tmp_path / "run", world_data, *flags, world=world)
    assert close(losses(one), losses(many), 5e-7) and len(losses(one)) == N
    assert close(heldout(one), heldout(many), 5e-7) and len(heldout(one)) == 10
    stream = data.Stream(str(world_data), data.read_mixture("math+code+science"), 1, 32, toy_tokenizer(), 512)
    targets = np.stack([stream.read(8 * step, 8).targets for step in range(N)])
    counts = (targets >= 0).reshape(N, world, -1).sum(-1)
    assert (counts.min(1) < counts.max(1)).mean() > 0.7
    for folder in (one, many):
        assert [line["counted"] for line in lines(folder) if "counted" in line] == counts.sum(1).tolist()
    norms = [[t.norm().item() for t in exported(folder).values()] for folder in (one, many)]
    assert close(*norms, 5e-7)


HOW = ("--micro_batch=1", "--micro_batch=4", "--recompute=full", "--recompute=selective")
VARIANTS = [("toy", flag) for flag in HOW] + [
    pytest.param("toy-h", flag, marks=[] if flag == "--recompute=full" else pytest.mark.slow) for flag in HOW]


@pytest.mark.parametrize("model, flag", VARIANTS)
def test_how_a_step_is_computed(model, flag, tmp_path, world_data, reference):
    """Accumulation and recomputation: other memory and speed, the same numbers; what is recomputed is the
    same to the last bit."""
    folder, one = run(tmp_path / "run", world_data, f"--model={model}", flag), reference(f"--model={model}")
    bound = 0 if "recompute" in flag else 5e-7
    assert close(losses(one), losses(folder), bound)
    assert close(heldout(one), heldout(folder), bound)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toy", "toy-h"])
def test_compiled(model, tmp_path, world_data, reference):
    """A minute or two, nearly all of it in the compiler."""
    folder = run(tmp_path / "run", world_data, f"--model={model}", "--compile=True", timeout=280)
    assert close(losses(reference(f"--model={model}")), losses(folder), 1e-4)
    assert close(heldout(reference(f"--model={model}")), heldout(folder), 1e-4)


# -- killed and started again --------------------------------------------------------------------------------

RESUME = ["--steps=12", "--checkpoint_every=2", "--keep=2", "--eval_every=4"]


def checkpoints(folder, pattern="step_??????"):
    return sorted(glob.glob(f"{folder}/checkpoints/{pattern}"))


def killed(folder, world_data, *flags, when, world=1):
    """Starts the run, kills it as soon as when() is true; False if it ended before."""
    process = start(folder, world_data, *flags, world=world)
    while process.running() and not when():
        time.sleep(0.002)
    alive = process.running()
    process.kill()
    return alive


def assert_uninterrupted(folder, whole, keep):
    assert same(exported(folder), exported(whole)) and what_counts(folder) == what_counts(whole)
    for name in ("model/model.safetensors", "retention.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    names = [name for _, folders, files in os.walk(folder) for name in folders + files]
    assert not [name for name in names if ".tmp" in name]
    assert len(checkpoints(folder)) == keep == len(os.listdir(folder / "checkpoints"))


@pytest.mark.parametrize("model", [pytest.param("toy", marks=pytest.mark.slow), "toy-h"])
def test_killed_run_ends_the_same(model, tmp_path, world_data, reference):
    """Killed while a checkpoint is being written, then between two: weights bit by bit, every logged loss."""
    flags, folder = [f"--model={model}", *RESUME], tmp_path / "run"
    assert killed(folder, world_data, *flags, when=lambda: checkpoints(folder, "step_000006.tmp"))
    assert killed(folder, world_data, *flags, when=lambda: checkpoints(folder, "step_000010"))
    second = [line for line in log_text(folder).splitlines() if "goes on at step" in line]
    assert len(second) == 1 and int(second[0].split()[-1]) in (4, 6)
    run(folder, world_data, *flags)
    assert_uninterrupted(folder, reference(*flags), keep=2)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toy", "toy-h"])
def test_killed_at_twenty_moments(model, tmp_path, world_data, reference):
    """Twenty kills: half at moments drawn at random, half while a checkpoint is being written. A run that
    outlives its moment and ends must have ended the same, and the next one takes the kills that are left."""
    flags, rng, kills, runs = [f"--model={model}", *RESUME, "--steps=60"], random.Random(model), 0, 1
    while kills < 20:
        folder, end, writing = tmp_path / f"{runs}", time.monotonic() + rng.uniform(0.05, 1.5), kills % 2

        def now(folder=folder, end=end, writing=writing):
            return time.monotonic() > end and (not writing or checkpoints(folder, "*.tmp"))

        if killed(folder, world_data, *flags, when=now):
            kills += 1
        else:
            assert_uninterrupted(folder, reference(*flags), keep=2)
            runs += 1
    run(tmp_path / f"{runs}", world_data, *flags)
    assert_uninterrupted(tmp_path / f"{runs}", reference(*flags), keep=2)


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_other_number_of_processes(torchrun, tmp_path, world_data, reference):
    """Two processes for the first half, then one, and two again for the last steps. torchrun itself starts
    the first two, in a fresh interpreter."""
    folder, flags = tmp_path / "run", ["--model=toy", "--steps=12", "--micro_batch=4"]
    half = [*flags, "--checkpoint_every=6"]
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"{ROOT}/midtrain.py",
                   *SMALL, *half, f"--data={world_data}", f"--out={folder}"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not checkpoints(folder):
                time.sleep(0.002)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)           # torchrun ends its processes
    else:
        assert killed(folder, world_data, *half, when=lambda: checkpoints(folder), world=2)
    assert not (folder / "retention.json").exists() and checkpoints(folder)[-1].endswith("step_000006")
    assert "2 x cpu (1 x 2)" in log_text(folder)
    assert killed(folder, world_data, *flags, "--checkpoint_every=4",
                  when=lambda: checkpoints(folder, "step_000008"))
    run(folder, world_data, *flags, "--checkpoint_every=4", "--replicate=2", world=2)
    assert "goes on at step 6" in log_text(folder) and "goes on at step 8" in log_text(folder)
    one = reference(*STEPS)
    assert close(losses(one), losses(folder), 5e-7)
    assert close(heldout(one), heldout(folder), 5e-7)


# -- checkpoints ---------------------------------------------------------------------------------------------

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
    for name in ("model.tmp-save", "model.tmp-old", "model"):                     # a save killed at its end
        shutil.copytree(whole / "model", folder / name)
    run(folder, world_data, *STEPS)
    assert "goes on at step 9" in log_text(folder)
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


def assert_only_these_differ(folder, other, *beginnings):
    """Every file of the two folders is the same, but for those whose path begins so."""
    contents = []
    for root in (folder, other):
        paths = glob.glob(f"{root}/**", recursive=True, include_hidden=True)
        contents.append({os.path.relpath(path, root): open(path, "rb").read() for path in paths
                         if os.path.isfile(path)})
    here, there = contents
    changed = {name for name in here.keys() | there.keys() if here.get(name) != there.get(name)}
    assert all(name.startswith(beginnings) for name in changed), changed


@pytest.mark.parametrize("damage", [damage_data, lose_metadata])
def test_damaged_checkpoint(damage, tmp_path, world_data, reference):
    """Refused by name, all else left as it was; with it deleted, as the message says, the run goes on from
    the one before (shown once: whatever the damage was, the folder is then the same)."""
    whole = reference(*STEPS)
    folder = unfinished(tmp_path / "run", whole)
    newest = folder / "checkpoints" / "step_000012"
    damage(newest)
    process = start(folder, world_data, *STEPS)
    assert process.wait() == 2 and "Traceback" not in process.text("stderr")
    error = process.text("stderr").splitlines()[-1]
    assert error.startswith("error: ") and f"{newest}" in error
    assert "delete it to go on from the one before" in error
    shutil.rmtree(newest)
    assert_only_these_differ(folder, whole, "checkpoints/step_000012", "model/", "retention", "log", "config",
                             "source")
    if damage is damage_data:
        run(folder, world_data, *STEPS)
        assert_uninterrupted(folder, whole, keep=4)


@pytest.mark.parametrize("damage", [damage_bit, damage_metadata, lose_data])
def test_damaged_checkpoint_is_not_restored(damage, tmp_path, world_data, reference):
    """The other damages, refused in the same words by what a process asks; nothing is deleted or written."""
    whole = reference(*STEPS)
    folder = unfinished(tmp_path / "run", whole)
    newest = folder / "checkpoints" / "step_000012"
    damage(newest)
    with runtime.join_ranks("cpu") as ranks:
        run = runtime.Run(str(folder), config(folder, world_data, *STEPS), ranks, midtrain.FREE)
        assert run.latest() == 12
        with pytest.raises(InputError, match=f"{newest} cannot be read .* go on from the one before"):
            run.restore({}, 12)
        assert run.restore({}, 9) == {}                   # the one before is whole
    assert_only_these_differ(folder, whole, "checkpoints/step_000012", "model/", "retention", "config",
                             "source")


def test_checkpoints_have_a_group_of_their_own(tmp_path, world_data, monkeypatch):
    """What a thread writes meanwhile must not meet, in one group, what the loop tells the other ranks."""
    groups = []
    save = dcp.async_save

    def note(*args, process_group, **kwargs):
        groups.append(process_group)
        return save(*args, process_group=process_group, **kwargs)

    monkeypatch.setattr(dcp, "async_save", note)
    with runtime.join_ranks("cpu") as ranks:
        cfg = config(tmp_path / "run", world_data, *STEPS)
        with runtime.Run(cfg.run, cfg, ranks) as run:
            for step in (1, 2):
                run.save({"progress": {"step": step}}, step, 0)
            run.finish()
        others = [ranks.cpu_group, torch.distributed.group.WORLD, *ranks.mesh.get_all_groups()]
    assert len(groups) == 2 and groups[0] is groups[1] and groups[0] not in others


def test_checkpoint_holds_its_step_whatever_comes_after(tmp_path, world_data, monkeypatch):
    """Written in the background, the disk so slow that the next step is over before the first byte: every
    tensor and number must be those of a run that writes its checkpoints at once."""
    flags = ["--model=toy", "--steps=3", "--checkpoint_every=1", "--keep=0"]
    write = dcp.FileSystemWriter.write_data
    with monkeypatch.context() as patch:
        slept = []

        def slow(*args):
            slept.append(time.sleep(0.3))
            return write(*args)
        patch.setattr(dcp.FileSystemWriter, "write_data", slow)
        midtrain.main(config(tmp_path / "background", world_data, *flags))
        assert len(slept) == 3
    with monkeypatch.context() as patch:
        def at_once(state, checkpoint_id, process_group, **more):
            dcp.save(state, checkpoint_id=checkpoint_id, process_group=process_group)
            done = Future()
            done.set_result(None)
            return done
        patch.setattr(runtime.dcp, "async_save", at_once)
        midtrain.main(config(tmp_path / "at_once", world_data, *flags))
    for step in range(1, 4):
        a, b = (tensors(tmp_path / name, step) for name in ("background", "at_once"))
        assert same(a, b) and len(a) > 100 and a["/progress/step"] == step
    assert not same(a, tensors(tmp_path / "at_once", 2))


def test_changed_config_is_allowed_when_asked(tmp_path, world_data, reference):
    folder = unfinished(tmp_path / "run", reference(*STEPS))
    shutil.rmtree(folder / "checkpoints" / "step_000012")
    run(folder, world_data, *STEPS, "--lr=1e-4", "--steps=14", "--allow_changed=True")
    before, after = losses(reference(*STEPS)), losses(folder)
    assert "goes on at step 9" in log_text(folder) and before[:10] == after[:10] and len(after) == 14
    assert before[10:] != after[10:12]


# -- non-finite steps ----------------------------------------------------------------------------------------

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
    poisoned(monkeypatch, {3})
    folder, flags = tmp_path / "run", ["--model=toy", "--steps=5", "--checkpoint_every=1", "--keep=0"]
    result = midtrain.main(config(folder, world_data, *flags))
    assert "step 3: loss nan, gradient norm nan: skipped (1 in a row)" in log_text(folder)
    assert [line["skips"] for line in lines(folder) if "skips" in line] == [0, 0, 1, 0, 0]
    assert math.isfinite(result["loss"]) and all(t.isfinite().all() for t in exported(folder).values())
    a, b, c = ({k: v for k, v in tensors(folder, s).items() if "progress" not in k} for s in (2, 3, 4))
    assert same(a, b) and not same(b, c)                  # weights, moments and the optimizer's own count


def test_too_many_poisoned_steps(tmp_path, world_data, monkeypatch, reference):
    """The run stops and says how to go on; from its last checkpoint it ends as if all had been well."""
    whole, folder, flags = reference(*STEPS), tmp_path / "run", [*STEPS, "--max_skips=1"]
    with monkeypatch.context() as patch:
        poisoned(patch, set(range(7, 100)))
        with pytest.raises(InputError, match=r"2 non-finite steps .* at step 8 \(--max_skips=1\).* lower"):
            midtrain.main(config(folder, world_data, *flags))
    run(folder, world_data, *flags)
    assert "goes on at step 6" in log_text(folder)
    assert_uninterrupted(folder, whole, keep=4)


def test_absurd_learning_rate(tmp_path, world_data):
    process = start(tmp_path / "run", world_data, "--model=toy", "--steps=20", "--lr=1e30", "--max_skips=2")
    status, errors = process.wait(), process.text("stderr")
    assert status == 2 and "Traceback" not in errors
    assert "3 non-finite steps in a row" in errors and "--max_skips=2" in errors
    assert process.text("stdout").count("skipped") == 3
    assert not (tmp_path / "run" / "model").exists()


# -- the run folder ------------------------------------------------------------------------------------------

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
    assert all(len(line) <= 115 for line in log_text(folder).splitlines() if line.startswith("step "))


def test_finished_run_is_left_alone(reference, world_data, tmp_path):
    folder = shutil.copytree(reference(*STEPS), tmp_path / "run")
    paths = [path for path in glob.glob(f"{folder}/**", recursive=True) if os.path.isfile(path)]
    before = {path: os.stat(path).st_mtime_ns for path in paths}
    result = midtrain.main(config(folder, world_data, *STEPS))
    assert json.loads(json.dumps(result)) == json.loads((folder / "retention.json").read_text())
    after = {path: os.stat(path).st_mtime_ns for path in before}
    changed = {os.path.relpath(path, folder) for path in before if before[path] != after[path]}
    assert changed <= {"log.txt", "config.json", "source.zip"}


def test_finished_run_goes_on_when_asked_for_more(reference, world_data, tmp_path):
    folder = shutil.copytree(reference(*STEPS), tmp_path / "run")
    result = midtrain.main(config(folder, world_data, *STEPS, "--steps=15", "--allow_changed=True"))
    assert [step for step, _ in result["curve"]][-1] == 15
    assert len(losses(folder)) == 15 and losses(folder)[:12] == losses(reference(*STEPS))


def test_flags_may_change_before_the_first_checkpoint(world_data, tmp_path):
    """A first start that failed on a mistyped path must not lock its mistake in."""
    with pytest.raises(InputError, match="/nowhere"):
        midtrain.main(config(tmp_path / "run", "/nowhere", "--model=toy"))
    assert midtrain.main(config(tmp_path / "run", world_data, "--model=toy"))["curve"][-1][0] == N


def test_accumulated_gradients_stay_sharded(world_data, tmp_path, monkeypatch):
    """Between micro-batches no unit may hold its whole gradient (94 GB a device for 24B)."""
    forward, seen = midtrain.Model.forward, []

    def checked(model, *args):
        for module in model.modules():
            group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
            seen.extend(p.unsharded_accumulated_grad for p in (group.fsdp_params if group else ()))
        return forward(model, *args)

    monkeypatch.setattr(midtrain.Model, "forward", checked)
    midtrain.main(config(tmp_path / "run", world_data, "--model=toy", "--steps=4", "--micro_batch=2"))
    assert len(seen) > 100 and not any(grad is not None for grad in seen)


def test_result_is_whole_when_killed_at_the_very_end(reference, world_data, tmp_path):
    """After the last checkpoint there is nothing to train, yet the result holds the last loss."""
    folder = unfinished(tmp_path / "run", reference(*STEPS))
    run(folder, world_data, *STEPS)
    assert_uninterrupted(folder, reference(*STEPS), keep=4)


def test_tokens_per_source(reference):
    mixture = data.read_mixture("math+code+science")
    planned = data.planned_rows(mixture, 1, N * 8) * 32
    result = json.loads((reference("--model=toy") / "retention.json").read_text())
    assert planned.sum() == N * 8 * 32
    assert result["tokens"] == dict(zip(mixture, planned.tolist(), strict=True))
    assert set(result["curve"][0][1]) == set(registry.DOMAINS) and result["curve"][-1][0] == N


def test_attention_only(tmp_path, world_data):
    """--train=attention moves q, k, v, o and nothing else."""
    run(tmp_path / "run", world_data, "--model=toy-h", "--train=attention", "--steps=4")
    before, after = dict(load("toy-h").named_parameters()), exported(tmp_path / "run")
    moved = {name for name, p in before.items() if not torch.equal(p.detach(), after[name])}
    assert moved == {f"model.layers.2.self_attn.{x}_proj.weight" for x in "qkvo"}


# -- config, schedule, plan ----------------------------------------------------------------------------------

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
    source = [line for line in inspect.getsource(midtrain.Config).splitlines() if "  # " in line]
    comments = {line.split(":")[0].strip(): line.partition("  # ")[2].strip() for line in source}
    assert list(comments) == [f.name for f in dataclasses.fields(midtrain.Config)]
    with pytest.raises(SystemExit) as exit:
        parse(midtrain.Config, ["--help"], midtrain.recipe)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert exit.value.code == 0
    for name, comment in comments.items():
        assert f"--{name} " in text and " ".join(comment.split()) in text, name


def test_parse(tmp_path):
    def read(*argv):
        return parse(midtrain.Config, argv, midtrain.recipe)
    assert read() == midtrain.Config(**midtrain.recipe("toy"))
    cfg = read("--lr=1e-3", "--doc_mask=False", "--init=0.5*a + 0.5*b", "--out=x=y")
    assert (cfg.lr, cfg.doc_mask, cfg.init, cfg.run) == (1e-3, False, "0.5*a + 0.5*b", "x=y")
    cfg = read("--model=mistral-7b", "--steps=7", "--lr=0.5")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    cfg = read(str(tmp_path / "config.json"), "--steps=8")
    assert (cfg.model, cfg.steps, cfg.lr, cfg.seq_len) == ("mistral-7b", 8, 0.5, 8192)
    with pytest.raises(InputError, match="--batchs is not a flag; did you mean '--batch'?"):
        read("--batchs=3")


def test_recipes():
    """The paper's, table 16, for the seven models; the toys' own."""
    for model in [name for name in presets.names() if not presets.is_toy(name)]:
        cfg = parse(midtrain.Config, [f"--model={model}"], midtrain.recipe)
        assert (cfg.lr, cfg.steps, cfg.seq_len, cfg.batch, cfg.warmup) == (5e-5, 25_000, 8192, 128, 500)
        assert (cfg.weight_decay, cfg.beta1, cfg.beta2, cfg.eps, cfg.final_lr) == (0.1, 0.9, 0.95, 1e-10, 0.1)
        assert (cfg.schedule, cfg.dtype, cfg.micro_batch) == ("cosine", "bfloat16", 1)
        assert cfg.mixture == "math+code+science"
    cfg = parse(midtrain.Config, ["--model=toy-h"], midtrain.recipe)
    assert {name: getattr(cfg, name) for name in midtrain.TOY} == midtrain.TOY and cfg.steps < 2000


@pytest.mark.parametrize("model", [name for name in presets.names() if not presets.is_toy(name)])
def test_dry_run(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [f"--model={model}", "--dry_run=True", "--replicate=16", "--shard=8"]
    assert midtrain.main(parse(midtrain.Config, argv, midtrain.recipe)) == {}
    plan = capsys.readouterr().out
    counts = parameter_counts(preset(model))
    for number in (sum(counts.values()), *counts.values()):
        assert f"{number:,}" in plan
    for words in ("= 26.2B tokens on 128 devices (16 x 8)", "hours, at 3", "400 rows a period"):
        assert words in plan
    assert all(f"  {source} " in plan for source in data.MIXTURES["math+code+science"])
    assert os.listdir(tmp_path) == []
