"""Texts to prepared folders: each source's filter and format on hand-made rows in its real schema, damaged
files, own files, kills, parts, the hub over HTTP, packed rows, shares that hold whatever the lengths."""

import collections
import fcntl
import http.server
import importlib.util
import json
import operator
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import miniatures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import Process

import data
import midtrain
from cli import InputError
from corpus import registry, shards, tokenizing, world
from corpus.files import cut_files, read_rows
from corpus.formats import text_of
from corpus.hub import raw_files, read_lock
from corpus.rules import code_of
from corpus.tokenizer import load_tokenizer, toy_tokenizer
from corpus.workers import workers

ROOT = os.path.dirname(data.__file__)
ALL = ",".join(f"{name}:{100 / len(registry.REGISTRY):.12f}" for name in registry.REGISTRY)


@pytest.fixture(scope="module")
def toy():
    return toy_tokenizer()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return miniatures.hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory, hub):
    folder = tmp_path_factory.mktemp("raw")
    data.get(ALL, "1B", str(folder), hub)
    return str(folder)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def tokenize(out, own, **more):
    data.tokenize(str(out), "toy", sources=",".join(f"{k}=local:{v}" for k, v in own.items()),
                  **{"workers": 1, "heldout": 0} | more)


# -- the registry ------------------------------------------------------------------------------------------

def test_registry_is_the_papers_table_1():
    tokens = {"dclm-edu": 111.46, "mot-math": 0.60, "nemotron-math": 35.93, "megamath-web-pro": 14.73,
              "mot-code": 1.18, "ocr2": 1.12, "refinecode": 186.44, "starcoder2": 432.73, "mot-science": 0.42,
              "openthoughts3-science": 0.73, "codex": 3.86}
    assert {name: s.tokens for name, s in registry.REGISTRY.items() if s.tokens} == tokens
    assert sum(part.draw for part in registry.REGISTRY["ocr2"].parts.values()) == 120_000
    assert {n for n, s in registry.REGISTRY.items() if any(p.stand_in for p in s.parts.values())} == \
        {"refinecode", "starcoder2"}
    for source in registry.REGISTRY.values():
        for part in source.parts.values():
            assert part.licence and part.columns and (part.revision == "main" or len(part.revision) == 40)


def test_all_sources_from_hub_to_prepared(hub, raw, toy, tmp_path, capsys):
    """get, tokenize, stats on miniatures of every source: exactly the texts written down by hand."""
    data.check(ALL, hub)
    assert "NO COLUMN" not in capsys.readouterr().out
    data.tokenize(str(tmp_path), "toy", ALL, raw=raw, workers=2, heldout=0)
    for name in registry.REGISTRY:
        assert miniatures.documents(tmp_path, name, toy) == miniatures.wanted(name), name
        manifest = shards.Source(str(tmp_path), name, toy).manifest
        for part, report in manifest["parts"].items():
            rows = miniatures.ROWS[part][1]
            assert report["rows"] == len(rows) == report["documents"] + sum(report["dropped"].values())
            assert report["dropped"].get("duplicate", 0) == sum(text == "twice" for _, text in rows)
    data.stats(str(tmp_path), 8)
    out = capsys.readouterr().out
    for reason in ("score below 3 1", "no tests 2", "not judged right 2", "not GPT-4 1", "not science 2",
                   "thought without end 1", "pass_rate is no number 3", "question not found 2",
                   "text is empty 1", "edu_int_score is no number 1", "stands in for RefineCode",
                   "cc-by-4.0", "toxic 1"):
        assert reason in out, reason
    data.pack(str(tmp_path), 8, "bfd")
    for name in registry.REGISTRY:
        source = shards.Source(str(tmp_path), name, toy)
        source.packed_for(8)
        assert source.rows(8) >= 1
    data.tokenize(str(tmp_path), "toy", ALL, raw=raw, workers=1, heldout=0)
    assert capsys.readouterr().out.count("prepared already") == len(registry.REGISTRY)


def test_draw_takes_so_many_at_random(tmp_path, toy, monkeypatch):
    """OpenCodeReasoning-2's draw: of the rows that pass, the asked number, the same in whichever order."""
    part = registry.REGISTRY["ocr2"].parts["ocr2-python"]
    raw = tmp_path / "raw"
    good = {f: [miniatures.ocr2(question=f"{f} {i}", pass_rate="1" if i % 3 else "-1") for i in range(60)]
            for f in "ab"}
    for f, rows in good.items():
        miniatures.write(str(raw / "ocr2-python" / "train" / "python" / f"train-{f}.parquet"), rows)
        miniatures.write(str(raw / "ocr2-cpp" / "train" / "cpp" / f"train-{f}.parquet"), rows[:4])
    few = registry.SourceSpec("code", 1.12, {
        "ocr2-python": registry.Part(**{**part.__dict__, "draw": 25}),
        "ocr2-cpp": registry.REGISTRY["ocr2"].parts["ocr2-cpp"]})
    monkeypatch.setitem(registry.REGISTRY, "ocr2", few)
    worker = tokenizing.Worker(toy, None, 0, None)                           # rows have their questions
    pool = SimpleNamespace(map=lambda function, items: [function(worker, item) for item in items])
    files = raw_files(str(raw), "ocr2-python", part)
    first, counts = tokenizing.draw_rows(pool, "ocr2", "ocr2-python", files, 1)
    again, _ = tokenizing.draw_rows(pool, "ocr2", "ocr2-python", files[::-1], 1)
    other, _ = tokenizing.draw_rows(pool, "ocr2", "ocr2-python", files, 2)
    taken = {path: rows.tolist() for path, rows in first.items()}
    assert sum(map(len, taken.values())) == 25 and all(i % 3 for rows in taken.values() for i in rows)
    assert taken == {path: rows.tolist() for path, rows in again.items()}
    assert taken != {path: rows.tolist() for path, rows in other.items()}
    assert min(map(len, taken.values())) >= 5                                # of both files
    assert counts == {"rows": 95, "dropped: no tests": 40, "dropped: not drawn": 55}


