"""The sections of the page: what a file of results comes to, as pictures, a table and plain words.

A section function takes what a file holds and returns a Section, or None where there is nothing to show. Its
constant text stands above it; what depends on the data (samples, missing nulls) is added below that. Data of
another shape ends in a KeyError, TypeError, ValueError, IndexError or AttributeError, which page.py turns
into an InputError that names the file.
"""

import math
from typing import NamedTuple

import numpy as np

from cli import human
from reporting.comparison import every_name, every_score, frontier_cells, is_listed, is_scored
from reporting.figures import (
    GROUP,
    Panel,
    bars,
    beside,
    colour,
    gained,
    hatch,
    heat,
    in_percent,
    label,
    labels,
    line,
    lines,
    marker,
    solved,
)
from suite.intervals import number, percent, with_interval

KEPT = 0.05                              # nats a token: a smaller change of held-out loss is none; ours
BF16_FLOOR = 2 ** -8                     # the smallest relative change of a bfloat16 number
CHANGED = 0.01                           # the relative change from which a weight counts as changed; paper


class Section(NamedTuple):
    title: str
    headline: str                        # its sentence in the summary
    text: dict                           # {run-in head: paragraph}
    panels: list                         # Panels, see figures.py
    head: list                           # of the table
    rows: list                           # of the table, texts


# -- training ----------------------------------------------------------------------------------------------

RETENTION = {
    "What it shows":
        "how well the model predicts text that it was not trained on, by domain, while it is trained. A "
        "loss is the mean surprise at a token, in nats.",
    "How to read it":
        "lower is better. A domain that rises is being forgotten; general web text and chat are where that "
        "shows first.",
    "Noise":
        "no interval, since the run saves means only. A change under 0.05 nats is called kept; that limit "
        "is this project's.",
}


def retention(name, metrics, config):
    """Held-out loss by domain over a run of mid-training. metrics: the lines of its metrics.jsonl."""
    tokens = {0: 0}                                       # by step
    for logged in metrics:
        if "tokens" in logged:
            tokens[logged["step"]] = logged["tokens"]
    evaluations = [(tokens[logged["step"]], logged["eval"]) for logged in metrics if "eval" in logged]
    if not evaluations:
        return None

    _, first_losses = evaluations[0]
    last_tokens, last_losses = evaluations[-1]
    outcomes = {"gained": [], "lost": [], "kept": []}     # domains
    rows = []
    series = []
    for i, (domain, loss) in enumerate(first_losses.items()):
        change = last_losses[domain] - loss
        outcome = "gained" if change < 0 else "lost"
        if abs(change) < KEPT:
            outcome = "kept"
        outcomes[outcome].append(domain)
        rows.append([domain, f"{loss:.3f}", f"{last_losses[domain]:.3f}", f"{change:+.3f}", outcome])
        series.append((domain, [(x, losses[domain]) for x, losses in evaluations], line(i + 1)))
    named = {outcome: ", ".join(domains) or "none" for outcome, domains in outcomes.items()}
    training_loss = [(logged["tokens"], logged["loss"]) for logged in metrics if "loss" in logged]

    return Section(
        title=f"Training on text: {name}",
        headline=f"{name}, held-out loss after {human(last_tokens)} tokens: better in {named['gained']}; "
                 f"within 0.05 in {named['kept']}; worse in {named['lost']}.",
        text=RETENTION | {
            "Sample": f"{config.get('eval_rows', 'some')} rows of {config.get('seq_len', 'some')} tokens of "
                      f"each source, the same ones each time; {len(evaluations)} evaluations."},
        panels=[lines("held-out loss by domain", "training tokens", "nats a token", series),
                lines("training loss, each logged step", "training tokens", "nats a token",
                      [("", training_loss, dict(color="black", linewidth=0.6))])],
        head=["domain", "before", "after", "change", ""],
        rows=rows)


REINFORCEMENT = {
    "What it shows":
        "the model answers problems, a checker says right or wrong, and the model is trained towards what "
        "was right. The reward is 1 or 0 for that, with penalties of form.",
    "How to read it":
        "held-out prompts (diamonds) should rise with those trained on (lines). KL is how far the model is "
        "from its reference. The reference may follow, so KL can fall.",
    "Selection":
        "a prompt is called unsolved when every answer before the first step was wrong. Some of that is bad "
        "luck, so some are solved later without any learning. evaluate.py --compare takes this luck out.",
}


def reinforcement(name, metrics, config):
    """Reward, pass rate, length and KL over a run of RL, and its evaluations. metrics: as in retention()."""
    steps = [logged for logged in metrics if "reward" in logged]
    curve = [(logged["step"], logged["eval"]) for logged in metrics if "eval" in logged]
    prompts = config.get("eval_prompts")
    samples = config.get("eval_samples")

    headline = f"{name}: {len(steps)} RL steps, no evaluation."
    if curve:
        _, first = curve[0]
        last_step, last = curve[-1]
        headline = (f"{name}: pass rate on held-out prompts {percent(first['pass'])} % at first, "
                    f"{percent(last['pass'])} % after {last_step} RL steps.")
    sample = (f"{len(curve)} evaluations of at most {prompts or 'some'} held-out prompts a domain, "
              f"{samples or 'some'} answers each.")
    if steps:
        sample = f"{steps[-1].get('responses', 'some')} answers in the last step; {sample}"
    noise = "The run saves no interval; evaluate.py makes one."
    if prompts:
        noise = (f"with {prompts} prompts a pass rate is uncertain by at most about "
                 f"{98 / math.sqrt(prompts):.0f} points (95 %). {noise}")

    head, rows = evaluation_table(curve)
    return Section(f"Reinforcement learning: {name}", headline,
                   REINFORCEMENT | {"Sample": sample, "Noise": noise}, rl_panels(steps, curve), head, rows)


