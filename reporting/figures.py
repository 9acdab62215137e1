"""Pictures of results, as PNG and SVG: panels side by side, each a function of what it shows. Bars begin at
zero, scores have their intervals, labels the number of problems.

The i-th run (or stage, or pair) has the i-th colour in every panel; HATCHES, MARKERS and DASHES keep runs
apart in a grey print.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

COLOURS = ("#c4c4c4", "#4878a8", "#c8553d", "#5b8c5a", "#8e6c8a", "#c9a227", "#3f3f3f")
HATCHES = ("", "", "///", "...", "\\\\\\", "xxx", "---")
MARKERS = "osD^v<>"
DASHES = ("-", "--", ":", "-.")
GROUP = 0.8                              # of the distance between two groups of bars, their width


class Panel(NamedTuple):
    """One set of axes of a picture."""
    inches: float                        # its width
    draw: Callable                       # draws into the axes that it is given


def picture(path, panels):
    """Draws panels side by side, into path.png and path.svg."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    widths = [panel.inches for panel in panels]
    settings = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "legend.fontsize": 8,
        "svg.hashsalt": "prism",         # the same picture has the same bytes
    }
    with matplotlib.rc_context(settings):
        figure, grid = plt.subplots(1, len(panels), figsize=(sum(widths), 3.6), width_ratios=widths,
                                    squeeze=False, layout="constrained")
        for panel, axes in zip(panels, grid[0], strict=True):
            panel.draw(axes)
        figure.savefig(path + ".png", dpi=150)
        figure.savefig(path + ".svg", metadata={"Date": None})
        plt.close(figure)


# -- how runs look, and are called -------------------------------------------------------------------------

def colour(run):
    """The colour of the run-th run."""
    return COLOURS[run % len(COLOURS)]


def hatch(run):
    """The pattern of the run-th run's bars."""
    return HATCHES[run % len(HATCHES)]


def marker(run):
    """The mark of the run-th run's points."""
    return MARKERS[run % len(MARKERS)]


def line(run):
    """How the run-th run's line looks, as settings of axes.plot."""
    return dict(color=colour(run), marker=marker(run), linestyle=DASHES[run % len(DASHES)], markersize=4,
                linewidth=1.3)


def label(name, longest=42):
    """A name as matplotlib may draw it: one line, at most `longest` characters, no formula; a legend would
    leave out what begins with _."""
    name = "".join(c if c.isprintable() else "?" for c in str(name))
    if len(name) > longest:
        name = f"{name[:longest // 2 - 1]}...{name[2 - longest // 2:]}"
    if name.startswith("_"):
        name = " " + name
    return name.replace("$", r"\$")


def labels(runs):
    """{name: x} with its names as labels; two names that look the same are numbered."""
    drawn = [label(name) for name in runs]
    labelled = {}
    for i, (text, x) in enumerate(zip(drawn, runs.values(), strict=True)):
        labelled[text if drawn.count(text) == 1 else f"{i + 1}: {text}"] = x
    return labelled


# -- what panels are made of -------------------------------------------------------------------------------

def beside(place, run, runs):
    """The x of the run-th of `runs` marks or bars that stand side by side around `place`."""
    return place + (run - (runs - 1) / 2) * GROUP / runs


def in_percent(results, name="score"):
    """(values (N,), whiskers below and above them (2, N)), in %, of N results {name, low, high}; a limit that
    is None gives no whisker."""
    values, whiskers = [], []
    for result in results:
        value = low = high = 100 * result[name]
        if result["low"] is not None:
            low, high = 100 * result["low"], 100 * result["high"]
        values.append(value)
        whiskers.append((max(0.0, value - low), max(0.0, high - value)))
    return np.array(values), np.reshape(whiskers, (-1, 2)).T


def lines(title, x, y, series, inches=4.4, **settings):
    """The panel of series, [(label, [(x, y or None)], settings of axes.plot)], under a title. x, y: names of
    the axes. settings: of the axes; unless they have a yscale, y begins at 0 or below."""
    def draw(axes):
        drawn = [0]                                       # every y, and the axis' zero
        for name, points, style in series:
            points = [(a, b) for a, b in points if b is not None]
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, label=label(name), **style)
                drawn += ys
        axes.set(xlabel=x, ylabel=y, title=title, **settings)
        if "xscale" not in settings:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if "yscale" not in settings:
            least = min(drawn)
            axes.set_ylim(least, least + 1.06 * (max(drawn) - least) or 1)
        if len(series) > 1:
            axes.legend()

    return Panel(inches, draw)


# -- panels ------------------------------------------------------------------------------------------------

