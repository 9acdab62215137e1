"""Scores with their intervals, paired gains, pass@k, and the tables they are printed in."""

import json
import math
import os

import numpy as np

from cli import InputError, read_jsonl


def percent(x):
    return "-" if x is None else f"{100 * x:.1f}"


def student(P):
    """How much wider than the normal's a 95 % interval of P observations is: Student's t over its limit, to
    the first order of Cornish and Fisher."""
    return 1 + (1.959964 ** 2 + 1) / (4 * (P - 1))


def interval(scores, draws=None):
    """(mean, low, high) of P problems' scores in [0, 1]: a 95 % interval for other problems of the kind.
    Wilson's, with as many independent draws as the spread over problems speaks for, mean (1 - mean) /
    (variance / P), and P where there is no spread; and Student's t for few problems. draws: a score is the
    mean of so many zeros and ones, so there are P x draws at most. Simulated coverage at the sizes of the
    paper's benchmarks: 95 to 96 %; 83 % for 30 problems of which only one or two are ever solved."""
    P, p = len(scores), float(np.mean(scores))
    if P < 2:
        return p, 0.0, 1.0
    z = 1.959964 * student(P)
    spread = float(np.var(scores, ddof=1)) / P
    n = P * (draws if draws and 0 < p < 1 else 1) if spread < 1e-12 else p * (1 - p) / spread
    n = min(n, P * draws) if draws else n
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def combined(parts):
    """(mean, low, high) of sum w x over independent (w, (x, low, high)), w >= 0: limits by recovered
    variances, which keep the skew of the parts' (Zou and Donner 2008)."""
    x = sum(w * p for w, (p, _, _) in parts)
    low = math.sqrt(sum((w * (p - lo)) ** 2 for w, (p, lo, _) in parts))
    high = math.sqrt(sum((w * (hi - p)) ** 2 for w, (p, _, hi) in parts))
    return x, x - low, x + high


def paired(parts, resamples=10_000, seed=0):
    """(gain, low, high, p) of sum w (mean of d) over (w, d): d (P,), what each problem gained from one run to
    another. A bootstrap over problems within each part, its deviations widened for small P (by Student's t
    and the P - 1 of a variance): 95 %, p two-sided. No p is below what chance alone would give the problems
    that differ, 2^(1 - their number)."""
    rng, total, differ = np.random.default_rng(seed), np.zeros(resamples), 0
    gain = sum(w * float(np.mean(d)) for w, d in parts)
    if min(len(d) for _, d in parts) < 2:
        return gain, -1.0, 1.0, 1.0
    for w, d in parts:
        d = np.asarray(d, dtype=float)
        P, differ = len(d), differ + np.count_nonzero(d)
        wider = w * math.sqrt(P / (P - 1)) * student(P)
        for part in np.array_split(total, max(1, resamples // 500)):       # MATH500 alone is 5M numbers
            part += wider * (d[rng.integers(0, P, (len(part), P))].mean(1) - d.mean())
    low, high = np.quantile(gain + total, [0.025, 0.975])
    p = 2 * (1 + min((gain + total <= 0).sum(), (gain + total >= 0).sum())) / (1 + resamples)
    return gain, float(low), float(high), min(1.0, max(float(p), 2.0 ** (1 - differ)))


def limits(found):
    return dict(zip(("score", "low", "high"), found, strict=True))


def aligned(rows, first="<", rest=">"):
    """Rows of texts, of as many cells each, as lines with columns of one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{rest if i else first}{width}}" for i, (cell, width)
                      in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, drawn without putting back, hold one of the c correct ones: 1 -
    C(n - c, k) / C(n, k), the unbiased estimate of pass@k (Chen et al. 2021). 0 <= c <= n, 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise InputError(f"pass@{k} of {n} samples, {c} correct: give at least {k} samples a prompt")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def read_results(folder):
    """({"tasks", "averages", "leaderboards"}, {task: {(id, hash of prompt and truth): scores}}) of a run."""
    try:
        with open(os.path.join(folder, "results.json")) as f:
            results = json.load(f)
        results = {part: dict(results[part]) for part in ("tasks", "averages", "leaderboards")}
        problems = {}
        for _, _, line in read_jsonl(os.path.join(folder, "problems.jsonl"), "compare"):
            problems.setdefault(line["task"], {})[line["id"], line["what"]] = line["scores"]
        return results, problems
    except FileNotFoundError:
        raise InputError(f"--compare: {folder} has no results.json; give folders of finished evaluations "
                         f"(python evaluate.py --out={folder} makes one)") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"--compare: {folder}/results.json is damaged ({e!r}); run that evaluation again: "
                         f"its samples are saved") from None