def rl_panels(steps, curve):
    """The panels of RL's steps and of its evaluations, [(step, evaluation)]."""
    def trained(text, key, run=6, linewidth=1):
        points = [(logged["step"], logged.get(key)) for logged in steps]
        return text, points, dict(color=colour(run), linewidth=linewidth)

    def held_out(text, value, **style):
        points = [(step, value(evaluation)) for step, evaluation in curve]
        diamonds = dict(color=colour(1), marker="D", linestyle="", markeredgecolor="black")
        return text, points, diamonds | style

    def solved_share(evaluation):
        frontier = evaluation["frontier"]
        return 100 * frontier["solved"] / max(1, frontier["unsolved"])

    panels = [
        lines("reward and pass rate", "RL step", "mean",
              [trained("reward", "reward", run=0, linewidth=3), trained("pass rate", "pass_rate"),
               held_out("pass rate, held out", lambda evaluation: evaluation["pass"])], 3.8),
        lines("length of answers", "RL step", "tokens",
              [trained("in training", "length"),
               held_out("held out", lambda evaluation: evaluation["length"])], 3.8),
        lines("distance from the reference", "RL step", "KL, nats a token (k3)", [trained("", "k3")], 3.8),
    ]
    if curve:
        panels.append(lines(
            "prompts unsolved before the first step", "RL step", "%",
            [held_out("solved at least once", solved_share, **line(2)),
             held_out("their pass rate", lambda evaluation: 100 * evaluation["frontier"]["pass"],
                      **line(1))], 3.8))
    return panels


def evaluation_table(curve):
    """(head, rows) of RL's evaluations, [(step, evaluation)]."""
    columns = {}                                          # (domain, metric) as keys, in their order
    for _, evaluation in curve:
        for domain, metrics in evaluation.items():
            if isinstance(metrics, dict) and domain != "frontier":
                columns |= dict.fromkeys((domain, metric) for metric in metrics)
    rows = []
    for step, evaluation in curve:
        frontier = evaluation["frontier"]
        by_domain = [percent(evaluation.get(domain, {}).get(metric)) for domain, metric in columns]
        rows.append([str(step), percent(evaluation["pass"]), *by_domain, f"{evaluation['length']:.1f}",
                     str(frontier["unsolved"]), str(frontier["solved"]), percent(frontier["pass"])])
    names = [f"{domain} {metric}, %" for domain, metric in columns]
    return ["step", "pass rate, %", *names, "tokens", "unsolved at first", "of them solved",
            "their pass rate, %"], rows


# -- evaluations -------------------------------------------------------------------------------------------

def main_task(names):
    """The name that a headline quotes: the last mean over domains, else the last name; None without any."""
    means = [name for name in names if name.endswith("avg_domain")]
    return (means or names or [None])[-1]


SCORES = {
    "What it shows":
        "the share of right answers of each stage on each task, in %.",
    "How to read it":
        "in brackets, and as a black line on each bar, is the 95 % interval for other problems of the same "
        "kind. Stages whose intervals overlap may still differ: gains paired by problem are the sharper "
        "test.",
    "Sample":
        "problems x answers to each, in the table. Answers to one problem are no independent draws, so each "
        "problem counts once.",
    "Averages":
        "avg_domain is the mean of code, math and science; avg6 is the flat mean of the six benchmarks. "
        "Papers print both as AVG; they differ.",
}


def scores(stages):
    """Scores of each stage with their intervals: {stage: results.json}."""
    runs = {stage: every_score(results) for stage, results in stages.items()}
    shown = [name for name in every_name(runs.values()) if is_listed(name)]
    if not shown:
        return None
    graded = [name for name in shown if is_scored(name, runs)]

    headline = "No task could be graded."
    main = main_task(graded)
    if main is not None:
        quoted = [f"{stage} {with_interval(run.get(main, {}))}" for stage, run in runs.items()]
        headline = f"{main}, %: {', '.join(quoted)}."

    rows = []
    for name in shown:
        counts = "-"                                      # of the first run that has them
        cells = []
        for run in runs.values():
            result = run.get(name, {})
            if counts == "-" and "problems" in result:
                counts = f"{result['problems']} x {result.get('samples', '-')}"
            why = result.get("why", "").partition(". ")[0]                # the first sentence of it
            cells.append(why or with_interval(result))
        rows.append([name, counts, *cells])
    head = ["task", "problems x answers", *(f"{stage}, %" for stage in stages)]
    return Section("Scores", headline, SCORES, score_panels(stages, runs, graded), head, rows)


def score_panels(stages, runs, graded):
    """Bars of the graded tasks, as many a panel as a phone is wide; then RULER by length, a panel a stage."""
    drawn = {}
    for stage, run in runs.items():
        drawn[stage] = {label(name, 24): result for name, result in run.items()}
    drawn = labels(drawn)
    tasks_per_panel = max(1, int(3.4 / (0.4 * (1 + 0.5 * len(runs)))))
    panels = []
    for i in range(0, len(graded), tasks_per_panel):
        names = [label(name, 24) for name in graded[i:i + tasks_per_panel]]
        panels.append(bars(names, drawn))
    for stage, results in labels(stages).items():
        tasks = results["tasks"].items()
        by_length = {name: task for name, task in tasks if "@" in name and "score" in task}
        if by_length:
            panels.append(heat({"tasks": by_length}, title=f"{stage}: RULER, %, by tokens"))
    return panels


GAINS = {
    "What it shows":
        "what each stage gained on the one before, in points, on the same problems.",
    "How to read it":
        "p is how often a gain as large would come by chance, were there none; an interval that leaves out "
        "0 goes with p under 0.05. Of twenty tasks without any gain, one does that by luck.",
    "Sample":
        "problems that both stages answered, of all. Intervals are a bootstrap over problems.",
}


