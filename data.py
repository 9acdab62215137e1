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

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from cli import InputError, commands, did_you_mean, human
from corpus import tokenizing
from corpus.hashes import GOLDEN, hashed, splitmix64, stream_key
from corpus.hub import MARGIN, Hub, check_part, estimate, get_part
from corpus.prompts import BENCHMARKS, RL, encode_prompt, get_prompts, mix, prompts, records_of, toy_prompts
from corpus.registry import DOMAINS, REGISTRY, find_source, parts_to_get
from corpus.shards import Source, best_fit, prepared
from corpus.tokenizer import toy_tokenizer
from corpus.tokenizing import prepare_toy
from verify import SandboxMissing, check_sandbox, gradable, grade_batch

__all__ = ["MIXTURES", "Stream", "best_fit", "heldout", "prepare_toy", "read_mixture", "read_prompts",
           "row_sources"]

# -- mixtures ----------------------------------------------------------------------------------------------

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
    total = sum(mixture.values())
    is_hundred = abs(total - 100) <= 1e-6                 # False for nan
    if not is_hundred or any(percent <= 0 for percent in mixture.values()):
        raise InputError(f"--mixture={text!r}: the percentages sum to {total:g}; they must be positive and "
                         f"sum to 100")
    return mixture


def period_rows(mixture):
    """Rows of each source in one period, in the mixture's order: the shortest period (at most 10,000 rows)
    that holds every share exactly (20, 80 and 400 for the paper's three), else 10,000 rows by largest
    remainder."""
    shares = [Fraction(str(percent)) / 100 for percent in mixture.values()]
    period = np.lcm.reduce([share.denominator for share in shares], dtype=object)
    if period <= 10_000 and sum(shares) == 1:
        return np.array([int(share * period) for share in shares])
    exact = [share * 10_000 / sum(shares) for share in shares]
    rows = np.array([int(n) for n in exact])              # rounded down: some rows are left to deal out
    by_remainder = sorted(range(len(exact)), key=lambda i: rows[i] - exact[i])
    for i in by_remainder[:10_000 - rows.sum()]:
        rows[i] += 1
    return rows


def forecast(mixture, rows, T, seed=1, sizes=None):
    """The table of tokens and epochs a source that `rows` rows of T tokens of {source: percent} take. Epochs
    are of the paper's token counts, or of sizes {source: billions}; a source that repeats more than four
    times is marked."""
    if sizes is None:
        sizes = {name: source.tokens for name, source in REGISTRY.items()}
        note = "(epochs of the paper's table 1, Granite-3.3 tokenizer; ? = not given there)"
    else:
        note = "(epochs of the prepared tokens; ? = not prepared)"
    lines = [f"{rows:,} rows of {T:,} tokens, {int(period_rows(mixture).sum())} rows a period",
             f"  {'source':24s} {'%':>6s} {'tokens':>9s} {'epochs':>7s}"]
    planned = planned_rows(mixture, seed, rows)
    for (name, percent), source_rows in zip(mixture.items(), planned, strict=True):
        tokens = source_rows * T
        billions = sizes.get(name)
        epochs = tokens / (billions * 1e9) if billions else 0
        epochs_text = f"{epochs:.3g}" if epochs else "?"
        warning = "  repeats more than 4 times" if epochs > 4 else ""
        lines.append(f"  {name:24s} {percent:6.2f} {human(tokens):>9s} {epochs_text:>7s}{warning}")
    return "\n".join([*lines, f"  {note}"])


# -- the order of rows -------------------------------------------------------------------------------------

class RowOrigins(NamedTuple):
    """Where consecutive global rows come from: int64 arrays."""
    sources: np.ndarray                  # index in the mixture's order
    ordinals: np.ndarray                 # the how-manieth row ever taken from that source, from 0


def _period(rows, seed, period):
    """Source of each slot of one period: the seeded shuffle."""
    slots = np.repeat(np.arange(len(rows)), rows)
    return slots[np.argsort(hashed(np.arange(len(slots)), seed, "period", int(period)), kind="stable")]


