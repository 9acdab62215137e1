"""Scores with their intervals, paired gains, pass@k, and figures and tables as text.

Intervals are of 95 %. P problems; a weight is what a part counts in a mean over parts.
"""

import json
import math
import os
from typing import NamedTuple

import numpy as np

from cli import InputError, read_jsonl

NORMAL = 1.959964                        # the normal distribution leaves 2.5 % beyond it
# Student's t of 1 to 9 degrees of freedom leaves as much beyond it
STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


class Score(NamedTuple):
    """A mean in 0..1 with its interval."""
    score: float
    low: float
    high: float


class Gain(NamedTuple):
    """A difference of two means with its interval; p: how often chance alone gives one as large."""
    gain: float
    low: float
    high: float
    p: float


# -- intervals -----------------------------------------------------------------------------------------------

def student_t(n):
    """The limit of Student's t for n observations, n >= 2: 2.5 % lie beyond it. Exact for n <= 10; for more
    to the first order of Cornish and Fisher, which is at most 1.4 % too small."""
    degrees = n - 1
    if degrees <= len(STUDENT):
        return STUDENT[degrees - 1]
    return NORMAL * (1 + (NORMAL ** 2 + 1) / (4 * degrees))


def interval(scores, draws=None):
    """The Score of P problems' scores in 0..1; its interval is for other problems of the same kind.

    draws: each score is the mean of so many zeros and ones; None: it is any number. Wilson's interval, with
    as many independent draws as the spread over problems speaks for, mean (1 - mean) / (variance / P), but
    not more than P x draws, and Student's t for few problems. One problem tells nothing of others: 0 to 1.
    Simulated coverage at the sizes of the paper's benchmarks: 95 to 96 %; 83 % for 30 problems of which only
    one or two are ever solved."""
    problems = len(scores)
    mean = float(np.mean(scores))
    if problems < 2:
        return Score(mean, 0.0, 1.0)
    variance = float(np.var(scores, ddof=1)) / problems            # of the mean
    if variance >= 1e-12:
        n = mean * (1 - mean) / variance
    elif draws and 0 < mean < 1:
        n = problems * draws
    else:
        n = problems
    if draws:
        n = min(n, problems * draws)
    z = student_t(problems)
    scale = 1 + z * z / n
    centre = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    low = min(mean, max(0.0, (centre - half) / scale))             # rounding leaves no mean outside
    high = max(mean, min(1.0, (centre + half) / scale))
    return Score(mean, low, high)


def combined(parts):
    """The Score of a weighted sum of independent scores, parts: [(weight, Score)], weights >= 0. Limits by
    recovered variances, which keep the skew of the parts' (Zou and Donner 2008)."""
    total = sum(weight * score for weight, (score, _, _) in parts)
    below = math.sqrt(sum((weight * (score - low)) ** 2 for weight, (score, low, _) in parts))
    above = math.sqrt(sum((weight * (high - score)) ** 2 for weight, (score, _, high) in parts))
    return Score(total, total - below, total + above)


def paired(parts, resamples=10_000, seed=0):
    """The Gain of one run over another on the same problems, parts: [(weight, gains of its problems (P,))].

    A bootstrap over problems within each part; its deviations are widened for small P, by Student's t and the
    P - 1 of a variance. p is two-sided, and not below what chance alone would give the problems that differ,
    2^(1 - their number). One problem tells nothing: -1 to 1."""
    gain = sum(weight * float(np.mean(gains)) for weight, gains in parts)
    if min(len(gains) for _, gains in parts) < 2:
        return Gain(gain, -1.0, 1.0, 1.0)
    rng = np.random.default_rng(seed)
    deviations = np.zeros(resamples)                               # of the resampled gains from this one
    differing = 0                                                  # problems
    for weight, gains in parts:
        gains = np.asarray(gains, dtype=float)
        problems = len(gains)
        differing += np.count_nonzero(gains)
        widening = weight * math.sqrt(problems / (problems - 1)) * (student_t(problems) / NORMAL)
        chunks = max(1, resamples // 500)                          # MATH500 alone is 5M draws
        for chunk in np.array_split(deviations, chunks):           # views
            drawn = rng.integers(0, problems, (len(chunk), problems))
            chunk += widening * (gains[drawn].mean(1) - gains.mean())
    resampled = gain + deviations
    low, high = np.quantile(resampled, [0.025, 0.975])
    opposite = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p = float(2 * (1 + opposite) / (1 + resamples))
    return Gain(gain, float(low), float(high), min(1.0, max(p, 2.0 ** (1 - differing))))


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, drawn without putting back, hold one of the c correct ones: 1 -
    C(n - c, k) / C(n, k), the unbiased estimate of pass@k (Chen et al. 2021). 0 <= c <= n, 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise InputError(f"pass@{k} of {n} samples, {c} correct: give at least {k} samples a prompt")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# -- figures as text ---------------------------------------------------------------------------------------

def number(x, form="{:.3g}", by=1):
    """by * x as text; a dash where there is none (None or nan)."""
    return "-" if x is None or math.isnan(x) else form.format(by * x)


def percent(x):
    """A share as text: 0.4963 is 49.6."""
    return number(x, "{:.1f}", 100)


def with_interval(result, name="score", form="{:.1f}", by=100):
    """result[name] with result["low"] and result["high"] as text: 49.6 [43.7, 55.5]; a dash where it is not
    there."""
    if result.get(name) is None:
        return "-"
    x, low, high = (number(result[key], form, by) for key in (name, "low", "high"))
    return f"{x} [{low}, {high}]"


def aligned(rows, first="<", rest=">"):
    """Rows of texts, of as many cells each, as lines with columns of one width. first, rest: to which side
    the first column and the others are set."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [first] + [rest] * (len(widths) - 1)
    lines = []
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


# -- results -------------------------------------------------------------------------------------------------

def read_results(folder):
    """({"tasks", "averages", "leaderboards"}, {task: {(id, hash of prompt and truth): scores}}) of a run."""
    try:
        with open(os.path.join(folder, "results.json")) as f:
            results = json.load(f)
        results = {part: dict(results[part]) for part in ("tasks", "averages", "leaderboards")}
        problems = {}
        for _, _, line in read_jsonl(os.path.join(folder, "problems.jsonl"), "compare"):
            problem = line["id"], line["what"]
            problems.setdefault(line["task"], {})[problem] = line["scores"]
        return results, problems
    except FileNotFoundError:
        raise InputError(f"--compare: {folder} has no results.json; give folders of finished evaluations "
                         f"(python evaluate.py --out={folder} makes one)") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"--compare: {folder}/results.json is damaged ({e!r}); run that evaluation again: "
                         f"its samples are saved") from None
