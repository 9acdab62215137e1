"""Forward and backward of the seven models, at their real widths with a layer of each kind; slow: whole."""

import pretend
import pytest
import torch
from shallow import SEVEN, shallow

import kernels
from model import preset


def training_pass(arch, recompute):
    """Every parameter gets a gradient of its kind on its device, and nothing waits for the device."""
    with pretend.cuda() as meter:
        net = pretend.model(arch)
        for layer in net.trunk.layers:
            layer.recompute = recompute
        tokens = torch.zeros(2, 6000, dtype=torch.int64, device="cuda")
        loss = net(tokens, None, tokens)
        loss.backward()
        assert loss.dtype == torch.float32
        for p in net.parameters():
            assert (p.grad.shape, p.grad.dtype, p.grad.device) == (p.shape, p.dtype, p.device)
    assert not meter.waits


@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
@pytest.mark.parametrize("name", SEVEN)
def test_training_pass(name, recompute):
    training_pass(shallow(name), recompute)


@pytest.mark.parametrize("name", ["granite-4-h-micro", "nemotron-h-8b", "mistral-7b"])
def test_plain_formulas(name, monkeypatch):
    """--kernels=torch: what a CPU runs, on a GPU."""
    monkeypatch.setattr(kernels, "chosen", "torch")
    training_pass(shallow(name), "off")


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVEN)
def test_whole_models(name):
    training_pass(preset(name), "full")
