"""tests/gpu under Triton's interpreter, in a process of its own: it must be asked for before Triton is
imported, and one that has interpreted cannot compile."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("what", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted(what):
    done = subprocess.run([sys.executable, "-m", "pytest", "tests/gpu", "-m", what, "-p", "no:cacheprovider"],
                          cwd=Path(__file__).parents[1], env=os.environ | {"TRITON_INTERPRET": "1"},
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout), done.stdout[-20_000:]
