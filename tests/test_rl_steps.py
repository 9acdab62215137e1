"""The gradients of rl.main, for every option of the loss, are those of plain loops over one response at a
time, in float64 with all logits: whatever the rows, their order, empty ones among them, one rank or two.

Rollouts are hand-made and come by --replay, so that all of main is in between: filtering, advantages, masks,
weights of tokens, packing, the passes of policy, old policy and reference, the loss, the sums over ranks.
"""

import contextlib
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from processes import Process
from torch.distributed.tensor import DTensor
from torch.func import functional_call

import rl
from cli import parse
from corpus.prompts import encode_prompt
from model import load
from rl import Config, launch, recipe  # noqa: F401  (this file is a stage too: `main`, for two ranks)
from runtime import join_ranks

BASE = ["--model=toy", "--heldout=none", "--steps=2", "--batch=4", "--group=4", "--context=64",
        "--row_tokens=64", "--eval_every=0", "--checkpoint_every=0", "--ref_every=0", "--lr=1",
        "--eps=1"]
# Shares of the largest gradient: of the first update, at equal weights, 1e-6 (seen: 5e-7, sums in fp32 in
# another order); CLOSE to the loops in float64, and between runs whose weights are an ulp apart after an
# update (seen: 8e-7). A plain descent (eps = 1): AdamW proper would blow the rounding of tiny gradients up.
CLOSE = 2e-6
# Two steps each: in the second the reference is another model than the policy. The first three have every
# value of every option between them (but beta = 0); the others, one thing at a time, are run by `make soak`.
OPTIONS = {
    "paper": {},
    "all else": dict(tis=0.0, kl="k1", beta=0.5, loss="sequence", mask_truncated=True, temperature=0.7,
                     eta=0.1, ref_every=1, clip=0.1),
    "two updates, all else": dict(updates=2, clip_low=0.05, clip_high=0.02, tis=1.1, kl="k2", beta=0.5,
                                  loss="constant", advantage="mean", mask_truncated=True, ref_every=1,
                                  ref_alpha=0.3),
    "k1, sequence, masked": dict(kl="k1", beta=0.5, loss="sequence", mask_truncated=True),
    "k2, constant, mean": dict(kl="k2", beta=0.5, loss="constant", advantage="mean"),
    "polyak, temperature": dict(beta=0.5, ref_every=1, temperature=0.7),
    "no kl": dict(beta=0.0, eta=0.1, clip=0.1),
    "no tis": dict(tis=0.0, beta=0.5),
    "two updates": dict(updates=2, clip_low=0.02, clip_high=0.05),
}
COMMITTED = ["paper", "all else", "two updates, all else"]
TWO = ["paper", "two updates, all else"]                 # on two ranks as well


# -- the run -------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def watched():
    """Lets rl.main run as it is and notes weights and gradients of every update, before it clips."""
    seen, norm = [], rl.grad_norm

    def note(parameters, mesh):
        def full(x):
            return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
        seen.append(([full(p) for p in parameters], [full(p.grad) for p in parameters]))
        return norm(parameters, mesh)

    rl.grad_norm = note
    try:
        yield seen
    finally:
        rl.grad_norm = norm


