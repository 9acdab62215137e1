"""The paper's claims, tried on what the chains of `make study` left (paper, tables 4-23, figures 10-16).

    python -m study.claims runs/study                               # tables, verdicts, runs/study/study.json
    python analyze.py report runs/study --out=runs/study/report  # the same as a page

A chain is runs/study/MODEL-SEED. Its cells are base; m, mc, mcs: the base, mid-trained on math, + code,
+ science; mcs@N: mcs of N steps; START+MIX: START, then RL on MIX. What is not there yet is a dash, and its
claims are not yet measured.

A number in brackets is a 95 % interval for other seeds (of initial weights, order of data and samples) on the
same problems: Student's t over chains, of differences that are taken within each chain. Where all chains
agree, and of a single chain, it is for other problems (see suite/intervals.py), and only scores have one. n
is how many chains a number is of, where some lack it. Scores and shares are in %.
"""

import contextlib
import json
import math
import os
import re
import sys
from typing import NamedTuple

import numpy as np
import tyro
from tyro.conf import Positional

from cli import InputError, split_flags, write_atomic
from suite.intervals import aligned, combined, interval, paired, read_results

DOMAINS = {"math": "toy-math", "code": "toy-code", "science": "toy-science"}         # task of each
CHANCE = 0.25                            # of toy-science: four letters, each as often right
STARTS, MIXES = ("base", "m", "mc", "mcs"), ("mc", "mcs")
CELLS = (*STARTS, *(f"{start}+{mix}" for start in STARTS for mix in MIXES))
MT, RL, DIRECT = "base to mcs", "mcs to mcs+mcs", "base to base+mcs"                 # changes of weights
PARTS = (20, 40, 60, 80)                 # of RL's steps, %
KEPT = 0.05                              # nats of held-out loss; ours, as reporting/page.py has


# -- a chain: from files to numbers ------------------------------------------------------------------------

class Chain(NamedTuple):
    """numbers: {subject: {what: number}}; a subject is a cell, "A to B" (weights), "A and B" (CKA), "path".
    problems: {cell: {domain: {problem: scores of its samples}}}."""
    numbers: dict
    problems: dict


@contextlib.contextmanager
def reading(path):
    """InputError that names the file, on what it should not hold; nothing where it is not there."""
    try:
        yield
    except FileNotFoundError:
        pass
    except InputError as e:
        raise InputError(str(e).replace("--compare", "study")) from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise InputError(f"study: {path} is damaged ({e!r}); make it again or take it away") from None


def read_chain(folder):
    """What is there of a chain."""
    chain, evaluated = Chain({}, {}), os.path.join(folder, "eval")

    def add(found):
        for subject, own in found.items():
            chain.numbers.setdefault(subject, {}).update(
                {what: float(x) for what, x in own.items() if x is not None and not math.isnan(x)})

    for cell in sorted(os.listdir(evaluated)) if os.path.isdir(evaluated) else ():
        path = os.path.join(evaluated, cell, "results.json")
        with reading(path):
            if os.path.exists(path):
                results, problems = read_results(os.path.dirname(path))
                chain.problems[cell] = {d: problems[task] for d, task in DOMAINS.items() if task in problems}
                add({cell: scored(results["tasks"], chain.problems[cell])})
    for take, *where in ((weights, "weights.json"), (cka, "cka.json"), (trajectory, "trajectory.json"),
                         (landscape, "landscape.json"), *((retention, start) for start in STARTS[1:])):
        path = os.path.join(folder, "analysis", *where) if take is not retention else os.path.join(
            folder, *where, "retention.json")
        with reading(path), open(path) as f:
            found = take(json.load(f))
            add({where[0]: found} if take is retention else found)
    return chain


def scored(tasks, problems):
    """Of a cell, scores by domain and their mean; of math also length and sureness of answers."""
    own = {domain: np.mean([np.mean(scores) for scores in some.values()])
           for domain, some in problems.items()}
    own |= {"avg": np.mean(list(own.values()))} if len(own) == len(DOMAINS) else {}
    if "math" in own:
        r = tasks[DOMAINS["math"]]
        own |= {"tokens": r["all"]["median_tokens"], "cut": r["truncated"], "NLL": r["all"]["nll"],
                "NLL right": r["right"]["nll"], "NLL wrong": r["wrong"]["nll"]}
    return own


