"""What a user can get wrong ends in one readable line that names the flag or the file and the fix: never in a
traceback, a hang, or a half-written file taken for a whole one.

Each row is a process of midtrain.py, forked from one that has imported it (processes.py); one starts afresh.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from processes import Process
from safetensors.torch import load_file, save_file

from cli import InputError
from midtrain import Config
from runtime import Run, join_ranks

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BASE = ["--model=toy", "--mixture=mot-math:100", "--dtype=float32", "--seq_len=32", "--batch=8",
        "--micro_batch=8", "--steps=4", "--warmup=1", "--eval_rows=1", "--eval_every=0", "--peak_tflops=1"]
SHARD = "mot-math/train-00000.bin"


class Box:
    """A folder to break things in: data/ holds one prepared source, run/ is the run's."""

    def __init__(self, path, world_data, exported):
        self.path, self.data, self.run, self.exported = path, path / "data", path / "run", exported
        shutil.copytree(world_data / "mot-math", self.data / "mot-math")
        self.flags = [*BASE, f"--data={self.data}", f"--run={self.run}"]

    def start(self, *flags, world=1, **env):
        process = Process(self.path / "output", *self.flags, *flags, world=world, **env)
        return process.wait(), process.text("stderr"), process.text("stdout")

    def manifest(self, change):
        """The source's manifest after `change` of its first training shard's entry."""
        path = self.data / "mot-math" / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest, manifest["splits"]["train"][0])
        path.write_text(json.dumps(manifest))

    def checkpoint(self, name="checkpoint", config=None, tensors=None):
        """A copy of the exported toy after config(dict) and tensors(dict)."""
        folder = shutil.copytree(self.exported, self.path / name)
        for file, read, write, change in (("config.json", lambda p: json.loads(p.read_text()),
                                           lambda x, p: p.write_text(json.dumps(x)), config),
                                          ("model.safetensors", load_file, save_file, tensors)):
            if change:
                content = read(folder / file)
                change(content)
                write(content, folder / file)
        return folder

    def started(self, *flags):
        """A run of this box that has finished; what made it finished is taken away."""
        status, errors, _ = self.start(*flags)
        assert status == 0, errors
        os.remove(self.run / "retention.json")
        shutil.rmtree(self.run / "model")


# -- how to make each ----------------------------------------------------------------------------------------

def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path, size):
    os.truncate(path, size)


def empty_shard(box):
    cut(box.data / SHARD, 0)


def truncated_shard(box):
    cut(box.data / SHARD, 1000)


def corrupted_shard(box):
    flip(box.data / SHARD, 12345)


def missing_shard(box):
    os.remove(box.data / SHARD)


def damaged_manifest(box):
    cut(box.data / "mot-math" / "manifest.json", 200)


def foreign_manifest(box):
    (box.data / "mot-math" / "manifest.json").write_text("[1, 2]")


def other_tokenizer(box):
    box.manifest(lambda manifest, _: manifest.update(tokenizer="0123456789abcdef"))


def ids_beyond(box):
    tokens = np.fromfile(box.data / SHARD, np.uint16)
    tokens[7] = 600
    tokens.tofile(box.data / SHARD)
    box.manifest(lambda _, shard: shard.update(max_id=600, crc32=zlib.crc32(tokens)))


def few_tokens(box):
    tokens = np.fromfile(box.data / SHARD, np.uint16)[:20]
    tokens.tofile(box.data / SHARD)
    np.array([0, 20]).tofile(box.data / SHARD.replace(".bin", ".idx"))
    box.manifest(lambda _, shard: shard.update(tokens=20, documents=1, crc32=zlib.crc32(tokens),
                                               idx_crc32=zlib.crc32(np.array([0, 20]))))


def data_is_a_file(box):
    (box.path / "data.bin").write_text("")
    return [f"--data={box.path}/data.bin"]


def no_config(box):
    os.remove(box.checkpoint() / "config.json")
    return [f"--init={box.path}/checkpoint"]


def broken_config(box):
    cut(box.checkpoint() / "config.json", 50)
    return [f"--init={box.path}/checkpoint"]


def truncated_weights(box):
    cut(box.checkpoint() / "model.safetensors", 100_000)
    return [f"--init={box.path}/checkpoint"]


def missing_tensor(box):
    return [f"--init={box.checkpoint(tensors=lambda t: t.pop('model.norm.weight'))}"]


def extra_tensor(box):
    return [f"--init={box.checkpoint(tensors=lambda t: t.update({'model.extra.weight': torch.ones(2)}))}"]


def misshapen_tensor(box):
    return [f"--init={box.checkpoint(tensors=lambda t: t.update({'model.norm.weight': torch.ones(64)}))}"]