def test_missing_columns_are_named(hub, tmp_path, capsys):
    """Absent in the file: check says so for each part, tokenize stops."""
    copy = tmp_path / "hub"
    shutil.copytree(hub, copy)
    file = copy / "HuggingFaceTB" / "dclm-edu" / "data" / "000_00000.parquet"
    miniatures.write(str(file), [{"text": "a", "edu_score": 3.5}])
    (copy / "open-r1" / "Mixture-of-Thoughts" / "math" / "train-00000-of-00002.parquet").unlink()
    shutil.rmtree(copy / "IFM")
    with pytest.raises(InputError, match="3 of 5 parts.*dclm-edu, mot-math, megamath-web-pro"):
        data.check("dclm-edu:20,mot-math:20,mot-code:20,mot-science:20,megamath-web-pro:20", str(copy))
    out = capsys.readouterr().out
    assert "NO COLUMN edu_int_score (it has text, edu_score)" in out
    assert "has no files math/train-*.parquet" in out and "IFM/MegaMath / LLM360/MegaMath" in out
    data.get("dclm-edu:100", "1B", str(tmp_path / "raw"), str(copy))
    with pytest.raises(InputError, match="no column 'edu_int_score'.*pin the revision"):
        data.tokenize(str(tmp_path / "out"), "toy", "dclm-edu:100", raw=str(tmp_path / "raw"), workers=1)


def test_wrong_types_are_left_out_and_counted(tmp_path, toy):
    """Columns of another type than published: numbers as text and the other way round."""
    raw = tmp_path / "raw"
    miniatures.write(str(raw / "dclm-edu" / "data" / "0.parquet"), [
        {"text": "as text", "edu_int_score": "4"}, {"text": "low", "edu_int_score": "2"},
        {"text": "no", "edu_int_score": "good"}])
    miniatures.write(str(raw / "megamath-web-pro" / "megamath-web-pro" / "0.parquet"),
                     [{"text": 1}, {"text": 2}])
    miniatures.write(str(raw / "mot-math" / "math" / "train-0.parquet"),
                     [{"messages": "q a"}, {"messages": None}])
    data.tokenize(str(tmp_path / "out"), "toy", "dclm-edu:100", raw=str(raw), workers=1, heldout=0)
    assert miniatures.documents(tmp_path / "out", "dclm-edu", toy) == ["as text"]
    for name, reason in (("megamath-web-pro", "'text is not text': 2"),
                         ("mot-math", "'messages is no conversation': 2")):
        with pytest.raises(InputError, match=f"{name}: not one document.*{reason}"):
            data.tokenize(str(tmp_path / "out"), "toy", f"{name}:100", raw=str(raw), workers=1)


# -- own files and damaged ones ----------------------------------------------------------------------------

def test_local_files_of_every_kind(tmp_path, toy):
    own = tmp_path / "own"
    miniatures.write(str(own / "a.parquet"), [{"text": "one", "n": 1}, {"text": None, "n": 2}])
    miniatures.write(str(own / "b.arrow"), [{"messages": miniatures.said("q", "a")}])
    miniatures.write(str(own / "c.jsonl"),
                     [{"question": "why", "answer": "so"}, {"other": 1}, {"content": "c"}])
    miniatures.write(str(own / "d.jsonl.gz"), [{"prompt": "p", "response": "r"}])
    (own / "e.txt").write_text("plain")
    (own / "f.bin").write_text("not taken")
    (own / "deep").mkdir()
    (own / "deep" / "g.md").write_text("# title")
    tokenize(tmp_path / "out", {"mine": own})
    # files in the order of their names, with their folders
    assert miniatures.documents(tmp_path / "out", "mine", toy) == [
        "one", "User: q\nAssistant: a", "why\nso", "c", "p\nr", "# title", "plain"]
    report = shards.Source(str(tmp_path / "out"), "mine").manifest["parts"]["local"]
    assert report["dropped"] == {"no column of text": 1, "text is null": 1} and report["rows"] == 9
    tokenize(tmp_path / "out", {"glob": own / "*.bin"})                      # a glob takes what it names
    assert miniatures.documents(tmp_path / "out", "glob", toy) == ["not taken"]
    for path in (tmp_path / "nothing", own / "*.rs"):
        with pytest.raises(InputError, match="holds no file"):
            tokenize(tmp_path / "out", {"x": path})


def test_texts_as_hostile_as_they_come(tmp_path, toy):
    """No UTF-8 in every kind of file, lone surrogates, broken lines, NUL, special tokens, 10 MB in a row."""
    own = tmp_path / "own"
    own.mkdir()

    def unchecked(*values):
        return pa.StringArray.from_buffers(len(values), *pa.array(values, pa.binary()).buffers()[1:])

    pq.write_table(pa.table({"text": unchecked(b"caf\xe9", b"fine", b"")}), own / "a.parquet")
    nested = pa.StructArray.from_arrays([pa.array(["user", "assistant"]), unchecked(b"q\xff", b"a")],
                                        ["role", "content"])
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays([0, 2], nested)}), own / "b.parquet")
    (own / "c.jsonl").write_bytes(b'{"text": "na\xefve"}\nnot json\n{"text": "\\ud800 lone"}\n[1]\n\n'
                                  b'{"text": "cut')
    (own / "d.txt").write_bytes(b"\xff\xfe\x00raw\x00")
    big = "0123456789 abcdefghij\n" * 500_000
    (own / "e.txt").write_text(big)
    (own / "f.txt").write_text("<|end|></s><|endoftext|>")
    (own / "g.txt").write_text(" " * 2_000_000 + "x")
    tokenize(tmp_path / "out", {"mine": own})
    found = miniatures.documents(tmp_path / "out", "mine", toy)
    assert found[:4] == ["fine", "na�ve", "� lone", "��\0raw\0"]               # of parquet whole rows go
    assert len(big) > 10 ** 7 and found[4] == big
    assert found[5] == "<|end|></s><|endoftext|>" and found[6] == " " * 2_000_000 + "x"
    source = shards.Source(str(tmp_path / "out"), "mine", toy)
    assert all((np.asarray(t) == toy.eos_id).sum() == s["documents"]
               for t, s in zip(source.maps["train"][0], source.splits["train"], strict=True))
    assert source.manifest["parts"]["local"]["dropped"] == {
        "no JSON object": 3, "text is empty": 1, "text is no UTF-8": 2}


@pytest.mark.parametrize("name, damage, says", [
    ("a.parquet", lambda b: b[:-20], "cannot be read"), ("a.parquet", lambda b: b"", "cannot be read"),
    ("a.parquet", lambda b: b"PAR1" + b"x" * 100, "cannot be read"),
    ("a.arrow", lambda b: b[:30], "cannot be read"), ("a.jsonl.gz", lambda b: b[:-9], "cannot be read")])
