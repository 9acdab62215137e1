"""The prompts of RL: rows of the seven sets to records, apart from the benchmarks, in mixes by difficulty.

A record is {"id", "domain", "prompt", "truth", "source"}; truth is what verify.grade takes: LaTeX, a letter,
or a dict of tests.
"""

import ast
import contextlib
import glob
import json
import math
import os
import re
import warnings
from array import array
from collections import Counter
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np

from cli import InputError, appearing, did_you_mean, read_jsonl, write_atomic
from corpus import world
from corpus.files import read_rows
from corpus.formats import Drop, number_of, text_of, turns_of
from corpus.hashes import shuffle_key
from corpus.hub import Hub, get_part, raw_files, read_lock, shuffled
from corpus.overlap import BOILERPLATE, contaminated, grams, index_of
from corpus.registry import NEMOTRON, Part
from corpus.world import DOMAINS

GET = "python data.py get_prompts"

LIMITS = {"math": 294_000, "science": 100_000, "code": 142_000}                # paper, appendix 15

MAX_TEST_BYTES = 1 << 20                                  # of a prompt's tests as JSON; ours

TIME_LIMIT_S, MEMORY_LIMIT_MB = 6, 1024                   # of a test; ours, the sets state none


# -- records -----------------------------------------------------------------------------------------------

def decoded(value, name):
    """The list or dict of a JSON text, also one encoded twice or written as a Python literal, else Drop."""
    for _ in range(2):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                try:
                    value = ast.literal_eval(value.strip())
                except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                    raise Drop(f"{name} is no JSON") from None
    if not isinstance(value, (list, dict)):
        raise Drop(f"{name} is null" if value is None else f"{name} is no JSON")
    return value


INSTRUCTION = re.compile(r"(?:(?<=[.?!$:)])\s+|\n\s*)(?:Let's|Please)\b[^\n.?!]{0,200}\\boxed[^\n]*$")


def without_instruction(prompt):
    r"""A problem without the instruction around it: first and last paragraphs, or a last sentence, that speak
    of \boxed. Left in, one instruction would make a whole set overlap with itself."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise Drop("prompt is no Unicode text") from None
    if "\\boxed" not in prompt:
        return prompt.strip()
    paragraphs = re.split(r"\n\s*\n", prompt.strip())
    for end in (0, -1):
        while len(paragraphs) > 1 and "\\boxed" in paragraphs[end]:
            del paragraphs[end]
    return INSTRUCTION.sub("", "\n\n".join(paragraphs))


def math_record(prompt, answer):
    """A record without id, its answer without dollars and box around it."""
    for wrapping in (r"\$+([^$]+)\$+", r"\\boxed\s*\{(.*)\}", r"\$+([^$]+)\$+"):
        match = re.fullmatch(wrapping, answer.strip(), re.S)
        answer = match[1] if match else answer
    if not answer.strip():
        raise Drop("answer is empty")
    if "\\boxed" in answer:
        raise Drop("answer is of several boxes")
    return {"domain": "math", "prompt": without_instruction(prompt), "truth": answer.strip()}


class Tests(NamedTuple):
    """Of a program: pairs of (stdin, stdout). Of a function: pairs of (list of arguments, value)."""
    pairs: list
    fn_name: str | None                  # None = a program


def code_record(prompt, tests):
    """A record without id. Drop where JSON would change the tests: a tuple among the arguments would arrive
    as a list, which does not hash."""
    if not tests.pairs:
        raise Drop("no tests")
    cases = []
    try:
        for value, expected in tests.pairs:
            if tests.fn_name is None:
                cases.append({"input": _stdio(value), "output": _stdio(expected)})
            else:
                cases.append({"input": _plain(value), "output": _plain(expected, tuples=True)})
        size = len(json.dumps(cases, ensure_ascii=False).encode())
    except (ValueError, RecursionError):                  # lone surrogates, integers of thousands of digits
        raise Drop("tests do not fit JSON") from None
    if size > MAX_TEST_BYTES:
        raise Drop("tests too large")
    return {"domain": "code", "prompt": without_instruction(prompt), "truth": {
        "kind": "function" if tests.fn_name else "stdio", "fn_name": tests.fn_name, "tests": cases,
        "checker": "json" if tests.fn_name else "decimal",                     # as the usual judges compare
        "time_limit_s": TIME_LIMIT_S, "memory_limit_mb": MEMORY_LIMIT_MB}}


def _stdio(value):
    """A text, also of a list of lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise Drop("stdin or stdout is no text")
    return value


def _plain(value, tuples=False):
    """A value that JSON keeps as it is. tuples: which may become lists."""
    if isinstance(value, list) or tuples and isinstance(value, tuple):
        return [_plain(item, tuples) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, tuples) for key, item in value.items()}
    if isinstance(value, float) and math.isfinite(value):
        return value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise Drop("tests do not fit JSON")


