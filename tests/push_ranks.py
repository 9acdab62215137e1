"""A stage for test_generate.py: a sharded trainer, an engine on each rank; fresh after every change, an
error on both or on none."""

from dataclasses import dataclass

import torch

from cli import launch
from engines.contract import EngineError
from engines.embedded import TorchEngine
from engines.push import StaleWeights, push
from model import load, save
from runtime import join_ranks, shard

__all__ = ["Config", "launch", "main", "recipe"]


@dataclass
class Config:
    folder: str = ""                     # where a trainer is saved


def recipe(model):
    return {}


def check(name, ranks, folder):
    plain, trainer = load(f"random:{name}"), shard(load(f"random:{name}"), ranks.mesh, torch.bfloat16)
    engine = TorchEngine(load(f"random:{name}"), progress=False)
    assert push(engine, trainer) < 0.02                   # trainer in bf16, engine in fp32

    # changed without a backward in between: a gathered copy of before must not be what is pushed or saved
    with torch.no_grad():
        for p, q in zip(plain.parameters(), dict(trainer.named_parameters()).values(), strict=True):
            p.mul_(1.5)
            (q.to_local() if p.ndim > 1 else q).mul_(1.5)
    assert push(engine, trainer) < 0.02
    mine = dict(engine.model.named_parameters())
    assert all(torch.equal(mine[n], p) for n, p in plain.named_parameters())
    save(trainer, folder)
    torch.distributed.barrier()
    saved = dict(load(folder).named_parameters())
    torch.distributed.barrier()
    assert all(torch.equal(saved[n], p) for n, p in plain.named_parameters())

    # stale on one rank: both are told, both keep their trainer's weights
    if ranks.rank:
        arrives = engine.load_weights
        old = {n: p.detach().clone() for n, p in mine.items() if "v_proj" in n}
        engine.load_weights = lambda pairs: arrives((n, old.get(n, t)) for n, t in pairs)
    with torch.no_grad():
        for n, p in trainer.named_parameters():
            if "v_proj" in n:
                p.to_local().mul_(-9)
    try:
        push(engine, trainer)
        raise SystemExit("not caught")
    except StaleWeights as e:
        assert "v_proj.weight does not arrive" in str(e), e
    # an engine that fails on one rank
    def fails(*args, **more):
        raise EngineError("out of memory")
    if ranks.rank:
        engine.load_weights, engine.generate = arrives, fails
    try:
        push(engine, trainer)
        raise SystemExit("not caught")
    except EngineError as e:
        assert str(e) == ("out of memory" if ranks.rank else "the engine of another rank failed")


def main(cfg):
    with join_ranks("cpu") as ranks:
        for name in ("toy", "toy-nemotron-h"):
            check(name, ranks, cfg.folder)
        print("all is well")