def retention(own):
    """Of a cell, the change of the held-out loss over its mid-training, by domain, nats a token."""
    (_, before), *_, (_, after) = own["curve"]
    return {f"loss {domain}": after[domain] - before[domain] for domain in before}


def weights(own):
    """Of each pair relative L2 (pooled) and the share that stays within each threshold, and the noise null's.
    times: how often farther mid-training moves than RL, and RL from mcs than RL from the base."""
    found = {}
    for pair in own["pairs"]:
        here = found.setdefault(" to ".join(pair["names"]), {})
        rows = [(f" {row['component']}" if "component" in row else "", "", row) for row in pair["rows"]
                if row["by"] in ("total", "component")]
        null = pair["nulls"].get("total")
        for part, kind, row in rows + ([("", "noise ", null)] if null else []):
            here[f"{kind}L2{part}"] = row["relative_l2"]
            if not part:
                same = {float(t): x for t, x in row["unchanged"].items()}
                here |= {f"{kind}same at {100 * t:g} %": x for t, x in same.items()}
                here |= {f"{kind}changed": None if same[0.01] is None else 1 - same[0.01],
                         "cosine": row.get("cosine", here.get("cosine"))}
    for pair, other in ((MT, RL), (RL, DIRECT)):
        for kind in ("", "noise "):
            a, b = found.get(pair, {}).get("L2"), found.get(other, {}).get(f"{kind}L2")
            if a is not None and b:
                found[pair][f"{kind}times"] = a / b
    return found


def cka(own):
    """The least CKA of any layer and corpus, debiased and as published, and the most of permuted texts."""
    found = {}
    curves = [item for of in own.values() if of["pooling"] == "mean" for item in of["pairs"].items()]
    for pair, curve in curves:
        here = found.setdefault(pair.replace(" ", " and "), {})
        for what, key, pick in (("CKA", "debiased", min), ("biased CKA", "biased", min),
                                ("permuted CKA", "null_high", max)):
            values = [c[key] for c in curve if c[key] is not None and not math.isnan(c[key])]
            here[what] = pick([*values, *([here[what]] if here.get(what) is not None else [])], default=None)
    return found


def trajectory(own):
    """How much of the change at the last step is there after a part of the steps (between exported models: on
    a straight line), and the same of noise at the same learning rates."""
    found = {}
    for run in own["runs"]:
        steps = sorted(run["steps"], key=lambda s: s["step"])
        here = found.setdefault(os.path.basename(run["name"]), {})
        for kind, name in (("from_mt", "share"), ("null", "noise")):
            l2 = [s[kind]["relative_l2"] for s in steps if s.get(kind)]
            if steps and len(l2) == len(steps) and l2[-1]:
                x, y = [0, *(s["step"] for s in steps)], [0, *l2]
                here |= {f"{name} at {p} %": np.interp(p / 100 * x[-1], x, y) / y[-1] for p in PARTS}
    return found


def landscape(own):
    """Pass rates on the straight path from the base by MT to RL."""
    points = {(p["alpha"], p["beta"]): p["score"] for p in own["path"]}
    ends = {"base": (0, 0), "half to MT": (0.5, 0), "MT": (1, 0), "half to RL": (1, 0.5), "RL": (1, 1)}
    return {"path": {name: points.get(point) for name, point in ends.items()}}


# -- chains to an estimate ---------------------------------------------------------------------------------
# What is estimated is a sum over chains' numbers, {(subject, what): weight}: a number, a mean, a difference.

# Student's t of 1 to 9 degrees of freedom, exact: scores.student is of the first order, 27 % short at three
# chains. More chains are taken for ten
T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


def difference(what, after, before=()):
    """The mean of some subjects, less that of others."""
    return {(s, what): 1 / len(after) for s in after} | {(s, what): -1 / len(before) for s in before}


