"""corpus.prompts"""

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
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from cli import InputError, appearing, did_you_mean, read_jsonl, write_atomic
from corpus import world
from corpus.files import read_rows
from corpus.formats import Drop, number_of, text_of, turns_of
from corpus.hashes import shuffle_key
from corpus.hub import Hub, get_part, raw_files, read_lock, shuffled
from corpus.overlap import BOILERPLATE, contaminated, grams, index_of
from corpus.registry import NEMOTRON, Part

GET = "python data.py get_prompts"

DOMAINS = ("math", "code", "science")

LIMITS = {"math": 294_000, "science": 100_000, "code": 142_000}                # paper, appendix 15

MAX_TEST_BYTES = 1 << 20                                  # of a prompt's tests as JSON; ours

TIME_LIMIT_S, MEMORY_LIMIT_MB = 6, 1024                   # of a test; ours, the sets state none


# -- a row to its record -----------------------------------------------------------------------------------

def decoded(value, what):
    """The list or dict of a JSON text, also one encoded twice or written as a Python literal, else Drop."""
    for _ in range(2):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                try:
                    value = ast.literal_eval(value.strip())
                except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                    raise Drop(f"{what} is no JSON") from None
    if not isinstance(value, (list, dict)):
        raise Drop(f"{what} is null" if value is None else f"{what} is no JSON")
    return value

INSTRUCTION = re.compile(r"(?:(?<=[.?!$:)])\s+|\n\s*)(?:Let's|Please)\b[^\n.?!]{0,200}\\boxed[^\n]*$")


def problem(prompt):
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


def of_math(prompt, answer):
    for wrapped in (r"\$+([^$]+)\$+", r"\\boxed\s*\{(.*)\}", r"\$+([^$]+)\$+"):
        match = re.fullmatch(wrapped, answer.strip(), re.S)
        answer = match[1] if match else answer
    if not answer.strip() or "\\boxed" in answer:
        raise Drop("answer is of several boxes" if answer.strip() else "answer is empty")
    return {"domain": "math", "prompt": problem(prompt), "truth": answer.strip()}


def of_code(prompt, pairs, fn_name=None):
    """pairs: (stdin, stdout), or with fn_name (list of arguments, value). Drop where JSON would change them:
    a tuple among the arguments would arrive as a list, which does not hash."""
    if not pairs:
        raise Drop("no tests")
    try:
        tests = [{"input": _stdio(a), "output": _stdio(b)} if fn_name is None else
                 {"input": _exact(a), "output": _exact(b, tuples=True)} for a, b in pairs]
        size = len(json.dumps(tests, ensure_ascii=False).encode())
    except (ValueError, RecursionError):                  # lone surrogates, integers of thousands of digits
        raise Drop("tests do not fit JSON") from None
    if size > MAX_TEST_BYTES:
        raise Drop("tests too large")
    return {"domain": "code", "prompt": problem(prompt), "truth": {
        "kind": "function" if fn_name else "stdio", "fn_name": fn_name, "tests": tests,
        "checker": "json" if fn_name else "decimal",      # as LiveCodeBench compares
        "time_limit_s": TIME_LIMIT_S, "memory_limit_mb": MEMORY_LIMIT_MB}}


def _stdio(value):
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise Drop("stdin or stdout is no text")
    return value


def _exact(value, tuples=False):
    if isinstance(value, list) or tuples and isinstance(value, tuple):
        return [_exact(x, tuples) for x in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: _exact(x, tuples) for k, x in value.items()}
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float)
                                                                and math.isfinite(value)):
        return value
    raise Drop("tests do not fit JSON")


