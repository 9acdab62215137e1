"""Pictures of results, as PNG and SVG: panels side by side, each a function of what it shows. Bars begin at
zero, scores have their intervals, labels the number of problems."""

import numpy as np


def picture(path, panels):
    """Panels side by side, [(inches, draw(axes))], as path.png and path.svg."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    widths = [width for width, _ in panels]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                                "axes.titlelocation": "left", "legend.frameon": False, "legend.fontsize": 8,
                                "svg.hashsalt": "prism"}):
        figure, axes = plt.subplots(1, len(panels), figsize=(sum(widths), 3.6), width_ratios=widths,
                                    squeeze=False, layout="constrained")
        for (_, draw), own in zip(panels, axes[0], strict=True):
            draw(own)
        figure.savefig(path + ".png", dpi=150)
        figure.savefig(path + ".svg", metadata={"Date": None})
        plt.close(figure)


HATCHES = ("", "", "///", "...", "\\\\\\", "xxx", "---")
MARKERS = "osD^v<>"
DASHES = ("-", "--", ":", "-.")
COLOURS = ("#c4c4c4", "#4878a8", "#c8553d", "#5b8c5a", "#8e6c8a", "#c9a227", "#3f3f3f")


def colour(run):
    """Of the run-th run in every picture; a print in grey keeps runs apart by HATCHES and MARKERS."""
    return COLOURS[run % len(COLOURS)]


def label(name, most=42):
    """A name as matplotlib may draw it: one line, not too long, no formula; a legend would leave out what
    begins with _."""
    name = "".join(c if c.isprintable() else "?" for c in str(name))
    if len(name) > most:
        name = f"{name[:most // 2 - 1]}...{name[2 - most // 2:]}"
    if name.startswith("_"):
        name = " " + name
    return name.replace("$", r"\$")


def line(i):
    """How the i-th line of a picture looks: a grey print keeps markers and dashes apart."""
    return dict(color=colour(i), marker=MARKERS[i % len(MARKERS)], linestyle=DASHES[i % len(DASHES)],
                markersize=4, linewidth=1.3)


def lines(title, x, y, series, inches=4.4, **settings):
    """The panel of [(name, [(x, y or None)], style)], labels x and y under and beside it. settings: those of
    the axes; unless they give yscale, the y axis begins at 0 or below."""
    def draw(axes):
        lowest = highest = 0
        for name, points, style in series:
            points = [(a, b) for a, b in points if b is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label(name), **style)
                heights = [b for _, b in points]
                lowest = min(lowest, *heights, 0)
                highest = max(highest, *heights, 0)
        axes.set(xlabel=x, ylabel=y, title=title, **settings)
        if "xscale" not in settings:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if "yscale" not in settings:
            axes.set_ylim(lowest, lowest + 1.06 * (highest - lowest) or 1)
        if len(series) > 1:
            axes.legend()
    return inches, draw


def bars(names, runs):
    """The panel of scores with their intervals, a group a name, a bar a run: {run: {name: result}}."""
    def draw(axes):
        width = 0.8 / len(runs)
        for r, (run, scores) in enumerate(runs.items()):
            there = [(i, scores[name]) for i, name in enumerate(names) if "score" in scores.get(name, ())]
            there = [(i, s if s["low"] is not None else dict.fromkeys(s, s["score"])) for i, s in there]
            x = [i + (r - (len(runs) - 1) / 2) * width for i, _ in there]
            y, low, high = (np.array([100 * s[k] for _, s in there]) for k in ("score", "low", "high"))
            axes.bar(x, y, width, label=run, color=colour(r), hatch=HATCHES[r % len(HATCHES)],
                     edgecolor="black", linewidth=0.5)
            axes.errorbar(x, y, np.array([y - low, high - y]), fmt="none", ecolor="black", elinewidth=1,
                          capsize=2)
        counts = {name: r["problems"] for scores in runs.values() for name, r in scores.items()
                  if "problems" in r}
        axes.set_xticks(range(len(names)), [f"{n} ({counts[n]})" if n in counts else n for n in names],
                        rotation=30, ha="right")
        axes.set_ylim(0, 100)
        axes.set(ylabel="score, %", title="score and 95 % interval over problems")
        if len(runs) > 1:
            axes.legend()

    return 2 + 0.4 * len(names) * (1 + 0.5 * len(runs)), draw


def lengths(rows):
    """The panel of how long answers are: right, wrong, cut."""
    def draw(axes):
        kinds = {"right": [r["tokens"] for r in rows if r["score"] == 1],
                 "wrong": [r["tokens"] for r in rows if r["score"] < 1 and r["finish"] == "stop"],
                 "cut": [r["tokens"] for r in rows if r["score"] < 1 and r["finish"] != "stop"]}
        edges = np.geomspace(1, max(2, *(r["tokens"] for r in rows)) + 1, 30)
        axes.hist(list(kinds.values()), edges, stacked=True, edgecolor="black", linewidth=0.3,
                  color=("#4878a8", "#c8553d", "#e8d8a0"),
                  label=[f"{kind}: {len(own):,}" for kind, own in kinds.items()])
        axes.set(xscale="log", xlabel="tokens of an answer", ylabel="samples", title="length of answers")
        axes.legend()

    return 4, draw


def heat(results):
    """The panel of RULER, tasks by length."""
    grid = {name: r["score"] for name, r in results["tasks"].items() if "@" in name}
    tasks, sizes = (list(dict.fromkeys(name.split("@")[i] for name in grid)) for i in (0, 1))

    def draw(axes):
        values = np.array([[100 * grid[f"{task}@{size}"] for size in sizes] for task in tasks])
        axes.imshow(values, vmin=0, vmax=100, cmap="Greys", aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if value > 60 else "black")
        axes.set_xticks(range(len(sizes)), sizes, rotation=30, ha="right")
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_title("RULER: score, %, by tokens")

    return 2.6 + 0.6 * len(sizes), draw


def gained(shown, gains):
    """The panel of paired differences."""
    def draw(axes):
        for g, (pair, own) in enumerate(gains.items()):
            there = [(i, own[name]) for i, name in enumerate(shown[::-1]) if name in own]
            y = [i + 0.25 - 0.5 * (g + 1) / (len(gains) + 1) for i, _ in there]
            x, low, high = (np.array([100 * gain[k] for _, gain in there]) for k in ("gain", "low", "high"))
            axes.errorbar(x, y, xerr=np.array([x - low, high - x]), fmt="os^Dv"[g % 5], color=colour(g + 1),
                          label=pair, capsize=2, markersize=4)
        axes.axvline(0, color="black", linewidth=0.5)
        axes.set_yticks(range(len(shown)), shown[::-1])
        axes.set(xlabel="points gained", title="gain, paired by problem")
        axes.legend()

    return 4.5, draw


def solved(names, fronts):
    """The panel of problems that the first run does not solve: their pass rate in each run. Chosen by half of
    its samples and measured by the other, so that luck alone makes no gain."""
    def draw(axes):
        for (task, front), mark in zip(fronts.items(), "os^Dv" * len(fronts), strict=False):
            kind, f = list(front.items())[-1]
            if f["problems"]:
                axes.plot(range(len(names)), [100 * p for p in f["pass"]], marker=mark, color="black",
                          alpha=0.7, linewidth=1, label=f"{task}: {f['problems']} problems, {kind}")
        long = sum(map(len, names)) > 24
        axes.set_xticks(range(len(names)), names, rotation=30 * long, ha="right" if long else "center")
        axes.set_ylim(0)
        axes.set(ylabel="pass rate, %", title=f"what {names[0]} did not solve")
        axes.legend()

    return 3 + 0.3 * len(names), draw
