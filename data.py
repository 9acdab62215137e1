"""Mixtures, prepared token shards, and the order of batches as a pure function of (seed, step, global batch).

    python data.py plan --mixture=math+code --tokens=26.2144B    # tokens and epochs a source
    python data.py toy --out=data/toy         # the embedded world (world.py), tokenized: seconds, no network

A prepared folder holds one folder a source: token shards (uint16 or uint32, documents back to back, each
ending with the separator), document offsets, and manifest.json (tokenizer fingerprint, counts, checksums).

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

import world
from runtime import InputError, did_you_mean, human, write_atomic

# -- mixtures ----------------------------------------------------------------------------------------------

# source: (domain, billions of tokens with the Granite-3.3 tokenizer; paper, table 1; None = not given)
SOURCES = {
    "dclm-edu": ("general", 111.46),
    "chat": ("chat", None),                # WildChat + Tulu-3 personas + UltraChat, split not published
    "megamath-web-pro": ("math", 14.73),
    "nemotron-math": ("math", 35.93),
    "mot-math": ("math", 0.60),
    "mot-code": ("code", 1.18),
    "ocr2": ("code", 1.12),
    "refinecode": ("code", 186.44),
    "starcoder2": ("code", 432.73),
    "openthoughts3-science": ("science", 0.73),
    "mot-science": ("science", 0.42),
}
DOMAINS = ("general", "chat", "math", "code", "science")

MIXTURES = {                                         # percent of sampled training tokens; paper, figure 2
    "math": {"dclm-edu": 15, "chat": 10, "megamath-web-pro": 55, "nemotron-math": 10, "mot-math": 10},
    "math+code": {"dclm-edu": 5, "chat": 5, "megamath-web-pro": 27.5, "nemotron-math": 10, "mot-math": 10,
                  "mot-code": 5, "ocr2": 10, "refinecode": 13.75, "starcoder2": 13.75},
    "math+code+science": {"dclm-edu": 5, "chat": 5, "megamath-web-pro": 20, "nemotron-math": 10,
                          "mot-math": 7, "mot-code": 3, "ocr2": 10, "refinecode": 13.75, "starcoder2": 13.75,
                          "openthoughts3-science": 7.75, "mot-science": 4.75},
    # ours: pretrains the toy world's base
    "base": {"dclm-edu": 50, "chat": 10, "refinecode": 20, "starcoder2": 20},
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


def _period(rows, seed, period):
    """Source of each slot of one period: the seeded shuffle."""
    slots = np.repeat(np.arange(len(rows)), rows)
    with np.errstate(over="ignore"):
        keys = _mix(_key(seed, "period", int(period))
                    + np.arange(len(slots), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return slots[np.argsort(keys, kind="stable")]


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


def forecast(mixture, rows, T, seed=1):
    """The table of tokens and epochs a source that `rows` rows of T tokens of {source: percent} take. Epochs
    are of the paper's token counts; a source that repeats more than four times is marked."""
    lines = [f"{rows:,} rows of {T:,} tokens, {int(period_rows(mixture).sum())} rows a period",
             f"  {'source':24s} {'%':>6s} {'tokens':>9s} {'epochs':>7s}"]
    for (name, percent), k in zip(mixture.items(), planned_rows(mixture, seed, rows), strict=True):
        size = SOURCES.get(name, ("", None))[1]
        epochs = k * T / (size * 1e9) if size else None
        epochs_text = f"{epochs:.3g}" if epochs else "?"
        lines.append(f"  {name:24s} {percent:6.2f} {human(k * T):>9s} {epochs_text:>7s}"
                     + ("  repeats more than 4 times" if (epochs or 0) > 4 else ""))
    lines.append("  (epochs of the paper's table 1, Granite-3.3 tokenizer; ? = not given there)")
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


# -- prepared sources --------------------------------------------------------------------------------------

FORMAT = 1                                                # of manifest.json


