"""The prompts of RL: every set's rows as published, and damaged; grams against brute force; mixes by hand."""

import errno
import itertools
import json
import os
import re
import shutil
from collections import Counter
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data
from cli import InputError
from corpus import overlap, prompts, shards
from corpus.formats import Drop
from corpus.hashes import shuffle_key
from corpus.tokenizer import Tokenizer, toy_tokenizer


def dumps(value):
    return json.dumps(value)


def stdio(*pairs):
    return {"kind": "stdio", "fn_name": None, "tests": [{"input": a, "output": b} for a, b in pairs],
            "checker": "decimal", "time_limit_s": 6, "memory_limit_mb": 1024}


def function(name, *pairs):
    return stdio(*pairs) | {"kind": "function", "fn_name": name, "checker": "json"}


def skywork(truth, ability="math", question="How many?", **more):
    return {"data_source": "train-x", "prompt": [{"content": question, "role": "user"}], "ability": ability,
            "reward_model": {"ground_truth": truth, "style": "rule"}, "extra_info": {"index": 0}, **more}


def intellect(info, **more):
    return {"problem_id": "p", "task_type": "verifiable_math", "prompt": "How many?",
            "verification_info": info, "metadata": "{}", "solve_rate_qwen_r1_distill_7b": 0.5, **more}


def nemotron(question, answer, system=""):
    said = [{"role": "system", "content": system, "tool_calls": []}] if system is not None else []
    return {"uuid": "u", "messages": said + [{"role": "user", "content": question, "tool_calls": []},
                                             {"role": "assistant", "content": answer, "tool_calls": []}]}


def opencode(tests, score="1", question="Write f."):
    return {"id": "i", "input": question, "output": "code", "unit_tests": tests, "average_test_score": score}


def typed(kind, *tests, name=None):
    return dumps([{"type": kind, "fn_name": name, "input": a, "output": b} for a, b in tests])


P = {"problem": "P"}
QUESTION = "Which is a noble gas?\n\nA) iron\nB) neon\nC) gold\nD) air"
HARNESS = "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([-1]) == -1\n"
LEETCODE = {"import_prefix": "import math", "test_code": HARNESS, "entry_point": "Solution().addAll",
            "inputs": None, "outputs": None, "fn_name": None, "assert_case": None}
NOT_USED = dict.fromkeys(("import_prefix", "test_code", "entry_point", "assert_case"))


# -- rows to records ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, row, truth", [
    ("deepscaler", {"problem": "1+1?", "answer": "2", "solution": ""}, "2"),
    ("deepscaler", {"problem": "1+1?", "answer": " $\\boxed{\\frac{1}{2}}$ "}, "\\frac{1}{2}"),
    ("intellect2", intellect(dumps({"ground_truth": "\\sqrt{2}"})), "\\sqrt{2}"),
    ("intellect2", intellect(dumps(dumps({"ground_truth": "7"}))), "7"),
    ("skywork-math", skywork('["3"]'), "3"),
    ("skywork-math", skywork("['\\\\pi']"), "\\pi"),                         # a Python literal
    ("skywork-math", skywork('["3", " 3"]'), "3"),
    ("skywork-code", skywork(dumps({"inputs": ["1\n", "2\n"], "outputs": ["1\n", "4\n"], "fn_name": None,
                                    **NOT_USED}), "code"), stdio(("1\n", "1\n"), ("2\n", "4\n"))),
    ("skywork-code", skywork(dumps({"inputs": [[1, 2], [3, 4]], "outputs": [3, 7], "fn_name": "add"})),
     function("add", ([1, 2], 3), ([3, 4], 7))),
    ("skywork-code", skywork(dumps(LEETCODE)), function("addAll", ([[1, 2]], 3), ([[-1]], -1))),
    ("skywork-code", skywork(dumps({"assert_case": ["assert f(1) == 2", "assert f(2) == {'a': (1, None)}"]})),
     function("f", ([1], 2), ([2], {"a": [1, None]}))),
    ("deepcoder-taco", {**P, "tests": dumps({"inputs": ["1"], "outputs": ["2"]})},
     stdio(("1", "2"))),
    ("deepcoder-taco", {**P, "tests": dumps({"inputs": [["3", "1 2 3"]], "outputs": [["6"]]})},
     stdio(("3\n1 2 3", "6"))),                                              # lists of lines
    ("deepcoder-taco", {**P, "tests": dumps(dumps({"inputs": [[1], [2]], "outputs": [[1], [4]],
                                                              "fn_name": "sq"}))},
     function("sq", ([1], 1), ([2], 4))),                                    # outputs wrapped in lists
    ("deepcoder-taco", {**P, "tests": dumps({"inputs": [[1], [2]], "outputs": [[1], [4, 4]],
                                                        "fn_name": "sq"})},
     function("sq", ([1], [1]), ([2], [4, 4]))),                             # outputs that are lists
    ("deepcoder-primeintellect", {**P, "tests": typed("stdin_stdout", ("1", "2"), ("3", "4"))},
     stdio(("1", "2"), ("3", "4"))),
    ("deepcoder-primeintellect", {**P, "tests": typed("function_call", ([["a"], 2], "aa"), name="f")},
     function("f", ([["a"], 2], "aa"))),
    ("deepcoder-primeintellect", {**P, "tests": typed("function_call", ('[1, 2]\n"a"', "[3]"),
                                                                 name="f")},
     function("f", ([[1, 2], "a"], [3]))),                                   # a JSON value a line
    ("opencodeinstruct", opencode(dumps(["\nassert f(1, 'a') == [1]\n", "assert f(-2.5, []) == (1, 2)"])),
     function("f", ([1, "a"], [1]), ([-2.5, []], [1, 2]))),
    ("opencodeinstruct", opencode(dumps(["assert f() == None\nassert f('\\d') == True"]), 1.0),
     function("f", ([], None), (["\\d"], True))),
    ("nemotron-stem", nemotron(QUESTION, "<think>\\boxed{A}?</think> It is \\boxed{B}."), "B"),
    ("nemotron-stem", nemotron(QUESTION, "x \\boxed{A}, no: \\boxed{\\text{(C)}}", None), "C"),
    ("nemotron-stem", nemotron("Pick: (A) one (B) two", "\\boxed{ B. }"), "B"),
    ("nemotron-stem", nemotron("Pick.\nA: one\nB: two", "\\boxed{A}"), "A"),
    ("nemotron-stem", nemotron("Pick.\nA. one\nB. two\nC. three", "\\boxed{C}"), "C"),
])
def test_rows_as_published(name, row, truth):
    record = prompts.RL[name].read(row)
    asked = row.get("problem") or row.get("input") or row.get("prompt") or row["messages"][-2]["content"]
    asked = asked if isinstance(asked, str) else asked[0]["content"]
    domain = {"deep": "code", "open": "code", "nemo": "science"}.get(name[:4], "math")
    domain = {"deepscaler": "math", "skywork-code": "code"}.get(name, domain)
    assert record == {"domain": domain, "prompt": asked, "truth": truth}


