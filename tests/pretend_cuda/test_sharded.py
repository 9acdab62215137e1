"""A training step under FSDP on a process group of 8, 128 and 144 ranks, as midtrain.main makes it."""

import pretend
import pytest
import torch
from shallow import SEVEN, shallow

import midtrain
import runtime


def training_step(model, optimizer, parameters, batch, ranks, rows_per_pass=1):
    """The passes and the update of midtrain.main's loop."""
    tokens, docs, targets = batch
    rows = len(tokens)
    loss_sum = torch.zeros((), device=ranks.device)
    for first in range(0, rows, rows_per_pass):
        part = slice(first, first + rows_per_pass)
        model.set_requires_all_reduce(first + rows_per_pass >= rows)
        loss = model(tokens[part], None, targets[part]) / 100
        loss.backward()
        loss_sum += loss.detach()
    runtime.reduce_vectors(parameters)
    norm = runtime.grad_norm(parameters, ranks.mesh)
    for p in parameters:
        p.grad.mul_(1 / norm)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("replicate, shard", [(1, 8), (16, 8), (18, 8)])
@pytest.mark.parametrize("name", SEVEN)
def test_step(name, replicate, shard):
    arch = shallow(name)
    cfg = midtrain.Config(model=name, recompute="full")
    with pretend.ranks(replicate, shard) as ranks, pretend.cuda() as meter:
        model = midtrain.build_model(arch, cfg, ranks)
        optimizer = midtrain.make_optimizer(model, cfg)
        parameters = list(model.parameters())
        batch = [torch.zeros(2, 4096, dtype=torch.int64, device="cuda") for _ in range(3)]
        meter.waits.clear()
        training_step(model, optimizer, parameters, batch, ranks)
        print(meter.waits, dict(meter.moved), meter.launches.most_common(12), meter.launches.total())
