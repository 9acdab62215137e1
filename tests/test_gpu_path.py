"""What only a GPU, or several, would have shown: each was a defect of the GPU path (tests/pretend_cuda traces
the rest of it)."""

import math
import os
import re
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import FORK

import midtrain
import rl
import runtime
from model import load

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA RTX 6000 Ada Generation", 364), ("NVIDIA B200", 2250),
    ("NVIDIA GeForce GTX 1080", math.nan), ("NVIDIA Z9000", math.nan)])
def test_peak_rates(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert runtime.peak_tflops(cuda, torch.bfloat16) == pytest.approx(peak, nan_ok=True)
    assert math.isnan(runtime.peak_tflops(cuda, torch.float32))


def test_a_device_without_a_rate_trains(tmp_path, world_data, monkeypatch):
    """MFU is a figure of the log: where the device's rate is not known the run goes on without it."""
    monkeypatch.setattr(midtrain, "peak_tflops", lambda device, dtype: math.nan)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Z9000")
    cfg = midtrain.Config(**midtrain.recipe("toy") | dict(
        run=str(tmp_path / "run"), data=str(world_data), mixture="base", steps=2, warmup=1, seq_len=32,
        batch=2, eval_rows=1, log_every=1, device="cpu"))
    midtrain.main(cfg)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "no MFU: no bfloat16 rate is listed for NVIDIA Z9000 (--peak_tflops=...)" in log
    assert log.count("| mfu - |") == 2 and "mfu nan" not in log
    assert '"mfu": null' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_installs_as_written():
    """pip builds a package where torch is not: one whose setup imports it cannot stand in a file, and a line
    that installs it must say --no-build-isolation."""
    want_torch = {"flash-attn", "mamba-ssm", "causal-conv1d"}
    for file in ROOT.glob("requirements*.txt"):
        names = {re.match(r"[\w-]*", line)[0] for line in file.read_text().splitlines()}
        assert not names & want_torch, file
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    installs = [line for line in pages.splitlines() if line.startswith("pip install")]
    assert any("-r requirements-gpu.txt" in line for line in installs)
    for line in installs:
        if want_torch & set(line.split("#")[0].split()):
            assert "--no-build-isolation" in line, line


def test_pooled_metrics_are_numbers():
    """What ranks tell each other: of a tensor, unpickling would need the sender's device."""
    parts = [{"tokens": torch.tensor(2.0, dtype=torch.float64), "ratio_max": torch.tensor(x)} for x in (1, 3)]
    pooled = rl.pool(parts)
    assert pooled == {"tokens": 4.0, "ratio_max": 3.0} and {type(x) for x in pooled.values()} == {float}
    assert rl.pool([pooled, pooled]) == {"tokens": 8.0, "ratio_max": 3.0}


def note_timeouts(rank, port, answers):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    with runtime.join_ranks("cpu", replicate=2, timeout_s=77) as ranks:
        groups = [dist.group.WORLD, *ranks.mesh.get_all_groups()]
        answers.put([group._get_backend(torch.device("cpu")).options._timeout for group in groups])


def test_a_meshs_groups_wait_as_long_as_all():
    """FSDP's groups are made by the mesh, which knows nothing of the timeout of the group of all."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answers = FORK.Queue()
    ranks = [FORK.Process(target=note_timeouts, args=(rank, port, answers), daemon=True) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for _ in ranks:
        assert answers.get(timeout=60) == [timedelta(seconds=77)] * 3
    for process in ranks:
        process.join()


@pytest.mark.parametrize("docs", [None, [[0, 0, 0, 1, 1, 2], [3, 3, 3, 3, 4, 5]]])
@pytest.mark.parametrize("name", ["toy", "toy-h"])
def test_lengths_of_the_host_are_those_of_the_device(name, docs):
    """The same loss to the last bit, whether the host says where documents end or the device is asked."""
    model = load(f"random:{name}")
    tokens = torch.arange(12).view(2, 6)
    lengths = [6, 6]
    if docs is not None:
        docs, lengths = torch.tensor(docs), [3, 2, 1, 4, 1, 1]
    asked, told = model(tokens, docs, tokens), model(tokens, docs, tokens, lengths)
    assert torch.equal(asked, told)