def published(tests):
    """(pairs, fn_name or None) of {"inputs", "outputs", "fn_name"?} (APPS, TACO) or of a list of {"type",
    "fn_name", "input", "output"} (PrimeIntellect)."""
    if isinstance(tests, dict):
        inputs, outputs, fn_name = tests.get("inputs"), tests.get("outputs"), tests.get("fn_name")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise Drop("inputs and outputs do not pair")
        pairs, function = list(zip(inputs, outputs, strict=True)), bool(fn_name)
    else:
        if not all(isinstance(t, dict) and "input" in t and "output" in t for t in tests):
            raise Drop("tests are no list of input and output")
        kinds = [(t.get("type"), t.get("fn_name") or None) for t in tests]
        kind, fn_name = kinds[0] if kinds else ("stdin_stdout", None)
        if any(k != kinds[0] for k in kinds) or kind not in ("stdin_stdout", "function_call"):
            raise Drop("tests of several or unknown kinds")
        pairs, function = [(t["input"], t["output"]) for t in tests], kind == "function_call"
    return (called(pairs), _name(fn_name)) if function else (pairs, None)


def called(pairs):
    """Function tests as (list of arguments, value). An input is that list, or a text of one JSON value a
    line (its output then JSON too). Outputs that are all lists of one element are unwrapped: APPS wraps
    them."""
    if any(isinstance(a, str) for a, _ in pairs):
        try:
            return [([json.loads(line) for line in a.split("\n") if line.strip()], json.loads(b))
                    for a, b in pairs]
        except (AttributeError, TypeError, ValueError, RecursionError):
            raise Drop("inputs are no JSON lines") from None
    if not all(isinstance(a, list) for a, _ in pairs):
        raise Drop("inputs are no arguments")
    wrapped = all(isinstance(b, list) and len(b) == 1 for _, b in pairs)
    return [(a, b[0]) for a, b in pairs] if wrapped else pairs


def _name(value):
    if not isinstance(value, str) or not value.isidentifier():
        raise Drop("no function name")
    return value


