"""The page of reporting/page.py: what is on it, that it needs nothing from outside, and what it refuses."""

import base64
import json
import math
import re
from html.parser import HTMLParser

import pytest

import reporting.page
from cli import InputError
from reporting import sections
from reporting.figures import picture
from reporting.page import report

HOSTILE = '<script>alert(1)</script>"\'&$\\frac{_'
TASKS = ("toy-math", "toy-code")


# -- made-up runs, of the shapes that the stages write -----------------------------------------------------

def metrics(run):
    if run == "mt":
        losses = ({"general": 3.1581, "math": 5.5436}, {"general": 3.5675, "math": 0.8752})
        return [{"step": 0, "eval": losses[0]}, {"step": 1, "loss": 4.47, "tokens": 2048},
                {"step": 2, "loss": 3.79, "tokens": 4096}, {"step": 2, "eval": losses[1]}]
    held = [{"math": {"pass@1": p, "pass@4": p + 0.1}, "pass": p, "length": 25.4 + p,
             "frontier": {"unsolved": 25, "solved": n, "pass": n / 30}}
            for p, n in ((0.376, 0), (0.6362, 15))]
    step = {"step": 1, "reward": 0.41, "pass_rate": 0.41, "length": 24.6, "k3": 0.0, "responses": 256}
    return [{"step": 0, "eval": held[0]}, step, {"step": 1, "eval": held[1]}]


def results(stage):
    def task(i):
        score = 0.1 * stage + 0.03 * i
        kinds = {"all": (492, 27.0, 0.1463), "right": (244, 30.0, 0.0231), "wrong": (248, 15.0, 0.2674)}
        return {"score": score, "low": score - 0.02, "high": score + 0.04, "problems": 123, "samples": 4} | {
            kind: dict(zip(("samples", "median_tokens", "nll"), own, strict=True))
            for kind, own in kinds.items()}

    mean = {"score": 0.1 * stage, "low": 0.05 * stage, "high": 0.9, "of": dict.fromkeys(TASKS, 0.5)}
    return {"tasks": {name: task(i) for i, name in enumerate(TASKS)} | {"ungraded": {
        "problems": 3, "why": "no bwrap. Long"}}, "averages": {"toy avg_domain": mean}, "leaderboards": {}}


def neighbours(names):
    return list(zip(names, names[1:], strict=False))


def compare(names):
    gain = {"gain": 0.4959, "low": 0.4362, "high": 0.5557, "p": 0.0002, "problems": 123, "of": 128}
    later = len(names) - 1
    front = {"problems": 61, "solved": [0] + [40] * later, "pass": [0.0123] + [0.4567] * later}
    return {"runs": {name: f"runs/{name}" for name in names}, "settings that differ": {},
            "gains": {f"{a} to {b}": dict.fromkeys(TASKS, gain) for a, b in neighbours(names)},
            "frontier": {"toy-math": {"0 of 4": front, "0 of 2": front | {"problems": 70}}}}


def change(x, **more):
    return {"relative_l2": x, "mean_l2": 2 * x, "count": 7, "entries": 2 ** 18,
            "nonfinite": 0,
            "unchanged": {str(t): math.exp(-x / t) for t in (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)}} | more


def weights(names):
    def pair(a, b, x):
        rows = [change(x, by="total", cosine=0.5213)]
        for i, part in enumerate(("norm", "attention", "MLP")):
            rows += [change(x * (i + 1), by="component", component=part, cosine=0.61),
                     change(x * (i + 1), by="component+sub", component=part, sub=f"{part}-sub")]
            rows += [change(x * (i + 1 + layer), by="layer+component", component=part, layer=layer)
                     for layer in range(4)]
        return {"names": [a, b], "folders": [a, b], "cosine_with": "other", "rows": rows, "missing": [],
                "extra": ["lm_head.weight"], "bf16": True,
                "nulls": {k: change(0.000321) for k in ("total", "MLP")},
                "null": dict.fromkeys(("masters", "float32", "stepwise"), change(0.000321))}

    return {"pairs": [pair(a, b, 0.1 / 7 ** i) for i, (a, b) in enumerate(neighbours(names))]}