def mean(what, *subjects):
    """The mean of some subjects."""
    return difference(what, subjects)


def gain(what, before, after):
    """What one subject is over another."""
    return difference(what, (after,), (before,))


def estimate(chains, of):
    """{"mean", "low", "high", "seeds"} of {seed: Chain}, over those that have all of it; None without one.
    low and high are None where there is no interval."""
    values = {}
    for seed, chain in chains.items():
        own = [chain.numbers.get(subject, {}).get(what) for subject, what in of]
        if None not in own:
            values[seed] = math.fsum(w * x for w, x in zip(of.values(), own, strict=True))
    if not values:
        return None
    n, (seed, *_) = len(values), values
    x = float(np.mean(list(values.values())))
    low = high = None
    if n > 1:
        spread = float(np.std(list(values.values()), ddof=1))
        half = T975[min(n - 1, len(T975)) - 1] * spread / math.sqrt(n)
        low, high = x - half, x + half
        if min(of.values()) > 0 and {what for _, what in of} <= {*DOMAINS, "avg"}:
            low, high = max(low, 0.0), min(high, 1.0)     # of scores
    if low == high:                                       # seeds tell nothing of what is in doubt
        low, high = over_problems(chains[seed].problems, of) or (low, high)
    return {"mean": x, "low": low, "high": high, "seeds": n}


def over_problems(problems, of):
    """(low, high) within a chain, for other problems; None of what is no score."""
    parts = {}                                            # {domain: {cell: weight}}
    for (cell, what), w in of.items():
        domains = DOMAINS if what == "avg" else (what,)
        if not set(domains) <= set(problems.get(cell, ())):
            return None
        for domain in domains:
            parts.setdefault(domain, {})[cell] = w / len(domains)
    rows = []
    for domain, cells in parts.items():
        shared = set.intersection(*(set(problems[cell][domain]) for cell in cells))
        rows.append([sum(w * np.mean(problems[cell][domain][key]) for cell, w in cells.items())
                     for key in sorted(shared)])
    if not all(rows):
        return None
    if min(of.values()) < 0:
        return paired([(1.0, d) for d in rows])[1:3]
    whole = [sum(cells.values()) for cells in parts.values()]
    return combined([(w, interval(np.array(d) / w)) for w, d in zip(whole, rows, strict=True)])[1:]


FORMS = {"L2": "{:.3g}", "times": "{:.3g}", "CKA": "{:.4f}", "cosine": "{:.3f}", "NLL": "{:.3f}",
         "loss": "{:.3f}", "tokens": "{:.1f}"}           # by a word of what it is; others are shares, in %


def shown(e, of, chains):
    """An estimate as text: 49.6 [43.7, 55.5] n=2; differences have signs."""
    if e is None:
        return "-"
    words = {word for _, what in of for word in what.split()}
    form, by = next(((form, 1) for word, form in FORMS.items() if word in words), ("{:.1f}", 100))
    form = form.replace("{:", "{:+") if min(of.values()) < 0 else form
    x, low, high = (None if e[k] is None else form.format(by * e[k]) for k in ("mean", "low", "high"))
    return x + f" [{low}, {high}]" * (low is not None) + f" n={e['seeds']}" * (e["seeds"] < len(chains))


# -- the tables --------------------------------------------------------------------------------------------

class Table(NamedTuple):
    title: str
    paper: str                           # whose counterpart it is
    whats: list                          # columns
    rows: dict                           # {name: (subjects,) or (after, before), see difference()}


