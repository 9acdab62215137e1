"""suite/ruler.py: the answers are in the text and nowhere else, budgets are exact, scores are NVIDIA's,
examples the same everywhere. A reader that knows only the prompt (solve) finds the answers of every task."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from cli import InputError
from corpus.tokenizer import load_tokenizer, toy_tokenizer
from suite import ruler
from suite.ruler import TASKS, example, read_texts, score

ROOT = Path(ruler.__file__).parents[1]


# -- material ------------------------------------------------------------------------------------------------

def prose(rng, words):
    """Sentences of made-up words and numbers, with line breaks and the marks that end a sentence."""
    text = []
    while len(text) < words:
        sentence = rng.choices("time people x-ray don't start 1995 of the a idea company (so) good".split(),
                               k=rng.randrange(3, 30))
        text += [*sentence[:-1], sentence[-1] + rng.choice((".", "?", "!", ".\n\n"))]
    return " ".join(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Essays and 1,000 questions whose answers are in one document each; 20 paragraphs an article."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    (folder / "a.txt").write_text(prose(rng, 20_000))
    (folder / "b.txt").write_text(prose(rng, 5_000))
    squad, hotpot = [], []
    for i in range(1000):
        context = f"{prose(rng, 20 + i % 90)} The code of item {i} is zq{i}x."
        squad.append({"id": str(i), "title": f"Article {i // 20}", "context": context,
                      "question": f"What is the code of item {i}?",
                      "answers": {"text": [f"zq{i}x", f"code zq{i}x"] if i % 10 else [], "answer_start": []}})
        if i % 10 == 0:
            titles = [f"Page {i + j}" for j in range(10)]
            hotpot.append({"id": str(i), "question": f"What is the code of item {i}?", "answer": f"zq{i}x",
                           "context": {"title": titles, "sentences": [
                               [prose(rng, 5), f" The code of item {i + j} is zq{i + j}x.", prose(rng, 9)]
                               for j in range(10)]}})
    for name, rows in (("squad.jsonl", squad), ("hotpotqa.jsonl", hotpot)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def texts(folder):
    return read_texts(str(folder))


@pytest.fixture(scope="module")
def tokenizers(folder, tmp_path_factory):
    """The toy, and a byte-level BPE that splits as GPT-2 does and has a bos."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    templates = str({kind: tuple(template) for kind, template in ruler.TEMPLATES.items()})
    backend.train_from_iterator(
        [(folder / "b.txt").read_text(), ruler.NOISE, templates, Path(os.__file__).read_text()],
        trainers.BpeTrainer(vocab_size=2000, special_tokens=["<s>", "</s>"], show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    out = tmp_path_factory.mktemp("bpe")
    backend.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return {"toy": toy_tokenizer(), "bpe": load_tokenizer(out)}


def solve(task, prompt):
    """The answers by reading: what a patient human would do with the prompt, in any order."""
    if task in ruler.NIAH:
        query = re.search(r"special magic \w+ for ([^\n]+) mentioned in the provided text\?$", prompt)[1]
        needles = re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.", prompt)
        return [value for key in re.split(r", and |, ", query) for k, value in needles if k == key]
    if task == "vt":
        text = prompt[prompt.rindex("Memorize"):]
        asked = re.search(r"assigned the value (\d+) in the text above\.$", text)[1]
        values = {}
        for name, of in re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\w+) ?$", text, re.MULTILINE):
            assert name not in values                          # and of an earlier line: else a KeyError
            values[name] = of if of.isdigit() else values[of]
        return [name for name, value in values.items() if value == asked]
    if task == "cwe":
        text = prompt[prompt.rindex("Below is"):].split("\n")[1]
        numbers, words = zip(*re.findall(r"(\d+)\. (\S+)", text), strict=True)
        assert [int(n) for n in numbers] == list(range(1, len(words) + 1))
        counts = Counter(words).most_common()
        assert {n for _, n in counts[:10]} == {30} and {n for _, n in counts[10:]} == {3}
        return [word for word, _ in counts[:10]]
    if task == "fwe":
        text = re.search(r"coded words\. (.+)\nQuestion", prompt)[1]
        (dots, _), *counts = Counter(text.split(" ")).most_common(5)
        assert dots == "..." and len({n for _, n in counts}) == 4
        return [word for word, _ in counts[:3]]
    item = re.search(r"Question: What is the code of item (\d+)\?$", prompt)[1]
    return re.findall(rf"The code of item {item} is (zq\d+x)\.", prompt)


def family(task):
    return "niah" if task in ruler.NIAH else "qa" if task in ruler.QA else task


CASES = [(task, name, length) for task in TASKS for name in ("toy", "bpe") for length in (4096, 16384)
         if (task, length) != ("cwe", 4096)]         # its solved example alone is 1,900 ids of the toy's


# -- examples ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", TASKS)
def test_budgets_and_answers(task, texts, tokenizers):
    for _, name, length in [case for case in CASES if case[0] == task]:
        tokenizer, seen = tokenizers[name], set()
        for index in range(3):
            e = example(task, length, index, tokenizer, texts)
            used = len(tokenizer.document(e.prompt + e.prefix)) - 1 + e.max_new_tokens       # without the eos
            assert 0.99 * length <= used <= length, (name, length, index, used)
            assert e.max_new_tokens == {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}[family(task)]
            found = solve(task, e.prompt)
            if task in ruler.QA:
                assert found == e.answers[:1]
            else:
                assert sorted(found) == sorted(e.answers) and len(set(found)) == len(found)
                assert task in ("cwe", "niah_multivalue") or found == e.answers    # as asked, linked, ranked
            if task in ruler.NIAH:                             # the value nowhere else, not in part either
                assert all(e.prompt.count(answer) == 1 for answer in e.answers)
            assert score(task, " ".join(e.answers), e.answers) == 1
            assert not any(answer in e.prefix for answer in e.answers)
            seen.add(e.answers[0])
        assert len(seen) == 3


def test_sizes_of_the_tasks(texts, tokenizers):
    """Needles, keys, values and references as in NVIDIA's synthetic.yaml."""
    want = {"niah_single_1": (1, 1, 1), "niah_single_2": (1, 1, 1), "niah_single_3": (1, 1, 1),
            "niah_multikey_1": (4, 4, 1), "niah_multivalue": (4, 1, 4), "niah_multiquery": (4, 4, 4),
            "vt": (5, 5, 5), "cwe": (0, 0, 10), "fwe": (0, 0, 3), "qa_1": (0, 0, 2), "qa_2": (0, 0, 1)}
    for task, (needles, keys, answers) in want.items():
        e = example(task, 8192, 0, tokenizers["bpe"], texts)
        text = e.prompt[max(e.prompt.rfind("Memorize and"), 0):]
        found = re.findall(r"special magic \w+ for (\S+) is:|(?:\n|^)VAR (\w+)", text)
        assert (len(found), len(set(found)), len(e.answers)) == (needles, keys, answers), task
    for task, kind in (("niah_multikey_2", r"[a-z]{6}-[a-z]{6} is: \d{7}"),
                       ("niah_multikey_3", r"[-0-9a-f]{36} is: [-0-9a-f]{36}")):
        lines = example(task, 4096, 0, tokenizers["bpe"], texts).prompt.split("\n")[1:-1]
        full = [line for line in lines if re.fullmatch(rf"One of the special magic \w+ for {kind}\.", line)]
        assert len(full) >= len(lines) - 1 > 30, task                  # one is cut
        assert len({line.split()[7] for line in full}) == len(full) == len({line[-9:] for line in full})


def test_keys_are_distinct_and_not_in_the_essay(texts, tokenizers):
    """Of nine pairs of three words, five are in the essay: the other four are the keys."""
    few = texts._replace(words=("ab", "cd", "ef"), essay="ab-ab ab-cd (ab-ef) cd-ab, cd-cd. " + texts.essay)
    for index in range(5):
        e = example("niah_multikey_1", 4096, index, tokenizers["toy"], few)
        assert sorted(re.findall(r" for (\S+) is: ", e.prompt)) == ["cd-ef", "ef-ab", "ef-cd", "ef-ef"]


def test_wording(texts, tokenizers):
    """One value asked for: the singular, also with four keys."""
    for task in ("niah_single_2", "niah_multikey_1", "niah_multikey_2"):
        e = example(task, 4096, 0, tokenizers["bpe"], texts)
        assert e.prompt.startswith("A special magic number is hidden within the following text. Make sure to "
                                   "memorize it. I will quiz you about the number afterwards.\n")
        assert re.search(r"\nWhat is the special magic number for \S+ mentioned in the provided text\?$",
                         e.prompt)
        assert re.fullmatch(r" The special magic number for \S+ mentioned in the provided text is", e.prefix)
    e = example("niah_multiquery", 4096, 0, tokenizers["bpe"], texts)
    assert e.prompt.startswith("Some special magic numbers are hidden")
    assert re.search(r"\nWhat are all the special magic numbers for \S+, \S+, \S+, and \S+ mentioned in the",
                     e.prompt)
    assert e.prefix.endswith(" mentioned in the provided text are")


@pytest.mark.parametrize("task", ["vt", "cwe"])
def test_solved_example_tells_nothing(task, texts, tokenizers):
    """It is in front, solved, and shares no name, value or word with the question."""
    e = example(task, 8192, 0, tokenizers["bpe"], texts)
    start = e.prompt.rindex(ruler.TEMPLATES[task].prompt[:20])
    solved, asked = e.prompt[:start], e.prompt[start:]
    body, answers = solved.split("they are: " if task == "vt" else "in the list are:")
    if task == "vt":
        names = answers.split()
        assert sorted(names) == sorted(solve("vt", body[:body.rindex(" Answer:")]))
        assert re.search(r"value (\d{5})", solved)[1] not in asked
    else:
        names = re.findall(r"\d+\. (\w+)", answers)
        counts = Counter(re.findall(r"\d+\. (\w+)", body))
        assert [counts[name] for name in names] == [10] * 10 and sorted(counts.values())[:30] == [3] * 30
        assert not counts.keys() & set(re.findall(r"\d+\. (\w+)", asked))
    assert len(names) == {"vt": 5, "cwe": 10}[task] and not any(f" {name} " in asked for name in names)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2", "niah_multiquery"])
def test_depths_are_uniform(task, texts, tokenizers):
    depths = []
    for index in range(200):
        e = example(task, 2048, index, tokenizers["toy"], texts)
        start, end = e.prompt.index("\n"), e.prompt.rindex("\n")
        depths += [(e.prompt.index(f" is: {answer}") - start) / (end - start) for answer in e.answers[:1]]
    tenths = Counter(int(10 * depth) for depth in depths)
    assert all(5 <= tenths[i] <= 40 for i in range(10)), tenths                     # 20 each, +- 4.7 sigma
    off = max(abs(i / 200 - depth) for i, depth in enumerate(sorted(depths)))
    assert off < 0.14, off                                                          # Kolmogorov, 0.1 %


def test_qa_documents(texts, tokenizers):
    """All numbered, none twice, the gold one whole and anywhere; SQuAD's article first, Hotpot's ten."""
    places = []
    for index in range(15):
        e = example("qa_1", 8192, index, tokenizers["bpe"], texts)
        parts = re.split(r"(?:^|\n\n)Document (\d+):\n", e.prompt[:e.prompt.rindex("\n\nAnswer the")])
        assert parts[1::2] == [str(i) for i in range(1, len(parts) // 2 + 1)]
        documents, item = parts[2::2], int(e.answers[0][2:-1])
        items = [int(m[1]) for d in documents if (m := re.search(r"item (\d+) is zq\d+x\.$", d))]
        assert len(items) >= len(documents) - 1 and len(set(items)) == len(items)
        article = set(range(item // 20 * 20, item // 20 * 20 + 20))
        assert article <= set(items) or not set(items) - article
        places.append(items.index(item) / len(items))
    assert min(places) < 0.2 and max(places) > 0.8
    e = example("qa_2", 8192, 0, tokenizers["bpe"], texts)
    pages = set(map(int, re.findall(r"\nPage (\d+)\n", e.prompt)))
    item = int(e.answers[0][2:-1])
    assert set(range(item, item + 10)) <= pages


def test_every_question_once(texts, tokenizers):
    """The same questions at every length; 900 have answers; then they start again in another order."""
    asked = [example("qa_1", 1024, i, tokenizers["bpe"], texts).answers[0] for i in range(0, 1800, 30)]
    order = random.Random("ruler/0/qa_1/0").sample(texts.qa["qa_1"][0], 900)
    assert asked[:30] == [order[index].answers[0] for index in range(0, 900, 30)]
    assert len(set(asked[:30])) == 30 and asked[:30] != asked[30:]
    assert example("qa_1", 8192, 30, tokenizers["toy"], texts).answers[0] == asked[1]


def test_words_of_a_file(folder, texts, tokenizers, tmp_path):
    for name in ("a.txt", "squad.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    words = [f"w{i:04d}" for i in range(1100)]
    (tmp_path / "words.txt").write_text("\n".join(words))
    own = read_texts(str(tmp_path))
    assert own.words == tuple(words) and "w0001" not in own.essay and list(own.qa) == ["qa_1"]
    e = example("cwe", 8192, 0, tokenizers["bpe"], own)
    assert set(solve("cwe", e.prompt)) == set(e.answers) <= set(words)
    e = example("niah_multikey_2", 4096, 0, tokenizers["bpe"], own)
    assert re.search(r"for w\d{4}-w\d{4} is: \d{7}\.\n", e.prompt)
    with pytest.raises(InputError, match="too long for cwe"):      # 1050 words, three times each
        example("cwe", 65536, 0, tokenizers["bpe"], own)


def test_long_context_and_embedded_prose(tokenizers):
    """128k out of a short essay, which repeats, and out of the standard library's prose."""
    texts = read_texts()
    assert len(texts.essay) > 400_000 and not texts.qa
    for own in (texts, texts._replace(essay=texts.essay[:3000])):
        e = example("niah_multivalue", 131072, 0, tokenizers["toy"], own)
        used = len(tokenizers["toy"].encode(e.prompt + e.prefix)) + 128
        assert 0.99 * 131072 <= used <= 131072
        assert sorted(solve("niah_multivalue", e.prompt)) == sorted(e.answers)


def test_awkward_essays(tokenizers, texts):
    """Ideographs without a space, one word of 5,000 letters: within the budget, if not up to it."""
    for essay in ("\u6f22\u5b57\u3002" * 900, "x" * 5000 + " y."):
        for length in (4096, 16384):
            e = example("niah_single_2", length, 1, tokenizers["bpe"], texts._replace(essay=essay))
            assert len(tokenizers["bpe"].document(e.prompt + e.prefix)) - 1 + 128 <= length
            assert solve("niah_single_2", e.prompt) == e.answers


def test_room_for_a_chat_template(texts, tokenizers):
    e = example("niah_single_1", 4096, 0, tokenizers["bpe"], texts, reserve=50)
    assert 0.98 * 4096 < len(tokenizers["bpe"].document(e.prompt + e.prefix)) - 1 + 128 <= 4096 - 50


# -- the same everywhere -------------------------------------------------------------------------------------

DIGEST = """
import hashlib, sys
from corpus.tokenizer import toy_tokenizer
from suite import ruler
texts, h = ruler.read_texts(sys.argv[1]), hashlib.sha256()
for task in ruler.TASKS:
    h.update(repr(ruler.example(task, 8192, 3, toy_tokenizer(), texts, seed=1)).encode())
print(h.hexdigest())
"""


def test_same_in_every_process(folder, texts, tmp_path):
    h = hashlib.sha256()
    for task in TASKS[::-1]:                                       # what was drawn before does not matter
        example(task, 8192, 3, toy_tokenizer(), texts, seed=1)
    for task in TASKS:
        h.update(repr(example(task, 8192, 3, toy_tokenizer(), texts, seed=1)).encode())
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", DIGEST, str(folder)], env=env, cwd=tmp_path,
                         capture_output=True, text=True, check=True)
    assert run.stdout.strip() == h.hexdigest()


@pytest.mark.parametrize("task", TASKS)
def test_draws_are_independent(task, texts, tokenizers):
    def answers(length=4096 if task != "cwe" else 8192, index=0, seed=0):
        return tuple(example(task, length, index, tokenizers["toy"], texts, seed).answers)

    drawn = [answers(index=i) for i in range(20)] + [answers(index=i, seed=1) for i in range(5)]
    assert len(set(drawn)) >= 24                                   # qa: 900 questions, drawn anew by the seed
    assert answers() == drawn[0]
    if task not in ruler.QA:
        assert answers(length=16384) != drawn[0] and len({drawn[i][0][:3] for i in range(20)}) > 10


def test_order_is_drawn_too(texts, tokenizers):
    """NVIDIA's generator shuffles needles and words of every sample alike."""
    many = {task: [example(task, 8192, i, tokenizers["toy"], texts) for i in range(30)]
            for task in ("niah_multivalue", "niah_multikey_1", "cwe", "fwe")}
    for task in ("niah_multivalue", "niah_multikey_1"):            # which of the needles is asked for
        places = [re.findall(r" is: (\d{7})\.", e.prompt).index(e.answers[0]) for e in many[task]]
        assert set(places) == {0, 1, 2, 3}, (task, places)
    for task in ("cwe", "fwe"):
        places = [[word in e.answers for word in re.findall(r"\b[a-z]{6}\b", e.prompt)[-500:]]
                  for e in many[task]]
        assert len(set(map(tuple, places))) == 30


# (task, length): tokens with the new ones, answers, a part of the prompt, sha256 of the example. Made once
# with the toy tokenizer and the essay below; the prompts were read and the answers found by hand: the needle
# of each key asked for, the chain, the ten words that are there six times, ranks 2 to 4 (15, 6, 4 times).
ESSAY = " ".join(f"Sentence {i} says that {i} is less than {i + 1}, which nobody doubts." for i in range(40))
GOLDEN = {
    ("niah_single_1", 700): (700, ["5792423"], (
        "Here we go. There and back again.\nOne of the special magic numbers for mapuzu-wilimi is: 5792423.\n"
        "The grass is green."), "5f6703fdb33bdaf8"),
    ("niah_multiquery", 1100): (1098, ["8386985", "9512276", "3089722", "1908512"], (
        "Sentence 29 says that 29 is less than 30, which nobody doubts. One of the special magic numbers for "
        "kohini-nemofa is: 8386985. Sentence 30 says"), "2cf9ab0e9d52e4d3"),
    ("niah_multikey_3", 900): (874, ["f11f8cbd-5607-4950-8c83-6a9c3409112b"], (
        "\nOne of the special magic uuids for 22894416-91c7-4fb8-a3a3-bb4c4da936da is: "
        "f11f8cbd-5607-4950-8c83-6a9c3409112b.\n"), "402f92c1db590438"),
    ("vt", 1700): (1700, ["QIIVL", "XIDYY", "RXPHT", "YUVEL", "LTNYP"], (
        "they are:  YSP PVP BMO RYM NIN\n\nMemorize and track the chain(s) of variable assignment hidden in "
        "the following text.\n\nVAR QIIVL = 73595\nVAR XIDYY = VAR QIIVL \nThe grass"), "cc8d00cffa30d444"),
    ("cwe", 1900): (1893, ["hiludi", "vanome", "guzuho", "gimeko", "fotivi", "nafoti", "bisela", "gavido",
                           "nifeze", "hikiro"], (
        "8. wemiku 9. kahewu 10. tutume\nBelow is a numbered list of words. In these words, some appear more "
        "often than others. Memorize the ones that appear most often.\n1. nifeze 2. bisela 3. fotivi 4. hil"),
        "8f861170d2565c59"),
    ("fwe", 700): (698, ["jltxgc", "pphigx", "mvvegx"], (
        "coded words. mvvegx ... ... ... ... ... pphigx pphigx ... ... jltxgc ... pphigx"),
        "595a690334121cd4"),
    ("qa_1", 500): (500, ["here"], (
        "documents.\n\nDocument 1:\nNear it. Near it. Near it. Near it. Near it. Near it. Near it. Near it. "
        "Near it. \n\nDocument 2:\nIt is here.\n\nDocument 3:\nFar off. Far"), "fa9a3173677568df"),
}


def test_golden_records(tokenizers, tmp_path):
    """Where this fails, examples have changed: raise ruler.EXAMPLES, else samples of old ones are taken for
    samples of new ones, and give GOLDEN what the new ones are."""
    assert ruler.EXAMPLES == 1
    (tmp_path / "essay.txt").write_text(ESSAY)
    texts = read_texts(str(tmp_path / "essay.txt"))
    question = ruler.Question("Where is it?", ["here"], [1], [0])
    texts = texts._replace(qa={"qa_1": ([question], ["Near it. " * 9, "It is here.", "Far off. " * 90])})
    for (task, length), (tokens, answers, excerpt, digest) in GOLDEN.items():
        e = example(task, length, 0, tokenizers["toy"], texts)
        assert excerpt in e.prompt and e.answers == answers
        assert len(tokenizers["toy"].encode(e.prompt + e.prefix)) + e.max_new_tokens == tokens
        assert hashlib.sha256(repr(e).encode()).hexdigest()[:16] == digest, task


# -- scores --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task, response, answers, want", [
    ("niah_single_1", " 1234567.", ["1234567"], 1.0),
    ("niah_single_1", "1234 567", ["1234567"], 0.0),
    ("niah_single_1", "91234567890", ["1234567"], 1.0),            # a substring is enough
    ("niah_multivalue", "11, 33", ["11", "22", "33", "44"], 0.5),
    ("niah_single_3", "ABC-DEF", ["abc-def"], 1.0),
    ("vt", "ABCDE FGHIJ and xyzab", ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "XYZAB"], 0.6),
    ("cwe", "1. one 2. two", ["one", "two", "six", "ten", "act", "arm", "bag", "bed", "bit", "box"], 0.2),
    ("fwe", "", ["abcdef", "ghijkl", "mnopqr"], 0.0),
    ("qa_1", "It is paris, of course", ["Paris", "the city of Paris", "Paris, France"], 1.0),   # lm-eval: 1/3
    ("qa_1", "London", ["Paris", "the city of Paris"], 0.0),
    ("qa_2", "No.", ["no"], 1.0),
    ("qa_2", "I know", ["no"], 1.0),                               # as published
    ("qa_2", "new\tyork", ["new york"], 0.0),                      # control characters become line breaks
    ("qa_2", "\x00new\x01york", ["new\nyork"], 1.0),
])
def test_score(task, response, answers, want):
    assert score(task, response, answers) == pytest.approx(want)


def test_scores_and_their_version():
    """Where this fails, responses count otherwise: raise ruler.SCORES, else verdicts of before are kept, and
    write the new digest here."""
    rng, scores = random.Random(1), []
    for _ in range(500):
        answers = ["".join(rng.choices("abAB ", k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 5))]
        response = "".join(rng.choices("abAB \n\t", k=rng.randrange(12)))
        scores.append(score(rng.choice(TASKS), response, answers))
    digest = hashlib.sha256(repr(scores).encode()).hexdigest()[:16]
    assert (ruler.SCORES, digest) == (1, "c1876db4981815ec")


def test_score_equals_the_definition():
    """Against the published definition written down otherwise: over characters, by hand-made windows."""
    rng = random.Random(0)
    for _ in range(500):
        task = rng.choice(TASKS)
        answers = ["".join(rng.choices("abAB ", k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 5))]
        response = "".join(rng.choices("abAB \n", k=rng.randrange(12)))
        said = response.strip().casefold()
        hits = sum(any(said[i:i + len(a)] == a.casefold() for i in range(len(said) + 1)) for a in answers)
        want = min(hits, 1) if task.startswith("qa") else hits / len(answers)
        assert score(task, response, answers) == want, (task, response, answers)


# -- refusals ------------------------------------------------------------------------------------------------

def test_refusals(texts, tokenizers, tmp_path):
    toy = tokenizers["toy"]
    with pytest.raises(InputError, match="niah_multikey_2.*known: niah_single_1, .*qa_2"):
        example("niah_multikey2", 4096, 0, toy, texts)
    with pytest.raises(InputError, match="did you mean"):
        score("niah_single1", "", ["1"])
    for task in TASKS:
        with pytest.raises(InputError, match=rf"length 200 is too short for {task}: .* take about \d+; give"):
            example(task, 200, 0, toy, texts)
    with pytest.raises(InputError) as error:                       # names a length that is nearly enough
        example("vt", 200, 0, toy, texts)
    assert example("vt", int(re.search(r"take about (\d+);", str(error.value))[1]) + 50, 0, toy, texts)
    for task, name in (("qa_1", "squad.jsonl"), ("qa_2", "hotpotqa.jsonl")):
        with pytest.raises(InputError, match=rf"{task} needs questions.*put {name}.*leave {task} out"):
            example(task, 4096, 0, toy, texts._replace(qa={}))
        with pytest.raises(InputError, match=rf"too long for {task}.*give more"):
            q, documents = texts.qa[task]
            some = ([ruler.Question("?", ["x"], [1], [])], documents[:30])
            example(task, 131072, 0, toy, texts._replace(qa={task: some}))
    with pytest.raises(InputError, match="no.txt cannot be read"):
        read_texts(str(tmp_path / "no.txt"))
    with pytest.raises(InputError, match=r"0 characters of essay; give \*.txt"):
        read_texts(str(tmp_path))
    for name, content, message in (("words.txt", "a b c", "3 words; give 1000"),
                                   ("squad.jsonl", "{", "not one JSON row of rajpurkar/squad_v2"),
                                   ("squad.jsonl", '{"question": "?"}', r"KeyError\('context'\)"),
                                   ("hotpotqa.jsonl", "", "no question has an answer"),
                                   ("hotpotqa.jsonl", "[1]", "not one JSON row of hotpotqa")):
        own = tmp_path / f"{name} {message[:9]}".replace("\\", "")
        own.mkdir()
        (own / "essay.txt").write_text(ESSAY)
        (own / name).write_text(content)
        with pytest.raises(InputError, match=message):
            read_texts(str(own))