def gains(compared):
    """Gains between stages, of a compare.json."""
    pairs = compared["gains"]                             # {pair: {task: gain}}
    shown = [name for name in every_name(pairs.values()) if is_listed(name)]
    if not shown:
        return None
    main = main_task(shown)
    quoted = [f"{pair} {with_interval(tasks[main], 'gain', '{:+.1f}')}"
             for pair, tasks in pairs.items() if main in tasks]

    text = GAINS
    differing = compared.get("settings that differ")
    if differing:
        text = text | {"Not made alike": "; ".join(f"{task}: {what}" for task, what in differing.items())}
    head = ["task"]
    drawn = {}
    for pair, tasks in pairs.items():
        head += [f"{pair}, points", "p", "problems"]
        drawn[pair] = {label(name, 24): gain for name, gain in tasks.items()}
    rows = []
    for name in shown:
        row = [name]
        for tasks in pairs.values():
            row += gain_cells(tasks.get(name))
        rows.append(row)
    return Section("Gains, paired by problem", f"{main}, gain in points: {', '.join(quoted)}.", text,
                   [gained([label(name, 24) for name in shown], labels(drawn))], head, rows)


def gain_cells(gain):
    """Points, p and problems of a gain, as texts."""
    if gain is None:
        return ["-", "-", "-"]
    return [with_interval(gain, "gain", "{:+.1f}"), f"{gain['p']:.2g}", f"{gain['problems']} of {gain['of']}"]


FRONTIER = {
    "What it shows":
        "the pass rate of every stage on problems that the first one failed: new ability, or more of the "
        "old.",
    "How to read it":
        '"0 of n" are problems with no right answer in n, "1 of n" with one.',
    "Selection":
        "choosing the failed ones also chooses bad luck: an unchanged model would seem to gain. The "
        "picture, and the table's last kind, choose by half of the first stage's answers and measure it on "
        "the other half. What stands there under the first stage is luck; only what is above it is gained.",
    "Sample":
        "problems in the table. Solved means at least one right answer.",
}


def frontier(compared):
    """What becomes of the problems that the first stage did not solve."""
    names = list(compared["runs"])
    frontiers = compared["frontier"]                      # {task: {kind: problems, pass, solved}}
    if not frontiers:
        return None
    task = next(iter(frontiers))
    last = list(frontiers[task].values())[-1]
    quoted = [f"{name} {percent(rate)} %" for name, rate in zip(names, last["pass"], strict=True)]

    rows = frontier_cells(frontiers)
    drawn = {label(name, 24): kinds for name, kinds in frontiers.items()}
    return Section(
        title=f"Problems that {names[0]} did not solve",
        headline=f"{task}, {last['problems']} problems that {names[0]} did not solve: {', '.join(quoted)}.",
        text=FRONTIER,
        panels=[solved([label(name, 24) for name in names], drawn)],
        head=["task", f"{names[0]} solved", "problems", *(f"{name}, %" for name in names)],
        rows=rows)


BEHAVIOUR = {
    "What it shows":
        "how long answers are and how confident the model was of them, right and wrong ones apart.",
    "How to read it":
        "full marks are right answers, open marks wrong ones. Confidence is read from the mean negative "
        "log-probability of a token, in nats: the lower, the more confident. Where wrong answers are as "
        "confident as right ones, confidence does not tell them apart.",
    "Sample":
        "answers in the table. The median of few right answers is rough. No interval.",
    "Care":
        "answers cut at the longest length count with that length.",
}


def behaviour(stages):
    """Length and confidence of right and wrong answers (paper, table 15): {stage: results.json}."""
    runs = {}
    for stage, results in stages.items():
        tasks = results["tasks"].items()
        runs[stage] = {name: task for name, task in tasks if "all" in task and "@" not in name}
    names = every_name(runs.values())
    if not names:
        return None
    quoted = []
    for stage, tasks in runs.items():
        if names[0] in tasks:
            tokens = tasks[names[0]]["all"]["median_tokens"]
            quoted.append(f"{stage} {number(tokens, '{:.4g}')}")

    rows = []
    for name in names:
        for stage, tasks in runs.items():
            if name in tasks:
                task = tasks[name]
                kinds = [task[kind] for kind in ("all", "right", "wrong")]
                tokens = [number(kind["median_tokens"], "{:.4g}") for kind in kinds]
                nll = [number(kind["nll"], "{:.3f}") for kind in kinds]
                rows.append([name, stage, percent(task["score"]), str(task["all"]["samples"]), *tokens, *nll])
    return Section(
        title="Behaviour",
        headline=f"Median tokens of an answer to {names[0]}: {', '.join(quoted)}.",
        text=BEHAVIOUR,
        panels=[answers_panel(runs, names, "median length", "tokens", "median_tokens"),
                answers_panel(runs, names, "confidence", "mean negative log-prob", "nll")],
        head=["task", "stage", "pass rate, %", "samples", "tokens", "right", "wrong", "neg. log-prob",
              "right", "wrong"],
        rows=rows)


def answers_panel(runs, names, title, ylabel, key):
    """The panel of `key` of right answers (full marks) and wrong ones (open): {stage: {task: result}}."""
    def draw(axes):
        for run, (stage, tasks) in enumerate(labels(runs).items()):
            for kind in ("right", "wrong"):
                x, y = [], []
                for i, name in enumerate(names):
                    value = tasks[name][kind].get(key) if name in tasks else None
                    if value is not None:
                        x.append(beside(i, run, len(runs)))
                        y.append(value)
                axes.plot(x, y, marker(run), color=colour(run), markeredgecolor="black", markersize=6,
                          fillstyle="full" if kind == "right" else "none",
                          label=stage if kind == "right" else None)
        axes.set_xticks(range(len(names)), [label(name, 24) for name in names], rotation=30, ha="right")
        axes.set_ylim(0)
        axes.set(ylabel=ylabel, title=title)
        axes.legend()

    return Panel(min(9, max(3.7, 1 + 0.2 * len(names) * len(runs))), draw)


