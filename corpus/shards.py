"""Prepared sources on disk, and the rows that are cut or packed from them.

A source is a folder: token shards (NAME.bin, documents laid end to end), where each document starts
(NAME.idx), and manifest.json, which counts them and names the tokenizer. packed-T.* are rows of T tokens put
together from whole documents by best_fit.
"""

import hashlib
import json
import os
import shutil
import zlib
from typing import NamedTuple

import numpy as np

from cli import InputError, write_atomic
from corpus.registry import REGISTRY

FORMAT = 1                                                # of manifest.json


# -- packing -----------------------------------------------------------------------------------------------

class _OpenBins:
    """Bins that still have room, by how much. Which rooms there are is one integer's bits: bit r is set where
    a bin with room r is open, so that the least room that holds an item is found without a search."""

    def __init__(self):
        self.by_room, self.rooms = {}, 0

    def add(self, room, bins):
        """Opens bins (int64 array) that have this room; those without room are full and need no place."""
        if room and len(bins):
            self.by_room.setdefault(room, []).append(bins)
            self.rooms |= 1 << room

    def take(self, size):
        """(room, bins): the bins of the least room that holds `size`; they are no longer open. (None, None)
        where no bin has so much room."""
        enough = self.rooms >> size                       # bit k stands for the room size + k
        if not enough:
            return None, None
        # -x is ~x + 1: it flips the bits above the lowest one that is set, so x & -x leaves that one alone.
        lowest = enough & -enough
        room = size + lowest.bit_length() - 1
        self.rooms ^= 1 << room
        return room, np.concatenate(self.by_room.pop(room))


