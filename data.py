"""Mixtures, prepared token shards, and the order of batches as a pure function of (seed, step, global batch).

    python data.py plan --mixture=math+code --tokens=26.2144B    # tokens, epochs, files and disk a source
    python data.py check --mixture=math+code                     # columns of one file of each, on the hub
    python data.py get --mixture=math+code --tokens=26.2144B     # only the files that takes
    python data.py tokenize --mixture=math+code --tokenizer=granite-3.3-8b --out=data/mc   # --part=0/8
    python data.py pack --data=data/lc --seq_len=131072          # rows for midtrain.py --packing=bfd
    python data.py stats --data=data/mc                          # documents, lengths, what was left out
    python data.py get_prompts && python data.py prompts         # RL's prompts, apart from the benchmarks
    python data.py mix --verdicts=verdicts.jsonl --kind=balanced # ... by difficulty
    python data.py toy --out=data/toy     # the embedded world (corpus/world.py): seconds, no network

A prepared folder holds one folder a source: token shards (uint16 or uint32, documents back to back, each
ending with the separator), document offsets, and manifest.json (tokenizer fingerprint, counts, checksums).
corpus/registry.py says which texts these are, corpus/formats.py how a row becomes one, corpus/prompts.py
which prompts RL takes.

Order (nothing is stored but the step): a period of rows holds every source exactly in proportion; a seeded
shuffle of the period gives each global row its source; the k-th row ever taken from a source is row
f(k mod n) of epoch k // n, with f a keyed bijection. So any step is reached at once, the shares are exact
every period, and neither the number of ranks nor the prefetch can change what is trained on.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import zlib
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from cli import InputError, commands, did_you_mean, human, write_atomic
from corpus.hashes import hashed, splitmix64, stream_key
from corpus.hub import Hub, choose, get_part, shuffled
from corpus.prompts import BENCHMARKS, RL, encode_prompt, get_prompts, mix, prompts, records_of, toy_prompts
from corpus.registry import DOMAINS, REGISTRY, find_source, parts_to_get
from corpus.shards import Source, best_fit, id_dtype, packed_rows, prepared
from corpus.tokenizer import toy_tokenizer
from corpus.tokenizing import Job, _start_worker, named_tokenizer, prepare_toy, tokenize_pieces
from verify import SandboxMissing, check_sandbox, gradable, grade_batch

__all__ = ["MIXTURES", "Stream", "best_fit", "heldout", "prepare_toy", "read_mixture", "read_prompts",
           "row_sources"]

# -- mixtures ----------------------------------------------------------------------------------------------

# source: (domain, billions of tokens with the Granite-3.3 tokenizer; paper, table 1; None = not given)
SOURCES = {name: (source.domain, source.tokens) for name, source in REGISTRY.items()}

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
                int(splitmix64(np.uint64((right + (r + 1) * 0x9E3779B97F4A7C15) % 2 ** 64) ^ key)) & mask)
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


@dataclass
class Batch:
    """Rows as arrays (n, T) int64: tokens, targets (-100 where not counted), docs; source (n) in the
    mixture's order. What a step says of its rows is counted by the thread that reads them, see
    midtrain.batches."""
    tokens: np.ndarray
    targets: np.ndarray
    docs: np.ndarray
    source: np.ndarray
    counted: int = 0                     # targets that the loss counts
    keys_met: float = 0.0                # keys that all queries see
    rows_per_source: np.ndarray | None = None

    def document_lengths(self):
        """Tokens of each document in each row, in their order: int64 array. They sum to n * T."""
        first_token = np.diff(self.docs, axis=1, prepend=-1).ravel() != 0
        return np.diff(np.flatnonzero(first_token), append=self.docs.size)


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
            key = stream_key(self.seed, self.sources[s].name, epoch)
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
    hub = Hub(hub) if hub or ask else None
    print(f"\nto get (python data.py get), to keep prepared\n  {'part':24s} {'files':>13s} {'download':>9s} "
          f"{'prepared':>9s}  data set")
    total = [0, 0]
    for name, percent in mixture.items():
        if name not in REGISTRY:
            print(f"  {name:24s} {'your own':>13s}")
            continue
        source, need = REGISTRY[name], percent / 100 * wanted / 1e9
        there = [spec.tokens for spec in source.parts.values()]
        kept = min(need * 1.1, need * 1.1 if None in there else sum(there))
        for i, (part, spec) in enumerate(parts_to_get(name).items()):
            share = 1 if spec.tokens is None or spec.draw else min(1, need * 1.1 / spec.tokens)
            files, size = "?", spec.gb and spec.gb * share
            if hub:
                _, _, listed = hub.list(spec)
                chosen = choose(listed, spec, need, 1)
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
    prepare_toy(out, toy_tokenizer())


# -- commands ----------------------------------------------------------------------------------------------

def own_sources(sources):
    """--sources=name=local:path,... to {name: path}."""
    own = {}
    for item in filter(None, sources.split(",")):
        name, _, path = item.partition("=")
        name = name.strip()
        if not re.fullmatch(r"\w[\w+.-]*", name) or name.endswith(".work") or ".tmp-" in name or \
                not path.startswith("local:"):
            raise InputError(f"--sources: {item!r} is not name=local:path (a folder, a file or a glob)")
        if name in own:
            raise InputError(f"--sources: {name} is there twice; give each source once (local:folder takes "
                             f"all files below it)")
        own[name] = path.removeprefix("local:")
    return own


def check(mixture: str = "", hub: str = ""):
    """Compares the registry with the hub: files there, columns of one file of every part.

    Args:
        mixture: a preset, or source:percent,...; default: all of the registry, RL's and the benchmarks
        hub: another hub by its URL, or a folder with copies of data sets
    """
    hub, wrong = Hub(hub), []
    parts = {part: spec for name in (read_mixture(mixture) if mixture else REGISTRY)
             for part, spec in parts_to_get(name).items()}
    parts |= {} if mixture else RL | BENCHMARKS
    for name, part in parts.items():
        try:
            repo, revision, files = hub.list(part)
            columns = hub.columns(repo, revision, shuffled(files, 1, part.repo)[0])
        except (InputError, OSError, ValueError) as e:    # pyarrow's and json's are ValueErrors
            wrong.append(name)
            print(f"{name:24s} {e}")
            continue
        missing = [column for column in part.columns if column not in columns]
        size = sum(f["size"] for f in files) / 1e9
        print(f"{name:24s} {repo}@{revision[:12]} {len(files)} files, {size:.3g} GB, {part.licence}: "
              + (f"NO COLUMN {', '.join(missing)} (it has {', '.join(columns)})" if missing else
                 "columns as expected: " + ", ".join(f"{c} {columns[c]}" for c in part.columns)))
        wrong += [name] * bool(missing)
    if wrong:
        raise InputError(f"{len(wrong)} of {len(parts)} parts are not as corpus/registry.py has them: "
                         f"{', '.join(wrong)}; edit their Part in corpus/registry.py")


def get(mixture: str = "math+code+science", tokens: str = "26.2144B", raw: str = "data/raw", hub: str = "",
        seed: int = 1, connections: int = 4, sources: str = ""):
    """Downloads the files that a mixture takes, in a seeded order. Call it again to go on, or with more
    --tokens to add to it. Under torchrun rank 0 does it.

    Args:
        mixture: a preset, or source:percent,source:percent
        tokens: of the whole mixture, a number with k, M, B or T
        raw: folder of the downloads
        hub: another hub by its URL, or a folder with copies of data sets
        seed: of the order of files
        connections: files at a time
        sources: your own, as for tokenize: not to get
    """
    if int(os.environ.get("RANK", 0)):
        return
    wanted, hub = count("tokens", tokens), Hub(hub)
    mixture = {name: p for name, p in read_mixture(mixture).items() if name not in own_sources(sources)}
    for name in mixture:
        find_source(name)
    for name, percent in mixture.items():
        for part, spec in parts_to_get(name).items():
            try:
                get_part(hub, part, spec, percent / 100 * wanted / 1e9, raw, seed, connections)
            except OSError as e:
                raise InputError(f"--raw={raw}: {part} cannot be written ({e.strerror or e}); free "
                                 f"space, then run the command again, it goes on") from None


def tokenize(out: str, tokenizer: str, mixture: str = "", sources: str = "", raw: str = "data/raw",
             workers: int = 0, part: str = "0/1", heldout: float = 0.002, dedup: bool = True, seed: int = 1):
    """Prepares sources for training: filters, formats, tokenizes, removes duplicates. Call it again to go on
    where a killed call stopped.

    Args:
        out: folder of the prepared sources
        tokenizer: toy, a folder, or a model whose tokenizer the hub has
        mixture: a preset, or source:percent,source:percent; its sources are prepared
        sources: your own, name=local:path,... (a folder, a file or a glob; parquet, arrow, jsonl, text)
        raw: folder that `get` filled
        workers: processes; 0 = one a core
        part: i/n does every n-th piece, for array jobs; the last one puts the whole together
        heldout: share of the documents kept for held-out losses
        dedup: leaves out documents whose text has been before in the source
        seed: of the draws (OpenCodeReasoning-2)
    """
    own = own_sources(sources)
    names = list(dict.fromkeys([*(read_mixture(mixture) if mixture else ()), *own]))
    try:
        i, n = map(int, part.split("/"))
    except ValueError:
        i, n = -1, 0
    if not names:
        raise InputError("--mixture or --sources: name what to prepare")
    if not 0 <= i < n:
        raise InputError(f"--part={part} is not i/n with 0 <= i < n, such as 0/8")
    if not 0 <= heldout < 1 or workers < 0:
        raise InputError(f"--heldout={heldout} must be in [0, 1), --workers={workers} at least 0")
    tok = named_tokenizer(tokenizer)
    for name in prepared(out):
        if name not in names:
            Source(out, name, tok, only=())               # refuses another tokenizer's folder
    jobs = [Job(out, name, own.get(name), raw, tok, heldout, dedup, seed) for name in names]
    pending = [job for job in jobs if not job.done()]
    for job in jobs:
        if job not in pending:
            shutil.rmtree(job.work, ignore_errors=True)
            print(f"{job.name}: prepared already")
        for origin in job.origin.values():
            if origin["stand_in"]:
                print(f"{job.name}: {origin['from']} stands in for {origin['stand_in']}")
    if not pending:
        return
    size = sum(os.path.getsize(f) for job in pending for files in job.parts.values() for f in files)
    # the proof takes seconds
    encoder = tok.faster() if size > 50e6 or tokenizer == "toy" else "tokenizers"
    print(f"encoder: {encoder}", flush=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data"])
    workers = workers or os.cpu_count() or 1
    wrong = []
    with contextlib.ExitStack() as locks, concurrent.futures.ProcessPoolExecutor(
            workers, context, _start_worker,
            (tok, (tok.fast, tok.guard), raw, heldout, id_dtype(tok.vocab_size))) as pool:
        try:
            for job in pending:
                os.makedirs(job.work, exist_ok=True)
                locks.enter_context(job.claim(i, n))
                job.cut(pool)
            tokenize_pieces(pool, [piece for job in pending for piece in job.left(i, n)])
            for job in pending:
                if job.done():
                    continue
                left = [f"{k}/{n}" for k in range(n) if job.left(k, n)] if job.left() else []
                if left:
                    print(f"{job.name}: parts {', '.join(left)} have pieces left to do")
                    continue
                try:
                    manifest = job.finish(pool)
                except InputError as e:                   # no document: the other sources do not wait for it
                    wrong.append(str(e))
                    continue
                if manifest:
                    tokens = {split: sum(s["tokens"] for s in shards)
                              for split, shards in manifest["splits"].items()}
                    print(f"{job.name}: " + ", ".join(f"{human(k)} tokens {s}" for s, k in tokens.items()))
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError(f"--workers={workers}: a worker was killed, most likely for memory; run the "
                             f"command again with fewer, it goes on") from None
        except OSError as e:
            room = "free space, then " if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise InputError(f"--out={out}: {e.filename or 'a file'} cannot be written "
                             f"({e.strerror or e}); {room}"
                             f"run the command again, it goes on") from None
        finally:
            pool.shutdown(cancel_futures=True)
    if wrong:
        raise InputError("; ".join(wrong))


def read_prompts(path, flag, domains, tokenizer, context, split="rl", count=2000):
    """The records that can be trained on, each with its "ids"; and how many were left out, by reason.
    InputError if the file is amiss or nothing is left."""
    lines = enumerate(toy_prompts(split, count, domains), 1) if path == "toy" else records_of(path, flag)
    records, left_out, seen = [], Counter(), set()
    for n, record in lines:
        if record["domain"] not in domains:
            left_out[f"of {record['domain']} (--domains)"] += 1
            continue
        if record["id"] in seen:
            raise InputError(f"--{flag}: {path}, line {n}: the id {record['id']!r} came before; each prompt "
                             f"has its own")
        seen.add(record["id"])
        ids = encode_prompt(tokenizer, record["prompt"])
        if len(ids) >= context:
            left_out[f"as long as --context={context} or longer"] += 1
            continue
        records.append(record | {"ids": ids})
    # a gold answer that its own grader does not accept can only ever be punished
    boxed = [(r["domain"], f"\\boxed{{{_letter(r['truth'])}}}", r["truth"]) for r in records
             if r["domain"] != "code"]
    verdicts = iter(grade_batch(boxed))
    kept = [r for r in records if (gradable(r["truth"]) if r["domain"] == "code" else next(verdicts).correct)]
    if len(kept) < len(records):
        left_out["with a gold answer that cannot be read"] = len(records) - len(kept)
    if not kept:
        why = "; ".join(f"{n} {reason}" for reason, n in left_out.items()) or "the file is empty"
        raise InputError(f"--{flag}={path}: no prompt is left ({why})")
    return kept, left_out


def _letter(truth):
    return truth.get("letter", "") if isinstance(truth, dict) else truth


def need_sandbox(records, cfg):
    """InputError where programs are to be graded and there is nowhere to run them."""
    if any(r["domain"] == "code" for r in records):
        try:
            check_sandbox(cfg.unsafe_sandbox)
        except SandboxMissing as e:
            raise InputError(f"--domains={cfg.domains}: {e}; or leave code out") from None


if __name__ == "__main__":
    commands(plan, check, get, tokenize, pack, stats, get_prompts, prompts, mix, toy)