def asserted(sources, name=None):
    """(pairs, fn_name) of texts of `assert f(literals) == literal`, one f in all; name: what f stands for. A
    harness `def check(candidate)` is its body. Drop for anything else, keyword arguments too."""
    if not isinstance(sources, list) or not all(isinstance(s, str) for s in sources):
        raise Drop("tests are no list of texts")
    names, pairs = set(), []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")               # the parser's, on others' code
            nodes = [node for s in sources for node in ast.parse(s.strip()).body]
        if len(nodes) == 1 and isinstance(nodes[0], ast.FunctionDef) and nodes[0].name == "check":
            nodes = nodes[0].body
        for node in nodes:
            call, (equal,), (value,) = node.test.left, node.test.ops, node.test.comparators
            if not isinstance(node, ast.Assert) or not isinstance(equal, ast.Eq) or call.keywords:
                raise Drop("tests are no plain calls")
            names.add(call.func.id)
            pairs.append(([ast.literal_eval(a) for a in call.args], ast.literal_eval(value)))
    # AttributeError: a node is not of that form
    except (AttributeError, ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise Drop("tests are no plain calls") from None
    if len(names) > 1:
        raise Drop("tests call several functions")
    return pairs, name or next(iter(names), None)


def deepscaler(row):
    return of_math(text_of(row, "problem"), text_of(row, "answer"))


def intellect2(row):
    """Its math alone: the paper lists the set under math."""
    if row.get("task_type") != "verifiable_math":
        raise Drop("not math")
    info = decoded(row.get("verification_info"), "verification_info")
    return of_math(text_of(row, "prompt"), text_of(info if isinstance(info, dict) else {}, "ground_truth"))


def _skywork(row):
    """(question, ground truth decoded)"""
    asked, reward = row.get("prompt"), row.get("reward_model")
    asked = [m.get("content") for m in (asked if isinstance(asked, list) else ())
             if isinstance(m, dict) and m.get("role") == "user"]
    if len(asked) != 1:
        raise Drop("prompt is no single question")
    truth = decoded(reward.get("ground_truth") if isinstance(reward, dict) else None, "ground_truth")
    return text_of({"question": asked[0]}, "question"), truth


def skywork_math(row):
    """Its list of answers has to be one answer: whether several would all or any be wanted, no row says."""
    asked, answers = _skywork(row)
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise Drop("answers are no list of texts")
    if len({a.strip() for a in answers}) > 1:
        raise Drop("several answers")
    return of_math(asked, answers[0] if answers else "")


def skywork_code(row):
    asked, truth = _skywork(row)
    truth = {k: v for k, v in truth.items() if v} if isinstance(truth, dict) else {}    # unused keys: null
    if not truth:
        raise Drop("no tests")
    if "test_code" in truth:                              # entry_point: Solution().twoSum
        name = _name(str(truth.get("entry_point", "")).rpartition(".")[2])
        return of_code(asked, *asserted([truth["test_code"]], name))
    return of_code(asked, *(asserted(truth["assert_case"]) if "assert_case" in truth else published(truth)))


def deepcoder(row):
    return of_code(text_of(row, "problem"), *published(decoded(row.get("tests"), "tests")))


def opencodeinstruct(row):
    """Ours: only where the set's own solution passes all its tests, which a model wrote."""
    if number_of(row, "average_test_score") < 1:
        raise Drop("its own solution fails a test")
    return of_code(text_of(row, "input"), *asserted(decoded(row.get("unit_tests"), "unit_tests")))

OPTION = re.compile(r"^[ \t]*\(?([A-J])[).:][ \t]*\S|(?<![\w(])\(?([A-J])\)[ \t]+\S", re.M)

BOXED_LETTER = re.compile(r"\\boxed\s*\{\s*(?:\\[a-z]+\s*\{)?\s*\(?([A-J])\)?[.:]?\s*\}")


def stem(row):
    r"""A question with its options A, B, ... and the letter of the answer's last \boxed{}: there is no column
    of it. The answers are a model's; a question whose answers differ is dropped as a conflict."""
    said = turns_of(row)
    if [role for role, _ in said] != ["user", "assistant"]:
        raise Drop("not one question and one answer")
    asked, answer = problem(said[0][1]), said[1][1].rpartition("</think>")[2]
    there, options = {a or b for a, b in OPTION.findall(asked)}, 0
    while chr(65 + options) in there:
        options += 1
    if options < 2:
        raise Drop("no lettered options")
    match = BOXED_LETTER.match(answer, max(answer.rfind("\\boxed"), 0))
    if not match or ord(match[1]) >= 65 + options:
        raise Drop("answer is none of the options" if match else "answer is no boxed letter")
    return {"domain": "science", "prompt": asked, "truth": match[1]}


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
                          stem, **NEMOTRON),
    "deepcoder-primeintellect": _deepcoder("primeintellect", 1.2),
    "deepcoder-taco": _deepcoder("taco", 0.9),
    "skywork-code": _skywork_part("code", skywork_code),
    "opencodeinstruct": Part("nvidia/OpenCodeInstruct", "data/train-*.parquet",
                             ("input", "unit_tests", "average_test_score"), opencodeinstruct,
                             "8f3ba5bafe4d6e8db46082cf7ae6741bc370604d", "cc-by-4.0", gb=6.9),
}


def _benchmark(repo, files, column, revision="main", **more):
    return Part(repo, files, (column,), partial(text_of, column=column), revision, **more)

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


def get_prompts(raw: str = "data/raw", hub: str = "", seed: int = 1, stem_files: int = 4):
    """Downloads the sets of RL and the benchmarks that they are held apart from.

    Args:
        raw: folder of the downloads
        hub: another hub by its URL, or a folder with copies of data sets
        seed: of the order of files
        stem_files: files of Nemotron's stem (20.7M rows, 330 GB unpacked), 0 = all; four should hold the
            paper's 100,000 questions
    """
    hub = Hub(hub)

    def few(part):
        repo, revision, files = hub.list(part)
        return repo, revision, shuffled(files, seed, repo)[:stem_files or None]

    some = SimpleNamespace(folder=hub.folder, fetch=hub.fetch, list=few)
    for name, part in (RL | BENCHMARKS).items():
        get_part(some if name == "nemotron-stem" else hub, name, part, None, raw, seed)


def _files(raw, name, part):
    try:
        return raw_files(raw, name, part)
    except InputError as e:
        raise InputError(f"{str(e).partition('; run')[0]}; run `{GET} --raw={raw}`") from None


