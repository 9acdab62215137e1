"""Mixtures, prepared token shards, and the order of batches as a pure function of (seed, step, global batch).

    python data.py plan --mixture=math+code --tokens=26.2144B    # tokens, epochs, files and disk a source
    python data.py check --mixture=math+code                     # columns of one file of each, on the hub
    python data.py get --mixture=math+code --tokens=26.2144B     # only the files that takes
    python data.py tokenize --mixture=math+code --tokenizer=granite-3.3-8b --out=data/mc   # --part=0/8
    python data.py pack --data=data/lc --seq_len=131072          # rows for midtrain.py --packing=bfd
    python data.py stats --data=data/mc                          # documents, lengths, what was left out
    python data.py get_prompts && python data.py prompts         # RL's prompts, apart from the benchmarks
    python data.py mix --verdicts=verdicts.jsonl --kind=balanced # ... by difficulty
    python data.py toy --out=data/toy     # the embedded world (world.py), tokenized: seconds, no network

A prepared folder holds one folder a source: token shards (uint16 or uint32, documents back to back, each
ending with the separator), document offsets, and manifest.json (tokenizer fingerprint, counts, checksums).
Which texts these are, and how a row becomes one, is sources.py's; getting and tokenizing them, prepare.py's;
RL's prompts are prompts.py's.

Order (nothing is stored but the step): a period of rows holds every source exactly in proportion; a seeded
shuffle of the period gives each global row its source; the k-th row ever taken from a source is row
f(k mod n) of epoch k // n, with f a keyed bijection. So any step is reached at once, the shares are exact
every period, and neither the number of ranks nor the prefetch can change what is trained on.
"""

import hashlib
import json
import os
import shutil
import sys
import zlib
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

import sources as texts
import world
from runtime import InputError, did_you_mean, human, split_flags, write_atomic

# -- mixtures ----------------------------------------------------------------------------------------------

# source: (domain, billions of tokens with the Granite-3.3 tokenizer; paper, table 1; None = not given)
SOURCES = {name: (source.domain, source.tokens) for name, source in texts.REGISTRY.items()}
DOMAINS = ("general", "chat", "math", "code", "science")

MIXTURES = {                                         # percent of sampled training tokens; paper, figure 2
    "math": {"dclm-edu": 15, "chat": 10, "megamath-web-pro": 55, "nemotron-math": 10, "mot-math": 10},
    "math+code": {"dclm-edu": 5, "chat": 5, "megamath-web-pro": 27.5, "nemotron-math": 10, "mot-math": 10,
                  "mot-code": 5, "ocr2": 10, "refinecode": 13.75, "starcoder2": 13.75},
    "math+code+science": {"dclm-edu": 5, "chat": 5, "megamath-web-pro": 20, "nemotron-math": 10,
                          "mot-math": 7, "mot-code": 3, "ocr2": 10, "refinecode": 13.75, "starcoder2": 13.75,
                          "openthoughts3-science": 7.75, "mot-science": 4.75},
    # long-context restoration; the paper (table 18) gives 2.51, 5.08, 4.33, 37.52, 3.86 B tokens: as shares
    "long-context": {"dclm-edu": 4.71, "nemotron-math": 9.53, "megamath-web-pro": 8.12, "starcoder2": 70.4,
                     "codex": 7.24},
    # ours: pretrains the toy world's base. Like the web, it holds some problems with answers: the base knows
    # how one is written and is right by luck, so its score is low but no plain zero, as that of real bases
    "base": {"dclm-edu": 46, "chat": 10, "nemotron-math": 2, "mot-math": 2, "mot-code": 1, "ocr2": 1,
             "refinecode": 18, "starcoder2": 18, "openthoughts3-science": 1, "mot-science": 1},
}


def read_mixture(text):
    """A preset's name, or 'source:percent,source:percent', to {source: percent}; InputError unless they sum
    to 100."""
    if text in MIXTURES:
        return MIXTURES[text]
    if ":" not in text:
        raise InputError(f"--mixture={text!r} is unknown{did_you_mean(text, MIXTURES)} "
                         f"(known: {', '.join(MIXTURES)}; or write 'source:percent,source:percent')")
    mixture = {}
    for part in text.split(","):
        name, _, percent = part.strip().rpartition(":")
        try:
            mixture[name] = mixture.get(name, 0) + float(percent)
        except ValueError:
            name = ""
        if not name:
            raise InputError(f"--mixture: {part.strip()!r} is not source:percent")
    # not: refuses nan
    if any(p <= 0 for p in mixture.values()) or not abs(sum(mixture.values()) - 100) <= 1e-6:
        raise InputError(f"--mixture={text!r}: the percentages sum to {sum(mixture.values()):g}; they must "
                         f"be positive and sum to 100")
    return mixture


