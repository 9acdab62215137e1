"""The claims of study/claims.py on made-up chains: known numbers in, intervals by hand, verdicts that flip
with the numbers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate
import midtrain
import rl
from cli import InputError, parse
from reporting.page import report
from study import claims
from study.claims import CELLS, CLAIMS, DOMAINS, Chain, Verdict, judged, read_chain, study
from suite.intervals import paired

# -- made-up chains, of the shapes that the stages write ---------------------------------------------------

MADE = (*CELLS, "mcs@350")
NUMBERS = {f"{cell} {domain}": x for cell in MADE for domain, x in zip(DOMAINS, (
    (0.03, 0.02, 0.02) if cell.startswith("base") else
    (0.6 if "+" in cell else 0.4, 0.1, 0.4 if cell.startswith("mcs") else 0.1)), strict=True)}
NUMBERS |= {"base tokens": 20, "mcs tokens": 60, "mcs+mcs tokens": 50, "base cut": 0.1, "loss general": -0.01,
            "loss chat": 0.02, "base to mcs L2": 0.8, "base to mcs changed": 0.97, "base to mcs cosine": 0.5,
            "mcs to mcs+mcs L2": 0.008, "mcs to mcs+mcs changed": 0.3, "mcs to mcs+mcs noise": 0.4,
            "base to base+mcs L2": 0.007, "base to base+mcs changed": 0.3, "base and mcs": 0.7,
            "mcs and mcs+mcs": 0.9995, "path base": 0.03, "path MT": 0.5, "path RL": 0.6, "share": 0.8,
            "noise share": 0.7}
SHIFTS = {1: -0.02, 2: 0.0, 3: 0.01}     # of the scores of all cells but the base's


def evaluations(shift, x):
    """{cell: (results.json, lines of problems.jsonl)}."""
    contents = {}
    for cell in MADE:
        tasks, lines = {}, []
        for domain, task in DOMAINS.items():
            score = x[f"{cell} {domain}"] + shift * (not cell.startswith("base"))
            lines += [{"task": task, "id": str(i), "what": "w",
                       "scores": [score + i / 1000, score - i / 1000]} for i in range(10)]
            said = {"samples": 20, "median_tokens": x.get(f"{cell} tokens", 30), "nll": 0.1}
            tasks[task] = {"score": score, "truncated": x.get(f"{cell} cut", 0), "all": said, "right": said,
                           "wrong": said | {"nll": None}}
        contents[cell] = {"tasks": tasks, "averages": {}, "leaderboards": {}}, lines
    return contents


def retention(x):
    return {"curve": [
        [0, {"general": 3.0, "chat": 2.0, "math": 5.0, "code": 4.0, "science": 5.0}],
        [9, {"general": 3.0 + x["loss general"], "chat": 2.0 + x["loss chat"], "math": 1.0, "code": 1.0,
             "science": 1.0}]]}


def analyses(name, x):
    """{name of a file of analysis/: its content} of a chain called name."""
    def moved(l2, changed, **more):
        return {"relative_l2": l2, "unchanged": {str(t): 1 - changed for t in (
            0.001, 0.005, 0.01, 0.02, 0.05, 0.1)}} | more

    weights = {"pairs": [
        {"names": [a, b], "nulls": {"total": moved(0.004, x[f"{a} to {b} noise"])} if a == "mcs" else {},
         "rows": [moved(x[f"{a} to {b} L2"], x[f"{a} to {b} changed"], by="total",
                        **({"cosine": x["base to mcs cosine"]} if b == "mcs" else {})),
                  moved(0.5, 0.5, by="component", component="MLP")]}
        for a, b in (("base", "mcs"), ("mcs", "mcs+mcs"), ("base", "base+mcs"))]}
    cka = {"toy": {"pooling": "mean", "pairs": {
        pair.replace(" and ", " "): [
            {"layer": 0, "debiased": 1.0, "biased": 1.0, "null_high": 0.01},
            {"layer": 1, "debiased": x[pair], "biased": x[pair], "null_high": 0.02},
            {"layer": 2, "debiased": float("nan"), "biased": 0.99999, "null_high": 0.0}]
        for pair in ("base and mcs", "mcs and mcs+mcs")}}}
    trajectory = {"runs": [{"name": f"{name}/mcs+mcs", "steps": [
        {"step": 50, "from_mt": {"relative_l2": 0.01}, "null": {"relative_l2": 0.02}},
        {"step": 20, "from_mt": {"relative_l2": 0.01 * x["share"]},
         "null": {"relative_l2": 0.02 * x["noise share"]}}]}]}
    landscape = {"path": [
        {"alpha": a, "beta": b, "score": x[f"path {place}"]} for a, b, place in (
            (0.0, 0.0, "base"), (1.0, 0.0, "MT"), (1.0, 1.0, "RL"))]}
    return {"weights": weights, "cka": cka, "trajectory": trajectory, "landscape": landscape}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_chain(folder, shift, x):
    for cell, (results, lines) in evaluations(shift, x).items():
        write(folder / "eval" / cell / "results.json", results)
        (folder / "eval" / cell / "problems.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines))
    for start in ("m", "mc", "mcs"):
        write(folder / start / "retention.json", retention(x))
    for name, content in analyses(folder, x).items():
        write(folder / "analysis" / f"{name}.json", content)


def chain_of(shift, x):
    """What read_chain() makes of such a folder, without the folder."""
    chain = Chain({}, {})
    for cell, (results, lines) in evaluations(shift, x).items():
        problems = {domain: {(line["id"], line["what"]): line["scores"] for line in lines
                             if line["task"] == task} for domain, task in DOMAINS.items()}
        chain.problems[cell] = problems
        chain.add({cell: claims.scored(results["tasks"], problems)})
    for name, content in analyses("chain", x).items():
        chain.add(getattr(claims, name)(content))
    for start in ("m", "mc", "mcs"):
        chain.add({start: claims.retention(retention(x))})
    return chain


def judge(claim, seeds=(1, 2, 3), **change):
    """What becomes of a claim, by its text, in chains with these numbers."""
    claim, = (known for known in CLAIMS if known.text == claim)
    return judged(claim, {str(seed): chain_of(SHIFTS[seed], NUMBERS | change) for seed in seeds})


def write_study(folder, seeds=(1, 2, 3), models=("toy",), **change):
    for model in models:
        for seed in seeds:
            write_chain(folder / f"{model}-{seed}", SHIFTS[seed], NUMBERS | change)
    return study(str(folder))


def verdicts(result):
    return {c["claim"]: c["verdict"] for c in result["claims"]}


# -- tests -------------------------------------------------------------------------------------------------

FLIPS = {                                # what makes each claim fail
    "Mid-training gains in math": {"base math": 0.9},
    "Mid-training gains in code": {"base code": 0.9},
    "Mid-training gains in science": {"mcs science": 0.2},                 # a gain, but under chance
    "Mid-training keeps general performance": {"loss general": 0.2},
    "Half of mid-training's tokens give most of its gain": {"mcs@350 math": 0.01, "mcs@350 science": 0.01},
    "Each stage raises the macro-average": {"mcs+mcs math": 0.1},
    "Both stages together make it at least three times the base's": {"base math": 0.9},
    "RL on the base stays near zero in math": {"base+mc math": 0.9, "base+mcs math": 0.9},
    "Science in mid-training raises science after RL": {"mcs+mc science": 0.2, "mcs+mcs science": 0.2},
    "The RL mix matters less than the mid-training mix": {"mc+mcs math": 0.99},
    "Mid-training lengthens answers": {"mcs tokens": 10},
    "RL shortens answers": {"mcs+mcs tokens": 70},
    "Mid-training moves almost all weights by over 1 %": {"base to mcs changed": 0.8},
    "RL moves fewer weights than mid-training": {"mcs to mcs+mcs changed": 0.99},
    "RL moves weights far less than mid-training": {"mcs to mcs+mcs L2": 0.2},
    "RL leaves the same footprint from any start": {"base to base+mcs L2": 0.1},
    "MC and MCS move the weights alike": {"base to mcs cosine": -0.5},
    "RL keeps the representations": {"mcs and mcs+mcs": 0.99},
    "Most of the gain from base by MT to RL comes before RL": {"path MT": 0.3},
    "RL's change is front-loaded": {"share": 0.3},
}


def test_chains_in_memory_are_those_on_disk(tmp_path):
    write_chain(tmp_path, SHIFTS[1], NUMBERS)
    assert read_chain(str(tmp_path)) == chain_of(SHIFTS[1], NUMBERS)


def test_each_claim_is_reproduced_by_its_own_numbers(tmp_path):
    found = verdicts(write_study(tmp_path))
    for claim in CLAIMS[-2:]:
        assert found.pop(claim.text) == "not testable at this scale"
    noisy = {"RL moves weights far less than mid-training"}                # 0.8 is over 10 times 0.004 too
    assert set(found) == set(FLIPS)
    assert found == {claim: "reproduced" + ", and by noise alone" * (claim in noisy) for claim in FLIPS}


@pytest.mark.parametrize("claim", FLIPS)
def test_verdicts_flip_with_the_numbers(claim):
    assert judge(claim, **FLIPS[claim])["verdict"] == "not reproduced"


def test_intervals_are_students(tmp_path):
    """Gains of 0.35, 0.37 and 0.38: deviation 0.0152753, t of 2 degrees 4.30265, over the root of 3."""
    result = write_study(tmp_path)
    claim = result["claims"][0]
    assert claim["found"] == "base to mcs +36.7 [+32.9, +40.5]" and claim["asked"] == "base to mcs over 0"
    own = result["estimates"]["toy"]["mcs"]["math"]
    assert own["mean"] == pytest.approx(0.396667, abs=1e-6) and own["seeds"] == 3
    assert own["low"] == pytest.approx(0.396667 - 0.037946, abs=2e-6)
    assert own["high"] == pytest.approx(0.396667 + 0.037946, abs=2e-6)
    # a difference is taken within each chain: RL adds 20 points in each, whatever the chains' own scores
    row = next(row for row in result["tables"][1]["rows"] if row[0] == "mcs to mcs+mcs")
    assert row == ["mcs to mcs+mcs", "toy", "+20.0 [+20.0, +20.0]", "+0.0 [+0.0, +0.0]", "+0.0 [+0.0, +0.0]",
                   "+6.7 [+6.7, +6.7]"]


def test_tables_hold_the_numbers(tmp_path):
    result = write_study(tmp_path, models=("toy", "toy-h"))
    tables = {t["paper"]: {(row[0], row[1]): dict(zip(t["head"], row, strict=True)) for row in t["rows"]}
              for t in result["tables"] if not t["paper"].startswith("figures")}
    assert [*result["chains"]] == ["toy", "toy-h"] and len(tables["table 9"]) == 4
    assert len(tables["table 22"]) == 6
    rl = tables["table 22"]["mcs to mcs+mcs", "toy-h"]
    assert rl["L2"] == "0.008 [0.008, 0.008]" and rl["changed"] == "30.0 [30.0, 30.0]"
    assert rl["noise changed"] == "40.0 [40.0, 40.0]" and rl["L2 Mamba"] == "-" == rl["cosine"]
    assert tables["table 15"]["mcs", "toy"]["tokens"] == "60.0 [60.0, 60.0]"
    assert tables["table 15"]["mcs", "toy"]["NLL wrong"] == "-"
    of = result["estimates"]["toy"]
    assert of["mcs and mcs+mcs"]["CKA"]["mean"] == pytest.approx(0.9995)
    assert of["mcs and mcs+mcs"]["permuted CKA"]["mean"] == pytest.approx(0.02)
    assert of["mcs+mcs"]["share at 20 %"]["mean"] == pytest.approx(0.4)           # half of the way to step 20
    assert of["mcs+mcs"]["noise at 40 %"]["mean"] == pytest.approx(0.7)
    assert of["base to mcs"]["times"]["mean"] == pytest.approx(100)
    assert of["base to mcs"]["noise times"]["mean"] == pytest.approx(200)
    assert json.loads((tmp_path / "study.json").read_text()) == result


def test_nulls_are_beside():
    claim = "RL moves fewer weights than mid-training"
    assert judge(claim)["null"] == (
        "RL 30.0 [30.0, 30.0]; noise alone 40.0 [40.0, 40.0]; RL less noise -10.0 [-10.0, -10.0]: under 0, "
        "beyond noise")
    noisy = {"mcs to mcs+mcs noise": 0.2, "noise share": 0.9}
    assert judge(claim, **noisy)["null"].endswith("+10.0 [+10.0, +10.0]: not under 0, noise gives that too")
    assert judge("RL's change is front-loaded", **noisy)["null"].endswith("not over 0, noise gives that too")


def test_an_interval_that_holds_its_limit_is_undecided():
    gain = judge("Mid-training gains in math", **{"mcs math": 0.04})
    assert gain["verdict"] == "not testable at this scale"
    assert gain["found"].endswith("undecided: an interval holds its limit")


def test_what_a_toy_cannot_say():
    """No factor of nothing; no length of a base that does not stop."""
    empty = {f"base {domain}": 0.0 for domain in DOMAINS} | {"base cut": 0.9}
    factor = judge("Both stages together make it at least three times the base's", **empty)
    length = judge("Mid-training lengthens answers", **empty)
    assert factor["verdict"] == length["verdict"] == "not testable at this scale"
    assert "but a test needs under 50.0" in length["found"]


def test_what_did_not_move_is_no_footprint():
    """RL from a base that is never right changes nothing: a zero, neither left out nor divided by."""
    claim = judge("RL leaves the same footprint from any start", **{"base to base+mcs L2": 0.0})
    assert claim["verdict"] == "not testable at this scale"
    assert claim["found"].endswith("L2, from base 0 [0, 0], but a test needs over 0")


def test_a_base_that_still_learns_has_nothing_to_forget():
    claim = "Mid-training keeps general performance"
    assert judge(claim, **{"loss general": -0.06})["verdict"] == Verdict.NOT_TESTABLE.value
    assert judge(claim, **{"loss general": -0.04})["verdict"] == Verdict.REPRODUCED.value


def test_no_score_is_under_none_or_over_all():
    chains = {str(score): chain_of(0.0, NUMBERS | {"mcs math": score}) for score in (0.0, 0.3, 0.9)}
    score = claims.estimate(chains, claims.mean("math", "mcs"))
    assert (score.low, score.high) == (0, 1) and score.mean == pytest.approx(0.4)
    assert judged(CLAIMS[0], chains)["found"].startswith("base to mcs +37.0 [-76.")    # a difference may be


def test_seeds_that_agree_leave_the_problems_in_doubt():
    """Three chains that never find anything: no width over seeds; 0 of 20 over problems."""
    chain = chain_of(0.0, NUMBERS | {"base math": 0.0})
    chain.problems["base"]["math"] = {(str(i), "w"): [0, 0] for i in range(10)}
    score = claims.estimate({"1": chain, "2": chain, "3": chain}, claims.mean("math", "base"))
    assert score.mean == score.low == 0 and 0.1 < score.high < 0.4


def test_missing_cells(tmp_path):
    """One chain without a cell counts two; a cell that none has is a dash, and its claims say so."""
    write_study(tmp_path)
    shutil.rmtree(tmp_path / "toy-2" / "eval" / "mcs")
    for seed in (1, 2, 3):
        shutil.rmtree(tmp_path / f"toy-{seed}" / "eval" / "mcs+mc")
        (tmp_path / f"toy-{seed}" / "analysis" / "cka.json").unlink()
    result = study(str(tmp_path))
    rows = {row[0]: row for row in result["tables"][0]["rows"]}
    assert rows["mcs+mc"] == ["mcs+mc", "toy", "-", "-", "-", "-"]
    # 0.35 and 0.38: deviation 0.0212132, t of 1 degree 12.7062, over the root of 2
    assert result["claims"][0]["found"] == "base to mcs +36.5 [+17.4, +55.6] n=2"
    claims = {c["claim"]: c for c in result["claims"]}
    mix, alike = (claims[claim] for claim in ("The RL mix matters less than the mid-training mix",
                                              "RL keeps the representations"))
    assert mix["verdict"] == alike["verdict"] == "not yet measured"
    assert mix["found"].endswith("not there: mcs+mc") and "mcs+mc less mc+mcs -" in mix["found"]
    assert alike["found"].endswith("not there: mcs and mcs+mcs")
    (tmp_path / "toy-h-1").mkdir()
    result = study(str(tmp_path))
    assert {c["verdict"] for c in result["claims"] if c["model"] == "toy-h"} == {
        "not yet measured", "not testable at this scale"}
    assert {text for row in result["tables"][0]["rows"] if row[1] == "toy-h" for text in row[2:]} == {"-"}


def test_one_chain_has_intervals_over_problems(tmp_path):
    result = write_study(tmp_path, seeds=(1,))
    gain = np.full(10, 0.35)
    low, high = paired([(1.0, gain)])[1:3]
    assert result["claims"][0]["found"] == f"base to mcs +35.0 [{100 * low:+.1f}, {100 * high:+.1f}]"
    own = result["estimates"]["toy"]
    assert own["mcs"]["avg"]["low"] < own["mcs"]["avg"]["mean"] < own["mcs"]["avg"]["high"]
    assert own["base to mcs"]["L2"] == {"mean": 0.8, "low": None, "high": None, "seeds": 1}
    far = next(c for c in result["claims"] if "far less" in c["claim"])
    assert far["verdict"] == "not testable at this scale"
    assert far["found"].endswith("one chain, so no interval")


def test_steps_of_mid_training(tmp_path):
    """Table 9 is there when its cells are, in the order of steps."""
    write_study(tmp_path, seeds=(1,))
    shutil.copytree(tmp_path / "toy-1" / "eval" / "mc", tmp_path / "toy-1" / "eval" / "mcs@1000")
    table = next(t for t in study(str(tmp_path))["tables"] if t["paper"] == "table 9")
    assert [row[0] for row in table["rows"]] == ["mcs@350", "mcs@1000", "mcs"]
    for steps in (350, 1000):
        shutil.rmtree(tmp_path / "toy-1" / "eval" / f"mcs@{steps}")
    assert "table 9" not in [t["paper"] for t in study(str(tmp_path))["tables"]]


@pytest.mark.parametrize("text", ["{", "[]", '"text"', "\xff"])
@pytest.mark.parametrize("name", ["eval/mc/results.json", "eval/mc/problems.jsonl", "mc/retention.json", *(
    f"analysis/{name}.json" for name in ("weights", "cka", "trajectory", "landscape"))])
def test_damaged_files_are_named(tmp_path, name, text):
    write_chain(tmp_path / "toy-1", 0.0, NUMBERS)
    (tmp_path / "toy-1" / name).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=f"toy-1/{name}"):
        read_chain(str(tmp_path / "toy-1"))


def test_the_command(tmp_path):
    for folder, what in ((tmp_path / "no-such", "no-such"), (tmp_path, "no chain")):
        with pytest.raises(InputError, match=what):
            study(str(folder))
    done = subprocess.run([sys.executable, "-m", "study.claims", tmp_path], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: study: ") and "toy-1" in done.stderr


def test_the_page_shows_the_study(tmp_path, capsys):
    result = write_study(tmp_path / "study", models=("toy", "toy-h"))
    said = capsys.readouterr().out
    assert "Mid-training gains in math, toy-h: reproduced" in said and "toy: 3 chains, seed 1, 2, 3" in said
    with open(report([str(tmp_path / "study")], str(tmp_path / "out"))) as f:
        page = f.read()
    assert page.count("<section") == 1 + len(result["tables"])
    assert "toy: 19 reproduced, 1 reproduced, and by noise alone, 2 not testable at this scale" in page
    assert "+36.7 [+32.9, +40.5]" in page
    assert (tmp_path / "out" / "figures" / "02-pipeline-1.svg").exists()


# -- the scripts -------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


def commands(folder, script, *words, fails=""):
    """What a script asks for, as lists of words: its Python is replaced by a note of the commands, which
    fails at those that have `fails` among their words. Also the script's own end."""
    note = folder / "note"
    note.write_text('#!/bin/sh\nline=$(printf "%s\\037" "$@")\necho "$line" >>commands\n'
                    f'for word in "$@"; do [ "$word" != "{fails}" ] || exit 1; done\n')
    note.chmod(0o755)
    (folder / script).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / script, folder / script)           # study.sh runs in the folder that it stands in
    done = subprocess.run(["bash", folder / script, *words], capture_output=True, text=True, cwd=folder,
                          env={**os.environ, "PYTHON": str(note)}, timeout=60)
    asked = [line.split("\037")[:-1] for line in (folder / "commands").read_text().splitlines()]
    return [own for own in asked if own[0] not in ("-c", "-")], done


