"""Which texts share 13 words in a row: RL's prompts with benchmarks, these with training data."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import repeat

import numpy as np

from cli import InputError, write_atomic
from corpus.shards import Source, prepared
from corpus.workers import end_with_parent

# -- apart from the benchmarks -----------------------------------------------------------------------------
WORDS = re.compile(r"[^\W_]+")

GRAM = 13                                                 # words in a row; the usual choice, GPT-3's too

SHORTEST = 5                                              # words of a text that is compared as a whole; ours

BOILERPLATE = 3                                           # texts that share a gram which is a phrase; ours

FACTOR = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(1 << 18)
def _word(word):
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def words_of(text):
    """Lower-case runs of letters and digits, in order."""
    return WORDS.findall(text.lower())


def polynomials(hashes, sizes):
    """For each n of the increasing sizes, the hash of every n neighbours of word hashes (uint64 array): a
    polynomial in FACTOR, mod 2^64. Yields uint64 arrays, shorter by n - 1 or empty."""
    total = hashes
    for n in range(1, max(sizes, default=0) + 1):
        total = total[:-1] * FACTOR + hashes[n - 1:] if n > 1 else total
        if n in sizes:
            yield total


def grams(text, n=GRAM):
    """The word n-grams of a text, a set of 64-bit hashes. Words: lower-case runs of letters and digits. A
    text of 5 to n - 1 words is one gram, equal to that of the same words only; a shorter one has none."""
    words = words_of(text)
    n = min(n, len(words))
    if n < SHORTEST:
        return set()
    [found] = polynomials(np.array([_word(w) for w in words], dtype=np.uint64), [n])
    return set(found.tolist())


def distinct_grams(texts):
    """(the grams of some problems, how many more are phrases). A phrase is what 3 or more of them share,
    equal ones counted once: the form of a statement ("the first line contains a single integer t, the number
    of test cases") would drop most of Codeforces."""
    found = Counter(g for t in {" ".join(words_of(t)) for t in texts} for g in grams(t))
    own = {g for g, k in found.items() if k < BOILERPLATE}
    return own, len(found) - len(own)


def index_of(benchmarks):
    """({gram: name}, {name: counts}) of {name: texts}, each name's phrases left out."""
    index, counts = {}, {}
    for name, texts in sorted(benchmarks.items()):
        own, phrases = distinct_grams(texts)
        counts[name] = {"problems": len(texts), "without text": texts.count(""), "grams": len(own),
                        "phrases left out": phrases}
        for g in own:
            index.setdefault(g, name)
    return index, counts


def contaminated(prompt, index):
    """(whether a prompt shares a gram with the index, the benchmark's name or ""); of several benchmarks the
    first by name."""
    name = min((index[g] for g in grams(prompt) if g in index), default="")
    return name != "", name

# -- benchmark problems in the training data ---------------------------------------------------------------
PIECE = 1 << 22                                           # tokens that a process searches in one go: seconds

BATCH = 1 << 16                                           # tokens whose words are hashed at once


def cuts(offsets, tokens):
    """Where to cut documents, given by their offsets, into runs of about `tokens` tokens: the number of the
    first of each run, and the end."""
    every = np.arange(offsets[0], offsets[-1], tokens)
    return np.unique([*np.searchsorted(offsets, every), len(offsets) - 1]).tolist()


class Search:
    """Which of some grams stand in documents of prepared sources. Pickled once for each process of a pool."""

    def __init__(self, texts, wanted, folder, tokenizer):
        """wanted: grams of the texts."""
        texts = [words_of(t) for t in texts]
        self.wanted, self.folder, self.tokenizer = wanted, folder, tokenizer
        self.sizes = sorted({min(GRAM, len(t)) for t in texts if len(t) >= SHORTEST})
        self.hash_of = {w: _word(w) for t in texts for w in t}
        # By the first 22 bits: leaves one in ten of what is not wanted, ten times as fast as np.searchsorted
        self.perhaps = np.zeros(1 << 22, dtype=bool)
        self.perhaps[np.array([g >> 42 for g in wanted], dtype=np.int64)] = True

    def __call__(self, piece):
        """piece: name of a source, number of its train shard, first document, the one after the last."""
        name, shard, first, end = piece
        tokens, offsets, _ = Source(self.folder, name, only=("train",)).maps["train"]
        offsets, found = offsets[shard][first:end + 1], set()
        at = cuts(offsets, BATCH)
        for a, b in zip(at, at[1:], strict=False):
            ends = offsets[a:b + 1]
            found |= self.batch(tokens[shard][ends[0]:ends[-1]].tolist(), (ends - ends[0]).tolist())
        return found

    def batch(self, ids, ends):
        """ids: of documents end to end, with what separates them. ends: where each starts, and the end."""
        before, after = len(self.tokenizer.before), len(self.tokenizer.after)
        hashes = []                                       # 0: a word that no text has, and between documents
        for a, b in zip(ends, ends[1:], strict=False):
            text = self.tokenizer.decode(ids[a + before:b - after])
            hashes.extend(map(self.hash_of.get, words_of(text), repeat(0)))
            hashes.append(0)
        hashes, found = np.array(hashes, dtype=np.uint64), set()
        for some in polynomials(hashes, self.sizes):
            found.update(self.wanted.intersection(some[self.perhaps[some >> np.uint64(42)]].tolist()))
        return found

_worker = {}                                              # of a process of the pool: its Search


def _start_worker(search):
    end_with_parent()
    _worker["search"] = search


def _search(piece):
    return _worker["search"](piece)


def _scan(search, sources, workers, progress):
    """{name: set of the grams in the train documents of the source}."""
    pieces, sizes = [], []
    for source in sources:
        for shard, offsets in enumerate(source.maps["train"][1]):
            at = cuts(offsets, PIECE)
            pieces += [(source.name, shard, a, b) for a, b in zip(at, at[1:], strict=False)]
            sizes += np.diff(offsets[at]).tolist()
    # few tokens are searched here: a process takes as long to start as to search a piece
    done, total = 0, sum(sizes)
    workers = min(workers or os.cpu_count() or 1, 1 + total // PIECE)
    found, context = {source.name: set() for source in sources}, multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["corpus.overlap"])
    pool = workers > 1 and ProcessPoolExecutor(workers, context, _start_worker, (search,))
    try:
        results = pool.map(_search, pieces) if pool else map(search, pieces)
        for piece, size, result in zip(pieces, sizes, results, strict=True):
            found[piece[0]] |= result
            done += size
            if progress:
                progress(done, total)
    except BrokenProcessPool:
        raise InputError(f"--workers={workers}: a worker was killed, most likely for memory; run the command "
                         f"again with fewer") from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return found


def training_sources(folder, tokenizer):
    """The prepared sources of a folder that have train documents; InputError where there are none, or of
    another tokenizer."""
    sources = [Source(folder, name, tokenizer, tokenizer.vocab_size, ("train",))
               for name in sorted(prepared(folder))]
    sources = [source for source in sources if "train" in source.maps]
    if not sources:
        raise InputError(f"--data={folder} holds no prepared source; give the folder that `python data.py "
                         f"tokenize` wrote")
    return sources


def seen_in_training(texts, folder, tokenizer, workers=0, progress=None):
    """Which problems share a gram with the train documents of a prepared folder; phrases do not count, and a
    problem of 5 to 12 words has to stand in a document as a whole.

    texts: {id: statement}. tokenizer: the one the folder was prepared with (the folder has its fingerprint
    only). workers: processes, 0 = one a core. progress: called with (tokens done, tokens in all).
    Returns ({id: {"source": the first by name, "grams": how many of its grams were found, "of": how many it
    has}}, [ids of the problems that have none, being shorter or all phrases]).

    What was found is kept as overlap-KEY.json in the folder, for the next call with these texts; where that
    cannot be written, each call searches. InputError where nothing is prepared, or with another tokenizer.
    """
    sources = training_sources(folder, tokenizer)
    own, _ = distinct_grams(texts.values())
    grams_of = {i: grams(t) & own for i, t in texts.items()}
    of = hashlib.sha256(repr([[s.fingerprint() for s in sources], sorted(own)]).encode()).hexdigest()
    path = os.path.join(folder, f"overlap-{of[:20]}.json")
    try:
        with open(path) as f:
            found = {name: set(some) for name, some in json.load(f).items()}
    except (OSError, ValueError):
        found = _scan(Search(texts.values(), own, folder, tokenizer), sources, workers, progress)
        with contextlib.suppress(OSError):
            write_atomic(path, json.dumps({name: sorted(some) for name, some in found.items()}))
    every, seen = set().union(*found.values()), {}
    for i, mine in grams_of.items():
        if mine & every:
            seen[i] = {"source": next(name for name in sorted(found) if mine & found[name]),
                       "grams": len(mine & every), "of": len(mine)}
    return seen, [i for i, mine in grams_of.items() if not mine]
