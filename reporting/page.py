"""One page of what runs came to (paper, sections 8 to 10): pictures, what they show, a table under each.

    python analyze.py report runs runs/eval runs/analysis --out=runs/report
    python analyze.py report runs/study --out=runs/study/report

Any folders of runs; what they are is found by the files in them and in their subfolders: metrics.jsonl (of
mid-training and of RL), results.json and compare.json (evaluate.py), weights.json, cka.json, landscape.json,
trajectory.json (analyze.py), study.json (study.py). A section is there when its data is. report.html holds
everything it shows and runs nothing; figures/ has each picture as PNG and SVG. The same files give the same
bytes.
"""

import base64
import html
import json
import math
import os
import re
from typing import NamedTuple

import numpy as np

from cli import InputError, human, read_lines, write_atomic
from reporting.figures import (
    HATCHES,
    MARKERS,
    bars,
    colour,
    gained,
    heat,
    label,
    line,
    lines,
    picture,
    solved,
)

FILES = {"metrics.jsonl": (), "config.json": (), "results.json": ("tasks", "averages"),         # their keys
         "compare.json": ("runs", "gains", "frontier"), "weights.json": ("pairs",),
         "cka.json": (), "landscape.json": ("problems", "samples"),
         "trajectory.json": ("runs",), "study.json": ("chains", "estimates", "tables", "claims")}
FLOOR, CHANGED = 2 ** -8, 0.01       # bf16's smallest relative change; paper


class Section(NamedTuple):
    title: str
    headline: str                        # its sentence in the summary
    text: dict                           # {run-in head: paragraph}, after those of its function's docstring
    panels: list                         # [(inches, draw(axes))], see figures.py
    head: list
    rows: list


# -- what is there -----------------------------------------------------------------------------------------

def find(folders):
    """{name of FILES: {folder: what it holds}} of folders and their subfolders, in the order given.
    InputError on what is no folder, on damaged files, and where there is nothing."""
    found, seen = {name: {} for name in FILES}, set()
    for given in folders:
        try:
            own = [given, *(os.path.join(given, sub) for sub in sorted(os.listdir(given)))]
        except OSError as e:
            raise InputError(f"report: {given} cannot be read as a folder of runs ({e.strerror})") from None
        for name in FILES:
            for folder in own:
                path = os.path.join(folder, name)
                if os.path.isfile(path) and os.path.realpath(path) not in seen:
                    seen.add(os.path.realpath(path))
                    found[name][folder] = read(path)
    if not any(found[name] for name in FILES if name != "config.json"):
        raise InputError(f"report: nothing to show in {', '.join(folders) or 'no folder'}; give folders with "
                         f"one of {', '.join(name for name in FILES if name != 'config.json')}")
    return found


def read(path):
    """What a file holds; InputError when that is not what its name says."""
    try:
        if path.endswith(".jsonl"):
            return read_lines(path)
        with open(path) as f:
            own = json.load(f)
        missing = [key for key in FILES[os.path.basename(path)] if key not in own]
        if missing or not isinstance(own, dict) or not own:
            raise ValueError(f"no {', '.join(missing) or 'object'} in it")
        return own
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise InputError(f"report: {path} cannot be read ({e}); make it again or leave it out") from None


def short(paths):
    """{path: its last part, and as many before it as tell all paths apart}."""
    parts = [os.path.realpath(path).split(os.sep) for path in paths]
    n = next(n for n in range(1, 1000) if len({tuple(p[-n:]) for p in parts}) == len(parts))
    return {path: "/".join(p[-n:]) for path, p in zip(paths, parts, strict=True)}


def labels(of):
    """{name: x} for a picture: two names that look the same there are numbered."""
    drawn = [label(name) for name in of]
    return {text if drawn.count(text) == 1 else f"{i + 1}: {text}": x
            for i, (text, x) in enumerate(zip(drawn, of.values(), strict=True))}


def cell(x, form="{:.3g}", by=1):
    return "-" if x is None or math.isnan(x) else form.format(by * x)


def percent(x):
    return cell(x, "{:.1f}", 100)


def between(r, form="{:.1f}", by=100, of="score"):
    """A number with its interval: 49.6 [43.7, 55.5]."""
    if r.get(of) is None:
        return "-"
    return f"{cell(r[of], form, by)} [{cell(r['low'], form, by)}, {cell(r['high'], form, by)}]"


def at(shares, t):
    """The entry of {threshold as text: share} at t."""
    return next((share for key, share in shares.items() if float(key) == t), None)


# -- training ----------------------------------------------------------------------------------------------

def retention(name, metrics, config):
    """Held-out loss by domain over a mid-training run.

    What it shows: how well the model predicts text that it was not trained on, by domain, while it is
    trained. A loss is the mean surprise at a token, in nats.
    How to read it: lower is better. A domain that rises is being forgotten; general web text and chat are
    where that shows first.
    Noise: no interval, since the run saves means only. A change under 0.05 nats is called kept; that limit
    is this project's."""
    tokens = {0: 0} | {m["step"]: m["tokens"] for m in metrics if "tokens" in m}
    curve = [(tokens[m["step"]], m["eval"]) for m in metrics if "eval" in m]
    if not curve:
        return None
    (_, before), (end, after) = curve[0], curve[-1]
    change = {d: after[d] - before[d] for d in before}
    kinds = {d: "kept" if abs(x) < 0.05 else "gained" if x < 0 else "lost" for d, x in change.items()}
    told = {kind: ", ".join(d for d in before if kinds[d] == kind) or "none"
            for kind in ("gained", "lost", "kept")}
    return Section(
        f"Training on text: {name}",
        f"{name}, held-out loss after {human(end)} tokens: better in {told['gained']}; within 0.05 in "
        f"{told['kept']}; worse in {told['lost']}.",
        {"Sample": f"{config.get('eval_rows', 'some')} rows of {config.get('seq_len', 'some')} tokens of "
                   f"each source, the same ones each time; {len(curve)} evaluations."},
        [lines("held-out loss by domain", "training tokens", "nats a token",
               [(d, [(x, own[d]) for x, own in curve], line(i + 1)) for i, d in enumerate(before)]),
         lines("training loss, each logged step", "training tokens", "nats a token", [
             ("", [(m["tokens"], m["loss"]) for m in metrics if "loss" in m],
              dict(color="black", linewidth=0.6))])],
        ["domain", "before", "after", "change", ""],
        [[d, f"{before[d]:.3f}", f"{after[d]:.3f}", f"{x:+.3f}", kinds[d]] for d, x in change.items()])


