"""rl.py's mathematics against loops over responses and tokens in plain Python floats, gradients by central
differences; the paper's formula worked by hand; the gradient does not know how tokens were batched."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rl
from cli import InputError
from kernels.logprob import token_logprobs
from rl import (
    KL,
    advantages,
    averages,
    kl_estimate,
    pack,
    polyak,
    pool,
    token_weights,
)
from suite.intervals import pass_at_k


def grpo_loss(logp, old, gen, ref, advantage, weights, cfg):
    """A batch that comes in parts: weights of its tokens, 0 where one does not count."""
    return rl.grpo_loss(logp, old, gen, ref, advantage, weights > 0, cfg, weights)


PAPER = dict(clip_low=0.2, clip_high=0.2, tis=2.0, beta=0.05, kl="k3")


def config(**changed):
    return SimpleNamespace(**{**PAPER, **changed})


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -- the loops ----------------------------------------------------------------------------------------------

def loop_kl(a, b, kind):
    x = min(max(a - b, -40), 40)
    return {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[kind]


def loop_loss(new, old, gen, ref, advantage, counted, cfg, kind, limit):
    """Lists of lists, [response][token]; advantage [response]. Returns loss, {metric: mean or maximum}."""
    lengths = [sum(row) for row in counted]
    loss, seen = 0.0, {name: [] for name in ("ratio", "clip_low", "clip_high", "tis", "tis_cut", *KL,
                                             "mismatch", "mismatch_kl")}
    for i, A in enumerate(advantage):
        places = [t for t in range(len(new[i])) if counted[i][t]]
        if not places:
            continue
        of_response = 0.0
        for t in places:
            ratio = math.exp(min(max(new[i][t] - old[i][t], -20), 20))
            clipped = min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high)
            surrogate = min(ratio * A, clipped * A)
            raw = math.exp(min(max(old[i][t] - gen[i][t], -10), 10))
            correction = min(raw, cfg.tis) if cfg.tis else 1.0
            of_response -= correction * surrogate - cfg.beta * loop_kl(new[i][t], ref[i][t], cfg.kl)
            seen["ratio"].append(ratio)
            seen["clip_low"].append(A < 0 and ratio < 1 - cfg.clip_low)
            seen["clip_high"].append(A > 0 and ratio > 1 + cfg.clip_high)
            seen["tis"].append(raw)
            seen["tis_cut"].append(cfg.tis > 0 and raw > cfg.tis)
            for name in KL:
                seen[name].append(loop_kl(new[i][t], ref[i][t], name))
            seen["mismatch"].append(abs(old[i][t] - gen[i][t]))
            seen["mismatch_kl"].append(loop_kl(gen[i][t], old[i][t], "k3"))
        loss += of_response / {"token": sum(lengths), "constant": len(new) * limit,
                               "sequence": len(places) * sum(n > 0 for n in lengths)}[kind]
    metrics = {name: sum(values) / max(len(values), 1) for name, values in seen.items()}
    return loss, metrics | {f"{name}_max": max(seen[name], default=0.0) for name in ("ratio", "tis")}


def random_step(R=5, T=7, spread=0.3, masked=(3,)):
    """Log-probs (R, T) float64 of policy, old, sampler, reference; advantage (R, 1); counted (R, T), none of
    the responses `masked`."""
    old = -2 * torch.rand(R, T, dtype=torch.float64)
    new, gen, ref = (old + spread * torch.randn(R, T, dtype=torch.float64) for _ in range(3))
    gen[1] = old[1] - 0.8                                     # a response that the correction cuts
    lengths = torch.randint(1, T + 1, (R,))
    lengths[list(masked)] = 0
    return new, old, gen, ref, torch.randn(R, 1, dtype=torch.float64), torch.arange(T) < lengths[:, None]


def weights_of(counted, kind, limit):
    return token_weights(counted.sum(1), kind, limit)[:, None].double() * counted


# tis, clip, beta, on-policy
OPTIONS = list(itertools.product((0.0, 2.0), ((0.2, 0.2), (0.1, 0.272)), (0.0, 0.05), (False, True)))


@pytest.mark.parametrize("kind", ["token", "constant", "sequence"])
@pytest.mark.parametrize("kl", KL)
def test_loss_gradient_and_metrics_are_the_loops(kind, kl):
    """All combinations; the gradient of each log-prob by central differences of the loops' loss."""
    exercised = set()
    for tis, clip, beta, on_policy in OPTIONS:
        new, old, gen, ref, advantage, counted = random_step()
        if on_policy:
            old = new.clone()
        cfg = config(clip_low=clip[0], clip_high=clip[1], tis=tis, beta=beta, kl=kl)
        new.requires_grad_()
        loss, metrics = grpo_loss(new, old, gen, ref, advantage, weights_of(counted, kind, 9), cfg)
        grad, = torch.autograd.grad(loss, new)
        lists = [x.tolist() for x in (new, old, gen, ref, advantage[:, 0], counted)]
        expected, means = loop_loss(*lists, cfg, kind, 9)
        assert loss.item() == pytest.approx(expected, rel=1e-6)               # weights are fp32
        assert averages(metrics) == pytest.approx(means, rel=1e-12, abs=1e-15)
        assert metrics["tokens"] == counted.sum()
        exercised |= {name for name, mean in means.items() if mean}
        for i, t in itertools.product(*map(range, new.shape)):
            both = []
            for h in (1e-5, -1e-5):
                lists[0][i][t] = new[i, t].item() + h
                both.append(loop_loss(*lists, cfg, kind, 9)[0])
            lists[0][i][t] = new[i, t].item()
            assert grad[i, t].item() == pytest.approx((both[0] - both[1]) / 2e-5, rel=1e-5, abs=1e-9)
    assert exercised == set(means)