@pytest.mark.parametrize("name, row, why", [
    ("deepscaler", {"problem": "1+1?", "answer": ""}, "answer is empty"),
    ("deepscaler", {"problem": "1+1?", "answer": "$\\boxed{ }$"}, "answer is empty"),
    ("deepscaler", {"problem": "1+1?", "answer": 2}, "answer is not text"),
    ("deepscaler", {"problem": "1+1?", "answer": "\\boxed{1}, \\boxed{2}"}, "answer is of several boxes"),
    ("deepscaler", {"answer": "2"}, "problem is null"),
    ("deepscaler", {"problem": "\ud800", "answer": "2"}, "prompt is no Unicode text"),
    ("intellect2", intellect("{}", task_type="prime_rl_code"), "not math"),
    ("intellect2", intellect(None), "verification_info is null"),
    ("intellect2", intellect('{"ground_truth": "4'), "verification_info is no JSON"),
    ("intellect2", intellect("[1]"), "ground_truth is null"),
    ("intellect2", intellect('{"ground_truth": null}'), "ground_truth is null"),
    ("intellect2", intellect("3"), "verification_info is no JSON"),
    ("skywork-math", skywork('["3", "4"]'), "several answers"),
    ("skywork-math", skywork("[]"), "answer is empty"),
    ("skywork-math", skywork("[3]"), "answers are no list of texts"),
    ("skywork-math", skywork('{"a": 1}'), "answers are no list of texts"),
    ("skywork-math", skywork(None), "ground_truth is null"),
    ("skywork-math", skywork('["3"]', reward_model=None), "ground_truth is null"),
    ("skywork-math", skywork('["3"]', prompt=None), "prompt is no single question"),
    ("skywork-math", skywork('["3"]', prompt=[{"role": "user", "content": None}]), "question is null"),
    ("skywork-math", skywork('["3"]', prompt=[{"role": "user", "content": "a"}] * 2),
     "prompt is no single question"),
    ("skywork-code", skywork(dumps(dict.fromkeys(("inputs", "outputs", "test_code")))), "no tests"),
    ("skywork-code", skywork("[1]"), "no tests"),
    ("skywork-code", skywork(dumps(LEETCODE | {"test_code": HARNESS.replace("[1, 2]", "nums = [1, 2]")})),
     "tests are no plain calls"),
    ("skywork-code", skywork(dumps(LEETCODE | {"entry_point": None})), "no function name"),
    ("skywork-code", skywork(dumps(LEETCODE | {"test_code": 5})), "tests are no list of texts"),
    ("skywork-code", skywork(dumps({"assert_case": "assert f(1) == 2"})), "tests are no list of texts"),
    ("skywork-code", skywork(dumps({"inputs": ["1"], "outputs": ["1", "2"]})),
     "inputs and outputs do not pair"),
    ("skywork-code", skywork(dumps({"inputs": "1", "outputs": "1"})), "inputs and outputs do not pair"),
    ("skywork-code", skywork(dumps({"inputs": [1], "outputs": ["1"]})), "stdin or stdout is no text"),
    ("skywork-code", skywork(dumps({"inputs": [1], "outputs": [1], "fn_name": "f"})),
     "inputs are no arguments"),
    ("skywork-code", skywork(dumps({"inputs": [[1]], "outputs": [1], "fn_name": "f(x)"})),
     "no function name"),
    ("deepcoder-taco", {**P, "tests": None}, "tests is null"),
    ("deepcoder-taco", {**P, "tests": "[" * 100_000}, "tests is no JSON"),
    ("deepcoder-taco", {**P, "tests": '{"inputs": [], "outputs": []}'}, "no tests"),
    ("deepcoder-taco", {**P, "tests": "[]"}, "no tests"),
    ("deepcoder-taco", {**P, "tests": '{"inputs": [[NaN]], "outputs": [1], "fn_name": "f"}'},
     "tests do not fit JSON"),
    ("deepcoder-taco", {**P, "tests": '{"inputs": ["\\ud800"], "outputs": ["1"]}'},
     "tests do not fit JSON"),
    ("deepcoder-taco", {**P, "tests": dumps({"inputs": ["1" * (1 << 20)], "outputs": ["1"]})},
     "tests too large"),
    ("deepcoder-primeintellect", {**P, "tests": '["1", "2"]'}, "tests are no list of input and output"),
    ("deepcoder-primeintellect", {**P, "tests": typed("functional", ("1", "2"))},
     "tests of several or unknown kinds"),
    ("deepcoder-primeintellect", {**P, "tests": typed(["x"], ("1", "2"))},
     "tests of several or unknown kinds"),
    ("deepcoder-primeintellect",
     {**P, "tests": typed("stdin_stdout", ("1", "2"))[:-1] + ", " + typed(
         "function_call", ([1], 2), name="f")[1:]}, "tests of several or unknown kinds"),
    ("deepcoder-primeintellect", {**P, "tests": typed("function_call", ([1], 2))}, "no function name"),
    ("deepcoder-primeintellect", {**P, "tests": typed("function_call", ("1 2", "3"), name="f")},
     "inputs are no JSON lines"),
    ("deepcoder-primeintellect", {**P, "tests": typed("function_call", ("1", "3"), ([1], 3), name="f")},
     "inputs are no JSON lines"),
    ("opencodeinstruct", opencode('["assert f(1) == 2"]', "0.9"), "its own solution fails a test"),
    ("opencodeinstruct", opencode('["assert f(1) == 2"]', None), "average_test_score is no number"),
    ("opencodeinstruct", opencode('"assert f(1) == 2"'), "unit_tests is no JSON"),
    ("opencodeinstruct", opencode("[]"), "no tests"),
    *(("opencodeinstruct", opencode(dumps([test])), "tests are no plain calls") for test in (
        "assert f(x=1) == 2", "assert f(x) == 2", "assert f(1) == g(2)", "assert f(1)", "assert not f(1)",
        "assert f(1) != 2", "assert 2 == f(1)", "assert f(1) == 2 == 2", "assert f(*[1]) == 2", "f(1) == 2",
        "assert a.f(1) == 2", "assert f(1)(2) == 2", "import os\nassert f(1) == 2", "assert f(1) == ", "x\0",
        "while f(1) == 2: pass", "def check(candidate): assert candidate(1) == 2\nassert f(1) == 2",
        "assert __import__('os').system('touch /tmp/no') == 0", "assert f([{[]: 1}]) == 1")),
    *(("opencodeinstruct", opencode(dumps([test])), "tests do not fit JSON") for test in (
        "assert f({1: 2}) == 3", "assert f(1) == {1, 2}", "assert f(1) == 1e999", "assert f((1, 2)) == 3",
        "assert f([(1, 2)]) == 3", "assert f(b'a') == 1", "assert f(1) == 1j", "assert f(1) == ...",
        "assert f(0x" + "f" * 5000 + ") == 1")),
    ("opencodeinstruct", opencode(dumps(["assert f(1) == 2", "assert g(1) == 2"])),
     "tests call several functions"),
    ("nemotron-stem", nemotron(QUESTION, "It is B."), "answer is no boxed letter"),
    ("nemotron-stem", nemotron(QUESTION, "\\boxed{B} or \\boxed{neon}"), "answer is no boxed letter"),
    ("nemotron-stem", nemotron(QUESTION, "<think>\\boxed{B}</think> B"), "answer is no boxed letter"),
    ("nemotron-stem", nemotron(QUESTION, "\\boxed{E}"), "answer is none of the options"),
    ("nemotron-stem", nemotron("Pick.\nA) one\nC) two", "\\boxed{A}"), "no lettered options"),
    ("nemotron-stem", nemotron("Let f(A) = 1, f(B) = 2. Who was A. Einstein?", "\\boxed{A}"),
     "no lettered options"),
    ("nemotron-stem", {"messages": None}, "messages is no conversation"),
    ("nemotron-stem", {"messages": nemotron(QUESTION, "\\boxed{B}")["messages"] * 2},
     "not one question and one answer"),
])
def test_rows_that_are_dropped(name, row, why):
    with pytest.raises(Drop, match=f"^{re.escape(why)}$"):
        prompts.RL[name].read(row)