def test_damaged_files_are_named(tmp_path, name, damage, says):
    path = tmp_path / "own" / name
    miniatures.write(str(path), [{"text": f"line {i}"} for i in range(50)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=says) as e:
        tokenize(tmp_path / "out", {"x": tmp_path / "own"})
    assert name in str(e.value) and "\n" not in str(e.value)


def test_spans_of_a_file_are_the_file(tmp_path):
    """Pieces of every size put together are the whole, each row once and with the same index."""
    rng = random.Random(0)
    rows = [{"text": "x" * rng.randrange(40), "i": i} for i in range(100)]
    for name in ("a.jsonl", "b.parquet", "c.jsonl.gz"):
        path = str(tmp_path / name)
        miniatures.write(path, rows)
        whole = list(read_rows(path, ("text", "i")))
        assert [row["i"] for _, row in whole] == list(range(100)) and len({i for i, _ in whole}) == 100
        for size in (1, 37, 60, 200, 1000, 10 ** 6):
            units = cut_files([path], size)
            assert [x for unit in units for p, span in unit
                    for x in read_rows(p, ("text", "i"), span)] == whole
            assert len(units) > 1 or size > 999 or name == "c.jsonl.gz"
    paths = [str(tmp_path / f"{i}.txt") for i in range(20)]
    for path in paths:
        Path(path).write_text("y" * 10)
    units = cut_files(paths, 35)
    assert [p for unit in units for p, _ in unit] == paths and len(units) == 7


# -- splits, duplicates, tokens ------------------------------------------------------------------------------

def words(rng, n):
    return " ".join(rng.choices(["sum", "of", "the", "line", "42", "x", "return"], k=n))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Short and long documents in several files; every seventh of the short ones is there twice."""
    folder, rng = tmp_path_factory.mktemp("own"), random.Random(1)
    short = [f"{i} {words(rng, 8)}" for i in range(900)]
    for f in range(3):
        part = short[f * 300:(f + 1) * 300] + short[:900:7]
        miniatures.write(str(folder / "short" / f"{f}.jsonl"), [{"text": t} for t in part])
        miniatures.write(str(folder / "long" / f"{f}.parquet"), [{"text": f"{f} {i} {words(rng, 80)}"}
                                                                 for i in range(60)])
    return folder


def test_duplicates_and_splits(own, toy, tmp_path):
    tokenize(tmp_path / "all", {"short": own / "short"}, heldout=0.1)
    train, held = (miniatures.documents(tmp_path / "all", "short", toy, s) for s in ("train", "heldout"))
    texts = list(dict.fromkeys(row["text"] for f in range(3)
                               for _, row in read_rows(str(own / "short" / f"{f}.jsonl"))))
    assert len(train) + len(held) == len(texts) == 900 and 50 < len(held) < 140
    assert [t for t in texts if t in set(train)] == train                    # the first of each, in order
    assert not set(train) & set(held)
    tokenize(tmp_path / "twice", {"short": own / "short"}, heldout=0.1, dedup=False)
    train, held = (miniatures.documents(tmp_path / "twice", "short", toy, s) for s in ("train", "heldout"))
    assert len(train) + len(held) == 900 + 3 * 129 and not set(train) & set(held)


def test_ids_are_the_tokenizers(tmp_path, own):
    """Through tiktoken or not, documents are those of Tokenizer.documents, for a byte-level tokenizer of 300
    ids that has a non-special added token and is saved as tokenizers writes it."""
    import tokenizers
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    rng = random.Random(0)
    backend.train_from_iterator([words(rng, 50) for _ in range(50)], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    backend.add_tokens(["<think>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    slow, fast = load_tokenizer(tmp_path), load_tokenizer(tmp_path)
    texts = [words(rng, 30), "a<think>b</think>", "<s> </s>", "naïve 数学 x²\r\n\t  y", " " * 1_200_000, "",
             "\ud800", "it's 12345 ſ İ"] + ["".join(map(chr, rng.choices(range(0x20, 0xD800), k=50)))
                                            for _ in range(200)]
    want = slow.documents(texts)
    assert fast.faster() == "tiktoken" and "<think>" in fast.guard.pattern
    for tokenizer in (slow, fast):
        assert [ids.tolist() for ids in tokenizer.document_arrays(texts)] == want


def test_tiktoken_is_refused_where_it_would_differ(tmp_path):
    """A token that its own merges do not make, merges out of order, another split: the ids may differ. (Where
    it is taken: the test above.)"""
    import tokenizers
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {c: i for i, c in enumerate(sorted(alphabet))}

    def build(name, merges, extra=(), split=None):
        tokens = dict(vocab)
        for token in (*dict.fromkeys(a + b for a, b in merges), *extra):
            tokens[token] = len(tokens)
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=tokens, merges=merges))
        backend.pre_tokenizer = split or tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.add_special_tokens(["<s>"])
        (tmp_path / name).mkdir()
        backend.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
        return load_tokenizer(tmp_path / name)

    # b c comes first, so abc is never made of ab and c, but tiktoken would make it of a and bc
    assert "'abc'" in build("unmade", [("b", "c"), ("a", "b"), ("ab", "c")]).faster()
    assert "'xyz'" in build("unlisted", [("a", "b")], extra=["xyz"]).faster()
    late = build("late", [("a", "b"), ("b", "c")])
    spec = json.loads(late.files["tokenizer.json"])
    spec["model"]["merges"].reverse()
    (tmp_path / "late" / "tokenizer.json").write_text(json.dumps(spec))
    late = load_tokenizer(tmp_path / "late")
    assert "order of its ids" in late.faster()
    def by(pattern):
        return tokenizers.pre_tokenizers.Sequence([
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    for name, pattern in (("possessive", r"\p{N}{1,3}+|\s+|\S"), ("anchor", r"^[ \t]+|\s+$|\S+|\s")):
        assert "disagree" in build(name, [("a", "b")], split=by(pattern)).faster()
    made = build("made", [("i", "m"), ("im", "p")])
    spec = json.loads(made.files["tokenizer.json"])
    imp = {"id": spec["model"]["vocab"]["imp"], "content": "imp"}
    spec["added_tokens"].append(spec["added_tokens"][0] | imp)
    (tmp_path / "made" / "tokenizer.json").write_text(json.dumps(spec))
    assert "added token" in load_tokenizer(tmp_path / "made").faster()
    toy_tokenizer().save(tmp_path / "toy")               # has no key "normalizer"
    load_tokenizer(tmp_path / "toy").faster()
    split = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Whitespace(),
                                                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert "Whitespace" in build("split", [("a", "b")], split=split).faster()
    assert late.document_arrays(["abc"])[0].tolist() == late.documents(["abc"])[0]


# -- kills and parts -----------------------------------------------------------------------------------------

def call(*args, env=None, **more):
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "data.py"), *args], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, **(env or {})}, **more)


def flags(own, out):
    return ["tokenize", f"--sources=short=local:{own}/short,long=local:{own}/long", "--tokenizer=toy",
            f"--out={out}", "--heldout=0.1", "--workers=2"]


def test_parts_are_the_whole(own, tmp_path, monkeypatch):
    """--part=0/3 .. 2/3 in any order, and any number of workers, end in the same bytes."""
    monkeypatch.setattr(tokenizing, "cut_files", lambda paths, cut=cut_files: cut(paths, 4000))
    both = {"short": own / "short", "long": own / "long"}
    tokenize(tmp_path / "one", both, heldout=0.1)
    for part in ("2/3", "0/3", "1/3"):
        assert not (tmp_path / "three" / "long").exists()
        tokenize(tmp_path / "three", both, heldout=0.1, part=part, workers=2)
        if part == "2/3":
            assert len(list((tmp_path / "three" / "long.work").glob("*.json"))) >= 2         # pieces
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    tokenize(tmp_path / "three", both, heldout=0.1, part="1/3")              # again: nothing to do
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_a_part_that_died_is_made_up_for(own, tmp_path, monkeypatch, capsys):
    """Which pieces are a part's does not depend on what is done already; what is left is named."""
    monkeypatch.setattr(tokenizing, "cut_files", lambda paths, cut=cut_files: cut(paths, 4000))
    both = {"short": own / "short", "long": own / "long"}
    for part in ("0/4", "2/4", "3/4"):
        tokenize(tmp_path, both, part=part)
    assert "short: parts 1/4 have pieces left to do" in capsys.readouterr().out
    tokenize(tmp_path, {"short": own / "short"})                             # one source is done otherwise
    tokenize(tmp_path, both, part="1/4")
    assert sorted(os.listdir(tmp_path)) == ["long", "short"]


def test_parts_that_finish_together(own, tmp_path):
    """Two parts at once: whichever is last puts it together, the other one sees that or leaves it."""
    whole = [call(*flags(own, tmp_path / "both"), f"--part={i}/2") for i in range(2)]
    assert [process.wait(120) for process in whole] == [0, 0], [p.stdout.read() for p in whole]
    tokenize(tmp_path / "one", {"short": f"{own}/short", "long": f"{own}/long"}, heldout=0.1)
    assert contents(tmp_path / "both") == contents(tmp_path / "one")


def test_two_calls_of_one_part_are_refused(own, tmp_path):
    work = tmp_path / "short.work"
    work.mkdir()
    with open(work / "part-0-of-1.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="--part=0/1: another call is preparing it"):
            tokenize(tmp_path, {"short": own / "short"})
    tokenize(tmp_path, {"short": own / "short"})


def test_files_of_one_name_and_size_are_two(tmp_path, toy):
    """part.jsonl in two folders, of one size and time, as an archive unpacks them."""
    for folder, word in (("x", "one"), ("y", "two")):
        path = tmp_path / "own" / folder / "part.jsonl"
        miniatures.write(str(path), [{"text": f"{word} {i:04d} {'z' * 700}"} for i in range(2000)])
        os.utime(path, ns=(10 ** 18, 10 ** 18))
    tokenize(tmp_path / "out", {"mine": tmp_path / "own"})
    assert shards.Source(str(tmp_path / "out"), "mine").manifest["parts"]["local"]["documents"] == 4000


def test_what_is_not_ours_is_left_alone(own, tmp_path, toy):
    """A folder of one's own, or of downloads, in the place of a source."""
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "notes.dat").write_text("mine")
    for write in (lambda: tokenize(tmp_path, {"long": own / "long"}),
                  lambda: shards.write_source(str(tmp_path), "long", {"train": ["a"]}, toy)):
        with pytest.raises(InputError, match="is no prepared source"):
            write()
    assert (tmp_path / "long" / "notes.dat").read_text() == "mine"


def test_a_damaged_source_is_prepared_again(own, tmp_path):
    tokenize(tmp_path, {"long": own / "long"}, heldout=0.1)
    whole = contents(tmp_path)
    (tmp_path / "long" / "heldout-00000.idx").unlink()
    tokenize(tmp_path, {"long": own / "long"}, heldout=0.1)
    assert contents(tmp_path) == whole


def test_one_empty_source_does_not_hold_up_the_others(own, tmp_path):
    miniatures.write(str(tmp_path / "none.jsonl"), [{"other": 1}])
    with pytest.raises(InputError, match="none: not one document"):
        tokenize(tmp_path / "out", {"none": tmp_path / "none.jsonl", "long": own / "long"})
    assert shards.prepared(str(tmp_path / "out")) == ["long"]


def test_rows_of_another_form_do_not_stop(tmp_path, toy):
    raw = tmp_path / "raw"
    path = raw / "starcoder2" / "a.json.gz"
    miniatures.write(str(path), [{"text": "a"}, {"text": ["b"]}, {"text": {"c": 1}}])
    data.tokenize(str(tmp_path / "out"), "toy", "starcoder2:100", raw=str(raw), workers=1, heldout=0)
    odd = [{"messages": [{"role": ["user"], "content": "x"}]}, {"messages": [1]}, {"messages": {"a": 1}},
           {"instruction": "do", "input": "this", "output": "o"},
           {"instruction": "do", "input": "", "output": "o"},
           {"prompt": "p", "completion": "c"}, {"text": 10 ** 400}, {"question": None, "answer": "a"}]
    miniatures.write(str(tmp_path / "own.jsonl"), odd)
    tokenize(tmp_path / "out", {"own": tmp_path / "own.jsonl"})
    assert miniatures.documents(tmp_path / "out", "own", toy) == ["do\nthis\no", "do\no", "p\nc"]
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first"}\n{"text": "second"}\n')
    pq.write_table(pa.table({"text": ["kept"], "when": pa.array([10 ** 18], pa.timestamp("ms")),
                             "kind": pa.array(["x"]).dictionary_encode()}), tmp_path / "c.parquet")
    tokenize(tmp_path / "out", {"bom": tmp_path / "bom.jsonl", "c": tmp_path / "c.parquet"})
    assert miniatures.documents(tmp_path / "out", "bom", toy) == ["first", "second"]
    assert miniatures.documents(tmp_path / "out", "c", toy) == ["kept"]


def big(folder, documents=5000):
    """Files enough for a call of some seconds, in 30 pieces."""
    rng = random.Random(2)
    lines = [words(rng, 60) for _ in range(2000)]
    for name, count in (("short", 24), ("long", 6)):
        for f in range(count):
            texts = [f"{f} {i} {lines[(7 * f + i) % 2000]}" if i % 9 else lines[i % 50]
                     for i in range(documents)]
            text = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            path = Path(folder) / name / f"{f:02d}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def killed_until_done(own, out, rng, longest, kills):
    """Kills the call at random moments (its workers with it, or left to notice) up to so many times, until it
    has ended; how often."""
    n = 0
    while True:
        process = call(*flags(own, out), start_new_session=True)
        try:
            output, _ = process.communicate(timeout=rng.uniform(1.5, longest) if n < kills else 120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9) if n % 2 else process.kill()
            process.communicate()
            n += 1
            continue
        assert process.returncode == 0, output
        return n


@pytest.mark.slow
def test_killed_tokenize_ends_the_same(tmp_path):
    """Killed three times with ever more done, once with its workers."""
    big(tmp_path / "own", 2000)
    tokenize(tmp_path / "whole", {name: tmp_path / "own" / name for name in ("short", "long")}, heldout=0.1)
    out, end = tmp_path / "killed", time.monotonic() + 60
    for pieces in (2, 8, 14):
        process = call(*flags(tmp_path / "own", out), start_new_session=True)
        while process.poll() is None and time.monotonic() < end and (
                len(list(out.glob("*.work/*.json"))) < pieces):
            time.sleep(0.002)
        assert process.poll() is None and not (out / "long").exists()
        os.killpg(process.pid, 9) if pieces == 8 else process.kill()
        process.communicate()
    assert killed_until_done(tmp_path / "own", out, None, None, 0) == 0
    time.sleep(1)                                        # workers of killed calls have noticed by now
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_tokenize_killed_twenty_times(tmp_path):
    big(tmp_path / "own")
    assert call(*flags(tmp_path / "own", tmp_path / "whole")).wait(120) == 0
    whole, rng, kills, out = contents(tmp_path / "whole"), random.Random(1), 0, 0
    while kills < 20:
        kills += killed_until_done(tmp_path / "own", tmp_path / f"{out}", rng, 6, 20 - kills)
        assert contents(tmp_path / f"{out}") == whole
        out += 1


def test_changes_are_prepared_again(own, toy, tmp_path):
    """A changed file, filter or setting is noticed; what did not change is left alone."""
    mine = tmp_path / "mine"
    shutil.copytree(own, mine)
    both, out = {"short": mine / "short", "long": mine / "long"}, tmp_path / "out"
    tokenize(out, both)
    before = {name: (out / name / "manifest.json").stat().st_mtime_ns for name in both}
    miniatures.write(str(mine / "long" / "0.parquet"), [{"text": "changed"}])
    tokenize(out, both)
    after = {name: (out / name / "manifest.json").stat().st_mtime_ns for name in both}
    assert before["short"] == after["short"] and before["long"] != after["long"]
    assert "changed" in miniatures.documents(out, "long", toy)
    tokenize(out, both, heldout=0.1)
    assert shards.Source(str(out), "short").splits.keys() == {"train", "heldout"}


def test_workers_have_a_state_and_their_death_is_named():
    with workers(2, int, ("5",)) as pool:
        assert list(pool.map(operator.add, range(20))) == list(range(5, 25))
    with pytest.raises(InputError, match="--workers=1: a worker was killed, most likely for memory; again"):
        with workers(1, int, ("5",), "again") as pool:
            pool.submit(os._exit).result()


# -- what is made again, and what is not ---------------------------------------------------------------------

READER = '''
"""A reader."""
import re
from corpus.formats import Drop, text_of

LEAST = 3
PATTERN = re.compile("a+")

def helper(row):
    """What it does."""
    return row["score"] >= LEAST       # the paper's

def reader(row, column="text"):
    if not helper(row):
        raise Drop(f"score below {LEAST}")
    return PATTERN.sub("b", text_of(row, column))

def other(row):
    return row
'''


def code_of_reader(tmp_path, *edits):
    """code_of(reader) with READER edited."""
    text = READER
    for before, after in edits:
        assert before in text
        text = text.replace(before, after)
    path = tmp_path / f"reader_{len(os.listdir(tmp_path))}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"corpus.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                      # where inspect looks for the source
    spec.loader.exec_module(module)
    del sys.modules[spec.name]
    return code_of(module.reader)


@pytest.mark.parametrize("edits, same", [
    ([("# the paper's", "# paper, section 3")], True), ([("What it does.", "")], True),
    ([('"""A reader."""', "")], True), ([('f"score below {LEAST}"', '"too low"')], True),
    ([("return row\n", "return None\n")], True),         # of a function that the reader does not reach
    ([("    if not helper(row):", "\n\n    if not (helper(row)):")], True),
    ([("LEAST = 3", "LEAST = 4")], False), ([(">= LEAST", "> LEAST")], False), ([('"a+"', '"a"')], False),
    ([('column="text"', 'column="content"')], False),
    ([('raise Drop(f"score below {LEAST}")', "pass")], False),
    ([("import Drop, text_of", "import Drop, number_of as text_of")], False)])
def test_code_of_a_reader(tmp_path, edits, same):
    assert (code_of_reader(tmp_path, *edits) == code_of_reader(tmp_path)) == same


def test_code_of_partials_and_modules(tmp_path):
    assert code_of(partial(text_of, column="a")) != code_of(partial(text_of, column="b"))
    assert code_of(partial(text_of, column="a")) == code_of(partial(text_of, column="a"))
    assert "embedded world" not in code_of(world) and "LUCKY = 0.25" in code_of(world)


def test_only_a_changed_rule_makes_a_source_again(tmp_path):
    """A comment, a docstring or a message of a reader changes nothing; a rule its own source alone."""
    copy, raw = tmp_path / "checkout", tmp_path / "raw"
    for name in ("corpus", "grading", "presets"):
        shutil.copytree(Path(ROOT) / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli", "data", "verify"):
        shutil.copy(Path(ROOT) / f"{name}.py", copy)
    rows = [miniatures.dclm("three", 3), miniatures.dclm("four", 4), miniatures.dclm("two", 2)]
    miniatures.write(str(raw / "dclm-edu" / "data" / "0.parquet"), rows)
    miniatures.write(str(raw / "megamath-web-pro" / "megamath-web-pro" / "0.parquet"), [{"text": "x = 1"}])

    def prepared_already():
        done = subprocess.run(
            [sys.executable, copy / "data.py", "tokenize", "--mixture=dclm-edu:50,megamath-web-pro:50",
             "--tokenizer=toy", f"--raw={raw}", f"--out={tmp_path / 'out'}", "--workers=1", "--heldout=0"],
            cwd=copy, capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
        assert done.returncode == 0, done.stderr
        return re.findall(r"(\S+): prepared already", done.stdout)

    def change(file, before, after):
        text = (copy / file).read_text()
        assert before in text
        (copy / file).write_text(text.replace(before, after))

    assert prepared_already() == []
    change("corpus/formats.py", '"""Documents of quality score', '# A comment.\n    """Documents of a score')
    change("corpus/formats.py", 'raise Drop("score below 3")', 'raise Drop("low score")')
    change("corpus/files.py", "cannot be read (", "is not readable (")
    change("corpus/hub.py", "the hub has no such data set", "no such data set is on the hub")
    change("corpus/registry.py", 'dclm_edu, licence="cc-by-4.0"', 'dclm_edu, licence="as its card says"')
    assert prepared_already() == ["dclm-edu", "megamath-web-pro"]
    change("corpus/formats.py", 'number_of(row, "edu_int_score") < 3', 'number_of(row, "edu_int_score") < 4')
    assert prepared_already() == ["megamath-web-pro"]
    assert miniatures.documents(tmp_path / "out", "dclm-edu", toy_tokenizer()) == ["four"]
    change("corpus/formats.py", "READERS = 1", "READERS = 2")
    assert prepared_already() == []


# -- refusals ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more, says", [
    (dict(sources="a=b"), "'a=b' is not name=local:path"),
    (dict(sources="local:x"), "is not name=local:path"), (dict(sources="a.work=local:x"), "is not name="),
    (dict(sources="a=local:x,a=local:y"), "a is there twice"),
    (dict(sources="../a=local:x"), "is not name=local:path"), (dict(), "--mixture or --sources"),
    (dict(mixture="dclm-edu:100", part="3/3"), "--part=3/3"),
    (dict(mixture="dclm-edu:100", part="x"), "--part=x"),
    (dict(mixture="dclm-edu:100", heldout=1.0), "--heldout=1.0"), (dict(mixture="notes:100"), "local:folder"),
    (dict(mixture="dclm-ed:100"), "did you mean 'dclm-edu'"),
    (dict(mixture="dclm-edu:100", raw="nowhere"), "run `python data.py get` first"),
    (dict(mixture="dclm-edu:100", tokenizer="gpt5"), "--tokenizer='gpt5'"),
    (dict(mixture="dclm-edu:100", tokenizer="llama-3.1-8"), "did you mean 'llama-3.1-8b'"),
    (dict(mixture="math+cod"), "did you mean 'math+code'")])
def test_bad_flags_of_tokenize(tmp_path, more, says):
    with pytest.raises(InputError) as e:
        data.tokenize(str(tmp_path), **{"tokenizer": "toy"} | more)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_mixed_folders_are_refused(own, tmp_path, toy):
    tokenize(tmp_path, {"long": own / "long"})
    manifest = tmp_path / "long" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(toy.fingerprint, "0" * 64))
    with pytest.raises(InputError, match="another tokenizer"):
        tokenize(tmp_path, {"short": own / "short"})
    (tmp_path / "long").rename(tmp_path / "work.tmp-1")
    tokenize(tmp_path, {"short": own / "short"})
    (tmp_path / "work.tmp-1").rename(tmp_path / "long")
    with pytest.raises(InputError, match="mixes sources of 2 tokenizers"):
        data.stats(str(tmp_path))
    with pytest.raises(InputError, match="holds no prepared source"):
        data.stats(str(tmp_path / "none"))


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("room", ["16k", "64k", "96k"])
def test_full_disk(room, own, tmp_path):
    """One line, whichever file had no room, and the same call goes on when there is some."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "x", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount")
    try:
        process = call(*flags(own, disk / "out"))
        out, _ = process.communicate(timeout=60)
        assert process.returncode and "--out=" in out and "No space left" in out and "it goes on" in out, out
        assert "Traceback" not in out
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert call(*flags(own, disk / "out")).wait(60) == 0
        tokenize(tmp_path / "out", {"short": own / "short", "long": own / "long"}, heldout=0.1)
        assert contents(disk / "out") == contents(tmp_path / "out")
    finally:
        subprocess.run(["umount", disk])


# -- get -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A folder hub whose DCLM-EDU has 40 files of one size."""
    folder = tmp_path_factory.mktemp("sharded")
    for i in range(40):
        miniatures.write(str(folder / "HuggingFaceTB" / "dclm-edu" / "data" / f"{i:03d}_00000.parquet"),
                         [miniatures.dclm(f"{i} {j}", 3) for j in range(10)])
    return folder


