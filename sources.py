"""The texts behind a mixture: where each source is published, which rows the paper keeps, how a row is read.

A source of a mixture ("chat") is made of parts, each one data set of the hub (or the files of one that it
takes). A part names its revision, its columns, and `read`: a row to its text, or Drop(reason). To change a
filter or a format, edit the function; what was prepared with the old one is prepared again.

Two sources of the paper have no public text (RefineCode publishes metadata, StarCoder2 ids): their parts are
stand-ins, named as such wherever they are used. Facts about the data sets (files, columns, revisions) are
from their cards and from public code that reads them; `python data.py check` compares them with the hub.

    for index, row in rows("data/raw/mot-math/math/train-00000-of-00002.parquet", ("messages",)): ...
"""

import collections
import contextlib
import csv
import fnmatch
import glob
import hashlib
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from runtime import InputError, did_you_mean, human, write_atomic


class Drop(Exception):
    """A row that is left out, and why."""


# -- a row to its text -------------------------------------------------------------------------------------

def text(row, column="text"):
    """The column as it is. Drop where it is null, not a string, or empty."""
    value = row.get(column)
    if not isinstance(value, str):
        raise Drop(f"{column} is null" if value is None else f"{column} is not text")
    if not value.strip():
        raise Drop(f"{column} is empty")
    return value


def number(row, column):
    """The column as a float, also where it was published as a string. Drop where it is none (or nan)."""
    try:
        value = float(row.get(column))
    except (TypeError, ValueError):
        value = float("nan")
    if value != value:
        raise Drop(f"{column} is no number")
    return value


def turns(row, column="messages"):
    """[(role, content)] of a conversation, {role, content} or {from, value}, system prompts left out. Drop
    where it is none, or where an utterance is missing."""
    messages, names = row.get(column), {"human": "user", "gpt": "assistant"}
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Drop(f"{column} is no conversation")
    said = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in messages]
    said = [(names.get(role, role), content) for role, content in said if role != "system"]
    if not said or not all(isinstance(content, str) and content.strip() for _, content in said):
        raise Drop(f"{column} lacks an utterance")
    if not {role for role, _ in said} <= {"user", "assistant"} or "assistant" not in dict(said):
        raise Drop(f"{column} is not of user and assistant")
    return said


def question_and_answer(row, column="messages"):
    """Reasoning data: question and answer joined by one line break (paper, section 3)."""
    return "\n".join(content for _, content in turns(row, column))


def chat(row, column="messages"):
    """Each utterance behind its role, joined by one line break (paper, section 3)."""
    return "\n".join(f"{role.capitalize()}: {content}" for role, content in turns(row, column))


def dclm_edu(row):
    """Documents of quality score >= 3 (paper, section 3); ours: the rounded score, as in the card's recipe.
    `edu_score`, before rounding, would keep about a third of these."""
    if number(row, "edu_int_score") < 3:
        raise Drop("score below 3")
    return text(row)


def ocr2_kept(row, questions):
    """The question of a row that is judged right by the QwQ evaluator and has tests: pass_rate != -1 (paper,
    section 3). The data set leaves questions out ("-"); they are looked up where they were taken from."""
    if row.get("judgement") != "right":
        raise Drop("not judged right")
    if number(row, "pass_rate") == -1:
        raise Drop("no tests")
    question = row.get("question")
    return questions(row) if not isinstance(question, str) or question.strip() in ("", "-") else question


def ocr2(row, questions):
    return ocr2_kept(row, questions) + "\n" + text(row, "r1_generation")


def wildchat(row):
    """GPT-4 conversations only (paper, section 3). Ours: none that the data set marks as toxic."""
    if not text(row, "model").startswith("gpt-4"):
        raise Drop("not GPT-4")
    if row.get("toxic"):
        raise Drop("toxic")
    return chat(row, "conversation")


def openthoughts_science(row):
    if row.get("domain") != "science":
        raise Drop("not science")
    return question_and_answer(row, "conversations")


def codex(row):
    """Code with long chains of thought; a chain that was cut off before its answer is left out (ours)."""
    answer = text(row, "output")
    if "<think>" in answer and "</think>" not in answer:
        raise Drop("thought without end")
    return text(row, "input") + "\n" + answer