def test_no_test_is_run(tmp_path):
    mark = tmp_path / "mark"
    with pytest.raises(Drop):
        prompts.RL["opencodeinstruct"].read(opencode(dumps([f"assert open('{mark}', 'w').write('x') == 1"])))
    assert not mark.exists()


@pytest.mark.parametrize("prompt", [
    "How many?", "How many? Let's think step by step and output the final answer within \\boxed{}.",
    "Solve this. The last line: 'the answer is $\\boxed{ANSWER}$'.\n\nHow many?",
    "How many?\n\nPlease put your answer in \\boxed{}.\n\n(\\boxed{} only)",
])
def test_instructions_are_taken_off(prompt):
    assert prompts.without_instruction(prompt) == "How many?"


@pytest.mark.parametrize("prompt", [
    "What does \\boxed do?", "Please use \\boxed{}", "Please sum 1 and 2.",
    "Write a loop.\n\n\n    a\n  \n    b",
    "Give the sum of 1 and 2 in \\boxed{}.", "We know. Let x be \\boxed{1}.",
    "What would Let's make of \\boxed{1}?"])
def test_other_prompts_are_left_alone(prompt):
    assert prompts.without_instruction(prompt) == prompt


# -- grams -------------------------------------------------------------------------------------------------

def brute(text, n=13):
    """The n-grams as tuples of words."""
    words = [w for w in re.split(r"[\W_]+", text.lower()) if w]
    n = min(n, len(words))
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)} if n >= 5 else set()


def sentences(rng, count, words=2):
    return [rng.choice(" .-").join(rng.choice("aBcDéF"[:words]) for _ in range(rng.randrange(1, 30)))
            for _ in range(count)]


@pytest.mark.parametrize("n", [1, 5, 13])
def test_grams_against_brute_force(n):
    texts = sentences(Random(n), 400) + sentences(Random(n), 400, 6)
    ours, theirs = [overlap.grams(t, n) for t in texts], [brute(t, n) for t in texts]
    assert [len(g) for g in ours] == [len(g) for g in theirs]
    for i, j in itertools.combinations(range(0, 800, 5), 2):
        assert len(ours[i] & ours[j]) == len(theirs[i] & theirs[j])
    assert all(0 <= g < 2 ** 64 for found in ours for g in found)


def test_contaminated_against_brute_force():
    rng = Random(1)
    benchmarks = {"x": sentences(rng, 15) + ["one two three four five", "four word text here"],
                  "a": sentences(rng, 15)}
    index, counts = overlap.index_of(benchmarks)
    known = {}
    for name, texts in benchmarks.items():
        found = Counter(g for t in {tuple(re.findall(r"[^\W_]+", t.lower())) for t in texts}
                        for g in brute(" ".join(t)))
        known[name] = {g for g, k in found.items() if k < 3}
        assert counts[name]["grams"] == len(known[name])
        assert counts[name]["phrases left out"] == len(found) - len(known[name])
    tried = Counter()
    both = [f"{x} {a}" for x, a in zip(*benchmarks.values(), strict=False)]
    for prompt in [*sentences(rng, 2000), *benchmarks["x"], *both, "One, two: THREE_four five?",
                   "one two three four five six", "four word text here"]:
        names = sorted(name for name in known if brute(prompt) & known[name])
        assert overlap.contaminated(prompt, index) == (bool(names), names[0] if names else "")
        tried[len(names)] += 1
    assert min(tried[0], tried[1]) > 100 and tried[2] >= 3


def test_a_phrase_of_three_problems_is_no_contamination():
    phrase = "the first line contains a single integer t the number of test cases in the file"
    three = [f"{phrase} {noun} {' '.join(noun + str(i) for i in range(13))}" for noun in ("cat", "dog", "ox")]
    index, _ = overlap.index_of({"x": three})
    assert overlap.contaminated("Here " + phrase, index) == (False, "")
    assert all(overlap.contaminated(t, index)[0] for t in three)
    assert overlap.contaminated("Here " + phrase, overlap.index_of({"x": three[:2]})[0]) == (True, "x")
    assert overlap.contaminated("Here " + phrase, overlap.index_of({"x": three[:2] * 5})[0]) == (True, "x")


