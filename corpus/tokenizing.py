"""Raw files to a prepared source: pieces of work that any number of processes share, put together byte for
byte the same however often the call was killed.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import sys
import zlib
from dataclasses import dataclass

import numpy as np

import presets
from cli import InputError, did_you_mean, human, write_atomic
from corpus import formats, world
from corpus.files import cut_files, local_files, read_rows
from corpus.formats import Drop, local_text, read_row
from corpus.hashes import hashed
from corpus.hub import Hub, raw_files, read_lock
from corpus.registry import QUESTIONS, REGISTRY, Part, Questions, find_source, folder_name
from corpus.shards import FORMAT, Shard, Source, id_dtype, refuse_others, replace_folder, write_source
from corpus.tokenizer import FILES, load_tokenizer, toy_tokenizer
from corpus.workers import end_with_parent


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


# -- pieces ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Piece:
    """A unit of work: some files, or a span of one, of a part of a source."""
    source: str
    part: str
    units: tuple                         # ((path, span), ...), see sources.pieces
    size: int                            # bytes of the files, for the progress bar
    base: str                            # its files in the work folder begin so
    drawn: dict | None                   # {path: indices of the rows that were drawn}, None = all

OWN = Part("", "*", None, local_text)              # --sources=name=local:path

_worker = {}                                              # of a worker process: tokenizer, lookup, settings


def _start_worker(tokenizer, fast, raw, heldout, dtype):
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"        # a process a core; no threads beside them
    tokenizer.fast, tokenizer.guard = fast
    _worker.update(tokenizer=tokenizer, questions=Questions(raw), heldout=heldout, dtype=dtype)


def _part(source, part):
    return OWN if part == "local" else REGISTRY[source].parts[part]


def tokenize_piece(piece):
    """Reads, filters, formats and tokenizes a piece into its shards, one a split, and its record. The hash of
    a document's text decides its split, so that equal texts never stand on both sides."""
    part, tokenizer = _part(piece.source, piece.part), _worker["tokenizer"]
    more = (_worker["questions"],) if part.questions else ()
    for leftover in glob.glob(glob.escape(piece.base) + ".*.tmp-*"):           # of a killed call
        os.remove(leftover)
    counts, shards, hashes = collections.Counter(), {}, collections.defaultdict(list)
    batch, size = [], 0

    def flush():
        for text, ids in zip(batch, tokenizer.document_arrays(batch, _worker["dtype"]), strict=True):
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            key = int.from_bytes(digest, "little")
            split = "heldout" if key >> 32 < _worker["heldout"] * 2 ** 32 else "train"
            if split not in shards:
                shards[split] = Shard(f"{piece.base}.{split}.tmp-{os.getpid()}", _worker["dtype"])
            shards[split].add(ids)
            hashes[split].append(key)
        batch.clear()

    for path, span in piece.units:
        drawn = None if piece.drawn is None else set(piece.drawn[path].tolist())
        for index, row in read_rows(path, part.columns, span):
            if drawn is not None and index not in drawn:
                continue
            counts["rows"] += 1
            try:
                text = read_row(part.read, row, *more)
            except Drop as reason:
                counts[f"dropped: {reason}"] += 1
                continue
            if not text.strip():
                counts["dropped: empty"] += 1
                continue
            batch.append(text)
            size += len(text)
            if len(batch) == 1000 or size > 1 << 20:
                flush()
                size = 0
    flush()
    record = {"counts": counts, "splits": {}}
    for split, shard in shards.items():
        record["splits"][split] = shard.close()
        np.array(hashes[split], dtype=np.uint64).tofile(shard.base + ".hash")
        for end in (".bin", ".idx", ".hash"):
            os.replace(shard.base + end, f"{piece.base}.{split}{end}")
    write_atomic(f"{piece.base}.json", json.dumps(record))
    return sum(shard["tokens"] for shard in record["splits"].values())


def _scan(args):
    """Of one file of a part that is drawn from: (indices of the rows that pass its filter, reasons of the
    others)."""
    source, name, path = args
    part, kept, counts = _part(source, name), [], collections.Counter()
    more = (_worker["questions"],) if part.questions else ()
    for index, row in read_rows(path, part.kept_columns):
        try:
            read_row(part.kept, row, *more)
            kept.append(index)
        except Drop as reason:
            counts[f"dropped: {reason}"] += 1
    return np.array(kept, dtype=np.int64), counts