def read_benchmarks(raw, benchmarks=""):
    """{name: texts}, "" where a row has none. benchmarks: "" = BENCHMARKS under raw; a folder = its .jsonl
    files, the text in one of TEXT_COLUMNS; "none" = {}. InputError where one is missing or has no text."""
    def own(row):
        return text_of(row, next((c for c in TEXT_COLUMNS if c in row), "text"))

    jobs = {}
    if benchmarks not in ("", "none"):
        found = sorted(glob.glob(os.path.join(glob.escape(benchmarks), "*.jsonl")))
        jobs = {os.path.basename(f)[:-6]: ([f], None, own) for f in found}
        if not jobs:
            raise InputError(f"--benchmarks={benchmarks} has no .jsonl file; give a folder of some, or none")
    for name, part in BENCHMARKS.items() if not benchmarks else ():
        try:
            jobs[name] = _files(raw, name, part), part.columns, part.read
        except InputError as e:
            raise InputError(f"--benchmarks: {e}" + part.gated * " (gated: accept its terms on the hub)"
                             + "; or give --benchmarks=folder of .jsonl files, or none") from None
    result = {}
    for name, (files, columns, read) in jobs.items():
        result[name] = texts = []
        for _, row in (r for f in files for r in read_rows(f, columns)):
            try:
                texts.append(read(row or {}))
            except Drop:
                texts.append("")
        if not any(texts):
            raise InputError(f"--benchmarks: {files[0]} has no text in "
                             f"{' or '.join(columns or TEXT_COLUMNS)}; get it again, or remove it")
    return result


def identity(domain, prompt):
    """The id of a prompt, 16 hex digits; case and whitespace do not count."""
    return f"{shuffle_key(domain, ' '.join(prompt.lower().split())):016x}"


def conflicting(domain, truths):
    r"""Whether truths of one prompt cannot all be right. Code: other functions, or another output of the same
    input. Math: different beyond spacing, \left, \right, $, and \dfrac for \frac."""
    if domain == "code":
        outputs = {}
        return len({(t["kind"], t["fn_name"]) for t in truths}) > 1 or any(
            outputs.setdefault(json.dumps(test["input"]), test["output"]) != test["output"]
            for t in truths for test in t["tests"])
    plain = (re.sub(r"\s|\\[,!;]|\\left\b|\\right\b|\$|\.$", "", t) for t in truths)
    return len({re.sub(r"\\[dt]frac", r"\\frac", t) for t in plain}) > 1


def encode_prompt(tokenizer, prompt):
    """The ids a response follows: as in mid-training, the question and a line break (paper, section 3)."""
    return [*tokenizer.before, *tokenizer.encode(prompt.rstrip("\n") + "\n")]


