"""Files to rows: parquet, arrow, jsonl, json, csv and plain text, compressed or not; files to units of work.
"""

import collections
import contextlib
import csv
import fnmatch
import glob
import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq

from cli import InputError
from corpus.formats import LOCAL_FORMS

# -- files to rows -----------------------------------------------------------------------------------------

def _stem(path):
    path = path.lower()
    for end in (".gz", ".zst", ".bz2"):
        path = path.removesuffix(end)
    return path


def file_kind(path):
    """parquet, arrow, jsonl, json, csv or text, by the name; .gz, .zst, .bz2 behind it is compression."""
    stem = _stem(path)
    ending = stem.rpartition(".")[2]
    if ending == "json" and stem != path.lower():         # the hub's .json.gz hold an object a line
        return "jsonl"
    return {"ndjson": "jsonl"}.get(ending, ending if ending in ("parquet", "arrow", "jsonl", "json", "csv")
                                   else "text")


def read_rows(path, columns=None, span=None):
    """(index, row) of a file: index is unique in it and does not depend on the span, row is a dict of at
    least `columns` (None: those of LOCAL_FORMS, or all where there are none). span: (first, end) row groups
    of a parquet file, bytes of an uncompressed .jsonl. A text file is one row {"text"}. What is no UTF-8
    becomes U+FFFD. A line of .jsonl that is no JSON object comes as None. InputError names a column that is
    missing, or a file that cannot be read.
    """
    try:
        yield from _READERS[file_kind(path)](path, columns, span)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as e:
        raise InputError(f"{path} cannot be read ({e.strerror})") from None
    except (pa.ArrowException, OSError, EOFError, OverflowError, RecursionError, UnicodeError,
            csv.Error) as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be read ({why}); if it is damaged or cut short, remove it and get "
                         f"it again") from None


def _wanted(columns, there):
    return columns or [c for c in there if any(c in form for form in LOCAL_FORMS)] or None


def _missing(path, columns, there):
    missing = [c for c in columns or () if c not in there]
    if missing:
        raise InputError(f"{path} has no column {', '.join(map(repr, missing))} (it has: "
                         f"{', '.join(map(str, there))}); the data set has changed: pin the revision that "
                         f"has it, or edit its Part in corpus/registry.py")


