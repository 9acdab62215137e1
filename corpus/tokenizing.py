"""Raw files to a prepared source: pieces of work that any number of processes share, put together byte for
byte the same however often the call was killed.

A source's key stands for all that decides its tokens: its files, the code that reads them (rules.py), the
tokenizer, the seed. A source with the key asked for is left alone; another one is made again.
"""

import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import sys
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import presets
from cli import InputError, did_you_mean, human, write_atomic
from corpus import world
from corpus.files import cut_files, local_files, read_rows, reader_of
from corpus.formats import READERS, Drop, local_text, read_row
from corpus.hashes import hashed
from corpus.hub import Hub, raw_files, read_lock
from corpus.registry import QUESTIONS, REGISTRY, Part, Questions, find_source, folder_name
from corpus.rules import code_of
from corpus.shards import (
    FORMAT,
    Shard,
    Source,
    id_dtype,
    prepared,
    refuse_others,
    replace_folder,
    write_array,
    write_source,
)
from corpus.tokenizer import FILES, Tokenizer, load_tokenizer, toy_tokenizer
from corpus.workers import workers

# -- the toy world -----------------------------------------------------------------------------------------

def prepare_toy(folder, tokenizer):
    """The embedded world, tokenized into `folder`; sources already there, whole, of this tokenizer, this
    world.py (comments apart) and this Python (whose library is the text), are left alone."""
    revision = hashlib.sha256((code_of(world) + sys.version).encode()).hexdigest()
    for name in world.SOURCES:
        try:
            source = Source(folder, name, tokenizer, tokenizer.vocab_size)
            source.verify()
            is_fresh = source.revision == revision
        except InputError:
            is_fresh = False
        if is_fresh:
            continue
        splits = {split: world.documents(name, split) for split in ("train", "heldout")}
        try:
            write_source(folder, name, splits, tokenizer, revision=revision)
        except OSError as e:
            raise InputError(f"--data: cannot prepare the toy world in {folder} ({e.strerror}); free "
                             f"space, or run where this folder can be written") from None


def named_tokenizer(name):
    """toy, a folder, or a preset, whose tokenizer files the hub then gives."""
    if name == "toy":
        return toy_tokenizer()
    folder = name if os.path.isdir(name) else _fetched_tokenizer(name)
    config = os.path.join(folder, "config.json")
    try:
        with open(config) as f:
            return load_tokenizer(folder, json.load(f))
    except FileNotFoundError:
        return load_tokenizer(folder)
    except InputError:
        raise
    except ValueError as e:
        raise InputError(f"--tokenizer: {config} is damaged ({e}); fetch it again") from None