def toy_prompts(split, count, domains):
    """Those of the embedded world's first `count` problems of each domain that differ."""
    for domain in domains:
        first = {}
        for i in range(count):
            p = world.problem(domain, split, i)
            first.setdefault(p.prompt, (i, p))
        for i, p in first.values():
            yield {"id": f"{domain}-{split}-{i}", "domain": domain, "prompt": p.prompt, "truth": p.truth}

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
    taken, left = {}, limit or sum(available.values())
    for i, name in enumerate(sorted(available, key=lambda name: (available[name], name))):
        taken[name] = min(available[name], left // (len(available) - i) if limit else left)
        left -= taken[name]
    return taken


class Spool:
    """Records on disk until it is known which ones stay; about 100 bytes of each in memory."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "w+b")
        self.ids, self.offsets, self.origins, self.domains = array("Q"), array("Q"), array("B"), array("B")

    def add(self, record, origin):
        self.ids.append(int(record["id"], 16))
        self.offsets.append(self.file.tell())
        self.origins.append(origin)
        self.domains.append(DOMAINS.index(record["domain"]))
        self.file.write(json.dumps(record).encode() + b"\n")

    def line(self, i):
        self.file.seek(self.offsets[i])
        return self.file.readline().decode()

    def groups(self):
        """The records of each prompt, as lists of numbers: the first source's first, then by line."""
        order = np.argsort(np.array(self.ids, dtype=np.uint64), kind="stable").tolist()
        for group in (list(g) for _, g in groupby(order, key=self.ids.__getitem__)):
            yield group if len(group) == 1 else sorted(group, key=lambda i: (self.origins[i], self.line(i)))

    def draw(self, kept, limits, seed):
        """The limits' share of the records `kept`, in the order of the seeded shuffle."""
        left = [quotas(Counter(self.origins[i] for i in kept if self.domains[i] == d), limits[domain])
                for d, domain in enumerate(DOMAINS)]
        drawn = []
        for i in sorted(kept, key=lambda i: shuffle_key(seed, self.ids[i])):
            if left[self.domains[i]][self.origins[i]]:
                left[self.domains[i]][self.origins[i]] -= 1
                drawn.append(i)
        return drawn

    def hold_out(self, drawn, share, seed):
        """(held-out, train) of the records `drawn`: no prompt of one shares a gram with one of the other. A
        candidate with a phrase that 3 candidates share stays in train, else a form of words ("write a
        function that takes a list of integers and ...") would take much of train away."""
        def grams_of(i):
            return grams(json.loads(self.line(i))["prompt"])

        held = {i: grams_of(i) for i in drawn if shuffle_key(seed, "heldout", self.ids[i]) < share * 2 ** 64}
        common = Counter(g for found in held.values() for g in found)
        held = {i: found for i, found in held.items() if all(common[g] < BOILERPLATE for g in found)}
        apart = set().union(*held.values())
        return list(held), [i for i in drawn if i not in held and not (apart and apart & grams_of(i))]

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
    files, names = {name: _files(raw, name, part) for name, part in RL.items()}, list(RL)
    counts, dropped = {name: Counter() for name in RL}, {name: Counter() for name in RL}
    hits = {name: set() for name in against}
    try:
        os.makedirs(out, exist_ok=True)
        spool = Spool(os.path.join(out, "spool.tmp"))
    except OSError as e:
        raise InputError(f"--out={out}: cannot write there ({e.strerror}); give another --out") from None
    try:
        for name, file in tqdm([(n, f) for n in RL for f in files[n]], "reading", unit="file", disable=None):
            for _, row in read_rows(file, RL[name].columns):
                counts[name]["rows"] += 1
                try:
                    if row is None:
                        raise Drop("row is no JSON object")
                    record = RL[name].read(row)
                except Drop as why:
                    dropped[name][str(why)] += 1
                    continue
                record = {"id": identity(record["domain"], record["prompt"]), **record, "source": name}
                bad, benchmark = contaminated(record["prompt"], index)
                if bad:
                    counts[name]["contaminated"] += 1
                    hits[benchmark].add(record["id"])
                else:
                    spool.add(record, names.index(name))
        kept, fate = [], bytearray(len(spool.ids))        # fate: index in COUNTS
        for group in spool.groups():
            truths = [json.loads(spool.line(i))["truth"] for i in group] if len(group) > 1 else []
            clash = bool(truths) and conflicting(DOMAINS[spool.domains[group[0]]], truths)
            for i in group[not clash:]:
                fate[i] = COUNTS.index("conflict" if clash else "duplicate")
            kept += group[:not clash]
        drawn = spool.draw(kept, limits, seed)
        held, train = spool.hold_out(drawn, heldout, seed)
        for what, some in (("not drawn", kept), ("overlap", drawn), ("train", train), ("heldout", held)):
            for i in some:
                fate[i] = COUNTS.index(what)              # the last one counts
        for origin, what in zip(spool.origins, fate, strict=True):
            counts[names[origin]][COUNTS[what]] += 1
        for file, some in (("heldout", held), ("train", train)):
            with appearing(os.path.join(out, f"{file}.jsonl")) as f:
                f.writelines(map(spool.line, some))
    except OSError as e:                                  # those of the raw files are InputErrors already
        raise InputError(f"--out={out}: cannot write there ({e.strerror}); make room and run the command "
                         f"again") from None
    finally:
        with contextlib.suppress(OSError):                # a full disk, once more
            spool.file.close()
        os.remove(spool.path)
    locks = {n: read_lock(os.path.join(raw, n)) for n in (*RL, *(against if not benchmarks else ()))}
    report = {"seed": seed, "heldout": heldout, "limits": limits,
              "revisions": {n: had["revision"] if had else "put there by hand" for n, had in locks.items()},
              "sources": {n: {k: counts[n][k] for k in COUNTS} | {"dropped": dict(sorted(dropped[n].items()))}
                          for n in RL},
              "benchmarks": against or "none: not held apart from any benchmark",
              "contaminated": {n: sorted(found) for n, found in hits.items()}}
    write_atomic(os.path.join(out, "report.json"), json.dumps(report, indent=1) + "\n")
    return report

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

    judged, chosen = [{**r, "passes": passes[r["id"]]} for r in records if r["id"] in passes], []
    for domain in DOMAINS[:len(domains)]:
        mine = sorted((r for r in judged if r["domain"] == domain), key=order)
        some = [r for r in mine if (r["passes"] == 1 if domain == "math" else r["passes"] > 0)]
        if kind == "balanced":
            some = (some + [r for r in mine if r["passes"] == 0 and domain != "math"])[:each]
        if kind == "balanced" and domain == "science":
            which = [shuffle_key(seed, "template", r["id"]) % len(SCIENCE_TEMPLATES) for r in some]
            some = [{**r, "prompt": SCIENCE_TEMPLATES[k].replace("{question}", r["prompt"])}
                    for k, r in zip(which, some, strict=True)]
        chosen += some
    return sorted(chosen, key=order)


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
    report = prepare(raw, out, benchmarks, heldout, seed, LIMITS if limit else dict.fromkeys(LIMITS, 0))
    print(f"{'':25s}" + "".join(f"{title:>13s}" for title in (*COUNTS, "dropped")))
    for name, found in report["sources"].items():
        line = [*(found[k] for k in COUNTS), sum(found["dropped"].values())]
        print(f"{name:25s}" + "".join(f"{n:13,d}" for n in line))
        for reason, n in sorted(found["dropped"].items(), key=lambda item: (-item[1], item[0])):
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
    passes, path = read_verdicts(verdicts, samples), os.path.join(prompts, "train.jsonl")
    if os.path.exists(os.path.join(prompts, "spool.tmp")):
        raise InputError(f"--prompts={prompts}: the call that wrote it did not end, its files may not go "
                         f"together; run `python data.py prompts --out={prompts}` again")
    # a truth can be a megabyte of tests: its place stands for it until it is written
    light = []
    for n, at, record in read_jsonl(path, "prompts"):
        if not {"id", "domain", "prompt", "truth"} <= record.keys():
            raise InputError(f"--prompts: {path}, line {n} is no record of id, domain, prompt and truth")
        light.append({**record, "truth": at})
    judged, chosen = sum(r["id"] in passes for r in light), mixes(light, passes, kind, domains, seed, each)
    if not chosen:
        raise InputError(f"--verdicts={verdicts}: the mix is empty ({judged:,} of the {len(light):,} prompts "
                         f"of {path} were judged); judge more of them, with a model that solves some")
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    with open(path, "rb") as f, appearing(out) as target:
        for record in chosen:
            f.seek(record["truth"])
            target.write(json.dumps({**record, "truth": json.loads(f.readline())["truth"]}) + "\n")
    print(f"{out}: {len(chosen):,} prompts ({judged:,} of {len(light):,} were judged)")
    print(f"  {'right':10s}" + "".join(f"{k:>7d}" for k in range(samples + 1)) + f"{'all':>8s}")
    for domain in DOMAINS[:len(domains)]:
        found = Counter(r["passes"] for r in chosen if r["domain"] == domain)
        short = kind == "balanced" and found.total() < each
        print(f"  {domain:10s}" + "".join(f"{found[k]:7,d}" for k in range(samples + 1))
              + f"{found.total():8,d}" + short * f"  (fewer than --each={each:,}: all there are)")