# -- weights -----------------------------------------------------------------------------------------------

COMPONENTS = ("attention", "MLP", "Mamba", "embedding", "norm")
NOISE = dict(color="black", linestyle="--", linewidth=1)               # how the null's lines look


def by_pair(data):
    """{"base to mt": entry of weights.json}; of two that are called alike the second has its folder added."""
    pairs = {}
    for pair in data["pairs"]:
        name = f"{pair['names'][0]} to {pair['names'][1]}"
        if name in pairs:
            name = f"{name} ({pair['folders'][1]})"
        pairs[name] = pair
    return pairs


def rows_by(pair, by):
    """Its rows of one kind (see analyze.grouped), components in one order everywhere."""
    order = [*COMPONENTS, None]
    rows = [row for row in pair["rows"] if row["by"] == by]
    return sorted(rows, key=lambda row: order.index(row.get("component")))


def total_of(pair):
    """Its row of all weights together."""
    return rows_by(pair, "total")[0]


def null_of(pair):
    """What noise alone does to weights kept like these (see analyze.noise_null), or None."""
    if not pair["null"]:
        return None
    return pair["null"]["masters" if pair["bf16"] else "float32"]


def nulls_of(pairs):
    """{pair: its null} of those that have one."""
    nulls = {name: null_of(pair) for name, pair in pairs.items()}
    return {name: null for name, null in nulls.items() if null}


def share_at(shares, threshold):
    """The entry of {threshold as text: share} at a threshold, or None."""
    for text, share in shares.items():
        if float(text) == threshold:
            return share
    return None


def changed(row):
    """The share of a row's weights that changed by more than 1 %, or None."""
    stayed = share_at(row["unchanged"], CHANGED)
    return None if stayed is None else 1 - stayed


DIVERGENCE = {
    "What it shows":
        "the size of the change of the weights over the size of the weights, by layer and component. 0.1 is "
        "a change of a tenth.",
    "How to read it":
        "the scale is logarithmic: a little higher is many times more. Bars on it have no zero; compare "
        "their tops.",
    "Two averages":
        "relative_l2 is pooled: all entries as one vector. mean_l2 is the mean of the tensors' own ratios. "
        "They differ, and papers do not always say which they print. The pictures show relative_l2.",
    "Null":
        "noise alone is AdamW, without weight decay, with the same learning rates on gradients of pure "
        "noise, on weights of each component. A change of that size shows how long and how fast training "
        "went, not that anything was learnt.",
    "Sample":
        "every weight of both checkpoints: no sampling, so no interval. The null is of a sample of them.",
}


def divergence(data):
    """How far weights moved, by layer and component, of a weights.json."""
    pairs = by_pair(data)
    if not pairs:
        return None
    nulls = nulls_of(pairs)
    present = {row["component"] for pair in pairs.values() for row in rows_by(pair, "component")}
    components = [component for component in COMPONENTS if component in present]

    quoted = []
    rows = []
    for name, pair in pairs.items():
        noise = f" (noise alone {number(nulls[name]['relative_l2'])})" if name in nulls else ""
        quoted.append(f"{name} {number(total_of(pair)['relative_l2'])}{noise}")
        for row in rows_by(pair, "total") + rows_by(pair, "component"):
            null_cells = ["-", "-"]
            null = pair["nulls"].get(row.get("component", "total"))
            if null:
                null_cells = [number(null["relative_l2"]), percent(changed(null))]
            rows.append([name, row.get("component", "all"), str(row["count"]), human(row["entries"]),
                         number(row["relative_l2"]), number(row.get("mean_l2")), percent(changed(row)),
                         *null_cells])
    return Section(
        title="How far the weights moved",
        headline=f"Relative change of all weights: {', '.join(quoted)}.",
        text=DIVERGENCE | divergence_gaps(pairs, nulls),
        panels=[*(layer_panel(name, pair, components) for name, pair in pairs.items()),
                component_panel(pairs, components)],
        head=["pair", "component", "tensors", "entries", "relative_l2", "mean_l2", "changed > 1 %, %",
              "noise alone, relative_l2", "noise alone, changed > 1 %, %"],
        rows=rows)


def divergence_gaps(pairs, nulls):
    """{run-in head: paragraph} of what the pairs lack."""
    without_null, nonfinite, one_sided = [], [], []
    for name, pair in pairs.items():
        if name not in nulls:
            without_null.append(name)
        entries = total_of(pair)["nonfinite"]
        if entries:
            nonfinite.append(f"{name}: {entries:,}")
        for kind in ("missing", "extra"):
            if pair.get(kind):
                one_sided.append(f"{name}: {len(pair[kind])} {kind}")
    paragraphs = {"No null": ", ".join(without_null), "Not finite, and left out": ", ".join(nonfinite),
                  "Tensors that one side lacks": "; ".join(one_sided)}
    return {head: text for head, text in paragraphs.items() if text}


def layer_panel(name, pair, components):
    """The relative change of a pair by layer, a line a component, and what noise alone gives, dashed."""
    points = {component: [] for component in components}
    for row in rows_by(pair, "layer+component"):
        if row["relative_l2"]:
            points.setdefault(row["component"], []).append((row["layer"], row["relative_l2"]))
    series = []
    for component in components:
        if component != "embedding":
            series.append((component, sorted(points[component]), line(COMPONENTS.index(component) + 1)))
    for component in components:                          # noise moves each by its own scale
        null = pair["nulls"].get(component)
        if null and null["relative_l2"] and points[component]:
            layers = sorted({layer for layer, _ in points[component]})
            series.append((f"noise alone, {component}", [(layer, null["relative_l2"]) for layer in layers],
                           NOISE | {"color": colour(COMPONENTS.index(component) + 1)}))
    return lines(label(name), "layer", "relative L2 change", series, 3.7, yscale="log")