def files(raw, name="dclm-edu"):
    return sorted(p.name for p in (Path(raw) / name).rglob("*.parquet"))


def test_get_takes_what_the_plan_needs(sharded, tmp_path):
    """Of 111.46 B tokens in 40 files: files for the need and a tenth more, from all over, more when asked."""
    for tokens, count in (("1B", 1), ("10B", 4), ("20B", 8), ("50B", 20), ("111B", 40)):
        data.get("dclm-edu:100", tokens, str(tmp_path / tokens), str(sharded))
        assert len(files(tmp_path / tokens)) == count
    assert files(tmp_path / "20B") != sorted(os.listdir(sharded / "HuggingFaceTB" / "dclm-edu" / "data"))[:8]
    assert set(files(tmp_path / "10B")) < set(files(tmp_path / "50B"))
    kept = (tmp_path / "10B" / "dclm-edu" / "data" / files(tmp_path / "10B")[0])
    stamp = kept.stat().st_mtime_ns
    data.get("dclm-edu:100", "20B", str(tmp_path / "10B"), str(sharded))  # grows
    assert files(tmp_path / "10B") == files(tmp_path / "20B") and kept.stat().st_mtime_ns == stamp
    data.get("dclm-edu:100", "1B", str(tmp_path / "10B"), str(sharded))   # never shrinks
    assert files(tmp_path / "10B") == files(tmp_path / "20B")
    data.get("dclm-edu:100", "20B", str(tmp_path / "seed"), str(sharded), seed=2)
    assert files(tmp_path / "seed") != files(tmp_path / "20B")
    with pytest.raises(InputError, match="--seed=2, not 1"):
        data.get("dclm-edu:100", "20B", str(tmp_path / "seed"), str(sharded))
    kept.unlink()
    with pytest.raises(InputError, match=r"is missing \(1 of 8 files are\)"):
        data.tokenize(str(tmp_path / "out"), "toy", "dclm-edu:100", raw=str(tmp_path / "10B"), workers=1)