def checked(asked, made):
    """Parses each command with the real config, or the flags of an analysis; all they read was made before.
    Returns the analyses."""
    analysed = []
    for script, *words in asked:
        if script == "analyze.py":
            read = [w.removeprefix("--null=") for w in words if w.removeprefix("--null=").startswith("runs/")]
            for path in read:
                where = path.removesuffix("/model")
                assert where in made or path.endswith(("/analysis", "runs/eval", "runs/study")), (words, path)
            flags = {w.partition("=")[0] for w in words if w.startswith("--")}
            known = {"weights": {"--null", "--rank"}, "landscape": {"--path", "--grid", "--problems"}}
            assert flags <= {"--out"} | known.get(words[0], set()), words
            analysed.append(words[0])
            continue
        stage = {"midtrain.py": midtrain, "rl.py": rl, "evaluate.py": evaluate}[script]
        cfg = parse(stage.Config, words, stage.recipe)
        stage.check(cfg, 1)
        assert cfg.init.removesuffix("/model") in made or not cfg.init or cfg.init.startswith("random:")
        made[cfg.run] = cfg
    return analysed


def test_every_command_of_a_chain_parses(tmp_path):
    made, (asked, done) = {}, commands(tmp_path, "study/study.sh", "toy", "3")
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr
    assert checked(asked, made) == ["compare", *["weights"] * 3, "cka", *["trajectory"] * 2, "landscape"]
    cells = {*CELLS, "mcs@350"}
    assert made.keys() == {f"runs/study/toy-3/{way}{cell}" for cell in cells for way in ("", "eval/")}
    assert {cfg.seed for cfg in made.values()} == {3}


