"""What the paper trains on: every source, the data sets it is made of, and where their questions stand."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cli import InputError, did_you_mean
from corpus.files import read_rows
from corpus.formats import (
    Drop,
    chat,
    codeforces,
    codex,
    dclm_edu,
    number_of,
    ocr2,
    ocr2_kept,
    openthoughts_science,
    question_and_answer,
    read_row,
    text_of,
    wildchat,
)
from corpus.hub import raw_files
from corpus.world import DOMAINS as PROBLEM_DOMAINS

DOMAINS = ("general", "chat", *PROBLEM_DOMAINS)


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
class SourceSpec:
    domain: str
    tokens: float | None                 # billions with the Granite-3.3 tokenizer; paper, table 1
    parts: dict[str, Part]


def _one(name, domain, paper_tokens, *args, **fields):
    """A source of one part, which has the paper's tokens unless it stands in for another."""
    return SourceSpec(domain, paper_tokens, {name: Part(*args, **{"tokens": paper_tokens} | fields)})


MOT = dict(revision="e55fa28006c0d0ec60fb3547520f775dd42d02cd")

NEMOTRON = dict(revision="74e23eb6f830fef4a9e96a92f6f6262214cbb9a8", licence="cc-by-4.0")

OCR2 = dict(revision="eadf535931451525f3e5621d0f960c240bc62fd9", licence="cc-by-4.0, each row its own",
            tokens=0.56, kept=ocr2_kept, draw=60_000, questions=True,
            kept_columns=("question", "judgement", "pass_rate", "dataset", "split", "index"))

OCR2_COLUMNS = ("question", "r1_generation", "judgement", "pass_rate", "dataset", "split", "index")


def _tulu(kind, **fields):
    return Part(f"allenai/tulu-3-sft-personas-{kind}", "data/train-*.parquet", ("messages",), chat,
                **{"licence": "odc-by"} | fields)


REGISTRY = {
    "dclm-edu": _one("dclm-edu", "general", 111.46, "HuggingFaceTB/dclm-edu", "data/*.parquet",
                     ("text", "edu_int_score"), dclm_edu, licence="cc-by-4.0",
                     revision="dbad8ad71224482740cd9c9d353591adbf62fe04"),
    "chat": SourceSpec("chat", None, {       # the split inside is not published; ours: by available tokens
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
                             ("text",), text_of, "3cbc64616594d6bc8759abaa0b2a71858f880f0d", "odc-by", gb=50,
                             aliases=("LLM360/MegaMath",)),
    "nemotron-math": _one("nemotron-math", "math", 35.93, "nvidia/Nemotron-Post-Training-Dataset-v1",
                          "data/math-*.parquet", ("messages",), question_and_answer, **NEMOTRON),
    "mot-math": _one("mot-math", "math", 0.60, "open-r1/Mixture-of-Thoughts", "math/train-*.parquet",
                     ("messages",), question_and_answer, gb=0.70, **MOT),
    "mot-code": _one("mot-code", "code", 1.18, "open-r1/Mixture-of-Thoughts", "code/train-*.parquet",
                     ("messages",), question_and_answer, gb=1.61, **MOT),
    "ocr2": SourceSpec("code", 1.12, {
        "ocr2-python": Part("nvidia/OpenCodeReasoning-2", "train/python/*.parquet", OCR2_COLUMNS, ocr2, gb=27,
                            **OCR2),
        "ocr2-cpp": Part("nvidia/OpenCodeReasoning-2", "train/cpp/*.parquet", OCR2_COLUMNS, ocr2, gb=23,
                         **OCR2)}),
    "refinecode": _one("refinecode", "code", 186.44, "OpenCoder-LLM/opc-fineweb-code-corpus",
                       "data/train-*.parquet", ("text",), text_of, "4a12042b6b5b2686aa1d9f1c3d23f91eb53fd958",
                       "mit", gb=148, tokens=55, aliases=("OpenCoder-LLM/fineweb-code-corpus",),
                       stand_in="RefineCode, published as metadata only"),
    "starcoder2": _one("starcoder2", "code", 432.73, "common-pile/stackv2_edu_filtered", "*.json.gz",
                       ("text",), text_of, tokens=67, licence="open licences, each row its own",
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
    "taco": Part("BAAI/TACO", "ALL/*.parquet", ("question",), partial(text_of, column="question"),
                 "d593ed0a2becbbc952230bb89be09189bf1056dc", "apache-2.0", gb=2.4),
    "apps": Part("codeparrot/apps", "t*.jsonl", ("question",), partial(text_of, column="question"),
                 "21e74ddf8de1a21436da12e3e653065c5213e9d1", "mit", gb=1.3),
    "code_contests": Part("deepmind/code_contests", "data/*.parquet", ("description",),
                          partial(text_of, column="description"), "802411c3010cb00d1b05bad57ca77365a3c699d6",
                          "cc-by-4.0", gb=7.6),
    "open-r1/codeforces": Part("open-r1/codeforces", "data/*.parquet",
                               ("description", "input_format", "output_format", "examples", "note"),
                               codeforces, "fbe3f6e903ee854eec2e69e9d96d0306cde59baf", "cc-by-4.0",
                               gb=2.8),
}


class Questions:
    """The lookup that `ocr2` takes: row -> question. Reads a split when it is first asked for."""

    def __init__(self, raw):
        self.raw, self.splits = raw, {}

    def __call__(self, row):
        dataset, split = str(row.get("dataset")), str(row.get("split"))
        if dataset not in QUESTIONS:
            raise Drop("question from an unknown data set")
        if (dataset, split) not in self.splits:
            self.splits[dataset, split] = self.read_split(dataset, split)
        questions = self.splits[dataset, split]
        index = int(number_of(row, "index"))
        if not 0 <= index < len(questions) or questions[index] is None:
            raise Drop("question not found")
        return questions[index]

    def read_split(self, dataset, split):
        """The questions of a split in their order, None where a row has none."""
        part, questions = QUESTIONS[dataset], []
        for file in raw_files(self.raw, folder_name(dataset), part):
            if not os.path.basename(file).startswith(split):
                continue
            for _, row in read_rows(file, part.columns):
                try:
                    questions.append(read_row(part.read, row))
                except Drop:
                    questions.append(None)
        return questions


def find_source(name):
    """The SourceSpec of a name in the registry; InputError lists the known ones."""
    if name not in REGISTRY:
        raise InputError(f"{name!r} is no source of the registry{did_you_mean(name, REGISTRY)} (known: "
                         f"{', '.join(REGISTRY)}; your own files: --sources=\"{name}=local:folder\")")
    return REGISTRY[name]


def parts_to_get(name):
    """{name: Part} of all that has to be on disk for a source: its parts, and their lookups."""
    parts = dict(find_source(name).parts)
    if any(part.questions for part in parts.values()):
        parts |= {folder_name(dataset): part for dataset, part in QUESTIONS.items()}
    return parts


def folder_name(dataset):
    """The folder under --raw of a data set that questions are looked up in."""
    return "questions-" + dataset.split("/")[-1].replace("_", "-")