def _parquet(path, columns, span):
    with pq.ParquetFile(path) as file:
        _missing(path, columns, file.schema_arrow.names)
        columns = _wanted(columns, file.schema_arrow.names)
        groups = range(*(span or (0, file.num_row_groups)))
        index = sum(file.metadata.row_group(g).num_rows for g in range(groups.start))
        for g in groups:
            info = file.metadata.row_group(g)
            size = max(1, info.total_byte_size // max(1, info.num_rows))       # bytes a row, uncompressed
            for batch in file.iter_batches(max(1, min(1000, (8 << 20) // size)), [g], columns):
                for row in _python(batch):
                    yield index, row
                    index += 1


def _arrow(path, columns, span):
    with pa.OSFile(path) as raw:
        try:
            reader = pa.ipc.open_stream(raw)
        except pa.ArrowInvalid:
            raw.seek(0)
            reader = pa.ipc.open_file(raw)
            reader = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        index = 0
        for batch in reader:
            _missing(path, columns, batch.schema.names)
            chosen = _wanted(columns, batch.schema.names)
            batch = batch.select(chosen) if chosen else batch
            for at in range(0, batch.num_rows, 100):
                for row in _python(batch.slice(at, 100)):
                    yield index, row
                    index += 1

BOM = b"\xef\xbb\xbf"                                    # some editors put it in front


def _python(batch):
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = [_repaired(column) for column in batch.columns]
        return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _repaired(array):
    """to_pylist() of an array whose strings may not be UTF-8."""
    if pa.types.is_dictionary(array.type):
        return [None if i is None else v[i] for v in [_repaired(array.dictionary)]
                for i in array.indices.to_pylist()]
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return [v and v.decode(errors="replace") if v != b"" else "" for v in array.cast(
            pa.binary() if pa.types.is_string(array.type) else pa.large_binary()).to_pylist()]
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return [None if not item.is_valid else _repaired(item.values) for item in array]
    if pa.types.is_struct(array.type):
        names = [field.name for field in array.type]
        fields = [_repaired(array.field(i)) for i in range(len(names))]
        return [dict(zip(names, values, strict=True)) if valid.as_py() else None
                for valid, *values in zip(array.is_valid(), *fields, strict=True)]
    return array.to_pylist()


def _jsonl(path, columns, span):
    with _open(path) as file:
        start, end = span or (0, None)
        if start:                                         # a line belongs to the span in which it begins
            file.seek(start - 1)
            start += len(file.readline()) - 1
        first, at = True, start
        while end is None or at < end:
            line = file.readline()
            if not line:
                return
            if line.strip():
                try:
                    row = json.loads(line.removeprefix(BOM).decode(errors="replace"))
                except (ValueError, RecursionError):
                    row = None
                row = row if isinstance(row, dict) else None
                if first and row is not None:
                    _missing(path, columns, row)
                    first = False
                yield at, row
            at += len(line)


def _json(path, columns, span):
    with _open(path) as file:
        try:
            whole = json.loads(file.read().removeprefix(BOM).decode(errors="replace"))
        except ValueError as e:                           # an object a line, as many call .json
            if "Extra data" not in str(e):
                raise InputError(f"{path} is no JSON ({e}); get it again") from None
            whole = None
    if whole is None:
        yield from _jsonl(path, columns, None)
        return
    for index, row in enumerate(whole if isinstance(whole, list) else [whole]):
        row = row if isinstance(row, dict) else None
        if index == 0 and row is not None:
            _missing(path, columns, row)
        yield index, row


def _csv(path, columns, span):
    csv.field_size_limit(1 << 30)
    with _open(path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", "replace", newline=""))
        _missing(path, columns, reader.fieldnames or ())
        yield from enumerate(reader)


def _text(path, columns, span):
    with _open(path) as file:
        yield 0, {"text": file.read().removeprefix(BOM).decode(errors="replace")}


@contextlib.contextmanager
def _open(path):
    """A file as bytes, decompressed by its name."""
    if path.lower().endswith((".gz", ".zst", ".bz2")):
        with pa.input_stream(path, compression="detect") as stream:
            yield io.BufferedReader(stream, 1 << 20)
    else:
        with open(path, "rb") as file:
            yield file

_READERS = {"parquet": _parquet, "arrow": _arrow, "jsonl": _jsonl, "json": _json, "csv": _csv, "text": _text}


def cut_files(paths, size=None):
    """Files as units of work of about `size` bytes, [[(path, span)]]: large ones are cut (parquet at row
    groups, .jsonl at lines), small ones are put together. A function of the files alone: by default 64 pieces
    of 1 to 64 MB, more of what is larger."""
    size = size or min(64 << 20, max(1 << 20, sum(map(os.path.getsize, paths)) // 64))
    units, together, held = [], [], 0
    for path in paths:
        n = os.path.getsize(path)
        if n > size or held + n > size:
            units += [together] if together else []
            together, held = [], 0
        if n <= size:
            together.append((path, None))
            held += n
        elif file_kind(path) == "parquet":
            try:
                with pq.ParquetFile(path) as file:
                    sizes = [sum(info.column(c).total_compressed_size for c in range(info.num_columns))
                             for info in map(file.metadata.row_group, range(file.num_row_groups))]
            except pa.ArrowInvalid as e:
                raise InputError(f"{path} cannot be read ({e}); remove it and get it again") from None
            first, part = 0, 0
            for g, group in enumerate(sizes):
                part += group
                if part >= size or g == len(sizes) - 1:
                    units.append([(path, (first, g + 1))])
                    first, part = g + 1, 0
        elif file_kind(path) == "jsonl" and path.lower() == _stem(path):            # not compressed
            units += [[(path, (at, min(at + size, n)))] for at in range(0, n, size)]
        else:
            units.append([(path, None)])
    return units + ([together] if together else [])


def files_below(folder):
    """The paths of all files below a folder, relative to it."""
    return [os.path.relpath(os.path.join(top, f), folder) for top, _, files in os.walk(folder) for f in files]

DATA_ENDINGS = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".txt", ".md")


def local_files(path):
    """The data files of a folder (all below it that end as in LOCAL, compressed or not; it says which do
    not), of one file, or of a glob (whatever it matches; other endings are read as text), sorted."""
    path, others = os.path.expanduser(path), collections.Counter()
    if os.path.isdir(path):
        found = []
        for file in files_below(path):
            if _stem(file).endswith(DATA_ENDINGS):
                found.append(os.path.join(path, file))
            else:
                others[os.path.splitext(file)[1] or os.path.basename(file)] += 1
        if others:
            print(f"local:{path}: {others.total()} files left alone (name them with a glob): "
                  + ", ".join(f"{n} {ending}" for ending, n in others.most_common(8)))
    else:
        found = [path] if os.path.isfile(path) else [f for f in glob.glob(path, recursive=True)
                                                     if os.path.isfile(f)]
    if not found:
        raise InputError(f"local:{path} holds no file (of a folder, those that end in "
                         f"{', '.join(DATA_ENDINGS)}; or give a glob such as local:{path.rstrip('/')}/*.py)")
    return sorted(found)


def matches(path, pattern):
    """Whether a path is of a glob in which * does not cross folders."""
    a, b = path.split("/"), pattern.split("/")
    return len(a) == len(b) and all(map(fnmatch.fnmatchcase, a, b))