def test_plan_counts_files_and_epochs(sharded, own, tmp_path, capsys):
    data.plan("dclm-edu:100", "20B", hub=str(sharded))
    out = capsys.readouterr().out
    assert "8 of 40" in out and "HuggingFaceTB/dclm-edu" in out
    data.plan("refinecode:50,starcoder2:50", "20B")
    assert "stands in for RefineCode" in capsys.readouterr().out
    tokenize(tmp_path, {"short": own / "short"})
    tokens = shards.Source(str(tmp_path), "short").tokens()
    data.plan("short:50,other:50", str(tokens * 12), seq_len=64, data=str(tmp_path))     # of what is prepared
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert " 6 " in lines["short"] and "more than 4 times" in lines["short"] and "?" in lines["other"]


def test_ranks_leave_getting_to_the_first(sharded, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    data.get("dclm-edu:100", "1B", str(tmp_path / "raw"), str(sharded))
    assert not (tmp_path / "raw").exists()


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The hub's HTTP interface over a folder, for huggingface_hub itself: trees, ranges, 429, gates."""
    protocol_version, sha = "HTTP/1.1", "a" * 40

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        import hashlib
        server, path = self.server, unquote(urlparse(self.path).path)
        server.seen.append((self.command, path, self.headers.get("Range")))
        if server.trouble and "resolve" in path and self.command == "GET":
            status, headers = server.trouble.pop()
            return self.reply(status, **headers)
        words = path.strip("/").split("/")
        api = words[0] == "api"
        repo, rest = "/".join(words[2 if api else 1:4 if api else 3]), words[4 if api else 3:]
        top = os.path.join(server.folder, repo)
        if repo in server.gated:
            return self.reply(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="gated")
        if not os.path.isdir(top):
            return self.reply(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="not found")
        if api and rest[:1] == ["revision"]:
            return self.json({"id": repo, "sha": self.sha if rest[1] == "main" else rest[1], "siblings": [],
                              "tags": [], "private": False, "downloads": 0, "likes": 0})
        if api and rest[:1] == ["tree"]:
            start = os.path.join(top, *rest[2:])
            found = [os.path.join(d, f) for d, _, names in os.walk(start) for f in names]
            return self.json([{"type": "file", "path": os.path.relpath(f, top), "size": os.path.getsize(f),
                               "oid": "0" * 40, "lfs": {
                                   "oid": hashlib.sha256(Path(f).read_bytes()).hexdigest(),
                                   "size": os.path.getsize(f), "pointerSize": 100}} for f in found])
        if not api and rest[:1] == ["resolve"]:
            time.sleep(server.delay)
            body = Path(top, *rest[2:]).read_bytes()
            digest = hashlib.sha256(body).hexdigest()
            if server.corrupt:
                server.corrupt -= 1
                body = b"?" + body[1:]
            asked = self.headers.get("Range")
            headers = dict(ETag=f'"{digest}"', X_Linked_Etag=f'"{digest}"', X_Linked_Size=len(body),
                           X_Repo_Commit=self.sha, Accept_Ranges="bytes")
            if asked:
                a, _, b = asked.removeprefix("bytes=").partition("-")
                part = body[int(a):int(b) + 1 if b else None]
                return self.reply(206, part, **headers,
                                  Content_Range=f"bytes {a}-{int(a) + len(part) - 1}/{len(body)}")
            return self.reply(200, body, **headers)
        return self.reply(404, b"{}")

    def json(self, value):
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")


@pytest.fixture
def online(hub):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.folder, server.gated, server.trouble, server.seen, server.corrupt = hub, set(), [], [], 0
    server.delay = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()


ONLINE = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def over_http(tmp_path, *args):
    process = Process(f"{tmp_path}.output", *args, stage="data", **ONLINE)
    return process.wait(120), process.text("stdout") + process.text("stderr")


def test_get_over_http(online, raw, tmp_path):
    """Through huggingface_hub: the same files as from the folder, 429 and 503 waited for, damage noticed."""
    online.trouble = [(429, {"Retry_After": "0"}), (503, {})]
    mixture = "--mixture=dclm-edu:20,ocr2:40,megamath-web-pro:40"
    code, out = over_http(tmp_path, "get", mixture, f"--hub={online.url}", f"--raw={tmp_path}", "--tokens=1B")
    assert code == 0, out
    for name in ("dclm-edu", "ocr2-python", "ocr2-cpp", "questions-taco", "megamath-web-pro"):
        want = {k: v for k, v in contents(Path(raw) / name).items() if k != "get.json"}
        got = {k: v for k, v in contents(tmp_path / name).items() if k != "get.json" and ".cache" not in k}
        assert got == want
        own, other = ({**lock, "files": [{**f, "sha256": "sha256" in f} for f in lock["files"]]}
                      for lock in (read_lock(where / name) for where in (tmp_path, Path(raw))))
        assert own == {**other, "files": [{**f, "sha256": True} for f in other["files"]]}
    online.seen.clear()
    code, out = over_http(tmp_path, "get", mixture, f"--hub={online.url}", f"--raw={tmp_path}", "--tokens=1B")
    assert code == 0 and not [path for command, path, _ in online.seen if "resolve" in path], out


def test_killed_get_goes_on(online, sharded, tmp_path):
    """Files that had arrived are left alone, the others come; none is ever there in part."""
    online.folder, online.delay = str(sharded), 0.05
    flags = ("get", "--mixture=dclm-edu:100", "--tokens=111B", f"--hub={online.url}", f"--raw={tmp_path}")
    process = call(*flags, env=ONLINE)
    end = time.monotonic() + 60
    while len(files(tmp_path)) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    had = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "dclm-edu" / "data").glob("*.parquet")}
    assert 5 <= len(had) < 40
    online.delay = 0
    code, out = over_http(tmp_path, *flags)
    assert code == 0, out
    for file in (sharded / "HuggingFaceTB" / "dclm-edu" / "data").iterdir():
        copy = tmp_path / "dclm-edu" / "data" / file.name
        assert copy.read_bytes() == file.read_bytes()
        assert copy.stat().st_mtime_ns == had.get(file.name, copy.stat().st_mtime_ns)