def foreign_config(box):
    (box.checkpoint() / "config.json").write_text("[1, 2]")
    return [f"--init={box.path}/checkpoint"]


def experts(box):
    return [f"--init={box.checkpoint(config=lambda c: c.update(num_local_experts=8))}"]


def broken_index(box):
    (box.checkpoint() / "model.safetensors.index.json").write_text('{"weight_map": {')
    return [f"--init={box.path}/checkpoint"]


def missing_file(box):
    names = dict.fromkeys(load_file(box.exported / "model.safetensors"), "model-00001-of-00002.safetensors")
    (box.checkpoint() / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return [f"--init={box.path}/checkpoint"]


def no_tokenizer(box):
    os.remove(box.checkpoint() / "tokenizer.json")
    return [f"--init={box.path}/checkpoint"]


def broken_tokenizer(box):
    cut(box.checkpoint() / "tokenizer.json", 500)
    return [f"--init={box.path}/checkpoint"]


def vocabulary_too_small(box):
    """The right tokenizer, and a model with fewer rows than it has ids."""
    def trim(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300].clone()
    return [f"--init={box.checkpoint(config=lambda c: c.update(vocab_size=300), tensors=trim)}"]


def mixed(box):
    return [f"--init=0.5*{box.exported} + 0.5*random:toy-mistral"]


def below_a_file(box):
    (box.path / "file").write_text("")
    return [f"--run={box.path}/file/run"]


def run_of_something_else(box):
    box.run.mkdir()
    (box.run / "config.json").write_text("steps: 4\n")


def run_is_binary(box):
    box.run.mkdir()
    (box.run / "config.json").write_bytes(b"\xff\xfe\x00")


def changed_config(box):
    box.started()
    return ["--lr=0.001"]


def changed_order(box):
    box.started()
    return ["--batch=16", "--allow_changed=True"]


def fewer_steps(box):
    box.started()
    return ["--steps=3", "--allow_changed=True"]


def changed_data(box):
    box.started()
    tokens = np.fromfile(box.data / SHARD, np.uint16)
    tokens[7] ^= 1
    tokens.tofile(box.data / SHARD)
    box.manifest(lambda _, shard: shard.update(crc32=zlib.crc32(tokens)))


def damaged_checkpoint(box):
    box.started()
    cut(box.run / "checkpoints" / "step_000004" / "__0_0.distcp", 5000)


def saved_config_missing(box):
    return ["--seed=1"], [str(box.path / "nowhere.json")]


def saved_config_broken(box):
    (box.path / "saved.json").write_text("[1]")
    return ["--seed=1"], [str(box.path / "saved.json")]


def saved_config_unknown_key(box):
    (box.path / "saved.json").write_text('{"modle": "toy"}')
    return ["--seed=1"], [str(box.path / "saved.json")]


# name, flags (or the function above that makes them), what the message must name, the fix it must mention
ROWS = [
    ("unknown flag", ["--stepz=3"], "--stepz", "--steps"),
    ("unknown flag, nothing near", ["--banana=3"], "--banana", "--help"),
    ("word for a number", ["--steps=ten"], "--steps=ten", "whole number"),
    ("fraction for a whole number", ["--batch=8.5"], "--batch=8.5", "whole number"),
    ("word for a float", ["--lr=fast"], "--lr=fast", "a number"),
    ("neither True nor False", ["--doc_mask=maybe"], "--doc_mask=maybe", "True or False"),
    ("flag without a value", ["--compile"], "--compile", "True or False"),
    ("saved config missing", saved_config_missing, "nowhere.json", "--key=value"),
    ("saved config is no object", saved_config_broken, "saved.json", "config.json"),
    ("saved config with an unknown key", saved_config_unknown_key, "--modle", "--model"),
    ("unknown model", ["--model=toyy"], "--model", "did you mean 'toy'"),
    ("unknown mixture", ["--mixture=maths"], "--mixture", "did you mean 'math'"),
    ("mixture sums to 90", ["--mixture=mot-math:90"], "--mixture", "sum to 100"),
    ("negative percentage", ["--mixture=mot-math:120,chat:-20"], "--mixture", "positive"),
    ("percentage not a number", ["--mixture=mot-math:all"], "--mixture", "source:percent"),
    ("source not prepared", ["--mixture=mot-math:50,chat:50"], "'chat'", "prepare it"),
    ("no data folder", ["--data=nowhere"], "--data=nowhere", "prepare it"),
    ("data folder is a file", data_is_a_file, "data.bin", "prepare it"),
    ("empty shard", empty_shard, SHARD, "prepare the source again"),
    ("truncated shard", truncated_shard, SHARD, "prepare the source again"),
    ("one flipped bit in a shard", corrupted_shard, SHARD, "prepare the source again"),
    ("missing shard", missing_shard, SHARD, "prepare the source again"),
    ("truncated manifest", damaged_manifest, "manifest.json", "prepare the source again"),
    ("manifest of something else", foreign_manifest, "manifest.json", "prepare the source again"),
    ("tokenizer of another model", other_tokenizer, "mot-math", "this model's tokenizer"),
    ("ids beyond the vocabulary", ids_beyond, SHARD, "this model's tokenizer"),
    ("model with fewer rows than the tokenizer", vocabulary_too_small, SHARD, "vocabulary of 300"),
    ("too little data for a row", few_tokens, "--seq_len=32", "smaller --seq_len"),
    ("too little held-out data for a row", ["--seq_len=2000000"], "--seq_len=2000000", "smaller --seq_len"),
    ("batch by micro_batch", ["--micro_batch=3"], "--micro_batch=3", "divisor of 8"),
    ("batch by ranks", ["--batch=7", "--micro_batch=1"], "--batch=7", "multiple of 2"),
    ("more copies than processes", ["--replicate=2"], "--replicate=2", "torchrun"),
    ("more shards than processes", ["--shard=4"], "--shard=4", "torchrun"),
    ("warm-up as long as the run", ["--warmup=4"], "--warmup=4", "fewer warm-up steps"),
    ("no steps", ["--steps=0"], "--steps=0", "at least 1"),
    ("negative rate", ["--lr=-1e-3"], "--lr=-0.001", "at least 0"),
    ("rate not a number", ["--lr=nan"], "--lr=nan", "finite"),
    ("rate infinite", ["--lr=inf"], "--lr=inf", "finite"),
    ("beta of one", ["--beta2=1"], "--beta2", "[0, 1)"),
    ("unknown dtype", ["--dtype=float16"], "--dtype", "bfloat16"),
    ("unknown schedule", ["--schedule=linear"], "--schedule", "cosine"),
    ("unknown recomputation", ["--recompute=some"], "--recompute", "selective"),
    ("unknown choice of weights", ["--train=mlp"], "--train", "attention"),
    ("no GPU", ["--device=cuda"], "--device=cuda", "cpu"),
    ("unknown device", ["--device=tpu"], "--device=tpu", "cpu"),
    ("init is nowhere", ["--init=nowhere"], "--init", "presets"),
    ("init nearly a preset", ["--init=tooy"], "--init", "did you mean 'toy'"),
    ("init random of nothing", ["--init=random:toyy"], "--init", "did you mean 'toy'"),
    ("init without config.json", no_config, "config.json", "hub format"),
    ("init with half a config.json", broken_config, "config.json", "again"),
    ("init with a config.json of something else", foreign_config, "config.json", "again"),
    ("init of experts", experts, "num_local_experts", "not supported"),
    ("init with truncated weights", truncated_weights, "model.safetensors", "fetch it again"),
    ("init with half an index", broken_index, "model.safetensors.index.json", "again"),
    ("init lacks a file of its index", missing_file, "model-00001-of-00002.safetensors", "again"),
    ("init lacks a tensor", missing_tensor, "model.norm.weight", "missing"),
    ("init with a tensor too many", extra_tensor, "model.extra.weight", "unexpected"),
    ("init with a tensor of another shape", misshapen_tensor, "model.norm.weight", "[128]"),
    ("init without tokenizer", no_tokenizer, "tokenizer.json", "fetch it"),
    ("init with half a tokenizer", broken_tokenizer, "tokenizer.json", "fetch it again"),
    ("init sums to 0.9", ["--init=0.4*toy + 0.5*toy"], "--init", "0.9, not 1"),
    ("init cannot be read", ["--init=half*toy + 0.5*toy"], "--init", "0.15*A + 0.85*B"),
    ("init of two architectures", mixed, "--init", "different architectures"),
    ("init of another model than --model", ["--init=random:toy-h"], "random:toy-h", "=toy-granite-4-h"),
    ("tokenizer is nowhere", ["--tokenizer=nowhere"], "nowhere", "no such folder"),
    ("hub out of reach", ["--model=mistral-7b", "--init="], "mistral-7b", "--init=PATH"),
    ("run folder below a file", below_a_file, "--run", "another --run"),
    ("run folder of something else", run_of_something_else, "config.json", "another --run"),
    ("run folder with a binary config", run_is_binary, "config.json", "another --run"),
    ("another config than the run's", changed_config, "--lr=0.001 (was 0.003)", "--allow_changed=True"),
    ("another order of rows than the run's", changed_order, "--batch=16 (was 8)", "another --run"),
    ("fewer steps than were done", fewer_steps, "--steps=3", "another --run"),
    ("other data than the run's", changed_data, "--data", "restore it"),
    ("damaged checkpoint", damaged_checkpoint, "step_000004", "delete it"),
]
AFRESH = "one flipped bit in a shard"


@pytest.mark.parametrize("row", ROWS, ids=[row[0].replace(" ", "_") for row in ROWS])
def test_refusal(row, tmp_path, world_data, exported):
    name, make, named, fix = row
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    box = Box(tmp_path, world_data, exported)
    flags = make(box) or [] if callable(make) else make
    if isinstance(flags, tuple):                          # a saved config.json comes first
        flags, box.flags = flags[0], [*flags[1], *box.flags]
    if name == AFRESH:
        command = [sys.executable, f"{ROOT}/midtrain.py", *box.flags, *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        status, errors, output = done.returncode, done.stderr, done.stdout
    else:
        status, errors, output = box.start(*flags, world=2 if name == "batch by ranks" else 1,
                                           HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))

    last = errors.rstrip("\n").split("\n")[-1]
    assert status == 2, errors + output
    assert "Traceback" not in errors + output
    assert last.startswith("error: ") and last.isprintable() and len(last) < 1000
    assert named in last and fix in last, last
    assert not (box.run / "retention.json").exists() and not (box.run / "model").exists()
    assert "retention" not in output


# -- full disks ----------------------------------------------------------------------------------------------
# Of a toy run in float32: source.zip 60 kB, a checkpoint 10.3 MB, the exported model 3.4 MB.

@pytest.fixture
def disk(tmp_path):
    """disk(bytes) puts a file system of that size on the run's folder, or resizes the one there."""
    folder, mounted = tmp_path / "run", []

    def mount(size):
        folder.mkdir(exist_ok=True)
        options = f"size={size}{',remount' * len(mounted)}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr}")
        mounted[:] = [True]
    yield mount
    if mounted:
        subprocess.run(["umount", folder], check=True)


