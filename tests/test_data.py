"""Data: the paper's shares row by row, an order nothing can disturb, shards against plain lists, refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from processes import Process

import data
import midtrain
from cli import InputError
from corpus import registry, shards, tokenizing, world
from corpus.tokenizer import toy_tokenizer

# What the tests expect of a mixture is written down here a second time, from the paper (figure 2, table 1).
FIGURE_2 = {                         # percent in math, math+code, math+code+science; 0 = not in it
    "dclm-edu": (15, 5, 5), "chat": (10, 5, 5),
    "megamath-web-pro": (55, 27.5, 20), "nemotron-math": (10, 10, 10), "mot-math": (10, 10, 7),
    "mot-code": (0, 5, 3), "ocr2": (0, 10, 10), "refinecode": (0, 13.75, 13.75),
    "starcoder2": (0, 13.75, 13.75), "openthoughts3-science": (0, 0, 7.75), "mot-science": (0, 0, 4.75),
}
PAPER = ("math", "math+code", "math+code+science")
ROOT = Path(data.__file__).parent
TINY = {"a": 50, "b": 30, "c": 20}   # a period of 10 rows
THIRDS = "a:33.333333,b:33.333333,c:33.333334"


class Numbers:
    """A tokenizer whose texts are ids spelled out: a test sees in a row where it comes from."""

    def __init__(self, vocab_size=70_000, fingerprint="numbers, first edition"):
        self.vocab_size, self.fingerprint = vocab_size, fingerprint

    def document(self, text):
        return [int(word) for word in text.split()]


def numbers(*lengths):
    """Texts for Numbers of these lengths; laid end to end they count 0, 1, 2, ..."""
    ends = np.cumsum(lengths)
    return [" ".join(map(str, range(end - n, end))) for end, n in zip(ends, lengths, strict=True)]


def words(name, count, seed=0):
    """Texts of 0 to 12 words, all different but for the empty ones."""
    rng = Random(f"{name} {seed}")
    return [" ".join([name, str(i)] + rng.choices(["sum", "of", "the", "line", "42"], k=rng.randrange(12)))
            if rng.random() < 0.9 else "" for i in range(count)]


@pytest.fixture(scope="module")
def toy():
    return toy_tokenizer()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, toy):
    """A folder with a, b and c of different sizes, in several shards each."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    for name, count in (("a", 60), ("b", 35), ("c", 25)):
        shards.write_source(folder, name, {"train": words(name, count)}, toy, shard_tokens=100)
    return folder


def stream(folder, toy, mixture=None, seed=1, T=16, **more):
    return data.Stream(folder, mixture or TINY, seed, T, toy, toy.vocab_size, **more)


def same(one, other):
    for field in ("tokens", "targets", "docs", "source"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), field)


# -- mixtures ----------------------------------------------------------------------------------------------

def test_mixtures_are_the_papers():
    for i, name in enumerate(PAPER):
        assert data.MIXTURES[name] == {s: percents[i] for s, percents in FIGURE_2.items() if percents[i]}
    assert set(registry.REGISTRY) - {"codex"} == set(FIGURE_2) == set(world.SOURCES)
    tokens = {"dclm-edu": 2.51, "nemotron-math": 5.08, "megamath-web-pro": 4.33, "starcoder2": 37.52,
              "codex": 3.86}                                                 # table 18
    for source, percent in data.MIXTURES["long-context"].items():
        assert abs(percent - 100 * tokens[source] / sum(tokens.values())) < 0.01


@pytest.mark.parametrize("name, sums", [("math", (25, 75, 0, 0)), ("math+code", (10, 47.5, 42.5, 0)),
                                        ("math+code+science", (10, 37, 40.5, 12.5)),
                                        ("base", (56, 4, 38, 2))])
def test_domain_sums(name, sums):
    found = dict.fromkeys(("general", "math", "code", "science"), 0)
    for source, percent in data.MIXTURES[name].items():
        domain = registry.REGISTRY[source].domain
        found["general" if domain == "chat" else domain] += percent         # the paper counts chat as general
    assert tuple(found.values()) == sums and sum(sums) == 100


@pytest.mark.parametrize("seed", [0, 1, 1234, 2 ** 40])
@pytest.mark.parametrize("name", [*PAPER, "base"])
def test_every_400_rows_hold_the_shares_exactly(name, seed):
    want = [4 * percent for percent in data.MIXTURES[name].values()]
    for first in (0, 7, 10 ** 6):
        rows = data.row_sources(name, seed, 400 * first, 400 * 20).reshape(20, 400)
        assert all(np.bincount(period).tolist() == want for period in rows)


def test_tokens_and_epochs_of_the_papers_run():
    """25,000 steps of 128 rows of 8,192: the epochs that MIDTRAIN.md works out from table 1."""
    mixture = data.MIXTURES["math+code+science"]
    rows = dict(zip(mixture, data.planned_rows(mixture, 1, 25_000 * 128), strict=True))
    want = {"mot-math": 3.06, "mot-science": 2.96, "openthoughts3-science": 2.78, "ocr2": 2.34,
            "mot-code": 0.67, "megamath-web-pro": 0.36, "nemotron-math": 0.07, "dclm-edu": 0.012,
            "refinecode": 0.019}
    for name, epochs in want.items():
        found = rows[name] * 8192 / (registry.REGISTRY[name].tokens * 1e9)
        assert abs(found - epochs) < (0.005 if epochs > 0.05 else 0.0005)


