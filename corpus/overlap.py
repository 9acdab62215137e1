"""Which texts share 13 words in a row: RL's prompts with benchmarks, these with training data."""

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from functools import lru_cache
from itertools import pairwise, repeat
from typing import NamedTuple

import numpy as np

from cli import InputError, write_atomic
from corpus.hashes import GOLDEN
from corpus.shards import Source, prepared
from corpus.workers import workers

# -- grams -------------------------------------------------------------------------------------------------

WORDS = re.compile(r"[^\W_]+")
GRAM = 13                                                 # words in a row; the usual choice, GPT-3's too
SHORTEST = 5                                              # words of a text that is compared as a whole; ours
BOILERPLATE = 3                                           # texts that share a gram which is a phrase; ours


@lru_cache(1 << 18)
def _word_hash(word):
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def words_of(text):
    """Lower-case runs of letters and digits, in order."""
    return WORDS.findall(text.lower())


def polynomials(hashes, sizes):
    """For each n of the increasing sizes, the hash of every n neighbours of word hashes (uint64 array): a
    polynomial in GOLDEN, mod 2^64. Yields uint64 arrays, shorter by n - 1 or empty."""
    neighbours = hashes
    for n in range(1, max(sizes, default=0) + 1):
        if n > 1:
            neighbours = neighbours[:-1] * GOLDEN + hashes[n - 1:]
        if n in sizes:
            yield neighbours


def grams(text, n=GRAM):
    """The word n-grams of a text, a set of 64-bit hashes. Words: lower-case runs of letters and digits. A
    text of 5 to n - 1 words is one gram, equal to that of the same words only; a shorter one has none."""
    words = words_of(text)
    n = min(n, len(words))
    if n < SHORTEST:
        return set()
    hashes = np.array([_word_hash(word) for word in words], dtype=np.uint64)
    [values] = polynomials(hashes, [n])
    return set(values.tolist())


def distinct_grams(texts):
    """(the grams of some problems, how many others are phrases). A phrase is what 3 or more of them share,
    equal ones counted once: the form of a statement ("the first line contains a single integer t, the number
    of test cases") would drop most of Codeforces."""
    different = {" ".join(words_of(text)) for text in texts}
    counts = Counter(gram for text in different for gram in grams(text))
    distinct = {gram for gram, count in counts.items() if count < BOILERPLATE}
    return distinct, len(counts) - len(distinct)


# -- apart from the benchmarks -----------------------------------------------------------------------------

def index_of(benchmarks):
    """({gram: name}, {name: counts}) of {name: texts}, each name's phrases left out."""
    index, counts = {}, {}
    for name, texts in sorted(benchmarks.items()):
        distinct, phrases = distinct_grams(texts)
        counts[name] = {"problems": len(texts), "without text": texts.count(""), "grams": len(distinct),
                        "phrases left out": phrases}
        for gram in distinct:
            index.setdefault(gram, name)
    return index, counts


def contaminated(prompt, index):
    """(whether a prompt shares a gram with the index, the benchmark's name or ""); of several benchmarks the
    first by name."""
    name = min((index[gram] for gram in grams(prompt) if gram in index), default="")
    return name != "", name


# -- benchmark problems in the training data ---------------------------------------------------------------

PIECE = 1 << 22                                           # tokens that a process searches in one go: seconds
BATCH = 1 << 16                                           # tokens whose words are hashed at once


def runs(offsets, tokens):
    """Documents, given by their offsets, in runs of about `tokens` tokens: (first, end) document of each."""
    starts = np.arange(offsets[0], offsets[-1], tokens)
    documents = np.unique([*np.searchsorted(offsets, starts), len(offsets) - 1])
    return list(pairwise(documents.tolist()))


class Piece(NamedTuple):
    """What a process searches in one go."""
    source: str
    shard: int                           # number of the train shard
    first: int                           # documents first .. end of it
    end: int
    tokens: int


