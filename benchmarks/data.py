"""Data preparation beside its peers: tokenizing beside datasets.map, packing beside TRL, memory at 1x and 10x
of the input.

    python benchmarks/data.py                 # about ten minutes; needs requirements-test.txt
    python benchmarks/data.py --quick=True    # a tenth of the text, one round

The text is the installed Python's library, cut and repeated with a number in front of each document (so none
is a duplicate); the tokenizer a byte-level BPE of 32,000 ids, trained on it on the spot, with the split of
Llama-3. Each side is a process of its own, in turn, with two workers, from .jsonl on disk to tokens on disk.
"""

import contextlib
import glob
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def library():
    """The standard library as documents of up to 4,000 characters."""
    texts = []
    for file in sorted(glob.glob(os.path.join(sysconfig.get_path("stdlib"), "**", "*.py"), recursive=True)):
        if "site-packages" not in file:
            with contextlib.suppress(UnicodeDecodeError), open(file, encoding="utf-8") as f:
                text = f.read()
                texts += [text[i:i + 4000] for i in range(0, len(text), 4000)]
    return texts


def write_tokenizer(folder, texts):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts[::3], trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    os.makedirs(folder)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}, f)


def write_text(folder, texts, size):
    os.makedirs(folder)
    written, n = 0, 0
    while written < size:                                 # files of up to 100 MB
        with open(os.path.join(folder, f"{n:03d}.jsonl"), "w") as f:
            while written < size and f.tell() < 100e6:
                line = json.dumps({"text": f"{written} {texts[random.randrange(len(texts))]}"}) + "\n"
                written += len(line)
                f.write(line)
        n += 1
    return written


THEIRS = """
import sys, time
from datasets import load_dataset
from transformers import PreTrainedTokenizerFast
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
def encode(batch):
    ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False,
                    return_token_type_ids=False)["input_ids"]
    return {"input_ids": [x + [tokenizer.eos_token_id] for x in ids]}
if __name__ == "__main__":
    began = time.perf_counter()
    texts = load_dataset("json", data_files=sys.argv[2] + "/*.jsonl", split="train", cache_dir=sys.argv[3])
    loaded = time.perf_counter()
    done = texts.map(encode, batched=True, remove_columns=["text"], num_proc=2)
    print("MAP", time.perf_counter() - loaded, len(done))
"""


def timed(command, **env):
    """(seconds, most bytes that the process and its children held at once, stdout)."""
    began, most, ended = time.perf_counter(), 0, threading.Event()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **env})

    def watch():
        nonlocal most
        while not ended.wait(0.2):
            held = 0
            for stat in glob.glob("/proc/[0-9]*/stat"):
                with contextlib.suppress(OSError), open(stat) as f:
                    fields = f.read().rpartition(")")[2].split()
                    if int(fields[3]) == process.pid:     # its session
                        held += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
            most = max(most, held)
    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    took = time.perf_counter() - began
    ended.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{command[:3]}: {err[-2000:]}")
    return took, most, out


def ours(folder, text, out):
    return [sys.executable, os.path.join(ROOT, "data.py"), "tokenize", f"--sources=text=local:{text}",
            f"--tokenizer={folder}/tokenizer", f"--out={out}", "--workers=2"]


def tokenizing(folder, size, rounds):
    texts = library()
    write_tokenizer(os.path.join(folder, "tokenizer"), texts)
    megabytes = write_text(os.path.join(folder, "text"), texts, size) / 1e6
    with open(os.path.join(folder, "theirs.py"), "w") as f:
        f.write(THEIRS)
    prepared, whole, mapped = [], [], []             # seconds of each round
    for i in range(rounds):
        took, _, out = timed(ours(folder, os.path.join(folder, "text"), os.path.join(folder, f"ours-{i}")))
        prepared.append(took)
        took, _, theirs = timed([sys.executable, os.path.join(folder, "theirs.py"), f"{folder}/tokenizer",
                                 f"{folder}/text", f"{folder}/cache-{i}"])
        whole.append(took)
        mapped.append(float(theirs.split("MAP")[1].split()[0]))
    ours_s = statistics.median(prepared)
    rows = (("data.py tokenize, whole command", ours_s),
            ("datasets, whole script", statistics.median(whole)),
            ("datasets, .map alone", statistics.median(mapped)))
    print(f"tokenizing {megabytes:.0f} MB of text, two workers, medians of {rounds} ({out.splitlines()[0]})")
    for title, took in rows:
        print(f"  {title:34s} {took:6.1f} s  {megabytes / took:5.1f} MB/s   {took / ours_s:5.2f}", flush=True)
    return texts


def memory(folder, texts, size):
    print("memory of data.py tokenize, all processes together, two workers (shared pages counted in each)")
    for times in (1, 10):
        path = os.path.join(folder, f"text-{times}")
        megabytes = write_text(path, texts, size * times) / 1e6
        took, most, _ = timed(ours(folder, path, os.path.join(folder, f"memory-{times}")))
        print(f"  {megabytes:6.0f} MB of text   {most / 1e6:6.0f} MB   {took:5.1f} s   "
              f"{megabytes / took:5.1f} MB/s", flush=True)


def documents(n, rng):
    """Lengths as in a real mixture: half web, then chat, long chains of thought, code."""
    kinds = ((0.50, 6.6, 1.0), (0.15, 6.3, 0.8), (0.25, 8.6, 0.8), (0.10, 7.0, 1.2))
    lengths = np.concatenate([rng.lognormal(mean, spread, int(share * n)) for share, mean, spread in kinds])
    return np.clip(lengths, 16, 200_000).astype(np.int64)


def packing(trl_documents, capacity=16_384):
    from corpus.shards import best_fit, packed_rows
    rng = np.random.default_rng(0)
    print(f"best-fit decreasing into {capacity:,} tokens")
    for n in (trl_documents, 1_000_000):
        lengths = documents(n, rng)
        took = []
        for _ in range(3):
            began = time.perf_counter()
            pieces, rows = packed_rows(lengths, capacity)
            took.append(time.perf_counter() - began)
        a = statistics.median(took)
        began = time.perf_counter()
        bins = best_fit(pieces[:, 1], capacity).max() + 1
        alone = time.perf_counter() - began
        print(f"  ours, {n:9,} documents   {a:7.3f} s split and put in rows ({alone:.3f} s best_fit alone)   "
              f"{bins:,} rows, {lengths.sum() / bins / capacity:.6f} full", flush=True)
        if n == trl_documents:
            import pyarrow as pa
            from datasets import Dataset
            from trl import pack_dataset
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]))
            table = pa.table({"ids": pa.LargeListArray.from_arrays(offsets, pa.array(
                np.zeros(int(lengths.sum()), dtype=np.uint8)))})
            began = time.perf_counter()
            packed = pack_dataset(Dataset(table), capacity, "bfd_split",
                                  dict(batch_size=n, keep_in_memory=True))
            b = time.perf_counter() - began
            print(f"  TRL,  {n:9,} documents   {b:7.3f} s in one call, moving a byte a token along          "
                  f"{len(packed):,} rows   ratio {b / a:.0f}", flush=True)


def main(quick: bool = False):
    random.seed(0)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        texts = tokenizing(folder, 30e6 if quick else 300e6, 1 if quick else 3)
        memory(folder, texts, 10e6 if quick else 100e6)
    packing(20_000 if quick else 200_000)


if __name__ == "__main__":
    import tyro

    from cli import split_flags
    tyro.cli(main, config=(tyro.conf.FlagConversionOff,), use_underscores=True,
             args=split_flags(sys.argv[1:]))