# -- benchmark problems in the training data ---------------------------------------------------------------

def words_of(text):
    return re.findall(r"[^\W_]+", text.lower())


def planted(folder, tokenizer, sources, shard_tokens=1 << 28):
    for name, splits in sources.items():
        shards.write_source(str(folder), name, splits, tokenizer, shard_tokens)
    return str(folder)


@pytest.fixture(scope="module")
def toy():
    return toy_tokenizer()


@pytest.fixture
def small(monkeypatch):
    """Pieces and batches of a few documents."""
    monkeypatch.setattr(overlap, "PIECE", 300)
    monkeypatch.setattr(overlap, "BATCH", 100)


@pytest.mark.parametrize("bos", [None, "<|free_a|>"])
def test_seen_in_training_against_brute_force(tmp_path, toy, small, bos):
    rng = Random(2)
    documents = {name: sentences(rng, count) for name, count in (("b", 150), ("a", 20), ("c", 150))}
    texts = dict(enumerate(sentences(rng, 60) + sentences(rng, 5, 6)))
    tokenizer = Tokenizer(toy.files, eos="<|end|>", bos=bos) if bos else toy
    folder = planted(tmp_path, tokenizer, {
        name: {"train": some, "heldout": list(texts.values())} for name, some in documents.items()}, 1000)
    assert len(shards.Source(folder, "b").splits["train"]) > 2
    share = Counter(g for t in {tuple(words_of(t)) for t in texts.values()} for g in brute(" ".join(t)))
    inside = {name: {tuple(words[i:i + n]) for words in map(words_of, some) for n in range(5, 14)
                     for i in range(len(words) - n + 1)} for name, some in sorted(documents.items())}
    want, none = {}, []
    for i, text in texts.items():
        mine = {g for g in brute(text) if share[g] < 3}
        there = {name: mine & grams for name, grams in inside.items()}
        if any(there.values()):
            want[i] = {"source": next(name for name, g in there.items() if g),
                       "grams": len(set().union(*there.values())), "of": len(mine)}
        none += [i] * (not mine)
    assert overlap.seen_in_training(texts, folder, tokenizer, 1) == (want, none)
    assert len({w["source"] for w in want.values()}) == 3 and min(len(want), len(none)) > 5
    assert any(w["grams"] < w["of"] for w in want.values()) and len(want) + len(none) < len(texts) - 10
    assert any(5 <= len(words_of(texts[i])) < 13 for i in want)


def test_where_a_problem_can_stand(tmp_path, toy, small):
    names = ("start", "end", "last", "first", "spelled", "whole", "short", "mid", "heldout", "apart",
             "shards", "bare", "prose")
    texts = {name: " ".join(f"{name}{i}" for i in range(5 if name in ("short", "whole") else 13))
             for name in names}
    texts["prose"] = texts["prose"].replace("prose6", "end")                 # of <|end|>, the separator's
    half = {name: (" ".join(t.split()[:7]), " ".join(t.split()[7:])) for name, t in texts.items()}
    filler = "and so on " * 30
    texts["tiny"] = "four words are few"
    documents = [f"{texts['start']} {filler}", f"{filler} {texts['end']}", half["apart"][0], half["apart"][1],
                 f"{filler}{texts['last']} {half['shards'][0]}",                       # ends a shard
                 f"{half['shards'][1]} {texts['first']}",
                 f"{filler}\n* {texts['spelled'].upper().replace(' ', ', _')}!", texts["whole"],
                 f"{filler} {texts['short']} {filler}", "a few: " + texts["bare"],
                 f"{filler} {texts['mid']} {filler}", texts["prose"].replace("end", "<|end|>")]
    cut = sum(len(toy.document(t)) for t in documents[:5])
    folder = planted(tmp_path, toy, {"x": {"train": documents, "heldout": [texts["heldout"]]},
                                     "y": {"heldout": [texts["heldout"]]}}, cut)
    assert shards.Source(folder, "x").splits["train"][0]["documents"] == 5
    seen, none = overlap.seen_in_training(texts, folder, toy, 1)
    assert seen == {n: {"source": "x", "grams": 1, "of": 1} for n in names if n not in (
        "heldout", "apart", "shards")}
    assert none == ["tiny"]


def test_processes_the_cache_and_what_is_told(tmp_path, toy, small, monkeypatch, capsys):
    rng = Random(5)
    folder = planted(tmp_path, toy, {name: {"train": sentences(rng, 300)} for name in "ab"}, 2000)
    texts, told = dict(enumerate(sentences(rng, 40))), []
    data.stats(folder)
    before = capsys.readouterr().out

    def done(*now):
        told.append(now)

    def kept():
        return [name for name in os.listdir(folder) if name not in "ab"]

    def full(path, text):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as m:
        m.setattr(overlap, "write_atomic", full)
        first = overlap.seen_in_training(texts, folder, toy, 1, done)
    tokens = sum(shards.Source(folder, name).tokens() for name in "ab")
    assert told == sorted(told) and told[-1] == (tokens, tokens) and len(told) > 8 and first[0]
    assert not kept()
    assert overlap.seen_in_training(texts, folder, toy, 2) == first
    assert len(kept()) == 1 and kept()[0].startswith("overlap-")

    def search(self, piece):
        raise AssertionError("reads a shard")

    monkeypatch.setattr(overlap.Search, "in_piece", search)
    assert overlap.seen_in_training(texts, folder, toy, 1) == first
    other = {f"x{i}": t.upper() for i, t in texts.items()}                   # the same grams
    assert overlap.seen_in_training(other, folder, toy, 1)[0] == {f"x{i}": v for i, v in first[0].items()}
    with pytest.raises(AssertionError):
        overlap.seen_in_training({"one more": "five words that are new", **texts}, folder, toy, 1)
    data.stats(folder)
    assert capsys.readouterr().out == before and shards.prepared(folder) == ["a", "b"]
    planted(tmp_path, toy, {"b": {"train": ["other texts"]}})                # replaced beside the cache
    with pytest.raises(AssertionError):
        overlap.seen_in_training(texts, folder, toy, 1)
    (tmp_path / kept()[0]).write_text('{"a": [1')                            # damaged: searched again
    with pytest.raises(AssertionError):
        overlap.seen_in_training(texts, folder, toy, 1)


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_a_folder_that_is_not_prepared(tmp_path, toy, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"--data={tmp_path}/{name} holds no prepared source; give"):
        overlap.seen_in_training({"a": "b"}, str(tmp_path / name), toy)
    planted(tmp_path, Tokenizer(toy.files, eos="<|end|>", bos="<|free_a|>"), {"x": {"train": ["text"]}})
    with pytest.raises(InputError, match="was prepared with another tokenizer"):
        overlap.seen_in_training({"a": "b"}, str(tmp_path), toy)


