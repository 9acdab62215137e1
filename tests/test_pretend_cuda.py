"""tests/pretend_cuda in a process of its own: torch must be told of the GPU before it is imported. On every
commit shallow models of real widths; `make soak` traces the real depths."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++: the pretend GPU's guard cannot be compiled")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_a_pretend_gpu(which):
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "pretend", "tests/pretend_cuda", "-m", which,
                          "-p", "no:cacheprovider"],
                         cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT / "tests" / "pretend_cuda")},
                         capture_output=True, text=True, timeout=900)
    output = run.stdout[-20_000:] + run.stderr[-2_000:]
    assert run.returncode == 0, output
    assert re.search(r"\d+ passed", output), output
