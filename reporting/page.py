"""One page of what runs came to (paper, sections 8 to 10): pictures, what they show, a table under each.

    python analyze.py report runs runs/eval runs/analysis --out=runs/report
    python analyze.py report runs/study --out=runs/study/report

Any folders of runs; what they are is found by the files in them and in their subfolders: metrics.jsonl (of
mid-training and of RL), results.json and compare.json (evaluate.py), weights.json, cka.json, landscape.json,
trajectory.json (analyze.py), study.json (study/claims.py). A section is there when its data is (see
sections.py). report.html holds everything it shows and runs nothing; figures/ has each picture as PNG and
SVG. The same files give the same bytes.
"""

import base64
import html
import json
import os
from collections.abc import Callable
from typing import NamedTuple

from cli import InputError, read_lines, write_atomic
from reporting import sections
from reporting.comparison import run_names
from reporting.figures import Panel, picture

FILES = {                                # what a folder of runs may hold, and the keys that a file must have
    "metrics.jsonl": (),
    "config.json": (),
    "results.json": ("tasks", "averages"),
    "compare.json": ("runs", "gains", "frontier"),
    "weights.json": ("pairs",),
    "cka.json": (),
    "landscape.json": ("problems", "samples"),
    "trajectory.json": ("runs",),
    "study.json": ("chains", "estimates", "tables", "claims"),
}

# -- what is there -----------------------------------------------------------------------------------------

def read_folders(folders):
    """{name of FILES: {folder: content}} of folders and their subfolders, in the order given. InputError on
    what is no folder, on damaged files, and where there is nothing."""
    contents = {name: {} for name in FILES}
    seen = set()                                          # real paths, as a folder may be given twice
    for folder in folders:
        try:
            subfolders = sorted(os.listdir(folder))
        except OSError as e:
            raise InputError(f"report: {folder} cannot be read as a folder of runs ({e.strerror})") from None
        places = [folder, *(os.path.join(folder, name) for name in subfolders)]
        for name in FILES:
            for place in places:
                path = os.path.join(place, name)
                if os.path.isfile(path) and os.path.realpath(path) not in seen:
                    seen.add(os.path.realpath(path))
                    contents[name][place] = read_file(path)
    shown = [name for name in FILES if name != "config.json"]
    if not any(contents[name] for name in shown):
        raise InputError(f"report: nothing to show in {', '.join(folders) or 'no folder'}; give folders with "
                         f"one of {', '.join(shown)}")
    return contents


def read_file(path):
    """What a file holds; InputError when that is not what its name says."""
    try:
        if path.endswith(".jsonl"):
            return read_lines(path)
        with open(path) as f:
            content = json.load(f)
        missing = [key for key in FILES[os.path.basename(path)] if key not in content]
        if missing or not isinstance(content, dict) or not content:
            raise ValueError(f"no {', '.join(missing) or 'object'} in it")
        return content
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise InputError(f"report: {path} cannot be read ({e}); make it again or leave it out") from None


# -- the order of the page ---------------------------------------------------------------------------------

class Entry(NamedTuple):
    """A section that the page may have: make(*arguments) gives it, or None."""
    path: str                            # of the data, for the reader and for errors
    make: Callable
    arguments: tuple


def entries(contents):
    """The Entries in the page's order. contents: of read_folders()."""
    ordered = []

    def add(file, *makes):
        """Entries of these functions, each of every file of that name."""
        for make in makes:
            for folder, content in contents[file].items():
                ordered.append(Entry(os.path.join(folder, file), make, (content,)))

    for folder, study in contents["study.json"].items():
        path = os.path.join(folder, "study.json")
        ordered.append(Entry(path, sections.claims, (study,)))
        ordered.append(Entry(path, sections.pipeline, (study,)))
        for table in study["tables"][1:]:
            ordered.append(Entry(path, sections.counterpart, (table,)))
    ordered += training_entries(contents)
    evaluations = ", ".join(os.path.join(folder, "results.json") for folder in contents["results.json"])
    stages = stages_of(contents)
    ordered.append(Entry(evaluations, sections.scores, (stages,)))
    add("compare.json", sections.gains, sections.frontier)
    ordered.append(Entry(evaluations, sections.behaviour, (stages,)))
    add("weights.json", sections.divergence, sections.unchanged, sections.parts, sections.cosine)
    for folder, corpora in contents["cka.json"].items():
        for corpus in corpora.values():
            ordered.append(Entry(os.path.join(folder, "cka.json"), sections.similarity, (corpus,)))
    add("landscape.json", sections.landscape)
    add("trajectory.json", sections.trajectory)
    return ordered


def training_entries(contents):
    """Entries of the runs of mid-training, then of those of RL."""
    midtraining, rl = [], []
    names = run_names(contents["metrics.jsonl"])
    for name, (folder, metrics) in zip(names, contents["metrics.jsonl"].items(), strict=True):
        path = os.path.join(folder, "metrics.jsonl")
        config = contents["config.json"].get(folder, {})
        if any("reward" in line or "frontier" in line.get("eval", ()) for line in metrics):
            rl.append(Entry(path, sections.reinforcement, (name, metrics, config)))
        else:
            midtraining.append(Entry(path, sections.retention, (name, metrics, config)))
    return midtraining + rl