def test_the_papers_formula_by_hand():
    """Rewards 1, 0, 0, 1 of G = 4: mean 1/2, deviation 1/2, advantages +-1 (eta 0). Two tokens of the first
    response, one of the second: rho 1.5 clipped to 1.2 and weighed by min(4, 2); rho 0.5 with A > 0 not
    clipped, weight 1; rho 0.5 with A < 0 clipped to 0.8, weight 1 / 4."""
    A = advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), eta=0.0)
    assert A.tolist() == [[1, -1, -1, 1]]
    log = np.log
    old = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    new = old + torch.tensor(log([1.5, 0.5, 0.5]))
    gen = old - torch.tensor(log([4.0, 1.0, 0.25]))
    ref = new - torch.tensor(log([1.0, 2.0, 1.0]))
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    advantage = A[0, [0, 0, 1]].double()
    loss, metrics = grpo_loss(new, old, gen, ref, advantage, weights, config())
    kl = 0.5 - 1 + math.log(2)
    assert loss.item() == pytest.approx(-(2 * 1.2 + 1 * 0.5 - 0.25 * 0.8) / 3 + 0.05 * kl / 3, rel=1e-12)
    seen = averages(metrics)
    assert seen["clip_low"] == seen["clip_high"] == seen["tis_cut"] == pytest.approx(1 / 3)
    assert seen["ratio_max"] == pytest.approx(1.5) and seen["tis_max"] == pytest.approx(4)
    assert seen["k1"] == pytest.approx(math.log(2) / 3) and seen["k3"] == pytest.approx(kl / 3)


def test_on_policy_the_ratio_is_one_and_clipping_is_inert():
    new, _, gen, ref, advantage, counted = (x.float() if x.is_floating_point() else x for x in random_step())
    new.requires_grad_()
    weights = weights_of(counted, "token", 0).float()
    grads = []
    for clip in (0.0, 0.2, 1e9):
        cfg = config(clip_low=clip, clip_high=clip)
        loss, metrics = grpo_loss(new, new, gen, ref, advantage, weights, cfg)
        seen = averages(metrics)
        assert seen["ratio"] == seen["ratio_max"] == 1 and seen["clip_low"] == seen["clip_high"] == 0
        grads.append(torch.autograd.grad(loss, new)[0])
    assert torch.equal(grads[1], grads[2])                                    # and REINFORCE is what is left:
    loss, _ = grpo_loss(new, new, new, None, advantage, weights, config(beta=0.0))
    grad, = torch.autograd.grad(loss, new)
    assert torch.allclose(grad, -advantage * weights, rtol=1e-6)


def test_only_the_policy_gets_a_gradient():
    *logps, advantage, counted = random_step()
    for x in logps:
        x.requires_grad_()
    loss, _ = grpo_loss(*logps, advantage, weights_of(counted, "token", 0), config())
    grads = torch.autograd.grad(loss, logps, allow_unused=True)
    assert grads[0].norm() > 0 and grads[1:] == (None, None, None)


