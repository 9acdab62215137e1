"""Prepared sources on disk: token shards with their documents' offsets and manifest.json; rows cut or
packed from them.
"""

import hashlib
import json
import os
import shutil
import zlib

import numpy as np

from cli import InputError, write_atomic
from corpus.registry import REGISTRY

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


def prepared(folder):
    """Names of the prepared sources in a folder, those of REGISTRY first and in its order."""
    names = [n for n in (sorted(os.listdir(folder)) if os.path.isdir(folder) else ())
             if ".tmp-" not in n and os.path.exists(os.path.join(folder, n, "manifest.json"))]
    return [n for n in REGISTRY if n in names] + [n for n in names if n not in REGISTRY]


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
