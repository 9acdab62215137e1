"""Published or local texts to a prepared folder: get them, and tokenize them however often one is killed.

The commands are data.py's (check, get, tokenize). Each source is cut into pieces of up to 64 MB; a process
reads, filters, formats and tokenizes a piece into shards of its own and says so in a record written last, so
a killed call goes on with the pieces that have none, and the pieces of --part=0/8 ... 7/8 come from anywhere.
When all are there, they are put together to large shards, without the documents whose text has been before,
and the folder appears. It is the same byte for byte however it came about.
"""

import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import threading
import zlib
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np

import sources as texts
from data import (
    FORMAT,
    Shard,
    Source,
    count,
    hashed,
    id_dtype,
    prepared,
    read_mixture,
    refuse_others,
    replace_folder,
)
from runtime import InputError, did_you_mean, human, write_atomic

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


OWN = texts.Part("", "*", None, texts.local)              # --sources=name=local:path

_worker = {}                                              # of a worker process: tokenizer, lookup, settings


def end_with_parent():
    """In a worker: it does not outlive a killed call."""
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True).start()


def _start_worker(tokenizer, fast, raw, heldout, dtype):
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"        # a process a core; no threads beside them
    tokenizer.fast, tokenizer.guard = fast
    _worker.update(tokenizer=tokenizer, questions=texts.Questions(raw), heldout=heldout, dtype=dtype)


def _part(source, part):
    return OWN if part == "local" else texts.REGISTRY[source].parts[part]


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
        for index, row in texts.rows(path, part.columns, span):
            if drawn is not None and index not in drawn:
                continue
            counts["rows"] += 1
            try:
                text = texts.reading(part.read, row, *more)
            except texts.Drop as reason:
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
    for index, row in texts.rows(path, part.kept_columns):
        try:
            texts.reading(part.kept, row, *more)
            kept.append(index)
        except texts.Drop as reason:
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
            self.parts, self.tops = {"local": texts.local_files(own)}, {"local": os.curdir}
        else:
            parts = texts.lookup(name).parts
            self.parts = {part: texts.raw_files(raw, part, spec) for part, spec in parts.items()}
            self.tops = {part: os.path.join(raw, part) for part in parts}
        self.origin = {}
        for part in self.parts:
            spec, lock = _part(name, part), None if own else texts.read_lock(os.path.join(raw, part))
            self.origin[part] = {
                "from": f"local:{own}" if own else lock["repo"] if lock else f"{spec.repo}, put by hand",
                "revision": lock["revision"] if lock else "unknown",
                "licence": "your own" if own else spec.licence, "stand_in": spec.stand_in}
        with open(texts.__file__, "rb") as f:             # filters and formats
            code = hashlib.sha256(f.read()).hexdigest()
        self.settings = (code, seed, self.head, self.origin, [
            (texts.read_lock(os.path.join(raw, texts.folder_name(d))) or {}).get("revision", "unknown")
            for d in texts.QUESTIONS] if any(_part(name, part).questions for part in self.parts) else ())
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
            cut = texts.pieces(files)
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
    import prompts
    hub, wrong = texts.Hub(hub), []
    parts = {part: spec for name in (read_mixture(mixture) if mixture else texts.REGISTRY)
             for part, spec in texts.parts_to_get(name).items()}
    parts |= {} if mixture else prompts.RL | prompts.BENCHMARKS
    for name, part in parts.items():
        try:
            repo, revision, files = hub.list(part)
            columns = hub.columns(repo, revision, texts.shuffled(files, 1, part.repo)[0])
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
        raise InputError(f"{len(wrong)} of {len(parts)} parts are not as sources.py has them: "
                         f"{', '.join(wrong)}; edit their Part in sources.py")


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
    wanted, hub = count("tokens", tokens), texts.Hub(hub)
    mixture = {name: p for name, p in read_mixture(mixture).items() if name not in own_sources(sources)}
    for name in mixture:
        texts.lookup(name)
    for name, percent in mixture.items():
        for part, spec in texts.parts_to_get(name).items():
            try:
                texts.get_part(hub, part, spec, percent / 100 * wanted / 1e9, raw, seed, connections)
            except OSError as e:
                raise InputError(f"--raw={raw}: {part} cannot be written ({e.strerror or e}); free "
                                 f"space, then run the command again, it goes on") from None


def named_tokenizer(name):
    """toy, a folder, or a model of PRESETS, whose tokenizer files the hub then gives."""
    from tokenizer import FILES, load_tokenizer, toy_tokenizer
    if name == "toy":
        return toy_tokenizer()
    if not os.path.isdir(name):
        from model import PRESETS
        if not PRESETS.get(name, ("",))[0]:
            raise InputError(f"--tokenizer={name!r} is neither a folder, nor toy, nor a model"
                             f"{did_you_mean(name, PRESETS)} (known: {', '.join(PRESETS)})")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError
        repo = PRESETS[name][0]
        try:
            name = texts.Hub().patiently(snapshot_download, repo, allow_patterns=[*FILES, "config.json"])
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
            _run(pool, [piece for job in pending for piece in job.left(i, n)])
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


def _run(pool, pieces):
    from tqdm import tqdm
    with tqdm(total=sum(p.size for p in pieces), unit="B", unit_scale=True, desc="tokenize",
              disable=None) as bar:
        waiting, tokens = {pool.submit(tokenize_piece, piece): piece for piece in pieces}, 0
        for future in concurrent.futures.as_completed(waiting):
            tokens += future.result()
            bar.set_postfix_str(f"{human(tokens)} tokens")
            bar.update(waiting[future].size)