def _draw(pool, source, name, part, paths, seed):
    """The part.draw rows of smallest hash of (seed, file, row) among those that pass: ({path: indices},
    counts). Random, and the same whoever asks."""
    found = list(pool.map(_scan, [(source, name, path) for path in paths]))
    keys = [hashed(kept, seed, "draw", name, os.path.basename(path))
            for path, (kept, _) in zip(paths, found, strict=True)]
    every = np.sort(np.concatenate(keys))
    limit = every[min(part.draw, len(every)) - 1] if len(every) else 0
    counts = sum((c for _, c in found), collections.Counter())
    counts["dropped: not drawn"] += max(0, len(every) - part.draw)
    counts["rows"] += counts.total()                      # the drawn ones are counted as they are read
    return {path: kept[key <= limit] for path, (kept, _), key in zip(paths, found, keys, strict=True)}, counts

SHARD_TOKENS = 1 << 29                                    # 2 GB of uint32, and more only by its last piece


def _join(job):
    """Pieces one after the other as one shard, without the documents that keep (bool array) is False for."""
    pieces, target, dtype = job
    shard = Shard(target, dtype)
    for base, keep in pieces:
        tokens, offsets = np.fromfile(base + ".bin", dtype), np.fromfile(base + ".idx", np.int64)
        for i in np.flatnonzero(keep):
            shard.add(tokens[offsets[i]:offsets[i + 1]])
    return shard.close()