def bars(names, runs):
    """The panel of scores with their intervals, a group a name, a bar a run: {run: {name: result}}."""
    texts = {name: name for name in names}                # with the number of problems where it is known
    for results in runs.values():
        for name in names:
            if "problems" in results.get(name, ()):
                texts[name] = f"{name} ({results[name]['problems']})"

    def draw(axes):
        for run, (text, results) in enumerate(runs.items()):
            x, scored = [], []
            for i, name in enumerate(names):
                if "score" in results.get(name, ()):
                    x.append(beside(i, run, len(runs)))
                    scored.append(results[name])
            y, whiskers = in_percent(scored)
            axes.bar(x, y, GROUP / len(runs), label=text, color=colour(run), hatch=hatch(run),
                     edgecolor="black", linewidth=0.5)
            axes.errorbar(x, y, whiskers, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        axes.set_xticks(range(len(names)), [texts[name] for name in names], rotation=30, ha="right")
        axes.set_ylim(0, 100)
        axes.set(ylabel="score, %", title="score and 95 % interval over problems")
        if len(runs) > 1:
            axes.legend()

    return Panel(2 + 0.4 * len(names) * (1 + 0.5 * len(runs)), draw)


def lengths(samples):
    """The panel of how long answers are: right, wrong, cut. samples: {tokens, score, finish} each."""
    kinds = {"right": [], "wrong": [], "cut": []}
    for sample in samples:
        if sample["score"] == 1:
            kind = "right"
        elif sample["finish"] == "stop":
            kind = "wrong"
        else:
            kind = "cut"
        kinds[kind].append(sample["tokens"])

    def draw(axes):
        longest = max(2, *(sample["tokens"] for sample in samples))
        axes.hist(list(kinds.values()), np.geomspace(1, longest + 1, 30), stacked=True, edgecolor="black",
                  linewidth=0.3, color=("#4878a8", "#c8553d", "#e8d8a0"),
                  label=[f"{kind}: {len(tokens):,}" for kind, tokens in kinds.items()])
        axes.set(xscale="log", xlabel="tokens of an answer", ylabel="samples", title="length of answers")
        axes.legend()

    return Panel(4, draw)


def heat(results, title="RULER: score, %, by tokens"):
    """The panel of RULER, tasks by length: results["tasks"] has the scores of task@tokens."""
    tasks, sizes = {}, {}                                 # {name: its row}, {tokens: their column}
    scores = {}                                           # {(row, column): score}
    for name, result in results["tasks"].items():
        task, at, size = name.partition("@")
        if at:
            row = tasks.setdefault(task, len(tasks))
            column = sizes.setdefault(size, len(sizes))
            scores[row, column] = result["score"]

    def draw(axes):
        values = np.empty((len(tasks), len(sizes)))
        for row, column in np.ndindex(values.shape):
            values[row, column] = 100 * scores[row, column]
        axes.imshow(values, vmin=0, vmax=100, cmap="Greys", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if value > 60 else "black")
        axes.set_xticks(range(len(sizes)), list(sizes), rotation=30, ha="right")
        axes.set_yticks(range(len(tasks)), list(tasks))
        axes.set_title(title)

    return Panel(2.6 + 0.6 * len(sizes), draw)


def gained(names, gains):
    """The panel of paired differences, a row a name, a mark a pair: {pair: {name: gain}}."""
    upwards = names[::-1]

    def draw(axes):
        for pair, (text, by_name) in enumerate(gains.items()):
            y, shown = [], []
            for i, name in enumerate(upwards):
                if name in by_name:
                    y.append(i + 0.25 - 0.5 * (pair + 1) / (len(gains) + 1))
                    shown.append(by_name[name])
            x, whiskers = in_percent(shown, "gain")
            axes.errorbar(x, y, xerr=whiskers, fmt="os^Dv"[pair % 5], color=colour(pair + 1), label=text,
                          capsize=2, markersize=4)
        axes.axvline(0, color="black", linewidth=0.5)
        axes.set_yticks(range(len(names)), upwards)
        axes.set(xlabel="points gained", title="gain, paired by problem")
        axes.legend()

    return Panel(4.5, draw)


def solved(names, frontiers):
    """The panel of problems that the first run does not solve: their pass rate in each run, {task:
    frontier()}. They are chosen by half of its samples and measured by the other, so that luck alone makes no
    gain."""
    def draw(axes):
        for i, (task, frontier) in enumerate(frontiers.items()):
            kind, problems = list(frontier.items())[-1]   # the one that is chosen by half of the samples
            if problems["problems"]:
                axes.plot(range(len(names)), [100 * rate for rate in problems["pass"]],
                          marker="os^Dv"[i % 5], color="black", alpha=0.7, linewidth=1,
                          label=f"{task}: {problems['problems']} problems, {kind}")
        crowded = sum(map(len, names)) > 24
        axes.set_xticks(range(len(names)), names, rotation=30 if crowded else 0,
                        ha="right" if crowded else "center")
        axes.set_ylim(0)
        axes.set(ylabel="pass rate, %", title=f"what {names[0]} did not solve")
        axes.legend()

    return Panel(3 + 0.3 * len(names), draw)