def test_extremes_stay_finite():
    gaps = torch.tensor([0.0, 1e3, -1e3, 88.0, -104.0, 1e-8])
    for dnew, dgen, dref in itertools.product(gaps, gaps, gaps):
        old = torch.full((4,), -1000.0)
        new = (old + dnew).requires_grad_()
        for kl in KL:
            loss, metrics = grpo_loss(new, old, old + dgen, old + dref, torch.tensor([1.0, -1.0, 0.0, 2.0]),
                                      torch.full((4,), 0.25), config(kl=kl))
            grad, = torch.autograd.grad(loss, new)
            assert torch.isfinite(loss) and torch.isfinite(grad).all()
            assert all(map(math.isfinite, averages(metrics).values()))


def test_places_that_do_not_count_may_hold_anything():
    *values, advantage, counted = random_step()
    values = [*values, advantage.expand(5, 7)]
    weights = weights_of(counted, "sequence", 0)

    def result(values):
        logp = values[0].clone().requires_grad_()
        loss, metrics = grpo_loss(logp, *values[1:], weights, config())
        return loss.item(), torch.autograd.grad(loss, logp)[0].tolist(), averages(metrics)

    expected = result(values)
    for junk in (math.nan, math.inf, -math.inf, 1e30):
        junked = [torch.where(counted, x, junk) for x in values]
        assert result(junked) == expected
        for i in range(5):
            assert result(values[:i] + junked[i:i + 1] + values[i + 1:]) == expected