def period_rows(mixture):
    """Rows of each source in one period, in the mixture's order: the shortest period (at most 10,000 rows)
    that holds every share exactly (20, 80 and 400 for the paper's three), else 10,000 rows by largest
    remainder."""
    shares = [Fraction(str(p)) / 100 for p in mixture.values()]
    period = np.lcm.reduce([s.denominator for s in shares], dtype=object)
    if period <= 10_000 and sum(shares) == 1:
        return np.array([int(s * period) for s in shares])
    exact = [s * 10_000 / sum(shares) for s in shares]
    rows = np.array([int(e) for e in exact])
    for i in sorted(range(len(exact)), key=lambda i: rows[i] - exact[i])[:10_000 - rows.sum()]:
        rows[i] += 1
    return rows


# -- the order of rows -------------------------------------------------------------------------------------

def _key(*parts):
    return np.uint64(int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little"))


def _mix(x):
    """splitmix64's finaliser: uint64 array to uint64 array. Ours to keep: numpy's own shuffles may change
    with a release."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hashed(k, *key):
    """A uint64 hash of each of an array of whole numbers, other for every key."""
    with np.errstate(over="ignore"):
        return _mix(_key(*key) + k.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _period(rows, seed, period):
    """Source of each slot of one period: the seeded shuffle."""
    slots = np.repeat(np.arange(len(rows)), rows)
    return slots[np.argsort(hashed(np.arange(len(slots)), seed, "period", int(period)), kind="stable")]


def _rows(mixture, seed, start, count):
    """(source, ordinal) of global rows start .. start + count: the ordinal-th row ever taken from that
    source."""
    rows = period_rows(MIXTURES[mixture] if isinstance(mixture, str) else mixture)
    size, sources, ordinals = int(rows.sum()), [], []
    for period in range(start // size, -(-(start + count) // size)):
        slots = _period(rows, seed, period)
        ordinal = np.empty(size, dtype=np.int64)
        for s, n in enumerate(rows):
            ordinal[slots == s] = period * int(n) + np.arange(n)
        lo, hi = max(start - period * size, 0), min(start + count - period * size, size)
        sources.append(slots[lo:hi])
        ordinals.append(ordinal[lo:hi])
    empty = [np.empty(0, dtype=np.int64)]
    return np.concatenate(sources or empty), np.concatenate(ordinals or empty)


def row_sources(mixture, seed, start, count):
    """Which source (index in the mixture's order) each of the global rows start .. start + count comes from:
    int64 array. mixture: a name of MIXTURES, or {source: percent}. Exact in every period of
    `period_rows(...)`.sum() rows."""
    return _rows(mixture, seed, start, count)[0]


def planned_rows(mixture, seed, count):
    """How many of the first `count` global rows come from each source: int64 array in the mixture's order."""
    rows = period_rows(mixture)
    full, rest = divmod(count, int(rows.sum()))
    return full * rows + np.bincount(row_sources(mixture, seed, count - rest, rest), minlength=len(rows))


def permuted(k, n, key):
    """Image of k under a keyed bijection of range(n): a 4-round Feistel network over the next even power of
    two, walked until it falls below n. k: int. O(1) memory, any position at once, a new order for every
    key."""
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = k >> half, k & mask
        for r in range(4):
            left, right = right, left ^ (
                int(_mix(np.uint64((right + (r + 1) * 0x9E3779B97F4A7C15) % 2 ** 64) ^ key)) & mask)
        k = left << half | right
        if k < n:
            return k


def forecast(mixture, rows, T, seed=1, sizes=None):
    """The table of tokens and epochs a source that `rows` rows of T tokens of {source: percent} take. Epochs
    are of the paper's token counts, or of sizes {source: billions}; a source that repeats more than four
    times is marked."""
    lines = [f"{rows:,} rows of {T:,} tokens, {int(period_rows(mixture).sum())} rows a period",
             f"  {'source':24s} {'%':>6s} {'tokens':>9s} {'epochs':>7s}"]
    for (name, percent), k in zip(mixture.items(), planned_rows(mixture, seed, rows), strict=True):
        size = SOURCES.get(name, ("", None))[1] if sizes is None else sizes.get(name)
        epochs = k * T / (size * 1e9) if size else None
        epochs_text = f"{epochs:.3g}" if epochs else "?"
        lines.append(f"  {name:24s} {percent:6.2f} {human(k * T):>9s} {epochs_text:>7s}"
                     + ("  repeats more than 4 times" if (epochs or 0) > 4 else ""))
    lines.append("  (epochs of the prepared tokens; ? = not prepared)" if sizes is not None else
                 "  (epochs of the paper's table 1, Granite-3.3 tokenizer; ? = not given there)")
    return "\n".join(lines)


# -- packing -----------------------------------------------------------------------------------------------

def best_fit(lengths, capacity):
    """Bin of each item, int64 array (n): best-fit decreasing, longest first, each into the bin with the
    least room that suffices, else into a new one. Lengths are whole numbers in 1 .. capacity.

    Item by item up to ties, but worked on the histogram: of items of one length, the fullest bins that fit
    (with room s) take s // length each in a row, since s - length is again the least room that suffices.
    Cost grows with the distinct lengths, not with the items: 1M in under a second.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise InputError(f"best_fit: lengths from {lengths.min()} to {lengths.max()} do not all lie in "
                         f"1 .. {capacity}; split longer documents first")
    order = np.argsort(-lengths, kind="stable")
    bins, opened, at = np.empty(len(lengths), dtype=np.int64), 0, 0
    room, mask = {}, 0                                    # {room: [arrays of bins]}; mask: their bits

    def put(space, ids):
        nonlocal mask
        if space and len(ids):
            room.setdefault(space, []).append(ids)
            mask |= 1 << space

    sizes, counts = np.unique(lengths, return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = at + count
        while at < end:
            enough = mask >> size
            if enough:
                space = (enough & -enough).bit_length() - 1 + size
                ids = np.concatenate(room.pop(space))
                mask ^= 1 << space
            else:
                space = capacity
                ids = np.arange(opened, opened - (at - end) // (space // size))
                opened += len(ids)
            each = space // size
            take = min(end - at, each * len(ids))
            bins[order[at:at + take]] = np.repeat(ids, each)[:take]
            at += take
            full, part = divmod(take, each)               # bins filled up, items in the one after them
            put(space - each * size, ids[:full])
            put(space - part * size, ids[full:full + 1])
            put(space, ids[full + 1:])
    return bins


def packed_rows(lengths, capacity, overlap=0, shortest=0):
    """Documents laid end to end, given by their lengths, as rows: (pieces (n, 2): first token, length; rows
    (r + 1): row i is pieces rows[i] to rows[i + 1]), all int64.

    A document of more than `capacity` tokens is split into parts of capacity, each but the first repeating
    the last `overlap` tokens of the one before; documents of fewer than `shortest` tokens are left out.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    starts, lengths = starts[lengths >= max(1, shortest)], lengths[lengths >= max(1, shortest)]
    stride = capacity - overlap
    parts = 1 + np.maximum(0, -(-(lengths - capacity) // stride))
    nth = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    pieces = np.stack([np.repeat(starts, parts) + nth * stride,
                       np.minimum(capacity, np.repeat(lengths, parts) - nth * stride)], 1)
    bins = best_fit(pieces[:, 1], capacity)
    order = np.argsort(bins, kind="stable")
    return pieces[order], np.concatenate([[0], np.cumsum(np.bincount(bins))]).astype(np.int64)


# -- prepared sources --------------------------------------------------------------------------------------

FORMAT = 1                                                # of manifest.json


class Shard:
    """Documents laid end to end in base.bin, where each starts in base.idx; close() gives the manifest's
    entry."""

    def __init__(self, base, dtype):
        self.base, self.dtype, self.lengths, self.max_id, self.crc = base, dtype, [], 0, 0
        self.file = open(base + ".bin", "wb")

    def add(self, ids):
        ids = np.ascontiguousarray(ids, dtype=self.dtype)
        self.file.write(ids)
        self.crc = zlib.crc32(ids, self.crc)
        self.lengths.append(len(ids))
        self.max_id = max(self.max_id, int(ids.max()))

    def close(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        offsets.tofile(self.base + ".idx")
        return {"file": os.path.basename(self.base), "tokens": int(offsets[-1]),
                "documents": len(self.lengths), "max_id": self.max_id, "crc32": self.crc,
                "idx_crc32": zlib.crc32(offsets)}


def id_dtype(vocab_size):
    """uint16 where the vocabulary allows, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def replace_folder(tmp, final):
    """Puts a complete prepared source in the place of an older one, if there is one. InputError where
    something else is there."""
    refuse_others(final)
    if os.path.exists(final):
        os.rename(final, tmp + ".old")
    os.rename(tmp, final)
    shutil.rmtree(tmp + ".old", ignore_errors=True)


def refuse_others(final):
    """InputError if what is there is no prepared source, and so not ours to replace."""
    if os.path.exists(final) and not os.path.exists(os.path.join(final, "manifest.json")):
        raise InputError(f"--out: {final} is there and is no prepared source; give another --out, or move it "
                         f"away")


def write_source(folder, name, splits, tokenizer, shard_tokens=1 << 28, revision=""):
    """Tokenizes {split: iterable of texts} into folder/name, in this process. revision says what the texts
    are a version of. Returns the manifest. The folder appears when complete."""
    dtype = id_dtype(tokenizer.vocab_size)
    tmp = os.path.join(folder, f"{name}.tmp-{os.getpid()}")
    shutil.rmtree(tmp, ignore_errors=True)                # what a failed call left
    os.makedirs(tmp)
    manifest = {"format": FORMAT, "source": name, "revision": revision, "tokenizer": tokenizer.fingerprint,
                "dtype": dtype.name, "splits": {}}
    for split, documents in splits.items():
        done, shard, size = manifest["splits"].setdefault(split, []), None, 0
        for text in documents:
            ids = tokenizer.document(text)
            shard = shard or Shard(os.path.join(tmp, f"{split}-{len(done):05d}"), dtype)
            shard.add(ids)
            size += len(ids)
            if size >= shard_tokens:
                done.append(shard.close())
                shard, size = None, 0
        if shard:
            done.append(shard.close())
    write_atomic(os.path.join(tmp, "manifest.json"), json.dumps(manifest, indent=1))
    replace_folder(tmp, os.path.join(folder, name))
    return manifest


def prepare_toy(folder, tokenizer):
    """The embedded world, tokenized into `folder`; sources already there, whole, of this tokenizer, this
    world.py and this Python (whose library is the text), are left alone."""
    with open(world.__file__, "rb") as f:
        revision = hashlib.sha256(f.read() + sys.version.encode()).hexdigest()
    for name in world.SOURCES:
        try:
            source = Source(folder, name, tokenizer, tokenizer.vocab_size)
            source.verify()
            fresh = source.revision == revision
        except InputError:
            fresh = False
        if not fresh:
            try:
                write_source(folder, name,
                             {split: world.documents(name, split) for split in ("train", "heldout")},
                             tokenizer, revision=revision)
            except OSError as e:
                raise InputError(f"--data: cannot prepare the toy world in {folder} ({e.strerror}); free "
                                 f"space, or run where this folder can be written") from None


def prepared(folder):
    """Names of the prepared sources in a folder, those of SOURCES first and in its order."""
    names = [n for n in (sorted(os.listdir(folder)) if os.path.isdir(folder) else ())
             if ".tmp-" not in n and os.path.exists(os.path.join(folder, n, "manifest.json"))]
    return [n for n in SOURCES if n in names] + [n for n in names if n not in SOURCES]


class Source:
    """One prepared source, memory-mapped: rows of T + 1 tokens cut out of its documents laid end to end, or
    (packed_for(T)) put together from whole documents. tokenizer None: of whichever it was prepared with;
    only: the splits to open, default all."""

    def __init__(self, folder, name, tokenizer=None, vocab_size=None, only=None):
        self.folder, self.name, self.packed = os.path.join(folder, name), name, None
        path = os.path.join(self.folder, "manifest.json")
        try:
            with open(path) as f:
                manifest = json.load(f)
            if manifest["format"] != FORMAT:
                raise InputError(f"--data: {path} is of format {manifest['format']!r}, not {FORMAT}; prepare "
                                 f"the source again")
            self.dtype, made_with, self.revision = (np.dtype(manifest["dtype"]), manifest["tokenizer"],
                                                    manifest["revision"])
            self.manifest = manifest
            keys = ("file", "tokens", "documents", "max_id", "crc32", "idx_crc32")
            self.splits = {split: [{k: shard[k] for k in keys} for shard in shards]
                           for split, shards in manifest["splits"].items()}
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"--data={folder} has no prepared source {name!r} (it has: "
                             f"{', '.join(sorted(prepared(folder))) or 'none'}); prepare it, or take a "
                             f"--mixture without it") from None
        except InputError:
            raise
        # not JSON, or not the JSON written above
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"--data: {path} is damaged ({e!r}); prepare the source again") from None
        if tokenizer and made_with != tokenizer.fingerprint:
            raise InputError(f"--data: {self.folder} was prepared with another tokenizer ({made_with[:12]}; "
                             f"the model's is {tokenizer.fingerprint[:12]}); prepare the data with this "
                             f"model's tokenizer")
        self.maps = {}                         # split: (token maps, offset maps, first token of each shard)
        for split, shards in self.splits.items():
            if only and split not in only:
                continue
            if not shards:
                raise InputError(f"--data: {self.folder} holds no {split} documents; prepare the source "
                                 f"again")
            tokens, offsets = [], []
            for shard in shards:
                tokens.append(self._map(shard["file"] + ".bin", shard["tokens"], self.dtype))
                offsets.append(self._map(shard["file"] + ".idx", shard["documents"] + 1, np.dtype(np.int64)))
                if vocab_size and shard["max_id"] >= vocab_size:
                    raise InputError(f"--data: {self.folder}/{shard['file']}.bin holds token id "
                                     f"{shard['max_id']}, beyond the model's vocabulary of {vocab_size}; "
                                     f"prepare the data with this model's tokenizer")
            self.maps[split] = tokens, offsets, np.cumsum([0] + [len(t) for t in tokens])

    def _map(self, file, count, dtype):
        path = os.path.join(self.folder, file)
        if not os.path.exists(path):
            raise InputError(f"--data: {path} is missing; prepare the source again")
        size, want = os.path.getsize(path), count * dtype.itemsize
        if size != want or count == 0:
            what = "empty" if not size else "cut short" if size < want else "too long"
            raise InputError(f"--data: {path} has {size} bytes, its manifest says {want}: {what}; prepare "
                             f"the source again")
        return np.memmap(path, dtype, "r")

    def verify(self, part=0, parts=1, splits=None):
        """Compares every parts-th file with its checksum (each rank takes a share); splits: which, default
        all. InputError names a corrupted one."""
        jobs = [(m, shard["file"] + end, shard[crc]) for split in splits or self.splits
                for i, shard in enumerate(self.splits[split])
                for m, end, crc in ((self.maps[split][0][i], ".bin", "crc32"),
                                    (self.maps[split][1][i], ".idx", "idx_crc32"))]
        for array, file, crc in jobs[part::parts]:
            if zlib.crc32(array) != crc:
                raise InputError(f"--data: {self.folder}/{file} is corrupted (its checksum is not its "
                                 f"manifest's); remove the folder and prepare the source again")

    def tokens(self, split="train"):
        return int(self.maps[split][2][-1])

    def rows(self, T, split="train"):
        """Rows of T inputs; each takes one more token as its last target, and the next row starts with that
        token."""
        if split not in self.maps:
            raise InputError(f"--data: {self.folder} has no {split} split (it has: "
                             f"{', '.join(self.maps) or 'none'}); prepare the source again")
        if self.packed and split == "train":
            return len(self.packed[1]) - 1
        n = (self.tokens(split) - 1) // T
        if n < 1:
            raise InputError(f"--data: {self.folder} has {self.tokens(split)} {split} tokens, less than one "
                             f"row of --seq_len={T} + 1; take a smaller --seq_len")
        return n

    def row(self, i, T, split="train"):
        """Row i: tokens (T + 1) int64 and document ids (T + 1) int64, counted from 0 in the row; -1 is
        padding behind packed documents."""
        tokens, offsets, first = self.maps[split]
        if self.packed and split == "train":
            pieces, rows = self.packed
            row, docs, at = np.zeros(T + 1, np.int64), np.full(T + 1, -1, np.int64), 0
            for d, (start, length) in enumerate(pieces[rows[i]:rows[i + 1]]):
                s = int(np.searchsorted(first, start, "right")) - 1
                row[at:at + length] = tokens[s][start - first[s]:start - first[s] + length]
                docs[at:at + length] = d
                at += length
            return row, docs
        at, parts, docs, base = i * T, [], [], 0
        while len(parts) == 0 or sum(map(len, parts)) < T + 1:
            s = int(np.searchsorted(first, at, "right")) - 1
            local = at - int(first[s])
            piece = tokens[s][local:local + T + 1 - sum(map(len, parts))]
            d = np.searchsorted(offsets[s], np.arange(local, local + len(piece)), "right") - 1
            docs.append(d - d[0] + base)
            base = int(docs[-1][-1]) + 1                  # a document never crosses a shard
            parts.append(piece)
            at += len(piece)
        return np.concatenate(parts).astype(np.int64), np.concatenate(docs)


    def lengths(self, split="train"):
        """Tokens of each document, separator included: int64 array."""
        return np.concatenate([np.diff(o) for o in self.maps[split][1]])

    def fingerprint(self):
        """Of the tokens rows are made of, and of their packing."""
        shards = [(x["file"], x["tokens"], x["crc32"]) for x in self.splits["train"]]
        return hashlib.sha256(repr((self.name, shards)).encode()).hexdigest() + (
            str([zlib.crc32(a) for a in self.packed]) if self.packed else "")

    def packed_for(self, T):
        """Takes train rows from what `python data.py pack --seq_len=T` wrote. InputError if there is none of
        these shards."""
        base = os.path.join(self.folder, f"packed-{T}")
        try:
            with open(base + ".json") as f:
                packing = json.load(f)
        except FileNotFoundError:
            raise InputError(f"--packing=bfd: {self.folder} is not packed for --seq_len={T}; run `python "
                             f"data.py pack --data={os.path.dirname(self.folder)} --seq_len={T} --method=bfd`"
                             ) from None
        except ValueError as e:
            raise InputError(f"--data: {base}.json is damaged ({e}); pack again") from None
        if packing["of"] != self.fingerprint():
            raise InputError(f"--data: {self.folder} was prepared again since it was packed for "
                             f"--seq_len={T}; pack it again")
        arrays = []
        for end, shape in ((".bin", (packing["pieces"], 2)), (".idx", (packing["rows"] + 1,))):
            array = self._map(f"packed-{T}{end}", int(np.prod(shape)), np.dtype(np.int64)).reshape(shape)
            if zlib.crc32(array) != packing["crc32" + end]:
                raise InputError(f"--data: {base}{end} is corrupted; pack again")
            arrays.append(array)
        self.packed = arrays
        return packing


@dataclass
class Batch:
    """Rows as arrays (n, T) int64: tokens, targets (-100 where not counted), docs; source (n) in the
    mixture's order."""
    tokens: np.ndarray
    targets: np.ndarray
    docs: np.ndarray
    source: np.ndarray


def collate(rows, sources, across):
    """[(tokens, docs)] of T + 1 to a Batch. across: whether the first token of a document counts as a target
    of the one before it (plain concatenation); with masked documents it does not."""
    tokens, docs = (np.stack(z) for z in zip(*rows, strict=True))
    targets = tokens[:, 1:].copy()
    if not across:
        targets[docs[:, 1:] != docs[:, :-1]] = -100
    targets[docs[:, 1:] < 0] = -100                       # padding; to the model a document of its own
    docs = np.where(docs < 0, docs.max(1, keepdims=True) + 1, docs)
    return Batch(tokens[:, :-1], targets, docs[:, :-1], np.asarray(sources))


class Stream:
    """The training rows of a mixture over prepared sources: a pure function of (seed, position)."""

    def __init__(self, folder, mixture, seed, T, tokenizer, vocab_size, across=False, packing="concat"):
        self.mixture, self.seed, self.T, self.across = mixture, seed, T, across
        self.sources = [Source(folder, name, tokenizer, vocab_size) for name in mixture]
        if packing == "bfd":
            for source in self.sources:
                source.packed_for(T)
        self.counts = [s.rows(T) for s in self.sources]

    def read(self, start, count):
        """Global rows start .. start + count as a Batch."""
        which, ordinals = _rows(self.mixture, self.seed, start, count)
        rows = []
        for s, k in zip(which, ordinals, strict=True):
            epoch, k = divmod(int(k), self.counts[s])
            key = _key(self.seed, self.sources[s].name, epoch)
            rows.append(self.sources[s].row(permuted(k, self.counts[s], key), self.T))
        return collate(rows, which, self.across)

    def fingerprint(self):
        """Of everything the order depends on: a resumed run refuses data that changed under it."""
        parts = [s.fingerprint() for s in self.sources]
        return hashlib.sha256(repr((parts, self.mixture, self.seed, self.T)).encode()).hexdigest()


def heldout(folder, tokenizer, vocab_size, T, rows, across=False):
    """{domain: Batch} of held-out rows, up to `rows` of each prepared source that has a row of them,
    checksums compared: the texts of the retention curve. A source that SOURCES does not name is a domain of
    its own."""
    found = {}
    for i, name in enumerate(prepared(folder)):
        source = Source(folder, name, tokenizer, vocab_size, only=("heldout",))
        if "heldout" in source.splits and source.tokens("heldout") > T:
            source.verify(splits=("heldout",))
            picked = [source.row(k, T, "heldout") for k in range(min(rows, source.rows(T, "heldout")))]
            domain = SOURCES[name][0] if name in SOURCES else name
            texts, sources = found.setdefault(domain, ([], []))
            texts += picked
            sources += [i] * len(picked)
    if not found:
        raise InputError(f"--data={folder} holds no held-out row of --seq_len={T} + 1 tokens; prepare "
                         f"held-out documents, or take a smaller --seq_len")
    order = [d for d in DOMAINS if d in found] + sorted(set(found) - set(DOMAINS))
    return {d: collate(*found[d], across) for d in order}


# -- commands ----------------------------------------------------------------------------------------------

def count(flag, value):
    """26.2144B, 300M, 5e6 as a number. InputError names the flag."""
    try:
        number = float(value.rstrip("kMBT")) * {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(value[-1:], 1)
    except ValueError:
        number = float("nan")
    if not 0 < number < 1e16:
        raise InputError(f"--{flag}={value}: give a number such as 26.2144B, at most 10,000T")
    return number


def plan(mixture: str = "math+code+science", tokens: str = "26.2144B", seq_len: int = 8192,
         data: str = "", hub: str = "", ask: bool = False):
    """Tokens and epochs of every source, files to get, disk.

    Args:
        mixture: a preset, or source:percent,source:percent
        tokens: a number, with k, M, B or T
        seq_len: tokens a row
        data: a prepared folder, whose tokens the epochs are then of
        hub: another hub by its URL, or a folder with copies of data sets; asks it
        ask: asks the hub for files and sizes
    """
    wanted = count("tokens", tokens)
    if seq_len < 2 or wanted < seq_len:
        raise InputError(f"--tokens={tokens} is no row of --seq_len={seq_len} tokens")
    mixture = read_mixture(mixture)
    sizes = {name: Source(data, name).tokens() / 1e9 for name in prepared(data)} if data else None
    print(forecast(mixture, round(wanted / seq_len), seq_len, sizes=sizes))
    if data:
        return
    hub = texts.Hub(hub) if hub or ask else None
    print(f"\nto get (python data.py get), to keep prepared\n  {'part':24s} {'files':>13s} {'download':>9s} "
          f"{'prepared':>9s}  data set")
    total = [0, 0]
    for name, percent in mixture.items():
        if name not in texts.REGISTRY:
            print(f"  {name:24s} {'your own':>13s}")
            continue
        source, need = texts.REGISTRY[name], percent / 100 * wanted / 1e9
        there = [spec.tokens for spec in source.parts.values()]
        kept = min(need * 1.1, need * 1.1 if None in there else sum(there))
        for i, (part, spec) in enumerate(texts.parts_to_get(name).items()):
            share = 1 if spec.tokens is None or spec.draw else min(1, need * 1.1 / spec.tokens)
            files, size = "?", spec.gb and spec.gb * share
            if hub:
                _, _, listed = hub.list(spec)
                chosen = texts.choose(listed, spec, need, 1)
                files, size = f"{len(chosen)} of {len(listed)}", sum(f["size"] for f in chosen) / 1e9
            elif share == 1:
                files = "all"
            bytes_ = "" if i else f"{4 * kept:.3g} GB"
            download = f"{size:.3g} GB" if size is not None else "?"
            note = "; gated" if spec.gated else ""
            if spec.stand_in:
                epochs = f"{need / spec.tokens:.3g} epochs" + " (more than 4)" * (need > 4 * spec.tokens)
                note += f"; stands in for {spec.stand_in}: about {spec.tokens:g}B tokens, {epochs}"
            print(f"  {part:24s} {files:>13s} {download:>9s} {bytes_:>9s}  {spec.repo}{note}")
            total[0] += size or 0
        total[1] += 4 * kept
    print(f"  {'sum' if hub else 'sum of what is known':24s} {'':13s} {total[0]:6.3g} GB {total[1]:6.3g} GB  "
          f"prepared as uint32; half where the vocabulary has at most 65,536 tokens")
    if not hub:
        print("  (sizes as the cards give them; ? = not given; --ask=True asks the hub)")


def pack(data: str, seq_len: int = 8192, method: str = "", overlap: int = 0, min_tokens: int = 0):
    """Puts whole documents together to rows of seq_len tokens (bfd, best-fit decreasing), for midtrain.py
    --packing=bfd. A document that is longer is split. Plain concatenation (concat, midtrain.py's default,
    most likely the paper's at 8k) cuts documents anywhere and is stored nowhere: its rows are printed only.

    Args:
        data: the prepared folder
        seq_len: tokens a row
        method: concat or bfd; by default concat up to 8,192 tokens, bfd above
        overlap: tokens that a part of a split document repeats of the part before
        min_tokens: shorter documents are left out (long-context restoration)
    """
    method = method or ("concat" if seq_len <= 8192 else "bfd")
    if method not in ("bfd", "concat"):
        raise InputError(f"--method={method!r} is not one of bfd, concat")
    if seq_len < 2 or not 0 <= overlap < seq_len or min_tokens < 0:
        raise InputError(f"--seq_len={seq_len} must be at least 2, --overlap={overlap} from 0 to "
                         f"{seq_len - 1}, --min_tokens={min_tokens} at least 0")
    if not prepared(data):
        raise InputError(f"--data={data} holds no prepared source")
    for name in prepared(data):
        source = Source(data, name)
        if method == "concat":
            print(f"{name:24s} {source.rows(seq_len):,} rows of {seq_len:,}, documents laid end to end")
            continue
        pieces, rows = packed_rows(source.lengths(), seq_len, overlap, min_tokens)
        if len(rows) < 2:
            raise InputError(f"--min_tokens={min_tokens} leaves no document of {source.folder}")
        base = os.path.join(source.folder, f"packed-{seq_len}")
        for array, end in ((pieces, ".bin"), (rows, ".idx")):
            array.tofile(base + end + ".tmp")
            os.replace(base + end + ".tmp", base + end)
        tokens = int(pieces[:, 1].sum())
        packing = {"method": method, "seq_len": seq_len, "overlap": overlap, "min_tokens": min_tokens,
                   "rows": len(rows) - 1, "pieces": len(pieces), "tokens": tokens,
                   "of": source.fingerprint(), "crc32.bin": zlib.crc32(pieces), "crc32.idx": zlib.crc32(rows)}
        write_atomic(base + ".json", json.dumps(packing, indent=1))
        print(f"{name:24s} {len(rows) - 1:,} rows of {seq_len:,}, {len(pieces):,} pieces, "
              f"{tokens / (len(rows) - 1) / seq_len:.3%} full")


def stats(data: str, seq_len: int = 8192, verify: bool = True):
    """What a prepared folder holds: documents, tokens, lengths, where from, what was left out and why.

    Args:
        data: the prepared folder
        seq_len: the rows column is of so many tokens
        verify: compares all checksums
    """
    names = prepared(data)
    if not names:
        raise InputError(f"--data={data} holds no prepared source (toy: python data.py toy --out={data})")
    found = {name: Source(data, name) for name in names}
    made = {source.manifest["tokenizer"] for source in found.values()}
    if len(made) > 1:
        raise InputError(f"--data={data} mixes sources of {len(made)} tokenizers: " + ", ".join(
            f"{name} {source.manifest['tokenizer'][:12]}" for name, source in found.items())
            + "; prepare them with one")
    print(f"tokenizer {made.pop()[:12]}, {', '.join({s.dtype.name for s in found.values()})}\n"
          f"{'source':24s} {'split':8s} {'documents':>10s} {'tokens':>8s} {'mean':>7s} {'median':>7s} "
          f"{'95 %':>7s} {'longest':>8s} {f'rows of {seq_len}':>14s}")
    for name, source in found.items():
        if verify:
            source.verify()
        for split in source.splits:
            n = source.lengths(split)
            rows = max(0, (source.tokens(split) - 1) // seq_len)
            print(f"{name:24s} {split:8s} {len(n):10,} {human(n.sum()):>8s} {n.mean():7.0f} "
                  f"{np.median(n):7.0f} {np.percentile(n, 95):7.0f} {n.max():8,} {rows:14,}")
    for name, source in found.items():
        for part, p in source.manifest.get("parts", {}).items():
            dropped = ", ".join(f"{reason} {n:,}" for reason, n in p["dropped"].items()) or "none"
            print(f"\n{name}" + (f", {part}" if part != name else "") + f": {p['from']} at "
                  f"{p['revision'][:12]}, {p['licence']}"
                  + (f"; stands in for {p['stand_in']}" if p["stand_in"] else "") + f"\n  {p['rows']:,} rows "
                  f"of {p['files']} files, {p['documents']:,} kept; left out: {dropped}")


def toy(out: str):
    """Prepares the embedded world for the toy models.

    Args:
        out: the folder
    """
    from tokenizer import toy_tokenizer
    prepare_toy(out, toy_tokenizer())


if __name__ == "__main__":
    import tyro

    from prepare import check, get, tokenize
    from prompts import get_prompts, mix, prompts
    commands = (plan, check, get, tokenize, pack, stats, get_prompts, prompts, mix, toy)
    try:
        tyro.extras.subcommand_cli_from_dict(
            {command.__name__: command for command in commands}, use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
            args=split_flags(sys.argv[1:]))
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        print(f"error: {e.filename or e}: {e.strerror or 'failed'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
