"""leaderboards.py: the adapter against lm-eval's own HFLM on the same checkpoints, and the leaderboards'
scores by hand. Tasks are local: YAML and JSONL, no hub."""

import json
import random
from pathlib import Path

import pytest
import yaml
from checkpoints import make
from lm_eval import tasks as library
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from test_tokenizer import SOURCE, byte_level, merges_of, write
from tokenizers import pre_tokenizers

from cli import InputError
from engines.contract import Sample
from generate import engine
from model import load, save
from suite import leaderboards
from suite.leaderboards import TASKS, Adapter, evaluate, lb_v1, lb_v2

CONTEXT = 96
HERE = Path(library.__file__).parent                                # lm-eval's own task folders


@pytest.fixture(scope="module", params=["llama", "toy-h"])
def both(request, tmp_path_factory):
    """(HFLM, our adapter) on one checkpoint: a Llama with a real BPE and a bos, or the hybrid toy without."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "llama":
        padded = make("llama-3.1-8b", str(folder), shards=1, vocab_size=710, max_position_embeddings=CONTEXT)
        padded.lm_head.weight.data[703:] = 0      # rows without a text count in the softmax; HFLM may write
        padded.save_pretrained(folder)            # them, our engine never does: here they do not win
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        write(folder, byte_level(merges_of(level.alphabet(), level), 1, 2, None), 1, 2, None)
    else:
        save(load("random:toy-h"), str(folder))
    model = load(str(folder))
    assert bool(model.tokenizer.bos_ids) == (request.param == "llama")
    theirs = HFLM(str(folder), tokenizer=str(folder), dtype="float32", device="cpu", max_length=CONTEXT)
    return theirs, Adapter(model, engine(model, context=CONTEXT, progress=False), row_tokens=256)


def ask(lm, kind, arguments):
    return getattr(lm, kind)([Instance(kind, {}, a, i) for i, a in enumerate(arguments)])


def text(n, seed):
    start = random.Random(seed).randrange(len(SOURCE) - n)
    return SOURCE[start:start + n]


# -- the adapter ---------------------------------------------------------------------------------------------

def same(ours, theirs):
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in theirs], abs=1e-4, rel=0)


def test_loglikelihoods(both):
    theirs, ours = both
    greedy = ask(theirs, "generate_until", [(text(40, i), {"max_gen_toks": 1}) for i in range(8)])
    pairs = [(text(40, i), greedy[i]) for i in range(8) if greedy[i].strip()]
    pairs += [(text(40, i), text(n, -i)) for i, n in enumerate((1, 2, 5, 9, 20, 40))]
    pairs += [("", " a word"), ("ends in spaces   ", "x y"), ("Answer:", "\n\n"), ("\u00e9", "\u5b57 z")]
    pairs += [("Which one?\nAnswer:", f" {letter}") for letter in "ABCD"]
    pairs += [(text(900, 3), end) for end in (" no", " yes, it does", text(60, 4))]     # cut on the left
    pairs += [("x", text(4000, 5)[:CONTEXT // 2]), (text(30, 0), text(9, 1)), (text(30, 0), text(9, 1))]
    answers = ask(ours, "loglikelihood", pairs)
    same(answers, ask(theirs, "loglikelihood", pairs))
    assert {False, True} == {greedy for _, greedy in answers}
    alone = Adapter(ours.model, ours.engine, row_tokens=1)              # a row each: packing changes nothing
    same(ask(alone, "loglikelihood", pairs), answers)


def test_choices_of_one_letter_are_read_once(both, monkeypatch):
    _, ours = both
    read, forward = [], ours.model.forward
    monkeypatch.setattr(ours.model, "forward", lambda tokens, *args: (read.append(tokens.numel()),
                                                                      forward(tokens, *args))[1])
    tokens = len(ours.tok_encode("Which one?\nAnswer:"))
    ask(ours, "loglikelihood", [("Which one?\nAnswer:", letter) for letter in "\n!?."])
    assert read == [tokens]


def test_continuation_longer_than_the_context(both):
    with pytest.raises(InputError, match=f"--context={CONTEXT}"):
        ask(both[1], "loglikelihood", [("x", text(2000, 0))])


def test_rolling(both):
    theirs, ours = both
    texts = [(text(n, n),) for n in (1, 30, 400, 1500)] + [("",)]
    answers = ask(ours, "loglikelihood_rolling", texts)
    assert answers == pytest.approx(ask(theirs, "loglikelihood_rolling", texts), abs=1e-3, rel=1e-6)
    assert answers[2] < answers[1] < 0


def test_generate_until(both):
    theirs, ours = both
    prompts = [text(n, n) for n in (20, 50, 90)] + [text(900, 7)] * 2   # the last are cut, and are one prompt
    free = {"until": [], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}
    answers = ask(ours, "generate_until", [(p, free) for p in prompts])
    assert answers == ask(theirs, "generate_until", [(p, free) for p in prompts])
    assert all(len(a) >= 6 for a in answers)
    halves = [(p, free | {"until": [a[len(a) // 2:][:3], "never said"]}) for p, a in      # inside the text
              zip(prompts, answers, strict=True)]
    stopped = ask(ours, "generate_until", halves)
    assert stopped == ask(theirs, "generate_until", halves)
    assert all(a.startswith(s) and len(s) < len(a) for s, a in zip(stopped, answers, strict=True))
    short = [(p, {"until": "never said", "max_gen_toks": 3}) for p in prompts]
    cut = ask(ours, "generate_until", short)
    assert cut == ask(theirs, "generate_until", short)
    for c, a in zip(cut[:3], answers[:3], strict=True):                 # of the last, less has been cut
        assert len(c) < len(a) and a.startswith(c.rstrip("\ufffd"))


def test_sampling(both):
    _, ours = both
    how = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "max_gen_toks": 12}
    a, b = ask(ours, "generate_until", [("x = ", how)] * 2)
    assert a != b and [a, b] == ask(ours, "generate_until", [("x = ", how)] * 2)


@pytest.mark.parametrize("how, says", [({"max_gen_toks": CONTEXT}, "--context=96"),
                                       ({"num_beams": 4}, "unknown: num_beams")])
def test_generation_settings_refused(both, how, says):
    with pytest.raises(InputError, match=says):
        ask(both[1], "generate_until", [("x", how)])


# -- whole tasks ---------------------------------------------------------------------------------------------

def folder_of_tasks(folder, answers):
    """Two tasks over local data: choices of several lengths, and texts to write."""
    folder.mkdir()
    data = {"choices": [{"question": text(60, i), "gold": i % 3,
                         "choices": [text(n, i * n) for n in (3, 8, 20)]} for i in range(9)],
            "writing": [{"question": q, "gold": a} for q, a in answers]}
    metrics = {"choices": ["acc", "acc_norm"], "writing": ["exact_match"]}
    more = {"choices": dict(output_type="multiple_choice", doc_to_text="{{question}}\nAnswer:",
                            doc_to_choice="{{choices}}", doc_to_target="gold", fewshot_split="test",
                            num_fewshot=2),
            "writing": dict(output_type="generate_until", doc_to_text="{{question}}",
                            doc_to_target="{{gold}}",
                            generation_kwargs=dict(until=["\n"], max_gen_toks=12, do_sample=False))}
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = dict(task=f"local_{name}", dataset_path="json", test_split="test", metadata=dict(version=1),
                    dataset_kwargs=dict(data_files=dict(test=str(folder / f"{name}.jsonl"))),
                    metric_list=[dict(metric=m) for m in metrics[name]]) | more[name]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    return library.TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture
def local(both, tmp_path, monkeypatch):
    """(HFLM, adapter, task manager): half of the texts to write are what the model writes."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    asked = [text(50, 100 + i) for i in range(6)]
    made = ask(both[1], "generate_until", [(q, {"until": ["\n"], "max_gen_toks": 12}) for q in asked])
    made = [a if i % 2 else "something else" for i, a in enumerate(made)]
    return *both, folder_of_tasks(tmp_path / "tasks", zip(asked, made, strict=True))