def cka(names):
    layers = [{"layer": i, "biased": 0.99, "debiased": 0.8764 - 0.1 * i, "low": 0.5, "high": 0.93,
               "null_low": -0.04, "null_high": 0.05, "without_top": None} for i in range(4)]
    layers.append(layers[-1] | {"layer": 4, "debiased": math.nan, "low": math.nan, "high": math.nan})
    return {"toy web": {"names": list(names), "texts": 64, "corpus": "toy web",
                        "pairs": {f"{a} {b}": layers for a, b in neighbours(names)}}}


def landscape():
    path = [(i / 4, 0) for i in range(5)] + [(1, i / 4) for i in range(1, 5)]
    return {"problems": 200, "samples": 8,
            "path": [{"alpha": a, "beta": b, "score": 0.17 + 0.59 * a + 0.04 * b, "low": 0.1, "high": 0.85}
                     for a, b in path],
            "grid": [{"alpha": a / 4, "beta": b / 4, "score": 0.1 * (a + b)}
                     for a in range(5) for b in range(5)]}


def trajectory():
    def of(share, x):
        return {"relative_l2": x, "changed": {"0.001": 1.0, "0.01": share}}

    return {"runs": [{"name": "rl", "steps": [
        {"step": 20 * i, "from_mt": of(0.0512 * i / 20, 3e-4 * i), "from_base": of(0.9, 0.175),
         "null": of(0.04 * i / 20, 2e-4 * i)} for i in range(1, 21)]}]}


def study():
    own = {"mean": 0.4389, "low": 0.4294, "high": 0.4478, "seeds": 3}
    rows = [[cell, model, "43.9 [42.9, 44.8]"] for model in ("toy", "toy-h")
            for cell in ("base", "mcs", "mcs+mcs")]
    return {"chains": {"toy": ["1", "2", "3"], "toy-h": ["1"]},
            "estimates": {"toy": {"base": {"avg": own}, "mcs": {"avg": None}},
                          "toy-h": {"mcs": {"avg": own | {"low": None, "high": None, "seeds": 1}}}},
            "tables": [{"title": title, "paper": "table 1", "head": ["", "model", "avg"], "rows": rows}
                       for title in ("Scores", "Weights")],
            "claims": [{"claim": HOSTILE, "model": model, "verdict": verdict, "paper": "3 times", "null": "",
                        "asked": "over 0", "found": "+1.0 [+0.5, +1.5]"}
                       for model, verdict in (("toy", "reproduced"), ("toy-h", "not yet measured"))]}


DATA = {"study.json": ["claims", "pipeline", "counterpart"],
        "metrics.jsonl": ["retention"], "rl/metrics.jsonl": ["reinforcement"],
        "results.json": ["scores", "behaviour"],
        "compare.json": ["gains", "frontier"], "weights.json": ["divergence", "unchanged", "parts", "cosine"],
        "cka.json": ["similarity"], "landscape.json": ["landscape"], "trajectory.json": ["trajectory"]}


def write(folder, kinds=DATA, names=("base", "mt", "rl")):
    """A folder of runs that holds these kinds of files; returns the folders to give."""
    for kind in kinds:
        where = {"results.json": names, "rl/metrics.jsonl": ("rl",), "metrics.jsonl": ("mt",)}
        for i, name in enumerate(where.get(kind, ("analysis",))):
            path = folder / name / kind.split("/")[-1]
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".jsonl":
                path.write_text("".join(json.dumps(line) + "\n" for line in metrics(name)))
                (path.parent / "config.json").write_text('{"eval_rows": 4, "eval_prompts": 128}')
            else:
                make = globals()[path.stem]
                path.write_text(json.dumps(make(i) if make is results else make(names) if make in (
                    compare, weights, cka) else make()))
    return [str(folder)]


