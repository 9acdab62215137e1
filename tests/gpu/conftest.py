"""Tests of the Triton kernels. They run on a GPU where there is one (`make gpu`), and on CPU tensors under
Triton's interpreter (tests/test_interpreter.py, a process of its own). Neither: nothing is collected."""

import pytest
import torch

from kernels import INTERPRET

if not torch.cuda.is_available() and not INTERPRET:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