def row_origins(mixture, seed, start, count):
    """The RowOrigins of global rows start .. start + count. mixture: a name of MIXTURES, or {source:
    percent}."""
    rows = period_rows(MIXTURES[mixture] if isinstance(mixture, str) else mixture)
    period_size = int(rows.sum())
    end = start + count
    sources, ordinals = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for period in range(start // period_size, -(-end // period_size)):
        slots = _period(rows, seed, period)
        # A source's rows of this period come after those of the periods before, rows[source] in each.
        ordinal = np.empty(period_size, dtype=np.int64)
        for source, n in enumerate(rows):
            ordinal[slots == source] = period * int(n) + np.arange(n)
        first = period * period_size
        window = slice(max(start - first, 0), min(end - first, period_size))
        sources.append(slots[window])
        ordinals.append(ordinal[window])
    return RowOrigins(np.concatenate(sources), np.concatenate(ordinals))


def row_sources(mixture, seed, start, count):
    """Which source (index in the mixture's order) each of the global rows start .. start + count comes from:
    int64 array. mixture: a name of MIXTURES, or {source: percent}. Exact in every period of
    `period_rows(...)`.sum() rows."""
    return row_origins(mixture, seed, start, count).sources


def planned_rows(mixture, seed, count):
    """How many of the first `count` global rows come from each source: int64 array in the mixture's order."""
    rows = period_rows(mixture)
    periods, rest = divmod(count, int(rows.sum()))
    last = row_sources(mixture, seed, count - rest, rest)
    return periods * rows + np.bincount(last, minlength=len(rows))


def permuted(k, n, key):
    """Image of k under a keyed bijection of range(n): a 4-round Feistel network over the next even power of
    two, walked until it falls below n. k: int. O(1) memory, any position at once, a new order for every
    key."""
    half_bits = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = k >> half_bits, k & mask
        for round_number in range(1, 5):
            salted = (right + round_number * int(GOLDEN)) % 2 ** 64
            mixed = int(splitmix64(np.uint64(salted) ^ key)) & mask
            left, right = right, left ^ mixed
        k = left << half_bits | right
        if k < n:
            return k


# -- batches -----------------------------------------------------------------------------------------------

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


def document_lengths(docs):
    """Tokens of each document in each row of docs (n, T), in their order: int64 array. They sum to n T."""
    first_token = np.diff(docs, axis=1, prepend=-1).ravel() != 0
    return np.diff(np.flatnonzero(first_token), append=docs.size)


def collate(rows, sources, across):
    """[(tokens, docs)] of T + 1 to a Batch. across: whether the first token of a document counts as a target
    of the one before it (plain concatenation); with masked documents it does not."""
    tokens = np.stack([row for row, _ in rows])
    docs = np.stack([row_docs for _, row_docs in rows])
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
        self.counts = [source.rows(T) for source in self.sources]

    def read(self, start, count):
        """Global rows start .. start + count as a Batch."""
        origins = row_origins(self.mixture, self.seed, start, count)
        rows = []
        for source, ordinal in zip(*origins, strict=True):
            epoch, k = divmod(int(ordinal), self.counts[source])
            key = stream_key(self.seed, self.sources[source].name, epoch)
            rows.append(self.sources[source].row(permuted(k, self.counts[source], key), self.T))
        return collate(rows, origins.sources, self.across)

    def fingerprint(self):
        """Of everything the order depends on: a resumed run refuses data that changed under it."""
        sources = [source.fingerprint() for source in self.sources]
        return hashlib.sha256(repr((sources, self.mixture, self.seed, self.T)).encode()).hexdigest()


def heldout(folder, tokenizer, vocab_size, T, rows, across=False):
    """{domain: Batch} of held-out rows, up to `rows` of each prepared source that has a row of them,
    checksums compared: the texts of the retention curve. A source that the registry does not name is a domain
    of its own."""
    rows_of, sources_of = {}, {}                          # by domain: rows as Source.row gives them; theirs
    for number, name in enumerate(prepared(folder)):
        source = Source(folder, name, tokenizer, vocab_size, only=("heldout",))
        if "heldout" not in source.splits or source.tokens("heldout") <= T:
            continue
        source.verify(splits=("heldout",))
        domain = REGISTRY[name].domain if name in REGISTRY else name
        count = min(rows, source.rows(T, "heldout"))
        rows_of.setdefault(domain, []).extend(source.row(k, T, "heldout") for k in range(count))
        sources_of.setdefault(domain, []).extend([number] * count)
    if not rows_of:
        raise InputError(f"--data={folder} holds no held-out row of --seq_len={T} + 1 tokens; prepare "
                         f"held-out documents, or take a smaller --seq_len")
    in_order = [domain for domain in DOMAINS if domain in rows_of] + sorted(set(rows_of) - set(DOMAINS))
    return {domain: collate(rows_of[domain], sources_of[domain], across) for domain in in_order}


# -- prompts of RL -----------------------------------------------------------------------------------------

def read_prompts(path, flag, domains, tokenizer, context, split="rl", count=2000):
    """The records that can be trained on, each with its "ids"; and how many were left out, by reason.
    path: a .jsonl of prompts, or toy, the embedded world's `count` of a split. InputError if the file is
    amiss or nothing is left."""
    records, left_out, seen = [], Counter(), set()
    lines = enumerate(toy_prompts(split, count, domains), 1) if path == "toy" else records_of(path, flag)
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
    kept = with_readable_truth(records)
    if len(kept) < len(records):
        left_out["with a gold answer that cannot be read"] = len(records) - len(kept)
    if not kept:
        reasons = "; ".join(f"{n} {reason}" for reason, n in left_out.items()) or "the file is empty"
        raise InputError(f"--{flag}={path}: no prompt is left ({reasons})")
    return kept, left_out


def with_readable_truth(records):
    """The records whose gold answer their own grader accepts: another one can only ever be punished."""
    answers = []                                          # (domain, response, truth) of all but code
    for record in records:
        truth = record["truth"]
        if record["domain"] != "code":
            answer = truth.get("letter", "") if isinstance(truth, dict) else truth
            answers.append((record["domain"], f"\\boxed{{{answer}}}", truth))
    verdicts = iter(grade_batch(answers, again=1))
    kept = []
    for record in records:
        is_code = record["domain"] == "code"
        if gradable(record["truth"]) if is_code else next(verdicts).correct:
            kept.append(record)
    return kept


def need_sandbox(records, cfg):
    """InputError where programs are to be graded and there is nowhere to run them."""
    if any(record["domain"] == "code" for record in records):
        try:
            check_sandbox(cfg.unsafe_sandbox)
        except SandboxMissing as e:
            raise InputError(f"--domains={cfg.domains}: {e}; or leave code out") from None


# -- commands: flags ---------------------------------------------------------------------------------------

def token_count(text):
    """--tokens: 26.2144B, 300M, 5e6 as a number."""
    units = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    try:
        number = float(text.rstrip("kMBT")) * units.get(text[-1:], 1)
    except ValueError:
        number = float("nan")
    if not 0 < number < 1e16:
        raise InputError(f"--tokens={text}: give a number such as 26.2144B, at most 10,000T")
    return number


def local_sources(text):
    """--sources=name=local:path,... to {name: path}."""
    paths = {}
    for item in filter(None, text.split(",")):
        name, _, path = item.partition("=")
        name = name.strip()
        is_name = re.fullmatch(r"\w[\w+.-]*", name) and not name.endswith(".work") and ".tmp-" not in name
        if not is_name or not path.startswith("local:"):
            raise InputError(f"--sources: {item!r} is not name=local:path (a folder, a file or a glob)")
        if name in paths:
            raise InputError(f"--sources: {name} is there twice; give each source once (local:folder takes "
                             f"all files below it)")
        paths[name] = path.removeprefix("local:")
    return paths


def array_part(text):
    """--part: 0/8 as (0, 8)."""
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        i, n = -1, 0
    if not 0 <= i < n:
        raise InputError(f"--part={text} is not i/n with 0 <= i < n, such as 0/8")
    return i, n


# -- commands ----------------------------------------------------------------------------------------------

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
    wanted = token_count(tokens)
    if seq_len < 2 or wanted < seq_len:
        raise InputError(f"--tokens={tokens} is no row of --seq_len={seq_len} tokens")
    mixture = read_mixture(mixture)
    sizes = {name: Source(data, name).tokens() / 1e9 for name in prepared(data)} if data else None
    print(forecast(mixture, round(wanted / seq_len), seq_len, sizes=sizes))
    if not data:
        print_downloads(mixture, wanted / 1e9, Hub(hub) if hub or ask else None)


def print_downloads(mixture, billions, hub):
    """The table of files to get for so many tokens of a mixture, and of disk. hub: who is asked, or None."""
    print(f"\nto get (python data.py get), to keep prepared\n  {'part':24s} {'files':>13s} {'download':>9s} "
          f"{'prepared':>9s}  data set")
    download_gb = prepared_gb = 0
    for name, percent in mixture.items():
        if name not in REGISTRY:
            print(f"  {name:24s} {'your own':>13s}")
            continue
        need = percent / 100 * billions
        kept_gb = 4 * kept_billions(REGISTRY[name], need)                    # four bytes a token
        prepared_gb += kept_gb
        prepared_text = f"{kept_gb:.3g} GB"               # once a source, beside its first part
        for part, spec in parts_to_get(name).items():
            download = estimate(spec, need, hub)
            download_gb += download.gigabytes or 0
            size = "?" if download.gigabytes is None else f"{download.gigabytes:.3g} GB"
            print(f"  {part:24s} {download.files:>13s} {size:>9s} {prepared_text:>9s}  {spec.repo}"
                  f"{part_note(spec, need)}")
            prepared_text = ""
    title = "sum" if hub else "sum of what is known"
    print(f"  {title:24s} {'':13s} {download_gb:6.3g} GB {prepared_gb:6.3g} GB  prepared as uint32; half "
          f"where the vocabulary has at most 65,536 tokens")
    if not hub:
        print("  (sizes as the cards give them; ? = not given; --ask=True asks the hub)")


def kept_billions(source, need):
    """Billions of tokens that a source is prepared to, where `need` are trained on: at most all it has."""
    tokens = [spec.tokens for spec in source.parts.values()]
    return need * MARGIN if None in tokens else min(need * MARGIN, sum(tokens))


def part_note(spec, need):
    """What the plan says of a part beside its sizes."""
    note = "; gated" if spec.gated else ""
    if spec.stand_in:
        warning = " (more than 4)" if need > 4 * spec.tokens else ""
        note += (f"; stands in for {spec.stand_in}: about {spec.tokens:g}B tokens, "
                 f"{need / spec.tokens:.3g} epochs{warning}")
    return note


def check(mixture: str = "", hub: str = ""):
    """Compares the registry with the hub: files there, columns of one file of every part.

    Args:
        mixture: a preset, or source:percent,...; default: all of the registry, RL's and the benchmarks
        hub: another hub by its URL, or a folder with copies of data sets
    """
    hub = Hub(hub)
    parts = {}
    for name in read_mixture(mixture) if mixture else REGISTRY:
        parts |= parts_to_get(name)
    if not mixture:
        parts |= RL | BENCHMARKS
    wrong = []
    for name, part in parts.items():
        try:
            listing, columns, missing = check_part(hub, part)
        except (InputError, OSError, ValueError) as e:    # pyarrow's and json's are ValueErrors
            wrong.append(name)
            print(f"{name:24s} {e}")
            continue
        gigabytes = sum(file["size"] for file in listing.files) / 1e9
        if missing:
            wrong.append(name)
            result = f"NO COLUMN {', '.join(missing)} (it has {', '.join(columns)})"
        else:
            result = "columns as expected: " + ", ".join(f"{column} {columns[column]}"
                                                         for column in part.columns)
        print(f"{name:24s} {listing.repo}@{listing.revision[:12]} {len(listing.files)} files, "
              f"{gigabytes:.3g} GB, {part.licence}: {result}")
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
    wanted = token_count(tokens)
    hub = Hub(hub)
    local = local_sources(sources)
    mixture = {name: percent for name, percent in read_mixture(mixture).items() if name not in local}
    for name in mixture:
        find_source(name)                                 # refuses an unknown one at once
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
    local = local_sources(sources)
    registered = read_mixture(mixture) if mixture else ()
    names = list(dict.fromkeys([*registered, *local]))
    if not names:
        raise InputError("--mixture or --sources: name what to prepare")
    part = array_part(part)
    if not 0 <= heldout < 1 or workers < 0:
        raise InputError(f"--heldout={heldout} must be in [0, 1), --workers={workers} at least 0")
    tokenizing.tokenize(out, names, local, raw, tokenizer, workers, part, heldout, dedup, seed)


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
    names = prepared(data)
    if not names:
        raise InputError(f"--data={data} holds no prepared source")
    for name in names:
        source = Source(data, name)
        if method == "concat":
            print(f"{name:24s} {source.rows(seq_len):,} rows of {seq_len:,}, documents laid end to end")
            continue
        packing = source.pack(seq_len, overlap, min_tokens)
        full = packing["tokens"] / packing["rows"] / seq_len
        print(f"{name:24s} {packing['rows']:,} rows of {seq_len:,}, {packing['pieces']:,} pieces, "
              f"{full:.3%} full")


def stats(data: str, seq_len: int = 8192, verify: bool = True):
    """What a prepared folder holds: documents, tokens, lengths, where from, what was left out and why.

    Args:
        data: the prepared folder
        seq_len: the rows column is of so many tokens
        verify: compares all checksums
    """
    sources = [Source(data, name) for name in prepared(data)]
    if not sources:
        raise InputError(f"--data={data} holds no prepared source (toy: python data.py toy --out={data})")
    tokenizers = {source.tokenizer for source in sources}
    if len(tokenizers) > 1:
        pairs = ", ".join(f"{source.name} {source.tokenizer[:12]}" for source in sources)
        raise InputError(f"--data={data} mixes sources of {len(tokenizers)} tokenizers: {pairs}; prepare "
                         f"them with one")
    print(f"tokenizer {tokenizers.pop()[:12]}, {', '.join({source.dtype.name for source in sources})}\n"
          f"{'source':24s} {'split':8s} {'documents':>10s} {'tokens':>8s} {'mean':>7s} {'median':>7s} "
          f"{'95 %':>7s} {'longest':>8s} {f'rows of {seq_len}':>14s}")
    for source in sources:
        if verify:
            source.verify()
        for split in source.splits:
            n = source.lengths(split)
            rows = max(0, (source.tokens(split) - 1) // seq_len)
            print(f"{source.name:24s} {split:8s} {len(n):10,} {human(n.sum()):>8s} {n.mean():7.0f} "
                  f"{np.median(n):7.0f} {np.percentile(n, 95):7.0f} {n.max():8,} {rows:14,}")
    for source in sources:
        for part, report in source.manifest.get("parts", {}).items():
            print_origin(source.name, part, report)


def print_origin(name, part, report):
    """Where a part of a prepared source is from and what was left out of it, as its manifest reports."""
    title = name if part == name else f"{name}, {part}"
    stand_in = f"; stands in for {report['stand_in']}" if report["stand_in"] else ""
    dropped = ", ".join(f"{reason} {n:,}" for reason, n in report["dropped"].items()) or "none"
    print(f"\n{title}: {report['from']} at {report['revision'][:12]}, {report['licence']}{stand_in}\n"
          f"  {report['rows']:,} rows of {report['files']} files, {report['documents']:,} kept; left out: "
          f"{dropped}")


def toy(out: str):
    """Prepares the embedded world for the toy models.

    Args:
        out: the folder
    """
    prepare_toy(out, toy_tokenizer())


if __name__ == "__main__":
    commands(plan, check, get, tokenize, pack, stats, get_prompts, prompts, mix, toy)
