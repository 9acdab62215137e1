"""tests/gpu under Triton's interpreter, in a process of its own: it must be asked for before Triton is
imported, and one that has interpreted cannot compile. It starts when the session does, on the second core,
and this test waits for it."""

import re

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted(which, interpreted):
    assert interpreted.wait(timeout=900) == 0, interpreted.said()
    assert re.search(r"\d+ passed", interpreted.said()), interpreted.said()