# -- preparing ---------------------------------------------------------------------------------------------

def sentence(i):
    """Twenty words, no thirteen in a row as in another one."""
    rng = Random(i)
    return " ".join(str(rng.randrange(10 ** 6)) + "w" for _ in range(20))


def choice(i):
    return f"{sentence(i)}\nA) {i}\nB) {i + 1}"


FILES = {                           # data set, file, its rows: 40 good ones each but for what the test adds
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", "deepscaler.json",
                   [{"problem": sentence(i), "answer": str(i), "solution": ""} for i in range(40)]),
    "intellect2": ("PrimeIntellect/Intellect-2-RL-Dataset", "data/train-00000-of-00008.parquet",  # earlier id
                   [intellect(dumps({"ground_truth": f"{i}"}), prompt=sentence(i)) for i in range(20, 80)]),
    "skywork-math": ("Skywork/Skywork-OR1-RL-Data", "data/math-00000-of-00001.parquet",
                     [skywork(dumps([str(i)]), question=sentence(i)) for i in range(100, 140)]),
    "nemotron-stem": ("nvidia/Nemotron-Post-Training-Dataset-v1", "data/stem-00000-of-00002.parquet",
                      [nemotron(choice(i), "\\boxed{A}") for i in range(200, 240)]),
    "deepcoder-primeintellect": ("agentica-org/DeepCoder-Preview-Dataset",
                                 "primeintellect/train-00000-of-00005.parquet",
                                 [{"problem": sentence(i), "solutions": [""], "tests": typed(
                                     "stdin_stdout", ("1", str(i)))} for i in range(300, 340)]),
    "deepcoder-taco": ("agentica-org/DeepCoder-Preview-Dataset", "taco/train-00000-of-00004.parquet",
                       [{"problem": sentence(i), "tests": dumps({"inputs": ["2"], "outputs": [str(i)]})}
                        for i in range(320, 360)]),
    "skywork-code": ("Skywork/Skywork-OR1-RL-Data", "data/code-00000-of-00003.parquet",
                     [skywork(dumps({"inputs": [[i]], "outputs": [i], "fn_name": "f"}), "code", sentence(i))
                      for i in range(400, 440)]),
    "opencodeinstruct": ("nvidia/OpenCodeInstruct", "data/train-00000-of-00014.parquet",
                         [opencode(dumps([f"assert f({i}) == {i}"]), question=sentence(i))
                          for i in range(500, 900)]),
    "math-500": ("HuggingFaceH4/MATH-500", "test.jsonl", [{"problem": sentence(3), "answer": "3"}]),
    "aime-2024": ("HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet",
                  [{"problem": sentence(9001)}]),
    "aime-2025": ("math-ai/aime25", "test.jsonl", [{"problem": "Intro. " + sentence(105) + " x"}]),
    "livecodebench": ("livecodebench/code_generation_lite", "test6.jsonl",
                      [{"question_content": sentence(301), "starter_code": ""}, {"question_content": None}]),
    "codeforces": ("open-r1/codeforces", "data/test-00000-of-00001.parquet",
                   [{"description": sentence(9002)}]),
    "gpqa-diamond": ("Idavidrein/gpqa", "gpqa_diamond.csv", [{"Question": sentence(201)}]),
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text("\n".join(["Question,Correct Answer", *(f'"{r["Question"]}",x' for r in rows)]))
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def got(folder, change=None):
    """Everything downloaded from a folder as --hub; change: (name, rows) to rows."""
    prompts.get_prompts(str(folder / "raw"), str(hub_of(folder / "hub", change)), stem_files=0)
    return str(folder / "raw")


def hub_of(folder, change=None):
    for name, (repo, file, rows) in FILES.items():
        write(folder / repo / file, change(name, rows) if change else rows)
    for i in range(8):                                                       # more of stem than is taken
        write(folder / FILES["nemotron-stem"][0] / f"data/stem-{i + 2:05d}.parquet",
              [nemotron(choice(10_000 + i), "\\boxed{A}")])
    write(folder / "agentica-org/DeepCoder-Preview-Dataset/lcbv5/train-00000.parquet", [{"x": 1}])
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return got(tmp_path_factory.mktemp("hub"))


def lines(folder, file="train.jsonl"):
    with open(os.path.join(folder, file)) as f:
        return [json.loads(line) for line in f]


def test_get_prompts(tmp_path, capsys):
    hub = str(hub_of(tmp_path / "hub"))
    prompts.get_prompts(str(tmp_path / "raw"), hub, seed=3, stem_files=4)
    assert set(os.listdir(tmp_path / "raw")) == set(FILES) == set(prompts.RL | prompts.BENCHMARKS)
    stem = sorted(os.listdir(tmp_path / "raw/nemotron-stem/data"))
    assert len(stem) == 4
    prompts.get_prompts(str(tmp_path / "raw"), hub, seed=3, stem_files=4)       # again: the same
    assert sorted(os.listdir(tmp_path / "raw/nemotron-stem/data")) == stem
    prompts.get_prompts(str(tmp_path / "other"), hub, seed=4, stem_files=4)
    assert sorted(os.listdir(tmp_path / "other/nemotron-stem/data")) != stem
    assert not (tmp_path / "raw/deepcoder-taco/lcbv5").exists()