def component_panel(pairs, components):
    """The relative change by component, a bar a pair."""
    def draw(axes):
        for i, (name, pair) in enumerate(labels(pairs).items()):
            rows = [row for row in rows_by(pair, "component") if row["relative_l2"]]
            x = [beside(components.index(row["component"]), i, len(pairs)) for row in rows]
            axes.bar(x, [row["relative_l2"] for row in rows], GROUP / len(pairs), label=name,
                     color=colour(i), hatch=hatch(i), edgecolor="black", linewidth=0.5)
        axes.set_xticks(range(len(components)), components)
        axes.set(yscale="log", ylabel="relative L2 change", title="by component (log scale)")
        axes.legend()

    return Panel(4.4, draw)


UNCHANGED = {
    "What it shows":
        "the share of weights whose relative change is below a threshold.",
    "How to read it":
        "a high line is a sparse change. Papers often quote the share at 1 %.",
    "The bf16 floor":
        "bfloat16 has 8 bits of precision, so its smallest relative change is 0.39 %. In the shaded part "
        "every weight that changed at all counts, and smaller changes were rounded away.",
    "Null":
        "dashed are gradients of pure noise, the same learning rates, the same rounding. Where a pair lies "
        "near its dashed line, its sparsity is what rounding gives and says nothing of learning.",
    "Sample":
        "every weight of both checkpoints. The null is of a sample of them.",
}


def unchanged(data):
    """The share of weights that stayed, by how small a change counts, of a weights.json."""
    pairs = by_pair(data)
    if not pairs:
        return None
    nulls = nulls_of(pairs)
    totals = {name: total_of(pair) for name, pair in pairs.items()}
    columns = {name: total["unchanged"] for name, total in totals.items()}
    columns |= {f"{name}, noise alone": null["unchanged"] for name, null in nulls.items()}
    thresholds = sorted(set(map(float, every_name(columns.values()))))
    in_bf16 = [name for name, pair in pairs.items() if pair["bf16"]]

    quoted = []
    for name, total in totals.items():
        noise = f" (noise alone {percent(changed(nulls[name]))} %)" if name in nulls else ""
        quoted.append(f"{name} {percent(changed(total))} %{noise}")
    rows = []
    for threshold in thresholds:
        shares = [percent(share_at(column, threshold)) for column in columns.values()]
        rows.append([f"{100 * threshold:g}", *shares])
    return Section(
        title="How many weights stayed as they were",
        headline=f"Weights changed by more than 1 %: {', '.join(quoted)}.",
        text=UNCHANGED | {"In bf16 here": ", ".join(in_bf16) or "none, so the floor does not apply"},
        panels=[unchanged_panel(totals, nulls, thresholds, bool(in_bf16))],
        head=["threshold, %", *columns],
        rows=rows)


def unchanged_panel(totals, nulls, thresholds, bf16):
    """The unchanged share over the threshold: {pair: row}, their nulls dashed, the part under bf16's smallest
    change shaded."""
    ticks = [100 * threshold for threshold in thresholds]
    left = ticks[0] / 1.3

    def draw(axes):
        if bf16:
            axes.axvspan(left, 100 * BF16_FLOOR, facecolor="#e4e4e4", edgecolor="#888888", linewidth=0.5,
                         label="below bf16's 0.39 %")
        for i, (name, total) in enumerate(totals.items()):
            style = line(i + 1)
            axes.plot(ticks, in_percents(total), **style | dict(label=label(name), linestyle="-"))
            if name in nulls:
                axes.plot(ticks, in_percents(nulls[name]), **style | dict(fillstyle="none", linestyle="--"))
        axes.plot([], [], label="dashed: noise alone", **NOISE)
        axes.set(xscale="log", xlabel="a change below this counts as none, %", ylabel="unchanged weights, %",
                 title="unchanged share", xlim=(left, 1.3 * ticks[-1]), ylim=(0, 105))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.legend()

    def in_percents(row):
        return [100 * share_at(row["unchanged"], threshold) for threshold in thresholds]

    return Panel(5.0, draw)


def dots(values, **settings):
    """The panel of names down, a mark a pair: {pair: {name: value or None}}. settings: of the axes."""
    names = every_name(values.values())

    def draw(axes):
        for i, (pair, by_name) in enumerate(labels(values).items()):
            x, y = [], []
            for name, value in by_name.items():
                if value is not None:
                    x.append(value)
                    y.append(len(names) - names.index(name) + 0.25 - 0.5 * (i + 1) / (len(values) + 1))
            axes.plot(x, y, marker(i), color=colour(i), label=pair, markeredgecolor="black", markersize=5)
        axes.set_yticks(range(len(names), 0, -1), [label(name, 24) for name in names])
        axes.grid(axis="y", linewidth=0.3)
        axes.set(ylim=(0.4, len(names) + 0.6), **settings)
        axes.legend()

    return Panel(4.8, draw)


def cross_table(values, form, by=1):
    """Rows of {column: {name: value or None}}: a name, and what each column has of it."""
    rows = []
    for name in every_name(values.values()):
        rows.append([name, *(number(column.get(name), form, by) for column in values.values())])
    return rows


PARTS = {
    "What it shows":
        "the share of weights that changed by more than 1 %, by part of the layers.",
    "How to read it":
        "small weights change more under the same step, and norm weights, which are near 1, less. So the "
        "size of its weights alone sets a part apart from others.",
    "Sample":
        "every weight of each part.",
}