def write_source(folder, name, splits, tokenizer, shard_tokens=1 << 28, revision=""):
    """Tokenizes {split: iterable of texts} into folder/name. Ids are uint16 where the vocabulary allows;
    revision says what the texts are a version of. Returns the manifest. The folder appears when complete."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    final, tmp = os.path.join(folder, name), os.path.join(folder, f"{name}.tmp-{os.getpid()}")
    shutil.rmtree(tmp, ignore_errors=True)                # what a failed call left
    os.makedirs(tmp)
    manifest = {"format": FORMAT, "source": name, "revision": revision, "tokenizer": tokenizer.fingerprint,
                "dtype": dtype.name, "splits": {}}
    for split, texts in splits.items():
        shards, documents, size = manifest["splits"].setdefault(split, []), [], 0

        def flush(split=split, shards=shards):
            nonlocal documents, size
            tokens = np.concatenate(documents)
            offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])]).astype(np.int64)
            file = f"{split}-{len(shards):05d}"
            tokens.tofile(os.path.join(tmp, file + ".bin"))
            offsets.tofile(os.path.join(tmp, file + ".idx"))
            shards.append({"file": file, "tokens": len(tokens), "documents": len(documents),
                           "max_id": int(tokens.max()), "crc32": zlib.crc32(tokens),
                           "idx_crc32": zlib.crc32(offsets)})
            documents, size = [], 0

        for text in texts:
            documents.append(np.array(tokenizer.document(text), dtype=dtype))
            size += len(documents[-1])
            if size >= shard_tokens:
                flush()
        if documents:
            flush()
    write_atomic(os.path.join(tmp, "manifest.json"), json.dumps(manifest, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    os.rename(tmp, final)
    return manifest


def prepare_toy(folder, tokenizer):
    """The embedded world, tokenized into `folder`; sources already there, whole, of this tokenizer, this
    world.py and this Python (whose library is the text), are left alone."""
    with open(world.__file__, "rb") as f:
        revision = hashlib.sha256(f.read() + sys.version.encode()).hexdigest()
    for name in SOURCES:
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
    """One prepared source, memory-mapped: rows of T + 1 tokens cut out of its documents laid end to end."""

    def __init__(self, folder, name, tokenizer, vocab_size):
        self.folder, self.name = os.path.join(folder, name), name
        path = os.path.join(self.folder, "manifest.json")
        try:
            with open(path) as f:
                manifest = json.load(f)
            if manifest["format"] != FORMAT:
                raise InputError(f"--data: {path} is of format {manifest['format']!r}, not {FORMAT}; prepare "
                                 f"the source again")
            self.dtype, made_with, self.revision = (np.dtype(manifest["dtype"]), manifest["tokenizer"],
                                                    manifest["revision"])
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
        if made_with != tokenizer.fingerprint:
            raise InputError(f"--data: {self.folder} was prepared with another tokenizer ({made_with[:12]}; "
                             f"the model's is {tokenizer.fingerprint[:12]}); prepare the data with this "
                             f"model's tokenizer")
        self.maps = {}                         # split: (token maps, offset maps, first token of each shard)
        for split, shards in self.splits.items():
            if not shards:
                raise InputError(f"--data: {self.folder} holds no {split} documents; prepare the source "
                                 f"again")
            tokens, offsets = [], []
            for shard in shards:
                tokens.append(self._map(shard["file"] + ".bin", shard["tokens"], self.dtype))
                offsets.append(self._map(shard["file"] + ".idx", shard["documents"] + 1, np.dtype(np.int64)))
                if shard["max_id"] >= vocab_size:
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
                                 f"manifest's); prepare the source again")

    def tokens(self, split="train"):
        return int(self.maps[split][2][-1])

    def rows(self, T, split="train"):
        """Rows of T inputs; each takes one more token as its last target, and the next row starts with that
        token."""
        if split not in self.maps:
            raise InputError(f"--data: {self.folder} has no {split} split (it has: "
                             f"{', '.join(self.maps) or 'none'}); prepare the source again")
        n = (self.tokens(split) - 1) // T
        if n < 1:
            raise InputError(f"--data: {self.folder} has {self.tokens(split)} {split} tokens, less than one "
                             f"row of --seq_len={T} + 1; take a smaller --seq_len")
        return n

    def row(self, i, T, split="train"):
        """Row i: tokens (T + 1) int64 and document ids (T + 1) int64, counted from 0 in the row."""
        tokens, offsets, first = self.maps[split]
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
    return Batch(tokens[:, :-1], targets, docs[:, :-1], np.asarray(sources))


class Stream:
    """The training rows of a mixture over prepared sources: a pure function of (seed, position)."""

    def __init__(self, folder, mixture, seed, T, tokenizer, vocab_size, across=False):
        self.mixture, self.seed, self.T, self.across = mixture, seed, T, across
        self.sources = [Source(folder, name, tokenizer, vocab_size) for name in mixture]
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
        parts = [(s.name, [(x["file"], x["tokens"], x["crc32"]) for x in s.splits["train"]])
                 for s in self.sources]
        return hashlib.sha256(repr((parts, self.mixture, self.seed, self.T)).encode()).hexdigest()


def heldout(folder, tokenizer, vocab_size, T, rows, across=False):
    """{domain: Batch} of held-out rows, up to `rows` of each prepared source that has a row of them,
    checksums compared: the texts of the retention curve. A source that SOURCES does not name is a domain of
    its own."""
    found = {}
    for i, name in enumerate(prepared(folder)):
        source = Source(folder, name, tokenizer, vocab_size)
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

def plan(mixture: str = "math+code+science", tokens: str = "26.2144B", seq_len: int = 8192):
    """Tokens and epochs of every source.

    Args:
        mixture: a preset, or source:percent,source:percent
        tokens: a number, with k, M, B or T
        seq_len: tokens a row
    """
    try:
        count = float(tokens.rstrip("kMBT")) * {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(tokens[-1:], 1)
    except ValueError:
        raise InputError(f"--tokens={tokens}: give a number such as 26.2144B") from None
    if not seq_len <= count < 1e16 or seq_len < 2:
        raise InputError(f"--tokens={tokens} is no row of --seq_len={seq_len} tokens, or more than 10,000T")
    print(forecast(read_mixture(mixture), round(count / seq_len), seq_len))


def toy(out: str):
    """Prepares the embedded world for the toy models.

    Args:
        out: the folder
    """
    from tokenizer import toy_tokenizer
    prepare_toy(out, toy_tokenizer())


if __name__ == "__main__":
    import tyro
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"plan": plan, "toy": toy}, use_underscores=True,
            args=[token for arg in sys.argv[1:] for token in arg.split("=", 1)])
    except InputError as e:
        sys.exit(f"error: {e}")