def test_prepare(raw, tmp_path, capsys):
    prompts.prompts(raw, str(tmp_path / "out"), heldout=0.1)
    printed = capsys.readouterr().out
    train, held = lines(tmp_path / "out"), lines(tmp_path / "out", "heldout.jsonl")
    report = json.loads((tmp_path / "out/report.json").read_text())
    counts = {name: tuple(report["sources"][name][k] for k in prompts.COUNTS[:4]) for name in prompts.RL}
    assert counts == {"deepscaler": (40, 1, 0, 0), "intellect2": (60, 0, 0, 20),
                      "skywork-math": (40, 1, 0, 0),
                      "nemotron-stem": (48, 1, 0, 0), "deepcoder-primeintellect": (40, 1, 0, 0),
                      "deepcoder-taco": (40, 0, 0, 20), "skywork-code": (40, 0, 0, 0),
                      "opencodeinstruct": (400, 0, 0, 0)}
    assert report["contaminated"] == {
        "math-500": [prompts.identity("math", sentence(3))], "aime-2024": [],
        "aime-2025": [prompts.identity("math", sentence(105))],
        "livecodebench": [prompts.identity("code", sentence(301))], "codeforces": [],
        "gpqa-diamond": [prompts.identity("science", choice(201))]}
    assert report["benchmarks"]["livecodebench"]["without text"] == 1
    assert report["revisions"]["deepscaler"] == prompts.RL["deepscaler"].revision
    ids = [r["id"] for r in train + held]
    assert len(set(ids)) == len(ids) == sum(
        n["rows"] - n["contaminated"] - n["duplicate"] for n in report["sources"].values())
    assert all(list(r) == ["id", "domain", "prompt", "truth", "source"] for r in train)
    assert 0.05 < len(held) / len(ids) < 0.15
    assert [r["id"] for r in train] == sorted((r["id"] for r in train),
                                              key=lambda i: shuffle_key(1, int(i, 16)))
    assert not os.path.exists(tmp_path / "out/spool.tmp") and "warning" not in printed
    assert "livecodebench: 1 prompts" in printed and "opencodeinstruct" in printed


def test_shuffled_rows_give_the_same_bytes(tmp_path):
    """Also where rows of one prompt differ in case, or give several correct tests."""
    def extra(name, rows):
        if name == "opencodeinstruct":
            rows = rows + [opencode(f'["assert f({i + j}) == {i + j}"]',
                                    question=sentence(i).upper() + " " * j)
                           for i in range(500, 530) for j in range(3)]
        return rows

    def shuffled(name, rows):
        return Random(5).sample(extra(name, rows), len(extra(name, rows)))

    found = []
    for at, change in (("a", extra), ("b", shuffled), ("c", extra)):
        prompts.prepare(got(tmp_path / at, change), str(tmp_path / at / "out"), heldout=0.2,
                        seed=1 + (at == "c"), limits={"math": 50, "science": 20, "code": 200})
        found.append([(tmp_path / at / "out" / f).read_bytes()
                      for f in ("train.jsonl", "heldout.jsonl", "report.json")])
    assert found[0] == found[1]
    assert found[0][0] != found[2][0] and found[0][1] != found[2][1]         # another seed


def test_conflicts_drop_both(tmp_path):
    def change(name, rows):
        more = {"deepscaler": [{"problem": "half of one thing?", "answer": "\\dfrac{1}{2}"},
                               {"problem": sentence(30) + " ", "answer": "31"}],       # three: 30 twice
                "skywork-math": [skywork('["$\\\\frac{1}{2}$."]', question="Half of  one THING?")],
                "nemotron-stem": [nemotron(choice(210), "\\boxed{B}")],
                "deepcoder-taco": [{"problem": sentence(300), "tests": typed("stdin_stdout", ("1", "9"))},
                                   {"problem": sentence(302), "tests": typed("stdin_stdout", ("5", "9"))},
                                   {"problem": sentence(304), "tests": typed("function_call", ([5], 9),
                                                                      name="f")}]}
        return rows + more.get(name, [])

    report = prompts.prepare(got(tmp_path, change), str(tmp_path / "out"), "none", heldout=0)
    lost = {name: (n["conflict"], n["duplicate"]) for name, n in report["sources"].items() if n["conflict"]}
    assert lost == {"deepscaler": (2, 0), "intellect2": (1, 19), "nemotron-stem": (2, 0),
                    "deepcoder-primeintellect": (2, 0), "deepcoder-taco": (2, 21)}
    left = {r["prompt"]: r for r in lines(tmp_path / "out")}
    assert left["half of one thing?"]["truth"] == "\\dfrac{1}{2}"            # two spellings of one answer
    assert "Half of  one THING?" not in left
    assert left[sentence(302)]["source"] == "deepcoder-primeintellect"       # two sets of tests that agree
    assert not {sentence(30), choice(210), sentence(300), sentence(304)} & set(left)


@pytest.mark.parametrize("truths, clash", [
    (("1", "1"), False), (("1", "2"), True),
    (("(1, 2)", "\\left(1,2\\right)"), False), (("$x$", "x."), False),
    (("\\leftarrow", "arrow"), True), (("\\tfrac12", "\\frac12"), False), (("1/2", "\\frac12"), True),
])
def test_conflicts_of_math(truths, clash):
    assert prompts.conflicting("math", truths) == clash


def test_quotas():
    assert prompts.quotas({"a": 10, "b": 100, "c": 1000}, 300) == {"a": 10, "b": 100, "c": 190}
    assert prompts.quotas({"a": 10, "b": 100, "c": 1000}, 150) == {"a": 10, "b": 70, "c": 70}
    assert prompts.quotas({"a": 10, "b": 10, "c": 10}, 20) == {"a": 6, "b": 7, "c": 7}
    have = {"a": 10, "b": 100}
    assert prompts.quotas(have, 0) == prompts.quotas(have, 999) == have
    rng = Random(0)
    for _ in range(300):
        have = {c: rng.randrange(40) for c in "abcd"}
        limit = rng.randrange(1, 200)
        taken = prompts.quotas(have, limit)
        assert sum(taken.values()) == min(limit, sum(have.values()))
        whole = [c for c in have if taken[c] == have[c]]
        cut = [taken[c] for c in have if taken[c] < have[c]]
        assert max(cut, default=0) - min(cut, default=0) <= 1
        assert all(have[c] <= min(cut) + 1 for c in whole if cut)


