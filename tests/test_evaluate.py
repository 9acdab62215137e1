"""evaluate.py: intervals that cover, averages by hand, saved samples graded as they should be, runs that go
on where they were killed."""

import dataclasses
import json
import math
import os
import time

import numpy as np
import pytest
import torch
from processes import Process

import evaluate
import grading
import verify
from cli import InputError, appending, parse
from corpus import prompts, world
from corpus.shards import write_source
from corpus.tokenizer import toy_tokenizer
from evaluate import main
from grading import math_answers, sandbox
from model import load
from reporting.comparison import compare, frontier
from suite import benchmarks, tasks
from suite.intervals import combined, interval, paired, student_t
from suite.tasks import averages

SMALL = ("--model=toy", "--tasks=toy-math+toy-science", "--problems=6", "--samples=2", "--max_new_tokens=12",
         "--context=96", "--max_batch=8")


def run(*flags):
    return main(parse(evaluate.Config, [*flags], evaluate.recipe))


@pytest.fixture
def drawn():
    """Tests that take this draw their results: pictures are half of a small run's time."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(evaluate, "picture", lambda path, panels: None)


# -- intervals -----------------------------------------------------------------------------------------------

def coverage(P, n, a, b, runs=600, seed=0):
    """How often the interval holds the mean of a Beta(a, b) population of problems."""
    rng = np.random.default_rng(seed)
    scores = rng.binomial(n, rng.beta(a, b, (runs, P))) / n
    return np.mean([low <= a / (a + b) <= high for _, low, high in (interval(s, n) for s in scores)])


POPULATIONS = [(30, 64, .2, .4), (198, 3, .4, 1.2), (279, 3, .1, .9), (500, 64, 2, .5), (128, 4, 5, 5),
               (128, 1, 1, 3)]             # P, n, a, b


@pytest.mark.parametrize("P, n, a, b", POPULATIONS)
def test_intervals_cover(P, n, a, b):
    """150 runs: two standard errors are 3.6 points. That of the plain binomial covers 30 % of the first."""
    assert 0.91 <= coverage(P, n, a, b, runs=150) <= 0.995


@pytest.mark.slow
@pytest.mark.parametrize("P, n, a, b", POPULATIONS)
def test_intervals_cover_at_length(P, n, a, b):
    """600 runs: two standard errors are 1.8 points."""
    assert 0.93 <= coverage(P, n, a, b) <= 0.985


def test_intervals_by_hand():
    z = 1.959964
    z += (z ** 3 + z) / (4 * 99)
    scores = [1.0] * 20 + [0.0] * 80                      # one sample a problem: Wilson's with n = 99
    n = 0.2 * 0.8 / (np.var(scores, ddof=1) / 100)
    assert n == pytest.approx(99)
    half = z * math.sqrt(0.16 / n + z * z / (4 * n * n)) / (1 + z * z / n)
    middle = (0.2 + z * z / (2 * n)) / (1 + z * z / n)
    assert interval(scores) == pytest.approx((0.2, middle - half, middle + half))
    z = 1.959964 + (1.959964 ** 3 + 1.959964) / (4 * 29)  # nothing solved: Wilson's upper limit for 0 of 30
    assert interval([0.0] * 30, 64) == pytest.approx((0, 0, z * z / (30 + z * z)))
    assert interval([1.0] * 30, 64) == pytest.approx((1, 30 / (30 + z * z), 1))
    # no spread: as many draws as samples
    assert interval([0.5] * 10, 2)[1:] == pytest.approx(interval([0, 1] * 10)[1:], abs=0.03)
    assert interval([0.3], 4) == (0.3, 0.0, 1.0)          # one problem tells nothing of others
    rng = np.random.default_rng(0)                        # parts of four, as RULER's: not wider than need be
    found = [interval(rng.binomial(4, 0.6, 100) / 4) for _ in range(150)]
    assert 0.91 <= np.mean([low <= 0.6 <= high for _, low, high in found]) <= 0.985


def test_averages_have_intervals_of_their_parts():
    x, low, high = combined([(0.5, (0.4, 0.3, 0.5)), (0.5, (0.1, 0.05, 0.3))])
    assert x == pytest.approx(0.25)
    assert low == pytest.approx(0.25 - math.hypot(0.05, 0.025))
    assert high == pytest.approx(0.25 + math.hypot(0.05, 0.1))


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    d = rng.normal(0.1, 0.4, 400)
    gain, low, high, p = paired([(1.0, d)])
    half = 1.96 * d.std() / 20                            # the normal limits, for 400 problems
    assert gain == pytest.approx(d.mean())
    assert (low, high) == pytest.approx((gain - half, gain + half), abs=0.004)
    assert p < 0.001 and paired([(1.0, d - d.mean())])[3] > 0.9
    assert paired([(1.0, np.zeros(30))]) == (0, 0, 0, 1)
    assert paired([(1.0, [1.0])]) == (1, -1, 1, 1)        # one problem tells nothing
    assert paired([(1.0, np.ones(4))])[3] == 2 ** -3      # heads four times of four, two-sided
    both = paired([(0.5, d), (0.5, -d)])                  # two benchmarks, each resampled by itself
    assert both[0] == pytest.approx(0) and both[2] == pytest.approx(half / math.sqrt(2), rel=0.1)
    assert 0.88 <= many_covered(100) <= 1


def few_covered(P, runs):
    """How often the interval of few problems without a difference holds 0."""
    rng = np.random.default_rng(1)
    found = [paired([(1.0, rng.choice([-1.0, -0.5, 0, 0.5, 1], P))], 600, i) for i in range(runs)]
    return np.mean([low <= 0 <= high for _, low, high, _ in found])


def many_covered(runs):
    """How often the interval of 200 problems holds their gain."""
    rng = np.random.default_rng(2)
    found = [paired([(1.0, rng.normal(0.05, 0.3, 200))], 600, i) for i in range(runs)]
    return np.mean([low <= 0.05 <= high for _, low, high, _ in found])


@pytest.mark.parametrize("P", [5, 10, 30])
def test_few_problems_without_a_difference(P):
    assert few_covered(P, 150) >= 0.9


@pytest.mark.slow
def test_paired_bootstrap_at_length():
    assert min(few_covered(P, 300) for P in (5, 10, 30)) >= 0.91
    assert 0.9 <= many_covered(200) <= 0.99


def test_students_t():
    """Exact up to ten observations, then to the first order: against the tables."""
    for n, limit in ((2, 12.706), (3, 4.303), (4, 3.182), (10, 2.262)):
        assert student_t(n) == pytest.approx(limit, abs=1e-3)
    for n, limit in ((11, 2.228), (31, 2.042), (101, 1.984)):
        assert limit * 0.985 < student_t(n) < limit * 1.001


# -- averages ------------------------------------------------------------------------------------------------

def test_averages_are_the_papers():
    """Granite-3.3 base (paper, tables 6 and 11): Code 2.07, GPQA 22.56, AIME 0.46 and 0.31, MATH500 26.09:
    AVG 11.19. Its code mean is spread over two benchmarks here."""
    scores = {"livecodebench": 1.07, "codeforces": 3.07, "aime-2024": 0.46, "aime-2025": 0.31,
              "math-500": 26.09, "gpqa-diamond": 22.56}
    found = {name: sum(w * scores[t] for t, w in own.items()) for name, own in averages(scores).items()}
    assert found == pytest.approx({"code": 2.07, "math": 8.953, "avg_domain": 11.194, "avg6": 8.927},
                                  abs=1e-3)
    assert set(averages(["aime-2024", "aime-2025"])) == set()
    assert set(averages(["livecodebench", "codeforces", "toy-math"])) == {"code"}
    assert averages(["toy-math", "toy-code", "toy-science", "toy-retrieval"]) == {
        "toy avg_domain": {"toy-code": 1 / 3, "toy-math": 1 / 3, "toy-science": 1 / 3}}
    assert averages(["vt@8192", "cwe@8192", "vt@16384"]) == {
        "ruler@8192": {"vt@8192": 0.5, "cwe@8192": 0.5}, "ruler@16384": {"vt@16384": 1.0}}


def test_frontier_by_hand():
    before = {"a": [0, 0, 0, 0], "b": [0, 0, 1, 0], "c": [1, 1, 1, 1], "d": [0, 0, 0, 0]}
    after = {"a": [1, 1, 0, 0], "b": [1, 1, 1, 1], "c": [1, 1, 1, 1], "d": [0, 0, 0, 0]}
    found = frontier([before, after])
    assert found["0 of 4"] == {"problems": 2, "solved": [0, 1], "pass": [0, 0.25]}
    assert found["1 of 4"] == {"problems": 1, "solved": [1, 1], "pass": [0.25, 1]}
    # by the first half a, b and d are unsolved; of their other halves one sample of six was right after all
    assert found["0 of 2"] == {"problems": 3, "solved": [1, 2], "pass": [pytest.approx(1 / 6), 0.5]}


# -- saved samples -------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path, exported, monkeypatch):
    """An evaluation whose samples are there: saved({(task, index of problem, sample): (text, finish)}) runs
    it, and no engine may start. What is not named is a wrong answer."""
    def go(answers, *flags, folder="run"):
        cfg = parse(evaluate.Config, [*SMALL, f"--init={exported}", f"--run={tmp_path / folder}", *flags],
                    evaluate.recipe)                      # SMALL gives --context: the keys are those of main
        os.makedirs(cfg.run, exist_ok=True)
        weights, lines = evaluate.Init(cfg.init).identity(), []
        chosen = [evaluate.limited(t, cfg) for name in tasks.task_names(cfg)
                  for t in tasks.make_task(name, cfg)]
        for task in chosen:
            for i, p in enumerate(task.problems):
                for j in range(task.samples):
                    text, finish = answers.get((task.name, i, j), ("<think> ? </think>\n\\boxed{no}", "stop"))
                    truth = p.truth[0] if p.domain == "recall" else p.truth
                    line = dict(key=evaluate.sample_key(weights, task, p, j, cfg), task=task.name, id=p.id,
                                index=j, engine="torch", tokens=10 * (j + 1), finish=finish, nll=0.5,
                                text=text.replace("TRUTH", str(truth)))
                    lines.append(line | ({"answers": p.truth} if p.domain == "recall" else {}))
        (tmp_path / folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        monkeypatch.setattr(evaluate, "make_engine", lambda *_: pytest.fail("an engine was started"))
        return main(cfg)

    return go


@pytest.fixture
def toy():
    return toy_tokenizer()


RIGHT = ("<think> well </think>\n\\boxed{TRUTH}", "stop")


def test_saved_samples_are_graded(saved, tmp_path, drawn):
    answers = {("toy-math", i, j): RIGHT for i in range(3) for j in range(2)}
    answers |= {("toy-math", 3, 0): RIGHT, ("toy-math", 4, 0): (RIGHT[0], "length"),      # right, but cut
                ("toy-math", 5, 0): ("<think> \\boxed{TRUTH}", "stop"),       # inside the thoughts
                ("toy-math", 5, 1): ("the answer is TRUTH", "stop"), ("toy-science", 0, 0): RIGHT}
    results = saved(answers)
    math_, science = results["tasks"]["toy-math"], results["tasks"]["toy-science"]
    assert math_["score"] == pytest.approx(3.5 / 6) and science["score"] == pytest.approx(0.5 / 6)
    assert (math_["low"], math_["high"]) == pytest.approx(interval([1, 1, 1, 0.5, 0, 0], 2)[1:])
    assert math_["pass@k"] == {2: pytest.approx(4 / 6)}
    assert math_["truncated"] == pytest.approx(1 / 12) and math_["unparsed"] == pytest.approx(2 / 12)
    assert math_["right"] == {"samples": 7, "median_tokens": 10, "nll": 0.5}
    assert math_["wrong"]["samples"] == 5 and math_["all"]["median_tokens"] == 15
    with open(tmp_path / "run" / "results.json") as f:
        assert json.load(f)["tasks"]["toy-math"]["score"] == math_["score"]
    left = set(os.listdir(tmp_path / "run"))
    assert {"results.png", "results.svg", "problems.jsonl", "verdicts.jsonl"} <= left


def test_a_changed_grader_grades_again(saved, tmp_path, monkeypatch):
    graded = []
    real = verify.grade_batch
    monkeypatch.setattr(evaluate, "grade_batch",
                        lambda items, **more: graded.append(len(items)) or real(items, **more))
    first = saved({("toy-math", 0, 0): RIGHT})
    again = saved({("toy-math", 0, 0): RIGHT})
    assert graded == [24, 0] and again == first           # and the last call, of nothing
    for module in (verify, grading, math_answers):        # a comment is edited: nothing is graded again
        copy = tmp_path / f"{module.__name__}.py"
        copy.write_text("# Edited.\n" + open(module.__file__).read())
        monkeypatch.setattr(module, "__file__", str(copy))
    assert saved({("toy-math", 0, 0): RIGHT}) == first and graded[-1] == 0
    rule = "LONGEST = 1000"                               # a rule is edited: all is graded again
    source = open(math_answers.__file__).read()
    assert rule in source
    copy = tmp_path / "rule.py"
    copy.write_text(source.replace(rule, "LONGEST = 999"))
    monkeypatch.setattr(math_answers, "__file__", str(copy))
    assert saved({("toy-math", 0, 0): RIGHT}) == first and graded[-1] == 24
    monkeypatch.setattr(evaluate, "VERDICTS", grading.VERDICTS + 1)
    assert saved({("toy-math", 0, 0): RIGHT}) == first and graded[-1] == 24


def test_an_edited_truth_grades_again(saved, tmp_path):
    for truth, score in (("5", 0.5), ("6", 0), ("5", 0.5)):
        line = dict(id="q", domain="math", prompt="2 + 3?", truth=truth)
        (tmp_path / "mine.jsonl").write_text(json.dumps(line))
        answers = {("mine", 0, 0): ("<think> 2 + 3 </think> \\boxed{5}", "stop")}
        assert saved(answers, f"--tasks={tmp_path / 'mine.jsonl'}")["tasks"]["mine"]["score"] == score


def test_what_the_machine_had_no_room_for_is_graded_again(saved, monkeypatch):
    def busy(items, **_):
        return [grading.Verdict(False, None, "not decided in time" if i % 2 else "no answer: cut")
                for i in range(len(items))]

    real = verify.grade_batch
    monkeypatch.setattr(evaluate, "grade_batch", busy)
    answers = {("toy-math", i, j): RIGHT for i in range(6) for j in range(2)}
    first = saved(answers)["tasks"]["toy-math"]
    assert first["score"] == 0 and first["timed_out"] == 0.5
    monkeypatch.setattr(evaluate, "grade_batch", real)
    assert saved(answers)["tasks"]["toy-math"]["score"] == 0.5      # the settled half stays as it was


def test_averages_through_main(saved):
    answers = {("toy-math", i, j): RIGHT for i in range(3) for j in range(2)}
    monkey = saved(answers, "--tasks=toy-math+toy-science+toy-code") if sandbox.bubblewrap()[0] else None
    if monkey is None:
        pytest.skip("no sandbox here")
    found, scores = monkey["averages"]["toy avg_domain"], monkey["tasks"]
    parts = [(1 / 3, tuple(scores[f"toy-{domain}"][k] for k in ("score", "low", "high")))
             for domain in ("math", "code", "science")]
    assert (found["score"], found["low"], found["high"]) == pytest.approx(combined(parts))


def test_code_waits_for_a_sandbox(saved, tmp_path, monkeypatch, capfd):
    def missing(_):
        raise sandbox.SandboxMissing("bubblewrap is not installed")

    lines = [dict(id=p.domain, domain=p.domain, prompt=p.prompt, truth=p.truth)
             for p in (world.problem("math", "rl", 0), world.problem("code", "rl", 0))]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = f"--tasks=toy-math+toy-code+{tmp_path / 'mixed.jsonl'}", "--problems=2"
    monkeypatch.setattr(evaluate, "check_sandbox", missing)
    results = saved({("toy-math", 0, 0): RIGHT}, *flags)
    assert results["tasks"]["toy-math"]["score"] == 0.25
    assert all("bubblewrap" in results["tasks"][name]["why"] for name in ("toy-code", "mixed"))
    out = capfd.readouterr().out
    assert out.count("The reason: bubblewrap is not installed") == 1
    assert sum(line.endswith("  not graded: no sandbox") for line in out.splitlines()) == 2
    if sandbox.bubblewrap()[0] is None:
        pytest.skip("no sandbox here")
    monkeypatch.setattr(evaluate, "check_sandbox", sandbox.check_sandbox)
    assert saved({("toy-math", 0, 0): RIGHT}, *flags)["tasks"]["toy-code"]["score"] == 0


def test_retrieval_and_prompt_files(saved, tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(dict(
        id=f"q{i}", domain="math", prompt=f"{i} + 1?", truth=str(i + 1))) + "\n" for i in range(3)))
    results = saved({("toy-retrieval", 0, 0): (" TRUTH\nnext", "length"), ("mine", 1, 0): RIGHT,
                     ("mine", 2, 1): RIGHT}, f"--tasks=toy-retrieval+{tmp_path / 'mine.jsonl'}",
                    "--problems=4")
    assert results["tasks"]["toy-retrieval"]["score"] == 0.25      # found, though it was cut: as RULER scores
    assert results["tasks"]["mine"]["score"] == pytest.approx(1 / 3)


# -- runs ----------------------------------------------------------------------------------------------------

def comparable(results):
    """Results but for where they stand and, as batches round differently, the last digits of log-probs."""
    tasks = json.loads(json.dumps(results["tasks"]), parse_float=lambda x: round(float(x), 4))
    return {k: v for k, v in results.items() if k not in ("config", "init")} | {"tasks": tasks}


def texts(folder):
    found = {}
    for name in os.listdir(folder):
        if name.startswith("samples"):
            with open(os.path.join(folder, name)) as f:
                found |= {line["key"]: line for line in map(json.loads, (s for s in f if s.endswith("\n")))}
    return found


def test_killed_runs_go_on_and_two_ranks_are_one(tmp_path, exported):
    flags = (*SMALL, f"--init={exported}", "--max_new_tokens=40", "--max_batch=2")
    once = run(*flags, f"--run={tmp_path / 'once'}")
    process = Process(tmp_path / "killed", *flags, f"--run={tmp_path / 'killed'}", stage="evaluate",
                      OMP_NUM_THREADS="1")
    saved = tmp_path / "killed" / "samples.jsonl"
    while process.running() and not (saved.exists() and saved.stat().st_size > 2000):
        time.sleep(0.005)
    process.kill()
    with open(saved, "a") as f:
        f.write('{"key": "cut sh')                        # what a kill within a line leaves
    made = saved.read_bytes().count(b"\n")
    assert 0 < made < 24
    again = run(*flags, f"--run={tmp_path / 'killed'}")
    assert comparable(again) == comparable(once)
    assert texts(tmp_path / "killed").keys() == texts(tmp_path / "once").keys()
    for key, line in texts(tmp_path / "once").items():
        assert texts(tmp_path / "killed")[key]["text"] == line["text"]
    two = Process(tmp_path / "two", *flags, f"--run={tmp_path / 'two'}", world=2, stage="evaluate",
                  OMP_NUM_THREADS="1")
    assert two.wait(120) == 0, two.text("stderr")
    with open(tmp_path / "two" / "results.json") as f, open(tmp_path / "once" / "results.json") as g:
        assert comparable(json.load(f)) == comparable(json.load(g))
    assert {"samples.jsonl", "samples.1.jsonl"} <= set(os.listdir(tmp_path / "two"))
    assert comparable(run(*flags, f"--run={tmp_path / 'two'}")) == comparable(once)       # nothing to do


def test_remainders_are_what_is_missing():
    task = benchmarks.Task("t", "math", [None] * 5, 4, 1.0, 1.0, 8, "", {})
    missing = {0: [0, 1, 2, 3], 1: [2], 2: [0, 1, 2, 3], 4: [2, 3]}
    found = evaluate.plan_calls(task, missing, 5)
    assert found == [(0, 4, [0]), (0, 4, [2]), (2, 2, [1, 4])]
    asked = {(i, first + j) for first, n, own in found for i in own for j in range(n)}
    assert {(i, j) for i, js in missing.items() for j in js} <= asked and len(asked) == 12
    # more samples than before: one call
    assert evaluate.plan_calls(task, {i: [2, 3] for i in range(9)}, 100) == [(2, 2, list(range(9)))]


def test_more_samples_are_the_same_and_more(tmp_path, exported):
    """From two to four samples a problem: the first two stay; what came in another order sums up alike."""
    flags = (*SMALL, "--tasks=toy-math", "--problems=3", f"--init={exported}")
    run(*flags, f"--run={tmp_path / 'a'}")
    first = texts(tmp_path / "a")
    more = run(*flags, "--samples=4", f"--run={tmp_path / 'a'}")
    every = texts(tmp_path / "a")
    assert len(every) == 12 and all(every[key] == line for key, line in first.items())
    once = run(*flags, "--samples=4", f"--run={tmp_path / 'b'}")
    assert comparable(once) == comparable(more)
    assert all(line["text"] == every[key]["text"] for key, line in texts(tmp_path / "b").items())
    saved, left = tmp_path / "b" / "samples.jsonl", (tmp_path / "b" / "problems.jsonl").read_text()
    saved.write_text("".join(saved.read_text().splitlines(True)[::-1]))
    run(*flags, "--samples=4", f"--run={tmp_path / 'b'}")
    assert (tmp_path / "b" / "problems.jsonl").read_text() == left


def test_what_a_key_stands_for():
    cfg = evaluate.Config(context=96)
    task = tasks.toy_task("toy-math")
    p = task.problems[0]
    same = evaluate.sample_key("w", task, p, 0, cfg)
    assert same == evaluate.sample_key("w", task, p._replace(truth="7"), 0, dataclasses.replace(
        cfg, engine="vllm", max_batch=1, call=1, problems=3, samples=9, run="x", tasks="toy"))
    others = [("w2", task, p, 0, cfg), ("w", task, p, 1, cfg), ("w", task._replace(name="x"), p, 0, cfg),
              ("w", task, p._replace(prompt="?"), 0, cfg), ("w", task, p._replace(id="x"), 0, cfg)]
    others += [("w", task._replace(**{k: 0.5}), p, 0, cfg)
               for k in ("temperature", "top_p", "max_new_tokens")]
    others += [("w", task, p, 0, dataclasses.replace(cfg, **change))
               for change in (dict(context=97), dict(seed=2), dict(dtype="float16"))]
    assert len({evaluate.sample_key(*other) for other in others} - {same}) == len(others)


def test_log_probs_are_the_engines(tmp_path, exported):
    """A greedy answer: the mean over its tokens of what a plain forward pass gives them."""
    run(*SMALL, "--tasks=toy-retrieval", "--problems=2", f"--init={exported}", f"--run={tmp_path}")
    model = load(str(exported))
    for line in texts(tmp_path).values():
        p = next(p for p in tasks.toy_task("toy-retrieval").problems if p.id == line["id"])
        ids = evaluate.encode_problem(p, model.tokenizer).ids
        nll = []
        for _ in range(line["tokens"]):
            with torch.no_grad():
                logp = model(torch.tensor([ids]))[0, -1, :model.tokenizer.vocab_size].log_softmax(-1)
            ids = [*ids, int(logp.argmax())]
            nll.append(-float(logp.max()))
        assert line["nll"] == pytest.approx(np.mean(nll), abs=1e-5) and line["nll"] > 0


def test_other_weights_and_settings_are_other_samples(tmp_path, exported):
    folder, flags = tmp_path / "run", (*SMALL, "--tasks=toy-math", "--problems=2")
    first = run(*flags, f"--init={exported}", f"--run={folder}")
    made = len(texts(folder))
    for more in (("--init=random:toy-h",), ("--init=random:toy-h", "--seed=2")):
        other = run(*flags, *more, f"--run={folder}")
        assert len(texts(folder)) == made + 4
        made += 4
    assert other["weights"] != first["weights"]
    assert comparable(run(*flags, f"--init={exported}", f"--run={folder}")) == comparable(first)
    assert len(texts(folder)) == made


def test_ruler_through_main(tmp_path, exported, drawn):
    flags = ("--model=toy", f"--init={exported}", "--tasks=niah_single_1+niah_multikey_3",
             "--lengths=1024+1100", "--context=2048", "--problems=2", "--max_new_tokens=4",
             f"--run={tmp_path}")
    results = run(*flags)
    assert set(results["averages"]) == {"ruler@1024", "ruler@1100"}
    lines = list(texts(tmp_path).values())
    assert len(lines) == 8
    for line in lines:                                    # as if the model had found them
        line["text"] = f"I found {line['answers'][0].upper()}."
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.remove(tmp_path / "verdicts.jsonl")
    assert all(r["score"] == 1 for r in run(*flags)["averages"].values())


def test_appending_drops_a_cut_line(tmp_path):
    path = str(tmp_path / "x.jsonl")
    for before, after in ((b"", b"c\n"), (b"a\n", b"a\nc\n"), (b"a\nb", b"a\nc\n"), (b"b", b"c\n")):
        (tmp_path / "x.jsonl").write_bytes(before)
        with appending(path) as f:
            f.write(b"c\n")
        assert (tmp_path / "x.jsonl").read_bytes() == after


def test_toy_problems_are_held_out():
    trained = {p["prompt"] for p in prompts.toy_prompts("train", 3000, ["math", "science", "code"])}
    for name in tasks.TOYS:
        task = tasks.toy_task(name)
        assert len({p.id for p in task.problems}) == len(task.problems) >= 100
        assert not {p.text for p in task.problems} & trained - {""}
    for p in tasks.toy_task("toy-retrieval").problems:
        assert p.prompt.count(f": {p.truth[0]}\n") == 1
        assert f"{p.prompt.splitlines()[-1]} {p.truth[0]}\n" in p.prompt


def test_scores_on_problems_not_seen(saved, tmp_path, exported, toy):
    """One science problem is planted in the training data, another in the held-out split."""
    task = evaluate.limited(tasks.toy_task("toy-science"), evaluate.Config(problems=6))
    documents = {"train": ["filler words " * 9, f"So: {task.problems[2].text} indeed"],
                 "heldout": [task.problems[3].text]}
    write_source(str(tmp_path / "data"), "dclm-edu", documents, toy)
    answers = {("toy-science", i, j): RIGHT for i in (0, 2) for j in range(2)}
    science = saved(answers, f"--shards={tmp_path / 'data'}")["tasks"]["toy-science"]
    assert science["score"] == pytest.approx(2 / 6) and science["clean"]["score"] == pytest.approx(1 / 5)
    assert len(science["seen"]) == 1
    assert saved(answers)["tasks"]["toy-science"].get("clean") is None


def test_a_folder_of_rows(tmp_path, saved):
    """--data: rows of the hub's columns, through both protocols, to a graded result."""
    (tmp_path / "rows").mkdir()
    aime = [dict(problem=f"How many odd primes are below {10 * i}?", answer=f"0{i}") for i in range(1, 8)]
    gpqa = [{"Question": f"What is element {i}?", "Correct Answer": f"x{i}"}
            | {f"Incorrect Answer {j}": f"y{j}" for j in (1, 2, 3)} for i in range(9)]
    for name, rows in (("aime-2026", [*aime, dict(problem="1/2?", answer="1/2")]), ("gpqa-diamond", gpqa)):
        (tmp_path / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--data={tmp_path / 'rows'}", "--tasks=aime-2026+gpqa-diamond", "--context=2048"
    strict = saved({("aime-2026", i, 0): RIGHT for i in range(6)}, *flags)
    assert strict["tasks"]["aime-2026"]["score"] == 0.5
    assert strict["tasks"]["aime-2026"]["left_out"] == {"answer is no integer of 0 to 999": 1}
    def always_d(finish):
        return {("gpqa-diamond", i, j): ("\\boxed{D} and on", finish) for i in range(6) for j in range(2)}

    for finish, paper in (("stop", 1), ("length", 1)):    # published scores read what was cut, too
        found = saved(always_d(finish), *flags, "--protocol=paper")["tasks"]["gpqa-diamond"]
        assert found["score"] == paper and found["truncated"] == (finish == "length")
    assert saved(always_d("stop"), *flags)["tasks"]["gpqa-diamond"]["score"] < 1
    assert saved(always_d("length"), *flags)["tasks"]["gpqa-diamond"]["score"] == 0


# -- runs beside each other ----------------------------------------------------------------------------------

def test_compare(saved, tmp_path, capsys):
    saved({("toy-math", i, 0): RIGHT for i in range(2)}, folder="a")
    saved({("toy-math", i, j): RIGHT for i in range(5) for j in range(2)}, folder="b")
    saved({}, folder="c")
    capsys.readouterr()
    a, b, c = (str(tmp_path / name) for name in "abc")
    result = compare([a, b, c], str(tmp_path / "out"))
    gain = result["gains"]["a to b"]["toy-math"]
    d = [0.5, 0.5, 1, 1, 1, 0]
    assert gain["gain"] == pytest.approx(np.mean(d)) and gain["problems"] == 6
    assert (gain["low"], gain["high"]) == pytest.approx(paired([(1.0, d)])[1:3])
    assert result["gains"]["b to c"]["toy-math"]["gain"] == pytest.approx(-5 / 6)
    assert result["gains"]["a to b"]["toy-science"] == dict(gain=0, low=0, high=0, p=1, problems=6, of=6)
    assert result["frontier"]["toy-math"]["0 of 2"]["problems"] == 4
    assert set(os.listdir(tmp_path / "out")) == {"compare.json", "compare.png", "compare.svg"}
    out = capsys.readouterr().out
    assert f"{100 * gain['gain']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]" in out
    assert "toy-math, 0 of 2: 4 0.0 (0 solved) 75.0 (3 solved) 0.0 (0 solved)" in " ".join(out.split())
    assert "not made alike" not in out and " of 6" not in out


def test_compare_says_what_is_not_alike(saved, tmp_path, capsys):
    saved({("toy-math", i, j): RIGHT for i in range(6) for j in range(2)}, folder="a")
    saved({}, "--problems=3", "--samples=4", "--max_new_tokens=9", folder="b")
    capsys.readouterr()
    result = compare([str(tmp_path / name) for name in "ab"])
    out = capsys.readouterr().out
    assert result["gains"]["a to b"]["toy-math"]["problems"] == 3 and ", 3 of 6" in out
    assert "not made alike: toy-math (a, b: max_new_tokens 12, 9, samples 2, 4)" in out


def test_compare_refuses(saved, tmp_path):
    saved({}, folder="a")
    saved({}, "--tasks=toy-retrieval", folder="b")
    for folders, word in ((["a"], "two folders"), (["a", "no"], "no results.json"),
                          (["a", "b"], "no problem in common")):
        with pytest.raises(InputError, match=word):
            compare([str(tmp_path / f) for f in folders], str(tmp_path / "out"))
    for content in ("{", "[]", "{}", '{"tasks": 1}'):
        (tmp_path / "b" / "results.json").write_text(content)
        with pytest.raises(InputError, match="damaged"):
            compare([str(tmp_path / f) for f in "ab"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        compare([str(tmp_path / "a")] * 2, str(tmp_path / "file" / "x"))


def test_the_compare_command(saved, tmp_path):
    saved({}, folder="a")
    for args, status, said in ((["--compare", "a", "a", "--out", "b"], 0, "b/compare.json"),
                               (["--out=c", "--compare", "a", "a"], 0, "c/compare.json"),
                               (["--compare", "a", "a", "--ouy=b"], 2, "not a a --ouy b")):
        args = [a if a.startswith("-") else str(tmp_path / a) for a in args]
        process = Process(tmp_path, *(a.replace("=", f"={tmp_path}/") for a in args), stage="evaluate")
        assert process.wait(60) == status
        assert said in (process.text("stdout") + process.text("stderr")).replace(f"{tmp_path}/", "")


# -- bad input -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, said", [
    (["--tasks=a/x.jsonl+b/x.jsonl"], "would be called 'x'"), (["--tasks=math.jsonl"], "task or average"),
    (["--tasks=x@y.jsonl"], "has an @"), (["--tasks=lb-v1", "--engine=vllm"], "give 0.5 at most"),
    (["--layout=above"], "not one of inside, beside"), (["--tasks=toy-math+"], "'' is no task"),
    (["--tasks=toy-maths"], "did you mean 'toy-math'"),
    (["--tasks=no.jsonl"], "no.jsonl cannot be read"), (["--protocol=loose"], "strict, paper"),
    (["--dtype=float16"], "not one of bfloat16, float32"), (["--samples=-1"], "at least 0"),
    (["--lengths=8k"], "--lengths=8k"), (["--data=/nowhere"], "--data=/nowhere is no folder"),
    (["--tasks=vt", "--lengths=4096", "--context=2048"], "longer than the context of 2048"),
    (["--tasks=vt", "--lengths=512", "--context=512"], "too short for vt"),
    (["--tasks=qa_1", "--lengths=2048"], "squad.jsonl"), (["--init=/nowhere"], "/nowhere"),
    (["--tasks=toy-science", "--context=8"], "leaves no room"), (["--model=toys"], "did you mean"),
    (["--engine=tensorrt"], "tensorrt"), (["--context=100000"], "--context=100000"),
    (["--shards=/nowhere"], "/nowhere"), (["--texts=/nowhere", "--tasks=vt", "--lengths=2048"], "/nowhere")])
def test_bad_input(flags, said, tmp_path, exported):
    base = ["--model=toy", f"--init={exported}", f"--run={tmp_path}", "--context=4096", "--problems=1"]
    with pytest.raises(InputError) as e:
        run(*base, *flags)
    assert said in str(e.value)


@pytest.mark.parametrize("line, said", [
    ('{"id": 1, "domain": "math", "prompt": "p"}', "needs id"), ("[]", "no JSON object"), ("", "no problem"),
    ('{"id": 1, "domain": "math", "prompt": "p", "truth": "1"}\n'
     '{"id": "1", "domain": "math", "prompt": "q", "truth": "2"}', "the id '1' came before"),
    ('{"id": 1, "domain": "art", "prompt": "p", "truth": "1"}', "needs id")])
def test_bad_prompt_files(line, said, tmp_path, exported):
    (tmp_path / "p.jsonl").write_text(line and line + "\n")
    with pytest.raises(InputError, match=said):
        run("--model=toy", f"--init={exported}", f"--run={tmp_path / 'run'}",
            f"--tasks={tmp_path / 'p.jsonl'}")


def test_damaged_samples(saved, tmp_path):
    saved({})
    with open(tmp_path / "run" / "samples.jsonl") as f:
        lines = f.readlines()
    lines[3] = lines[3][:50] + "\n"
    (tmp_path / "run" / "samples.jsonl").write_text("".join(lines))
    with pytest.raises(InputError, match=r"samples.jsonl, line 4 is damaged"):
        run(*SMALL, f"--run={tmp_path / 'run'}")


def test_a_full_disk(tmp_path, exported):
    folder = tmp_path / "run"
    folder.mkdir()                                        # of other weights, and larger than the source
    (folder / "samples.jsonl").write_text(json.dumps({"key": "other", "text": "x" * 500_000}) + "\n")
    flags = (*SMALL, f"--init={exported}", f"--run={folder}")
    process = Process(tmp_path, *flags, stage="evaluate", OMP_NUM_THREADS="1", FILE_LIMIT="501000")
    assert process.wait(90) == 2
    assert "samples.jsonl could not be written" in process.text("stderr")
    made = len(texts(folder))
    assert 1 < made < 24 and run(*flags)["tasks"]["toy-math"]["problems"] == 6 and len(texts(folder)) == 25