def test_a_row_without_responses():
    """What a rank passes over that has no row left: loss 0 with a gradient of 0, metrics that add nothing."""
    h, w = torch.randn(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    none = torch.zeros(0)
    logp, entropy = token_logprobs(h, w, none.long())
    loss, metrics = grpo_loss(logp, logp, none, none, none, none, config())
    loss.backward()
    assert loss == 0 and w.grad.abs().max() == 0 and entropy.shape == (0,)
    assert set(averages(metrics).values()) == {0.0}
    full = grpo_loss(*random_step()[:4], *(torch.ones(5, 1).double(),) * 2, config())[1]
    assert averages(pool([metrics, full])) == averages(full)


# -- the same gradient however it is batched ----------------------------------------------------------------

def gradients(batches, tokens, cfg):
    """Gradients of an embedding and a head, fp32, summed over micro-batches (places, weights) of a step, and
    the pooled metrics. A token's log-prob depends on the token before it alone: rows may hold anything."""
    torch.manual_seed(1)
    embed, head = torch.randn(23, 8, requires_grad=True), torch.randn(29, 8, requires_grad=True)
    before, target, old, gen, ref, advantage = tokens
    parts = []
    for places, weights in batches:
        logp, _ = token_logprobs(embed[before[places]], head, target[places], known=23)
        others = (x[places] for x in (old, gen, ref, advantage))
        loss, metrics = grpo_loss(logp, *others, weights, cfg)
        loss.backward()
        parts.append(metrics)
    return embed.grad, head.grad, averages(pool(parts))


@pytest.mark.parametrize("kind", ["token", "constant", "sequence"])
def test_gradients_do_not_change_with_rows_order_padding_or_ranks(kind):
    R, T = 12, 40
    lengths = torch.randint(1, T, (R,))
    lengths[4] = 0                                                            # truncated, so masked
    owner = torch.arange(R).repeat_interleave(lengths)
    n = len(owner)
    before, target = torch.randint(0, 23, (2, n))
    old = -3 - torch.rand(n)
    gen, ref = old + 0.3 * torch.randn(n), old + 0.3 * torch.randn(n)
    tokens = (before, target, old, gen, ref, advantages(torch.rand(3, 4)).flatten()[owner])
    weights = token_weights(lengths.view(3, 4), kind, T).flatten()[owner]
    places = [(owner == i).nonzero()[:, 0] for i in range(R)]
    cfg = config(tis=1.1)

    def rows(groups):
        return [(at, weights[at]) for at in (torch.cat([places[i] for i in group] or [torch.zeros(0).long()])
                                             for group in groups)]

    expected = gradients(rows([range(R)]), tokens, cfg)
    assert 0 < expected[2]["tis_cut"] < 1
    ragged = []
    for i in range(R):                                   # padding repeats place 0, and does not count
        at = torch.zeros(T, dtype=torch.int64)
        at[:lengths[i]] = places[i]
        ragged.append((at, torch.where(torch.arange(T) < lengths[i], weights[at], 0.0)))
    full = (lengths + (lengths == 0)).tolist()
    ways = {"a response a row": rows([[i] for i in range(R)]), "backwards": rows([range(R)[::-1]]),
            "padded": ragged}
    for capacity, ranks in ((40, 1), (64, 1), (64, 2), (100, 3), (1000, 16)):
        ways[f"{capacity}, {ranks}"] = rows([row for mine in pack(full, capacity, ranks) for row in mine])
    for way, batches in ways.items():
        embed, head, metrics = gradients(batches, tokens, cfg)
        for ours, all_at_once in ((embed, expected[0]), (head, expected[1])):
            assert (ours - all_at_once).norm() <= 1e-6 * all_at_once.norm(), way
        assert metrics == pytest.approx(expected[2], rel=1e-6), way


# -- advantages, weights, KL --------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["std", "mean"])
def test_advantages_are_the_loops(mode):
    rewards = torch.rand(6, 5).round(decimals=1)
    for row, ours in zip(rewards.double().tolist(), advantages(rewards, 1e-4, mode).tolist(), strict=True):
        mean = sum(row) / len(row)
        std = math.sqrt(sum((r - mean) ** 2 for r in row) / len(row))
        by = std + 1e-4 if mode == "std" else 1
        assert ours == pytest.approx([(r - mean) / by for r in row], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("mode", ["std", "mean"])
def test_advantages_without_those_that_could_not_be_graded(mode):
    """A group's advantages are those of its graded responses alone; the others' are 0."""
    rewards = torch.rand(40, 6).round(decimals=1)
    graded = torch.rand(40, 6) < 0.7
    graded[0] = False
    graded[1] = True
    ours = advantages(rewards, 0.0, mode, graded)
    for row, kept, advantage in zip(rewards, graded, ours, strict=True):
        assert (advantage[~kept] == 0).all() and torch.isfinite(advantage).all()
        if kept.any():
            assert torch.allclose(advantage[kept], advantages(row[kept][None], 0.0, mode)[0], rtol=1e-6)
    everyone = torch.ones_like(graded)
    assert torch.equal(advantages(rewards, 0.1, mode, everyone), advantages(rewards, 0.1, mode))


def test_advantages_of_equal_rewards_are_exactly_zero():
    """0.1 seven times, summed and divided by seven, is not 0.1: without care the advantage would be noise."""
    for value in (0.0, 1.0, 0.1, -0.7, 1e-30, 1e30):
        for mode in ("std", "mean"):
            groups = torch.tensor([[value] * 7, [0.0, 1.0] + [value] * 5], dtype=torch.float64)
            A = advantages(groups, 0.0, mode)
            assert (A[0] == 0).all() and torch.isfinite(A).all() and A[1].abs().max() > 0
    assert advantages(torch.zeros(0, 4)).shape == (0, 4)
    q = torch.tensor([[1.0] + [0.0] * 15])
    assert advantages(q, 0.0)[0, 0].item() == pytest.approx(math.sqrt(15))    # the population's deviation


def test_token_weights():
    lengths = torch.tensor([[3, 0], [1, 4]])
    assert token_weights(lengths)[0, 1] == 0 and token_weights(lengths)[1, 0].item() == pytest.approx(1 / 8)
    assert token_weights(lengths, "constant", 10)[0, 0].item() == pytest.approx(1 / 40)
    assert token_weights(lengths, "sequence").flatten().tolist() == pytest.approx([1 / 9, 0, 1 / 3, 1 / 12])
    for kind in ("token", "constant", "sequence"):
        assert (token_weights(torch.zeros(3, dtype=torch.int64), kind, 5) == 0).all()
        assert token_weights(torch.zeros(0, dtype=torch.int64), kind, 5).shape == (0,)


def test_kl_estimates_agree_on_average_and_in_their_signs():
    """Over pi, k1 and k3 have the exact KL as mean; k3 is never negative; k2 is near it for near policies."""
    logits = torch.randn(50, dtype=torch.float64)
    p = logits.log_softmax(0)
    q = (logits + 0.1 * torch.randn(50, dtype=torch.float64)).log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    means = {kind: (p.exp() * kl_estimate(p, q, kind)).sum() for kind in KL}
    assert means["k1"].item() == pytest.approx(exact.item())
    assert means["k3"].item() == pytest.approx(exact.item())
    assert means["k2"].item() == pytest.approx(exact.item(), rel=0.05)
    assert (kl_estimate(p, q, "k3") >= 0).all() and (kl_estimate(p, p, "k3") == 0).all()


@pytest.mark.parametrize("call", [
    lambda: advantages(torch.zeros(1, 2), mode="z"), lambda: token_weights(torch.ones(2), "tokens"),
    lambda: kl_estimate(torch.zeros(1), torch.zeros(1), "k4"), lambda: pass_at_k(4, 2, 8),
    lambda: pack([3, 9, 2], 8), lambda: pack([0], 8)])
def test_refusals_name_what_is_known(call):
    with pytest.raises(InputError, match="not one of|at least 8|1 of 3 has 9 tokens .* 1 to 8|has 0 tokens"):
        call()


# -- rows, reference, pass@k --------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_pack_holds_everything_once_and_is_balanced(ranks):
    rng = np.random.default_rng(ranks)
    for n in (0, 1, 2, 5, 17, 64, 256):
        for capacity in (16, 100, 1000):
            lengths = np.minimum(1 + rng.geometric(4 / capacity, n), capacity).tolist()
            packed = pack(lengths, capacity, ranks)
            assert packed == pack(lengths, capacity, ranks)
            assert len(packed) == ranks and len({len(rows) for rows in packed}) == 1
            assert sorted(i for rows in packed for row in rows for i in row) == list(range(n))
            sizes = [[sum(lengths[i] for i in row) for row in rows] for rows in packed]
            assert all(size <= capacity for rows in sizes for size in rows)
            assert all(rows == sorted(rows, reverse=True) for rows in sizes)          # empty ones last
            loads = [sum(rows) for rows in sizes]
            assert max(loads) <= sum(loads) / ranks + max(lengths, default=0)


def fewest_rows(lengths, capacity):
    """By trying everything."""
    best = len(lengths)

    def place(i, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if i == len(lengths):
            best = len(rooms)
            return
        for j, room in enumerate(rooms):
            if lengths[i] <= room:
                place(i + 1, rooms[:j] + [room - lengths[i]] + rooms[j + 1:])
        place(i + 1, rooms + [capacity - lengths[i]])

    place(0, [])
    return best


def test_pack_needs_at_most_a_row_more_a_rank_than_the_best():
    rng = np.random.default_rng(0)
    for _ in range(60):
        lengths, ranks = rng.integers(1, 21, 8).tolist(), int(rng.integers(1, 4))
        fewest = -(-fewest_rows(lengths, 20) // ranks)
        assert fewest <= len(pack(lengths, 20, ranks)[0]) <= fewest + 1
    assert pack([4, 4, 4, 4, 4], 8, 4) == [[[0, 4]], [[1]], [[2]], [[3]]]
    assert pack([8] + [1] * 8, 8, 2) == [[[0]], [list(range(1, 9))]]                # by tokens, not by number


def test_polyak():
    reference, policy = [torch.randn(3, 4), torch.randn(5)], [torch.randn(3, 4), torch.randn(5)]
    for alpha in (0.0, 0.1, 0.6, 1.0):
        ours = [r.clone() for r in reference]
        kept = [r.data_ptr() for r in ours]
        polyak(ours, (p.clone().requires_grad_() for p in policy), alpha)
        assert [r.data_ptr() for r in ours] == kept and not any(r.requires_grad for r in ours)
        for a, r, p in zip(ours, reference, policy, strict=True):
            assert torch.allclose(a, alpha * p + (1 - alpha) * r, atol=1e-7)
            assert alpha not in (0.0, 1.0) or torch.equal(a, p if alpha else r)
    with pytest.raises(ValueError, match="shape"):
        polyak([torch.zeros(3, 4)], [torch.zeros(4)], 0.5)
    with pytest.raises(ValueError):
        polyak(reference, policy[:1], 0.5)


def test_pass_at_k_is_the_count_of_draws():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = [any(i < c for i in draw) for draw in itertools.combinations(range(n), k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws))
    assert pass_at_k(10_000, 1, 10_000) == 1 and pass_at_k(10_000, 1, 1) == pytest.approx(1e-4)
