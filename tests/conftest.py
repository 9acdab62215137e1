"""Shared by the tests: one thread a process (two busy processes on two cores are slower than one), quiet
libraries, the embedded world tokenized once, an exported toy."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world_data(tmp_path_factory):
    """The embedded world, tokenized once for all runs: --data=..."""
    from corpus.tokenizer import toy_tokenizer
    from corpus.tokenizing import prepare_toy
    folder = tmp_path_factory.mktemp("world")
    prepare_toy(str(folder), toy_tokenizer())
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """An untrained toy in hub format, as a run exports it: --init=..."""
    from model import load, save
    folder = tmp_path_factory.mktemp("exported") / "model"
    save(load("toy"), str(folder))
    return folder


class Interpreted:
    """tests/gpu in a process of its own (test_interpreter.py)."""

    def __init__(self, which):
        self.out = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "tests/gpu", "-m", which, "-p", "no:cacheprovider"],
            cwd=Path(__file__).parents[1], env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=self.out,
            stderr=subprocess.STDOUT)

    def wait(self, timeout):
        return self.process.wait(timeout)

    def said(self):
        self.out.seek(0)
        return self.out.read()[-20_000:]


def pytest_collection_finish(session):
    for item in session.items:
        if item.path.name == "test_interpreter.py" and not session.config.option.collectonly:
            which = item.callspec.params["which"]
            started = getattr(session.config, "interpreted", {})
            session.config.interpreted = started | {which: Interpreted(which)}


def pytest_unconfigure(config):
    for run in getattr(config, "interpreted", {}).values():
        run.process.kill()


@pytest.fixture
def interpreted(request):
    return request.config.interpreted[request.node.callspec.params["which"]]