@pytest.mark.parametrize("text, rows", [
    ("a:100", [1]), ("a:50,b:50", [1, 1]), ("a:12.5, b:87.5", [1, 7]), ("a:0.01,b:99.99", [1, 9999]),
    (THIRDS, [3333, 3333, 3334]), ("a:1e2", [1]),
    ("a:33.3333333,b:33.3333333,c:33.3333333", [3334, 3333, 3333]),
])
def test_period_rows_by_hand(text, rows):
    assert data.period_rows(data.read_mixture(text)).tolist() == rows


def test_period_rows_of_odd_mixtures():
    rng = Random(0)
    for _ in range(300):
        weights = [rng.random() ** 3 + 1e-3 for _ in range(rng.randint(1, 9))]
        digits = rng.choice([1, 3, 17])
        mixture = {str(i): round(100 * w / sum(weights), digits) or 0.1 for i, w in enumerate(weights)}
        rows, total = data.period_rows(mixture), sum(Fraction(str(p)) for p in mixture.values())
        exact = [Fraction(str(p)) / total * int(rows.sum()) for p in mixture.values()]
        assert all(abs(int(n) - e) < 1 for n, e in zip(rows, exact, strict=True))
        assert rows.sum() == 10_000 or (rows.sum() < 10_000 and [int(n) for n in rows] == exact)


def test_read_mixture():
    assert data.read_mixture("math") == data.MIXTURES["math"]
    assert data.read_mixture("chat:25, ocr2:75") == {"chat": 25, "ocr2": 75}
    assert list(data.read_mixture("z:1,a:99")) == ["z", "a"]                 # the order written, not sorted


@pytest.mark.parametrize("text, says", [
    ("math+cod", "did you mean 'math+code'"), ("mat", "did you mean 'math'"),
    ("", "known: math, math+code, "), ("zzz", "source:percent"),
    ("chat:40,ocr2:50", "sum to 90"), ("chat:60,ocr2:50", "sum to 110"),
    ("chat:-20,ocr2:120", "must be positive"), ("chat:0,ocr2:100", "must be positive"),
    ("chat:ten", "'chat:ten'"), ("chat:100,", "''"), ("chat:50,ocr2 50", "'ocr2 50'"),
    ("chat:50,50", "'50'"), (":100", "':100'"), ("chat:nan", "sum to nan"),
    ("chat:100,ocr2:nan", "sum to nan"), ("chat:inf", "sum to inf"),
])
def test_bad_mixtures_are_refused(text, says):
    with pytest.raises(InputError, match=re.escape(says)) as e:
        data.read_mixture(text)
    assert "--mixture" in str(e.value)


# -- the order of rows -------------------------------------------------------------------------------------

def test_golden_order():
    """A release that changes one of these numbers changes every run under way."""
    key = np.uint64(0x0123456789ABCDEF)
    assert data.row_sources("math+code+science", 1, 0, 20).tolist() == \
        [0, 7, 2, 3, 2, 9, 6, 7, 7, 4, 3, 2, 8, 7, 7, 1, 9, 9, 2, 7]
    assert data.row_sources("math", 7, 10 ** 9, 20).tolist() == \
        [2, 2, 1, 4, 1, 2, 0, 3, 2, 2, 0, 3, 2, 2, 2, 2, 2, 0, 2, 4]
    assert [data.permuted(k, 20, key) for k in range(20)] == \
        [16, 2, 11, 3, 15, 10, 8, 14, 13, 17, 4, 6, 7, 9, 5, 1, 12, 19, 18, 0]
    assert [data.permuted(k, 10 ** 9, key) for k in range(3)] == [226228486, 40708782, 164347673]