def reinforcement(name, metrics, config):
    """Reward, pass rate, length and KL over an RL run, and its evaluations.

    What it shows: the model answers problems, a checker says right or wrong, and the model is trained
    towards what was right. The reward is 1 or 0 for that, with penalties of form.
    How to read it: held-out prompts (diamonds) should rise with those trained on (lines). KL is how far the
    model is from its reference. The reference may follow, so KL can fall.
    Selection: a prompt is called unsolved when every answer before the first step was wrong. Some of that is
    bad luck, so some are solved later without any learning. evaluate.py --compare takes this luck out."""
    steps = [m for m in metrics if "reward" in m]
    curve = [(m["step"], m["eval"]) for m in metrics if "eval" in m]
    prompts, samples = (config.get(key) for key in ("eval_prompts", "eval_samples"))

    def trained(key, color=6, **style):
        return [(m["step"], m.get(key)) for m in steps], dict(color=colour(color), linewidth=1) | style

    def held(of, **style):
        return [(step, of(e)) for step, e in curve], dict(color=colour(1), marker="D", linestyle="",
                                                          markeredgecolor="black") | style

    panels = [
        lines("reward and pass rate", "RL step", "mean", [
            ("reward", *trained("reward", 0, linewidth=3)), ("pass rate", *trained("pass_rate")),
            ("pass rate, held out", *held(lambda e: e["pass"]))], 3.8),
        lines("length of answers", "RL step", "tokens", [
            ("in training", *trained("length")), ("held out", *held(lambda e: e["length"]))], 3.8),
        lines("distance from the reference", "RL step", "KL, nats a token (k3)", [("", *trained("k3"))], 3.8)]
    if curve:
        panels.append(lines("prompts unsolved before the first step", "RL step", "%", [
            ("solved at least once", *held(lambda e: 100 * e["frontier"]["solved"]
                                           / max(1, e["frontier"]["unsolved"]), **line(2))),
            ("their pass rate", *held(lambda e: 100 * e["frontier"]["pass"], **line(1)))], 3.8))
    kinds = list(dict.fromkeys((d, k) for _, e in curve for d, own in e.items()
                               if isinstance(own, dict) and d != "frontier" for k in own))
    return Section(
        f"Reinforcement learning: {name}",
        f"{name}: pass rate on held-out prompts {percent(curve[0][1]['pass'])} % at first, "
        f"{percent(curve[-1][1]['pass'])} % after {curve[-1][0]} RL steps." if curve else
        f"{name}: {len(steps)} RL steps, no evaluation.",
        {"Sample": (f"{steps[-1].get('responses', 'some')} answers in the last step; " if steps else "")
                   + f"{len(curve)} evaluations of at most {prompts or 'some'} held-out prompts a domain, "
                   f"{samples or 'some'} answers each.",
         "Noise": (f"with {prompts} prompts a pass rate is uncertain by at most about "
                   f"{98 / math.sqrt(prompts):.0f} points (95 %). " if prompts else "")
                  + "The run saves no interval; evaluate.py makes one."},
        panels,
        ["step", "pass rate, %", *(f"{d} {k}, %" for d, k in kinds), "tokens", "unsolved at first",
         "of them solved", "their pass rate, %"],
        [[str(step), percent(e["pass"]), *(percent(e.get(d, {}).get(k)) for d, k in kinds),
          f"{e['length']:.1f}", *(str(e["frontier"][k]) for k in ("unsolved", "solved")),
          percent(e["frontier"]["pass"])] for step, e in curve])


# -- evaluations -------------------------------------------------------------------------------------------

def scores(stages):
    """Scores of each stage with their intervals: {stage: results.json}.

    What it shows: the share of right answers of each stage on each task, in %.
    How to read it: in brackets, and as a black line on each bar, is the 95 % interval for other problems of
    the same kind. Stages whose intervals overlap may still differ: gains paired by problem are the sharper
    test.
    Sample: problems x answers to each, in the table. Answers to one problem are no independent draws, so
    each problem counts once.
    Averages: avg_domain is the mean of code, math and science; avg6 is the flat mean of the six benchmarks.
    Papers print both as AVG; they differ."""
    runs = {stage: r["tasks"] | r["averages"] | {f"{board} {of}": own for board, some in
            r.get("leaderboards", {}).items() for of, own in some.items()} for stage, r in stages.items()}
    shown = [name for name in dict.fromkeys(name for own in runs.values() for name in own)
             if "@" not in name or name.startswith("ruler@")]
    drawn = [name for name in shown if any("score" in own.get(name, ()) for own in runs.values())]
    room = max(1, int(3.4 / (0.4 * (1 + 0.5 * len(runs)))))          # names that fit the width of a phone
    seen = labels({stage: {label(name, 24): r for name, r in own.items()} for stage, own in runs.items()})
    panels = [bars([label(name, 24) for name in drawn[i:i + room]], seen) for i in range(0, len(drawn), room)]
    for stage, r in labels(stages).items():
        if any("@" in name for name in r["tasks"]):
            wide, draw = heat({"tasks": {name: own for name, own in r["tasks"].items() if "score" in own}})
            panels.append((wide, lambda axes, draw=draw, stage=stage: (
                draw(axes), axes.set_title(f"{stage}: RULER, %, by tokens"))))
    main = next((name for name in drawn[::-1] if name.endswith("avg_domain")), drawn[-1] if drawn else None)
    counts = {name: next((f"{own[name]['problems']} x {own[name].get('samples', '-')}"
                          for own in runs.values() if "problems" in own.get(name, ())), "-")
              for name in shown}
    return shown and Section(
        "Scores",
        f"{main}, %: " + ", ".join(f"{stage} {between(own.get(main, {}))}"
                                   for stage, own in runs.items()) + "."
        if main else "No task could be graded.",
        {},
        panels, ["task", "problems x answers", *(f"{stage}, %" for stage in runs)],
        [[name, counts[name], *(own.get(name, {}).get("why") or between(own.get(name, {}))
                                for own in runs.values())] for name in shown])