# -- tests as they are published ---------------------------------------------------------------------------

def published_tests(tests):
    """Tests of {"inputs", "outputs", "fn_name"?} (APPS, TACO) or of a list of {"type", "fn_name", "input",
    "output"} (PrimeIntellect)."""
    return _paired_tests(tests) if isinstance(tests, dict) else _listed_tests(tests)


def _paired_tests(tests):
    inputs, outputs, name = tests.get("inputs"), tests.get("outputs"), tests.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise Drop("inputs and outputs do not pair")
    pairs = list(zip(inputs, outputs, strict=True))
    return Tests(called(pairs), _identifier(name)) if name else Tests(pairs, None)


def _listed_tests(tests):
    if not all(isinstance(test, dict) and "input" in test and "output" in test for test in tests):
        raise Drop("tests are no list of input and output")
    kinds = [(test.get("type"), test.get("fn_name") or None) for test in tests]
    kind, name = kinds[0] if kinds else ("stdin_stdout", None)
    is_known = kind in ("stdin_stdout", "function_call")
    if not is_known or any(test_kind != kinds[0] for test_kind in kinds):
        raise Drop("tests of several or unknown kinds")
    pairs = [(test["input"], test["output"]) for test in tests]
    return Tests(called(pairs), _identifier(name)) if kind == "function_call" else Tests(pairs, None)


def called(pairs):
    """Function tests as (list of arguments, value). An input is that list, or a text of one JSON value a
    line (its output then JSON too). Outputs that are all lists of one element are unwrapped: APPS wraps
    them."""
    if any(isinstance(arguments, str) for arguments, _ in pairs):
        try:
            return [(_json_lines(arguments), json.loads(value)) for arguments, value in pairs]
        except (AttributeError, TypeError, ValueError, RecursionError):
            raise Drop("inputs are no JSON lines") from None
    if not all(isinstance(arguments, list) for arguments, _ in pairs):
        raise Drop("inputs are no arguments")
    is_wrapped = all(isinstance(value, list) and len(value) == 1 for _, value in pairs)
    return [(arguments, value[0]) for arguments, value in pairs] if is_wrapped else pairs


def _json_lines(text):
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _identifier(name):
    if not isinstance(name, str) or not name.isidentifier():
        raise Drop("no function name")
    return name