def parts(data):
    """The share of changed weights of each part of a layer, of a weights.json."""
    values = {}                                           # {pair: {part: share}}
    for name, pair in by_pair(data).items():
        shares = {}
        for row in rows_by(pair, "component+sub"):
            part = row["component"]
            if row["sub"] != part:
                part = f"{part} {row['sub']}"
            shares[part] = changed(row)
        if shares and None not in shares.values():
            values[name] = shares
    if not values:
        return None

    def spread(name):
        return max(values[name].values()) - min(values[name].values())

    widest = max(values, key=spread)
    shares = values[widest]
    least = min(shares, key=shares.get)
    most = max(shares, key=shares.get)
    drawn = {}
    for name, by_part in values.items():
        drawn[name] = {part: 100 * share for part, share in by_part.items()}
    return Section(
        title="Which parts changed",
        headline=f"{widest}: changed by more than 1 % are {percent(shares[least])} % of {least} at the "
                 f"least, {percent(shares[most])} % of {most} at the most.",
        text=PARTS,
        panels=[dots(drawn, xlabel="changed by more than 1 %, %", xlim=(-4, 104),
                     title="changed share by part")],
        head=["part", *(f"{name}, %" for name in values)],
        rows=cross_table(values, "{:.1f}", 100))


COSINE = {
    "What it shows":
        "the cosine between the changes of two models that were trained from the same start.",
    "How to read it":
        "1 is the same direction, 0 is no relation. It is of the changes, not of the weights, which would "
        "give almost 1 in any case. Where one model was trained on from the other, they share that change, "
        "and a high cosine is no finding.",
    "Null":
        "unrelated changes of n entries have a cosine within about 2 / sqrt(n) of 0: of a million, 0.002.",
    "Sample":
        "every weight of the three checkpoints.",
}


def cosine(data):
    """The angle between two changes of one start, of a weights.json."""
    values = {}                                           # {changes: {component: cosine}}
    for pair in data["pairs"]:
        cosines = {}
        for row in rows_by(pair, "total") + rows_by(pair, "component"):
            if "cosine" in row:
                cosines[row.get("component", "all")] = row["cosine"]
        if cosines:
            start, end = pair["names"]
            values[f"{start} to {end} and to {pair.get('cosine_with')}"] = cosines
    if not values:
        return None
    quoted = [f"{name} {number(cosines.get('all'), '{:.3f}')}" for name, cosines in values.items()]
    return Section("Did two trainings move the same way?", f"Cosine of two changes: {', '.join(quoted)}.",
                   COSINE,
                   [dots(values, xlabel="cosine", xlim=(-1.05, 1.05), title="cosine of two changes")],
                   ["component", *values], cross_table(values, "{:.3f}"))


# -- representations, landscape, trajectory ----------------------------------------------------------------

SIMILARITY = {
    "What it shows":
        "CKA compares two models' hidden states on the same texts, layer by layer: 1 if they arrange the "
        "texts alike (up to rotation and scale), about 0 if not at all.",
    "How to read it":
        "the bold line is debiased. The thin one is as papers print it: with fewer texts than dimensions it "
        "is high even for unrelated models (0.95 at 200 texts and 4,096 dimensions), so alone it shows "
        "nothing.",
    "Intervals":
        "the middle 95 % over random halves of the texts, so as uncertain as half the texts are. No text is "
        "drawn twice; that would raise CKA.",
    "Null":
        "the grey band is what the same states score with the texts of one model shuffled.",
    "Without top":
        "the dimensions of the largest variance are left out. Where that line falls off, a few massive "
        "features made the similarity.",
}


def similarity(data):
    """CKA by layer, as published and debiased, of one corpus of a cka.json."""
    readable = {f"{a} {b}": f"{a} and {b}" for a in data["names"] for b in data["names"]}
    pairs = {}                                            # {pair: what each layer has}
    for name, layers in data["pairs"].items():
        pairs[readable.get(name, name)] = sorted(layers, key=lambda row: row["layer"])
    if not pairs:
        return None

    quoted = []
    rows = []
    for name, layers in pairs.items():
        defined = [row for row in layers if row["debiased"] is not None and not math.isnan(row["debiased"])]
        lowest = min(defined, key=lambda row: row["debiased"], default={})
        debiased = with_interval(lowest, "debiased", "{:.4f}", 1)
        quoted.append(f"{name} {debiased}")
        if lowest:
            band = [number(lowest[limit], "{:.3f}") for limit in ("null_low", "null_high")]
            rows.append([name, str(lowest["layer"]), debiased, number(lowest["biased"], "{:.4f}"),
                         " to ".join(band), number(lowest.get("without_top"), "{:.4f}")])
        else:
            rows.append([name, "-", "-", "-", "-", "-"])
    return Section(
        title=f"Do the stages represent text alike? ({data['corpus']})",
        headline=f"Lowest CKA of any layer, debiased, on {data['corpus']}: {', '.join(quoted)}.",
        text=SIMILARITY | {"Sample": f"{data['texts']} texts of {data['corpus']}."},
        panels=[cka_panel(name, layers) for name, layers in pairs.items()],
        head=["pair", "lowest at layer", "debiased [halves]", "biased there", "unrelated there",
              "without top there"],
        rows=rows)


def cka_panel(name, layers):
    """CKA of a pair by layer, with the interval over halves of the texts and the band of permuted texts."""
    def curve(key):
        values = [math.nan if row.get(key) is None else row[key] for row in layers]
        return np.array(values, float)

    def draw(axes):
        x = [row["layer"] for row in layers]
        debiased = curve("debiased")
        whiskers = np.maximum(0, [debiased - curve("low"), curve("high") - debiased])
        axes.fill_between(x, curve("null_low"), curve("null_high"), color="#d0d0d0",
                          label="unrelated (permuted)")
        axes.plot(x, curve("biased"), color="black", linewidth=0.7, label="biased, as published")
        axes.plot(x, curve("without_top"), color=colour(2), linestyle=":", label="debiased, without top")
        axes.errorbar(x, debiased, whiskers, color=colour(1), linewidth=2.4, elinewidth=1, capsize=2,
                      label="debiased, and halves")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="layer (0: embedding, last: final norm)", ylabel="linear CKA", title=label(name))
        lowest = np.nanmin([*curve("null_low"), *curve("low"), 0])
        axes.set_ylim(min(-0.1, lowest - 0.02), 1.05)
        axes.legend()

    return Panel(3.7, draw)