def gains(compared):
    """Gains between stages, of a compare.json.

    What it shows: what each stage gained on the one before, in points, on the same problems.
    How to read it: p is how often a gain as large would come by chance, were there none; an interval that
    leaves out 0 goes with p under 0.05. Of twenty tasks without any gain, one does that by luck.
    Sample: problems that both stages answered, of all. Intervals are a bootstrap over problems."""
    own = compared["gains"]
    if not own:
        return None
    shown = list(dict.fromkeys(name for some in own.values() for name in some
                               if "@" not in name or name.startswith("ruler@")))
    main = next((name for name in shown[::-1] if name.endswith("avg_domain")), shown[-1])
    differ = compared.get("settings that differ") or {}
    return Section(
        "Gains, paired by problem",
        f"{main}, gain in points: " + ", ".join(
            f"{pair} {between(some[main], '{:+.1f}', of='gain')}"
            for pair, some in own.items() if main in some) + ".",
        {"Not made alike": "; ".join(f"{task}: {what}" for task, what in differ.items())} if differ else {},
        [gained([label(name, 24) for name in shown], labels({
            pair: {label(name, 24): g for name, g in some.items()} for pair, some in own.items()}))],
        ["task", *(head for pair in own for head in (f"{pair}, points", "p", "problems"))],
        [[name, *(text for some in own.values() for text in (
            (between(some[name], "{:+.1f}", of="gain"), f"{some[name]['p']:.2g}",
             f"{some[name]['problems']} of {some[name]['of']}") if name in some else ("-", "-", "-")))]
         for name in shown])


def frontier(compared):
    """What becomes of the problems that the first stage did not solve.

    What it shows: the pass rate of every stage on problems that the first one failed: new ability, or more
    of the old.
    How to read it: "0 of n" are problems with no right answer in n, "1 of n" with one.
    Selection: choosing the failed ones also chooses bad luck: an unchanged model would seem to gain. The
    picture, and the table's last kind, choose by half of the first stage's answers and measure it on the
    other half. What stands there under the first stage is luck; only what is above it is gained.
    Sample: problems in the table. Solved means at least one right answer."""
    names, fronts = list(compared["runs"]), compared["frontier"]
    if not fronts:
        return None
    (task, front), *_ = fronts.items()
    kind, last = list(front.items())[-1]
    return Section(
        f"Problems that {names[0]} did not solve",
        f"{task}, {last['problems']} problems that {names[0]} did not solve: "
        + ", ".join(f"{name} {percent(p)} %" for name, p in zip(names, last["pass"], strict=True)) + ".",
        {},
        [solved([label(name, 24) for name in names], {label(name, 24): own for name, own in fronts.items()})],
        ["task", f"{names[0]} solved", "problems", *(f"{name}, %" for name in names)],
        [[name, kind, str(f["problems"]), *(f"{percent(p)} ({n} solved)" for p, n in
                                            zip(f["pass"], f["solved"], strict=True))]
         for name, own in fronts.items() for kind, f in own.items() if f["problems"]])


def behaviour(stages):
    """Length and confidence of right and wrong answers (paper, table 15).

    What it shows: how long answers are and how sure the model was of them, right and wrong ones apart.
    How to read it: full marks are right answers, open marks wrong ones. Sureness is the mean negative
    log-probability of a token, in nats: lower is surer. Where wrong answers are as sure as right ones,
    sureness does not tell them apart.
    Sample: answers in the table. The median of few right answers is rough. No interval.
    Care: answers cut at the longest length count with that length."""
    runs = {stage: {name: r for name, r in own["tasks"].items() if "all" in r and "@" not in name}
            for stage, own in stages.items()}
    names = list(dict.fromkeys(name for own in runs.values() for name in own))
    if not names:
        return None

    def panel(title, ylabel, key):
        def draw(axes):
            for s, (stage, own) in enumerate(labels(runs).items()):
                for kind, full in (("right", True), ("wrong", False)):
                    there = [(i + (s - (len(runs) - 1) / 2) * 0.8 / len(runs), own[name][kind][key])
                             for i, name in enumerate(names)
                             if own.get(name, {kind: {}})[kind].get(key) is not None]
                    axes.plot([x for x, _ in there], [y for _, y in there], MARKERS[s % 7], color=colour(s),
                              markeredgecolor="black", fillstyle="full" if full else "none", markersize=6,
                              label=stage if full else None)
            axes.set_xticks(range(len(names)), [label(name, 24) for name in names], rotation=30, ha="right")
            axes.set_ylim(0)
            axes.set(ylabel=ylabel, title=title)
            axes.legend()
        return min(9, max(3.7, 1 + 0.2 * len(names) * len(runs))), draw

    return Section(
        "Behaviour",
        f"Median tokens of an answer to {names[0]}: " + ", ".join(
            f"{stage} {cell(own[names[0]]['all']['median_tokens'], '{:.4g}')}"
            for stage, own in runs.items() if names[0] in own) + ".",
        {},
        [panel("median length", "tokens", "median_tokens"),
         panel("sureness", "mean negative log-prob", "nll")],
        ["task", "stage", "pass rate, %", "samples", "tokens", "right", "wrong", "neg. log-prob", "right",
         "wrong"],
        [[name, stage, percent(own[name]["score"]), str(own[name]["all"]["samples"]),
          *(cell(own[name][kind][key], form) for key, form in (("median_tokens", "{:.4g}"), ("nll", "{:.3f}"))
            for kind in ("all", "right", "wrong"))]
         for name in names for stage, own in runs.items() if name in own])


# -- weights -----------------------------------------------------------------------------------------------

PARTS = ("attention", "MLP", "Mamba", "embedding", "norm")
NOISE = dict(color="black", linestyle="--", linewidth=1)


def by_pair(data):
    """{"base to mt": entry of weights.json}; of two that are called alike the second has its folder added."""
    pairs = {}
    for pair in data["pairs"]:
        name = f"{pair['names'][0]} to {pair['names'][1]}"
        pairs[f"{name} ({pair['folders'][1]})" if name in pairs else name] = pair
    return pairs


def rows_by(pair, by):
    """Its rows of one kind (see analyze.table), components in one order everywhere."""
    rows = [row for row in pair["rows"] if row["by"] == by]
    return sorted(rows, key=lambda r: [*PARTS, r.get("component")].index(r.get("component")))


