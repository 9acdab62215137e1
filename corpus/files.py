"""Files to rows: parquet, arrow, jsonl, json, csv and plain text, compressed or not; files to units of work.

pyarrow is loaded when the first file is read: what only plans needs none.
"""

import collections
import contextlib
import csv
import fnmatch
import glob
import io
import json
import os

from cli import InputError
from corpus.formats import LOCAL_FORMS, NoUtf8

# -- files to rows -----------------------------------------------------------------------------------------

COMPRESSED = (".gz", ".zst", ".bz2")
BOM = b"\xef\xbb\xbf"                                    # some editors put it in front


def _stem(path):
    """The path in lower case, without the ending of a compression."""
    stem = path.lower()
    for ending in COMPRESSED:
        stem = stem.removesuffix(ending)
    return stem


def _is_compressed(path):
    return _stem(path) != path.lower()


def file_kind(path):
    """parquet, arrow, jsonl, json, csv or text, by the name; .gz, .zst, .bz2 behind it is compression."""
    ending = _stem(path).rpartition(".")[2]
    if ending == "ndjson":
        return "jsonl"
    if ending == "json" and _is_compressed(path):         # the hub's .json.gz hold an object a line
        return "jsonl"
    return ending if ending in ("parquet", "arrow", "jsonl", "json", "csv") else "text"


def read_rows(path, columns=None, span=None):
    """(index, row) of a file: index is unique in it and does not depend on the span, row is a dict of at
    least `columns` (None: those of LOCAL_FORMS, or all where there are none). span: (first, end) row groups
    of a parquet file, bytes of an uncompressed .jsonl. A text file is one row {"text"}. What is no UTF-8
    becomes U+FFFD; a row of parquet or arrow with such text comes as NoUtf8, a line of .jsonl that is no JSON
    object as None. InputError names a column that is missing, or a file that cannot be read.
    """
    import pyarrow as pa
    try:
        yield from reader_of(path)(path, columns, span)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as e:
        raise InputError(f"{path} cannot be read ({e.strerror})") from None
    except (pa.ArrowException, OSError, EOFError, OverflowError, RecursionError, UnicodeError,
            csv.Error) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be read ({reason}); if it is damaged or cut short, remove it and "
                         f"get it again") from None


def _taken_columns(columns, present):
    """The columns to read of those that are there: None = all."""
    if columns:
        return columns
    known = {column for form in LOCAL_FORMS for column in form}
    return [column for column in present if column in known] or None


def _refuse_missing(path, columns, present):
    missing = [column for column in columns or () if column not in present]
    if missing:
        raise InputError(f"{path} has no column {', '.join(map(repr, missing))} (it has: "
                         f"{', '.join(map(str, present))}); the data set has changed: pin the revision that "
                         f"has it, or edit its Part in corpus/registry.py")