LOCAL_FORMS = (("text",), ("content",), ("messages",), ("conversations",), ("conversation",),
               ("question", "answer"), ("problem", "solution"), ("prompt", "response"),
               ("prompt", "completion"), ("instruction", "input", "output"), ("instruction", "output"),
               ("input", "output"))


def local(row):
    """What a row of one's own holds: the first of LOCAL_FORMS, its columns joined by a line break.
    Conversations are formatted as chat; an empty input of an instruction is left out."""
    for form in LOCAL_FORMS:
        if all(column in row for column in form):
            if form[0].startswith(("messages", "conversation")):
                return chat(row, form[0])
            return "\n".join(text(row, column) for column in form
                             if column != "input" or form[0] == "input" or row[column])
    raise Drop("no column of text")


def reading(read, row, *more):
    """read(row): Drop, too, for a row that is no object (None), or whose values have another form than the
    data set's."""
    if row is None:
        raise Drop("no JSON object")
    try:
        return read(row, *more)
    except InputError:
        raise
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as e:
        raise Drop(f"row of another form ({type(e).__name__})") from None


# -- the registry ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Part:
    """One data set of the hub, or the files of one that a source takes."""
    repo: str                            # id of the data set on the hub
    files: str                           # glob of its data files
    columns: tuple[str, ...]             # columns that `read` needs
    read: Callable[[dict], str]          # row to text, or Drop
    revision: str = "main"               # commit; main: the first `get` pins what it finds
    licence: str = "none declared"
    tokens: float | None = None          # billions after the filter (paper, table 1; stand-ins: ours)
    gb: float | None = None              # to download it all; None = not known
    aliases: tuple[str, ...] = ()        # earlier ids
    gated: bool = False                  # its terms have to be accepted on the hub
    stand_in: str = ""                   # what of the paper's it stands for
    kept: Callable | None = None         # the filter alone, for a draw
    kept_columns: tuple[str, ...] = ()
    draw: int = 0                        # rows drawn at random of those kept; 0 = all
    questions: bool = False              # `read` takes the lookup of questions as well


@dataclass(frozen=True)
class Source:
    domain: str
    tokens: float | None                 # billions with the Granite-3.3 tokenizer; paper, table 1
    parts: dict[str, Part]


def _one(name, domain, paper, *args, **more):
    return Source(domain, paper, {name: Part(*args, **{"tokens": paper} | more)})


MOT = dict(revision="e55fa28006c0d0ec60fb3547520f775dd42d02cd")
NEMOTRON = dict(revision="74e23eb6f830fef4a9e96a92f6f6262214cbb9a8", licence="cc-by-4.0")
OCR2 = dict(revision="eadf535931451525f3e5621d0f960c240bc62fd9", licence="cc-by-4.0, each row its own",
            tokens=0.56, kept=ocr2_kept, draw=60_000, questions=True,
            kept_columns=("question", "judgement", "pass_rate", "dataset", "split", "index"))
OCR2_COLUMNS = ("question", "r1_generation", "judgement", "pass_rate", "dataset", "split", "index")


def _tulu(kind, **more):
    return Part(f"allenai/tulu-3-sft-personas-{kind}", "data/train-*.parquet", ("messages",), chat,
                **{"licence": "odc-by"} | more)