def main(cfg):
    """What each of two ranks does: all OPTIONS, one after the other, in one process group."""
    with join_ranks("cpu") as ranks:
        rl.join_ranks = lambda *_: contextlib.nullcontext(ranks)
        for name in TWO:
            options = OPTIONS[name]
            with watched() as seen:
                rl.main(dataclasses.replace(cfg, run=f"{cfg.run}/{name}", **options))
            if ranks.rank == 0:
                torch.save(seen, f"{cfg.run}/{name}.pt")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model, four prompts, two steps of four responses to each: random tokens, one in four cut off,
    log-probs that are the model's with an error, random rewards; a group that is all right; in three groups a
    response that the machine could not grade."""
    from checkpoints import ROOMY, make, write_tokenizer  # loads transformers, which the two ranks do without
    folder = tmp_path_factory.mktemp("steps")
    make("llama-tied", folder / "model", shards=1, initializer_range=0.05, **ROOMY)
    write_tokenizer(folder / "model")
    model, rng, lines = load(str(folder / "model")), np.random.default_rng(0), []
    prompts = [{"id": str(i), "domain": "math", "prompt": "What is 1" + " + 1" * i + "?", "truth": str(i + 1)}
               for i in range(4)]
    for step, (i, prompt) in itertools.product((1, 2), enumerate(prompts)):
        ids = encode_prompt(model.tokenizer, prompt["prompt"])
        for j in range(4):
            tokens = rng.integers(0, 508, rng.integers(1, 30)).tolist()
            with torch.no_grad():
                own = log_probs(model, dict(model.named_parameters()), ids, tokens, 1.0)
            gen = own.double().numpy() + 0.4 * rng.standard_normal(len(tokens)) + 0.3 * rng.standard_normal()
            correct = i == 2 or j < 2
            verdict = "not decided in time" if i != 1 and j == 3 else ""
            lines.append(dict(step=step, group=i, id=str(i), tokens=tokens, gen=gen.tolist(), text="",
                              finish="length" if j % 3 == 1 else "stop", correct=correct, verdict=verdict,
                              terms={}, reward=1.0 if i == 2 else float(correct - rng.integers(4) / 8)))
    for name, content in (("prompts", prompts), ("samples", lines)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    for line in lines:
        line["ids"] = encode_prompt(model.tokenizer, prompts[line["group"]]["prompt"])
        line["gen"] = np.float32(line["gen"]).tolist()
    return folder, model, lines


@pytest.fixture(scope="module")
def one_rank(files, tmp_path_factory):
    """one_rank(name): (gradients, metrics) of OPTIONS[name] on one rank, in rows of 64; each is run once."""
    runs = {}

    def run(name):
        if name not in runs:
            folder = tmp_path_factory.mktemp("one") / "run"
            with watched() as seen:
                rl.main(config(files, folder, **OPTIONS[name]))
            runs[name] = seen, read(folder / "metrics.jsonl")
        return runs[name]

    return run


def config(files, run, **options):
    return dataclasses.replace(parse(Config, [*flags(files[0]), f"--run={run}"], recipe), **options)


def flags(folder):
    return [*BASE, f"--init={folder}/model", f"--prompts={folder}/prompts.jsonl",
            f"--replay={folder}/samples.jsonl"]


# -- the loops -----------------------------------------------------------------------------------------------

def log_probs(model, weights, ids, tokens, temperature):
    """Of a response, alone, from the log-softmax of all logits of ids that have a text."""
    logits = functional_call(model, weights, (torch.tensor([ids + tokens]), None,
                                              lambda h, weight, scale: h @ weight.T * scale))
    logits = logits[len(ids) - 1:-1, :model.tokenizer.vocab_size] / temperature
    return logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]


def loop_loss(model, new, old, reference, lines, cfg):
    """Minus J of the step, response after response, token after token."""
    groups = [[r for r in lines if r["group"] == i] for i in range(4)]
    groups = [g for g in groups if len({r["correct"] for r in g}) == 2]
    lengths = [[0 if r["verdict"] or cfg.mask_truncated and r["finish"] == "length" else len(r["tokens"])
                for r in g] for g in groups]
    n = [length for own in lengths for length in own]
    loss = torch.zeros((), dtype=torch.float64)
    for g, own in zip(groups, lengths, strict=True):
        rewards = [r["reward"] for r in g if not r["verdict"]]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
        for r, length in zip(g, own, strict=True):
            A = (r["reward"] - mean) / (std + cfg.eta if cfg.advantage == "std" else 1)
            with torch.no_grad():
                before, ref = (log_probs(model, w, r["ids"], r["tokens"], cfg.temperature).tolist()
                               for w in (old, reference))
            if not length:
                continue
            w = 1 / {"token": sum(n), "constant": len(n) * cfg.context,
                     "sequence": length * sum(x > 0 for x in n)}[cfg.loss]
            now = log_probs(model, new, r["ids"], r["tokens"], cfg.temperature)
            for logp, b, s, k in zip(now, before, r["gen"], ref, strict=True):
                ratio, x = (logp - b).exp(), logp - k
                bound = min(max(ratio.item(), 1 - cfg.clip_low), 1 + cfg.clip_high)
                surrogate = ratio * A if ratio.item() * A <= bound * A else bound * A
                correction = min(math.exp(b - s), cfg.tis) if cfg.tis else 1.0
                kl = {"k1": x, "k2": x * x / 2, "k3": (-x).exp() - 1 + x}[cfg.kl]
                loss = loss - w * (correction * surrogate - cfg.beta * kl)
    return loss


def check(seen, files, cfg, metrics):
    """All gradients of a run against the loops', at the weights that the run had."""
    _, model, lines = files
    names, model = [n for n, _ in model.named_parameters()], model.double()
    weights = [{n: w.double() for n, w in zip(names, own, strict=True)} for own, _ in seen]
    assert len(seen) == 2 * cfg.updates
    reference = weights[0]
    for i, (_, grads) in enumerate(seen):
        step, first = i // cfg.updates, weights[i - i % cfg.updates]
        if step and i % cfg.updates == 0 and cfg.ref_every:
            a = cfg.ref_alpha
            reference = {n: a * first[n] + (1 - a) * reference[n] for n in names}
        new = {n: w.clone().requires_grad_() for n, w in weights[i].items()}
        loss = loop_loss(model, new, first, reference, [r for r in lines if r["step"] == step + 1], cfg)
        expected = torch.autograd.grad(loss, list(new.values()))
        assert off(grads, expected) < CLOSE, i
    norm = math.sqrt(sum(g.double().square().sum() for g in seen[0][1]))
    for p, g, after in zip(*seen[0], seen[1][0], strict=True):            # AdamW's first step, by hand
        g = g * min(1.0, cfg.clip / norm)
        assert torch.allclose(after, p - cfg.lr * g / (g.abs() + cfg.eps), atol=1e-6)
    assert metrics[0]["gnorm"] == pytest.approx(norm if cfg.updates == 1 else metrics[0]["gnorm"], rel=1e-6)
    assert metrics[-1]["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert cfg.updates == 1 or metrics[0]["clip_low"] > 0 < metrics[0]["clip_high"]


def off(grads, expected):
    """The largest difference, as a share of the largest gradient."""
    largest = max(g.abs().max() for g in expected)
    return max((g - e).abs().max() for g, e in zip(grads, expected, strict=True)) / largest


def same(ours, theirs):
    """Two runs have the same gradients, at all updates."""
    for i, ((_, a), (_, b)) in enumerate(zip(ours, theirs, strict=True)):
        assert off(a, b) < (CLOSE if i else 1e-6), i


def read(path):
    return [json.loads(line) for line in open(path)]


# -- ways to lay out rows ------------------------------------------------------------------------------------

def alone(lengths, capacity, ranks):
    """A response a row, in a random order, rows without any among them."""
    rows = [[i] for i in np.random.default_rng(1).permutation(len(lengths)).tolist()]
    return [[[], *rows[:5], [], *rows[5:]]]


WAYS = [dict(row_tokens=1000), None]


@pytest.mark.parametrize("name", [name if name in COMMITTED else pytest.param(name, marks=pytest.mark.slow)
                                  for name in OPTIONS])
def test_gradients_are_the_loops_and_do_not_know_of_rows(name, files, one_rank, tmp_path, monkeypatch):
    first, metrics = one_rank(name)
    check(first, files, config(files, tmp_path, **OPTIONS[name]), metrics)
    for i, way in enumerate(WAYS):
        if way is None:
            monkeypatch.setattr(rl, "pack", alone)
        with watched() as seen:
            rl.main(config(files, f"{tmp_path}/{i}", **OPTIONS[name], **(way or {})))
        same(seen, first)


def test_two_ranks_have_the_same_gradients(files, one_rank, tmp_path):
    """All of it in one pair of processes; of rows of 72 the second gets an empty one."""
    sizes = [len(r["ids"]) + len(r["tokens"]) for r in files[2] if r["step"] == 2]
    assert rl.pack(sizes, 72, 2)[1][-1] == []
    two = Process(tmp_path, *flags(files[0]), "--row_tokens=72", f"--run={tmp_path}", world=2,
                  stage="test_rl_steps", OMP_NUM_THREADS="1")
    assert two.wait(120) == 0, two.text("stderr")
    for name in TWO:
        same(torch.load(tmp_path / f"{name}.pt"), one_rank(name)[0])
