"""Sampling, the embedded engine against transformers.generate and vLLM: the same weights and prompts, 64
samples at a time, side by side in one run.

    python benchmarks/generate.py                         # two CPU cores: about ten minutes
    python benchmarks/generate.py --device=cuda           # on a GPU (not yet measured)

Two workloads. "rollouts" is what RL asks for: 16 prompts of 128 tokens, 16 samples of each, which end by
themselves (after 90 tokens on average, here by 40 stop ids of the 4,096) or are cut at 256: a batch of
transformers goes on until its last sample ends. "even" is the least favourable to us: 64 different prompts,
one sample of each, 128 tokens whatever happens. tokens/s counts what was sampled up to the stop. Each side is
a process of its own; while one works the others wait. Medians of three calls after a small one to warm up.
Memory is how far a process's resident memory rose during a call at its highest (not vLLM's cache: it is
set aside at the start).
"""

import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from typing import NamedTuple

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(1, os.path.dirname(os.path.abspath(__file__)))

from train import CONFIGS, fresh  # noqa: E402

from engines.embedded import TorchEngine  # noqa: E402
from generate import engine  # noqa: E402
from model import Init, Model  # noqa: E402

MODELS = {"dense": CONFIGS["dense"], "hybrid": CONFIGS["hybrid, chunk_size 32"]}
BATCH, V = 64, 4096


class Work(NamedTuple):
    """What one call samples."""
    prompts: int
    n: int                               # samples of each
    new_tokens: int                      # at most
    stop: list[int]


WARM_UP = Work(prompts=4, n=1, new_tokens=4, stop=[])
WORKLOADS = {"rollouts": Work(prompts=16, n=16, new_tokens=256, stop=list(range(1, 41))),
             "even": Work(prompts=64, n=1, new_tokens=128, stop=[])}


def make_prompts(count):
    return torch.randint(0, V, (count, 128), generator=torch.Generator().manual_seed(1)).tolist()


# -- the sides: each gives a function that samples a Work and returns how many tokens that were --------------

def ours(folder, dtype, device):
    init = Init(folder)                                   # not load(): there is no tokenizer
    with torch.device("meta"):
        model = Model(init.arch)
    model = init.fill(model.to(dtype).to_empty(device=device))
    return by_engine(TorchEngine(model, max_batch=BATCH, progress=False))


def vllm(folder, dtype, device):
    return by_engine(engine(folder, "vllm", dtype=str(dtype).removeprefix("torch."), max_batch=BATCH))


def by_engine(engine):
    def sample(work, seed):
        samples = engine.generate(make_prompts(work.prompts), work.n, max_new_tokens=work.new_tokens,
                                  stop=work.stop, seed=seed)
        return sum(len(sample.tokens) for group in samples for sample in group)
    return sample


def transformers(folder, dtype, device):
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def sample(work, seed):
        torch.manual_seed(seed)
        prompts = make_prompts(work.prompts)
        stops = torch.tensor(work.stop, device=device)
        ends = dict(eos_token_id=work.stop) if work.stop else dict(min_new_tokens=work.new_tokens)
        prompts_per_batch = BATCH // work.n
        count = 0
        for first in range(0, len(prompts), prompts_per_batch):
            ids = torch.tensor(prompts[first:first + prompts_per_batch], device=device)
            with torch.inference_mode():
                out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                                     temperature=1.0, max_new_tokens=work.new_tokens,
                                     num_return_sequences=work.n, pad_token_id=0, **ends)
            is_stop = torch.isin(out[:, ids.shape[1]:], stops).int()
            stops_before = is_stop.cumsum(1) - is_stop    # a sample is what it has up to its first stop
            count += int((stops_before == 0).sum())
        return count
    return sample


SIDES = {"ours": ours, "transformers": transformers, "vllm": vllm}


# -- measuring -----------------------------------------------------------------------------------------------

def memory_rise():
    """Starts a measurement; the function returned gives the rise since then, at its highest, in MB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: (torch.cuda.max_memory_allocated() - before) / 1e6
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")                                      # VmHWM starts again from here
    before = process_memory("VmRSS")
    return lambda: process_memory("VmHWM") - before


def process_memory(field):
    """This process's, in MB."""
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(field):
                return int(line.split()[1]) / 1e3


def worker(pipe, side, folder, dtype, device):
    """The process of one side: answers (workload, seed) by (tokens/s, MB)."""
    sample = SIDES[side](folder, dtype, device)
    sample(WARM_UP, seed=0)
    pipe.send("ready")
    while (message := pipe.recv()) != "end":
        name, seed = message
        rise = memory_rise()
        start = time.perf_counter()
        count = sample(WORKLOADS[name], seed)
        seconds = time.perf_counter() - start
        pipe.send((count / seconds, rise()))


def compare(name, dtype, device, sides):
    """Prints a line for each workload."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = os.path.join(tmp, "m")
        fresh(MODELS[name], folder)
        spawn = multiprocessing.get_context("spawn")
        pipes = {}
        for side in sides:
            pipes[side], workers_pipe = spawn.Pipe()
            spawn.Process(target=worker, args=(workers_pipe, side, folder, dtype, device)).start()
            workers_pipe.close()                          # a side that dies is the end of its pipe
            pipes[side].recv()
        for workload in WORKLOADS:
            print(line(f"{name:7s} {str(dtype).removeprefix('torch.'):9s} {workload:9s}",
                       *measure(workload, pipes)), flush=True)
        for pipe in pipes.values():
            pipe.send("end")


def measure(workload, pipes):
    """{side: median tokens/s} and {side: MB at the highest} of three calls each, in turn."""
    rates = {side: [] for side in pipes}
    rises = {side: 0 for side in pipes}
    for seed in range(3):
        for side, pipe in pipes.items():
            pipe.send((workload, seed))
            rate, rise = pipe.recv()
            rates[side].append(rate)
            rises[side] = max(rises[side], rise)
    return {side: statistics.median(rates[side]) for side in pipes}, rises


def line(title, rates, rises):
    for side in rates:
        title += f" {rates[side]:8.0f} tok/s {rises[side]:5.0f} MB"
    for side in rates:
        if side != "ours":
            title += f" {rates['ours'] / rates[side]:6.2f}"
    return title


if __name__ == "__main__":
    flags = dict(flag.lstrip("-").split("=") for flag in sys.argv[1:])
    device = flags.get("device", "cpu")
    sides = list(SIDES) if importlib.util.find_spec("vllm") else ["ours", "transformers"]
    import transformers as peer
    titles = "".join(f" {side:>23s}" for side in sides)
    print(f"torch {torch.__version__}, transformers {peer.__version__}, {torch.get_num_threads()} threads, "
          f"{BATCH} samples at a time\n{'':27s}{titles}  ours over each of the others")
    for dtype in (torch.bfloat16, torch.float32):
        for name in MODELS:
            compare(name, dtype, device, sides)