def test_check_over_http_reads_a_footer(online, tmp_path):
    code, out = over_http(tmp_path, "check", "--mixture=dclm-edu:50,starcoder2:50", f"--hub={online.url}")
    assert code == 0 and "dclm-edu" in out and "edu_int_score int64" in out and "text str" in out, out


def test_gates_and_absences_are_named(online, tmp_path):
    online.gated = {"HuggingFaceTB/dclm-edu"}
    code, out = over_http(tmp_path, "get", "--mixture=dclm-edu:100", f"--hub={online.url}",
                          f"--raw={tmp_path}")
    assert code == 2 and "HuggingFaceTB/dclm-edu is gated" in out and "HF_TOKEN" in out, out
    assert "Traceback" not in out
    code, out = over_http(tmp_path, "get", "--mixture=codex:100", f"--hub={online.url}/nothing",
                          f"--raw={tmp_path}")
    assert code == 2 and "Traceback" not in out and "Modotte/CodeX-2M-Thinking" in out, out


def test_damaged_download_is_noticed(online, tmp_path):
    online.corrupt = 10
    flags = ("get", "--mixture=dclm-edu:100", f"--hub={online.url}", f"--raw={tmp_path}")
    code, out = over_http(tmp_path, *flags)
    assert code == 2 and "arrived damaged" in out and "Traceback" not in out, out
    online.corrupt = 0
    code, out = over_http(tmp_path, *flags)
    assert code == 0, out


