"""A training step under FSDP on process groups of 8, 128 and 144 ranks, as midtrain.main makes it."""

import pretend
import pytest
import torch
from shallow import SEVEN, shallow

import midtrain


def matrices(module):
    return sum(p.numel() for p in module.parameters() if p.ndim >= 2)


MESHES = [(name, 1, 8) for name in SEVEN] + [("granite-4-h-micro", 16, 8), ("mistral-24b", 18, 8)]
MORE = [pytest.param(name, replicate, 8, marks=pytest.mark.slow) for name in SEVEN for replicate in (16, 18)
        if (name, replicate, 8) not in MESHES]


@pytest.mark.parametrize("name, replicate, shard", MESHES + MORE)
def test_step(name, replicate, shard):
    """The host waits once a step, for the norm. A layer is gathered twice a pass; an untied head and an
    embedding once, for their gradients are not made from their weights."""
    cfg = midtrain.Config(model=name)
    with pretend.ranks(replicate, shard) as ranks, pretend.cuda() as meter:
        model = midtrain.build_model(shallow(name), cfg, ranks)
        embed, layers, _, head = model.trunk
        once = matrices(embed) + (matrices(head) if head else 0)
        twice = sum(map(matrices, layers))
        optimizer = midtrain.make_optimizer(model, cfg)
        batch = [torch.zeros(2, 4096, dtype=torch.int64, device="cuda") for _ in range(3)]
        meter.waits.clear()
        pretend.training_step(model, optimizer, batch, [1000, 3096], ranks)
    assert len(meter.waits) == 1 and "runtime.py" in str(meter.waits), meter.waits
    passes, bf16 = len(batch[0]), 2
    assert meter.moved["allgather_base", "bfloat16"] == passes * bf16 * (once + 2 * twice)
    assert meter.moved["reduce_scatter_base", "float32"] == passes * 4 * (once + twice)
