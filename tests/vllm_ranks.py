"""A script for test_vllm.py, two ranks of torchrun: two replicas, one model of two halves, one child for
both; each rank its own prompts, the same samples every way, weights out of a sharded model, a child that
stalls."""

import os
import signal
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from cli import InputError  # noqa: E402
from engines.contract import EngineError  # noqa: E402
from engines.push import full_tensors  # noqa: E402
from engines.vllm_engine import VllmEngine  # noqa: E402
from model import load  # noqa: E402
from runtime import join_ranks, shard  # noqa: E402


@torch.no_grad()
def gap(model, prompts, samples):
    """The largest |difference| of a sampled token's log-prob from our own."""
    worst = 0
    for prompt, group in zip(prompts, samples, strict=True):
        for sample in group:
            logits = model(torch.tensor([prompt + sample.tokens]))[0, len(prompt) - 1:-1]
            ids = torch.tensor(sample.tokens)[:, None]
            ours = logits.log_softmax(-1).gather(-1, ids)[:, 0]
            worst = max(worst, (ours - torch.tensor(sample.logprobs)).abs().max().item())
    return worst


def folders():
    """What the pushes have left in memory."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("prism-vllm-")}


@torch.no_grad()
def disturb(plain, sharded, rank):
    """The same noise for a model and its sharded twin."""
    torch.manual_seed(0)
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        noise = torch.randn(p.shape) * 0.05
        p.add_(noise)
        if p.ndim > 1:
            q.to_local().add_(noise.chunk(2)[rank])
        else:
            q.add_(noise)


def main(ranks):
    before = folders()
    plain = load("random:toy-h")
    model = shard(load("random:toy-h"), ranks.mesh, torch.float32)
    prompts = [[7, 8, 9 + ranks.rank]] * (1 + ranks.rank) + [[5, 5]]
    tokens = []
    for options in dict(), dict(tensor_parallel=2), dict(layout="beside"):
        engine = VllmEngine(model, dtype="float32", context=512, timeout_s=120, max_batch=16, gpu_memory=0.3,
                            **options)
        samples = engine.generate(prompts, 2, max_new_tokens=12, stop=[])
        assert gap(plain, prompts, samples) < 1e-5
        tokens.append([[sample.tokens for sample in group] for group in samples])
        too_long = [[1] * (600 if ranks.rank else 6)]       # one rank's mistake: no other waits for ever
        try:
            engine.generate(too_long, max_new_tokens=2, stop=[])
            assert not (ranks.rank or options)
        except InputError as e:
            assert "prompt 0 has 600 tokens" in str(e)
        if not options.get("layout"):
            engine.close()
        assert ranks.sum(1) == [2]                          # our process group is still there
    assert tokens[0] == tokens[1] == tokens[2]

    # other weights for the child
    disturb(plain, model, ranks.rank)
    samples = engine.generate(prompts, 2, max_new_tokens=12, stop=[])
    assert gap(plain, prompts, samples) > 1e-3              # of the old weights
    engine.load_weights(full_tensors(model))
    samples = engine.generate(prompts, 2, max_new_tokens=12, stop=[])
    assert gap(plain, prompts, samples) < 1e-5
    assert not folders() - before

    # the child hangs: both ranks are told
    if ranks.rank == 0:
        engine.engine.timeout_s = 2
        os.kill(engine.engine.child.pid, signal.SIGSTOP)
    more_than_a_pipe_holds = [list(range(400))] * 400
    try:
        engine.generate(more_than_a_pipe_holds, max_new_tokens=4, stop=[])
    except EngineError as e:
        assert "stalled in generate, after 2 s: it is alive" in str(e)
        assert ranks.rank or engine.engine.child.poll() == -signal.SIGKILL
        print("all is well")
    engine.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join_ranks("cpu") as ranks:
        main(ranks)