# -- packing -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("overlap, shortest", [(0, 0), (3, 0), (0, 6), (15, 2)])
def test_packed_rows_lose_nothing(overlap, shortest):
    rng = random.Random(overlap)
    lengths = [rng.choice([1, 2, 5, 15, 16, 17, 33, 100, rng.randrange(1, 60)]) for _ in range(400)]
    pieces, rows = shards.packed_rows(lengths, 16, overlap, shortest)
    total = sum(lengths)
    seen = np.zeros(total, dtype=int)
    in_order = sorted(pieces.tolist())
    for start, length in in_order:
        assert 1 <= length <= 16
        seen[start:start + length] += 1
    starts = np.cumsum(lengths) - lengths
    for start, length in zip(starts, lengths, strict=True):
        mine = seen[start:start + length]
        if length < max(shortest, 1):
            assert not mine.any()
            continue
        parts = [p for p in in_order if start <= p[0] < start + length]
        assert mine.all() and parts[0][0] == start and sum(parts[-1]) == start + length
        assert all(b[0] == sum(a) - overlap for a, b in zip(parts, parts[1:], strict=False))
        assert (mine > 1).sum() <= overlap * (len(parts) - 1) and (overlap or not (mine > 1).any())
    filled = [int(pieces[a:b, 1].sum()) for a, b in zip(rows[:-1], rows[1:], strict=True)]
    assert all(0 < f <= 16 for f in filled) and rows[-1] == len(pieces)
    want = shards.best_fit(pieces[:, 1], 16).max() + 1
    assert len(rows) - 1 == want


