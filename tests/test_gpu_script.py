"""benchmarks/gpu.py, which runs where a GPU is lent for minutes: on toys of a CPU, cut and killed."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(out, *flags):
    return [sys.executable, str(SCRIPT), "--device=cpu", f"--out={out}", *flags]


def rows(folder):
    lines = [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]
    return [line["row"] for line in lines if "row" in line]


def test_page_of_what_there_is(gpu, tmp_path):
    """Of a part that began again the last run counts; a line that was cut short is no line."""
    path = tmp_path / "gpu.jsonl"
    gpu.append(path, part="decode", begins="1 May, an H100")
    gpu.append(path, part="decode", row={"model": "old", "tokens/s": 1.0})
    gpu.append(path, part="decode", begins="2 May, an H200")
    gpu.append(path, part="decode", row={"model": "toy", "tokens/s": 1234.5678})
    gpu.append(path, part="decode", row={"model": "toy-h", "GB": 1.5})
    with open(path, "a") as f:
        f.write('{"part": "decode", "row": {"mod')
    text = gpu.page(gpu.read_lines(path))
    assert "## decode: cut\n\n2 May, an H200." in text and "old" not in text
    assert "| model | tokens/s | GB |" in text
    assert "| toy | 1235 |  |" in text and "| toy-h |  | 1.5 |" in text
    assert text.count("Not yet measured.") == len(gpu.PARTS) - 1
    assert (ROOT / "benchmarks" / "results" / "gpu.md").read_text().startswith("# On a GPU\n")


def test_a_part_is_cut_at_its_limit(gpu, tmp_path):
    args = types.SimpleNamespace(device="cpu", out=str(tmp_path))
    start = time.monotonic()
    assert gpu.run_part("train", 0.5, args).startswith("cut after 0 s")
    assert time.monotonic() - start < 5


def test_a_peer_that_fails(gpu, monkeypatch):
    """It leaves a row that says why, and none of its memory to the rows after it."""
    alive = []
    held_by_ours = []

    def their_step(name, recompute, sizes, device):
        weights = torch.zeros(8)
        alive.append(weakref.ref(weights))

        def step():
            raise torch.OutOfMemoryError(f"no room beside {weights.nbytes} bytes")
        return step, None

    def our_step(*args, make=gpu.our_step):
        held_by_ours.append(any(weights() is not None for weights in alive))
        return make(*args)

    monkeypatch.setattr(gpu, "their_step", their_step)
    monkeypatch.setattr(gpu, "our_step", our_step)
    measured = list(gpu.train(torch.device("cpu"), dict(models=["toy"], tokens=16, steps=1, dtype="float32")))
    assert measured[1]["none, since"] == "no room beside 32 bytes"
    assert [row["recompute"] for row in measured if "MFU" in row] == ["full", "selective", "off"]
    assert alive[0]() is None and not any(held_by_ours)


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    """What was measured before is kept, and not measured again."""
    flags = ["--parts=decode,train,counts"]
    first = subprocess.Popen(command(tmp_path, *flags), cwd=ROOT, text=True, stdout=subprocess.PIPE)
    for line in first.stdout:
        if line.startswith("decode: ok"):
            break
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert "## decode: ok" in (tmp_path / "gpu.md").read_text()
    second = subprocess.run(command(tmp_path, *flags), cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "decode" not in second.stdout and "train: ok" in second.stdout and "counts: ok" in second.stdout
    gaps = [row["nats from a whole pass"] for row in rows(tmp_path) if "nats from a whole pass" in row]
    assert len(gaps) == 2 and max(gaps) < 1e-5
    assert sum("MFU" in row for row in rows(tmp_path)) == 8          # the first run's child ended with it


@pytest.mark.slow
def test_the_rest_in_miniature(tmp_path):
    run = subprocess.run(command(tmp_path, "--parts=tests,rl,kernels"), cwd=ROOT, text=True,
                         capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    text = (tmp_path / "gpu.md").read_text()
    assert "| s of sampling |" in text and "## tests: ok" in text
    assert next(row for row in rows(tmp_path) if "passed" in row)["passed"] > 0
