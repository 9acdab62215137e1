"""Shared by the tests: one thread a process (two busy processes on two cores are slower than one), quiet
libraries, the embedded world tokenized once, an exported toy."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

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


def refuse_tensors(collective):
    """An object collective that refuses tensors: unpickled by another rank they are on the sender's GPU."""
    def refusing(*args, **kwargs):
        for leaf in tree_leaves((args, kwargs)):
            assert not isinstance(leaf, torch.Tensor), f"a tensor of {leaf.shape} in {collective.__name__}"
        return collective(*args, **kwargs)
    return refusing


@pytest.fixture(autouse=True)
def plain_objects(monkeypatch):
    """In every test, ranks tell each other plain values only."""
    for name in ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"):
        monkeypatch.setattr(dist, name, refuse_tensors(getattr(dist, name)))


# Files that take longest, first: the two processes of `make test` then end together (xdist itself would begin
# with the files of many tests).
LONGEST = ("test_vllm", "test_runs", "test_verify", "test_evaluate", "test_generate", "test_interpreter",
           "test_pretend_cuda", "test_readme", "test_refusals", "test_gpu_script")


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