def tables(every):
    """every: {subject: what some chain has of it}; beyond those named here, it may have more pairs, mcs@N."""
    def alone(*names):
        return {name: ((name,),) for name in dict.fromkeys(names)}

    def has(pattern, what=""):
        return [s for s, whats in every.items() if re.fullmatch(pattern, s) and (what in whats or not what)]

    domains, same = [*DOMAINS, "avg"], [f"same at {t} %" for t in ("0.1", "0.5", "1", "2", "5", "10")]
    starts = [(a, b) for a, b in (("base", "m"), ("base", "mc"), ("base", "mcs"), ("m", "mc"), ("mc", "mcs"))]
    starts += [(start, f"{start}+{mix}") for start in STARTS for mix in MIXES]
    pairs = alone(MT, RL, DIRECT, *has(".+ to .+"))
    budgets = sorted(has(r"mcs@\d+"), key=lambda s: int(s[4:]))
    return [
        Table("Scores, %, by mid-training and RL mixture", "tables 4-6 and 11-13", domains, alone(*CELLS)),
        Table("Gains, points", "tables 4-6 and 11-13", domains,
              {f"{a} to {b}": ((b,), (a,)) for a, b in starts} | {
                  "after RL: science in mid-training": (("mcs+mc", "mcs+mcs"), ("mc+mc", "mc+mcs")),
                  "after RL: science in RL": (("mc+mcs", "mcs+mcs"), ("mc+mc", "mcs+mc"))}),
        Table("Held-out loss, change in nats a token", "tables 4-6: general performance",
              [f"loss {domain}" for domain in ("general", "chat", *DOMAINS)], alone(*STARTS[1:])),
        *([Table("Scores, %, by steps of mid-training", "table 9", domains, alone(*budgets, "mcs"))]
          if budgets else []),
        Table("Behaviour in math: pass rate, answers cut, %; median tokens; negative log-prob", "table 15",
              ["math", "cut", "tokens", "NLL", "NLL right", "NLL wrong"],
              alone("base", "mcs", "mcs+mcs", "base+mcs")),
        Table("Relative L2 change of weights; share changed by over 1 %, %", "table 22", [
            *(f"L2 {part}" for part in ("attention", "MLP", "Mamba", "embedding", "norm")), "L2", "noise L2",
            "changed", "noise changed", "cosine"], pairs),
        Table("Weights that stay, %, by threshold", "table 23",
              [*same, *(f"noise {what}" for what in same)], pairs),
        Table("Least CKA of any layer", "figures 10-16", ["CKA", "biased CKA", "permuted CKA"],
              alone("base and mcs", "mcs and mcs+mcs", *has(".+ and .+"))),
        Table("Pass rate on the path from base by MT to RL, %", "figures 10-16",
              ["base", "half to MT", "MT", "half to RL", "RL"], alone("path")),
        Table("Share of RL's final L2 change after a part of the steps, %", "figures 10-16",
              [f"{kind} at {p} %" for kind in ("share", "noise") for p in PARTS],
              alone("mcs+mcs", *has(".+", "share at 40 %"))),
    ]


# -- the claims --------------------------------------------------------------------------------------------

class Measure(NamedTuple):
    """An estimate and where its whole interval should lie."""
    name: str
    of: dict
    over: float = -math.inf
    under: float = math.inf


class Claim(NamedTuple):
    """Reproduced when every measure lies where it should with its whole interval; not reproduced when one
    lies elsewhere with its whole interval; else not testable. "And by noise alone" unless every null that has
    a place lies in its own. Limits are directions where the paper's sizes are its models' own, and the
    paper's where it gives a share (90 % of the weights, CKA of 0.998)."""
    text: str
    paper: str
    asked: list                          # measures
    null: list = []                      # measures beside: what there is without the effect, and where that
                                         # should lie for the claim to be about learning
    needs: Measure | None = None         # where its mean must lie for the claim to be testable
    why: str = ""                        # why it is not testable at this scale, if never