def null_of(pair):
    """What noise alone does to weights kept like these (see noise_null), or None."""
    return pair["null"] and pair["null"]["masters" if pair["bf16"] else "float32"]


def changed(r):
    """The share of weights that changed by more than 1 %."""
    stayed = at(r["unchanged"], CHANGED)
    return None if stayed is None else 1 - stayed


def divergence(data):
    """How far weights moved, by layer and component.

    What it shows: the size of the change of the weights over the size of the weights, by layer and
    component. 0.1 is a change of a tenth.
    How to read it: the scale is logarithmic: a little higher is many times more. Bars on it have no zero;
    compare their tops.
    Two averages: relative_l2 is pooled: all entries as one vector. mean_l2 is the mean of the tensors' own
    ratios. They differ, and papers do not always say which they print. The pictures show relative_l2.
    Null: noise alone is AdamW, without weight decay, with the same learning rates on gradients of pure noise,
    on weights of each component. A change of that size shows how long and how fast training went, not that
    anything was learnt.
    Sample: every weight of both checkpoints: no sampling, so no interval. The null is of a sample of them."""
    pairs = by_pair(data)
    parts = [part for part in PARTS if any(r["component"] == part for pair in pairs.values()
                                           for r in rows_by(pair, "component"))]

    def layers(name, pair):
        own = [r for r in rows_by(pair, "layer+component") if r["relative_l2"]]
        series = [(part, sorted((r["layer"], r["relative_l2"]) for r in own if r["component"] == part),
                   line(PARTS.index(part) + 1)) for part in parts if part != "embedding"]
        for part in parts:                                # noise moves each component by its own scale
            null, there = pair["nulls"].get(part), sorted({r["layer"] for r in own if r["component"] == part})
            if null and null["relative_l2"] and there:
                series.append((f"noise alone, {part}", [(x, null["relative_l2"]) for x in there],
                               NOISE | {"color": colour(PARTS.index(part) + 1)}))
        return lines(label(name), "layer", "relative L2 change", series, 3.7, yscale="log")

    def components(axes):
        width = 0.8 / len(pairs)
        for p, (name, pair) in enumerate(labels(pairs).items()):
            there = [(parts.index(r["component"]), r["relative_l2"]) for r in rows_by(pair, "component")
                     if r["relative_l2"]]
            axes.bar([x + (p - (len(pairs) - 1) / 2) * width for x, _ in there], [y for _, y in there], width,
                     label=name, color=colour(p), hatch=HATCHES[p % 7], edgecolor="black", linewidth=0.5)
        axes.set_xticks(range(len(parts)), parts)
        axes.set(yscale="log", ylabel="relative L2 change", title="by component (log scale)")
        axes.legend()

    nulls = {name: null_of(pair) for name, pair in pairs.items() if null_of(pair)}
    rows = [(name, r.get("component", "all"), str(r["count"]), r,
             pair["nulls"].get(r.get("component", "total"))) for name, pair in pairs.items()
            for r in rows_by(pair, "total") + rows_by(pair, "component")]
    lost = {name: rows_by(pair, "total")[0]["nonfinite"] for name, pair in pairs.items()}
    missing = [f"{name}: {len(pair[kind])} {kind}" for name, pair in pairs.items()
               for kind in ("missing", "extra") if pair.get(kind)]
    return pairs and Section(
        "How far the weights moved",
        "Relative change of all weights: " + ", ".join(
            f"{name} {cell(rows_by(pair, 'total')[0]['relative_l2'])}" + (
                f" (noise alone {cell(nulls[name]['relative_l2'])})" if name in nulls else "")
            for name, pair in pairs.items()) + ".",
        {kind: what for kind, what in (
            ("No null", ", ".join(name for name in pairs if name not in nulls)),
            ("Not finite, and left out", ", ".join(f"{name}: {n:,}" for name, n in lost.items() if n)),
            ("Tensors that one side lacks", "; ".join(missing))) if what},
        [layers(name, pair) for name, pair in pairs.items()] + [(4.4, components)],
        ["pair", "component", "tensors", "entries", "relative_l2", "mean_l2", "changed > 1 %, %",
         "noise alone, relative_l2", "noise alone, changed > 1 %, %"],
        [[name, part, count, human(r["entries"]), cell(r["relative_l2"]), cell(r.get("mean_l2")),
          percent(changed(r)), cell(null and null["relative_l2"]), percent(null and changed(null))]
         for name, part, count, r, null in rows])


def unchanged(data):
    """The share of weights that stayed, by how small a change counts.

    What it shows: the share of weights whose relative change is below a threshold.
    How to read it: a high line is a sparse change. Papers often quote the share at 1 %.
    The bf16 floor: bfloat16 has 8 bits of precision, so its smallest relative change is 0.39 %. In the shaded
    part every weight that changed at all counts, and smaller changes were rounded away.
    Null: dashed are gradients of pure noise, the same learning rates, the same rounding. Where a pair lies
    near its dashed line, its sparsity is what rounding gives and says nothing of learning.
    Sample: every weight of both checkpoints. The null is of a sample of them."""
    pairs = by_pair(data)
    totals = {name: rows_by(pair, "total")[0] for name, pair in pairs.items()}
    nulls = {name: null_of(pair) for name, pair in pairs.items() if null_of(pair)}
    shares = totals | {f"{name}, noise alone": null for name, null in nulls.items()}
    ts = sorted({float(t) for own in shares.values() for t in own["unchanged"]})
    narrow = [name for name, pair in pairs.items() if pair["bf16"]]

    def draw(axes):
        if narrow:
            axes.axvspan(100 * ts[0] / 1.3, 100 * FLOOR, facecolor="#e4e4e4", edgecolor="#888888",
                         linewidth=0.5, label="below bf16's 0.39 %")
        for p, name in enumerate(pairs):
            for own, style in ((totals[name], dict(label=label(name), linestyle="-")),
                               (nulls.get(name), dict(fillstyle="none", linestyle="--"))):
                if own:
                    axes.plot([100 * t for t in ts], [100 * at(own["unchanged"], t) for t in ts],
                              **line(p + 1) | style)
        axes.plot([], [], label="dashed: noise alone", **NOISE)
        axes.set(xscale="log", xlabel="a change below this counts as none, %", ylabel="unchanged weights, %",
                 title="unchanged share", xlim=(100 * ts[0] / 1.3, 130 * ts[-1]), ylim=(0, 105))
        axes.set_xticks([100 * t for t in ts], [f"{100 * t:g}" for t in ts])
        axes.minorticks_off()
        axes.legend()

    return pairs and Section(
        "How many weights stayed as they were",
        "Weights changed by more than 1 %: " + ", ".join(
            f"{name} {percent(changed(own))} %" + (f" (noise alone {percent(changed(nulls[name]))} %)"
                                                   if name in nulls else "")
            for name, own in totals.items()) + ".",
        {"In bf16 here": ", ".join(narrow) or "none, so the floor does not apply"},
        [(5.0, draw)], ["threshold, %", *shares],
        [[f"{100 * t:g}", *(percent(at(own["unchanged"], t)) for own in shares.values())] for t in ts])