def best_fit(lengths, capacity):
    """Bin of each item, int64 array (n): best-fit decreasing, longest first, each into the bin with the
    least room that suffices, else into a new one. InputError unless all lengths lie in 1 .. capacity.

        >>> best_fit([3, 6, 2, 3, 2], capacity=8)
        array([1, 0, 0, 1, 1])

    The 6 opens bin 0 and leaves room 2. The threes need more, so they open bin 1, which holds 8 // 3 = 2 of
    them and has room 2 left. Of the twos, the first goes to bin 0, the second to bin 1: both are full.

    Item by item up to ties, but worked on the histogram: of items of one length, the fullest bins that fit
    (with room r) take r // length each in a row, since r - length is again the least room that suffices.
    Cost grows with the distinct lengths, not with the items: 1M in under a second.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise InputError(f"best_fit: lengths from {lengths.min()} to {lengths.max()} do not all lie in "
                         f"1 .. {capacity}; split longer documents first")
    longest_first = np.argsort(-lengths, kind="stable")
    bins = np.empty(len(lengths), dtype=np.int64)
    open_bins = _OpenBins()
    bin_count = placed = 0
    sizes, counts = np.unique(lengths, return_counts=True)
    for size, left in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        # Once a distinct room: all items of this length that the bins with the least such room can take.
        while left:
            room, ids = open_bins.take(size)
            if room is None:
                room = capacity
                new_bins = -(-left // (room // size))                        # rounded up
                ids = np.arange(bin_count, bin_count + new_bins)
                bin_count += new_bins
            per_bin = room // size
            taken = min(left, per_bin * len(ids))
            items = longest_first[placed:placed + taken]
            bins[items] = np.repeat(ids, per_bin)[:taken]
            placed += taken
            left -= taken
            # The first bins took per_bin items each, the next one the rest, those behind it none.
            full_bins, rest = divmod(taken, per_bin)
            open_bins.add(room - per_bin * size, ids[:full_bins])
            open_bins.add(room - rest * size, ids[full_bins:full_bins + 1])
            open_bins.add(room, ids[full_bins + 1:])
    return bins


class PackedRows(NamedTuple):
    """Rows put together from whole documents; int64 arrays. Row i is pieces[starts[i]:starts[i + 1]]."""
    pieces: np.ndarray                   # (n, 2): first token (counted over the source's shards), length
    starts: np.ndarray                   # (rows + 1)


def packed_rows(lengths, capacity, overlap=0, shortest=0):
    """Documents laid end to end, given by their lengths, as PackedRows of at most `capacity` tokens each.

    A document of more than `capacity` tokens is split into parts of capacity, each but the first repeating
    the last `overlap` tokens of the one before; documents of fewer than `shortest` tokens are left out.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    first_tokens = np.cumsum(lengths) - lengths
    long_enough = lengths >= max(1, shortest)
    first_tokens, lengths = first_tokens[long_enough], lengths[long_enough]
    # part_number: of each part, which one of its document's it is. A document of n tokens has 1 part, and one
    # more for each `stride` tokens, begun ones too, that it is longer than capacity.
    stride = capacity - overlap
    parts = 1 + np.maximum(0, -(-(lengths - capacity) // stride))
    first_part = np.cumsum(parts) - parts
    part_number = np.arange(parts.sum()) - np.repeat(first_part, parts)
    skipped = part_number * stride
    pieces = np.stack([np.repeat(first_tokens, parts) + skipped,
                       np.minimum(capacity, np.repeat(lengths, parts) - skipped)], 1)
    bins = best_fit(pieces[:, 1], capacity)
    by_bin = np.argsort(bins, kind="stable")
    ends = np.cumsum(np.bincount(bins))
    return PackedRows(pieces[by_bin], np.concatenate([[0], ends]).astype(np.int64))


# -- writing -----------------------------------------------------------------------------------------------

def write_array(path, array):
    """A file of an array's bytes. Not by tofile(): numpy tells of a full disk without saying so."""
    with open(path, "wb") as f:
        f.write(np.ascontiguousarray(array))


class Shard:
    """Documents laid end to end in base.bin, where each starts in base.idx; close() gives the manifest's
    entry."""

    def __init__(self, base, dtype):
        self.base, self.dtype = base, dtype
        self.lengths, self.max_id, self.crc = [], 0, 0
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
        write_array(self.base + ".idx", offsets)
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
        base = os.path.join(tmp, split)
        manifest["splits"][split] = _write_shards(base, documents, tokenizer, dtype, shard_tokens)
    write_atomic(os.path.join(tmp, "manifest.json"), json.dumps(manifest, indent=1))
    replace_folder(tmp, os.path.join(folder, name))
    return manifest


def _write_shards(base, documents, tokenizer, dtype, shard_tokens):
    """The manifest's entries of the shards base-00000, base-00001, ...: each is closed by the document that
    brings it to `shard_tokens` tokens or more."""
    closed, shard, tokens = [], None, 0
    for text in documents:
        ids = tokenizer.document(text)
        if shard is None:
            shard = Shard(f"{base}-{len(closed):05d}", dtype)
        shard.add(ids)
        tokens += len(ids)
        if tokens >= shard_tokens:
            closed.append(shard.close())
            shard, tokens = None, 0
    if shard is not None:
        closed.append(shard.close())
    return closed


# -- reading -----------------------------------------------------------------------------------------------

def prepared(folder):
    """Names of the prepared sources in a folder, those of REGISTRY first and in its order."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in sorted(os.listdir(folder))
             if ".tmp-" not in name and os.path.exists(os.path.join(folder, name, "manifest.json"))]
    registered = [name for name in REGISTRY if name in names]
    return registered + [name for name in names if name not in REGISTRY]


class Split(NamedTuple):
    """The memory-mapped shards of a split."""
    tokens: list[np.ndarray]             # of each shard: its ids
    offsets: list[np.ndarray]            # of each shard: where its documents start in it, and its end
    first: np.ndarray                    # number of each shard's first token, counted over all, and their sum


def _entry(shard):
    """What a manifest has to say of a shard. KeyError where it does not."""
    return {key: shard[key] for key in ("file", "tokens", "documents", "max_id", "crc32", "idx_crc32")}


class Source:
    """One prepared source, memory-mapped: rows of T + 1 tokens cut out of its documents laid end to end, or
    (packed_for(T)) put together from whole documents. tokenizer None: of whichever it was prepared with;
    only: the splits to open, default all. InputError names the file that is missing, damaged or does not
    fit, and the fix."""

    def __init__(self, folder, name, tokenizer=None, vocab_size=None, only=None):
        self.folder, self.name = os.path.join(folder, name), name
        self.packed = None                                # PackedRows of the train split, see packed_for
        self._read_manifest(folder)
        if tokenizer and self.tokenizer != tokenizer.fingerprint:
            raise InputError(f"--data: {self.folder} was prepared with another tokenizer "
                             f"({self.tokenizer[:12]}; the model's is {tokenizer.fingerprint[:12]}); prepare "
                             f"the data with this model's tokenizer")
        self.maps = {split: self._open(split, vocab_size) for split in self.splits
                     if not only or split in only}

    def _read_manifest(self, folder):
        """Sets manifest, dtype, tokenizer, revision, splits."""
        path = os.path.join(self.folder, "manifest.json")
        try:
            with open(path) as f:
                manifest = json.load(f)
            if manifest["format"] != FORMAT:
                raise InputError(f"--data: {path} is of format {manifest['format']!r}, not {FORMAT}; prepare "
                                 f"the source again")
            self.manifest = manifest
            self.dtype = np.dtype(manifest["dtype"])
            self.tokenizer = manifest["tokenizer"]        # its fingerprint
            self.revision = manifest["revision"]
            self.splits = {}
            for split, shards in manifest["splits"].items():
                self.splits[split] = [_entry(shard) for shard in shards]
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"--data={folder} has no prepared source {self.name!r} (it has: "
                             f"{', '.join(sorted(prepared(folder))) or 'none'}); prepare it, or take a "
                             f"--mixture without it") from None
        except InputError:
            raise
        # not JSON, or not the JSON written above
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"--data: {path} is damaged ({e!r}); prepare the source again") from None

    def _open(self, split, vocab_size):
        """The Split of a split's shards."""
        shards = self.splits[split]
        if not shards:
            raise InputError(f"--data: {self.folder} holds no {split} documents; prepare the source again")
        tokens, offsets = [], []
        for shard in shards:
            tokens.append(self._map(shard["file"] + ".bin", shard["tokens"], self.dtype))
            offsets.append(self._map(shard["file"] + ".idx", shard["documents"] + 1, np.dtype(np.int64)))
            if vocab_size and shard["max_id"] >= vocab_size:
                raise InputError(f"--data: {self.folder}/{shard['file']}.bin holds token id "
                                 f"{shard['max_id']}, beyond the model's vocabulary of {vocab_size}; "
                                 f"prepare the data with this model's tokenizer")
        return Split(tokens, offsets, np.cumsum([0] + [len(shard) for shard in tokens]))

    def _map(self, file, count, dtype):
        path = os.path.join(self.folder, file)
        if not os.path.exists(path):
            raise InputError(f"--data: {path} is missing; prepare the source again")
        size = os.path.getsize(path)
        expected = count * dtype.itemsize
        if size != expected or count == 0:
            fault = "empty" if not size else "cut short" if size < expected else "too long"
            raise InputError(f"--data: {path} has {size} bytes, its manifest says {expected}: {fault}; "
                             f"prepare the source again")
        return np.memmap(path, dtype, "r")

    def verify(self, part=0, parts=1, splits=None):
        """Compares every parts-th file with its checksum (each rank takes a share); splits: which, default
        all. InputError names a corrupted one."""
        checks = []                                       # (array, file, its checksum)
        for split in splits or self.splits:
            maps = self.maps[split]
            for shard, tokens, offsets in zip(self.splits[split], maps.tokens, maps.offsets, strict=True):
                checks.append((tokens, shard["file"] + ".bin", shard["crc32"]))
                checks.append((offsets, shard["file"] + ".idx", shard["idx_crc32"]))
        for array, file, crc in checks[part::parts]:
            if zlib.crc32(array) != crc:
                raise InputError(f"--data: {self.folder}/{file} is corrupted (its checksum is not its "
                                 f"manifest's); remove the folder and prepare the source again")

    def tokens(self, split="train"):
        """How many tokens the split has."""
        return int(self.maps[split].first[-1])

    def lengths(self, split="train"):
        """Tokens of each document, separator included: int64 array."""
        return np.concatenate([np.diff(offsets) for offsets in self.maps[split].offsets])

    def rows(self, T, split="train"):
        """Rows of T inputs; each takes one more token as its last target, and the next row starts with that
        token."""
        if split not in self.maps:
            raise InputError(f"--data: {self.folder} has no {split} split (it has: "
                             f"{', '.join(self.maps) or 'none'}); prepare the source again")
        if self.packed and split == "train":
            return len(self.packed.starts) - 1
        n = (self.tokens(split) - 1) // T
        if n < 1:
            raise InputError(f"--data: {self.folder} has {self.tokens(split)} {split} tokens, less than one "
                             f"row of --seq_len={T} + 1; take a smaller --seq_len")
        return n

    def row(self, i, T, split="train"):
        """Row i: tokens (T + 1) int64 and document ids (T + 1) int64, counted from 0 in the row; -1 is
        padding behind packed documents."""
        if self.packed and split == "train":
            return self._packed_row(i, T)
        return self._cut_row(i * T, T, split)

    def _cut_row(self, start, T, split):
        """T + 1 tokens from `start` on, across shards, wherever documents begin and end."""
        maps = self.maps[split]
        tokens, docs, left, next_doc = [], [], T + 1, 0
        while left:
            shard, local = self._place(start, split)
            piece = maps.tokens[shard][local:local + left]
            positions = np.arange(local, local + len(piece))
            document = np.searchsorted(maps.offsets[shard], positions, "right") - 1     # number in its shard
            docs.append(document - document[0] + next_doc)
            tokens.append(piece)
            next_doc = int(docs[-1][-1]) + 1              # a document never crosses a shard
            start += len(piece)
            left -= len(piece)
        return np.concatenate(tokens).astype(np.int64), np.concatenate(docs)

    def _packed_row(self, i, T):
        """Row i of the packing: whole documents one behind the other, then padding."""
        pieces, starts = self.packed
        row = np.zeros(T + 1, np.int64)
        docs = np.full(T + 1, -1, np.int64)
        filled = 0
        for number, (start, length) in enumerate(pieces[starts[i]:starts[i + 1]]):
            shard, local = self._place(start, "train")
            row[filled:filled + length] = self.maps["train"].tokens[shard][local:local + length]
            docs[filled:filled + length] = number
            filled += length
        return row, docs

    def _place(self, token, split):
        """(shard, place in it) of a token that is counted over all shards."""
        first = self.maps[split].first
        shard = int(np.searchsorted(first, token, "right")) - 1
        return shard, int(token - first[shard])

    def fingerprint(self):
        """Of the tokens rows are made of, and of their packing."""
        shards = [(shard["file"], shard["tokens"], shard["crc32"]) for shard in self.splits["train"]]
        tokens = hashlib.sha256(repr((self.name, shards)).encode()).hexdigest()
        packing = str([zlib.crc32(array) for array in self.packed]) if self.packed else ""
        return tokens + packing

    def pack(self, T, overlap=0, shortest=0):
        """Writes packed-T.*: rows of T tokens put together from whole documents, see packed_rows. Returns
        what packed-T.json says of them."""
        packed = packed_rows(self.lengths(), T, overlap, shortest)
        if len(packed.starts) < 2:
            raise InputError(f"--min_tokens={shortest} leaves no document of {self.folder}")
        base = os.path.join(self.folder, f"packed-{T}")
        for array, end in ((packed.pieces, ".bin"), (packed.starts, ".idx")):
            write_array(base + end + ".tmp", array)
            os.replace(base + end + ".tmp", base + end)
        packing = {"method": "bfd", "seq_len": T, "overlap": overlap, "min_tokens": shortest,
                   "rows": len(packed.starts) - 1, "pieces": len(packed.pieces),
                   "tokens": int(packed.pieces[:, 1].sum()), "of": self.fingerprint(),
                   "crc32.bin": zlib.crc32(packed.pieces), "crc32.idx": zlib.crc32(packed.starts)}
        write_atomic(base + ".json", json.dumps(packing, indent=1))
        return packing

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
            flat = self._map(f"packed-{T}{end}", int(np.prod(shape)), np.dtype(np.int64))
            if zlib.crc32(flat) != packing["crc32" + end]:
                raise InputError(f"--data: {base}{end} is corrupted; pack again")
            arrays.append(flat.reshape(shape))
        self.packed = PackedRows(*arrays)
