"""The embedded engine's decode step as a graph, without a GPU: a stand-in for CUDA's graphs records every op
with its tensors, and at a replay runs the same ops on the same memory. What a GPU's graph would freeze
(sizes, numbers of Python's) it freezes too, and it refuses what a capture refuses."""

import pytest
import torch
from checkpoints import ROOMY, make, write_tokenizer
from test_generate import flat, some_prompts, tokens, worst
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cli import InputError
from engines import embedded
from engines.embedded import TorchEngine
from model import load

# -- a graph without a GPU -----------------------------------------------------------------------------------

# Ways from the device to the host, or back from its pageable memory: each ends a capture.
HOST = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__int__,
        torch.Tensor.__float__, torch.Tensor.__bool__, torch.Tensor.__index__, torch.tensor, torch.as_tensor,
        torch.from_numpy}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount"}


class Refusal(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in HOST:
            raise RuntimeError(f"{function.__name__} waits for the device within a capture")
        return function(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Every op that runs, with its arguments and what it returned."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.split("::")[1]
        by_mask = name.startswith("index") and any(t.dtype == torch.bool for t in tensors(args[1:2]))
        if name in WAITING or by_mask:
            raise RuntimeError(f"{name} waits for the device within a capture")
        out = op(*args, **(kwargs or {}))
        self.ops.append((op, args, kwargs or {}, out))
        return out


class EmulatedCapture:
    """CudaCapture's interface: the run whose results count is the one recorded."""

    def __init__(self):
        self.graphs = self.replays = 0

    def __call__(self, function):
        self.graphs += 1
        recorder = Recorder()
        with Refusal(), recorder:
            function()

        def replay():
            self.replays += 1
            for op, args, kwargs, recorded in recorder.ops:
                again = op(*args, **kwargs)
                for old, new in zip(tensors(recorded), tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                        old.copy_(new)

        return replay


def tensors(tree):
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def with_graphs(model, **options):
    """An engine with such graphs, and its captures: one a call."""
    engine = TorchEngine(model, graphs=True, **options)
    captures = []

    def capture():
        captures.append(EmulatedCapture())
        return captures[-1]

    engine.capture = capture
    return engine, captures


# -- equal to the steps without ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> a tiny model with the toy tokenizer."""
    made = {}
    for name in ("llama-3.1-8b", "mistral-7b", "granite-4-h-micro", "nemotron-h-8b"):
        folder = str(tmp_path_factory.mktemp(name))
        make(name, folder, **ROOMY)
        write_tokenizer(folder)
        made[name] = load(folder)
    return made


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mistral-7b", "granite-4-h-micro", "nemotron-h-8b"])
def test_graphs_change_nothing(name, models):
    """Prompts and samples longer than Mistral's window of 9, groups of which some rows wait, ends by an id, a
    string or the length: the same tokens, and log-probs as exact."""
    model = models[name]
    prompts = some_prompts(1, 7, 33, 12, 20)
    settings = dict(max_new_tokens=40, temperature=0.8, top_p=0.95, seed=3, stop=[*range(100, 104), "th"])
    engine, captures = with_graphs(model, max_batch=6)
    samples = engine.generate(prompts, 3, **settings)
    assert tokens(samples) == tokens(TorchEngine(model, max_batch=6).generate(prompts, 3, **settings))
    assert worst(model, prompts, samples, 0.8, 0.95) <= 1e-5
    assert {sample.finish_reason for sample in flat(samples)} == {"stop", "length"}
    capture, = captures
    print(capture.graphs, capture.replays)
    assert capture.graphs <= 12 and capture.replays > 3 * capture.graphs


# -- what a capture refuses ----------------------------------------------------------------------------------

@pytest.mark.parametrize("read", [
    lambda counts: int(counts.max()), lambda counts: counts.tolist(), lambda counts: counts.numpy(),
    lambda counts: counts.cpu(), lambda counts: bool((counts > 0).all()), lambda counts: counts.nonzero(),
    lambda counts: counts[counts > 0], lambda counts: torch.tensor([0]), lambda counts: range(counts[0]),
])
def test_a_host_read_within_a_step_is_refused(read, models, monkeypatch):
    """The stand-in notices what a GPU would refuse."""
    class Reads(embedded.Decode):
        def __init__(self, cache, arch, inputs, sizes):
            super().__init__(cache, arch, inputs, sizes)
            read(inputs.counts)

    monkeypatch.setattr(embedded, "Decode", Reads)
    engine, _ = with_graphs(models["llama-3.1-8b"])
    with pytest.raises(RuntimeError, match="waits for the device within a capture"):
        engine.generate([[1]], max_new_tokens=8, stop=[])


def test_graphs_want_a_gpu(models):
    model = models["llama-3.1-8b"]
    assert not TorchEngine(model).graphs
    with pytest.raises(InputError, match="graphs=True: there is no GPU"):
        TorchEngine(model, graphs=True).generate([[1]], max_new_tokens=1)