def _fetched_tokenizer(name):
    """The folder to which the hub gave a preset's tokenizer files."""
    known, repo = presets.names(), presets.hub_id(name)
    if repo is None:
        raise InputError(f"--tokenizer={name!r} is neither a folder, nor toy, nor a model"
                         f"{did_you_mean(name, known)} (known: {', '.join(known)})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError
    try:
        return Hub().patiently(snapshot_download, repo, allow_patterns=[*FILES, "config.json"])
    except RepositoryNotFoundError:
        raise InputError(f"--tokenizer={name}: the hub does not give {repo}; accept its terms at its "
                         f"page, run `hf auth login`, or give a folder with its tokenizer.json") from None


# -- pieces, in worker processes ---------------------------------------------------------------------------

@dataclass(frozen=True)
class Piece:
    """A unit of work: some files, or a span of one, of a part of a source."""
    source: str
    part: str
    units: tuple                         # ((path, span), ...), see files.cut_files
    size: int                            # bytes of the files, for the progress bar
    base: str                            # its files in the work folder begin so
    drawn: dict | None                   # {path: indices of the rows that were drawn}, None = all


class Worker(NamedTuple):
    """What a worker process holds."""
    tokenizer: Tokenizer
    questions: Questions                 # the lookup that some formats take
    heldout: float                       # share of the documents
    dtype: np.dtype                      # of the ids on disk


def start_worker(tokenizer, raw, heldout, dtype):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"        # a process a core; no threads beside them
    return Worker(tokenizer, Questions(raw), heldout, dtype)


LOCAL = Part("", "*", None, local_text)                   # --sources=name=local:path


def part_of(source, part):
    return LOCAL if part == "local" else REGISTRY[source].parts[part]


def text_key(text):
    """64 bits of a document's text: what duplicates and splits are decided by."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def split_of(key, heldout):
    """The split of a text by its key, so that equal texts never stand on both sides."""
    return "heldout" if key >> 32 < heldout * 2 ** 32 else "train"


class _PieceShards:
    """The shards of a piece, one a split, and beside each the keys of its documents' texts."""

    def __init__(self, base, worker):
        self.base, self.worker = base, worker
        self.shards, self.keys = {}, collections.defaultdict(list)
        for leftover in glob.glob(glob.escape(base) + ".*.tmp-*"):             # of a killed call
            os.remove(leftover)

    def add(self, texts):
        """Tokenizes the texts into the shards."""
        dtype = self.worker.dtype
        for text, ids in zip(texts, self.worker.tokenizer.document_arrays(texts, dtype), strict=True):
            key = text_key(text)
            split = split_of(key, self.worker.heldout)
            if split not in self.shards:
                self.shards[split] = Shard(f"{self.base}.{split}.tmp-{os.getpid()}", dtype)
            self.shards[split].add(ids)
            self.keys[split].append(key)

    def close(self):
        """Gives the files their names. Returns {split: the manifest's entry}."""
        entries = {}
        for split, shard in self.shards.items():
            entries[split] = shard.close()
            write_array(shard.base + ".hash", np.array(self.keys[split], dtype=np.uint64))
            for end in (".bin", ".idx", ".hash"):
                os.replace(shard.base + end, f"{self.base}.{split}{end}")
        return entries


def _rows_of(piece, columns):
    """The rows of a piece, of a drawn part those that were drawn."""
    for path, span in piece.units:
        drawn = None if piece.drawn is None else set(piece.drawn[path].tolist())
        for index, row in read_rows(path, columns, span):
            if drawn is None or index in drawn:
                yield row


def tokenize_piece(worker, piece):
    """Reads, filters, formats and tokenizes a piece into its shards and their record, base.json. Returns its
    tokens."""
    part = part_of(piece.source, piece.part)
    lookups = (worker.questions,) if part.questions else ()
    shards = _PieceShards(piece.base, worker)
    counts = collections.Counter()
    texts, characters = [], 0
    for row in _rows_of(piece, part.columns):
        counts["rows"] += 1
        try:
            text = read_row(part.read, row, *lookups)
            if not text.strip():
                raise Drop("empty")
        except Drop as reason:
            counts[f"dropped: {reason}"] += 1
            continue
        texts.append(text)
        characters += len(text)
        if len(texts) == 1000 or characters > 1 << 20:
            shards.add(texts)
            texts, characters = [], 0
    shards.add(texts)
    entries = shards.close()
    write_atomic(f"{piece.base}.json", json.dumps({"counts": counts, "splits": entries}))
    return sum(entry["tokens"] for entry in entries.values())


class Scan(NamedTuple):
    """Of one file of a part that is drawn from."""
    kept: np.ndarray                     # indices of the rows that pass its filter
    counts: collections.Counter          # reasons of the others


def scan_file(worker, which):
    """which: (source, part, path). Returns the Scan."""
    source, name, path = which
    part = part_of(source, name)
    lookups = (worker.questions,) if part.questions else ()
    kept, counts = [], collections.Counter()
    for index, row in read_rows(path, part.kept_columns):
        try:
            read_row(part.kept, row, *lookups)
            kept.append(index)
        except Drop as reason:
            counts[f"dropped: {reason}"] += 1
    return Scan(np.array(kept, dtype=np.int64), counts)


def draw_rows(pool, source, name, paths, seed):
    """The part's `draw` rows of smallest hash of (seed, file, row) among those that pass its filter: ({path:
    indices}, counts). Random, and the same whoever asks. pool: Workers."""
    draw = part_of(source, name).draw
    scans = list(pool.map(scan_file, [(source, name, path) for path in paths]))
    keys = [hashed(scan.kept, seed, "draw", name, os.path.basename(path))
            for path, scan in zip(paths, scans, strict=True)]
    sorted_keys = np.sort(np.concatenate(keys))
    limit = sorted_keys[min(draw, len(sorted_keys)) - 1] if len(sorted_keys) else 0
    drawn = {path: scan.kept[key <= limit] for path, scan, key in zip(paths, scans, keys, strict=True)}
    counts = sum((scan.counts for scan in scans), collections.Counter())
    counts["dropped: not drawn"] += max(0, len(sorted_keys) - draw)
    counts["rows"] += counts.total()                      # the drawn ones are counted as they are read
    return drawn, counts


# -- one source --------------------------------------------------------------------------------------------

SHARD_TOKENS = 1 << 29                                    # 2 GB of uint32, and more only by its last piece


class ShardJob(NamedTuple):
    """A shard of a prepared source that is to be written."""
    pieces: list                         # [(base of a piece's shard, which documents to keep: bool array)]
    base: str
    dtype: str


def join_pieces(_, job):
    """Pieces one after the other as one shard. Returns the manifest's entry."""
    shard = Shard(job.base, job.dtype)
    for base, keep in job.pieces:
        tokens, offsets = np.fromfile(base + ".bin", job.dtype), np.fromfile(base + ".idx", np.int64)
        for i in np.flatnonzero(keep):
            shard.add(tokens[offsets[i]:offsets[i + 1]])
    return shard.close()


def first_of_each(keys):
    """Which documents are the first with their text: bool arrays, given the keys of each piece's documents
    (arrays). 24 bytes of memory a document."""
    keep = np.zeros(sum(map(len, keys)), dtype=bool)
    keep[np.unique(np.concatenate(keys), return_index=True)[1]] = True
    return np.split(keep, np.cumsum([len(piece) for piece in keys])[:-1])


def rules(part, paths):
    """All of a part's Part, and of the code that reads its files, that decides its texts."""
    functions = [read_row, text_key, split_of, part.read, *map(reader_of, paths)]
    columns = [part.columns, part.kept_columns]
    if part.kept:
        functions.append(part.kept)
    if part.questions:
        functions += [Questions.__call__, Questions.read_split]
        for lookup in QUESTIONS.values():
            functions += [lookup.read, reader_of(lookup.files)]
            columns.append(lookup.columns)
    return part.draw, columns, hashlib.sha256(code_of(*functions).encode()).hexdigest()


class Settings(NamedTuple):
    """What decides a source's tokens beside its files."""
    head: dict                           # of the manifest: READERS, tokenizer, dtype, share held out
    seed: int                            # of the draws
    rules: dict                          # {part: rules()}
    revisions: dict                      # {part: commit of its files}
    lookups: list                        # commits of the data sets that questions are looked up in


class Job:
    """One source on its way: raw files to pieces, pieces to shards in NAME.work, these to the folder NAME.

    local: the path of your own files, "" = a source of the registry, whose files are below raw/."""

    def __init__(self, out, name, local, raw, tokenizer, heldout, dedup, seed):
        self.name, self.local, self.dedup, self.seed = name, local, dedup, seed
        self.out, self.final, self.work = out, os.path.join(out, name), os.path.join(out, name + ".work")
        refuse_others(self.final)
        if local:
            self.files, self.tops = {"local": local_files(local)}, {"local": os.curdir}
        else:
            parts = find_source(name).parts
            self.files = {part: raw_files(raw, part, spec) for part, spec in parts.items()}
            self.tops = {part: os.path.join(raw, part) for part in parts}
        self.head = {"format": FORMAT, "source": name, "tokenizer": tokenizer.fingerprint,
                     "dtype": id_dtype(tokenizer.vocab_size).name, "heldout": heldout, "readers": READERS}
        self.origin = {part: self._origin(part, raw) for part in self.files}
        revisions = {part: origin["revision"] for part, origin in self.origin.items()}
        part_rules = {part: rules(part_of(name, part), paths) for part, paths in self.files.items()}
        self.settings = Settings(self.head, seed, part_rules, revisions, self._lookup_revisions(raw))
        stamps = [self._stamp(part, path) for part, paths in self.files.items() for path in paths]
        self.key = self._digest(dedup, stamps)
        self.pieces, self.draw_counts = [], {}            # see cut()

    def _origin(self, part, raw):
        """Where a part's files are from, for the manifest."""
        if self.local:
            return {"from": f"local:{self.local}", "revision": "unknown", "licence": "your own",
                    "stand_in": ""}
        spec, lock = part_of(self.name, part), read_lock(os.path.join(raw, part))
        return {"from": lock["repo"] if lock else f"{spec.repo}, put by hand",
                "revision": lock["revision"] if lock else "unknown", "licence": spec.licence,
                "stand_in": spec.stand_in}

    def _lookup_revisions(self, raw):
        if not any(part_of(self.name, part).questions for part in self.files):
            return []
        locks = [read_lock(os.path.join(raw, folder_name(dataset))) for dataset in QUESTIONS]
        return [lock["revision"] if lock else "unknown" for lock in locks]

    def _digest(self, *contents):
        return hashlib.sha256(repr((self.settings, contents)).encode()).hexdigest()

    def _stamp(self, part, path):
        """What tells a changed file: its name and size, of your own its time too."""
        try:
            stat = os.stat(path)
        except OSError as e:
            raise InputError(f"{path} cannot be read ({e.strerror})") from None
        return os.path.relpath(path, self.tops[part]), stat.st_size, stat.st_mtime_ns if self.local else 0

    def done(self):
        """Whether the source has been prepared just so, and all its files are there."""
        try:
            return Source(self.out, self.name).manifest.get("key") == self.key
        except InputError:
            return False

    def file_bytes(self):
        return sum(os.path.getsize(path) for paths in self.files.values() for path in paths)

    def cut(self, pool):
        """Makes self.pieces, drawing the rows of parts that are drawn from."""
        self.pieces, self.draw_counts = [], {}
        for part, paths in self.files.items():
            drawn = None
            if part_of(self.name, part).draw:
                drawn, self.draw_counts[part] = draw_rows(pool, self.name, part, paths, self.seed)
            cut = cut_files(paths)
            spans = collections.Counter(path for units in cut for path, _ in units)
            for units in cut:
                size = sum(os.path.getsize(path) // spans[path] for path, _ in units)
                rows = {path: drawn[path] for path, _ in units} if drawn else None
                self.pieces.append(Piece(self.name, part, tuple(units), size,
                                         self._piece_base(part, units, rows), rows))

    def _piece_base(self, part, units, rows):
        """A piece's place in the work folder: its name stands for all that decides its tokens."""
        stamps = [(self._stamp(part, path), span) for path, span in units]
        drawn = [zlib.crc32(indices) for indices in rows.values()] if rows else None
        return os.path.join(self.work, self._digest(part, stamps, drawn)[:20])

    def claim(self, i, n):
        """The lock of --part=i/n, held until it is closed. InputError where another call holds it."""
        lock = open(os.path.join(self.work, f"part-{i}-of-{n}.lock"), "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise InputError(f"--part={i}/{n}: another call is preparing it in {self.work}; wait for it, or "
                             f"share the work as --part=0/2 and --part=1/2") from None
        return lock

    def left(self, i=0, n=1):
        """The pieces of --part=i/n that are still to be tokenized."""
        shift = zlib.crc32(self.name.encode())            # sources of few pieces begin at different parts
        return [piece for k, piece in enumerate(self.pieces)
                if (k + shift) % n == i and not os.path.exists(piece.base + ".json")]

    def finish(self, pool):
        """Shards of all pieces, in the order of the files, without the documents whose text has been before,
        to the folder. Returns its manifest, or None where another --part was first."""
        try:
            lock = open(os.path.join(self.work, "lock"), "w")
        except FileNotFoundError:
            lock = None
        with lock or contextlib.nullcontext():
            if lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
            if self.done():
                return None
            manifest = self._put_together(pool)
            shutil.rmtree(self.work, ignore_errors=True)
        return manifest

    def _put_together(self, pool):
        records = []
        for piece in self.pieces:
            with open(piece.base + ".json") as f:
                records.append(json.load(f))
        counts = {part: collections.Counter(self.draw_counts.get(part, {})) for part in self.files}
        for piece, record in zip(self.pieces, records, strict=True):
            counts[piece.part].update(record["counts"])
        tmp = os.path.join(self.work, "whole")            # under the lock; goes with the work folder
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(tmp)
        splits = {}
        for split in ("train", "heldout"):
            jobs = self._shard_jobs(split, records, counts, os.path.join(tmp, split))
            if jobs:
                splits[split] = list(pool.map(join_pieces, jobs))
        manifest = self._manifest(counts, splits)
        if "train" not in splits:
            left_out = "; ".join(f"{part}: {report['dropped'] or 'no rows at all'}"
                                 for part, report in manifest["parts"].items())
            raise InputError(f"{self.name}: not one document is left for training; left out: {left_out}")
        write_atomic(os.path.join(tmp, "manifest.json"), json.dumps(manifest, indent=1))
        replace_folder(tmp, self.final)
        return manifest

    def _shard_jobs(self, split, records, counts, base):
        """The ShardJobs of a split, in the order of the files. Adds its documents and duplicates to the
        counts."""
        pieces, entries = [], []
        for piece, record in zip(self.pieces, records, strict=True):
            if split in record["splits"]:
                pieces.append(piece)
                entries.append(record["splits"][split])
        if not pieces:
            return []
        keys = [np.fromfile(f"{piece.base}.{split}.hash", np.uint64) for piece in pieces]
        keep = first_of_each(keys) if self.dedup else [np.ones(len(key), dtype=bool) for key in keys]
        jobs, shard_tokens = [], SHARD_TOKENS
        for piece, entry, kept in zip(pieces, entries, keep, strict=True):
            documents = int(kept.sum())
            counts[piece.part]["dropped: duplicate"] += len(kept) - documents
            counts[piece.part]["documents"] += documents
            if not documents:
                continue
            if shard_tokens >= SHARD_TOKENS:
                jobs.append(ShardJob([], f"{base}-{len(jobs):05d}", self.head["dtype"]))
                shard_tokens = 0
            jobs[-1].pieces.append((f"{piece.base}.{split}", kept))
            shard_tokens += entry["tokens"]
        return jobs

    def _manifest(self, counts, splits):
        revision = ", ".join(f"{part}@{origin['revision'][:12]}" for part, origin in self.origin.items())
        parts = {}
        for part, part_counts in counts.items():
            dropped = {reason.removeprefix("dropped: "): n for reason, n in sorted(part_counts.items())
                       if reason.startswith("dropped: ") and n}
            parts[part] = {**self.origin[part], "files": len(self.files[part]), "rows": part_counts["rows"],
                           "documents": part_counts["documents"], "dropped": dropped}
        return {**self.head, "key": self.key, "revision": revision, "splits": splits, "parts": parts}


# -- all of them -------------------------------------------------------------------------------------------

def tokenize(out, names, local, raw, tokenizer, processes, part, heldout, dedup, seed):
    """Prepares the sources `names` to out/, or part i of n of them (part: (i, n)); whichever part is last
    puts a source together. local: {name: path of your own files}; tokenizer: see named_tokenizer; processes:
    0 = one a core. Prints what is done. InputError says what stands in the way, and that the call goes on.
    """
    tok = named_tokenizer(tokenizer)
    for name in prepared(out):
        if name not in names:
            Source(out, name, tok)                        # refuses another tokenizer's folder
    jobs = [Job(out, name, local.get(name, ""), raw, tok, heldout, dedup, seed) for name in names]
    pending = [job for job in jobs if not job.done()]
    _say_what_is_there(jobs, pending)
    if not pending:
        return
    encoder = "tokenizers"
    if tokenizer == "toy" or sum(job.file_bytes() for job in pending) > 50e6:       # the proof takes seconds
        encoder = tok.faster()
    print(f"encoder: {encoder}", flush=True)
    processes = processes or os.cpu_count() or 1
    args = (tok, raw, heldout, id_dtype(tok.vocab_size))
    hint = "run the command again with fewer, it goes on"
    try:
        with contextlib.ExitStack() as locks, workers(processes, start_worker, args, hint) as pool:
            failures = _work(pending, pool, locks, *part)
    except OSError as e:
        room = "free space, then " if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise InputError(f"--out={out}: {e.filename or 'a file'} cannot be written ({e.strerror or e}); "
                         f"{room}run the command again, it goes on") from None
    if failures:
        raise InputError("; ".join(failures))


def _say_what_is_there(jobs, pending):
    """Prints which sources need no work, and which stand in for the paper's."""
    for job in jobs:
        if job not in pending:
            shutil.rmtree(job.work, ignore_errors=True)
            print(f"{job.name}: prepared already")
        for origin in job.origin.values():
            if origin["stand_in"]:
                print(f"{job.name}: {origin['from']} stands in for {origin['stand_in']}")


def _work(jobs, pool, locks, i, n):
    """Tokenizes part i of n of the jobs, and puts those together that have all their pieces. Returns what is
    wrong with sources that cannot be: the others do not wait for them. locks: an ExitStack."""
    for job in jobs:
        os.makedirs(job.work, exist_ok=True)
        locks.enter_context(job.claim(i, n))
        job.cut(pool)
    _tokenize_pieces(pool, [piece for job in jobs for piece in job.left(i, n)])
    failures = []
    for job in jobs:
        if job.done():
            continue
        if job.left():
            left = [f"{k}/{n}" for k in range(n) if job.left(k, n)]
            print(f"{job.name}: parts {', '.join(left)} have pieces left to do")
            continue
        try:
            manifest = job.finish(pool)
        except InputError as e:                           # no document
            failures.append(str(e))
            continue
        if manifest:
            counts = []
            for split, shards in manifest["splits"].items():
                counts.append(f"{human(sum(shard['tokens'] for shard in shards))} tokens {split}")
            print(f"{job.name}: {', '.join(counts)}")
    return failures


def _tokenize_pieces(pool, pieces):
    """All pieces, with a progress bar of bytes where there is a terminal."""
    from tqdm import tqdm
    size_of = {pool.submit(tokenize_piece, piece): piece.size for piece in pieces}
    tokens = 0
    with tqdm(total=sum(size_of.values()), unit="B", unit_scale=True, desc="tokenize", disable=None) as bar:
        for future in concurrent.futures.as_completed(size_of):
            tokens += future.result()
            bar.set_postfix_str(f"{human(tokens)} tokens")
            bar.update(size_of[future])
