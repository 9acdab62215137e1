"""The kernels' benchmark without a GPU: its committed table has the rows it would measure, and it says what
it needs."""

import os
import re
import subprocess
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(*flags):
    return subprocess.run([sys.executable, os.path.join(ROOT, "benchmarks", "kernels.py"), *flags],
                          capture_output=True, text=True, timeout=120)


def test_the_committed_table_has_these_rows(tmp_path):
    made = run("--blank", f"--out={tmp_path / 'blank.md'}")
    assert made.returncode == 0, made.stderr
    with open(os.path.join(ROOT, "benchmarks", "results", "kernels.md")) as f:
        committed, blank = f.read(), (tmp_path / "blank.md").read_text()
    if "not yet measured" in committed:
        assert committed == blank
    else:                                             # titles, columns, sizes
        names = re.compile(r"^## .*|^\| size .*|^\| [^|]+", re.M)
        assert names.findall(committed) == names.findall(blank)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    made = run(f"--out={tmp_path / 'kernels.md'}")
    assert made.returncode == 2 and not made.stdout and not os.listdir(tmp_path)
    assert made.stderr == "benchmarks/kernels.py needs a CUDA GPU and Triton; this machine lacks one\n"