def stages_of(contents):
    """{stage: its results.json}, in the order in which they were compared, the others behind."""
    results = dict(zip(run_names(contents["results.json"]), contents["results.json"].values(), strict=True))
    compared = [name for content in contents["compare.json"].values() for name in content["runs"]]
    order = [*compared, *results]
    return {name: results[name] for name in sorted(results, key=order.index)}


# -- the page ----------------------------------------------------------------------------------------------

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


def report(folders, out):
    """Writes out/report.html and out/figures/ of what is in folders; returns the path of the page. InputError
    on damaged files, on folders without anything to show, and where out cannot be written."""
    contents = read_folders(folders)
    try:
        os.makedirs(os.path.join(out, "figures"), exist_ok=True)
        summary, body = [], []
        path = ", ".join(os.path.join(folder, name) for name in FILES for folder in contents[name])
        try:
            for path, make, arguments in entries(contents):
                section = make(*arguments)
                if section:
                    name = f"{len(body) + 1:02}-{make.__name__}"
                    summary.append(f'<li><a href="#{name}">{html.escape(section.headline)}</a></li>')
                    body.append(section_html(section, name, path, out))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as e:
            raise InputError(f"report: {path} is damaged or of another version ({e!r}); make it again or "
                             f"leave its folder out") from e
        page = os.path.join(out, "report.html")
        write_atomic(page, page_html(summary, body))
    except OSError as e:
        raise InputError(f"--out={out}: cannot write there ({e.strerror}); give another folder") from None
    return page


def page_html(summary, body):
    """The page of these list items and sections."""
    return "\n".join((
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<title>PRISM: what the runs came to</title>\n<link rel="icon" href="data:,">',
        f"<style>{STYLE}</style>",
        "</head><body>\n<h1>What the runs came to</h1>",
        *(f"<p>{text}</p>" for text in INTRO),
        "<h2>In short</h2>\n<ul>", *summary, "</ul>",
        *body,
        "</body></html>\n"))


def section_html(section, name, path, out):
    """A section of the page: title, paragraphs, pictures (drawn now), table, where its data is from."""
    images = drawn(section, name, out)
    paragraphs = []
    for head, text in section.text.items():
        paragraphs.append(f"<p><b>{html.escape(head)}:</b> {html.escape(text)}</p>")
    return "\n".join((
        f'<section id="{name}">',
        f"<h2>{html.escape(section.title)}</h2>",
        "\n".join(paragraphs),
        '<div class="figures">', images, "</div>",
        table_html(section.head, section.rows),
        f'<p class="source">From {html.escape(path)}</p>',
        "</section>"))


def drawn(section, name, out):
    """The pictures of a section, each of its own under out/figures, as <img>."""
    images = []
    for i, panel in enumerate(section.panels, 1):
        path = os.path.join(out, "figures", f"{name}-{i}")
        picture(path, [legible(panel)])
        images.append(f'<img width="{round(96 * panel.inches)}" '
                      f'alt="{html.escape(section.title)}, picture {i}; see the table" '
                      f'src="{data_url(path)}">')
    return "\n".join(images)


def data_url(path):
    """The picture path.svg as a data: URL, or path.png where that is smaller: the page stays small."""
    kind, file = "svg+xml", path + ".svg"
    if os.path.getsize(file) >= 80_000:
        kind, file = "png", path + ".png"
    with open(file, "rb") as f:
        data = base64.b64encode(f.read()).decode()
    return f"data:image/{kind};base64,{data}"


def legible(panel):
    """The panel with its legend below it, where it hides nothing, and a title that fits."""
    def draw(axes):
        panel.draw(axes)
        title = axes.get_title("left")
        axes.set_title(title, fontsize=min(10, 130 * (panel.inches - 0.7) / max(1, len(title))))
        handles, names = axes.get_legend_handles_labels()
        if axes.get_legend():
            axes.get_legend().remove()
            longest = max(map(len, names), default=0)
            columns = max(1, int(panel.inches / (0.06 * longest + 0.55)))
            rows = -(-len(names) // columns)
            axes.figure.legend(handles, names, loc="outside lower left", ncols=columns)
            axes.figure.set_figheight(3.4 + 0.18 * rows)

    return Panel(panel.inches, draw)


def table_html(head, rows):
    """A table, its first column as heads of the rows; nothing without a row."""
    if not rows:
        return ""
    columns = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in head)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{html.escape(str(first))}</th>{cells}</tr>')
    body = "\n".join(lines)
    return (f'<div class="table" tabindex="0"><table><thead><tr>{columns}</tr></thead>\n<tbody>{body}'
            "</tbody></table></div>")