def dots(values, **settings):
    """A panel of names down, a mark a pair: {pair: {name: value or None}}."""
    names = list(dict.fromkeys(name for own in values.values() for name in own))

    def draw(axes):
        for p, (pair, own) in enumerate(labels(values).items()):
            there = [(x, len(names) - names.index(name) + 0.25 - 0.5 * (p + 1) / (len(values) + 1))
                     for name, x in own.items() if x is not None]
            axes.plot([x for x, _ in there], [y for _, y in there], MARKERS[p % 7], color=colour(p),
                      label=pair, markeredgecolor="black", markersize=5)
        axes.set_yticks(range(len(names), 0, -1), [label(name, 24) for name in names])
        axes.grid(axis="y", linewidth=0.3)
        axes.set(ylim=(0.4, len(names) + 0.6), **settings)
        axes.legend()
    return 4.8, draw


def parts(data):
    """The share of changed weights of each part of a layer.

    What it shows: the share of weights that changed by more than 1 %, by part of the layers.
    How to read it: small weights change more under the same step, and norm weights, which are near 1, less.
    So the size of its weights alone sets a part apart from others.
    Sample: every weight of each part."""
    def part(r):
        return r["sub"] if r["sub"] == r["component"] else f"{r['component']} {r['sub']}"

    values = {name: {part(r): changed(r) for r in rows_by(pair, "component+sub")}
              for name, pair in by_pair(data).items()}
    values = {name: own for name, own in values.items() if own and None not in own.values()}
    if not values:
        return None
    name, own = max(values.items(), key=lambda of: max(of[1].values()) - min(of[1].values()))
    least, most = (pick(own, key=own.get) for pick in (min, max))
    return Section(
        "Which parts changed",
        f"{name}: changed by more than 1 % are {percent(own[least])} % of {least} at the least, "
        f"{percent(own[most])} % of {most} at the most.",
        {},
        [dots({pair: {part: 100 * x for part, x in own.items()} for pair, own in values.items()},
              xlabel="changed by more than 1 %, %", xlim=(-4, 104), title="changed share by part")],
        ["part", *(f"{pair}, %" for pair in values)],
        [[name, *(percent(own.get(name)) for own in values.values())]
         for name in dict.fromkeys(name for own in values.values() for name in own)])


def cosine(data):
    """The angle between two changes of one start.

    What it shows: the cosine between the changes of two models that were trained from the same start.
    How to read it: 1 is the same direction, 0 is no relation. It is of the changes, not of the weights,
    which would give almost 1 in any case. Where one model was trained on from the other, they share that
    change, and a high cosine is no finding.
    Null: unrelated changes of n entries have a cosine within about 2 / sqrt(n) of 0: of a million, 0.002.
    Sample: every weight of the three checkpoints."""
    values = {}
    for pair in data["pairs"]:
        names = f"{pair['names'][0]} to {pair['names'][1]} and to {pair.get('cosine_with')}"
        own = {r.get("component", "all"): r["cosine"]
               for r in rows_by(pair, "total") + rows_by(pair, "component") if "cosine" in r}
        values |= {names: own} if own else {}
    return values and Section(
        "Did two trainings move the same way?",
        "Cosine of two changes: " + ", ".join(
            f"{name} {cell(own.get('all'), '{:.3f}')}" for name, own in values.items()) + ".",
        {},
        [dots(values, xlabel="cosine", xlim=(-1.05, 1.05), title="cosine of two changes")],
        ["component", *values],
        [[name, *(cell(own.get(name), "{:.3f}") for own in values.values())]
         for name in dict.fromkeys(name for own in values.values() for name in own)])


# -- representations, landscape, trajectory ----------------------------------------------------------------

def similarity(data):
    """CKA by layer, as published and debiased.

    What it shows: CKA compares two models' hidden states on the same texts, layer by layer: 1 if they
    arrange the texts alike (up to rotation and scale), about 0 if not at all.
    How to read it: the bold line is debiased. The thin one is as papers print it: with fewer texts than
    dimensions it is high even for unrelated models (0.95 at 200 texts and 4,096 dimensions), so alone it
    shows nothing.
    Intervals: the middle 95 % over random halves of the texts, so as uncertain as half the texts are. No text
    is drawn twice; that would raise CKA.
    Null: the grey band is what the same states score with the texts of one model shuffled.
    Without top: the dimensions of the largest variance are left out. Where that line falls off, a few
    massive features made the similarity."""
    known = {f"{a} {b}": f"{a} and {b}" for a in data["names"] for b in data["names"]}
    pairs = {known.get(name, name): sorted(own, key=lambda r: r["layer"])
             for name, own in data["pairs"].items()}

    def panel(name, own):
        def draw(axes):
            x = [r["layer"] for r in own]
            y = {key: np.array([math.nan if r.get(key) is None else r[key] for r in own], float) for key in
                 ("biased", "debiased", "low", "high", "null_low", "null_high", "without_top")}
            axes.fill_between(x, y["null_low"], y["null_high"], color="#d0d0d0", label="unrelated (permuted)")
            axes.plot(x, y["biased"], color="black", linewidth=0.7, label="biased, as published")
            axes.plot(x, y["without_top"], color=colour(2), linestyle=":", label="debiased, without top")
            spread = [y["debiased"] - y["low"], y["high"] - y["debiased"]]
            axes.errorbar(x, y["debiased"], np.maximum(0, spread), color=colour(1), linewidth=2.4,
                          elinewidth=1, capsize=2, label="debiased, and halves")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set(xlabel="layer (0: embedding, last: final norm)", ylabel="linear CKA", title=label(name))
            axes.set_ylim(min(-0.1, np.nanmin([*y["null_low"], *y["low"], 0]) - 0.02), 1.05)
            axes.legend()
        return 3.7, draw

    lowest = {name: min((r for r in own if cell(r["debiased"]) != "-"), key=lambda r: r["debiased"],
                        default=None) for name, own in pairs.items()}
    return pairs and Section(
        f"Do the stages represent text alike? ({data['corpus']})",
        f"Lowest CKA of any layer, debiased, on {data['corpus']}: " + ", ".join(
            f"{name} {between(r or {}, '{:.4f}', 1, 'debiased')}" for name, r in lowest.items()) + ".",
        {"Sample": f"{data['texts']} texts of {data['corpus']}."},
        [panel(name, own) for name, own in pairs.items()],
        ["pair", "lowest at layer", "debiased [halves]", "biased there", "unrelated there",
         "without top there"],
        [[name, str(r["layer"]), between(r, "{:.4f}", 1, "debiased"), cell(r["biased"], "{:.4f}"),
          f"{cell(r['null_low'], '{:.3f}')} to {cell(r['null_high'], '{:.3f}')}",
          cell(r.get("without_top"), "{:.4f}")] if r else [name, *"-----"] for name, r in lowest.items()])