REGISTRY = {
    "dclm-edu": _one("dclm-edu", "general", 111.46, "HuggingFaceTB/dclm-edu", "data/*.parquet",
                     ("text", "edu_int_score"), dclm_edu, licence="cc-by-4.0",
                     revision="dbad8ad71224482740cd9c9d353591adbf62fe04"),
    "chat": Source("chat", None, {       # the split inside is not published; ours: by available tokens
        "wildchat": Part("allenai/WildChat-1M", "data/train-*.parquet", ("conversation", "model", "toxic"),
                         wildchat, "7d6490e462285cf85d91eabea0f9a954fbddcd1f", "odc-by", gb=3.4),
        "tulu3-math": _tulu("math", revision="46add032f5203fd96efbd54d074198981ed57d25", gb=0.36,
                            aliases=("allenai/tulu-3-personas-math",)),
        "tulu3-math-grade": _tulu("math-grade", licence="none declared"),
        "tulu3-code": _tulu("code", revision="1412abe88dd2976af977260788e033013449f7b2"),
        "tulu3-algebra": _tulu("algebra"),
        "tulu3-if": _tulu("instruction-following", revision="fe0c7d350c9b4542b8d829a6f1daa1c259f0ba0e"),
        "ultrachat": Part("HuggingFaceH4/ultrachat_200k", "data/train_sft-*.parquet", ("messages",), chat,
                          "8049631c405ae6576f93f445c6b8166f76f5505a", "mit"),
    }),
    "megamath-web-pro": _one("megamath-web-pro", "math", 14.73, "IFM/MegaMath", "megamath-web-pro/*.parquet",
                             ("text",), text, "3cbc64616594d6bc8759abaa0b2a71858f880f0d", "odc-by", gb=50,
                             aliases=("LLM360/MegaMath",)),
    "nemotron-math": _one("nemotron-math", "math", 35.93, "nvidia/Nemotron-Post-Training-Dataset-v1",
                          "data/math-*.parquet", ("messages",), question_and_answer, **NEMOTRON),
    "mot-math": _one("mot-math", "math", 0.60, "open-r1/Mixture-of-Thoughts", "math/train-*.parquet",
                     ("messages",), question_and_answer, gb=0.70, **MOT),
    "mot-code": _one("mot-code", "code", 1.18, "open-r1/Mixture-of-Thoughts", "code/train-*.parquet",
                     ("messages",), question_and_answer, gb=1.61, **MOT),
    "ocr2": Source("code", 1.12, {
        "ocr2-python": Part("nvidia/OpenCodeReasoning-2", "train/python/*.parquet", OCR2_COLUMNS, ocr2, gb=27,
                            **OCR2),
        "ocr2-cpp": Part("nvidia/OpenCodeReasoning-2", "train/cpp/*.parquet", OCR2_COLUMNS, ocr2, gb=23,
                         **OCR2)}),
    "refinecode": _one("refinecode", "code", 186.44, "OpenCoder-LLM/opc-fineweb-code-corpus",
                       "data/train-*.parquet", ("text",), text, "4a12042b6b5b2686aa1d9f1c3d23f91eb53fd958",
                       "mit", gb=148, tokens=55, aliases=("OpenCoder-LLM/fineweb-code-corpus",),
                       stand_in="RefineCode, published as metadata only"),
    "starcoder2": _one("starcoder2", "code", 432.73, "common-pile/stackv2_edu_filtered", "*.json.gz",
                       ("text",), text, tokens=67, licence="open licences, each row its own",
                       stand_in="StarCoder2's data, published as ids only"),
    "openthoughts3-science": _one("openthoughts3-science", "science", 0.73,
                                  "open-thoughts/OpenThoughts3-1.2M", "data/train-*.parquet",
                                  ("conversations", "domain"), openthoughts_science,
                                  "61bcf9d4eb38b30295efc2021227a63cc5bb34c8", "apache-2.0", gb=28),
    "mot-science": _one("mot-science", "science", 0.42, "open-r1/Mixture-of-Thoughts",
                        "science/train-*.parquet", ("messages",), question_and_answer, gb=0.67, **MOT),
    # long-context restoration (paper, section 8.1): four of the above, and this
    "codex": _one("codex", "code", 3.86, "Modotte/CodeX-2M-Thinking", "*.parquet", ("input", "output"), codex,
                  "f9a4622fe9ccaa71509beea80e3bc69739cbbfa2", "apache-2.0",
                  aliases=("XenArcAI/CodeX-2M-Thinking",)),
}