class Search:
    """Which of some grams stand in documents of prepared sources."""

    def __init__(self, texts, wanted, folder, tokenizer):
        """wanted: grams of the texts."""
        words = [words_of(text) for text in texts]
        self.wanted, self.folder, self.tokenizer = wanted, folder, tokenizer
        self.sizes = sorted({min(GRAM, len(text)) for text in words if len(text) >= SHORTEST})
        self.hash_of = {word: _word_hash(word) for text in words for word in text}
        # By the first 22 bits: leaves one in ten of what is not wanted, ten times as fast as np.searchsorted
        self.perhaps = np.zeros(1 << 22, dtype=bool)
        self.perhaps[np.array([gram >> 42 for gram in wanted], dtype=np.int64)] = True

    def in_piece(self, piece):
        """The set of the grams in a Piece."""
        train = Source(self.folder, piece.source, only=("train",)).maps["train"]
        tokens = train.tokens[piece.shard]
        offsets = train.offsets[piece.shard][piece.first:piece.end + 1]
        met = set()
        for first, end in runs(offsets, BATCH):
            bounds = offsets[first:end + 1]
            met |= self.in_documents(tokens[bounds[0]:bounds[-1]].tolist(), (bounds - bounds[0]).tolist())
        return met

    def in_documents(self, ids, bounds):
        """The set of the grams in documents, whose ids lie end to end. bounds: where each starts, and the
        end."""
        hashes = []                                       # 0: a word that no text has, and between documents
        front = len(self.tokenizer.bos_ids)
        for start, end in pairwise(bounds):
            text = self.tokenizer.decode(ids[start + front:end - 1])           # without bos and eos
            hashes.extend(map(self.hash_of.get, words_of(text), repeat(0)))
            hashes.append(0)
        met = set()
        for values in polynomials(np.array(hashes, dtype=np.uint64), self.sizes):
            candidates = values[self.perhaps[values >> np.uint64(42)]]
            met.update(self.wanted.intersection(candidates.tolist()))
        return met


def _pieces(sources):
    pieces = []
    for source in sources:
        for shard, offsets in enumerate(source.maps["train"].offsets):
            pieces += [Piece(source.name, shard, first, end, int(offsets[end] - offsets[first]))
                       for first, end in runs(offsets, PIECE)]
    return pieces


def _scan(search_args, sources, processes, progress):
    """{name: set of the grams in the train documents of the source}. search_args: those of Search."""
    pieces = _pieces(sources)
    total = sum(piece.tokens for piece in pieces)
    # A process takes as long to start as to search a piece: few tokens are searched in this one.
    processes = min(processes or os.cpu_count() or 1, 1 + total // PIECE)
    met = {source.name: set() for source in sources}
    done = 0
    with contextlib.ExitStack() as stack:
        if processes > 1:
            pool = stack.enter_context(workers(processes, Search, search_args))
            results = pool.map(Search.in_piece, pieces)
        else:
            results = map(Search(*search_args).in_piece, pieces)
        for piece, grams_met in zip(pieces, results, strict=True):
            met[piece.source] |= grams_met
            done += piece.tokens
            if progress:
                progress(done, total)
    return met


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


def seen_in_training(texts, folder, tokenizer, processes=0, progress=None):
    """Which problems share a gram with the train documents of a prepared folder; phrases do not count, and a
    problem of 5 to 12 words has to stand in a document as a whole.

    texts: {id: statement}. tokenizer: the one the folder was prepared with (the folder has its fingerprint
    only). processes: 0 = one a core. progress: called with (tokens done, tokens in all).
    Returns ({id: {"source": the first by name, "grams": how many of its grams were found, "of": how many it
    has}}, [ids of the problems that have none, being shorter or all phrases]).

    What was found is kept as overlap-KEY.json in the folder, for the next call with these texts; where that
    cannot be written, each call searches. InputError where nothing is prepared, or with another tokenizer.
    """
    sources = training_sources(folder, tokenizer)
    distinct, _ = distinct_grams(texts.values())
    grams_of = {id: grams(text) & distinct for id, text in texts.items()}
    contents = [[source.fingerprint() for source in sources], sorted(distinct)]
    key = hashlib.sha256(repr(contents).encode()).hexdigest()[:20]
    path = os.path.join(folder, f"overlap-{key}.json")
    try:
        with open(path) as f:
            met = {name: set(in_source) for name, in_source in json.load(f).items()}
    except (OSError, ValueError):
        met = _scan((list(texts.values()), distinct, folder, tokenizer), sources, processes, progress)
        with contextlib.suppress(OSError):
            write_atomic(path, json.dumps({name: sorted(in_source) for name, in_source in met.items()}))
    met_anywhere = set().union(*met.values())
    seen = {}
    for id, problem_grams in grams_of.items():
        shared = problem_grams & met_anywhere
        if shared:
            source = next(name for name in sorted(met) if problem_grams & met[name])
            seen[id] = {"source": source, "grams": len(shared), "of": len(problem_grams)}
    return seen, [id for id, problem_grams in grams_of.items() if not problem_grams]