NAMES = ["local_choices", "local_writing"]


def numbers(found):
    return {(task, key): value for task, row in found["results"].items() for key, value in row.items()
            if isinstance(value, float)}


def test_metrics_are_those_of_hflm(local):
    theirs, ours, manager = local
    found = numbers(evaluate(ours, NAMES, task_manager=manager))
    assert found == pytest.approx(numbers(evaluate(theirs, NAMES, task_manager=manager)), rel=1e-5)
    assert found["local_writing", "exact_match,none"] == 0.5 and len(found) >= 3


@pytest.mark.parametrize("both", ["llama"], indirect=True)
def test_resume(local, tmp_path, monkeypatch):
    _, ours, manager = local
    file, calls = str(tmp_path / "answers"), []
    generate = ours.engine.generate

    def killed(prompts, on_sample=None, **more):
        def after_two(i, j, sample):
            on_sample(i, j, sample)
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(i)
        return generate(prompts, on_sample=after_two, **more)

    monkeypatch.setattr(ours.engine, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(ours, NAMES, use_cache=file, task_manager=manager)
    asked = []
    monkeypatch.setattr(ours.engine, "generate", lambda prompts, **more: (
        asked.append(len(prompts)), generate(prompts, **more))[1])
    first = evaluate(ours, NAMES, use_cache=file, task_manager=manager)
    assert asked == [3]                                                 # of six, three had been answered
    monkeypatch.setattr(ours.model, "forward", None)
    monkeypatch.setattr(ours.engine, "generate", None)
    assert numbers(evaluate(ours, NAMES, use_cache=file, task_manager=manager)) == numbers(first)


def test_a_board_through_evaluate(tmp_path, exported, monkeypatch):
    """evaluate.py --tasks=lb-v1, of tasks that are at hand: the harness's figures, in percent of one."""
    import evaluate as stage
    from cli import parse
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    manager = folder_of_tasks(tmp_path / "tasks", [(text(20, i), "x") for i in range(3)])
    monkeypatch.setattr(leaderboards, "TaskManager", lambda: manager)
    monkeypatch.setitem(leaderboards.TASKS, "lb_v1", {"local_choices": 2, "local_writing": None})
    table = {"local_choices": leaderboards.Benchmark(["acc,none"], {"local_choices": 0.25}),
             "local_writing": leaderboards.Benchmark(["exact_match,none"], {"local_writing": 0})}
    monkeypatch.setattr(leaderboards, "LB_V1", table)
    flags = ["--model=toy", f"--init={exported}", "--tasks=lb-v1", "--context=512",
             f"--run={tmp_path / 'run'}"]
    found = stage.main(parse(stage.Config, flags, stage.recipe))["leaderboards"]["lb-v1"]
    model = load(str(exported))
    adapter = Adapter(model, engine(model, context=512, progress=False))
    results = evaluate(adapter, leaderboards.TASKS["lb_v1"], task_manager=manager)["results"]
    acc, error = (results["local_choices"][f"acc{e},none"] for e in ("", "_stderr"))
    score = max(0, acc - 0.25) / 0.75
    half = 1.96 * error / 0.75
    assert found["local_choices"] == pytest.approx(dict(score=score, low=max(0, score - half),
                                                        high=min(1, score + half)), abs=1e-4)
    assert found["mean"]["score"] == pytest.approx(score / 2)
    assert "lb-v1 mean" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("both", ["llama"], indirect=True)
def test_shuffles_do_not_depend_on_what_else_runs(local, tmp_path, monkeypatch):
    """GPQA's task shuffles its choices by the global RNG while it loads; datasets keeps what it made."""
    _, ours, _ = local
    folder, asked = tmp_path / "tasks", []
    (folder / "shuffle.py").write_text(
        "import random\n\ndef docs(data):\n    def one(doc):\n        order = list('0123456789')\n"
        "        random.shuffle(order)\n        return {'question': ''.join(order)}\n"
        "    return data.map(one)\n")
    spec = yaml.safe_load((folder / "writing.yaml").read_text())
    body = yaml.safe_dump(spec | dict(task="shuffled")) + "process_docs: !function shuffle.docs\n"
    (folder / "shuffled.yaml").write_text(body)
    manager = library.TaskManager(include_path=str(folder), include_defaults=False)

    def record(prompts, on_sample, **more):
        asked.append([ours.model.tokenizer.decode(ids[1:]) for ids in prompts])
        for i in range(len(prompts)):
            on_sample(i, 0, Sample([], [], "stop", ""))

    monkeypatch.setattr(ours.engine, "generate", record)
    random.seed(7)
    evaluate(ours, ["local_choices", "shuffled"], task_manager=manager)
    evaluate(ours, ["shuffled"], task_manager=manager)
    rng, orders = random.Random(0), [list("0123456789") for _ in range(6)]
    for order in orders:
        rng.shuffle(order)
    assert asked == [["".join(order) for order in orders]] * 2


def test_refusals(both):
    manager = library.TaskManager(include_path=str(HERE / "arc"), include_defaults=False)
    with pytest.raises(InputError, match="did you mean 'arc_challenge'"):
        evaluate(both[1], ["arc_chalenge"], task_manager=manager)
    with pytest.raises(InputError, match="arc_challenge has no data .*HF_HUB_OFFLINE=1"):
        evaluate(both[1], ["arc_challenge"], task_manager=manager)


# -- the leaderboards ----------------------------------------------------------------------------------------

@pytest.fixture
def configs(monkeypatch):
    """Loads names as lm-eval does, up to the data: {task: its config}."""
    folders = ["arc", "hellaswag", "truthfulqa", "mmlu/default", "winogrande", "gsm8k", "leaderboard"]
    manager = library.TaskManager(include_path=[*(str(HERE / f) for f in folders), str(HERE / "benchmarks")],
                                  include_defaults=False)

    class Recorded(library._factory.Task):
        def __init__(self, config):
            self.spec = config

        task_name = property(lambda self: self.spec["task"])

    Recorded.__abstractmethods__ = frozenset()
    monkeypatch.setattr(library._factory, "ConfigurableTask", Recorded)
    return lambda names: {name: task.spec for name, task in manager.load(names)["tasks"].items()}


def test_lb_v1_is_openllm(configs):
    ours, group = configs(list(TASKS["lb_v1"])), configs(["openllm"])
    assert len(ours) == 57 + 5 and leaderboards.LB_V1.keys() == TASKS["lb_v1"].keys()
    assert group["mmlu"]["dataset_name"] == "world_religions"       # if this fails, `openllm` is mended
    for name, shots in TASKS["lb_v1"].items():
        named = {"truthfulqa_mc2": "truthfulqa"}.get(name, name)    # the group renames these, too
        assert group[named]["num_fewshot"] == shots
        assert group[named].get("fewshot_split", "train") == "train" or name == "mmlu"
        spec = ours["mmlu_world_religions" if name == "mmlu" else name]
        assert [spec.get(k) for k in ("dataset_path", "doc_to_text", "doc_to_choice", "metric_list")] == \
            [group[named].get(k) for k in ("dataset_path", "doc_to_text", "doc_to_choice", "metric_list")]
        if name in ("arc_challenge", "hellaswag", "winogrande"):    # examples come from the training split
            assert spec.get("fewshot_split") is None and spec["training_split"] == "train"
    for name, benchmark in leaderboards.LB_V1.items():
        spec = ours["mmlu_world_religions" if name == "mmlu" else name]
        assert benchmark.metrics[0].split(",")[0] in {m["metric"] for m in spec["metric_list"]}
    assert "strict-match" in {f["name"] for f in ours["gsm8k"]["filter_list"]}


def test_lb_v2_is_leaderboard(configs):
    ours, group = configs(list(TASKS["lb_v2"])), configs(["leaderboard"])
    rows = {row for benchmark in leaderboards.LB_V2.values() for row in benchmark.guesses}
    assert ours.keys() == group.keys() and rows - ours.keys() == {"leaderboard_gpqa"}     # which is of these:
    assert ours.keys() - rows == {f"leaderboard_gpqa_{part}" for part in ("diamond", "extended", "main")}
    rows = leaderboards.LB_V2["bbh"].guesses
    assert len(rows) == 24 and rows == {row: 1 / len(group[row]["doc_to_choice"]) for row in rows}
    for metrics, rows in leaderboards.LB_V2.values():
        for row in rows:
            given = {m["metric"] for m in group[row.replace("_gpqa", "_gpqa_main")]["metric_list"]}
            assert {m.removesuffix(",none") for m in metrics} <= given


def v1_results():
    return {"arc_challenge": {"acc,none": 0.1, "acc_norm,none": 0.6, "acc_norm_stderr,none": 0.01},
            "hellaswag": {"acc,none": 0.2, "acc_norm,none": 0.8, "acc_norm_stderr,none": 0.02},
            "truthfulqa_mc2": {"acc,none": 0.45, "acc_stderr,none": 0.02},
            "mmlu": {"acc,none": 0.65, "acc_stderr,none": 0.0},
            "winogrande": {"acc,none": 0.75, "acc_stderr,none": 0.0},
            "gsm8k": {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.9,
                      "exact_match_stderr,strict-match": 0.04}}


def test_lb_v1():
    got = lb_v1(v1_results())
    assert got.pop("stderr") == pytest.approx(dict(arc_challenge=1, hellaswag=2, truthfulqa_mc2=2, mmlu=0,
                                                   winogrande=0, gsm8k=4, mean=5 / 6))  # sqrt(1+4+4+16) / 6
    assert got == pytest.approx(dict(arc_challenge=60, hellaswag=80, truthfulqa_mc2=45, mmlu=65,
                                     winogrande=75, gsm8k=50, mean=62.5))


def v2_results():
    """Every subtask at its guess, then some moved."""
    results = {"leaderboard_bbh": {"acc_norm,none": 0.99}, "leaderboard_musr": {"acc_norm,none": 0.99}}
    for metrics, rows in leaderboards.LB_V2.values():
        for row, guess in rows.items():
            results[row] = {m: guess for m in metrics} | {
                m.replace(",", "_stderr,"): 0.0 for m in metrics if "inst" not in m}
    results["leaderboard_ifeval"] |= {"prompt_level_strict_acc,none": 0.3, "inst_level_strict_acc,none": 0.5,
                                      "prompt_level_strict_acc_stderr,none": 0.02,
                                      "inst_level_strict_acc_stderr,none": "N/A"}
    results["leaderboard_bbh_boolean_expressions"]["acc_norm,none"] = 0.8             # 60 of 100
    results["leaderboard_bbh_object_counting"]["acc_norm,none"] = 10 / 19             # 50
    results["leaderboard_bbh_snarks"]["acc_norm,none"] = 0.1                          # below the guess: 0
    results["leaderboard_math_algebra_hard"]["exact_match,none"] = 0.14
    results["leaderboard_gpqa"] = {"acc_norm,none": 0.31, "acc_norm_stderr,none": 0.015}           # 8, 2
    results["leaderboard_musr_murder_mysteries"]["acc_norm,none"] = 0.75              # 50
    results["leaderboard_musr_object_placements"]["acc_norm,none"] = 0.28             # 10
    results["leaderboard_musr_team_allocation"]["acc_norm,none"] = 0.6                # 40
    results["leaderboard_mmlu_pro"] |= {"acc,none": 0.37, "acc_stderr,none": 0.009}   # 30, 1
    return results


def test_lb_v2():
    got = lb_v2(v2_results())
    stderr = got.pop("stderr")
    assert got == pytest.approx(dict(ifeval=40, bbh=110 / 24, math=2, gpqa=8, musr=100 / 3, mmlu_pro=30,
                                     mean=(40 + 110 / 24 + 2 + 8 + 100 / 3 + 30) / 6))
    assert stderr == pytest.approx(dict(ifeval=2, bbh=0, math=0, gpqa=2, musr=0, mmlu_pro=1,
                                        mean=(4 + 4 + 1) ** 0.5 / 6))
    results = v2_results()
    del results["leaderboard_musr_team_allocation"]["acc_norm_stderr,none"]
    assert lb_v2(results)["stderr"]["musr"] is None is lb_v2(results)["stderr"]["mean"]


def test_missing_results_are_named():
    results = v2_results()
    del results["leaderboard_bbh_navigate"], results["leaderboard_mmlu_pro"]["acc,none"]
    with pytest.raises(InputError, match=r"2 results .*bbh_navigate \(acc_norm,none\), leaderboard_mmlu_pro"):
        lb_v2(results)