# Where the questions of OpenCodeReasoning-2 stand: (dataset, split) names the files, index the row in them.
QUESTIONS = {
    "taco": Part("BAAI/TACO", "ALL/*.parquet", ("question",), partial(text, column="question"),
                 "d593ed0a2becbbc952230bb89be09189bf1056dc", "apache-2.0", gb=2.4),
    "apps": Part("codeparrot/apps", "t*.jsonl", ("question",), partial(text, column="question"),
                 "21e74ddf8de1a21436da12e3e653065c5213e9d1", "mit", gb=1.3),
    "code_contests": Part("deepmind/code_contests", "data/*.parquet", ("description",),
                          partial(text, column="description"), "802411c3010cb00d1b05bad57ca77365a3c699d6",
                          "cc-by-4.0", gb=7.6),
    "open-r1/codeforces": Part("open-r1/codeforces", "data/*.parquet",
                               ("description", "input_format", "output_format", "examples", "note"),
                               lambda row: codeforces(row), "fbe3f6e903ee854eec2e69e9d96d0306cde59baf",
                               "cc-by-4.0", gb=2.8),
}


def codeforces(row):
    """A problem of open-r1/codeforces as OpenCodeReasoning-2 put it to its model: sections and examples."""
    sections = [text(row, "description")]
    sections += [f"{title}\n\n{row[column]}" for title, column in (("Input", "input_format"),
                                                                   ("Output", "output_format"))
                 if row.get(column)]
    if row.get("examples"):
        sections.append("Examples")
        sections += [f"{title}\n\n{example[key]}" for example in row["examples"]
                     for title, key in (("Input", "input"), ("Output", "output")) if example.get(key)]
    if row.get("note"):
        sections.append("Note\n\n" + row["note"])
    return "\n\n".join(sections)


class Questions:
    """The lookup that `ocr2` takes: row -> question. Reads a split when it is first asked for."""

    def __init__(self, raw):
        self.raw, self.splits = raw, {}

    def __call__(self, row):
        dataset, split = str(row.get("dataset")), str(row.get("split"))
        if dataset not in QUESTIONS:
            raise Drop("question from an unknown data set")
        if (dataset, split) not in self.splits:
            part = QUESTIONS[dataset]
            files = [f for f in raw_files(self.raw, folder_name(dataset), part)
                     if os.path.basename(f).startswith(split)]
            found = self.splits[dataset, split] = []
            for file in files:
                for _, source in rows(file, part.columns):
                    try:
                        found.append(reading(part.read, source))
                    except Drop:
                        found.append(None)
        found, index = self.splits[dataset, split], int(number(row, "index"))
        if not 0 <= index < len(found) or found[index] is None:
            raise Drop("question not found")
        return found[index]


def lookup(name):
    """The Source of a name in the registry; InputError lists the known ones."""
    if name not in REGISTRY:
        raise InputError(f"{name!r} is no source of the registry{did_you_mean(name, REGISTRY)} (known: "
                         f"{', '.join(REGISTRY)}; your own files: --sources=\"{name}=local:folder\")")
    return REGISTRY[name]


def parts_to_get(name):
    """{name: Part} of all that has to be on disk for a source: its parts, and their lookups."""
    parts = dict(lookup(name).parts)
    if any(part.questions for part in parts.values()):
        parts |= {folder_name(dataset): part for dataset, part in QUESTIONS.items()}
    return parts


def folder_name(dataset):
    return "questions-" + dataset.split("/")[-1].replace("_", "-")


# -- files to rows -----------------------------------------------------------------------------------------

def _stem(path):
    path = path.lower()
    for end in (".gz", ".zst", ".bz2"):
        path = path.removesuffix(end)
    return path


def kind(path):
    """parquet, arrow, jsonl, json, csv or text, by the name; .gz, .zst, .bz2 behind it is compression."""
    stem = _stem(path)
    ending = stem.rpartition(".")[2]
    if ending == "json" and stem != path.lower():         # the hub's .json.gz hold an object a line
        return "jsonl"
    return {"ndjson": "jsonl"}.get(ending, ending if ending in ("parquet", "arrow", "jsonl", "json", "csv")
                                   else "text")