SCIENCE = ("mcs+mc", "mcs+mcs"), ("mc+mc", "mc+mcs")                      # in mid-training; without
CLAIMS = [
    Claim("Mid-training gains in math", "+15 to +40 points",
          [Measure("base to mcs", gain("math", "base", "mcs"), 0)]),
    Claim("Mid-training gains in code", "+5 to +12 points",
          [Measure("base to mcs", gain("code", "base", "mcs"), 0)]),
    Claim("Mid-training gains in science", "+6 to +13 points",
          [Measure("base to mcs", gain("science", "base", "mcs"), 0),
           Measure("mcs, where chance is 25,", mean("science", "mcs"), CHANCE)]),
    Claim("Mid-training keeps general performance", "leaderboards: -5 to +7 points",
          [Measure(f"held-out loss of {domain}", mean(f"loss {domain}", "mcs"), under=KEPT)
           for domain in ("general", "chat")],
          # a base that still learns from the little general text of the mixture has nothing to forget
          needs=Measure("held-out loss of general", mean("loss general", "mcs"), -KEPT)),
    Claim("Half of mid-training's tokens give most of its gain", "gains saturate at 15 to 27B of 31B tokens",
          [Measure("to half less the other half",
                   {("mcs@350", "avg"): 2, ("base", "avg"): -1, ("mcs", "avg"): -1}, 0)]),
    Claim("Each stage raises the macro-average", "7 to 11, then 21 to 29, then 30 to 40",
          [Measure("base to mcs", gain("avg", "base", "mcs"), 0),
           Measure("mcs to mcs+mcs", gain("avg", "mcs", "mcs+mcs"), 0)]),
    Claim("Both stages together make it at least three times the base's", "3 to 4 times",
          [Measure("mcs+mcs less 3 times base", {("mcs+mcs", "avg"): 1, ("base", "avg"): -3}, 0)],
          needs=Measure("base", mean("avg", "base"), 0.01)),
    Claim("RL on the base stays near zero in math", "AIME near zero; Nemotron-H: moderate",
          [Measure("base+mc, base+mcs", mean("math", "base+mc", "base+mcs"), under=0.05)],
          [Measure("gained by RL", difference("math", ("base+mc", "base+mcs"), ("base",))),
           Measure("gained from mcs instead", difference("math", ("mcs+mc", "mcs+mcs"), ("mcs",)))]),
    Claim("Science in mid-training raises science after RL", "+17 to +28 points GPQA-Diamond",
          [Measure("mcs less mc", difference("science", *SCIENCE), 0),
           Measure("mcs, where chance is 25,", mean("science", *SCIENCE[0]), CHANCE)]),
    # with M and R the effects of the two mixes, these are M - R and M + R: M is over |R|
    Claim("The RL mix matters less than the mid-training mix", "RL mix: under 2 points",
          [Measure("mcs+mc less mc+mcs", gain("avg", "mc+mcs", "mcs+mc"), 0),
           Measure("mcs+mcs less mc+mc", gain("avg", "mc+mc", "mcs+mcs"), 0)],
          [Measure("RL mix", difference("avg", ("mc+mcs", "mcs+mcs"), ("mc+mc", "mcs+mc"))),
           Measure("mid-training mix", difference("avg", *SCIENCE))]),
    Claim("Mid-training lengthens answers", "120 to 2,254 tokens",
          [Measure("base to mcs", gain("tokens", "base", "mcs"), 0)],
          needs=Measure("answers of the base that are cut", mean("cut", "base"), under=0.5)),
    Claim("RL shortens answers", "2,254 to 1,700 tokens",
          [Measure("mcs to mcs+mcs", gain("tokens", "mcs", "mcs+mcs"), under=0)]),
    Claim("Mid-training moves almost all weights by over 1 %", "over 90 %",
          [Measure("base to mcs", mean("changed", MT), 0.9)],
          [Measure("noise alone", mean("noise changed", MT), under=0.9)]),
    Claim("RL moves fewer weights than mid-training", "about 5 % by over 1 %",
          [Measure("mid-training less RL", gain("changed", RL, MT), 0)],
          [Measure("RL", mean("changed", RL)), Measure("noise alone", mean("noise changed", RL)),
           Measure("RL less noise", {(RL, "changed"): 1, (RL, "noise changed"): -1}, under=0)]),
    Claim("RL moves weights far less than mid-training", "L2 370 to 580 times smaller",
          [Measure("L2, mid-training less 10 times RL", {(MT, "L2"): 1, (RL, "L2"): -10}, 0)],
          [Measure("times", mean("times", MT)),
           Measure("L2, mid-training less 10 times noise", {(MT, "L2"): 1, (RL, "noise L2"): -10}, under=0)]),
    Claim("RL leaves the same footprint from any start", "L2 0.0003 and 0.0004",
          [Measure("L2, from mcs less twice from base", {(RL, "L2"): 1, (DIRECT, "L2"): -2}, under=0),
           Measure("L2, from mcs less half from base", {(RL, "L2"): 1, (DIRECT, "L2"): -0.5}, 0)],
          [Measure("times", mean("times", RL)),
           Measure("noise, from mcs less twice from base",
                   {(RL, "noise L2"): 1, (DIRECT, "noise L2"): -2}, 0)],
          needs=Measure("L2, from base", mean("L2", DIRECT), 0)),
    # no null: whatever shares a base, sources and an order of rows has some cosine
    Claim("MC and MCS move the weights alike", "cosine 0.52 and 0.62",
          [Measure("cosine", mean("cosine", MT), 0)]),
    Claim("RL keeps the representations", "CKA over 0.998 in every layer",
          [Measure("least of any layer, debiased", mean("CKA", "mcs and mcs+mcs"), 0.998)],
          [Measure("of base and mcs", mean("CKA", "base and mcs")),
           Measure("as published, biased", mean("biased CKA", "mcs and mcs+mcs")),
           Measure("texts permuted, at most", mean("permuted CKA", "mcs and mcs+mcs"))]),
    Claim("Most of the gain from base by MT to RL comes before RL", "17, 76, 80 % and 3, 44, 66 %",
          [Measure("to MT less to RL", {("path", "MT"): 2, ("path", "base"): -1, ("path", "RL"): -1}, 0)]),
    Claim("RL's change is front-loaded", "first 200 to 400 of 1,000 steps",
          [Measure("share after 40 % of the steps", mean("share at 40 %", "mcs+mcs"), 0.4)],
          [Measure("noise alone", mean("noise at 40 %", "mcs+mcs")),
           Measure("RL less noise", {("mcs+mcs", "share at 40 %"): 1, ("mcs+mcs", "noise at 40 %"): -1}, 0)]),
    Claim("Mid-training is best after long-context pretraining, and at a context of 16k",
          "MATH500 79.4, 82.5, 82.7 % at 8k, 16k, 32k", [], why="the toys read 256 tokens"),
    Claim("Mid-training at 8k ruins RULER at 128k; merging and long-context training mend it",
          "59 to 6 to 42 %", [], why="the toys read 256 tokens"),
]
VERDICTS = ("reproduced", "reproduced, and by noise alone", "not reproduced", "not testable at this scale",
            "not yet measured")