def test_limits(raw, tmp_path):
    limits = {"math": 50, "science": 20, "code": 200}
    report = prompts.prepare(raw, str(tmp_path / "out"), heldout=0, limits=limits)
    train = lines(tmp_path / "out")
    assert Counter(r["domain"] for r in train) == limits
    assert Counter(r["source"] for r in train if r["domain"] == "code") == {
        "deepcoder-primeintellect": 39, "deepcoder-taco": 20, "skywork-code": 40, "opencodeinstruct": 101}
    assert report["sources"]["opencodeinstruct"]["not drawn"] == 299
    more = prompts.prepare(raw, str(tmp_path / "more"), heldout=0, limits=limits | {"code": 300})
    assert more["sources"]["opencodeinstruct"]["not drawn"] == 199           # a larger draw holds the smaller
    assert {r["id"] for r in train} < {r["id"] for r in lines(tmp_path / "more")}


def test_held_out_shares_no_gram_with_train(tmp_path):
    phrase = "please write a python function which takes a list of whole numbers and returns"

    def change(name, rows):
        if name == "opencodeinstruct":
            more = [f"New words. {sentence(i)}" for i in range(500, 600)]
            more += [f"{phrase} {sentence(i)}" for i in range(900, 1000)]
            rows = rows + [opencode('["assert f(1) == 1"]', question=question) for question in more]
        return rows

    report = prompts.prepare(got(tmp_path, change), str(tmp_path / "out"), heldout=0.3)
    train, held = lines(tmp_path / "out"), lines(tmp_path / "out", "heldout.jsonl")
    apart = set().union(*(brute(r["prompt"]) for r in held))
    assert not any(apart & brute(r["prompt"]) for r in train) and len(held) > 100
    overlap = report["sources"]["opencodeinstruct"]["overlap"]
    assert 20 < overlap < 70                                                 # of 100 pairs 42 are expected
    assert sum(r["prompt"].startswith(phrase) for r in train) == 100         # the phrase alone drops nothing


def test_own_benchmarks_and_none(raw, tmp_path, capsys):
    columns = {"problem": 0, "Problem": 1, "question": 2, "Question": 4, "question_content": 5,
               "description": 6, "text": 7}
    for column, i in columns.items():
        write(tmp_path / "bench" / f"my-{i}.jsonl", [{column: sentence(i), "id": 1}])
    report = prompts.prepare(raw, str(tmp_path / "out"), str(tmp_path / "bench"))
    assert report["contaminated"] == {
        f"my-{i}": [prompts.identity("math", sentence(i))] for i in columns.values()}
    prompts.prompts(raw, str(tmp_path / "none"), benchmarks="none")
    assert "warning: --benchmarks=none" in capsys.readouterr().out
    report = json.loads((tmp_path / "none/report.json").read_text())
    assert report["benchmarks"].startswith("none") and report["contaminated"] == {}


def damaged(name, rows):
    bad = [None, 5, {"problem": None, "answer": "1"}, {"problem": "x", "answer": [1]}]
    return rows + bad if name == "deepscaler" else rows


def test_drops_are_counted(tmp_path):
    report = prompts.prepare(got(tmp_path, damaged), str(tmp_path / "out"))
    assert report["sources"]["deepscaler"]["dropped"] == {
        "answer is not text": 1, "problem is null": 1, "row is no JSON object": 2}
    assert report["sources"]["deepscaler"]["rows"] == 44


@pytest.mark.parametrize("break_it, flags, says", [
    (lambda raw: (raw / "gpqa-diamond/gpqa_diamond.csv").unlink(), {}, ["gpqa_diamond.csv", "gated", "none"]),
    (lambda raw: (raw / "math-500/get.json").unlink() or (raw / "math-500/test.jsonl").unlink(), {},
     ["--benchmarks", "math-500 holds no test.jsonl", f"run `{prompts.GET} --raw=", "none"]),
    (lambda raw: (raw / "deepscaler/deepscaler.json").unlink(), {},
     ["deepscaler.json is missing", prompts.GET]),
    (lambda raw: (raw / "deepscaler/deepscaler.json").write_text('[{"problem": "x"}]'), {},
     ["no column 'answer'", "it has: problem"]),
    (lambda raw: (raw / "aime-2025/test.jsonl").write_text('{"problem": null}\n'), {},
     ["aime-2025/test.jsonl has no text in problem"]),
    (lambda raw: None, {"benchmarks": "nowhere"}, ["--benchmarks=nowhere has no .jsonl file"]),
    (lambda raw: None, {"heldout": 1.0}, ["--heldout=1.0"]),
    (lambda raw: None, {"heldout": float("nan")}, ["--heldout=nan"]),
    (lambda raw: (raw / "file").write_text(""), {"out": "file"}, ["--out=", "another --out"]),
])
def test_refusals(raw, tmp_path, break_it, flags, says):
    shutil.copytree(raw, tmp_path / "raw")
    break_it(tmp_path / "raw")
    flags = {"benchmarks": "", "out": "out"} | flags
    flags["out"] = str(tmp_path / "raw" / flags["out"])
    with pytest.raises(InputError) as e:
        prompts.prepare(str(tmp_path / "raw"), **flags)
    assert all(part in str(e.value) for part in says) and "\n" not in str(e.value)
    assert not os.path.exists(tmp_path / "raw/out/train.jsonl")


# -- difficulty mixes --------------------------------------------------------------------------------------

def judged(counts, **more):
    """(records, passes) with so many prompts of so many passes: {domain: {passes: prompts}}."""
    records, passes = [], {}
    for domain, found in counts.items():
        for k, n in found.items():
            for i in range(n):
                records.append({"id": f"{domain}-{k}-{i}", "domain": domain, "prompt": f"{{question}} {i}?",
                                "truth": "A", "source": "x"})
                passes[records[-1]["id"]] = k
    return records, passes


COUNTED = {"math": {0: 9, 1: 7, 2: 5, 16: 3}, "code": {0: 20, 1: 2, 9: 1, 16: 1},
           "science": {0: 3, 1: 4, 16: 4}}