class Page(HTMLParser):
    """Tags with their attributes, texts, tables (lists of rows)."""

    def __init__(self, path):
        super().__init__()
        with open(path) as f:
            self.source = f.read()
        self.tags, self.tables, self.text = [], [], ""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.tags and self.tags[-1][0] in ("td", "th"):
            self.tables[-1][-1][-1] += data.strip("\n")

    def sections(self):
        return [a["id"].partition("-")[2] for tag, a in self.tags if tag == "section"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of everything, three stages."""
    folder = tmp_path_factory.mktemp("all")
    return Page(report(write(folder / "runs"), str(folder / "out"))), folder


@pytest.fixture
def undrawn(monkeypatch):
    """Texts and tables alone: that the pictures can be drawn is shown by `page`."""
    monkeypatch.setattr(reporting.page, "drawn", lambda *_: "")


# -- tests -------------------------------------------------------------------------------------------------

def test_nothing_from_outside(page):
    page, folder = page
    allowed = ("html head meta title link style body h1 h2 p b a ul li section div img table thead tbody tr "
               "th td").split()
    inert = "lang charset name content rel href id class tabindex scope width alt src".split()
    for tag, attributes in page.tags:
        assert tag in allowed
        for name, value in attributes.items():
            assert name in inert
            assert name not in ("src", "href") or value.startswith(("data:", "#")), value[:80]
    assert not re.search(r"url\(|@import|https?:|//", re.sub(r"base64,[\w+/=]+", "", page.source))
    for kind, data in re.findall(r"data:image/([\w+]+);base64,([\w+/=]+)", page.source):
        drawn = base64.b64decode(data)
        assert drawn.startswith(b"\x89PNG") if kind == "png" else b"<svg" in drawn and b"<script" not in drawn
    assert len(page.source) < 5e6
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert [a["href"] for tag, a in page.tags if tag == "a"] == [f"#{i}" for i in ids]        # the summary


def test_pictures_are_files_too(page):
    page, folder = page
    files = sorted(p.name for p in (folder / "out" / "figures").iterdir())
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(files) == 2 * len(images) and all(a["alt"] for a in images)
    assert {name.rpartition(".")[0] for name in files if name.endswith(".svg")} == {
        name.rpartition(".")[0] for name in files if name.endswith(".png")}


@pytest.mark.parametrize("kind", DATA)
def test_a_section_is_there_when_its_data_is(tmp_path, kind, undrawn):
    everything = Page(report(write(tmp_path / "all"), str(tmp_path / "out")))
    assert sorted(everything.sections()) == sorted(name for own in DATA.values() for name in own)
    without = write(tmp_path / "without", [other for other in DATA if other != kind])
    assert sorted(Page(report(without, str(tmp_path / "out"))).sections()) == sorted(
        name for other, own in DATA.items() if other != kind for name in own)
    alone = Page(report(write(tmp_path / "alone", [kind]), str(tmp_path / "out")))
    assert alone.sections() == DATA[kind]


def test_tables_hold_the_numbers_of_the_files(page):
    tables = dict(zip(page[0].sections(), page[0].tables, strict=True))
    assert tables["retention"][1:] == [["general", "3.158", "3.567", "+0.409", "lost"],
                                       ["math", "5.544", "0.875", "-4.668", "gained"]]
    assert tables["reinforcement"][2] == ["1", "63.6", "63.6", "73.6", "26.0", "25", "15", "50.0"]
    assert tables["scores"][0] == ["task", "problems x answers", "base, %", "mt, %", "rl, %"]
    assert tables["scores"][2] == ["toy-code", "123 x 4", "3.0 [1.0, 7.0]", "13.0 [11.0, 17.0]",
                                   "23.0 [21.0, 27.0]"]
    assert tables["scores"][3][:3] == ["ungraded", "3 x -", "no bwrap"]
    assert tables["claims"][1] == [HOSTILE, "toy", "reproduced", "+1.0 [+0.5, +1.5]", "over 0", "-",
                                   "3 times"]
    assert tables["pipeline"][3] == ["mcs+mcs", "toy", "43.9 [42.9, 44.8]"] == tables["counterpart"][3]
    assert "Macro-average, %: toy base 43.9 [42.9, 44.8], toy mcs 43.9" in page[0].text
    assert "toy: 1 reproduced; toy-h: 1 not yet measured." in page[0].text
    assert tables["gains"][1] == ["toy-math", *["+49.6 [+43.6, +55.6]", "0.0002", "123 of 128"] * 2]
    assert tables["frontier"][2] == ["toy-math", "0 of 2", "70", "1.2 (0 solved)", *["45.7 (40 solved)"] * 2]
    assert tables["behaviour"][2] == ["toy-math", "mt", "10.0", "492", "27", "30", "15", "0.146", "0.023",
                                      "0.267"]
    total = weights(("base", "mt"))["pairs"][0]["rows"][0]
    assert tables["divergence"][1] == ["base to mt", "all", "7", "262k", "0.1", "0.2",
                                       f"{100 * (1 - total['unchanged']['0.01']):.1f}", "0.000321", "3.2"]
    assert [row[7:] for row in tables["divergence"] if row[:2] == ["mt to rl", "attention"]] == [["-", "-"]]
    assert [row[1] for row in tables["divergence"][1:5]] == ["all", "attention", "MLP", "norm"]
    assert tables["unchanged"][3][:2] == ["1", f"{100 * total['unchanged']['0.01']:.1f}"]
    assert tables["cosine"][1] == ["all", "0.521", "0.521"]
    assert tables["similarity"][1] == ["base and mt", "3", "0.5764 [0.5000, 0.9300]", "0.9900",
                                       "-0.040 to 0.050", "-"]
    assert tables["landscape"][1] == ["0", "0", "17.0 [10.0, 85.0]"]
    assert tables["trajectory"][-1] == ["rl", "400", "5.1", "0.006", "90.0", "0.175", "4.0", "0.004"]
    assert len(tables["trajectory"]) == 13
    for what in ("0.39 %", "pure noise", "halves of the texts", "shuffled", "bad luck", "64 texts"):
        assert what in page[0].text


def test_the_same_files_give_the_same_bytes(tmp_path):
    folders = write(tmp_path / "runs", ["cka.json"])
    pages = [open(report(folders, str(tmp_path / out)), "rb").read() for out in ("a", "b")]
    assert pages[0] == pages[1]
    for path in (tmp_path / "a" / "figures").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "figures" / path.name).read_bytes()


@pytest.mark.parametrize("count", [2, 7])
def test_two_and_seven_stages(tmp_path, count, undrawn):
    names = [f"stage-{i}" for i in range(count)]
    kinds = ["results.json", "compare.json", "cka.json"]
    found = Page(report(write(tmp_path / "runs", kinds, names), str(tmp_path / "out")))
    tables = dict(zip(found.sections(), found.tables, strict=True))
    assert tables["scores"][0][2:] == [f"{name}, %" for name in names]
    assert len(tables["similarity"]) == count and len(found.source) < 5e6


def write_hostile(tmp_path):
    """A folder of runs in which whatever has a name is called something that is no plain text."""
    names = (HOSTILE, "_hidden", "a" * 300)
    (tmp_path / "runs").mkdir()
    for kind, make in {"compare.json": compare, "weights.json": weights, "cka.json": cka}.items():
        (tmp_path / "runs" / kind).write_text(json.dumps(make(names)))
    for name, own in {"trajectory.json": trajectory(), "landscape.json": landscape() | {"problems": HOSTILE},
                      "results.json": results(1)}.items():
        text = json.dumps(own).replace('"rl"', json.dumps(HOSTILE)).replace('"toy-math"', json.dumps(HOSTILE))
        (tmp_path / "runs" / name).write_text(text)
    (tmp_path / "runs" / "metrics.jsonl").write_text("".join(
        json.dumps(line).replace('"math"', json.dumps(HOSTILE)) + "\n" for line in metrics("mt")))
    return [str(tmp_path / "runs")]


def test_hostile_names_are_text(tmp_path, undrawn):
    page = Page(report(write_hostile(tmp_path), str(tmp_path / "out")))
    assert not {"script"} & {tag for tag, _ in page.tags} and "<script" not in page.source
    assert page.text.count(HOSTILE) > 10 and "a" * 300 in page.text


def test_hostile_names_are_drawn(tmp_path):
    """In legends, titles and on both axes."""
    names = (HOSTILE, "_hidden", "a" * 300)
    compared = json.loads(json.dumps(compare(names)).replace('"toy-math"', json.dumps(HOSTILE)))
    for make, data in ((sections.gains, compared), (sections.frontier, compared),
                       (sections.similarity, cka(names)["toy web"])):
        for i, panel in enumerate(make(data).panels):
            picture(str(tmp_path / f"{make.__name__}-{i}"), [reporting.page.legible(panel)])
    assert len(list(tmp_path.iterdir())) == 2 * (1 + 1 + 2)


@pytest.mark.slow
def test_hostile_names_are_drawn_everywhere(tmp_path):
    folders = write_hostile(tmp_path)
    assert len(Page(report(folders, str(tmp_path / "out"))).tags) > 100


def test_weights_in_float32_have_no_floor_and_perhaps_no_null(tmp_path, undrawn):
    own = weights(("base", "mt", "rl"))
    own["pairs"][0] |= {"bf16": False, "null": None}
    own["pairs"][1] |= {"bf16": False, "null": own["pairs"][1]["null"] | {"float32": change(0.00777)}}
    (tmp_path / "weights.json").write_text(json.dumps(own))
    page = Page(report([str(tmp_path)], str(tmp_path / "out")))
    assert "the floor does not apply" in page.text and "No null: base to mt" in page.text
    picture(str(tmp_path / "unchanged"), sections.unchanged(own).panels)
    drawn = (tmp_path / "unchanged.svg").read_text()
    assert "0.39 %" not in drawn and "dashed: noise alone" in drawn


def test_two_folders_of_one_name(tmp_path, undrawn):
    """They are told apart by the folder above."""
    a, b = write(tmp_path / "a", ["results.json"], ["rl"]), write(tmp_path / "b", ["results.json"], ["rl"])
    page = Page(report([*a, *b, *a], str(tmp_path / "out")))
    assert page.tables[0][0][2:] == ["a/rl, %", "b/rl, %"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"pairs": 3}', "\xff", "[" * 100_000,
                                  '{"runs": {"a": 1}, "gains": {"a": {"b": 1}}, "frontier": {}}'])
@pytest.mark.parametrize("name", [name for name in DATA if "metrics" not in name])
def test_damaged_files_are_named(tmp_path, name, text):
    folder = tmp_path / "damaged-run"
    folder.mkdir()
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=f"damaged-run/{re.escape(name)}"):
        report([str(folder)], str(tmp_path / "out"))


@pytest.mark.parametrize("text", ['{"step"\n{"step": 1}\n', "[]\n", '{"step": 0, "eval": 3}\n',
                                  '{"eval": {"a": 1}}\n'])
def test_damaged_metrics_are_named(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match="metrics.jsonl"):
        report([str(tmp_path)], str(tmp_path / "out"))


def test_numbers_that_are_none(tmp_path, undrawn):
    """Text where a number belongs is refused; a run cut short, or without an evaluation, is shown."""
    bad = landscape()
    bad["path"][0]["score"] = "high"
    (tmp_path / "landscape.json").write_text(json.dumps(bad))
    with pytest.raises(InputError, match="landscape.json"):
        report([str(tmp_path)], str(tmp_path / "out"))
    (tmp_path / "landscape.json").unlink()
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics("rl")[1]) + '\n{"step": 2, "rew')
    assert Page(report([str(tmp_path)], str(tmp_path / "out"))).sections() == ["reinforcement"]


def test_nothing_to_show(tmp_path):
    with pytest.raises(InputError, match="nothing to show"):
        report([str(tmp_path)], str(tmp_path / "out"))
    with pytest.raises(InputError, match="no-such"):
        report([str(tmp_path / "no-such")], str(tmp_path / "out"))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="--out"):
        report(write(tmp_path / "runs", ["cka.json"]), str(tmp_path / "out"))