def landscape(data):
    """The pass rate between and around base, MT and RL.

    What it shows: models mixed from the stages' weights, base + alpha (MT - base) + beta (RL - MT), each
    tested on the same problems.
    How to read it: a path without a dip means that one can walk from a stage to the next without losing
    ability. Darker squares are better.
    Selection: the best of many points is partly the luckiest."""
    path, grid = data.get("path") or [], data.get("grid") or []

    def walk(axes):
        y, low, high = (np.array([100 * p[key] for p in path]) for key in ("score", "low", "high"))
        axes.errorbar([p["alpha"] + p["beta"] for p in path], y, np.maximum(0, [y - low, high - y]),
                      color="black", marker="o", markersize=4, capsize=2, linewidth=1)
        axes.set_xticks([0, 0.5, 1, 1.5, 2], ["Base", "half", "MT", "half", "RL"])
        axes.set(ylim=(0, 100), ylabel="pass rate, %", title="along the path, with 95 % intervals")

    def plane(axes):
        xs, ys = (sorted({p[key] for p in grid}) for key in ("alpha", "beta"))
        values = np.full((len(ys), len(xs)), np.nan)
        for p in grid:
            values[ys.index(p["beta"]), xs.index(p["alpha"])] = 100 * p["score"]
        axes.imshow(values, vmin=0, vmax=100, cmap="Greys", aspect="auto", origin="lower")
        corners = [(np.interp(a, xs, range(len(xs))), np.interp(b, ys, range(len(ys))))
                   for a, b in ((0, 0), (1, 0), (1, 1))]
        for width, shade in ((4, "white"), (2, colour(2))):
            axes.plot(*zip(*corners, strict=True), color=shade, linewidth=width)
        for (x, y), name, mark in zip(corners, ("Base", "MT", "RL"), "osD", strict=True):
            axes.plot(x, y, mark, color="white", markeredgecolor="black", markersize=8)
            axes.annotate(name, (x, y), (-8, 5), textcoords="offset points", ha="right", fontsize=8,
                          weight="bold", bbox=dict(facecolor="white", edgecolor="none", pad=1))
        for (i, j), value in np.ndenumerate(values):                  # below and right of path and marks
            axes.text(j + 0.28, i - 0.32, cell(value, "{:.0f}"), ha="center", va="center", fontsize=7,
                      color="white" if value > 60 else "black")
        axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
        axes.set_xlim(-0.75, len(xs) - 0.5)
        axes.set(xlabel="alpha: share of mid-training's change", ylabel="beta: share of RL's change",
                 title="pass rate, %")

    points = path or grid
    best = max(points, key=lambda p: p["score"], default=None)
    return best and Section(
        "Between and around the stages",
        f"Best pass rate {'on the path' if path else 'of the grid'} from base by MT to RL: "
        f"{percent(best['score'])} % at alpha {best['alpha']:g}, beta {best['beta']:g}.",
        {"Sample": f"{data['problems']} problems, {data['samples']} answers each. Intervals are 95 %, over "
                   f"problems. The grid shows none; its squares are as uncertain as the path's points."},
        [(4.4, walk)] * bool(path) + [(4.4, plane)] * bool(grid), ["alpha", "beta", "pass rate, % [95 %]"],
        [[f"{p['alpha']:g}", f"{p['beta']:g}", between(p) if "low" in p else percent(p["score"])]
         for p in points])


