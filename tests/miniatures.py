"""A hub in a folder: every data set of the registry with a few hand-made rows, in the files and columns of
the real one; and beside each row what has to become of it, written down by hand."""

import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corpus import registry, shards


def said(*turns, keys=("role", "content")):
    names = ("user", "assistant") if keys[0] == "role" else ("human", "gpt")
    return [dict(zip(keys, (names[i % 2], text), strict=True)) for i, text in enumerate(turns)]


def mot(*turns, n=9):
    return {"messages": said(*turns), "num_tokens": n, "source": "s"}


def nemotron(*turns, system=None):
    messages = [{"role": "system", "content": system}] * (system is not None) + said(*turns)
    return {"uuid": "u", "license": "cc", "generator": "g", "version": "v1", "category": "math",
            "reasoning": "on", "messages": [{**m, "tool_calls": []} for m in messages], "metadata": "{}"}


def ocr2(judgement="right", pass_rate="0.9", dataset="taco", split="train", index="1",
         answer="<think>a</think>b", question="-"):
    return {"id": "i", "question_id": "q", "question": question, "r1_generation": answer, "qwq_critique": "c",
            "solution": "s", "judgement": judgement, "pass_rate": pass_rate, "source": "src", "license": "l",
            "dataset": dataset, "split": split, "difficulty": "EASY", "index": index}


def wildchat(model, *turns, toxic=False):
    return {"conversation_hash": "h", "model": model, "conversation": [
        {**m, "language": "English", "toxic": False, "redacted": False, "turn_identifier": 1}
        for m in said(*turns)], "turn": 1, "language": "English", "toxic": toxic, "redacted": False}


def thought3(domain, *turns):
    return {"difficulty": 8, "source": "s", "domain": domain,
            "conversations": said(*turns, keys=("from", "value"))}


def dclm(text, score):
    return {"text": text, "id": "i", "url": "u", "language": "en", "language_score": 0.9,
            "edu_int_score": score, "edu_score": 2.9}


def tulu(*turns):
    return {"id": "i", "prompt": "p", "messages": said(*turns)}


CHAT = [(tulu("hello", "hi"), "User: hello\nAssistant: hi"),
        (tulu("1", "2", "3", "4"), "User: 1\nAssistant: 2\nUser: 3\nAssistant: 4"),
        (tulu("only a question"), None), (tulu("hello", ""), None), (tulu("hello", None), None),
        ({"id": "i", "prompt": "p", "messages": None}, None), (tulu(), None)]
REASONING = [("q1", "<think>t</think>a", "q1\n<think>t</think>a"), ("q1", "<think>t</think>a", "twice"),
             ("q2", "a2", "q2\na2")]
CODEX = {"input": "in", "output": "<think>t</think>out"}