def rows(path, columns=None, span=None):
    """(index, row) of a file: index is unique in it and does not depend on the span, row is a dict of at
    least `columns` (None: those of LOCAL_FORMS, or all where there are none). span: (first, end) row groups
    of a parquet file, bytes of an uncompressed .jsonl. A text file is one row {"text"}. What is no UTF-8
    becomes U+FFFD. A line of .jsonl that is no JSON object comes as None. InputError names a column that is
    missing, or a file that cannot be read.
    """
    try:
        yield from _READERS[kind(path)](path, columns, span)
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
                         f"has it, or edit its Part in sources.py")


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


def pieces(paths, size=None):
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
        elif kind(path) == "parquet":
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
        elif kind(path) == "jsonl" and path.lower() == _stem(path):            # not compressed
            units += [[(path, (at, min(at + size, n)))] for at in range(0, n, size)]
        else:
            units.append([(path, None)])
    return units + ([together] if together else [])


def below(folder):
    """The paths of all files below a folder, relative to it."""
    return [os.path.relpath(os.path.join(top, f), folder) for top, _, files in os.walk(folder) for f in files]


LOCAL = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".txt", ".md")


def local_files(path):
    """The data files of a folder (all below it that end as in LOCAL, compressed or not; it says which do
    not), of one file, or of a glob (whatever it matches; other endings are read as text), sorted."""
    path, others = os.path.expanduser(path), collections.Counter()
    if os.path.isdir(path):
        found = []
        for file in below(path):
            if _stem(file).endswith(LOCAL):
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
                         f"{', '.join(LOCAL)}; or give a glob such as local:{path.rstrip('/')}/*.py)")
    return sorted(found)


# -- the hub -----------------------------------------------------------------------------------------------

