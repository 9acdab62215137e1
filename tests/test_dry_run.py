"""--dry_run of midtrain.py and rl.py: memory beside traced steps (docs/memory.md), the verdict and what it
advises, what a GPU refuses before any weight is loaded, RL's plan by hand."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import midtrain
import model
import presets
import rl
from cli import InputError, parse
from engines.embedded import Cache
from model import preset
from planning import rollouts
from planning.memory import HeadMemory, TrainingMemory, sequence_bytes

ROOT = Path(__file__).parents[1]
SEVEN = [name for name in presets.names() if not presets.is_toy(name)]
MODES = ("off", "selective", "full")


def cells():
    """The cells of the rows of models in docs/memory.md."""
    for line in (ROOT / "docs" / "memory.md").read_text().splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if row[0] in SEVEN:
            yield row


def traced():
    """{(model, mode, rows a pass): GB traced of a step of midtrain.py}."""
    return {(row[0], row[1], int(row[2])): float(row[3]) for row in cells() if row[1] in MODES}


def traced_rl():
    """{model: GB traced of scoring, of training}."""
    rows = [row for row in cells() if len(row) == 7 and row[1] not in MODES]
    return {row[0]: (float(row[1]), float(row[3])) for row in rows}


def config(*argv, stage=midtrain):
    return parse(stage.Config, list(argv), stage.recipe)


def planned(cfg, world=8):
    """GB of the traced part of the plan."""
    _, parts = midtrain.training_memory(cfg, world).peak()
    return sum(parts.values()) / 1e9


def plan_of(stage, capsys, *argv):
    assert stage.main(config(*argv, "--dry_run=True", stage=stage)) == {}
    return capsys.readouterr().out


# -- mid-training's memory -----------------------------------------------------------------------------------

def test_the_plan_is_within_a_percent_of_every_trace():
    table = traced()
    assert len(table) == len(SEVEN) * len(MODES) * 2
    for (name, mode, rows), gigabytes in table.items():
        cfg = config(f"--model={name}", f"--recompute={mode}", f"--micro_batch={rows}")
        assert planned(cfg) == pytest.approx(gigabytes, rel=0.01), (name, mode, rows)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++: the pretend GPU's guard cannot be compiled")
@pytest.mark.parametrize("name, mode", [(name, MODES[i % 3]) for i, name in enumerate(SEVEN)])
def test_a_step_is_traced_again(name, mode):
    """The table is what the code of today holds."""
    run = subprocess.run([sys.executable, "benchmarks/memory.py", f"--model={name}", f"--recompute={mode}",
                          "--shard=8"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    trace = json.loads(run.stdout)
    assert trace["peak"] / 1e9 == pytest.approx(traced()[name, mode, 1], rel=0.01)
    assert trace["planned"] == pytest.approx(trace["peak"], rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++: the pretend GPU's guard cannot be compiled")
def test_an_update_of_rl_is_traced_again():
    run = subprocess.run([sys.executable, "benchmarks/memory.py", "rl", "--model=nemotron-h-8b", "--shard=8"],
                         cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    trace = json.loads(run.stdout)
    gigabytes = trace["scoring"] / 1e9, trace["peak"] / 1e9
    assert gigabytes == pytest.approx(traced_rl()["nemotron-h-8b"], rel=0.01)


# Traced with benchmarks/memory.py on other flags than the table's: GB.
OTHER_TRACES = [
    (22.96, "--model=granite-3.3-8b --replicate=16 --shard=8 --batch=256"),
    (10.45, "--model=granite-4-h-micro --replicate=18 --shard=8 --batch=288"),
    (35.53, "--model=granite-3.3-8b --shard=144 --recompute=selective --batch=288"),
    (54.97, "--model=granite-4-h-micro --shard=1"),
    (12.01, "--model=granite-3.3-8b --shard=8 --train=attention"),
    (36.22, "--model=llama-3.1-8b --shard=8 --train=attention --recompute=off"),
    (4.57, "--model=granite-4-h-micro --shard=8 --train=attention"),
    (17.71, "--model=granite-4-h-micro --shard=8 --seq_len=32768"),
    (16.41, "--model=granite-4-h-micro --shard=8 --seq_len=1000 --micro_batch=3 --batch=48 "
            "--recompute=selective"),
    (29.61, "--model=llama-3.1-8b --shard=8 --dtype=float32 --seq_len=4096"),
    (28.84, "--model=mistral-7b --shard=8 --dtype=float32"),                 # its window, in blocks
    (65.74, "--model=granite-3.3-8b --shard=8 --dtype=float32 --seq_len=2048 --recompute=off"),
    (18.82, "--model=granite-4-micro --shard=8 --micro_batch=4"),
    (56.56, "--model=nemotron-h-8b --shard=8 --seq_len=65536"),
    (106.38, "--model=nemotron-h-8b --shard=8 --dtype=float32 --recompute=selective"),
    (27.64, "--model=granite-4-h-micro --shard=8 --recompute=selective --batch=8"),    # one micro-batch
]


@pytest.mark.parametrize("gigabytes, flags", OTHER_TRACES)
def test_other_layouts(gigabytes, flags):
    cfg = config(*flags.split())
    assert planned(cfg, cfg.replicate * cfg.shard) == pytest.approx(gigabytes, rel=0.03)


def test_padding_at_144_ranks():
    """Rows are padded to a multiple of the ranks: 4,096 become 4,176."""
    work = replace(midtrain.training_memory(config("--model=llama-3.1-8b"), 8).work, shards=144)
    memory = TrainingMemory(work, HeadMemory(0, 0, False))
    assert memory.matrices([torch.Size([4096, 4096])]).shard == 29 * 4096


@pytest.mark.parametrize("name", SEVEN)
def test_the_readme_says_what_the_plan_says(name):
    """Its table: GB with full and with selective recomputation, hours on 8 and on 128 GPUs."""
    row, = [line for line in (ROOT / "README.md").read_text().splitlines() if f"| `{name}` |" in line]
    full, selective, *hours = [float(cell) for cell in row.split("|")[3:7]]
    for mode, gigabytes in (("full", full), ("selective", selective)):
        cfg = config(f"--model={name}", f"--recompute={mode}")
        assert round(midtrain.gpu_bytes(cfg, 8) / 1e9) == gigabytes
    for world, stated in zip((8, 128), hours, strict=True):
        plan = midtrain.plan(config(f"--model={name}", f"--replicate={world // 8}"), world)
        assert float(re.search(r"([\d.]+) hours", plan)[1]) == pytest.approx(stated, abs=0.5)


# -- the verdict ---------------------------------------------------------------------------------------------

def verdict_of(plan):
    return next(line for line in plan.splitlines() if "fit" in line.split("GB")[0])


def test_what_fits_is_said(capsys):
    plan = plan_of(midtrain, capsys, "--model=granite-3.3-8b", "--shard=8", "--gpu_gb=80")
    assert re.fullmatch(r"fits 80 GB \(\d\d\.\d GB\)", verdict_of(plan))
    assert "33% MFU (on paper, not yet measured" in plan and "CUDA context" in plan and "NCCL" in plan
    assert "at 40% MFU of" in plan_of(midtrain, capsys, "--model=toy", "--mfu=0.4")


@pytest.mark.parametrize("flags", [
    "--model=granite-3.3-8b --shard=8 --micro_batch=2 --recompute=selective",
    "--model=mistral-24b --shard=8 --recompute=off",
    "--model=mistral-24b --micro_batch=4"])
def test_what_is_advised_fits(flags, capsys):
    """Every alternative of the verdict, given as it is written, gets a verdict that it fits."""
    argv = [*flags.split(), "--gpu_gb=80"]
    verdict = verdict_of(plan_of(midtrain, capsys, *argv))
    assert re.match(r"does not fit 80 GB \(\d+\.\d GB\): give --", verdict)
    for alternative in verdict.split(": give ")[1].split(", or "):
        plan = plan_of(midtrain, capsys, *argv, *alternative.split())
        assert verdict_of(plan).startswith("fits 80 GB"), alternative


class Gpu:
    """What torch.cuda says of a GPU of so many bytes, on the device that join_ranks gives."""

    def __init__(self, size, monkeypatch):
        self.device = torch.device("cuda", 0)
        self.world = 1
        properties = types.SimpleNamespace(total_memory=size)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_a_gpu_refuses_what_cannot_fit(monkeypatch):
    cfg = config("--model=granite-4-h-micro")
    size = 1e9 * planned(cfg, world=1)
    midtrain.refuse_memory(cfg, Gpu(0.91 * size, monkeypatch))         # it may be 10 % too high
    with pytest.raises(InputError, match=r"arithmetic puts 55\.\d GB on each GPU.*give --shard="):
        midtrain.refuse_memory(cfg, Gpu(0.89 * size, monkeypatch))
    with pytest.raises(InputError, match="--dry_run's arithmetic"):
        rollouts.refuse_memory(config("--model=granite-4-h-micro", stage=rl), Gpu(0.89 * size, monkeypatch))
    cpu = types.SimpleNamespace(device=torch.device("cpu"), world=1)
    midtrain.refuse_memory(config("--model=mistral-24b"), cpu)             # a CPU has its own limits


def test_it_is_refused_before_weights_are_opened(monkeypatch, tmp_path):
    """In main of both: no checkpoint is looked for."""
    def too_large(cfg, ranks):
        raise InputError("too large")

    for stage in (midtrain, rl):
        monkeypatch.setattr(stage, "refuse_memory", too_large)
        with pytest.raises(InputError, match="too large"):
            folder = tmp_path / stage.__name__
            stage.main(config("--model=llama-3.1-8b", f"--run={folder}", "--device=cpu", stage=stage))


# -- RL ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SEVEN)
def test_rl_is_within_a_few_percent_of_its_trace(name):
    scoring, training = traced_rl()[name]
    memory = rollouts.plan_memory(config(f"--model={name}", "--replay=samples.jsonl", stage=rl), 8, 80e9)
    assert memory.scoring / 1e9 == pytest.approx(scoring, rel=0.05)
    assert sum(memory.training.values()) / 1e9 == pytest.approx(training, rel=0.01)


@pytest.mark.parametrize("name", SEVEN)
def test_rl_plans_all_seven(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for engine in ("torch", "vllm"):
        plan = plan_of(rl, capsys, f"--model={name}", f"--engine={engine}", "--shard=8", "--gpu_gb=80")
        for words in ("while the policy trains", "while it is sampled from", "reference, fp32",
                      "samples.jsonl", "a checkpoint", "sequences of 16,384 tokens", "hours for 1,000 steps",
                      "bound by"):
            assert words in plan, words
    assert os.listdir(tmp_path) == []


def test_rl_by_hand():
    """granite-3.3-8b on 8 GPUs of 80 GB, vLLM inside with 40 % of each."""
    cfg = config("--model=granite-3.3-8b", "--engine=vllm", stage=rl)
    parameters = 8_170_835_968
    memory = rollouts.plan_memory(cfg, 8, 80e9)
    weights = memory.training["weights, fp32, sharded"]
    assert weights == pytest.approx(4 * parameters / 8, rel=1e-3)
    assert memory.training["reference, fp32, sharded"] == weights
    assert memory.training["Adam moments, fp32, sharded"] == 2 * weights
    # While vLLM samples there are weights, moments, reference and its share; no gradients.
    assert sum(memory.sampling.values()) == 4 * weights + 0.4 * 80e9
    # A token has 40 layers x 8 heads x 128 x keys and values x 2 bytes.
    assert memory.engines.sequence == 16_384 * 40 * 8 * 128 * 2 * 2
    assert memory.engines.cache == 0.4 * 80e9 - 2 * parameters - 2e9
    assert memory.engines.sequences() == 5
    # 128 responses of 4,096 tokens an engine, 19 at a time, each over 256 + 2,048 tokens on average.
    read = 2 * parameters + 19 * (256 + 2048) * 163_840
    seconds = rollouts.step_seconds(cfg, 8, memory.engines)
    assert seconds.at_a_time == 19
    assert seconds.sampling == pytest.approx(math.ceil(128 / 19) * 4096 * read / 2.7e12)
    assert seconds.scoring == pytest.approx(seconds.training / 3)
    # 6 FLOPs a parameter and token, the embedding not counted twice, and attention's share.
    assert seconds.training == pytest.approx(6 * parameters * 1024 * 4352 / (989e12 * 0.33 * 8), rel=0.15)


def test_rl_offload_replay_beside():
    cfg = config("--model=granite-3.3-8b", "--engine=vllm", stage=rl)
    plain = rollouts.plan_memory(cfg, 8, 80e9)
    offloaded = rollouts.plan_memory(replace(cfg, ref_offload=True), 8, 80e9)
    assert plain.traced() - offloaded.traced() == plain.training["reference, fp32, sharded"]
    assert rollouts.plan_memory(replace(cfg, replay="samples.jsonl"), 8, 80e9).engines.engines == 0
    beside = rollouts.plan_memory(replace(cfg, layout="beside", gpu_memory=0.9, tensor_parallel=4), 8, 80e9)
    assert not beside.engines.sampling
    assert beside.engines.sequences() == (0.9 * 80e9 - 16_341_671_936 / 4 - 2e9) // (2_684_354_560 / 4)


def test_rl_advises_what_fits(capsys):
    argv = ["--model=mistral-24b", "--engine=vllm", "--shard=8", "--replicate=2", "--gpu_gb=80"]
    verdict = verdict_of(plan_of(rl, capsys, *argv))
    assert verdict.startswith("does not fit 80 GB (84.4 GB): give --")
    for alternative in verdict.split(": give ")[1].split(", or "):
        assert verdict_of(plan_of(rl, capsys, *argv, *alternative.split())).startswith("fits"), alternative


def test_rl_says_where_no_sequence_fits(capsys):
    plan = plan_of(rl, capsys, "--model=granite-3.3-8b", "--engine=vllm", "--shard=8", "--gpu_memory=0.2",
                   "--gpu_gb=80")
    assert verdict_of(plan) == ("does not fit 80 GB (the engine's cache holds no sequence of "
                                "--context=16384): give --gpu_memory=0.3, or --tensor_parallel=2")


@pytest.mark.parametrize("name", ["toy-mistral", "toy-granite-4-h", "toy-nemotron-h"])
def test_a_sequence_is_a_row_of_the_embedded_cache(name):
    with torch.device("meta"):
        whole = model.Model(preset(name)).to(torch.bfloat16)
    for tokens in (16, 512):
        assert sequence_bytes(whole.arch, tokens, 2) == Cache.row_bytes(whole, tokens)


def test_bytes_of_a_sampled_token():
    """A line as rl.py writes it: ids of a large vocabulary, log-probs of both sides, 3.5 letters a token."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 128_000, 4096, dtype=np.int32)
    logprobs = -rng.exponential(0.5, 4096).astype(np.float32)
    response = rl.Response(0, [], tokens, logprobs, "stop", "x" * int(3.5 * 4096), logp=logprobs)
    record = {"id": "p", "domain": "math", "prompt": "x" * 800}
    line = rl.sample_line(1, 0, response, [record])
    assert len(line) / 4096 == pytest.approx(rollouts.LINE_BYTES, rel=0.1)
