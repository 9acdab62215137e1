"""rl.py with answers that an untrained model gets right now and then: those whose first id is even. The rest,
penalties and all, is rl.py's."""

import rl
from rl import Config, launch, recipe

__all__ = ["Config", "launch", "main", "recipe"]
graded = rl.judge


def judge(responses, records, cfg):
    for r in graded(responses, records, cfg):
        r.correct = bool(r.tokens[0] % 2 == 0)
        r.terms["correct"] = float(r.correct)
        r.reward = sum(r.terms.values())
    return responses


def main(cfg):
    rl.judge = judge
    try:
        return rl.main(cfg)
    finally:
        rl.judge = graded