def limits(m, chains):
    """Where a measure should lie, as text."""
    def figure(x):
        e = {"mean": x, "low": None, "high": None, "seeds": len(chains)}
        return shown(e, m.of, chains) if x else "0"
    return " and ".join(f"{side} {figure(x)}" for side, x in (("over", m.over), ("under", m.under))
                        if math.isfinite(x))


def judged(claim, chains):
    """{"verdict": of VERDICTS, "asked", "found", "null": texts with figures and intervals}."""
    def told(m):
        return f"{m.name} {shown(estimate(chains, m.of), m.of, chains)}"

    def side(m):
        """1: the whole interval where it should be, 0: some of it, -1: none of it."""
        e = estimate(chains, m.of)
        return (m.over < e["low"] and e["high"] < m.under) - (e["high"] <= m.over or e["low"] >= m.under)

    asked, need, extra = [estimate(chains, m.of) for m in claim.asked], claim.needs, []
    base = need and estimate(chains, need.of)
    if claim.why:
        verdict, extra = 3, [claim.why]
    elif None in asked or need and base is None:
        lacking = dict.fromkeys(s for m in [*claim.asked, *[need] * bool(need)] for s, what in m.of
                                if not any(what in chain.numbers.get(s, ()) for chain in chains.values()))
        verdict, extra = 4, [f"not there: {', '.join(lacking) or 'a chain with all of it'}"]
    elif need and not need.over < base["mean"] < need.under:
        verdict, extra = 3, [f"{told(need)}, but a test needs {limits(need, chains)}"]
    elif any(e["low"] is None for e in asked):
        verdict, extra = 3, ["one chain, so no interval"]
    else:
        sides = [side(m) for m in claim.asked]
        verdict = {1: 0, 0: 3, -1: 2}[min(sides)]
        extra = ["undecided: an interval holds its limit"] if min(sides) == 0 else []
    nulls = []
    for m in claim.null:
        e, where = estimate(chains, m.of), limits(m, chains)
        if where and e and e["low"] is not None:
            verdict = verdict or int(side(m) < 1)
            said = {1: f": {where}, beyond noise", 0: f": {where} or not, undecided",
                    -1: f": not {where}, noise gives that too"}[side(m)]
        else:
            said = ""
        nulls.append(told(m) + said)
    return {"verdict": VERDICTS[verdict],
            "asked": "; ".join(f"{m.name} {limits(m, chains)}" for m in claim.asked),
            "found": "; ".join([*map(told, claim.asked), *extra]), "null": "; ".join(nulls)}