# part: (file, [(row, text; None = left out; "twice" = left out as a duplicate)])
ROWS = {
    "dclm-edu": ("data/000_00000.parquet", [
        (dclm("three", 3), "three"), (dclm("five", 5), "five"), (dclm("two", 2), None),
        (dclm("no score", None), None), (dclm(None, 4), None), (dclm("  \n", 4), None),
        (dclm("three", 4), "twice"), (dclm("a</s><|end|>b", 4), "a</s><|end|>b"),
        (dclm("ü∑ 你", 3), "ü∑ 你")]),
    "wildchat": ("data/train-00000-of-00014.parquet", [
        (wildchat("gpt-4-0314", "w", "x"), "User: w\nAssistant: x"),
        (wildchat("gpt-3.5-turbo-0301", "a", "b"), None),
        (wildchat("gpt-4-1106-preview", "y", "z"), "User: y\nAssistant: z"),
        (wildchat("gpt-4-0314", "bad", "word", toxic=True), None), (wildchat(None, "a", "b"), None)]),
    "tulu3-math": ("data/train-00000-of-00002.parquet", CHAT),
    "tulu3-math-grade": ("data/train-00000-of-00001.parquet", [(tulu("g", "h"), "User: g\nAssistant: h")]),
    "tulu3-code": ("data/train-00000-of-00001.parquet", [(tulu("c", "d"), "User: c\nAssistant: d")]),
    "tulu3-algebra": ("data/train-00000-of-00001.parquet", [(tulu("e", "f"), "User: e\nAssistant: f")]),
    "tulu3-if": ("data/train-00000-of-00001.parquet", [(tulu("hello", "hi"), "twice")]),   # of another part
    "ultrachat": ("data/train_sft-00000-of-00003-a3ecf92756993583.parquet",
                  [({"prompt": "p", "prompt_id": "i", "messages": said("u", "v")}, "User: u\nAssistant: v")]),
    "megamath-web-pro": ("megamath-web-pro/000_00000.parquet", [
        ({"text": "x = 1", "url": "u"}, "x = 1"), ({"text": "", "url": "u"}, None),
        ({"text": None, "url": "u"}, None)]),
    "nemotron-math": ("data/math-00000-of-00010.parquet", [
        (nemotron("q", "<think>t</think>a"), "q\n<think>t</think>a"),
        (nemotron("q3", "a3", system=""), "q3\na3"), (nemotron("q4", "a4", system="be brief"), "q4\na4"),
        (nemotron("q"), None)]),
    "mot-math": ("math/train-00000-of-00002.parquet", [(mot(q, a), want) for q, a, want in REASONING]),
    "mot-code": ("code/train-00000-of-00002.parquet", [(mot(q, a), want) for q, a, want in REASONING]),
    "mot-science": ("science/train-00000-of-00002.parquet", [(mot(q, a), want) for q, a, want in REASONING]),
    "ocr2-python": ("train/python/train-00000-of-00070.parquet", [
        (ocr2(), "taco one\n<think>a</think>b"),
        (ocr2(judgement="wrong"), None), (ocr2(judgement=None), None), (ocr2(pass_rate="-1"), None),
        (ocr2(pass_rate="-1.0"), None), (ocr2(pass_rate=None), None), (ocr2(pass_rate="n/a"), None),
        (ocr2(pass_rate="nan"), None), (ocr2(pass_rate="0", index="0"), "taco zero\n<think>a</think>b"),
        (ocr2(dataset="apps", split="test", index="0"), "apps zero\n<think>a</think>b"),
        (ocr2(dataset="code_contests", split="valid", index="0"), "contest\n<think>a</think>b"),
        (ocr2(dataset="code_contests", split="train", index="0"), None),                      # no description
        (ocr2(dataset="code_contests", split="train", index="7"), None),
        (ocr2(dataset="elsewhere"), None), (ocr2(answer=None), None),
        (ocr2(question="Given here."), "Given here.\n<think>a</think>b")]),
    "ocr2-cpp": ("train/cpp/train-00000-of-00059.parquet", [
        (ocr2(dataset="open-r1/codeforces", index="0"),
         "describe\n\nInput\n\nn\n\nOutput\n\nm\n\nExamples\n\nInput\n\n1\n\nOutput\n\n2\n\nNote\n\nnote\n"
         "<think>a</think>b"),
        (ocr2(dataset="open-r1/codeforces", index="1"), "bare\n<think>a</think>b")]),
    "refinecode": ("data/train-00000-of-00510.parquet", [
        ({"url": "u", "tag": "t", "text": "print(1)", "file_path": "f", "dump": "d", "file_size_in_byte": 8,
          "line_count": 1}, "print(1)")]),
    "starcoder2": ("stack-edu-0000.json.gz", [
        ({"id": "1", "text": "int main;", "source": "s", "metadata": {"language": "C"}}, "int main;"),
        ({"id": "2", "text": 5}, None), ({"id": "3", "text": None}, None), ({"id": "4"}, None)]),
    "openthoughts3-science": ("data/train-00000-of-00120.parquet", [
        (thought3("science", "why", "because"), "why\nbecause"), (thought3("math", "1+1", "2"), None),
        (thought3(None, "q", "a"), None)]),
    "codex": ("data/train-00000-of-00002.parquet", []),
}
ROWS["codex"] = ("train-00000-of-00002.parquet", [
    (CODEX, "in\n<think>t</think>out"), ({"input": "i", "output": "<think>never ends"}, None),
    ({"input": "", "output": "o"}, None)])