def trajectory(data):
    """The change of the weights over RL steps.

    What it shows: how far RL has moved the weights after so many steps.
    How to read it: a line that rises early and then lies flat is called front-loaded.
    Null: dashed are gradients of pure noise, the same learning rates. A learning rate that decays makes any
    change front-loaded."""
    kinds = {"from_mt": "from MT", "from_base": "from base", "null": "noise alone"}
    runs = {run["name"]: sorted(run["steps"], key=lambda s: s["step"])
            for run in data["runs"] if run["steps"]}

    def of(step, kind, key):
        own = step.get(kind) or {}
        return at(own.get("changed", {}), CHANGED) if key == "changed" else own.get(key)

    def panel(steps, title, y, key, by, shown, **settings):
        return lines(title, "RL step", y, [
            (kinds[kind], [(s["step"], by * x) for s in steps if (x := of(s, kind, key)) is not None],
             line((1, 2, 6)[list(kinds).index(kind)]) | {"linestyle": "--" if kind == "null" else "-",
                                                         "markevery": max(1, len(steps) // 12)})
            for kind in shown], 3.7, **settings)

    panels, rows = [], []
    for name, steps in runs.items():
        title, y = f"{label(name)}: changed > 1 %", "% of the weights"
        panels += [panel(steps, f"{title}, from MT", y, "changed", 100, ("from_mt", "null")),
                   panel(steps, f"{title}, from both", y, "changed", 100, kinds),
                   panel(steps, f"{label(name)}: relative L2", "log scale", "relative_l2", 1, kinds,
                         yscale="log")]
        some = steps if len(steps) <= 12 else [steps[round(i * (len(steps) - 1) / 11)] for i in range(12)]
        rows += [[name, str(s["step"]), *(text for kind in kinds for text in (
            percent(of(s, kind, "changed")), cell(of(s, kind, "relative_l2"))))] for s in some]
    return runs and Section(
        "Weights over RL steps",
        "Weights that differ from MT's by more than 1 %: " + ", ".join(
            f"{name} {percent(of(last, 'from_mt', 'changed'))} % after {last['step']} steps (noise alone "
            f"{percent(of(last, 'null', 'changed'))} %)"
            for name, (*_, last) in runs.items()) + ".",
        {"Sample": "every weight, at each of " + ", ".join(
            f"{len(own)} steps of {name}" for name, own in runs.items()) + ". The table has at most 12."},
        panels, ["run", "step", *(f"{name}, {what}" for name in kinds.values()
                                  for what in ("changed, %", "relative_l2"))], rows)


# -- a study -----------------------------------------------------------------------------------------------

def claims(data):
    """The paper's claims, each with what it was held against.

    What it shows: for each claim and model what was asked for, what was found, and what there is without the
    effect (null: noise alone, chance, permuted texts).
    How to read it: reproduced means that the whole interval lies where it was asked to. Directions and
    shares are asked for, not the paper's sizes, which a toy cannot have. A claim that is reproduced, but
    whose null does the same, says nothing of learning. Of forty claims without any effect one would be
    reproduced by luck.
    Intervals: 95 % for other seeds on the same problems, by Student's t over chains; differences are taken
    within each chain. Of a single chain it is for other problems. n is the number of chains where some lack
    the number."""
    counts = {model: {} for model in data["chains"]}
    for c in data["claims"]:
        counts[c["model"]][c["verdict"]] = counts[c["model"]].get(c["verdict"], 0) + 1
    return Section(
        "The paper's claims",
        "Claims of the paper: " + "; ".join(f"{model}: " + ", ".join(
            f"{n} {verdict}" for verdict, n in own.items()) for model, own in counts.items()) + ".",
        {"Sample": "; ".join(f"{model}: {len(seeds)} chain{'s' * (len(seeds) > 1)}, seed {', '.join(seeds)}"
                             for model, seeds in data["chains"].items()) + "."},
        [], ["claim", "model", "verdict", "found", "asked for", "null", "in the paper"],
        [[c["claim"], *(c[key] or "-" for key in ("model", "verdict", "found", "asked", "null", "paper"))]
         for c in data["claims"]])


def pipeline(data):
    """Every path from the base by mid-training to RL (paper, tables 4-6 and 11-13).

    What it shows: the mean score over math, code and science of each cell of the study. m, mc and mcs are
    the base, mid-trained on math, with code, with code and science. mcs+mc is mcs after RL on math and code.
    Intervals: 95 % for other seeds, by Student's t over chains; of a single chain for other problems."""
    table = data["tables"][0]
    cells = list(dict.fromkeys(name for name, *_ in table["rows"]))
    runs = {model: {name: {"score": e["mean"], "low": e["low"], "high": e["high"]} for name in cells
                    if (e := own.get(name, {}).get("avg"))} for model, own in data["estimates"].items()}

    def draw(axes):
        bars(cells, labels(runs))[1](axes)
        for r, own in enumerate(runs.values()):           # what is not measured is no zero
            for i, name in enumerate(cells):
                if name not in own:
                    axes.text(i + (r - (len(runs) - 1) / 2) * 0.8 / len(runs), 0, "-", ha="center", size=14)
        most = max((e["high"] or e["score"] for own in runs.values() for e in own.values()), default=1)
        axes.set_ylim(0, min(100, 110 * most) or 100)
        axes.set_title("macro-average and 95 % interval; -: not measured")

    return Section(
        f"{table['title']} (paper: {table['paper']})",
        "Macro-average, %: " + ", ".join(f"{model} {name} {text}" for name, model, *_, text in table["rows"]
                                         if name in ("base", "mcs", "mcs+mcs")) + ".",
        {}, [(8.0, draw)], table["head"], table["rows"])


def counterpart(table):
    """A table of the study, after the paper's."""
    return Section(f"{table['title']} (paper: {table['paper']})", f"{table['title']}: a table.", {}, [],
                   table["head"], table["rows"])


# -- the page ----------------------------------------------------------------------------------------------

OF_A_FILE = {"compare.json": (gains, frontier), "weights.json": (divergence, unchanged, parts, cosine),
             "cka.json": (similarity,), "landscape.json": (landscape,), "trajectory.json": (trajectory,)}


def possible(found):
    """[(path of the data, function, its arguments)] in the page's order; a function of no data gives none."""
    trained, runs = short(found["metrics.jsonl"]), []
    for folder, metrics in found["metrics.jsonl"].items():
        by_rl = any("reward" in m or "frontier" in m.get("eval", ()) for m in metrics)
        make = reinforcement if by_rl else retention
        runs.append((os.path.join(folder, "metrics.jsonl"), make, trained[folder], metrics,
                     found["config.json"].get(folder, {})))
    runs.sort(key=lambda own: own[1] is reinforcement)                     # mid-training first
    order = [name for own in found["compare.json"].values() for name in own["runs"]]
    stages = {name: found["results.json"][folder] for folder, name in short(found["results.json"]).items()}
    stages = {name: stages[name] for name in sorted(stages, key=[*order, *stages].index)}
    where = ", ".join(os.path.join(folder, "results.json") for folder in found["results.json"])
    some = {name: [(os.path.join(folder, name), make, own) for make in makes for folder, file in
                   found[name].items() for own in (file.values() if name == "cka.json" else [file])]
            for name, makes in OF_A_FILE.items()}         # cka.json: a corpus each
    study = [(os.path.join(folder, "study.json"), make, own) for folder, data in found["study.json"].items()
             for make, own in ((claims, data), (pipeline, data),
                               *((counterpart, table) for table in data["tables"][1:]))]
    return [*study, *runs, (where, scores, stages), *some.pop("compare.json"), (where, behaviour, stages),
            *(own for makes in some.values() for own in makes)]


STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem; margin: 0 auto;
       padding: 1rem; overflow-wrap: anywhere }
h1 { margin: .5rem 0 } h2 { margin: 0 0 .5rem; font-size: 1.3rem }
section { border-top: 1px solid #999; padding: 1.2rem 0 }
p { margin: .35rem 0; max-width: 48rem }
a { color: inherit; text-decoration-color: #bbb }
li { margin: .3rem 0; max-width: 48rem }
.figures { display: flex; flex-wrap: wrap; align-items: flex-start; gap: .8rem;
           margin: 1rem 0 }
.figures img { max-width: 100%; height: auto }
.table { overflow-x: auto; max-width: 100%; width: fit-content; background:
  linear-gradient(to right, #fff 2rem, #fff0) left / 3rem 100% no-repeat local,
  linear-gradient(to left, #fff 2rem, #fff0) right / 3rem 100% no-repeat local,
  linear-gradient(to right, #0004, #0000) left / .7rem 100% no-repeat scroll,
  linear-gradient(to left, #0004, #0000) right / .7rem 100% no-repeat scroll }
table { border-collapse: collapse; font-size: .85rem; overflow-wrap: normal;
        font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top;
         white-space: nowrap }
thead th { border-bottom: 1px solid #222; vertical-align: bottom; white-space: normal; min-width: 4rem }
th:first-child { text-align: left; padding-left: 0; font-weight: normal; white-space: normal;
                 min-width: 5.5rem }
thead th, thead th:first-child { font-weight: bold }
section[id$=claims] :is(td, th) { white-space: normal; text-align: left; min-width: 7rem }
.source { color: #555; font-size: .8rem }
@media print { body { font-size: 10pt; max-width: none; padding: 0 } .figures, tr, p { break-inside: avoid }
  h2 { break-after: avoid } table { font-size: .75rem } .table { overflow: visible; background: none }
  th, td { white-space: normal; padding: .1rem .3rem }
  .figures img { max-width: 48% } }
"""

INTRO = (
    "A base model is trained on, first on a mixture of text rich in math, code and science (mid-training, "
    "MT), then by reinforcement learning on problems whose answers can be checked (RL). This page shows what "
    "each stage did to the model's answers, its weights and its inner representations.",
    "A number in brackets is a 95 % interval, unless its section says otherwise. A null is what the same "
    "measurement gives when there is nothing to find: rounding, noise or luck alone. Read a result against "
    "its null. A dash is a number that is not there.")


def prose(make):
    """{run-in head: paragraph} of a section's docstring, from its second paragraph on."""
    found = re.split(r"\n {4}([A-Z][\w ]*): ", "\n" + make.__doc__.partition("\n\n")[2])[1:]
    return {head: " ".join(text.split()) for head, text in zip(found[::2], found[1::2], strict=True)}


def legible(inches, draw):
    """The panel with its legend below it, where it hides nothing, and a title that fits."""
    def own(axes):
        draw(axes)
        title = axes.get_title("left")
        axes.set_title(title, fontsize=min(10, 130 * (inches - 0.7) / max(1, len(title))))
        handles, names = axes.get_legend_handles_labels()
        if axes.get_legend():
            axes.get_legend().remove()
            columns = max(1, int(inches / (0.06 * max(map(len, names), default=0) + 0.55)))
            axes.figure.legend(handles, names, loc="outside lower left", ncols=columns)
            axes.figure.set_figheight(3.4 + 0.18 * -(-len(names) // columns))
    return inches, own


def drawn(section, name, out):
    """The pictures of a section, each of its own under out/figures, as <img>."""
    images = []
    for i, panel in enumerate(section.panels, 1):
        path = os.path.join(out, "figures", f"{name}-{i}")
        picture(path, [legible(*panel)])
        with open(path + ".svg", "rb") as svg, open(path + ".png", "rb") as png:
            svg, png = svg.read(), png.read()
        kind, data = ("svg+xml", svg) if len(svg) < 80_000 else ("png", png)       # the page stays small
        images.append(f'<img width="{round(96 * panel[0])}" '
                      f'alt="{html.escape(section.title)}, picture {i}; see the table" '
                      f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}">')
    return "\n".join(images)


def table(head, rows):
    cells = "".join(f'<th scope="col">{html.escape(str(x))}</th>' for x in head)
    lines = ['<tr><th scope="row">' + "</th>".join((html.escape(str(first)), "".join(
        f"<td>{html.escape(str(x))}</td>" for x in rest))) + "</tr>" for first, *rest in rows]
    return (f'<div class="table" tabindex="0"><table><thead><tr>{cells}</tr></thead>\n<tbody>'
            + "\n".join(lines) + "</tbody></table></div>" if rows else "")


def report(folders, out):
    """Writes out/report.html and out/figures/ of what is in folders; returns the path of the page."""
    found, summary, body = find(folders), [], []
    try:
        os.makedirs(os.path.join(out, "figures"), exist_ok=True)
        path = ", ".join(os.path.join(folder, name) for name in FILES for folder in found[name])
        try:
            for path, make, *given in possible(found):
                section, name = make(*given), f"{len(body) + 1:02}-{make.__name__}"
                if not section:
                    continue
                images = drawn(section, name, out)
                summary.append(f'<li><a href="#{name}">{html.escape(section.headline)}</a></li>')
                text = "\n".join(
                    f"<p><b>{html.escape(head)}:</b> {html.escape(own)}</p>"
                    for head, own in (prose(make) | section.text).items())
                body.append(f'<section id="{name}">\n<h2>{html.escape(section.title)}</h2>\n{text}\n'
                            f'<div class="figures">\n{images}\n</div>\n{table(section.head, section.rows)}\n'
                            f'<p class="source">From {html.escape(path)}</p>\n</section>')
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as e:
            raise InputError(f"report: {path} is damaged or of another version ({e!r}); make it again or "
                             f"leave its folder out") from e
        page = os.path.join(out, "report.html")
        write_atomic(page, "\n".join((
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<title>PRISM: what the runs came to</title>\n<link rel="icon" href="data:,">',
            f"<style>{STYLE}</style>",
            "</head><body>\n<h1>What the runs came to</h1>", *(f"<p>{text}</p>" for text in INTRO),
            "<h2>In short</h2>\n<ul>", *summary, "</ul>", *body, "</body></html>\n")))
    except OSError as e:
        raise InputError(f"--out={out}: cannot write there ({e.strerror}); give another folder") from None
    return page