def _parquet(path, columns, span):
    import pyarrow.parquet as pq
    with pq.ParquetFile(path) as file:
        present = file.schema_arrow.names
        _refuse_missing(path, columns, present)
        columns = _taken_columns(columns, present)
        first, end = span or (0, file.num_row_groups)
        index = sum(file.metadata.row_group(group).num_rows for group in range(first))
        for group in range(first, end):
            info = file.metadata.row_group(group)
            bytes_per_row = max(1, info.total_byte_size // max(1, info.num_rows))        # uncompressed
            rows_per_batch = max(1, min(1000, (8 << 20) // bytes_per_row))
            for batch in file.iter_batches(rows_per_batch, [group], columns):
                for row in _as_rows(batch):
                    yield index, row
                    index += 1


def _arrow(path, columns, span):
    import pyarrow as pa
    with pa.OSFile(path) as raw:
        try:
            batches = pa.ipc.open_stream(raw)
        except pa.ArrowInvalid:                           # the other of arrow's two formats
            raw.seek(0)
            file = pa.ipc.open_file(raw)
            batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        index = 0
        for batch in batches:
            _refuse_missing(path, columns, batch.schema.names)
            taken = _taken_columns(columns, batch.schema.names)
            batch = batch.select(taken) if taken else batch
            for start in range(0, batch.num_rows, 100):
                for row in _as_rows(batch.slice(start, 100)):
                    yield index, row
                    index += 1


def _as_rows(batch):
    """The rows of an arrow batch as dicts, those whose text is no UTF-8 as NoUtf8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [NoUtf8()]
        return [_as_rows(batch.slice(i, 1))[0] for i in range(batch.num_rows)]


def _jsonl(path, columns, span):
    with _open(path) as file:
        start, end = span or (0, None)
        if start:                                         # a line belongs to the span in which it begins
            file.seek(start - 1)
            start += len(file.readline()) - 1
        offset, checked = start, False
        while end is None or offset < end:
            line = file.readline()
            if not line:
                return
            if line.strip():
                row = _json_object(line)
                if row is not None and not checked:
                    _refuse_missing(path, columns, row)
                    checked = True
                yield offset, row
            offset += len(line)


def _json_object(line):
    """The dict that a line of bytes spells, or None."""
    try:
        value = json.loads(line.removeprefix(BOM).decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json(path, columns, span):
    with _open(path) as file:
        text = file.read().removeprefix(BOM).decode(errors="replace")
    try:
        whole = json.loads(text)
    except ValueError as e:
        if "Extra data" not in str(e):
            raise InputError(f"{path} is no JSON ({e}); get it again") from None
        yield from _jsonl(path, columns, None)            # an object a line, as many call .json
        return
    for index, row in enumerate(whole if isinstance(whole, list) else [whole]):
        row = row if isinstance(row, dict) else None
        if index == 0 and row is not None:
            _refuse_missing(path, columns, row)
        yield index, row


def _csv(path, columns, span):
    csv.field_size_limit(1 << 30)
    with _open(path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", "replace", newline=""))
        _refuse_missing(path, columns, reader.fieldnames or ())
        yield from enumerate(reader)


def _text(path, columns, span):
    with _open(path) as file:
        yield 0, {"text": file.read().removeprefix(BOM).decode(errors="replace")}


@contextlib.contextmanager
def _open(path):
    """A file as bytes, decompressed by its name."""
    if _is_compressed(path):
        import pyarrow as pa
        with pa.input_stream(path, compression="detect") as stream:
            yield io.BufferedReader(stream, 1 << 20)
    else:
        with open(path, "rb") as file:
            yield file


READER_OF_KIND = {"parquet": _parquet, "arrow": _arrow, "jsonl": _jsonl, "json": _json, "csv": _csv,
                  "text": _text}


def reader_of(path):
    """The function that reads a file of this name: (path, columns, span) to (index, row)."""
    return READER_OF_KIND[file_kind(path)]


# -- files to units of work --------------------------------------------------------------------------------

def cut_files(paths, size=None):
    """Files as units of work of about `size` bytes, [[(path, span)]]: large ones are cut (parquet at row
    groups, .jsonl at lines), small ones are put together. A function of the files alone: by default 64 pieces
    of 1 to 64 MB, more of what is larger."""
    size = size or min(64 << 20, max(1 << 20, sum(map(os.path.getsize, paths)) // 64))
    units, small_files, small_bytes = [], [], 0
    for path in paths:
        file_bytes = os.path.getsize(path)
        if small_files and small_bytes + file_bytes > size:
            units.append(small_files)
            small_files, small_bytes = [], 0
        if file_bytes > size:
            units += [[(path, span)] for span in _spans(path, size)]
        else:
            small_files.append((path, None))
            small_bytes += file_bytes
    return units + ([small_files] if small_files else [])


def _spans(path, size):
    """The spans of about `size` bytes of a file, [None] where it has to be read as a whole."""
    kind = file_kind(path)
    if kind == "parquet":
        return _row_group_spans(path, size)
    if kind == "jsonl" and not _is_compressed(path):
        end = os.path.getsize(path)
        return [(start, min(start + size, end)) for start in range(0, end, size)]
    return [None]


def _row_group_spans(path, size):
    """(first, end) of neighbouring row groups that have `size` bytes together, or end the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        with pq.ParquetFile(path) as file:
            group_bytes = [_compressed_bytes(file.metadata.row_group(group))
                           for group in range(file.num_row_groups)]
    except pa.ArrowInvalid as e:
        raise InputError(f"{path} cannot be read ({e}); remove it and get it again") from None
    spans, first, span_bytes = [], 0, 0
    for group, added in enumerate(group_bytes):
        span_bytes += added
        if span_bytes >= size or group == len(group_bytes) - 1:
            spans.append((first, group + 1))
            first, span_bytes = group + 1, 0
    return spans


def _compressed_bytes(row_group):
    return sum(row_group.column(c).total_compressed_size for c in range(row_group.num_columns))


# -- files of a folder -------------------------------------------------------------------------------------

DATA_ENDINGS = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".txt", ".md")


def files_below(folder):
    """The paths of all files below a folder, relative to it."""
    return [os.path.relpath(os.path.join(top, file), folder)
            for top, _, files in os.walk(folder) for file in files]


def local_files(path):
    """The data files of a folder (all below it that end as in DATA_ENDINGS, compressed or not; it says which
    do not), of one file, or of a glob (whatever it matches; other endings are read as text), sorted."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        files = _data_files(path)
    elif os.path.isfile(path):
        files = [path]
    else:
        files = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
    if not files:
        raise InputError(f"local:{path} holds no file (of a folder, those that end in "
                         f"{', '.join(DATA_ENDINGS)}; or give a glob such as local:{path.rstrip('/')}/*.py)")
    return sorted(files)


def _data_files(folder):
    """Those of a folder that end as in DATA_ENDINGS. Prints how many others there are, by their ending."""
    taken, others = [], collections.Counter()
    for file in files_below(folder):
        if _stem(file).endswith(DATA_ENDINGS):
            taken.append(os.path.join(folder, file))
        else:
            others[os.path.splitext(file)[1] or os.path.basename(file)] += 1
    if others:
        counts = ", ".join(f"{n} {ending}" for ending, n in others.most_common(8))
        print(f"local:{folder}: {others.total()} files left alone (name them with a glob): {counts}")
    return taken


def matches(path, pattern):
    """Whether a path is of a glob in which * does not cross folders."""
    names, patterns = path.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))