def test_packed_documents_in_batches(own, toy, tmp_path):
    """A packed row is whole documents and padding that counts nowhere; every token is an input once."""
    tokenize(tmp_path, {"short": own / "short", "long": own / "long"})
    with pytest.raises(InputError, match="is not packed for --seq_len=512; run `python data.py pack"):
        data.Stream(str(tmp_path), {"long": 100}, 1, 512, toy, 512, packing="bfd")
    data.pack(str(tmp_path), 512, "bfd", min_tokens=20)
    stream = data.Stream(str(tmp_path), {"short": 40, "long": 60}, 1, 512, toy, 512, packing="bfd")
    for which, source in enumerate(stream.sources):
        n, found = source.rows(512), collections.Counter()
        wanted = collections.Counter(t for t in miniatures.documents(tmp_path, source.name, toy)
                                     if len(toy.document(t)) >= 20)
        batch = data.collate([source.row(i, 512) for i in range(n)], [which] * n, False)
        for tokens, targets, docs in zip(batch.tokens, batch.targets, batch.docs, strict=True):
            padding = 0
            for d in range(docs.max() + 1):
                mine = tokens[docs == d]
                if (targets[docs == d] == -100).all() and not mine.any():
                    padding += 1
                    continue
                assert mine[-1] == toy.eos_id and (targets[docs == d][:-1] == mine[1:]).all()
                assert targets[docs == d][-1] == -100
                found[toy.decode(mine[:-1].tolist())] += 1
            assert padding <= 1
        assert found == wanted
    data.pack(str(tmp_path), 512, "bfd")
    assert data.Stream(str(tmp_path), {"long": 100}, 1, 512, toy, 512, packing="bfd").fingerprint() != \
        data.Stream(str(tmp_path), {"long": 100}, 1, 512, toy, 512).fingerprint()
    with open(tmp_path / "long" / "packed-512.bin", "r+b") as f:
        f.write(b"\1")
    with pytest.raises(InputError, match="packed-512.bin is corrupted; pack again"):
        data.Stream(str(tmp_path), {"long": 100}, 1, 512, toy, 512, packing="bfd")
    tokenize(tmp_path, {"long": own / "long"}, heldout=0.1)
    with pytest.raises(InputError, match="is not packed"):
        data.Stream(str(tmp_path), {"long": 100}, 1, 512, toy, 512, packing="bfd")


@pytest.mark.parametrize("flags, says", [
    (dict(method="best"), "--method='best'"), (dict(seq_len=1), "--seq_len=1"),
    (dict(overlap=16), "--overlap=16 from 0 to 15"), (dict(min_tokens=10 ** 6), "leaves no document")])
def test_bad_flags_of_pack(own, tmp_path, flags, says):
    tokenize(tmp_path, {"long": own / "long"})
    with pytest.raises(InputError, match=says):
        data.pack(str(tmp_path), **{"seq_len": 16, "method": "bfd"} | flags)


# -- trained on --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packing", ["concat", "bfd"])
def test_shares_are_exact_whatever_the_lengths(own, toy, tmp_path, packing):
    """Documents ten times as long in one source as in the other: tokens trained are as the weights ask."""
    tokenize(tmp_path / "data", {"short": own / "short", "long": own / "long"}, heldout=0.1)
    means = {name: shards.Source(str(tmp_path / "data"), name).lengths().mean() for name in ("short", "long")}
    assert 7 < means["long"] / means["short"] < 14
    if packing == "bfd":
        data.pack(str(tmp_path / "data"), 64, "bfd")
    cfg = midtrain.Config(**midtrain.TOY | dict(
        model="toy", data=str(tmp_path / "data"), mixture="short:70,long:30", run=str(tmp_path / "run"),
        steps=5, batch=8, micro_batch=8, seq_len=64, warmup=1, eval_every=0, checkpoint_every=0,
        packing=packing, device="cpu", dtype="float32"))
    result = midtrain.main(cfg)
    assert result["tokens"] == {"short": 0.7 * 5 * 8 * 64, "long": 0.3 * 5 * 8 * 64}