def asserted_tests(sources, name=None):
    """Tests of texts of `assert f(literals) == literal`, one f in all; name: what f stands for. A harness
    `def check(candidate)` is its body. Drop for anything else, keyword arguments too. Nothing is run."""
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise Drop("tests are no list of texts")
    names, pairs = set(), []
    try:
        for node in _statements(sources):
            call, (equal,), (value,) = node.test.left, node.test.ops, node.test.comparators
            if not isinstance(node, ast.Assert) or not isinstance(equal, ast.Eq) or call.keywords:
                raise Drop("tests are no plain calls")
            names.add(call.func.id)
            arguments = [ast.literal_eval(argument) for argument in call.args]
            pairs.append((arguments, ast.literal_eval(value)))
    # AttributeError: a node is not of that form
    except (AttributeError, ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise Drop("tests are no plain calls") from None
    if len(names) > 1:
        raise Drop("tests call several functions")
    return Tests(pairs, name or next(iter(names), None))


def _statements(sources):
    """The syntax trees of the statements of texts; of a lone `def check`, those of its body."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                   # the parser's, on others' code
        nodes = [node for source in sources for node in ast.parse(source.strip()).body]
    if len(nodes) == 1 and isinstance(nodes[0], ast.FunctionDef) and nodes[0].name == "check":
        return nodes[0].body
    return nodes


# -- a row to its record: one function a data set ----------------------------------------------------------

def deepscaler(row):
    return math_record(text_of(row, "problem"), text_of(row, "answer"))


def intellect2(row):
    """Its math alone: the paper lists the set under math."""
    if row.get("task_type") != "verifiable_math":
        raise Drop("not math")
    info = decoded(row.get("verification_info"), "verification_info")
    info = info if isinstance(info, dict) else {}
    return math_record(text_of(row, "prompt"), text_of(info, "ground_truth"))


def _skywork(row):
    """(question, ground truth decoded)"""
    messages = row.get("prompt")
    if not isinstance(messages, list):
        messages = []
    questions = [message.get("content") for message in messages
                 if isinstance(message, dict) and message.get("role") == "user"]
    if len(questions) != 1:
        raise Drop("prompt is no single question")
    reward = row.get("reward_model")
    truth = decoded(reward.get("ground_truth") if isinstance(reward, dict) else None, "ground_truth")
    return text_of({"question": questions[0]}, "question"), truth


def skywork_math(row):
    """Its list of answers has to be one answer: whether several would all or any be wanted, no row says."""
    question, answers = _skywork(row)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise Drop("answers are no list of texts")
    if len({answer.strip() for answer in answers}) > 1:
        raise Drop("several answers")
    return math_record(question, answers[0] if answers else "")


def skywork_code(row):
    question, truth = _skywork(row)
    truth = {key: value for key, value in truth.items() if value} if isinstance(truth, dict) else {}
    if not truth:                                         # unused keys are null
        raise Drop("no tests")
    if "test_code" in truth:                              # entry_point: Solution().twoSum
        name = _identifier(str(truth.get("entry_point", "")).rpartition(".")[2])
        return code_record(question, asserted_tests([truth["test_code"]], name))
    if "assert_case" in truth:
        return code_record(question, asserted_tests(truth["assert_case"]))
    return code_record(question, published_tests(truth))


def deepcoder(row):
    question = text_of(row, "problem")
    return code_record(question, published_tests(decoded(row.get("tests"), "tests")))


def opencodeinstruct(row):
    """Ours: only where the set's own solution passes all its tests, which a model wrote."""
    if number_of(row, "average_test_score") < 1:
        raise Drop("its own solution fails a test")
    question = text_of(row, "input")
    return code_record(question, asserted_tests(decoded(row.get("unit_tests"), "unit_tests")))


OPTION = re.compile(r"^[ \t]*\(?([A-J])[).:][ \t]*\S|(?<![\w(])\(?([A-J])\)[ \t]+\S", re.M)

BOXED_LETTER = re.compile(r"\\boxed\s*\{\s*(?:\\[a-z]+\s*\{)?\s*\(?([A-J])\)?[.:]?\s*\}")


def nemotron_stem(row):
    r"""A question with its options A, B, ... and the letter of the answer's last \boxed{}: there is no column
    of it. The answers are a model's; a question whose answers differ is dropped as a conflict."""
    turns = turns_of(row)
    if [role for role, _ in turns] != ["user", "assistant"]:
        raise Drop("not one question and one answer")
    (_, question), (_, response) = turns
    question = without_instruction(question)
    present = {line_start or inline for line_start, inline in OPTION.findall(question)}
    options = 0                                           # how many of A, B, C, ... are there without a gap
    while chr(65 + options) in present:
        options += 1
    if options < 2:
        raise Drop("no lettered options")
    answer = response.rpartition("</think>")[2]
    match = BOXED_LETTER.match(answer, max(answer.rfind("\\boxed"), 0))
    if not match:
        raise Drop("answer is no boxed letter")
    if ord(match[1]) >= 65 + options:
        raise Drop("answer is none of the options")
    return {"domain": "science", "prompt": question, "truth": match[1]}


# -- the registries ----------------------------------------------------------------------------------------

def _deepcoder(folder, gb):
    return Part("agentica-org/DeepCoder-Preview-Dataset", f"{folder}/train-*.parquet", ("problem", "tests"),
                deepcoder, "177913a7bd43791646ef6a43645caa3c871ab3db", "mit", gb=gb)


def _skywork_part(kind, read):
    return Part("Skywork/Skywork-OR1-RL-Data", f"data/{kind}-*.parquet", ("prompt", "reward_model"), read,
                "1cdedc52e0e2db85fdf252f9be682e63a5a38c33")


# The paper's seven (appendix 15); of a problem in several, the first one's row stays. Left out of DeepCoder:
# lcbv5 and codeforces, which are problems of LiveCodeBench and of the Codeforces benchmark.
RL = {
    "deepscaler": Part("agentica-org/DeepScaleR-Preview-Dataset", "deepscaler.json", ("problem", "answer"),
                       deepscaler, "b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29", "mit"),
    "intellect2": Part("PrimeIntellect/INTELLECT-2-RL-Dataset", "data/train-*.parquet",
                       ("task_type", "prompt", "verification_info"), intellect2, gb=1.8,
                       aliases=("PrimeIntellect/Intellect-2-RL-Dataset",)),
    "skywork-math": _skywork_part("math", skywork_math),
    "nemotron-stem": Part("nvidia/Nemotron-Post-Training-Dataset-v1", "data/stem-*.parquet", ("messages",),
                          nemotron_stem, **NEMOTRON),
    "deepcoder-primeintellect": _deepcoder("primeintellect", 1.2),
    "deepcoder-taco": _deepcoder("taco", 0.9),
    "skywork-code": _skywork_part("code", skywork_code),
    "opencodeinstruct": Part("nvidia/OpenCodeInstruct", "data/train-*.parquet",
                             ("input", "unit_tests", "average_test_score"), opencodeinstruct,
                             "8f3ba5bafe4d6e8db46082cf7ae6741bc370604d", "cc-by-4.0", gb=6.9),
}


def _benchmark(repo, files, column, revision="main", **fields):
    return Part(repo, files, (column,), partial(text_of, column=column), revision, **fields)


BENCHMARKS = {                                            # a row to the problem's text
    "math-500": _benchmark("HuggingFaceH4/MATH-500", "test.jsonl", "problem",
                           "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"),
    "aime-2024": _benchmark("HuggingFaceH4/aime_2024", "data/train-*.parquet", "problem"),
    "aime-2025": _benchmark("math-ai/aime25", "test.jsonl", "problem",
                            "563bb8404243c5f09de6ec262f2db674fe5bce9b"),
    "livecodebench": _benchmark("livecodebench/code_generation_lite", "test*.jsonl", "question_content",
                                "0fe84c3912ea0c4d4a78037083943e8f0c4dd505", licence="cc", gb=4),
    "codeforces": _benchmark("open-r1/codeforces", "data/test-*.parquet", "description",
                             "fbe3f6e903ee854eec2e69e9d96d0306cde59baf", licence="cc-by-4.0"),
    "gpqa-diamond": _benchmark("Idavidrein/gpqa", "gpqa_diamond.csv", "Question",    # last: it may be refused
                               "633f5ee89ab8ad4522a9f850766b73f62147ffdd", licence="cc-by-4.0", gated=True),
}

TEXT_COLUMNS = ("problem", "Problem", "question", "Question", "question_content", "description", "text")


class _FirstFiles:
    """A hub that lists of a data set only the first `count` files of the shuffled order, 0 = all."""

    def __init__(self, hub, count, seed):
        self.hub, self.count, self.seed = hub, count, seed
        self.folder, self.fetch = hub.folder, hub.fetch

    def list(self, part):
        listing = self.hub.list(part)
        files = shuffled(listing.files, self.seed, listing.repo)
        return listing._replace(files=files[:self.count or None])


def get_prompts(raw: str = "data/raw", hub: str = "", seed: int = 1, stem_files: int = 4):
    """Downloads the sets of RL and the benchmarks that they are held apart from.

    Args:
        raw: folder of the downloads
        hub: another hub by its URL, or a folder with copies of data sets
        seed: of the order of files
        stem_files: files of Nemotron's stem (20.7M rows, 330 GB unpacked), 0 = all; four should hold the
            paper's 100,000 questions
    """
    whole_hub = Hub(hub)
    for name, part in (RL | BENCHMARKS).items():
        part_hub = _FirstFiles(whole_hub, stem_files, seed) if name == "nemotron-stem" else whole_hub
        get_part(part_hub, name, part, None, raw, seed)


def _files(raw, name, part):
    try:
        return raw_files(raw, name, part)
    except InputError as e:
        raise InputError(f"{str(e).partition('; run')[0]}; run `{GET} --raw={raw}`") from None


# -- benchmarks --------------------------------------------------------------------------------------------

def _text_of_any(row):
    """The problem of a row of your own benchmark: in the first of TEXT_COLUMNS that it has."""
    return text_of(row, next((column for column in TEXT_COLUMNS if column in row), "text"))


def read_benchmarks(raw, benchmarks=""):
    """{name: texts}, "" where a row has none. benchmarks: "" = BENCHMARKS under raw; a folder = its .jsonl
    files, the text in one of TEXT_COLUMNS; "none" = {}. InputError where one is missing or has no text."""
    if benchmarks == "none":
        return {}
    if benchmarks:
        files = sorted(glob.glob(os.path.join(glob.escape(benchmarks), "*.jsonl")))
        if not files:
            raise InputError(f"--benchmarks={benchmarks} has no .jsonl file; give a folder of some, or none")
        return {os.path.basename(file)[:-6]: _problems([file], None, _text_of_any) for file in files}
    files = {}
    for name, part in BENCHMARKS.items():
        try:
            files[name] = _files(raw, name, part)
        except InputError as e:
            hint = " (gated: accept its terms on the hub)" if part.gated else ""
            raise InputError(f"--benchmarks: {e}{hint}; or give --benchmarks=folder of .jsonl files, or none"
                             ) from None
    return {name: _problems(files[name], part.columns, part.read) for name, part in BENCHMARKS.items()}


def _problems(files, columns, read):
    """The texts of a benchmark's rows, "" where a row has none; InputError where no row has one."""
    texts = []
    for file in files:
        for _, row in read_rows(file, columns):
            try:
                texts.append(read(row or {}))
            except Drop:
                texts.append("")
    if not any(texts):
        raise InputError(f"--benchmarks: {files[0]} has no text in {' or '.join(columns or TEXT_COLUMNS)}; "
                         f"get it again, or remove it")
    return texts


# -- one record a prompt -----------------------------------------------------------------------------------

def identity(domain, prompt):
    """The id of a prompt, 16 hex digits; case and whitespace do not count."""
    return f"{shuffle_key(domain, ' '.join(prompt.lower().split())):016x}"


def conflicting(domain, truths):
    r"""Whether truths of one prompt cannot all be right. Code: other functions, or another output of the same
    input. Math: different beyond spacing, \left, \right, $, and \dfrac for \frac."""
    if domain != "code":
        plain = [re.sub(r"\s|\\[,!;]|\\left\b|\\right\b|\$|\.$", "", truth) for truth in truths]
        return len({re.sub(r"\\[dt]frac", r"\\frac", truth) for truth in plain}) > 1
    if len({(truth["kind"], truth["fn_name"]) for truth in truths}) > 1:
        return True
    outputs = {}
    for truth in truths:
        for test in truth["tests"]:
            if outputs.setdefault(json.dumps(test["input"]), test["output"]) != test["output"]:
                return True
    return False


def encode_prompt(tokenizer, prompt):
    """The ids a response follows: as in mid-training, the question and a line break (paper, section 3)."""
    return [*tokenizer.bos_ids, *tokenizer.encode(prompt.rstrip("\n") + "\n")]


def toy_prompts(split, count, domains):
    """Those of the embedded world's first `count` problems of each domain that differ."""
    for domain in domains:
        first = {}                                        # by prompt
        for i in range(count):
            problem = world.problem(domain, split, i)
            first.setdefault(problem.prompt, (i, problem))
        for i, problem in first.values():
            yield {"id": f"{domain}-{split}-{i}", "domain": domain, "prompt": problem.prompt,
                   "truth": problem.truth}


NEEDED = ("id", "domain", "prompt", "truth")


def records_of(path, flag):
    """(line number, record) of a file of prompts; InputError names a line that is none."""
    for n, _, record in read_jsonl(path, flag):
        missing = [key for key in NEEDED if record.get(key) in (None, "")]
        if missing:
            raise InputError(f"--{flag}: {path}, line {n} lacks {', '.join(missing)}; a record needs "
                             f"{', '.join(NEEDED)} (python data.py prompts writes them)")
        if not isinstance(record["id"], str | int) or not isinstance(record["prompt"], str):
            raise InputError(f"--{flag}: {path}, line {n}: id is {record['id']!r:.40}, prompt is "
                             f"{record['prompt']!r:.40}: an id is a text or a whole number, a prompt a text")
        yield n, record


def quotas(available, limit):
    """{name: how many to take}: `limit` in all (0 = everything), small ones whole, large ones evenly. The
    paper gives the sum alone; a plain draw of code would be 99 % OpenCodeInstruct."""
    left = limit or sum(available.values())
    taken = {}
    smallest_first = sorted(available, key=lambda name: (available[name], name))
    for i, name in enumerate(smallest_first):
        share = left // (len(available) - i) if limit else left
        taken[name] = min(available[name], share)
        left -= taken[name]
    return taken


class Spool:
    """Records on disk until it is known which ones stay; about 100 bytes of each in memory. A record goes by
    its number, in the order of add()."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "w+b")
        self.ids, self.offsets = array("Q"), array("Q")
        self.origins, self.domains = array("B"), array("B")                    # numbers in RL and DOMAINS

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):                # a full disk, once again
            self.file.close()
        os.remove(self.path)

    def add(self, record, origin):
        self.ids.append(int(record["id"], 16))
        self.offsets.append(self.file.tell())
        self.origins.append(origin)
        self.domains.append(DOMAINS.index(record["domain"]))
        self.file.write(json.dumps(record).encode() + b"\n")

    def line(self, i):
        self.file.seek(self.offsets[i])
        return self.file.readline().decode()

    def record(self, i):
        return json.loads(self.line(i))

    def per_source(self, records):
        """How many of the records come from each source: Counter."""
        names = list(RL)
        return Counter(names[self.origins[i]] for i in records)

    def groups(self):
        """The records of each prompt, as lists: the first source's first, then by line."""
        by_id = np.argsort(np.array(self.ids, dtype=np.uint64), kind="stable").tolist()
        for _, group in groupby(by_id, key=self.ids.__getitem__):
            group = list(group)
            if len(group) > 1:
                group.sort(key=lambda i: (self.origins[i], self.line(i)))
            yield group

    def draw(self, kept, limits, seed):
        """The limits' share of the records `kept`, in the order of the seeded shuffle."""
        left = []                                         # of each domain: {origin: how many to take yet}
        for number, domain in enumerate(DOMAINS):
            available = Counter(self.origins[i] for i in kept if self.domains[i] == number)
            left.append(quotas(available, limits[domain]))
        drawn = []
        for i in sorted(kept, key=lambda i: shuffle_key(seed, self.ids[i])):
            domain, origin = self.domains[i], self.origins[i]
            if left[domain][origin]:
                left[domain][origin] -= 1
                drawn.append(i)
        return drawn

    def hold_out(self, drawn, share, seed):
        """(held-out, train) of the records `drawn`: no prompt of one shares a gram with one of the other. A
        candidate with a phrase that 3 candidates share stays in train, else a form of words ("write a
        function that takes a list of integers and ...") would take much of train away."""
        candidates = {}                                   # {record: its grams}
        for i in drawn:
            if shuffle_key(seed, "heldout", self.ids[i]) < share * 2 ** 64:
                candidates[i] = grams(self.record(i)["prompt"])
        counts = Counter(gram for prompt_grams in candidates.values() for gram in prompt_grams)
        phrases = {gram for gram, count in counts.items() if count >= BOILERPLATE}
        held = [i for i, prompt_grams in candidates.items() if not prompt_grams & phrases]
        apart = set().union(*(candidates[i] for i in held))
        train, held_set = [], set(held)
        for i in drawn:
            if i in held_set:
                continue
            if not apart or not apart & grams(self.record(i)["prompt"]):
                train.append(i)
        return held, train


# What became of the rows of a source, in the order in which report.json and the table have it.
COUNTS = ("rows", "contaminated", "conflict", "duplicate", "not drawn", "overlap", "train", "heldout")


def prepare(raw, out, benchmarks="", heldout=0.01, seed=1, limits=LIMITS):
    """RL under raw to out/train.jsonl, heldout.jsonl and report.json; returns the report. The order of the
    rows in the files changes nothing.

    Rows to records, without those that share a gram with a benchmark; one record a prompt; `limits` drawn a
    domain (0 = all); of these a share `heldout` held out; the rest is train, without what overlaps with it.
    """
    if not 0 <= heldout < 1:
        raise InputError(f"--heldout={heldout}: give a share from 0 to below 1")
    index, against = index_of(read_benchmarks(raw, benchmarks))
    files = {name: _files(raw, name, part) for name, part in RL.items()}
    reading = Reading(against)
    try:
        os.makedirs(out, exist_ok=True)
        spool = Spool(os.path.join(out, "spool.tmp"))
    except OSError as e:
        raise InputError(f"--out={out}: cannot write there ({e.strerror}); give another --out") from None
    try:
        with spool:
            reading.read(files, index, spool)
            kept, duplicates, conflicts = one_a_prompt(spool)
            drawn = spool.draw(kept, limits, seed)
            held, train = spool.hold_out(drawn, heldout, seed)
            for name, records in (("heldout", held), ("train", train)):
                with appearing(os.path.join(out, f"{name}.jsonl")) as f:
                    f.writelines(map(spool.line, records))
    except OSError as e:                                  # those of the raw files are InputErrors already
        raise InputError(f"--out={out}: cannot write there ({e.strerror}); make room and run the command "
                         f"again") from None
    counts = {"rows": reading.rows, "contaminated": reading.contaminated,
              "conflict": spool.per_source(conflicts), "duplicate": spool.per_source(duplicates),
              "not drawn": spool.per_source(kept) - spool.per_source(drawn),
              "overlap": spool.per_source(drawn) - spool.per_source(train) - spool.per_source(held),
              "train": spool.per_source(train), "heldout": spool.per_source(held)}
    sources = {}
    for name in RL:
        dropped = dict(sorted(reading.dropped[name].items()))
        sources[name] = {title: counts[title][name] for title in COUNTS} | {"dropped": dropped}
    revisions = {}
    for name in RL if benchmarks else [*RL, *against]:
        lock = read_lock(os.path.join(raw, name))
        revisions[name] = lock["revision"] if lock else "put there by hand"
    report = {"seed": seed, "heldout": heldout, "limits": limits, "revisions": revisions, "sources": sources,
              "benchmarks": against or "none: not held apart from any benchmark",
              "contaminated": {name: sorted(ids) for name, ids in reading.hits.items()}}
    write_atomic(os.path.join(out, "report.json"), json.dumps(report, indent=1) + "\n")
    return report


class Reading:
    """Rows to records, and the counts of those that become none."""

    def __init__(self, against):
        """against: names of the benchmarks."""
        self.rows, self.contaminated = Counter(), Counter()                    # by source
        self.dropped = {name: Counter() for name in RL}                        # by source, then reason
        self.hits = {name: set() for name in against}                          # ids, by benchmark

    def read(self, files, index, spool):
        """Puts the records of all rows that share no gram with a benchmark into the spool."""
        from tqdm import tqdm
        names = list(RL)
        tasks = [(name, file) for name in names for file in files[name]]
        for name, file in tqdm(tasks, "reading", unit="file", disable=None):
            for _, row in read_rows(file, RL[name].columns):
                self.rows[name] += 1
                try:
                    record = self.record_of(name, row)
                except Drop as reason:
                    self.dropped[name][str(reason)] += 1
                    continue
                is_contaminated, benchmark = contaminated(record["prompt"], index)
                if is_contaminated:
                    self.contaminated[name] += 1
                    self.hits[benchmark].add(record["id"])
                else:
                    spool.add(record, names.index(name))

    def record_of(self, name, row):
        if row is None:
            raise Drop("row is no JSON object")
        record = RL[name].read(row)
        return {"id": identity(record["domain"], record["prompt"]), **record, "source": name}


def one_a_prompt(spool):
    """(kept, duplicates, conflicts): lists of records. Of a prompt that comes several times the first
    source's is kept, unless the answers cannot all be right: then none is."""
    kept, duplicates, conflicts = [], [], []
    for group in spool.groups():
        if len(group) > 1:
            truths = [spool.record(i)["truth"] for i in group]
            if conflicting(DOMAINS[spool.domains[group[0]]], truths):
                conflicts += group
                continue
        kept.append(group[0])
        duplicates += group[1:]
    return kept, duplicates, conflicts


# -- difficulty mixes --------------------------------------------------------------------------------------

# Ours, the paper prints none: where the question stands, and how the letter is asked for.
SCIENCE_TEMPLATES = (
    "{question}\n\nGive the letter of the correct option in \\boxed{}.",
    "{question}\n\nWhich option is right? End with its letter alone inside \\boxed{}.",
    "{question}\n\nReason first, then finish with one line of the form \"Answer: X\", X being a letter.",
    "{question}\n\nExactly one option is correct. Finish your reply with \"Answer: \" and its letter.",
    "{question}\n\nWork it out, choose one option, and box its letter: \\boxed{X}.",
    "Choose the correct option of this question and write its letter in \\boxed{}.\n\n{question}",
    "Below is a multiple-choice question. Put only the letter of your choice into \\boxed{}.\n\n{question}",
    "Solve this. Your last line has to read \"Answer: X\", X the letter of your option.\n\n{question}",
    "Question:\n{question}\n\nGive your reasoning and, on a line of its own, \"Answer: X\" for option X.",
    "Answer this with one of its options.\n\n{question}\n\nState the option's letter within \\boxed{}.",
)


def read_verdicts(path, samples=16):
    """{id: how many samples are right} of lines {"id", "verdicts": [true or false, `samples` of them], ...}.
    A line that comes twice counts once. InputError names the line."""
    seen = {}
    for n, _, line in read_jsonl(path, "verdicts"):
        name, verdicts = line.get("id"), line.get("verdicts")
        where = f"--verdicts: {path}, line {n}"
        if not isinstance(name, str):
            raise InputError(f'{where} has no "id"; give the id of a prompt, a text')
        if not isinstance(verdicts, list) or not all(isinstance(v, bool) for v in verdicts):
            raise InputError(f"{where}: the verdicts of {name} are not all true or false; write one a sample")
        if len(verdicts) != samples:
            raise InputError(f"{where}: {name} has {len(verdicts)} verdicts, not {samples}; judge {samples} "
                             f"samples a prompt, or give --samples={len(verdicts)}")
        if seen.setdefault(name, verdicts) != verdicts:
            raise InputError(f"{where}: {name} was judged before, with other verdicts; keep one of the lines")
    return {name: sum(verdicts) for name, verdicts in seen.items()}


def mixes(records, passes, kind, domains, seed, each=19_000):
    """The records of one RL mix in a seeded order, with "passes" added (paper, section 9 and appendix 15).

    unbalanced: math with exactly 1 right sample, code and science with at least 1. balanced: `each` of these
    a domain, drawn where there are more; code and science filled up with prompts of no right sample, as far
    as there are; science prompts in one of SCIENCE_TEMPLATES. domains: "MC" or "MCS". Records without
    verdicts are left out. InputError for another kind or domains.
    """
    known = {"kind": ("unbalanced", "balanced"), "domains": ("MC", "MCS")}
    for flag, value in (("kind", kind), ("domains", domains)):
        if value not in known[flag]:
            raise InputError(f"--{flag}={value!r} is unknown{did_you_mean(value, known[flag])} (known: "
                             f"{', '.join(known[flag])})")

    def order(record):
        return shuffle_key(seed, "mix", record["id"])

    judged = [{**record, "passes": passes[record["id"]]} for record in records if record["id"] in passes]
    judged.sort(key=order)
    chosen = []
    for domain in DOMAINS[:len(domains)]:
        in_domain = [record for record in judged if record["domain"] == domain]
        if domain == "math":
            fitting, fillers = [record for record in in_domain if record["passes"] == 1], []
        else:
            fitting = [record for record in in_domain if record["passes"] > 0]
            fillers = [record for record in in_domain if record["passes"] == 0]
        if kind == "balanced":
            fitting = (fitting + fillers)[:each]
        if kind == "balanced" and domain == "science":
            fitting = [in_template(record, seed) for record in fitting]
        chosen += fitting
    return sorted(chosen, key=order)


def in_template(record, seed):
    """A science record with its prompt in one of SCIENCE_TEMPLATES, drawn by its id."""
    template = SCIENCE_TEMPLATES[shuffle_key(seed, "template", record["id"]) % len(SCIENCE_TEMPLATES)]
    return {**record, "prompt": template.replace("{question}", record["prompt"])}


# -- commands ----------------------------------------------------------------------------------------------

def prompts(raw: str = "data/raw", out: str = "data/prompts", benchmarks: str = "", heldout: float = 0.01,
            limit: bool = True, seed: int = 1):
    """The prompts of RL: train.jsonl, heldout.jsonl and report.json, apart from the benchmarks.

    Args:
        raw: the folder of the downloads
        out: the folder to write
        benchmarks: a folder of .jsonl files to hold apart from, none, or by default the downloaded six
        heldout: share held out
        limit: draw the paper's 294,000 math, 100,000 science and 142,000 code prompts; False = all
        seed: of the draws
    """
    limits = LIMITS if limit else dict.fromkeys(LIMITS, 0)
    report = prepare(raw, out, benchmarks, heldout, seed, limits)
    print(f"{'':25s}" + "".join(f"{title:>13s}" for title in (*COUNTS, "dropped")))
    for name, source in report["sources"].items():
        numbers = [*(source[title] for title in COUNTS), sum(source["dropped"].values())]
        print(f"{name:25s}" + "".join(f"{n:13,d}" for n in numbers))
        for reason, n in sorted(source["dropped"].items(), key=lambda item: (-item[1], item[0])):
            print(f"{n:18,d}  {reason}")
    for name, ids in report["contaminated"].items():
        print(f"{name}: {len(ids):,} prompts left out ({report['benchmarks'][name]})")
    if benchmarks == "none":
        print("warning: --benchmarks=none: these prompts are not held apart from any benchmark")


def mix(prompts: str = "data/prompts", verdicts: str = "verdicts.jsonl", out: str = "data/mix.jsonl",
        kind: str = "unbalanced", domains: str = "MCS", seed: int = 1, each: int = 19_000, samples: int = 16):
    """An RL mix by difficulty: by how many samples of a prompt are right.

    Args:
        prompts: the folder of train.jsonl
        verdicts: a .jsonl of {"id", "verdicts": [true, false, ...]}
        out: the .jsonl to write
        kind: unbalanced or balanced
        domains: MC (math, code) or MCS (and science)
        seed: of the draws, the order and the templates
        each: prompts a domain of the balanced mix
        samples: verdicts a prompt
    """
    passes = read_verdicts(verdicts, samples)
    path = os.path.join(prompts, "train.jsonl")
    if os.path.exists(os.path.join(prompts, "spool.tmp")):
        raise InputError(f"--prompts={prompts}: the call that wrote it did not end, its files may not go "
                         f"together; run `python data.py prompts --out={prompts}` again")
    # A truth can be a megabyte of tests: its place in the file stands for it until it is written.
    light = []
    for n, offset, record in read_jsonl(path, "prompts"):
        if not set(NEEDED) <= record.keys():
            raise InputError(f"--prompts: {path}, line {n} is no record of id, domain, prompt and truth")
        light.append({**record, "truth": offset})
    judged = sum(record["id"] in passes for record in light)
    chosen = mixes(light, passes, kind, domains, seed, each)
    if not chosen:
        raise InputError(f"--verdicts={verdicts}: the mix is empty ({judged:,} of the {len(light):,} prompts "
                         f"of {path} were judged); judge more of them, with a model that solves some")
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    with open(path, "rb") as f, appearing(out) as target:
        for record in chosen:
            f.seek(record["truth"])
            truth = json.loads(f.readline())["truth"]
            target.write(json.dumps({**record, "truth": truth}) + "\n")
    print(f"{out}: {len(chosen):,} prompts ({judged:,} of {len(light):,} were judged)")
    print(f"  {'right':10s}" + "".join(f"{k:>7d}" for k in range(samples + 1)) + f"{'all':>8s}")
    for domain in DOMAINS[:len(domains)]:
        counts = Counter(record["passes"] for record in chosen if record["domain"] == domain)
        numbers = "".join(f"{counts[k]:7,d}" for k in range(samples + 1))
        is_short = kind == "balanced" and counts.total() < each
        note = f"  (fewer than --each={each:,}: all there are)" if is_short else ""
        print(f"  {domain:10s}{numbers}{counts.total():8,d}{note}")
