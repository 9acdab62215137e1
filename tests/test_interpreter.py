"""tests/gpu under Triton's interpreter, in a process of its own: it must be asked for before Triton is
imported, and one that has interpreted cannot compile. Of every op the unmarked tests take float64 and two
shapes, an odd one with documents and one of a single element; `make soak` runs the others."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted(which):
    run = subprocess.run([sys.executable, "-m", "pytest", "tests/gpu", "-m", which, "-p", "no:cacheprovider"],
                         cwd=Path(__file__).parents[1], env=os.environ | {"TRITON_INTERPRET": "1"},
                         capture_output=True, text=True, timeout=900)
    output = run.stdout[-20_000:] + run.stderr[-2_000:]
    assert run.returncode == 0, output
    assert re.search(r"\d+ passed", output), output