QUESTIONS = {
    "taco": {"ALL/train-00000-of-00009.parquet": [{"question": "taco zero", "solutions": "[]"}],
             "ALL/train-00001-of-00009.parquet": [{"question": "taco one", "solutions": "[]"}],
             "ALL/test-00000-of-00001.parquet": [{"question": "taco test", "solutions": "[]"}]},
    "apps": {"train.jsonl": [{"id": 0, "question": "apps train"}],
             "test.jsonl": [{"id": 0, "question": "apps zero"}]},
    "code_contests": {
        "data/train-00000-of-00039-e991a271dbfa9925.parquet": [{"name": "n", "description": ""}],
        "data/valid-00000-of-00001-5e672c5751f060d3.parquet": [{"name": "n", "description": "contest"}],
        "data/test-00000-of-00001-9c49eeff30aacaa8.parquet": [{"name": "n", "description": "t"}]},
    "open-r1/codeforces": {"data/train-00000-of-00011.parquet": [
        {"description": "describe", "input_format": "n", "output_format": "m", "note": "note",
         "examples": [{"input": "1", "output": "2"}]},
        {"description": "bare", "input_format": None, "output_format": "", "note": None, "examples": None}],
        "data/test-00000-of-00001.parquet": [
        {"description": "t", "input_format": None, "output_format": None, "note": None,
         "examples": [{"input": "1", "output": "2"}]}]},
}


def write(path, rows):
    """Rows as the kind of file that the name says."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if path.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif path.endswith(".arrow"):
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(path, "wb") as f, pa.ipc.new_stream(f, table.schema) as out:
            out.write_table(table)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with open(path, "wb") as f:
            f.write(gzip.compress(data, mtime=0) if path.endswith(".gz") else data)


def hub(folder):
    """Writes all of it as folder/owner/name/file. Beside each part lie files that it must not take."""
    for source in registry.REGISTRY.values():
        for name, part in source.parts.items():
            file, rows = ROWS[name]
            write(os.path.join(folder, part.repo, file), [row for row, _ in rows])
    for dataset, files in QUESTIONS.items():
        for file, rows in files.items():
            write(os.path.join(folder, registry.QUESTIONS[dataset].repo, file), rows)
    for repo, file in (("open-r1/Mixture-of-Thoughts", "all/train-00000-of-00002.parquet"),
                       ("HuggingFaceH4/ultrachat_200k", "data/test_sft-00000-of-00001-f7dfac4afe.parquet"),
                       ("nvidia/Nemotron-Post-Training-Dataset-v1", "data/stem-00000-of-00010.parquet"),
                       ("IFM/MegaMath", "megamath-web/000_00000.parquet")):
        write(os.path.join(folder, repo, file), [{"text": "not for us", "messages": said("not", "ours")}])
    return str(folder)


def wanted(source):
    """The texts that a source of the registry has to be made of, in order."""
    return [text for part in registry.REGISTRY[source].parts for _, text in ROWS[part][1]
            if text not in (None, "twice")]


def documents(folder, source, tokenizer, split="train"):
    """The texts of a prepared source's documents, in order."""
    tokens, offsets, _ = shards.Source(str(folder), source, tokenizer, tokenizer.vocab_size).maps[split]
    return [tokenizer.decode(np.asarray(t[a:b - 1]).tolist()) for t, o in zip(tokens, offsets, strict=True)
            for a, b in zip(o[:-1].tolist(), o[1:].tolist(), strict=True)]