def test_a_failed_chain_is_not_lost(tmp_path):
    """The others go on, tables and page are made, and the study's end says that something failed."""
    asked, done = commands(tmp_path, "study/study.sh", fails="--init=random:toy-h:2")
    assert done.returncode not in (0, 2)
    assert [own[:2] for own in asked][-2:] == [["-m", "study.claims"], ["analyze.py", "report"]]
    assert [path for path in asked[-1] if path.startswith("runs/")] == ["runs/study", *(
        f"runs/study/toy-1/{name}" for name in ("mcs", "mcs+mcs", "eval/base", "eval/mcs", "eval/mcs+mcs",
                                                "analysis"))]
    ends = [line.split(": ")[0].split()[1] for line in done.stdout.splitlines() if line.endswith(": done")]
    assert sorted(ends) == [f"runs/study/{chain}" for chain in ("toy-1", "toy-2", "toy-3", "toy-h-1",
                                                                 "toy-h-3")]


def test_the_demo_is_a_chain(tmp_path):
    made, (asked, done) = {}, commands(tmp_path, "demo.sh")
    assert done.returncode == 0, done.stderr
    assert asked.pop() == ["tests/check_demo.py", "runs"]
    analysed = {"weights", "cka", "landscape", "trajectory", "behaviour", "report", "compare"}
    assert set(checked(asked, made)) == analysed
    assert made.keys() == {f"runs/{name}" for name in ("base", "mt", "rl", "rl-base", *(
        f"eval/{name}" for name in ("base", "mt", "rl")))}


def test_a_stage_that_fails_on_the_second_core_ends_the_demo(tmp_path):
    asked, done = commands(tmp_path, "demo.sh", fails="--out=runs/rl-base")
    assert done.returncode == 1 and "--out=runs/rl" not in [own[-1] for own in asked]