EVERY = "--checkpoint_every=2"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, world_data, exported):
    """The run that had room from the start."""
    box = Box(tmp_path_factory.mktemp("whole"), world_data, exported)
    status, errors, _ = box.start(EVERY)
    assert status == 0, errors
    return box.run


def goes_on(box, whole):
    """With space again, the same command ends as if nothing had happened; nothing half-written is left."""
    status, errors, output = box.start(EVERY)
    assert status == 0, errors
    names = [name for _, folders, files in os.walk(box.run) for name in folders + files]
    assert not [name for name in names if ".tmp" in name]
    steps = [line["step"] for line in map(json.loads, open(box.run / "metrics.jsonl")) if "loss" in line]
    assert steps == [1, 2, 3, 4]
    for name in ("model/model.safetensors", "retention.json"):
        assert (box.run / name).read_bytes() == (whole / name).read_bytes()
    return output


# what does not fit, bytes of the disk, what the message names, from which checkpoint the run goes on
DISKS = [("nothing", 16_384, "--run", 0), ("source", 40_000, "--run", 0),
         ("checkpoint", 6_000_000, "checkpoint of step 2", 0),
         ("second checkpoint", 16_000_000, "checkpoint of step 4", 2), ("model", 21_500_000, "model", 4)]


@pytest.mark.parametrize("what, size, named, start", DISKS, ids=[d[0].replace(" ", "_") for d in DISKS])
def test_full_disk(what, size, named, start, tmp_path, world_data, exported, disk, whole):
    box = Box(tmp_path, world_data, exported)
    disk(size)
    status, errors, output = box.start(EVERY)
    last = errors.rstrip("\n").split("\n")[-1]
    assert status == 2 and "Traceback" not in errors + output, errors + output
    assert last.startswith("error: ") and str(box.run) in last and named in last, last
    assert "No space left" in last or "0 MB are free" in last, last
    assert not (box.run / "model").exists() and not (box.run / "retention.json").exists()
    disk("100m")
    output = goes_on(box, whole)
    assert (f"goes on at step {start}" in output) == (start > 0)


def test_file_too_large(tmp_path, world_data, exported, whole):
    """The same without a disk to mount: no file may have more than 4 MB."""
    box = Box(tmp_path, world_data, exported)
    status, errors, output = box.start(EVERY, FILE_LIMIT="4000000")
    assert status == 2 and "Traceback" not in errors + output, errors + output
    assert errors.startswith(f"error: --run={box.run}: the checkpoint of step 2 could not be written")
    goes_on(box, whole)


@pytest.mark.parametrize("name", ["log", "metrics"])
def test_log_on_a_full_disk(name, tmp_path):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    with join_ranks("cpu") as me:
        run = Run(str(tmp_path), Config(), me)
        setattr(run, f"_{name}", Full())
        with pytest.raises(InputError, match=f"--run={tmp_path}: {name}.*No space left on device.*make room"):
            run.log("a line") if name == "log" else run.metrics(step=1)
