"""The paper's claims, tried on what the chains of `make study` left (paper, tables 4-23, figures 10-16).

    python -m study.claims runs/study                            # tables, verdicts, runs/study/study.json
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
import enum
import json
import math
import os
import re
from typing import NamedTuple

import numpy as np
from tyro.conf import Positional

from cli import InputError, commands, write_atomic
from reporting.sections import KEPT, chains_of
from suite.intervals import aligned, combined, interval, paired, read_results, student_t

DOMAINS = {"math": "toy-math", "code": "toy-code", "science": "toy-science"}         # task of each
CHANCE = 0.25                            # of toy-science: four letters, each as often right
STARTS = ("base", "m", "mc", "mcs")
MIXES = ("mc", "mcs")
CELLS = (*STARTS, *(f"{start}+{mix}" for start in STARTS for mix in MIXES))
MT, RL, DIRECT = "base to mcs", "mcs to mcs+mcs", "base to base+mcs"                 # changes of weights
SHARES = (20, 40, 60, 80)                # of RL's steps, %


# -- a chain: from files to numbers ------------------------------------------------------------------------

class Chain(NamedTuple):
    """numbers: {subject: {what: number}}; a subject is a cell, "A to B" (weights), "A and B" (CKA), "path".
    problems: {cell: {domain: {problem: scores of its samples}}}."""
    numbers: dict
    problems: dict

    def add(self, numbers):
        """Adds {subject: {what: number}}; None and nan are left out."""
        for subject, values in numbers.items():
            subject_numbers = self.numbers.setdefault(subject, {})
            for what, value in values.items():
                if value is not None and not math.isnan(value):
                    subject_numbers[what] = float(value)


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
    chain = Chain({}, {})
    evaluations = os.path.join(folder, "eval")
    for cell in sorted(os.listdir(evaluations)) if os.path.isdir(evaluations) else ():
        path = os.path.join(evaluations, cell, "results.json")
        with reading(path):
            if os.path.exists(path):
                results, problems = read_results(os.path.dirname(path))
                by_domain = {domain: problems[task] for domain, task in DOMAINS.items() if task in problems}
                chain.problems[cell] = by_domain
                chain.add({cell: scored(results["tasks"], by_domain)})
    for name, numbers_of in (("weights.json", weights), ("cka.json", cka), ("trajectory.json", trajectory),
                             ("landscape.json", landscape)):
        path = os.path.join(folder, "analysis", name)
        with reading(path), open(path) as f:
            chain.add(numbers_of(json.load(f)))
    for cell in STARTS[1:]:
        path = os.path.join(folder, cell, "retention.json")
        with reading(path), open(path) as f:
            chain.add({cell: retention(json.load(f))})
    return chain


def scored(tasks, problems):
    """Of a cell, scores by domain and their mean; of math also length and confidence of answers."""
    numbers = {}
    for domain, domain_problems in problems.items():
        numbers[domain] = np.mean([np.mean(scores) for scores in domain_problems.values()])
    if len(numbers) == len(DOMAINS):
        numbers["avg"] = np.mean(list(numbers.values()))
    if "math" in numbers:
        math_task = tasks[DOMAINS["math"]]
        numbers |= {"tokens": math_task["all"]["median_tokens"], "cut": math_task["truncated"],
                    "NLL": math_task["all"]["nll"], "NLL right": math_task["right"]["nll"],
                    "NLL wrong": math_task["wrong"]["nll"]}
    return numbers


def retention(content):
    """Of a cell, the change of the held-out loss over its mid-training, by domain, nats a token."""
    (_, first), *_, (_, last) = content["curve"]
    return {f"loss {domain}": last[domain] - first[domain] for domain in first}


def weights(content):
    """Of each pair relative L2 (pooled) and the share that stays within each threshold, and the noise null's.
    times: how often farther mid-training moves than RL, and RL from mcs than RL from the base."""
    numbers = {}
    for pair in content["pairs"]:
        pair_numbers = numbers.setdefault(" to ".join(pair["names"]), {})
        for row in pair["rows"]:
            if row["by"] == "component":
                pair_numbers[f"L2 {row['component']}"] = row["relative_l2"]
            elif row["by"] == "total":
                pair_numbers |= changes(row)
                pair_numbers["cosine"] = row.get("cosine", pair_numbers.get("cosine"))
        null = pair["nulls"].get("total")
        if null:
            pair_numbers |= {f"noise {what}": x for what, x in changes(null).items()}
    for pair, other in ((MT, RL), (RL, DIRECT)):
        for kind in ("", "noise "):
            farther = numbers.get(pair, {}).get("L2")
            nearer = numbers.get(other, {}).get(f"{kind}L2")
            if farther is not None and nearer:
                numbers[pair][f"{kind}times"] = farther / nearer
    return numbers


def changes(row):
    """Relative L2 of a row of weights.json, the shares that stay within the thresholds, and what changed."""
    same = {float(threshold): share for threshold, share in row["unchanged"].items()}
    numbers = {"L2": row["relative_l2"]}
    for threshold, share in same.items():
        numbers[f"same at {100 * threshold:g} %"] = share
    numbers["changed"] = None if same[0.01] is None else 1 - same[0.01]
    return numbers


def cka(content):
    """The least CKA of any layer and corpus, debiased and as published, and the most of permuted texts."""
    layers = {}                                           # {pair: layers of every corpus}
    for corpus in content.values():
        if corpus["pooling"] == "mean":
            for pair, curve in corpus["pairs"].items():
                layers.setdefault(pair.replace(" ", " and "), []).extend(curve)

    def extreme(rows, key, pick):
        values = [row[key] for row in rows if row[key] is not None and not math.isnan(row[key])]
        return pick(values, default=None)

    numbers = {}
    for pair, rows in layers.items():
        numbers[pair] = {"CKA": extreme(rows, "debiased", min), "biased CKA": extreme(rows, "biased", min),
                         "permuted CKA": extreme(rows, "null_high", max)}
    return numbers


def trajectory(content):
    """How much of the change at the last step is there after a part of the steps (between exported models: on
    a straight line), and the same of noise at the same learning rates."""
    numbers = {}
    for run in content["runs"]:
        steps = sorted(run["steps"], key=lambda step: step["step"])
        run_numbers = numbers.setdefault(os.path.basename(run["name"]), {})
        for kind, name in (("from_mt", "share"), ("null", "noise")):
            l2 = [step[kind]["relative_l2"] for step in steps if step.get(kind)]
            if steps and len(l2) == len(steps) and l2[-1]:
                x = [0, *(step["step"] for step in steps)]
                y = [0, *l2]
                for share in SHARES:
                    part = np.interp(share / 100 * x[-1], x, y)
                    run_numbers[f"{name} at {share} %"] = part / y[-1]
    return numbers


def landscape(content):
    """Pass rates on the straight path from the base by MT to RL."""
    scores = {(point["alpha"], point["beta"]): point["score"] for point in content["path"]}
    ends = {"base": (0, 0), "half to MT": (0.5, 0), "MT": (1, 0), "half to RL": (1, 0.5), "RL": (1, 1)}
    return {"path": {name: scores.get(point) for name, point in ends.items()}}


# -- chains to an estimate ---------------------------------------------------------------------------------
# What is estimated is a sum over chains' numbers, {(subject, what): weight}: a number, a mean, a difference.

class Estimate(NamedTuple):
    """A mean over chains with its 95 % interval; low and high are None where there is none."""
    mean: float
    low: float | None
    high: float | None
    seeds: int                           # chains that have the number


def difference(what, subjects, less=()):
    """The mean of some subjects, less that of others."""
    terms = {}
    for subject in subjects:
        terms[subject, what] = 1 / len(subjects)
    for subject in less:
        terms[subject, what] = -1 / len(less)
    return terms


def mean(what, *subjects):
    """The mean of some subjects."""
    return difference(what, subjects)


def gain(what, start, end):
    """What the second subject is over the first."""
    return difference(what, (end,), (start,))


def estimate(chains, terms):
    """The Estimate of a sum over {seed: Chain}, over those that have all of it; None without one."""
    values = {}                                           # {seed: sum}
    for seed, chain in chains.items():
        numbers = [chain.numbers.get(subject, {}).get(what) for subject, what in terms]
        if None not in numbers:
            values[seed] = math.fsum(w * x for w, x in zip(terms.values(), numbers, strict=True))
    if not values:
        return None
    n = len(values)
    centre = float(np.mean(list(values.values())))
    low = high = None
    if n > 1:
        deviation = float(np.std(list(values.values()), ddof=1))
        half = student_t(n) * deviation / math.sqrt(n)
        low, high = centre - half, centre + half
        if is_score(terms):
            low, high = max(low, 0.0), min(high, 1.0)
    if low == high:                                       # seeds tell nothing of what is in doubt
        first = next(iter(values))
        low, high = over_problems(chains[first].problems, terms) or (low, high)
    return Estimate(centre, low, high, n)


def is_score(terms):
    """Whether a sum is a mean of scores, which lies in 0..1."""
    whats = {what for _, what in terms}
    return min(terms.values()) > 0 and whats <= {*DOMAINS, "avg"}


def over_problems(problems, terms):
    """(low, high) within a chain, for other problems; None of what is no score. problems: of a Chain."""
    cell_weights = {}                                     # {domain: {cell: weight}}
    for (cell, what), weight in terms.items():
        domains = tuple(DOMAINS) if what == "avg" else (what,)
        if not set(domains) <= set(problems.get(cell, ())):
            return None
        for domain in domains:
            cell_weights.setdefault(domain, {})[cell] = weight / len(domains)
    sums = {}                                             # {domain: [weighted sum of a problem's scores]}
    for domain, cells in cell_weights.items():
        scores = {cell: problems[cell][domain] for cell in cells}
        shared = set.intersection(*map(set, scores.values()))
        if not shared:
            return None
        sums[domain] = []
        for key in sorted(shared):
            weighted = [weight * np.mean(scores[cell][key]) for cell, weight in cells.items()]
            sums[domain].append(sum(weighted))
    if min(terms.values()) < 0:
        difference_of_scores = paired([(1.0, domain_sums) for domain_sums in sums.values()])
        return difference_of_scores.low, difference_of_scores.high
    parts = []
    for domain, domain_sums in sums.items():
        whole = sum(cell_weights[domain].values())
        parts.append((whole, interval(np.array(domain_sums) / whole)))
    score = combined(parts)
    return score.low, score.high


FORMS = {"L2": "{:.3g}", "times": "{:.3g}", "CKA": "{:.4f}", "cosine": "{:.3f}", "NLL": "{:.3f}",
         "loss": "{:.3f}", "tokens": "{:.1f}"}           # by a word of what it is; others are shares, in %


def form_of(terms):
    """(format of a sum's figures, what they are multiplied by); differences have signs."""
    form, by = "{:.1f}", 100
    words = {word for _, what in terms for word in what.split()}
    for word, word_form in FORMS.items():
        if word in words:
            form, by = word_form, 1
            break
    if min(terms.values()) < 0:
        form = form.replace("{:", "{:+")
    return form, by


def shown(estimated, terms, chains):
    """An Estimate as text: 49.6 [43.7, 55.5] n=2."""
    if estimated is None:
        return "-"
    form, by = form_of(terms)
    text = form.format(by * estimated.mean)
    if estimated.low is not None:
        text += f" [{form.format(by * estimated.low)}, {form.format(by * estimated.high)}]"
    if estimated.seeds < len(chains):
        text += f" n={estimated.seeds}"
    return text


# -- the tables --------------------------------------------------------------------------------------------

class Table(NamedTuple):
    title: str
    paper: str                           # whose counterpart it is
    whats: list                          # columns
    rows: dict                           # {name: (subjects,) or (subjects, less), see difference()}


def alone(*names):
    """Rows of single subjects, each once."""
    return {name: ((name,),) for name in names}


def tables(measured_subjects):
    """measured_subjects: {subject: what some chain has of it}; beyond those named here, it may have other
    pairs, mcs@N."""
    def subjects(pattern, what=None):
        return [subject for subject, whats in measured_subjects.items()
                if re.fullmatch(pattern, subject) and (what is None or what in whats)]

    domains = [*DOMAINS, "avg"]
    same = [f"same at {threshold} %" for threshold in ("0.1", "0.5", "1", "2", "5", "10")]
    pairs = alone(MT, RL, DIRECT, *subjects(".+ to .+"))
    budgets = sorted(subjects(r"mcs@\d+"), key=lambda cell: int(cell.removeprefix("mcs@")))
    counterparts = [
        Table("Scores, %, by mid-training and RL mixture", "tables 4-6 and 11-13", domains, alone(*CELLS)),
        Table("Gains, points", "tables 4-6 and 11-13", domains, gain_rows()),
        Table("Held-out loss, change in nats a token", "tables 4-6: general performance",
              [f"loss {domain}" for domain in ("general", "chat", *DOMAINS)], alone(*STARTS[1:])),
    ]
    if budgets:
        counterparts.append(Table("Scores, %, by steps of mid-training", "table 9", domains,
                           alone(*budgets, "mcs")))
    return counterparts + [
        Table("Behaviour in math: pass rate, answers cut, %; median tokens; negative log-prob", "table 15",
              ["math", "cut", "tokens", "NLL", "NLL right", "NLL wrong"],
              alone("base", "mcs", "mcs+mcs", "base+mcs")),
        Table("Relative L2 change of weights; share changed by over 1 %, %", "table 22",
              ["L2 attention", "L2 MLP", "L2 Mamba", "L2 embedding", "L2 norm", "L2", "noise L2", "changed",
               "noise changed", "cosine"], pairs),
        Table("Weights that stay, %, by threshold", "table 23",
              [*same, *(f"noise {what}" for what in same)], pairs),
        Table("Least CKA of any layer", "figures 10-16", ["CKA", "biased CKA", "permuted CKA"],
              alone("base and mcs", "mcs and mcs+mcs", *subjects(".+ and .+"))),
        Table("Pass rate on the path from base by MT to RL, %", "figures 10-16",
              ["base", "half to MT", "MT", "half to RL", "RL"], alone("path")),
        Table("Share of RL's final L2 change after a part of the steps, %", "figures 10-16",
              [f"{kind} at {share} %" for kind in ("share", "noise") for share in SHARES],
              alone("mcs+mcs", *subjects(".+", "share at 40 %"))),
    ]


def gain_rows():
    """Rows of the gains: each mid-training over the base or a smaller mixture, each RL over its start, and
    what science adds."""
    steps = [("base", "m"), ("base", "mc"), ("base", "mcs"), ("m", "mc"), ("mc", "mcs")]
    for start in STARTS:
        steps += [(start, f"{start}+{mix}") for mix in MIXES]
    rows = {f"{start} to {end}": ((end,), (start,)) for start, end in steps}
    rows["after RL: science in mid-training"] = ("mcs+mc", "mcs+mcs"), ("mc+mc", "mc+mcs")
    rows["after RL: science in RL"] = ("mc+mcs", "mcs+mcs"), ("mc+mc", "mcs+mc")
    return rows


# -- the claims --------------------------------------------------------------------------------------------

class Measure(NamedTuple):
    """An estimate and where its whole interval should lie."""
    name: str
    terms: dict                          # of the estimate
    over: float = -math.inf
    under: float = math.inf


class Claim(NamedTuple):
    """Reproduced when every measure lies where it should with its whole interval; not reproduced when one
    lies elsewhere with its whole interval; else not testable. "And by noise alone" unless every null that has
    a place lies in its own. Limits are directions where the paper's sizes are its models' own, and the
    paper's where it gives a share (90 % of the weights, CKA of 0.998)."""
    text: str
    paper: str
    measures: list                       # what is asked for
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


# -- verdicts --------------------------------------------------------------------------------------------

class Verdict(enum.Enum):
    """What became of a claim."""
    REPRODUCED = "reproduced"
    NOISE_TOO = "reproduced, and by noise alone"
    NOT_REPRODUCED = "not reproduced"
    NOT_TESTABLE = "not testable at this scale"
    NOT_MEASURED = "not yet measured"


class Side(enum.Enum):
    """Where an interval lies."""
    INSIDE = "all of it where it should be"
    UNDECIDED = "some of it where it should be"
    OUTSIDE = "none of it where it should be"


def side(measure, estimated):
    """The Side of an Estimate that has an interval."""
    if measure.over < estimated.low and estimated.high < measure.under:
        return Side.INSIDE
    if estimated.high <= measure.over or estimated.low >= measure.under:
        return Side.OUTSIDE
    return Side.UNDECIDED


def limits(measure, chains):
    """Where a measure should lie, as text."""
    texts = []
    for name, limit in (("over", measure.over), ("under", measure.under)):
        if math.isfinite(limit):
            exact = Estimate(limit, None, None, len(chains))
            texts.append(f"{name} {shown(exact, measure.terms, chains) if limit else '0'}")
    return " and ".join(texts)


def measured(measure, chains):
    """A measure with its estimate, as text."""
    return f"{measure.name} {shown(estimate(chains, measure.terms), measure.terms, chains)}"


def verdict_of(claim, chains):
    """(the Verdict of what a claim asks for, the nulls apart; why, or "")."""
    estimates = [estimate(chains, measure.terms) for measure in claim.measures]
    need = claim.needs
    needed = estimate(chains, need.terms) if need else None
    if claim.why:
        return Verdict.NOT_TESTABLE, claim.why
    if None in estimates or need and needed is None:
        subjects = ", ".join(lacking(claim, chains)) or "a chain with all of it"
        return Verdict.NOT_MEASURED, f"not there: {subjects}"
    if need and not need.over < needed.mean < need.under:
        return Verdict.NOT_TESTABLE, f"{measured(need, chains)}, but a test needs {limits(need, chains)}"
    if any(estimated.low is None for estimated in estimates):
        return Verdict.NOT_TESTABLE, "one chain, so no interval"
    sides = [side(measure, estimated) for measure, estimated in zip(claim.measures, estimates, strict=True)]
    if Side.OUTSIDE in sides:
        return Verdict.NOT_REPRODUCED, ""
    if Side.UNDECIDED in sides:
        return Verdict.NOT_TESTABLE, "undecided: an interval holds its limit"
    return Verdict.REPRODUCED, ""


def lacking(claim, chains):
    """The subjects of a claim of which no chain has what it asks for, each once."""
    measures = [*claim.measures, claim.needs] if claim.needs else claim.measures
    subjects = {}
    for measure in measures:
        for subject, what in measure.terms:
            if not any(what in chain.numbers.get(subject, ()) for chain in chains.values()):
                subjects[subject] = True
    return list(subjects)


NULL_TEXTS = {                           # of what there is without the effect, by where it lies
    Side.INSIDE: ": {limits}, beyond noise",
    Side.UNDECIDED: ": {limits} or not, undecided",
    Side.OUTSIDE: ": not {limits}, noise gives that too",
}


def judged(claim, chains):
    """{"verdict": the text of a Verdict, "asked", "found", "null": texts with figures and intervals}. chains:
    {seed: Chain}."""
    verdict, why = verdict_of(claim, chains)
    nulls = []
    for null in claim.null:
        text = measured(null, chains)
        estimated = estimate(chains, null.terms)
        where = limits(null, chains)                      # "": it should lie nowhere
        if where and estimated and estimated.low is not None:
            null_side = side(null, estimated)
            text += NULL_TEXTS[null_side].format(limits=where)
            if verdict is Verdict.REPRODUCED and null_side is not Side.INSIDE:
                verdict = Verdict.NOISE_TOO
        nulls.append(text)
    figures = [measured(measure, chains) for measure in claim.measures]
    if why:
        figures.append(why)
    return {"verdict": verdict.value,
            "asked": "; ".join(f"{measure.name} {limits(measure, chains)}" for measure in claim.measures),
            "found": "; ".join(figures), "null": "; ".join(nulls)}


# -- the study ---------------------------------------------------------------------------------------------

def read_chains(folder):
    """{model: {seed: Chain}} of a study's folder."""
    chains = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError as e:
        raise InputError(f"study: {folder} cannot be read ({e.strerror}); give the folder of `make study`"
                         ) from None
    for name in names:
        path = os.path.join(folder, name)
        match = re.fullmatch(r"(.+)-(\d+)", name)
        if match and os.path.isdir(path):
            model, seed = match.groups()
            chains.setdefault(model, {})[seed] = read_chain(path)
    if not chains:
        raise InputError(f"study: {folder} has no chain; one is a folder MODEL-SEED, as in toy-1")
    return chains


def what_is_there(chains):
    """{subject: {what: a number}} of everything that some chain has."""
    subjects = {}
    for model_chains in chains.values():
        for chain in model_chains.values():
            for subject, numbers in chain.numbers.items():
                subjects.setdefault(subject, {}).update(numbers)
    return subjects


def estimates_of(chains, subjects):
    """{subject: {what: Estimate as a dict, or None}} of a model's chains."""
    estimates = {}
    for subject, whats in subjects.items():
        estimates[subject] = {}
        for what in whats:
            estimated = estimate(chains, mean(what, subject))
            estimates[subject][what] = estimated and estimated._asdict()
    return estimates


def filled(table, chains):
    """A Table with its figures, as texts, a row a model and name."""
    rows = []
    for model, model_chains in chains.items():
        for name, subjects in table.rows.items():
            row = [name, model]
            for what in table.whats:
                terms = difference(what, *subjects)
                row.append(shown(estimate(model_chains, terms), terms, model_chains))
            rows.append(row)
    return {"title": table.title, "paper": table.paper, "head": ["", "model", *table.whats], "rows": rows}


def study(folder: Positional[str]):
    """The paper's claims, tried on the chains of a study.

    Args:
        folder: of the chains MODEL-SEED; study.json goes there too
    """
    chains = read_chains(folder)
    subjects = what_is_there(chains)
    claims = []
    for claim in CLAIMS:
        for model, model_chains in chains.items():
            claims.append({"claim": claim.text, "paper": claim.paper, "model": model}
                          | judged(claim, model_chains))
    seeds, estimates = {}, {}                             # of each model
    for model, model_chains in chains.items():
        seeds[model] = list(model_chains)
        estimates[model] = estimates_of(model_chains, subjects)
    filled_tables = [filled(table, chains) for table in tables(subjects)]
    result = {"chains": seeds, "estimates": estimates, "tables": filled_tables, "claims": claims}
    path = os.path.join(folder, "study.json")
    try:
        write_atomic(path, json.dumps(result, indent=1))
    except OSError as e:
        raise InputError(f"study: {path} cannot be written ({e.strerror})") from None
    print(as_text(result) + f"\n\n{path}")
    return result


def as_text(result):
    """The tables, then each claim with its verdict, then what the verdicts rest on."""
    lines = chains_of(result["chains"])
    for table in result["tables"]:
        lines += ["", f"{table['title']} (paper: {table['paper']})"]
        lines += aligned([table["head"], *table["rows"]], "<", "<")
    verdicts = [["claim", "model", "verdict", "paper"]]
    for claim in result["claims"]:
        verdicts.append([claim[key] for key in ("claim", "model", "verdict", "paper")])
    lines += ["", *aligned(verdicts, "<", "<")]
    for claim in result["claims"]:
        lines += ["", f"{claim['claim']}, {claim['model']}: {claim['verdict']}"]
        lines += [f"  {key}: {claim[key]}" for key in ("asked", "found", "null") if claim[key]]
    return "\n".join(lines)


if __name__ == "__main__":
    commands(study)
