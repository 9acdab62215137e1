"""Evaluations beside each other: scores, paired gains, the frontier."""

import json
import os

import numpy as np

from cli import InputError, write_atomic
from reporting.figures import bars, gained, picture, solved
from suite.intervals import aligned, paired, percent, read_results
from suite.tasks import averages

# -- two and more runs -------------------------------------------------------------------------------------

def frontier(runs):
    """What becomes of the problems that the first run never solves, or once (paper, 9.5): {"0 of n":
    {problems, pass (a rate a run), solved (problems, a run)}, "1 of n": ...}. Chance alone solves some of
    them later, without any learning: "0 of n/2" selects by the first half of the first run's samples, and its
    pass of the first run is that of the other half: what an unchanged model would seem to gain.
    runs: [{problem: scores, 0 or 1}], the same problems in each."""
    first, n = runs[0], min(len(own) for own in runs[0].values())
    found = {}
    for c, m in ((0, n), (1, n), (0, n // 2)):
        chosen = [p for p, own in first.items() if sum(own[:m]) == c]
        rest = [{p: own[m % n:] for p, own in first.items()}, *runs[1:]]
        found[f"{c} of {m}"] = {
            "problems": len(chosen), "solved": [sum(any(run[p]) for p in chosen) for run in rest],
            "pass": [float(np.mean([np.mean(run[p]) for p in chosen])) if chosen else None for run in rest]}
    return found


def compare(folders, out=""):
    """Evaluations beside each other, in the order given: each score with its interval, the gain on the run
    before, paired by problem, and the frontier. Writes out/compare.json, .png and .svg (out: the last
    folder). Problems are pairs when they have the same id, prompt and truth in both runs."""
    if len(folders) < 2:
        raise InputError(f"--compare {' '.join(folders)}: give two folders of results or more")
    found = [read_results(folder) for folder in folders]
    names = [os.path.basename(os.path.normpath(folder)) for folder in folders]
    if len(set(names)) < len(names):
        names = list(folders)
    scores = {name: results["tasks"] | results["averages"] | {
        f"{board} {of}": r for board, own in results["leaderboards"].items() for of, r in own.items()}
        for name, (results, _) in zip(names, found, strict=True)}
    problems = [of for _, of in found]
    gains, differ = {}, {}
    for a, b, before, after in zip(names, names[1:], problems, problems[1:], strict=False):
        shared = {task: sorted(before[task].keys() & after[task].keys()) for task in before if task in after}
        shared = {task: keys for task, keys in shared.items() if keys}
        if not shared:
            raise InputError(f"--compare: {a} and {b} have no problem in common; give runs of the same "
                             f"--tasks and --protocol")
        d = {task: [np.mean(after[task][k]) - np.mean(before[task][k]) for k in keys]
             for task, keys in shared.items()}
        parts = {task: [(1.0, d[task])] for task in d if "@" not in task}
        parts |= {name: [(w, d[t]) for t, w in own.items()] for name, own in averages(d).items()}
        tasks = {name: [name] for name in d} | averages(d)
        gains[f"{a} to {b}"] = {
            name: dict(zip(("gain", "low", "high", "p"), paired(own), strict=True))
            | {"problems": sum(len(x) for _, x in own),
               "of": max(sum(len(of.get(t, ())) for t in tasks[name]) for of in (before, after))}
            for name, own in parts.items()}
        for task in d:
            one, two = (scores[name][task]["settings"] for name in (a, b))
            if one != two:
                differ[task] = f"{a}, {b}: " + ", ".join(f"{k} {one[k]}, {two[k]}" for k in one
                                                         if one[k] != two[k])
    fronts = {}
    for task in problems[0]:
        keys = set.intersection(*(set(of.get(task, ())) for of in problems))
        every = [{k: of[task][k] for k in sorted(keys)} for of in problems if task in of]
        if keys and min(len(own) for own in every[0].values()) > 1 and {
                s for of in every for own in of.values() for s in own} <= {0, 1}:
            fronts[task] = frontier(every)
    result = {"runs": dict(zip(names, folders, strict=True)), "gains": gains, "frontier": fronts,
              "settings that differ": differ}
    shown = [name for name in dict.fromkeys(name for own in scores.values() for name in own)
             if ("@" not in name or name.startswith("ruler@"))
             and any("score" in own.get(name, ()) for own in scores.values())]
    print(comparison(names, shown, scores, gains, fronts))
    for task, what in differ.items():
        print(f"not made alike: {task} ({what})")
    out = out or folders[-1]
    try:
        os.makedirs(out, exist_ok=True)
        write_atomic(os.path.join(out, "compare.json"), json.dumps(result, indent=1))
        picture(os.path.join(out, "compare"), [bars(shown, scores), gained(shown, gains)] + [
            solved(names, fronts)] * bool(fronts))
    except OSError as e:
        raise InputError(f"--out={out}: cannot write there ({e.strerror}); give another folder") from None
    print(f"\n{os.path.join(out, 'compare.json')}   {os.path.join(out, 'compare.png')}")
    return result


def comparison(names, shown, scores, gains, fronts):
    """The lines of text that compare() prints: scores, gains, the frontier."""
    def score(r):
        x, low, high = (percent(r.get(k)) for k in ("score", "low", "high"))
        return f"{x} [{low}, {high}]" if "score" in r else "-"

    def gain(g):
        if g is None:
            return "-"
        some = f", {g['problems']} of {g['of']}" if g["problems"] < g["of"] else ""
        x, low, high = (100 * g[k] for k in ("gain", "low", "high"))
        return f"{x:+.1f} [{low:+.1f}, {high:+.1f}] p {g['p']:.2g}{some}"

    tables = [[["score, % [95 % interval]", *names]] + [
                  [name, *(score(scores[run].get(name, {})) for run in names)] for name in shown],
              [["gain, points, paired by problem", *gains]] + [
                  [name, *(gain(own.get(name)) for own in gains.values())]
                  for name in shown if any(name in own for own in gains.values())],
              [[f"of problems that {names[0]} solved", *names]] + [
                  [f"{task}, {kind}: {f['problems']}", *(f"{percent(p)} ({n} solved)" for p, n in
                                                       zip(f["pass"], f["solved"], strict=True))]
                  for task, front in fronts.items() for kind, f in front.items() if f["problems"]]]
    lines = []
    for cells in tables:
        lines += ["", *(aligned(cells, "<", "<") if len(cells) > 1 else [])]
    return "\n".join(lines[1:])