class Hub:
    """Where data sets come from: the hub, another one by its URL, or a folder that holds copies of them as
    owner/name/files. token: of the hub; default what `hf auth login` stored, or HF_TOKEN."""
    waits = (1, 2, 4, 8, 16, 32, 64, 128, 256)            # seconds between tries, where the hub names none

    def __init__(self, where="", token=None):
        self.folder = where if where and "://" not in where else None
        self.endpoint, self.token = (None if self.folder else where or None), token
        if self.folder and not os.path.isdir(self.folder):
            raise InputError(f"--hub={where} is neither a folder nor a URL")

    def patiently(self, call, repo, *args, **more):
        """call(repo, ...), tried again when the hub is overloaded or asks to wait. InputError says what is
        gated, missing or out of reach."""
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
        )
        unreachable = HfHubHTTPError.__bases__[0]         # the error of the HTTP library it is built on
        for wait in (*self.waits, None):
            try:
                return call(repo, *args, **more)
            except GatedRepoError:
                raise InputError(f"{repo} is gated: accept its terms at its page on the hub, then run "
                                 f"`hf auth login` (or set HF_TOKEN)") from None
            except OfflineModeIsEnabled:
                raise InputError(f"{repo}: HF_HUB_OFFLINE is set; unset it, or give a copy: --hub=folder "
                                 f"with {repo}/ in it") from None
            except LocalEntryNotFoundError as e:          # what hf_hub_download makes of a failed connection
                if isinstance(e.__cause__, OfflineModeIsEnabled):
                    raise InputError(f"{repo}: HF_HUB_OFFLINE is set; unset it, or give a folder with a copy"
                                     ) from None
                why = f"cannot be reached ({type(e.__cause__ or e).__name__})"
            except (RepositoryNotFoundError, EntryNotFoundError):
                raise
            except HfHubHTTPError as e:
                status = getattr(e.response, "status_code", None)
                if status is not None and status != 429 and status < 500:
                    raise InputError(f"{repo}: the hub answers {status} ({str(e).splitlines()[0]})") from None
                asked, why = getattr(e.response, "headers", {}).get("Retry-After", ""), f"answers {status}"
                wait = float(asked) if wait is not None and asked.isdigit() else wait
            except (unreachable, ConnectionError, TimeoutError) as e:
                why = f"cannot be reached ({type(e).__name__})"
            if wait is None:
                raise InputError(f"{repo}: the hub {why}, {len(self.waits) + 1} tries; run the command again "
                                 f"later (it goes on), or give a copy: --hub=folder with {repo}/ in it")
            print(f"{repo}: the hub {why}; next try in {wait:g} s", flush=True)
            time.sleep(wait)

    def list(self, part):
        """(repo, revision, [{"path", "size", "sha256"}]) of a part's data files, sorted by path: the id that
        answers and the commit that its revision is."""
        for repo in (part.repo, *part.aliases):
            if self.folder:
                top = os.path.join(self.folder, repo)
                if not os.path.isdir(top):
                    continue
                files = [{"path": f, "size": os.path.getsize(os.path.join(top, f)), "sha256": None}
                         for f in below(top) if matches(f, part.files)]
                revision = part.revision
            else:
                from huggingface_hub import HfApi
                from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
                api = HfApi(endpoint=self.endpoint, token=self.token)
                top = os.path.dirname(part.files.split("*")[0]) or None
                try:
                    revision = self.patiently(api.dataset_info, repo, revision=part.revision).sha
                    tree = self.patiently(lambda repo, api=api, top=top, revision=revision: list(
                        api.list_repo_tree(repo, top, recursive=True, repo_type="dataset",
                                           revision=revision)), repo)
                except RepositoryNotFoundError:
                    continue
                except EntryNotFoundError:
                    tree = []
                files = [{"path": f.path, "size": f.size, "sha256": f.lfs.sha256 if f.lfs else None}
                         for f in tree if hasattr(f, "size") and matches(f.path, part.files)]
            if not files:
                raise InputError(f"{repo} has no files {part.files} at {revision[:12]}; its layout has "
                                 f"changed: edit its Part in sources.py")
            return repo, revision, sorted(files, key=lambda f: f["path"])
        raise InputError(f"{' / '.join((part.repo, *part.aliases))}: "
                         + (f"--hub={self.folder} has no such folder" if self.folder else
                            "the hub has no such data set, or it is gated: accept its terms at its page, "
                            "then run `hf auth login`"))

    def fetch(self, repo, revision, file, folder):
        """One file into folder/path, whole or not at all, checked against size and checksum; what is there
        already is left alone, what a killed call had is gone on with."""
        target = os.path.join(folder, file["path"])
        if os.path.exists(target) and os.path.getsize(target) == file["size"]:
            return
        if self.folder:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(os.path.join(self.folder, repo, file["path"]), target + ".part")
            os.replace(target + ".part", target)
        else:
            from huggingface_hub import hf_hub_download
            self.patiently(hf_hub_download, repo, file["path"], repo_type="dataset", revision=revision,
                           local_dir=folder, endpoint=self.endpoint, token=self.token)
        size, digest = os.path.getsize(target), None
        if file["sha256"]:
            with open(target, "rb") as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()
        if size != file["size"] or digest != file["sha256"]:
            os.remove(target)
            raise InputError(f"{repo}/{file['path']} arrived damaged ({size} bytes of {file['size']}); run "
                             f"the command again")

    def columns(self, repo, revision, file):
        """The columns of one file of the hub, {name: type}: of parquet only the footer is read, of others
        the beginning."""
        path = file["path"]
        if self.folder:
            opened = open(os.path.join(self.folder, repo, path), "rb")
        else:
            from huggingface_hub import HfFileSystem
            opened = self.patiently(
                lambda repo: HfFileSystem(endpoint=self.endpoint, token=self.token).open(
                    f"datasets/{repo}@{revision}/{path}", "rb", block_size=1 << 20), repo)
        with opened as f:
            if kind(path) == "parquet":
                return {field.name: str(field.type) for field in pq.ParquetFile(f).schema_arrow}
            if kind(path) == "arrow":
                return {field.name: str(field.type) for field in pa.ipc.open_stream(f).schema}
            if path.endswith(".gz"):
                import gzip
                f = gzip.GzipFile(fileobj=f)
            line = f.readline()
            row = json.loads(line if kind(path) == "jsonl" else line + f.read())
            row = row[0] if isinstance(row, list) else row
            return {name: type(value).__name__ for name, value in row.items()}


def matches(path, pattern):
    """Whether a path is of a glob in which * does not cross folders."""
    a, b = path.split("/"), pattern.split("/")
    return len(a) == len(b) and all(map(fnmatch.fnmatchcase, a, b))