def test_golden_rows(tmp_path):
    """The same for what is read in the end: (source, row) of each global row, over several epochs of each."""
    for name, rows in (("a", 7), ("b", 5), ("c", 3)):
        shards.write_source(str(tmp_path), name, {"train": numbers(4 * rows + 1)}, Numbers())
    b = data.Stream(str(tmp_path), TINY, 1, 4, Numbers(), 70_000).read(0, 30)
    assert " ".join("abc"[s] + str(t // 4) for s, t in zip(b.source, b.tokens[:, 0], strict=True)) == \
        "a5 a3 a2 a0 b3 b1 c1 b2 a6 c0 b0 b4 a4 a1 a2 b3 a3 c2 c0 a0 a1 a4 b1 b0 a5 c1 c2 b4 a6 a4"


@pytest.mark.parametrize("mixture, total", [("math+code+science", 12_000), ("math", 2000), (TINY, 1000),
                                            ({"a": 100}, 200), (data.read_mixture(THIRDS), 24_000)])
def test_windows_are_slices(mixture, total):
    whole, rng = data.row_sources(mixture, 3, 0, total), Random(0)
    windows = [(0, 0), (total, 0), (0, total), (total - 1, 1), (19, 2), (20, 20), (total // 2 - 1, 2)]
    windows += [(start, rng.randint(0, total - start)) for start in (rng.randrange(total) for _ in range(40))]
    for start, count in windows:
        np.testing.assert_array_equal(data.row_sources(mixture, 3, start, count), whole[start:start + count])


def test_seeds_and_periods_differ():
    rows = {(seed, first): data.row_sources("math+code+science", seed, 400 * first, 400).tobytes()
            for seed in range(6) for first in range(6)}
    assert len(set(rows.values())) == 36
    by_dict = data.row_sources(data.MIXTURES["math+code+science"], 0, 0, 400)
    assert rows[0, 0] == by_dict.tobytes()                                   # as by its name


@pytest.mark.parametrize("mixture", [*map(data.read_mixture, (*PAPER, THIRDS)), TINY])
def test_planned_rows_are_counted_rows(mixture):
    for seed in (1, 2):
        rows = data.row_sources(mixture, seed, 0, 20_500)
        for count in (0, 1, 9, 10, 19, 20, 399, 400, 401, 1234, 9_999, 10_000, 10_001, 20_000, 20_500):
            want = [int((rows[:count] == i).sum()) for i in range(len(mixture))]
            assert data.planned_rows(mixture, seed, count).tolist() == want


@pytest.mark.parametrize("key", [np.uint64(0), np.uint64(5), np.uint64(2 ** 64 - 1)])
def test_permuted_is_a_bijection(key):
    for n in [*range(1, 71), 127, 128, 129, 257, 1000]:
        assert sorted(data.permuted(k, n, key) for k in range(n)) == list(range(n))


def test_permuted_shuffles():
    n, keys = 1000, [np.uint64(k) for k in range(4)]
    orders = [[data.permuted(k, n, key) for k in range(n)] for key in keys]
    assert len({tuple(order) for order in orders}) == len(keys)
    for order in map(np.array, orders):
        # both are n / 3 on average for a fair shuffle, give or take 8; an order with any drift is far off
        assert abs(np.abs(order - np.arange(n)).mean() - n / 3) < 40
        assert abs(np.abs(np.diff(order)).mean() - n / 3) < 40
        assert (order == np.arange(n)).sum() < 8
    assert (np.array(orders[0]) == orders[1]).sum() < 8                      # orders of two keys: unrelated
    first = np.bincount([data.permuted(0, 50, np.uint64(key)) for key in range(2000)], minlength=50)
    assert first.min() > 10 and first.max() < 80                             # 40 each on average
    for n in range(10, 71):
        assert [data.permuted(k, n, np.uint64(9)) for k in range(n)] != list(range(n))


def test_epochs(tiny, toy):
    """Each row of a source once an epoch, in another order each epoch, and as many epochs as planned."""
    s = stream(tiny, toy)
    count = 10 * 40
    read, planned = s.read(0, count), data.planned_rows(TINY, 1, count)
    assert planned.tolist() == [200, 120, 80] == np.bincount(read.source).tolist()
    for i, source in enumerate(s.sources):
        n = source.rows(16)
        index = {source.row(k, 16)[0][:-1].tobytes(): k for k in range(n)}
        assert len(index) == n and planned[i] > 3 * n > 40                   # rows differ; epochs are many
        taken = [index[row.tobytes()] for row in np.ascontiguousarray(read.tokens[read.source == i])]
        epochs = [taken[k:k + n] for k in range(0, len(taken), n)]
        assert all(sorted(e) == list(range(n)) for e in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert len({tuple(e) for e in epochs[:-1]}) == len(epochs) - 1       # no two in the same order
        assert set(np.bincount(taken, minlength=n)) <= {planned[i] // n, -(-planned[i] // n)}


def test_sources_do_not_disturb_each_other(tiny, toy):
    """Which rows of a source come, in which order, is the same whatever it is mixed with."""
    alone, mixed = stream(tiny, toy, {"b": 100}).read(0, 60), stream(tiny, toy).read(0, 200)
    np.testing.assert_array_equal(mixed.tokens[mixed.source == 1], alone.tokens)
    assert (stream(tiny, toy, {"b": 100}, seed=2).read(0, 60).tokens != alone.tokens).any()


@pytest.mark.parametrize("prefetch", [1, 2, 5])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_prefetch_and_resume_keep_the_order(tiny, toy, ranks, prefetch):
    s = stream(tiny, toy)
    whole = s.read(0, 56)
    for batch, start in ((8, 0), (8, 3), (8, 6), (8, 7), (4, 0), (4, 5)):
        cfg = midtrain.Config(batch=batch, steps=56 // batch, prefetch=prefetch)
        mine = [list(midtrain.batches(s, cfg, SimpleNamespace(rank=r, world=ranks), start))
                for r in range(ranks)]
        assert [len(steps) for steps in mine] == [cfg.steps - start] * ranks
        for step, parts in enumerate(zip(*mine, strict=True), start):
            rows = slice(step * batch, (step + 1) * batch)
            for field in ("tokens", "targets", "docs", "source"):
                got = np.concatenate([getattr(part, field) for part in parts])
                np.testing.assert_array_equal(got, getattr(whole, field)[rows], field)


def test_slow_reads_and_an_abandoned_reader_keep_the_order(tiny, toy):
    s, rng = stream(tiny, toy), Random(0)
    jittery = SimpleNamespace(
        mixture=s.mixture, read=lambda *rows: time.sleep(rng.random() * 0.005) or s.read(*rows))
    cfg, me = midtrain.Config(batch=2, steps=20, prefetch=5), SimpleNamespace(rank=0, world=1)
    for start, stop in ((0, 7), (7, 20)):                                    # stopped at step 7, then resumed
        reader = midtrain.batches(jittery, cfg, me, start)
        for step in range(start, stop):
            same(next(reader), s.read(2 * step, 2))
        reader.close()


# -- shards and rows ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("shard_tokens", [1, 30, 200, 10 ** 9])
@pytest.mark.parametrize("T", [1, 2, 7, 16, 61, 300])
def test_rows_against_plain_lists(tmp_path, toy, T, shard_tokens):
    """A row is a window of all documents laid end to end, wherever shards and documents begin."""
    texts = words("x", 80)
    documents = [[*toy.encode(text), toy.eos_id] for text in texts]
    flat = [id for document in documents for id in document]
    owner = [i for i, document in enumerate(documents) for _ in document]
    manifest = shards.write_source(str(tmp_path), "x", {"train": texts}, toy, shard_tokens)
    written = manifest["splits"]["train"]
    assert {1: len(written) == 80, 10 ** 9: len(written) == 1}.get(shard_tokens, len(written) > 2)
    assert sum(shard["tokens"] for shard in written) == len(flat)
    source = shards.Source(str(tmp_path), "x", toy, toy.vocab_size)
    source.verify()
    assert source.tokens() == len(flat)
    n = source.rows(T)
    assert n * T + 1 <= len(flat) < (n + 1) * T + 1
    for i in range(n):
        tokens, docs = source.row(i, T)
        assert tokens.dtype == docs.dtype == np.int64
        assert tokens.tolist() == flat[i * T:(i + 1) * T + 1]
        assert docs.tolist() == [o - owner[i * T] for o in owner[i * T:(i + 1) * T + 1]]


def test_splits_are_apart(tmp_path, toy):
    splits = {"train": words("t", 30), "heldout": words("h", 20)}
    shards.write_source(str(tmp_path), "x", splits, toy, shard_tokens=50)
    source = shards.Source(str(tmp_path), "x", toy, toy.vocab_size)
    for split, texts in splits.items():
        ids = np.concatenate([source.row(i, 8, split)[0][:-1] for i in range(source.rows(8, split))])
        assert toy.decode(ids.tolist()).startswith("<|end|>".join(texts)[:100])
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/x has no rl split (it has: train, heldout)")):
        source.rows(8, "rl")


@pytest.mark.parametrize("vocab_size, dtype", [(512, "uint16"), (1 << 16, "uint16"),
                                               ((1 << 16) + 1, "uint32"), (70_000, "uint32")])
def test_ids_are_as_wide_as_the_vocabulary(tmp_path, vocab_size, dtype):
    ids = [0, vocab_size - 1, 255, vocab_size // 2, 1]
    tokenizer = Numbers(vocab_size)
    manifest = shards.write_source(str(tmp_path), "x", {"train": [" ".join(map(str, ids))]}, tokenizer)
    assert manifest["dtype"] == dtype and manifest["splits"]["train"][0]["max_id"] == vocab_size - 1
    assert os.path.getsize(tmp_path / "x" / "train-00000.bin") == 5 * np.dtype(dtype).itemsize
    assert shards.Source(str(tmp_path), "x", tokenizer, vocab_size).row(0, 4)[0].tolist() == ids


@pytest.mark.parametrize("across", [False, True])
def test_targets(tmp_path, across):
    lengths = [3, 1, 1, 9, 4, 1, 13]
    shards.write_source(str(tmp_path), "x", {"train": numbers(*lengths)}, Numbers(), shard_tokens=6)
    starts = set(np.cumsum(lengths).tolist())                                # token i is number i
    b = data.Stream(str(tmp_path), {"x": 100}, 1, 5, Numbers(), 70_000, across).read(0, 6)
    assert sorted(b.tokens[:, 0].tolist()) == [0, 5, 10, 15, 20, 25]
    assert b.tokens.shape == b.targets.shape == b.docs.shape == (6, 5) and b.source.tolist() == [0] * 6
    for t, target in zip(b.tokens.ravel().tolist(), b.targets.ravel().tolist(), strict=True):
        assert target == (-100 if t + 1 in starts and not across else t + 1)


def test_collate_by_hand():
    rows = [(np.array([5, 6, 7, 8]), np.array([0, 0, 1, 1])),
            (np.array([9, 1, 2, 3]), np.array([0, 1, 2, 3]))]
    b = data.collate(rows, [4, 2], across=False)
    assert b.tokens.tolist() == [[5, 6, 7], [9, 1, 2]] and b.docs.tolist() == [[0, 0, 1], [0, 1, 2]]
    assert b.targets.tolist() == [[6, -100, 8], [-100, -100, -100]] and b.source.tolist() == [4, 2]
    assert data.collate(rows, [4, 2], across=True).targets.tolist() == [[6, 7, 8], [1, 2, 3]]
    assert rows[0][0].tolist() == [5, 6, 7, 8]                               # what was given stays as it was


# -- writing -----------------------------------------------------------------------------------------------

def state(folder):
    """{file: (time of the last change, content)} of everything below."""
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
            for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def contents(folder):
    return {name: content for name, (_, content) in state(folder).items()}


def breaks(texts):
    yield from texts
    raise ConnectionError("the hub went away")


def test_a_failed_write_leaves_nothing(tmp_path, toy):
    for splits in ({"train": breaks(words("x", 20))}, {"train": words("x", 20), "heldout": breaks([])}):
        with pytest.raises(ConnectionError):
            shards.write_source(str(tmp_path), "x", splits, toy, shard_tokens=30)
        assert not (tmp_path / "x").exists()
        with pytest.raises(InputError, match=re.escape("no prepared source 'x' (it has: none)")):
            shards.Source(str(tmp_path), "x", toy, toy.vocab_size)
    # what the failed ones left is no hindrance to the next, and none of it is kept
    for folder in (tmp_path, tmp_path / "fresh"):
        shards.write_source(str(folder), "x", {"train": words("x", 9)}, toy, shard_tokens=30)
    assert sorted(os.listdir(tmp_path)) == ["fresh", "x"]
    assert contents(tmp_path / "x") == contents(tmp_path / "fresh" / "x")


def test_a_failed_write_leaves_the_old_source(tmp_path, toy):
    shards.write_source(str(tmp_path), "x", {"train": words("x", 9)}, toy)
    before = state(tmp_path / "x")
    with pytest.raises(ConnectionError):
        shards.write_source(str(tmp_path), "x", {"train": breaks(words("y", 9))}, toy)
    assert state(tmp_path / "x") == before
    shards.write_source(str(tmp_path), "x", {"train": words("y", 9)}, toy)     # replaced whole
    assert state(tmp_path / "x") != before and os.listdir(tmp_path) == ["x"]


def test_leftovers_of_another_process_are_no_source(tmp_path, toy):
    shards.write_source(str(tmp_path), "x", {"train": words("x", 9)}, toy)
    shutil.copytree(tmp_path / "x", tmp_path / "y.tmp-1")                    # killed before its renaming
    with pytest.raises(InputError, match=re.escape("no prepared source 'y' (it has: x)")):
        shards.Source(str(tmp_path), "y", toy, toy.vocab_size)


# -- the embedded world ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def prepared(tmp_path_factory, toy):
    folder = tmp_path_factory.mktemp("toy")
    tokenizing.prepare_toy(str(folder), toy)
    return folder


def test_prepare_toy(prepared, toy):
    assert set(os.listdir(prepared)) == set(FIGURE_2)
    for name in FIGURE_2:
        source = shards.Source(str(prepared), name, toy, toy.vocab_size)
        source.verify()
        assert source.rows(256) > 100 and source.rows(256, "heldout") >= 16
        text = next(world.documents(name, "train"))
        assert toy.decode(source.row(0, 256)[0].tolist()).startswith(text[:100])
    before = state(prepared)
    tokenizing.prepare_toy(str(prepared), toy)                                     # nothing to do
    assert state(prepared) == before


@pytest.fixture
def little_world(monkeypatch):
    """Eleven sources of a few words each, and a list of what was read of them."""
    read = []
    monkeypatch.setattr(world, "documents",
                        lambda name, split: read.append((name, split)) or iter(words(f"{name} {split}", 30)))
    return read


def test_prepare_toy_again_for_another_tokenizer(tmp_path, toy, little_world):
    other = SimpleNamespace(vocab_size=70_000, fingerprint="another", document=toy.document)
    tokenizing.prepare_toy(str(tmp_path), toy)
    assert len(little_world) == 22
    tokenizing.prepare_toy(str(tmp_path), toy)
    assert len(little_world) == 22
    tokenizing.prepare_toy(str(tmp_path), other)
    assert len(little_world) == 44 and set(os.listdir(tmp_path)) == set(FIGURE_2)
    for name in FIGURE_2:
        assert shards.Source(str(tmp_path), name, other, 70_000).dtype == np.uint32
        with pytest.raises(InputError, match="another tokenizer"):
            shards.Source(str(tmp_path), name, toy, toy.vocab_size)


def test_prepare_toy_mends_what_is_damaged(tmp_path, toy, little_world):
    """So that "prepare the source again" is a fix: the same call mends it, and touches nothing else."""
    tokenizing.prepare_toy(str(tmp_path), toy)
    whole = contents(tmp_path)
    del little_world[:]
    (tmp_path / "ocr2" / "train-00000.bin").unlink()
    flip(tmp_path / "chat" / "heldout-00000.bin")
    (tmp_path / "mot-math" / "manifest.json").write_text("{}")
    (tmp_path / "mot-code" / "manifest.json").write_bytes(b"\xff\xfe")
    os.truncate(tmp_path / "starcoder2" / "train-00000.idx", 8)
    shutil.rmtree(tmp_path / "dclm-edu")
    tokenizing.prepare_toy(str(tmp_path), toy)
    assert {name for name, _ in little_world} == \
        {"ocr2", "chat", "mot-math", "mot-code", "starcoder2", "dclm-edu"}
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("across", [False, True])
def test_heldout(prepared, toy, across):
    held = data.heldout(str(prepared), toy, toy.vocab_size, 64, 3, across)
    assert list(held) == ["general", "chat", "math", "code", "science"] == list(registry.DOMAINS)
    names = [name for name in registry.REGISTRY if name in FIGURE_2]
    for domain, b in held.items():
        mine = [name for name in names if registry.REGISTRY[name].domain == domain]
        assert [names[s] for s in b.source] == [name for name in mine for _ in range(3)]
        rows = [shards.Source(str(prepared), name, toy, toy.vocab_size).row(k, 64, "heldout")
                for name in mine for k in range(3)]
        np.testing.assert_array_equal(b.tokens, [tokens[:-1] for tokens, _ in rows])
        np.testing.assert_array_equal(b.docs, [docs[:-1] for _, docs in rows])
        assert (b.targets == -100).any() != across


def test_heldout_takes_what_there_is(tmp_path, toy, little_world):
    for name in ("mot-science", "chat", "ocr2"):
        splits = ("train",) if name == "ocr2" else ("train", "heldout")
        shards.write_source(str(tmp_path), name, {s: world.documents(name, s) for s in splits}, toy)
    held = data.heldout(str(tmp_path), toy, toy.vocab_size, 50, 10 ** 6)
    assert list(held) == ["chat", "science"]             # ocr2 has none, the others are not there
    size = shards.Source(str(tmp_path), "chat", toy, toy.vocab_size).tokens("heldout")
    assert len(held["chat"].tokens) == (size - 1) // 50
    shards.write_source(str(tmp_path), "my-notes", {"train": ["a"],
                                                  "heldout": ["some words of my own " * 20]}, toy)
    shards.write_source(str(tmp_path), "tiny", {"train": ["a"], "heldout": ["b"]}, toy)
    held = data.heldout(str(tmp_path), toy, toy.vocab_size, 50, 4)
    assert list(held) == ["chat", "science", "my-notes"]  # a source of one's own is a domain; tiny has no row


def test_the_toy_world_is_prepared_again_when_it_changed(tmp_path, toy, little_world, monkeypatch):
    tokenizing.prepare_toy(str(tmp_path), toy)
    path = tmp_path / "chat" / "manifest.json"
    before = path.stat().st_mtime_ns
    tokenizing.prepare_toy(str(tmp_path), toy)
    assert path.stat().st_mtime_ns == before
    monkeypatch.setattr(tokenizing.sys, "version", "3.99")         # another Python's library is another text
    tokenizing.prepare_toy(str(tmp_path), toy)
    assert path.stat().st_mtime_ns != before


# -- the plan and packing ------------------------------------------------------------------------------------

def test_plan_prints_the_table_of_epochs(tmp_path):
    """The epochs of the paper's mixtures at its 26.2144B tokens, of its table 1 (MIDTRAIN.md, 1)."""
    want = {"math+code+science": {"mot-math": 3.06, "mot-science": 2.96, "openthoughts3-science": 2.78,
                                  "ocr2": 2.34, "mot-code": 0.666, "megamath-web-pro": 0.356,
                                  "refinecode": 0.0193},
            "math+code": {"mot-math": 4.37, "mot-code": 1.11, "megamath-web-pro": 0.489},
            "math": {"mot-math": 4.37, "megamath-web-pro": 0.979, "dclm-edu": 0.0353}}

    def command(*args):
        process = Process(tmp_path, *args, stage="data")
        return process.wait(), process.text("stdout"), process.text("stderr")

    for mixture, epochs in want.items():
        code, out, _ = command("plan", f"--mixture={mixture}", "--tokens=26.2144B")
        rows = {line.split()[0]: line.split() for line in out.split("\n\n")[0].splitlines()[2:-1]}
        assert code == 0 and list(rows) == list(data.MIXTURES[mixture])
        assert {name: float(rows[name][3]) for name in epochs} == epochs
        assert ("more than 4 times" in out) == (mixture != "math+code+science")
    for bad, says in (("--tokens=x", "26.2144B"), ("--tokens=5", "no row"),
                      ("--mixture=mat", "did you mean 'math'")):
        code, _, err = command("plan", bad)
        assert code and says in err and "Traceback" not in err


def test_plan_loads_neither_torch_nor_pyarrow():
    """A plan is printed at once, on a machine that has only numpy and the flags' parser."""
    code = ("import runpy, sys; sys.argv = ['data.py', 'plan', '--mixture=math']; "
            "runpy.run_path('data.py', run_name='__main__'); "
            "print(sorted({'torch', 'pyarrow', 'transformers', 'sympy'} & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "megamath-web-pro" in done.stdout


def item_by_item(lengths, capacity):
    """Best-fit decreasing as it is defined: the sorted rooms left in the bins."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        room = min((r for r in rooms if r >= length), default=None)
        if room is None:
            room = capacity
        else:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


def test_best_fit_is_best_fit_decreasing():
    rng = np.random.default_rng(0)
    for _ in range(300):
        capacity = int(rng.integers(1, 60))
        lengths = rng.integers(1, capacity + 1, int(rng.integers(0, 80)))
        bins = shards.best_fit(lengths, capacity)
        assert len(bins) == len(lengths)
        used = np.bincount(bins, lengths).astype(int)
        assert sorted((capacity - used).tolist()) == item_by_item(lengths.tolist(), capacity)


def test_best_fit_by_hand():
    assert shards.best_fit([3, 6, 2, 3, 2], 8).tolist() == [1, 0, 0, 1, 1]   # the example of its docstring
    assert shards.best_fit([], 8).tolist() == [] and shards.best_fit([8, 8], 8).tolist() == [0, 1]


@pytest.mark.slow
def test_best_fit_opens_as_many_bins_as_trl():
    from datasets import Dataset
    from trl import pack_dataset
    rng = Random(1)
    for _ in range(25):
        capacity, n = rng.choice([7, 16, 100]), rng.randrange(1, 200)
        lengths = [rng.randrange(1, rng.choice([capacity, 4 * capacity])) for _ in range(n)]
        packed = pack_dataset(Dataset.from_dict({"ids": [[0] * k for k in lengths]}), capacity, "bfd_split",
                              {"batch_size": n})
        pieces, rows = shards.packed_rows(lengths, capacity)
        assert len(packed) == len(rows) - 1 == shards.best_fit(pieces[:, 1], capacity).max() + 1
        assert sum(map(len, packed["ids"])) == sum(lengths) == pieces[:, 1].sum()


def test_best_fit_fills_a_million():
    lengths = np.clip(np.exp(np.random.default_rng(1).normal(7, 1.2, 1_000_000)).astype(int), 1, 16_384)
    used = np.bincount(shards.best_fit(lengths, 16_384), lengths)
    assert used.max() <= 16_384 and used.sum() == lengths.sum()
    assert lengths.sum() / 16_384 / len(used) >= 0.9999


@pytest.mark.parametrize("lengths", [[0], [17], [-1, 3]])
def test_best_fit_refuses_what_does_not_fit(lengths):
    with pytest.raises(InputError, match="split longer documents"):
        shards.best_fit(lengths, 16)


# -- refusals ----------------------------------------------------------------------------------------------

def flip(path, at=-1, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def manifest(change):
    def damage(folder):
        path = folder / "x" / "manifest.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content) or content))
    return damage


@pytest.fixture
def pair(tmp_path, toy):
    """A folder with x, of several shards, and y."""
    for name in ("x", "y"):
        splits = {"train": words(name, 30), "heldout": words(name + "h", 9)}
        shards.write_source(str(tmp_path), name, splits, toy, shard_tokens=100)
    assert (tmp_path / "x" / "train-00001.bin").exists()
    return tmp_path


@pytest.mark.parametrize("damage, file, says", [
    (lambda d: (d / "x/train-00001.bin").unlink(), "x/train-00001.bin", "is missing"),
    (lambda d: (d / "x/heldout-00000.idx").unlink(), "x/heldout-00000.idx", "is missing"),
    (lambda d: os.truncate(d / "x/train-00001.bin", 50), "x/train-00001.bin", "has 50 bytes"),
    (lambda d: os.truncate(d / "x/train-00000.idx", 9), "x/train-00000.idx", "cut short"),
    (lambda d: os.truncate(d / "x/train-00000.bin", 0), "x/train-00000.bin", "empty"),
    (lambda d: (d / "x/train-00000.bin").open("ab").write(b"12"), "x/train-00000.bin", "too long"),
    (lambda d: (d / "x/manifest.json").write_text("[1]"), "x/manifest.json", "is damaged"),
    (manifest(lambda m: m.pop("splits") and m), "x/manifest.json", "'splits'"),
    (manifest(lambda m: m.update(splits=None)), "x/manifest.json", "is damaged"),
    (manifest(lambda m: m.update(dtype="uint17")), "x/manifest.json", "uint17"),
    (manifest(lambda m: m["splits"]["train"][0].pop("tokens") and m), "x/manifest.json", "'tokens'"),
    (manifest(lambda m: m["splits"]["train"][1].pop("idx_crc32") and m), "x/manifest.json", "'idx_crc32'"),
    (manifest(lambda m: m["splits"].update(train=[])), "x", "no train documents"),
    (manifest(lambda m: m["splits"].pop("train") and m), "x", "no train split"),
])
def test_damage_is_refused(pair, toy, damage, file, says):
    mixture = {"x": 40, "y": 60}
    assert data.Stream(str(pair), mixture, 1, 16, toy, toy.vocab_size).counts[0] > 3
    damage(pair)
    with pytest.raises(InputError) as e:
        data.Stream(str(pair), mixture, 1, 16, toy, toy.vocab_size)
    assert all(part in str(e.value) for part in (says, f"{pair}/{file} ", "prepare the source again"))


@pytest.mark.parametrize("file", ["train-00000.bin", "train-00001.bin", "train-00001.idx",
                                  "heldout-00000.bin", "heldout-00000.idx"])
def test_one_flipped_bit_is_found(pair, toy, file):
    flip(pair / "x" / file, at=10, bit=3)
    source = shards.Source(str(pair), "x", toy, toy.vocab_size)
    with pytest.raises(InputError, match=re.escape(f"{pair}/x/{file} is corrupted")):
        source.verify()
    refused = 0
    for part in range(3):                                                    # each rank a share: one finds it
        try:
            source.verify(part, 3)
        except InputError as e:
            refused += 1
            assert file in str(e) and "prepare the source again" in str(e)
    assert refused == 1
    shards.Source(str(pair), "y", toy, toy.vocab_size).verify()


def test_any_flipped_bit_of_a_manifest(pair, toy):
    """It changes nothing that is read, or it is refused: never another exception, never other tokens."""
    path, rng, refused = pair / "x" / "manifest.json", Random(0), 0
    whole = path.read_bytes()
    want = data.Stream(str(pair), {"x": 100}, 1, 16, toy, toy.vocab_size).read(0, 20)
    for at in range(len(whole)):
        flip(path, at, rng.randrange(8))
        try:
            s = data.Stream(str(pair), {"x": 100}, 1, 16, toy, toy.vocab_size)
            s.sources[0].verify()
            same(s.read(0, 20), want)
        except InputError as e:
            refused += str(pair / "x") in str(e)
        path.write_bytes(whole)
    assert refused > len(whole) / 2
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="is damaged"):
            shards.Source(str(pair), "x", toy, toy.vocab_size)


def test_missing_sources_are_listed(pair, toy):
    for folder, have in ((pair, "x, y"), (pair / "nowhere", "none"), (pair / "x/manifest.json", "none")):
        with pytest.raises(InputError) as e:
            data.Stream(str(folder), {"x": 50, "z": 50}, 1, 16, toy, toy.vocab_size)
        name = "z" if folder == pair else "x"
        assert f"--data={folder} has no prepared source '{name}' (it has: {have})" in str(e.value)
        assert "prepare it, or take a --mixture without it" in str(e.value)


def test_other_tokenizer_is_refused(pair, toy):
    with pytest.raises(InputError, match="prepare the data with this model's tokenizer") as e:
        shards.Source(str(pair), "x", Numbers(fingerprint="0123456789abcdef"), 70_000)
    assert all(part in str(e.value) for part in (f"{pair}/x ", toy.fingerprint[:12], "0123456789ab"))


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    shards.write_source(str(tmp_path), "x", {"train": ["1 2 3", "4 99 5"]}, Numbers(), shard_tokens=1)
    shards.Source(str(tmp_path), "x", Numbers(), 100)
    with pytest.raises(InputError, match="token id 99, beyond the model's vocabulary of 99; prepare") as e:
        shards.Source(str(tmp_path), "x", Numbers(), 99)
    assert f"{tmp_path}/x/train-00001.bin " in str(e.value)


def test_too_short_for_one_row_is_refused(tmp_path):
    shards.write_source(str(tmp_path), "x", {"train": numbers(5, 4), "heldout": numbers(3)}, Numbers())
    assert data.Stream(str(tmp_path), {"x": 100}, 1, 8, Numbers(), 70_000).read(0, 3).tokens.shape == (3, 8)
    with pytest.raises(InputError, match=r"x has 9 train tokens.*--seq_len=9 \+ 1; take a smaller") as e:
        data.Stream(str(tmp_path), {"x": 100}, 1, 9, Numbers(), 70_000)
    assert str(tmp_path / "x") in str(e.value)
    shutil.move(tmp_path / "x", tmp_path / "chat")
    with pytest.raises(InputError, match=r"no held-out row of --seq_len=8 \+ 1 tokens"):
        data.heldout(str(tmp_path), Numbers(), 70_000, 8, 1)


# -- the fingerprint ---------------------------------------------------------------------------------------

def test_fingerprint(tmp_path, toy):
    def write(folder, **seeds):
        for name in ("a", "b", "c"):
            train, heldout = words(name, 30, seeds.get(name, 0)), words(name, 9, seeds.get("heldout", 0))
            shards.write_source(str(folder), name, {"train": train, "heldout": heldout}, toy)
        return str(folder)

    here = write(tmp_path / "1")
    first = stream(here, toy).fingerprint()
    assert first == stream(here, toy).fingerprint()                          # opened again
    assert first == stream(write(tmp_path / "2"), toy).fingerprint()         # prepared again, elsewhere
    assert first == stream(write(tmp_path / "3", heldout=1), toy).fingerprint()
    shards.write_source(here, "d", {"train": words("d", 30)}, toy)
    assert first == stream(here, toy).fingerprint()                          # d is not in the mixture
    used = stream(here, toy)
    used.read(0, 50)
    assert first == used.fingerprint()                                       # what was read leaves no trace
    others = [stream(here, toy, seed=2), stream(here, toy, T=17),
              stream(here, toy, {"a": 40, "b": 40, "c": 20}),                # other shares,
              stream(here, toy, {"c": 20, "b": 30, "a": 50}),                # order,
              stream(here, toy, {"a": 50, "b": 30, "d": 20}),                # source
              stream(write(tmp_path / "4", b=1), toy)]                       # or texts
    assert len({first, *(other.fingerprint() for other in others)}) == 7


def test_fingerprint_sees_one_token(tmp_path):
    """Same sizes, same names, one other token."""
    prints = []
    for i, text in enumerate(("1 2 3 4 5 6", "1 2 3 4 7 6")):
        shards.write_source(str(tmp_path / str(i)), "x", {"train": [text]}, Numbers())
        prints.append(data.Stream(str(tmp_path / str(i)), {"x": 100}, 1, 2, Numbers(), 70_000).fingerprint())
    assert prints[0] != prints[1]
