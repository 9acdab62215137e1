"""Evaluations beside each other: scores, paired gains, the frontier."""

import json
import os

import numpy as np

from cli import InputError, write_atomic
from reporting import figures
from suite.intervals import aligned, paired, percent, read_results, with_interval
from suite.tasks import averages

# -- names of runs and tasks -------------------------------------------------------------------------------

def run_names(paths):
    """Names of folders in tables and pictures, in their order: the last part of each path, or as many of its
    parts as tell all of them apart. runs/mt/model is mt; a sum of checkpoints is its own text. Where a folder
    is given twice each name is the whole path."""
    parts = [name_parts(path) for path in paths]
    for count in range(1, 1 + max(map(len, parts), default=0)):
        names = [os.sep.join(own_parts[-count:]) for own_parts in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def name_parts(path):
    """The parts of a path that may stand in its name."""
    if "*" in path:                                       # a sum of checkpoints
        return [path]
    parts = os.path.abspath(path).strip(os.sep).split(os.sep)
    return [part for part in parts if part not in ("model", "models")] or [path]


def every_score(results):
    """{name: result} of the tasks, averages and leaderboards of a results.json."""
    scores = results["tasks"] | results["averages"]
    for board, tasks in results.get("leaderboards", {}).items():
        for task, result in tasks.items():
            scores[f"{board} {task}"] = result
    return scores


def every_name(dicts):
    """The keys of dicts, each once, in the order of their first appearance."""
    names = {}
    for keys in dicts:
        names |= dict.fromkeys(keys)
    return list(names)


def is_scored(name, scores):
    """Whether a run has a score of this name: {run: {name: result}}."""
    return any("score" in run.get(name, ()) for run in scores.values())


def is_listed(name):
    """Whether tables have a row of this name: of RULER's tasks by length, task@tokens, only the means."""
    return "@" not in name or name.startswith("ruler@")


# -- two and more runs -------------------------------------------------------------------------------------

def compare(folders, out=""):
    """Evaluations beside each other, in the order given: each score with its interval, the gain on the run
    before, paired by problem, and the frontier. Writes out/compare.json, .png and .svg (out: the last
    folder). Problems are pairs when they have the same id, prompt and truth in both runs."""
    if len(folders) < 2:
        raise InputError(f"--compare {' '.join(folders)}: give two folders of results or more")
    names = run_names(folders)
    scores = {}                                           # {run: {task: result}}
    problems = []                                         # of each run: {task: {problem: scores}}
    for name, folder in zip(names, folders, strict=True):
        results, run_problems = read_results(folder)
        scores[name] = every_score(results)
        problems.append(run_problems)

    gains = {}
    differing = {}                                        # {task: settings that are not alike}
    for i, (old_name, new_name) in enumerate(zip(names, names[1:], strict=False)):
        differences = score_differences(problems[i], problems[i + 1])
        if not differences:
            raise InputError(f"--compare: {old_name} and {new_name} have no problem in common; give "
                             f"runs of the same --tasks and --protocol")
        gains[f"{old_name} to {new_name}"] = gains_of(differences, problems[i], problems[i + 1])
        for task in differences:
            old = scores[old_name][task]["settings"]
            new = scores[new_name][task]["settings"]
            changes = [f"{key} {old[key]}, {new[key]}" for key in old if old[key] != new[key]]
            if old != new:
                differing[task] = f"{old_name}, {new_name}: {', '.join(changes)}"
    frontiers = frontiers_of(problems)

    result = {"runs": dict(zip(names, folders, strict=True)), "gains": gains, "frontier": frontiers,
              "settings that differ": differing}
    listed = [name for name in every_name(scores.values()) if is_listed(name) and is_scored(name, scores)]
    print(as_text(names, listed, scores, gains, frontiers))
    for task, what in differing.items():
        print(f"not made alike: {task} ({what})")

    out = out or folders[-1]
    panels = [figures.bars(listed, scores), figures.gained(listed, gains)]
    if frontiers:
        panels.append(figures.solved(names, frontiers))
    try:
        os.makedirs(out, exist_ok=True)
        write_atomic(os.path.join(out, "compare.json"), json.dumps(result, indent=1))
        figures.picture(os.path.join(out, "compare"), panels)
    except OSError as e:
        raise InputError(f"--out={out}: cannot write there ({e.strerror}); give another folder") from None
    print(f"\n{os.path.join(out, 'compare.json')}   {os.path.join(out, 'compare.png')}")
    return result


def score_differences(old, new):
    """{task: [new mean score less the old one, a problem]} of the problems that two runs share. old, new:
    {task: {problem: scores of its samples}}."""
    differences = {}
    for task in old:
        shared = sorted(old[task].keys() & new.get(task, {}).keys())
        if shared:
            differences[task] = [np.mean(new[task][key]) - np.mean(old[task][key]) for key in shared]
    return differences


def gains_of(differences, old, new):
    """The gain of each task and average: {name: {gain, low, high, p, problems, of}}, of: the problems of the
    larger run. differences: score_differences(old, new)."""
    weights = {task: {task: 1.0} for task in differences if "@" not in task}       # {name: {task: weight}}
    weights |= averages(differences)
    gains = {}
    for name, tasks in weights.items():
        gain = paired([(weight, differences[task]) for task, weight in tasks.items()])
        shared = sum(len(differences[task]) for task in tasks)
        old_size = sum(len(old.get(task, ())) for task in tasks)
        new_size = sum(len(new.get(task, ())) for task in tasks)
        gains[name] = gain._asdict() | {"problems": shared, "of": max(old_size, new_size)}
    return gains


# -- the frontier ------------------------------------------------------------------------------------------

def frontiers_of(problems):
    """{task of the first run: frontier()} of the problems that all runs have, where scores are 0 or 1 and the
    first run has two samples or more. problems: of each run {task: {problem: scores}}."""
    frontiers = {}
    for task in problems[0]:
        shared = set.intersection(*(set(run.get(task, ())) for run in problems))
        if not shared:
            continue
        runs, values = [], set()
        for run in problems:
            runs.append({problem: run[task][problem] for problem in sorted(shared)})
            values = values.union(*runs[-1].values())
        if min(map(len, runs[0].values())) > 1 and values <= {0, 1}:
            frontiers[task] = frontier(runs)
    return frontiers


def frontier(runs):
    """What becomes of the problems that the first run never solves, or once (paper, 9.5): {"0 of n":
    {problems, pass (a rate a run), solved (problems, a run)}, "1 of n": ...}. Chance alone solves some of
    them later, without any learning: "0 of n/2" selects by the first half of the first run's samples, and its
    pass of the first run is that of the other half: what an unchanged model would seem to gain.
    runs: [{problem: scores, 0 or 1}], the same problems in each."""
    first = runs[0]
    samples = min(map(len, first.values()))
    kinds = {}
    for correct, selecting in ((0, samples), (1, samples), (0, samples // 2)):
        chosen = [problem for problem, scores in first.items() if sum(scores[:selecting]) == correct]
        # The first run is measured by all samples, or by those that did not select.
        measured = {problem: first[problem][selecting % samples:] for problem in chosen}
        solved, rates = [], []
        for run in (measured, *runs[1:]):
            solved.append(sum(any(run[problem]) for problem in chosen))
            rates.append(pass_rate(run, chosen))
        kinds[f"{correct} of {selecting}"] = {"problems": len(chosen), "solved": solved, "pass": rates}
    return kinds


def pass_rate(run, problems):
    """The mean over problems of the share of right samples; None without any problem."""
    if not problems:
        return None
    return float(np.mean([np.mean(run[problem]) for problem in problems]))


# -- text --------------------------------------------------------------------------------------------------

def frontier_cells(frontiers):
    """[task, kind, how many problems, then a cell a run] of each kind of unsolved problems that there are."""
    rows = []
    for task, kinds in frontiers.items():
        for kind, problems in kinds.items():
            if problems["problems"]:
                rates = zip(problems["pass"], problems["solved"], strict=True)
                cells = [f"{percent(rate)} ({count} solved)" for rate, count in rates]
                rows.append([task, kind, str(problems["problems"]), *cells])
    return rows


def as_text(names, listed, scores, gains, frontiers):
    """The lines of text that compare() prints: scores, gains, the frontier."""
    score_rows = []
    for name in listed:
        score_rows.append([name, *(with_interval(scores[run].get(name, {})) for run in names)])
    gain_rows = []
    for name in listed:
        if any(name in pair for pair in gains.values()):
            gain_rows.append([name, *(gain_text(pair.get(name)) for pair in gains.values())])
    frontier_rows = []
    for task, kind, count, *cells in frontier_cells(frontiers):
        frontier_rows.append([f"{task}, {kind}: {count}", *cells])

    lines = []
    for head, rows in (
            (["score, % [95 % interval]", *names], score_rows),
            (["gain, points, paired by problem", *gains], gain_rows),
            ([f"of problems that {names[0]} solved", *names], frontier_rows)):
        lines.append("")
        if rows:
            lines += aligned([head, *rows], "<", "<")
    return "\n".join(lines[1:])


def gain_text(gain):
    """A gain with its interval and p, and problems where not all are shared: +4.1 [+1.0, +7.2] p 0.009, 3 of
    6."""
    if gain is None:
        return "-"
    text = f"{with_interval(gain, 'gain', '{:+.1f}')} p {gain['p']:.2g}"
    if gain["problems"] < gain["of"]:
        text += f", {gain['problems']} of {gain['of']}"
    return text