@pytest.mark.parametrize("kind, domains, each, want", [
    ("unbalanced", "MC", 5, {"math": {1: 7}, "code": {1: 2, 9: 1, 16: 1}}),
    ("unbalanced", "MCS", 5, {"math": {1: 7}, "code": {1: 2, 9: 1, 16: 1}, "science": {1: 4, 16: 4}}),
    ("balanced", "MC", 7, {"math": {1: 7}, "code": {0: 3, 1: 2, 9: 1, 16: 1}}),
    ("balanced", "MCS", 10, {"math": {1: 7}, "code": {0: 6, 1: 2, 9: 1, 16: 1},
                             "science": {0: 2, 1: 4, 16: 4}}),
    ("balanced", "MCS", 99, {"math": {1: 7}, "code": COUNTED["code"], "science": COUNTED["science"]}),
])
def test_mixes_by_hand(kind, domains, each, want):
    records, passes = judged(COUNTED)
    found = prompts.mixes(records, passes, kind, domains, 1, each)
    assert want == {d: dict(Counter(r["passes"] for r in found if r["domain"] == d)) for d in want}
    assert len(found) == sum(sum(w.values()) for w in want.values())
    assert all(r["passes"] == passes[r["id"]] for r in found)
    shuffled = Random(0).sample(records, len(records))
    assert prompts.mixes(iter(shuffled), passes, kind, domains, 1, each) == found
    other = prompts.mixes(records, passes, kind, domains, 2, each)
    assert [r["id"] for r in other] != [r["id"] for r in found]
    assert found == sorted(found, key=lambda r: shuffle_key(1, "mix", r["id"]))      # domains mixed
    before = {r["id"]: r["prompt"] for r in records}
    for r in found:
        if kind == "balanced" and r["domain"] == "science":
            assert r["prompt"] in [t.replace("{question}", before[r["id"]]) for t in
                                   prompts.SCIENCE_TEMPLATES]
        else:
            assert r["prompt"] == before[r["id"]]


def test_balanced_draws_where_there_are_more():
    records, passes = judged({"math": {1: 50}, "code": {0: 50, 3: 50}, "science": {5: 50}})
    found = prompts.mixes(records, passes, "balanced", "MCS", 1, 19)
    assert Counter((r["domain"], r["passes"]) for r in found) == {
        ("math", 1): 19, ("code", 3): 19, ("science", 5): 19}
    other = prompts.mixes(records, passes, "balanced", "MCS", 2, 19)
    assert {r["id"] for r in found} != {r["id"] for r in other}
    assert len(prompts.mixes(records, {}, "balanced", "MCS", 1)) == 0        # nothing was judged


def test_templates():
    records, passes = judged({"science": {1: 400}})
    found = prompts.mixes(records, passes, "balanced", "MCS", 1, 400)
    ends = {t.partition("{question}")[::2]: t for t in prompts.SCIENCE_TEMPLATES}
    used = Counter(next(t for (start, end), t in ends.items()
                        if r["prompt"].startswith(start) and r["prompt"].endswith(end)) for r in found)
    assert set(used) == set(prompts.SCIENCE_TEMPLATES) and min(used.values()) > 15
    for t in prompts.SCIENCE_TEMPLATES:
        assert t.count("{question}") == 1 and ("\\boxed{" in t) != ("Answer: " in t)


def verdicts(path, passes, samples=16, **more):
    write(path, [{"id": i, "domain": "math", "verdicts": [True] * k + [False] * (samples - k), "model": "m",
                  "seed": 1, **more} for i, k in passes.items()])
    return str(path)


def test_mix(tmp_path, capsys):
    records, passes = judged(COUNTED)
    for r in records:
        r["truth"] = stdio(("1", "é" * 9)) if r["domain"] == "code" else "A"
    write(tmp_path / "train.jsonl", records)
    path = verdicts(tmp_path / "v.jsonl", {**passes, "unknown": 3, "code-0-0": 0})
    for kind, domains in itertools.product(("unbalanced", "balanced"), ("MC", "MCS")):
        prompts.mix(str(tmp_path), path, str(tmp_path / "new/mix.jsonl"), kind, domains, each=8)
        assert lines(tmp_path, "new/mix.jsonl") == prompts.mixes(records, passes, kind, domains, 1, 8)
    printed = capsys.readouterr().out
    assert "59 of 59 were judged" in printed
    assert "math            0      7      0" in printed and "fewer than --each=8" in printed
    assert os.listdir(tmp_path / "new") == ["mix.jsonl"]


@pytest.mark.parametrize("line, says", [
    ('{"id": "a", "verdicts": [true]}',
     "line 3: a has 1 verdicts, not 16; judge 16 samples a prompt, or give --samples=1"),
    (dumps({"id": "a", "verdicts": [1] * 16}), "line 3: the verdicts of a are not all true or false"),
    (dumps({"id": "a", "verdicts": None}), "line 3: the verdicts of a are not all true or false"),
    (dumps({"id": 5, "verdicts": [True] * 16}), 'line 3 has no "id"'),
    (dumps({"id": "x", "verdicts": [True] * 16}), "line 3: x was judged before, with other verdicts"),
    ('{"id": "a", "verd', "line 3 is no JSON object"),
    ("[1]", "line 3 is no JSON object"),
    ("", "line 3 is no JSON object"), ("\udcff", "line 3 is no JSON object"),
])
def test_verdicts_that_are_refused(tmp_path, line, says):
    path = tmp_path / "v.jsonl"
    good = '{"id": "x", "verdicts": [' + ", ".join(["true"] + ["false"] * 15) + "]}\n"
    path.write_bytes((good + good + line + "\n").encode(errors="surrogateescape"))
    with pytest.raises(InputError) as e:
        prompts.read_verdicts(str(path))
    assert f"--verdicts: {path}, {says}" in str(e.value) and "\n" not in str(e.value)
    path.write_text(good + good)
    assert prompts.read_verdicts(str(path)) == {"x": 1}


@pytest.mark.parametrize("flags, says", [
    ({"kind": "balancd"},
     "--kind='balancd' is unknown; did you mean 'balanced'? (known: unbalanced, balanced)"),
    ({"domains": "SCM"}, "--domains='SCM' is unknown"),
    ({"samples": 8}, "has 16 verdicts, not 8"),
    ({"verdicts": "nowhere.jsonl"}, "--verdicts: nowhere.jsonl cannot be read (No such file"),
    ({"prompts": "nowhere"}, "--prompts: nowhere/train.jsonl cannot be read"),
    ({"domains": "MC"}, "the mix is empty (3 of the 3 prompts"),
])
def test_mix_refuses(tmp_path, flags, says):
    records, passes = judged({"math": {0: 2, 2: 1}})
    write(tmp_path / "train.jsonl", records)
    given = {"prompts": str(tmp_path), "verdicts": verdicts(tmp_path / "v.jsonl", passes),
             "out": str(tmp_path / "mix.jsonl")} | flags
    with pytest.raises(InputError) as e:
        prompts.mix(**given)
    assert says in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "mix.jsonl").exists()