class Job:
    """One source on its way: raw files to pieces, pieces to shards in NAME.work, these to the folder NAME."""

    def __init__(self, out, name, own, raw, tokenizer, heldout, dedup, seed):
        self.name, self.dedup, self.seed, self.own = name, dedup, seed, own
        self.head = {"format": FORMAT, "source": name, "tokenizer": tokenizer.fingerprint,
                     "dtype": id_dtype(tokenizer.vocab_size).name, "heldout": heldout}
        self.out, self.final, self.work = out, os.path.join(out, name), os.path.join(out, name + ".work")
        refuse_others(self.final)
        if own:
            self.parts, self.tops = {"local": local_files(own)}, {"local": os.curdir}
        else:
            parts = find_source(name).parts
            self.parts = {part: raw_files(raw, part, spec) for part, spec in parts.items()}
            self.tops = {part: os.path.join(raw, part) for part in parts}
        self.origin = {}
        for part in self.parts:
            spec, lock = _part(name, part), None if own else read_lock(os.path.join(raw, part))
            self.origin[part] = {
                "from": f"local:{own}" if own else lock["repo"] if lock else f"{spec.repo}, put by hand",
                "revision": lock["revision"] if lock else "unknown",
                "licence": "your own" if own else spec.licence, "stand_in": spec.stand_in}
        with open(formats.__file__, "rb") as f:               # filters and formats
            code = hashlib.sha256(f.read()).hexdigest()
        self.settings = (code, seed, self.head, self.origin, [
            (read_lock(os.path.join(raw, folder_name(d))) or {}).get("revision", "unknown")
            for d in QUESTIONS] if any(_part(name, part).questions for part in self.parts) else ())
        self.key = self._digest(dedup, [self._stamp(part, f) for part, files in self.parts.items()
                                        for f in files])

    def _digest(self, *what):
        return hashlib.sha256(repr((self.settings, what)).encode()).hexdigest()

    def _stamp(self, part, path):
        """What tells a changed file: its name and size, of one's own its time too."""
        try:
            stat = os.stat(path)
        except OSError as e:
            raise InputError(f"{path} cannot be read ({e.strerror})") from None
        return os.path.relpath(path, self.tops[part]), stat.st_size, stat.st_mtime_ns if self.own else 0

    def done(self):
        """Whether the source has been prepared just so, and all its files are there."""
        try:
            return Source(self.out, self.name).manifest.get("key") == self.key
        except InputError:
            return False

    def cut(self, pool):
        """Makes self.pieces, drawing the rows of parts that are drawn from."""
        self.pieces, self.counts = [], {}
        for part, files in self.parts.items():
            spec, drawn = _part(self.name, part), None
            if spec.draw:
                drawn, self.counts[part] = _draw(pool, self.name, part, spec, files, self.seed)
            cut = cut_files(files)
            spans = collections.Counter(path for units in cut for path, _ in units)
            for units in cut:
                mine = drawn and {path: drawn[path] for path, _ in units}
                digest = self._digest(part, [(self._stamp(part, path), span) for path, span in units],
                                      mine and [zlib.crc32(rows) for rows in mine.values()])
                size = sum(os.path.getsize(path) // spans[path] for path, _ in units)
                self.pieces.append(Piece(self.name, part, tuple(units), size,
                                         os.path.join(self.work, digest[:20]), mine))

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
        """Shards of all pieces, in the order of the files, without the documents whose text has been before
        (24 bytes of memory a document), to the folder. Returns its manifest, or None where another --part
        was first."""
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
        tmp = os.path.join(self.work, "whole")            # under the lock; goes with the work folder
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(tmp)
        counts = {part: collections.Counter(self.counts.get(part, {})) for part in self.parts}
        for piece, record in zip(self.pieces, records, strict=True):
            counts[piece.part].update(record["counts"])
        splits = {}
        for split in ("train", "heldout"):
            having = [(piece, record["splits"][split]) for piece, record in
                      zip(self.pieces, records, strict=True) if split in record["splits"]]
            hashes = [np.fromfile(f"{piece.base}.{split}.hash", np.uint64) for piece, _ in having]
            keep = np.full(sum(map(len, hashes)), not self.dedup)
            if self.dedup and having:
                keep[np.unique(np.concatenate(hashes), return_index=True)[1]] = True
            ends, jobs, size = np.cumsum([0, *map(len, hashes)]), [], SHARD_TOKENS
            for (piece, shard), lo, hi in zip(having, ends[:-1], ends[1:], strict=True):
                kept = int(keep[lo:hi].sum())
                counts[piece.part]["dropped: duplicate"] += int(hi - lo) - kept
                counts[piece.part]["documents"] += kept
                if kept:
                    if size >= SHARD_TOKENS:
                        jobs.append(([], os.path.join(tmp, f"{split}-{len(jobs):05d}"), self.head["dtype"]))
                        size = 0
                    jobs[-1][0].append((f"{piece.base}.{split}", keep[lo:hi]))
                    size += shard["tokens"]
            if jobs:
                splits[split] = list(pool.map(_join, jobs))
        manifest = {**self.head, "key": self.key, "revision": ", ".join(
            f"{part}@{origin['revision'][:12]}" for part, origin in self.origin.items()), "splits": splits,
            "parts": {part: {**self.origin[part], "files": len(self.parts[part]), "rows": c["rows"],
                             "documents": c["documents"], "dropped": {
                                 reason.removeprefix("dropped: "): n for reason, n in sorted(c.items())
                                 if reason.startswith("dropped: ") and n}} for part, c in counts.items()}}
        if "train" not in splits:
            raise InputError(f"{self.name}: not one document is left for training; left out: "
                             + "; ".join(f"{part}: {c['dropped'] or 'no rows at all'}"
                                         for part, c in manifest["parts"].items()))
        write_atomic(os.path.join(tmp, "manifest.json"), json.dumps(manifest, indent=1))
        replace_folder(tmp, self.final)
        return manifest


def named_tokenizer(name):
    """toy, a folder, or a preset, whose tokenizer files the hub then gives."""
    if name == "toy":
        return toy_tokenizer()
    if not os.path.isdir(name):
        known = presets.names()
        repo = presets.hub_id(name)
        if repo is None:
            raise InputError(f"--tokenizer={name!r} is neither a folder, nor toy, nor a model"
                             f"{did_you_mean(name, known)} (known: {', '.join(known)})")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError
        try:
            name = Hub().patiently(snapshot_download, repo, allow_patterns=[*FILES, "config.json"])
        except RepositoryNotFoundError:
            raise InputError(f"--tokenizer={name}: the hub does not give {repo}; accept its terms at its "
                             f"page, run `hf auth login`, or give a folder with its tokenizer.json") from None
    config = os.path.join(name, "config.json")
    try:
        with open(config) as f:
            return load_tokenizer(name, json.load(f))
    except FileNotFoundError:
        return load_tokenizer(name)
    except InputError:
        raise
    except ValueError as e:
        raise InputError(f"--tokenizer: {config} is damaged ({e}); fetch it again") from None


def tokenize_pieces(pool, pieces):
    from tqdm import tqdm
    with tqdm(total=sum(p.size for p in pieces), unit="B", unit_scale=True, desc="tokenize",
              disable=None) as bar:
        waiting, tokens = {pool.submit(tokenize_piece, piece): piece for piece in pieces}, 0
        for future in concurrent.futures.as_completed(waiting):
            tokens += future.result()
            bar.set_postfix_str(f"{human(tokens)} tokens")
            bar.update(waiting[future].size)