LANDSCAPE = {
    "What it shows":
        "models mixed from the stages' weights, base + alpha (MT - base) + beta (RL - MT), each tested on "
        "the same problems.",
    "How to read it":
        "a path without a dip means that one can walk from a stage to the next without losing ability. "
        "Darker squares are better.",
    "Selection":
        "the best of many points is partly the luckiest.",
}


def landscape(data):
    """The pass rate between and around base, MT and RL, of a landscape.json."""
    path = data.get("path") or []
    grid = data.get("grid") or []
    points = path or grid
    if not points:
        return None
    best = max(points, key=lambda point: point["score"])
    rows = []
    for point in points:
        score = with_interval(point) if "low" in point else percent(point["score"])
        rows.append([f"{point['alpha']:g}", f"{point['beta']:g}", score])
    panels = []
    if path:
        panels.append(path_panel(path))
    if grid:
        panels.append(plane_panel(grid))
    return Section(
        title="Between and around the stages",
        headline=f"Best pass rate {'on the path' if path else 'of the grid'} from base by MT to RL: "
                 f"{percent(best['score'])} % at alpha {best['alpha']:g}, beta {best['beta']:g}.",
        text=LANDSCAPE | {
            "Sample": f"{data['problems']} problems, {data['samples']} answers each. Intervals are 95 %, "
                      "over problems. The grid shows none; its squares are as uncertain as the path's "
                      "points."},
        panels=panels,
        head=["alpha", "beta", "pass rate, % [95 %]"],
        rows=rows)


def path_panel(path):
    """The pass rate along the path from base by MT to RL."""
    def draw(axes):
        x = [point["alpha"] + point["beta"] for point in path]
        y, whiskers = in_percent(path)
        axes.errorbar(x, y, whiskers, color="black", marker="o", markersize=4, capsize=2, linewidth=1)
        axes.set_xticks([0, 0.5, 1, 1.5, 2], ["Base", "half", "MT", "half", "RL"])
        axes.set(ylim=(0, 100), ylabel="pass rate, %", title="along the path, with 95 % intervals")

    return Panel(4.4, draw)


def plane_panel(grid):
    """The pass rate over the plane of base, MT and RL, with the path drawn into it."""
    alphas = sorted({point["alpha"] for point in grid})
    betas = sorted({point["beta"] for point in grid})

    def draw(axes):
        values = np.full((len(betas), len(alphas)), np.nan)
        for point in grid:
            values[betas.index(point["beta"]), alphas.index(point["alpha"])] = 100 * point["score"]
        axes.imshow(values, vmin=0, vmax=100, cmap="Greys", aspect="auto", origin="lower")
        draw_path(axes)
        for (row, column), value in np.ndenumerate(values):            # below and right of path and marks
            axes.text(column + 0.28, row - 0.32, number(value, "{:.0f}"), ha="center", va="center",
                      fontsize=7, color="white" if value > 60 else "black")
        axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        axes.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        axes.set_xlim(-0.75, len(alphas) - 0.5)
        axes.set(xlabel="alpha: share of mid-training's change", ylabel="beta: share of RL's change",
                 title="pass rate, %")

    def draw_path(axes):
        x = np.interp([0, 1, 1], alphas, range(len(alphas)))
        y = np.interp([0, 0, 1], betas, range(len(betas)))
        axes.plot(x, y, color="white", linewidth=4)
        axes.plot(x, y, color=colour(2), linewidth=2)
        for corner, name in enumerate(("Base", "MT", "RL")):
            at = x[corner], y[corner]
            axes.plot(*at, "osD"[corner], color="white", markeredgecolor="black", markersize=8)
            axes.annotate(name, at, (-8, 5), textcoords="offset points", ha="right", fontsize=8,
                          weight="bold", bbox=dict(facecolor="white", edgecolor="none", pad=1))

    return Panel(4.4, draw)


TRAJECTORY = {
    "What it shows":
        "how far RL has moved the weights after so many steps.",
    "How to read it":
        "a line that rises early and then lies flat is called front-loaded.",
    "Null":
        "dashed are gradients of pure noise, the same learning rates. A learning rate that decays makes any "
        "change front-loaded.",
}
CHANGES = {"from_mt": "from MT", "from_base": "from base", "null": "noise alone"}     # of a step: key, name


def trajectory(data):
    """The change of the weights over RL steps, of a trajectory.json."""
    runs = {}                                             # {run: its steps}
    for run in data["runs"]:
        if run["steps"]:
            runs[run["name"]] = sorted(run["steps"], key=lambda step: step["step"])
    if not runs:
        return None

    quoted = []
    sizes = []                                            # texts: how many steps of which run
    panels = []
    rows = []
    for name, steps in runs.items():
        last = steps[-1]
        quoted.append(f"{name} {percent(changed_share(last, 'from_mt'))} % after {last['step']} steps (noise "
                     f"alone {percent(changed_share(last, 'null'))} %)")
        sizes.append(f"{len(steps)} steps of {name}")
        panels += trajectory_panels(label(name), steps)
        for step in at_most(steps, 12):
            row = [name, str(step["step"])]
            for kind in CHANGES:
                row += [percent(changed_share(step, kind)), number(relative_l2(step, kind))]
            rows.append(row)
    head = ["run", "step"]
    for name in CHANGES.values():
        head += [f"{name}, changed, %", f"{name}, relative_l2"]
    return Section(
        title="Weights over RL steps",
        headline=f"Weights that differ from MT's by more than 1 %: {', '.join(quoted)}.",
        text=TRAJECTORY | {
            "Sample": f"every weight, at each of {', '.join(sizes)}. The table has at most 12."},
        panels=panels,
        head=head,
        rows=rows)