def shuffled(files, seed, repo):
    """The files in the order in which a plan takes them: by a hash of (seed, data set, path)."""
    def key(file):
        return hashlib.blake2b(repr((seed, repo, file["path"])).encode()).digest()
    return sorted(files, key=key)


def choose(files, part, need, seed, margin=1.1):
    """The first files of the shuffled list that should hold `need` billions of tokens, a tenth more for luck;
    all, where the part's tokens are not known or it is drawn from as a whole."""
    order = shuffled(files, seed, part.repo)
    total, taken = sum(f["size"] for f in files), 0
    if part.tokens is None or part.draw or need * margin >= part.tokens or not total:
        return order
    for n, file in enumerate(order, 1):
        taken += file["size"]
        if part.tokens * taken / total >= need * margin:
            return order[:n]
    return order


def get_part(hub, name, part, need, raw, seed, connections=4):
    """Downloads what `need` billions of tokens of a part take to raw/name; goes on where a killed call
    stopped. raw/name/get.json says what was chosen: data set, commit, files, sizes."""
    folder = os.path.join(raw, name)
    lock = os.path.join(folder, "get.json")
    had = read_lock(folder)
    if had and part.revision not in ("main", had["revision"]):
        raise InputError(f"{folder} holds revision {had['revision'][:12]} of {had['repo']}, sources.py names "
                         f"{part.revision[:12]}; remove the folder, or name the other --raw")
    if had and had["seed"] != seed:
        raise InputError(f"{folder} was chosen with --seed={had['seed']}, not {seed}; give that seed, or "
                         f"another --raw")
    pinned = Part(**{**part.__dict__, "revision": had["revision"]}) if had and not hub.folder else part
    repo, revision, files = hub.list(pinned)
    chosen = choose(files, part, need, seed)
    if had and len(had["files"]) > len(chosen):           # an earlier, larger plan
        chosen = had["files"]
    os.makedirs(folder, exist_ok=True)
    write_atomic(lock, json.dumps({"repo": repo, "revision": revision, "seed": seed, "of": len(files),
                                   "files": chosen}, indent=1))
    size, stop = sum(f["size"] for f in chosen), threading.Event()
    print(f"{name}: {len(chosen)} of {len(files)} files, {human(size)}B of {repo} at {revision[:12]}"
          + (f" (stands in for {part.stand_in})" if part.stand_in else ""), flush=True)

    def fetch(file):
        if not stop.is_set():
            hub.fetch(repo, revision, file, folder)
        return file["size"]

    from tqdm import tqdm
    with ThreadPoolExecutor(connections) as pool, \
            tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None, leave=False) as bar:
        try:
            for done in pool.map(fetch, chosen):
                bar.update(done)
        finally:
            stop.set()


def read_lock(folder):
    """get.json of a part's folder, or None."""
    try:
        with open(os.path.join(folder, "get.json")) as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise InputError(f"{folder}/get.json is damaged ({e}); remove it and get again") from None


def is_there(raw, name):
    """Whether a part was got whole, or put under raw/name by hand; a killed get_part left get.json alone."""
    folder = os.path.join(raw, name)
    had = read_lock(folder)
    return os.path.isdir(folder) if had is None else all(
        os.path.exists(os.path.join(folder, f["path"])) for f in had["files"])


def raw_files(raw, name, part):
    """The files of a part under raw/name, sorted: those get.json names (all have to be there), or, where
    files were put there by hand, all that the part's glob matches."""
    folder = os.path.join(raw, name)
    had = read_lock(folder)
    if had:
        files = sorted(os.path.join(folder, f["path"]) for f in had["files"])
        absent = [f for f in files if not os.path.exists(f)]
        if absent:
            raise InputError(f"{absent[0]} is missing ({len(absent)} of {len(files)} files are); run "
                             f"`python data.py get` again, it goes on")
        return files
    found = sorted(os.path.join(folder, f) for f in below(folder) if matches(f, part.files))
    if not found:
        raise InputError(f"{folder} holds no {part.files} of {part.repo}; run `python data.py get` first")
    return found
