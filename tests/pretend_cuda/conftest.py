"""Tests on a pretend GPU. They want pretend.py loaded before torch, so tests/test_pretend_cuda.py runs them
in a process of its own (pytest -p pretend); elsewhere nothing is collected."""

import sys

if "pretend" not in sys.modules:
    collect_ignore_glob = ["test_*.py"]