def changed_share(step, kind):
    """The share of weights that a step has changed by more than 1 %, or None. kind: of CHANGES."""
    return share_at((step.get(kind) or {}).get("changed", {}), CHANGED)


def relative_l2(step, kind):
    """The relative L2 change of a step, or None."""
    return (step.get(kind) or {}).get("relative_l2")


def at_most(rows, count):
    """All rows, or `count` of them at equal distances, the first and the last among them."""
    if len(rows) <= count:
        return rows
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def trajectory_panels(name, steps):
    """Three panels of a run: changed from MT, from both starts, relative L2."""
    def panel(title, y, value, by, kinds, **settings):
        series = []
        for kind in kinds:
            points = []
            for step in steps:
                x = value(step, kind)
                if x is not None:
                    points.append((step["step"], by * x))
            style = line({"from_mt": 1, "from_base": 2, "null": 6}[kind])
            style |= {"linestyle": "--" if kind == "null" else "-", "markevery": max(1, len(steps) // 12)}
            series.append((CHANGES[kind], points, style))
        return lines(title, "RL step", y, series, 3.7, **settings)

    title = f"{name}: changed > 1 %"
    return [panel(f"{title}, from MT", "% of the weights", changed_share, 100, ("from_mt", "null")),
            panel(f"{title}, from both", "% of the weights", changed_share, 100, CHANGES),
            panel(f"{name}: relative L2", "log scale", relative_l2, 1, CHANGES, yscale="log")]


# -- a study -----------------------------------------------------------------------------------------------

CLAIMS = {
    "What it shows":
        "for each claim and model what was asked for, what was found, and what there is without the effect "
        "(null: noise alone, chance, permuted texts).",
    "How to read it":
        "reproduced means that the whole interval lies where it was asked to. Directions and shares are "
        "asked for, not the paper's sizes, which a toy cannot have. A claim that is reproduced, but whose "
        "null does the same, says nothing of learning. Of forty claims without any effect one would be "
        "reproduced by luck.",
    "Intervals":
        "95 % for other seeds on the same problems, by Student's t over chains; differences are taken "
        "within each chain. Of a single chain it is for other problems. n is the number of chains where "
        "some lack the number.",
}


def claims(data):
    """The paper's claims, each with what it was held against, of a study.json."""
    counts = {model: {} for model in data["chains"]}      # {model: {verdict: claims}}
    rows = []
    for claim in data["claims"]:
        verdicts = counts[claim["model"]]
        verdicts[claim["verdict"]] = verdicts.get(claim["verdict"], 0) + 1
        columns = ("model", "verdict", "found", "asked", "null", "paper")
        rows.append([claim["claim"], *(claim[column] or "-" for column in columns)])
    quoted = []
    for model, verdicts in counts.items():
        quoted.append(f"{model}: " + ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items()))
    return Section(
        title="The paper's claims",
        headline=f"Claims of the paper: {'; '.join(quoted)}.",
        text=CLAIMS | {"Sample": "; ".join(chains_of(data["chains"])) + "."},
        panels=[],
        head=["claim", "model", "verdict", "found", "asked for", "null", "in the paper"],
        rows=rows)


def chains_of(chains):
    """A text a model of {model: seeds}: toy: 3 chains, seed 1, 2, 3."""
    texts = []
    for model, seeds in chains.items():
        noun = "chain" if len(seeds) == 1 else "chains"
        texts.append(f"{model}: {len(seeds)} {noun}, seed {', '.join(seeds)}")
    return texts


PIPELINE = {
    "What it shows":
        "the mean score over math, code and science of each cell of the study. m, mc and mcs are the base, "
        "mid-trained on math, with code, with code and science. mcs+mc is mcs after RL on math and code.",
    "Intervals":
        "95 % for other seeds, by Student's t over chains; of a single chain for other problems.",
}


def pipeline(data):
    """Every path from the base by mid-training to RL (paper, tables 4-6 and 11-13), of a study.json."""
    table = data["tables"][0]
    cells = list(dict.fromkeys(name for name, *_ in table["rows"]))
    runs = {}                                             # {model: {cell: result}}
    for model, subjects in data["estimates"].items():
        runs[model] = {}
        for cell in cells:
            average = subjects.get(cell, {}).get("avg")
            if average:
                runs[model][cell] = {"score": average["mean"], "low": average["low"], "high": average["high"]}
    quoted = []
    for name, model, *_, average in table["rows"]:
        if name in ("base", "mcs", "mcs+mcs"):
            quoted.append(f"{model} {name} {average}")
    return Section(
        title=f"{table['title']} (paper: {table['paper']})",
        headline=f"Macro-average, %: {', '.join(quoted)}.",
        text=PIPELINE,
        panels=[pipeline_panel(cells, runs)],
        head=table["head"],
        rows=table["rows"])


def pipeline_panel(cells, runs):
    """Bars of every cell's average, a bar a model; what is not measured is a dash and no zero."""
    def draw(axes):
        bars(cells, labels(runs)).draw(axes)
        most = 0
        for run, results in enumerate(runs.values()):
            for i, cell in enumerate(cells):
                if cell in results:
                    most = max(most, results[cell]["high"] or results[cell]["score"])
                else:
                    axes.text(beside(i, run, len(runs)), 0, "-", ha="center", size=14)
        axes.set_ylim(0, min(100, 110 * most) or 100)
        axes.set_title("macro-average and 95 % interval; -: not measured")

    return Panel(8.0, draw)


def counterpart(table):
    """A table of the study, after the paper's."""
    return Section(f"{table['title']} (paper: {table['paper']})", f"{table['title']}: a table.", {}, [],
                   table["head"], table["rows"])