# -- the study ---------------------------------------------------------------------------------------------

def study(folder: Positional[str]):
    """The paper's claims, tried on the chains of a study.

    Args:
        folder: of the chains MODEL-SEED; study.json goes there too
    """
    chains = {}                                           # {model: {seed: Chain}}
    try:
        names = sorted(os.listdir(folder))
    except OSError as e:
        raise InputError(f"study: {folder} cannot be read ({e.strerror}); give the folder of `make study`"
                         ) from None
    for name in names:
        if (told := re.fullmatch(r"(.+)-(\d+)", name)) and os.path.isdir(os.path.join(folder, name)):
            chains.setdefault(told[1], {})[told[2]] = read_chain(os.path.join(folder, name))
    if not chains:
        raise InputError(f"study: {folder} has no chain; one is a folder MODEL-SEED, as in toy-1")
    every = {}                                            # {subject: {what some chain has of it: a number}}
    for own in chains.values():
        for chain in own.values():
            for subject, numbers in chain.numbers.items():
                every.setdefault(subject, {}).update(numbers)
    result = {
        "chains": {model: list(own) for model, own in chains.items()},
        "estimates": {model: {subject: {what: estimate(own, mean(what, subject)) for what in every[subject]}
                              for subject in every} for model, own in chains.items()},
        "tables": [{"title": t.title, "paper": t.paper, "head": ["", "model", *t.whats], "rows": [
            [name, model, *(shown(estimate(own, of), of, own) for of in (
                difference(what, *row) for what in t.whats))]
            for model, own in chains.items() for name, row in t.rows.items()]} for t in tables(every)],
        "claims": [{"claim": claim.text, "paper": claim.paper, "model": model} | judged(claim, own)
                   for claim in CLAIMS for model, own in chains.items()]}
    path = os.path.join(folder, "study.json")
    try:
        write_atomic(path, json.dumps(result, indent=1))
    except OSError as e:
        raise InputError(f"study: {path} cannot be written ({e.strerror})") from None
    print(as_text(result) + f"\n\n{path}")
    return result


def as_text(result):
    """The tables, then each claim with its verdict, then what the verdicts rest on."""
    lines = [f"{model}: {len(seeds)} chain{'s' * (len(seeds) > 1)}, seed {', '.join(seeds)}"
             for model, seeds in result["chains"].items()]
    for t in result["tables"]:
        lines += ["", f"{t['title']} (paper: {t['paper']})", *aligned([t["head"], *t["rows"]], "<", "<")]
    lines += ["", *aligned([["claim", "model", "verdict", "paper"]] + [
        [c[key] for key in ("claim", "model", "verdict", "paper")] for c in result["claims"]], "<", "<")]
    for c in result["claims"]:
        lines += ["", f"{c['claim']}, {c['model']}: {c['verdict']}", *(
            f"  {key}: {c[key]}" for key in ("asked", "found", "null") if c[key])]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        tyro.cli(study, args=split_flags(sys.argv[1:]))
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
