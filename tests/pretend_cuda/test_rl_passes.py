"""RL's passes of a step: the reference and the policy score the responses, the update trains on them, a push
gathers the weights."""

import types

import numpy as np
import pretend
import pytest
import torch
from shallow import SEVEN, shallow

import rl
from engines.push import full_tensors


def responses(count, prompt, tokens):
    """Graded responses to one prompt, half of them right."""
    made = []
    for i in range(count):
        r = rl.Response(0, list(range(prompt)), np.arange(tokens, dtype=np.int32),
                        np.full(tokens, -1.0, dtype=np.float32), "stop", "")
        r.correct, r.reward = i % 2 == 0, float(i % 2 == 0)
        made.append(r)
    return made


def policy(name, cfg, ranks):
    """The sharded policy, by the function of the stage, of weights that are not there."""
    arch = shallow(name)
    init = types.SimpleNamespace(arch=arch, fill=lambda model: model)
    return rl.make_policy(init, None, cfg, ranks)


@pytest.mark.parametrize("name", SEVEN)
def test_step(name):
    """The host waits for the norm, for the metrics, and for the log-probs that go into samples.jsonl."""
    cfg = rl.Config(model=name, context=4096)
    with pretend.ranks(1, 8) as ranks, pretend.cuda() as meter:
        model = policy(name, cfg, ranks)
        optimizer = rl.make_optimizer(model, cfg)
        parameters = list(model.parameters())
        reference = rl.copy_weights(model, offload=False)
        samples = responses(16, prompt=100, tokens=2000)
        advantage = torch.ones(16, device="cuda")
        rows = rl.make_rows(samples, cfg, ranks)
        meter.waits.clear()

        with rl.reference_weights(reference, model):
            logps_ref = rl.score_rows(model, rows, 1.0)
        parts, logps = [], []
        for i, row in enumerate(rows):
            model.set_requires_all_reduce(i + 1 == len(rows))
            logp, entropy = rl.row_logprobs(model, row, 1.0)
            logps.append(logp.detach())
            counted = advantage[row.owner] > 0
            loss, part = rl.grpo_loss(logp, logps[-1], row.gen, logps_ref[i], advantage[row.owner], counted,
                                      cfg, advantage[row.owner])
            loss.backward()
            part["entropy"] = torch.where(counted, entropy.detach(), 0).sum(dtype=torch.float64)
            parts.append(part)
        assert not meter.waits
        rl.reduce_vectors(parameters)
        norm = rl.grad_norm(parameters, ranks.mesh)
        rl.optimizer_step(optimizer, parameters, 1e-6, norm, 1e-9)
        rl.polyak(reference.values(), parameters, 0.6)
        assert len(meter.waits) == 1
        meter.waits.clear()

        rl.keep_logprobs(samples, rows, logps)
        assert sum(meter.waits.values()) == 2 * len(rows)
        meter.waits.clear()
        told = rl.pool(parts)
        assert all(type(value) is float for value in told.values())
        assert sum(meter.waits.values()) == 1


@pytest.mark.parametrize("name", ["granite-4-h-micro", "llama-3.1-8b"])
def test_what_a_push_gathers(name):
    """Whole tensors in the engine's dtype, on the device, every parameter once."""
    with pretend.ranks(1, 8) as ranks, pretend.cuda():
        model = policy(name, rl.Config(model=name), ranks)
        whole = dict(full_tensors(model, torch.bfloat16))
        shapes = {key: p.shape for key, p in model.named_parameters()}
    assert {key: tensor.shape for key, tensor in whole.items()} == shapes
    assert {tensor.device.type for tensor in whole.values()} == {"cuda"}
    assert {tensor.dtype for tensor in whole.values() if tensor.ndim > 1} == {torch.bfloat16}
