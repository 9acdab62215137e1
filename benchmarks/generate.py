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

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(1, os.path.dirname(os.path.abspath(__file__)))

from train import CONFIGS, fresh  # noqa: E402

from engines.embedded import TorchEngine
from generate import engine  # noqa: E402
from model import Init, Model  # noqa: E402

MODELS = {"dense": CONFIGS["dense"], "hybrid": CONFIGS["hybrid, chunk_size 32"]}
BATCH, V = 64, 4096
WORK = {"rollouts": dict(prompts=16, n=16, new=256, stop=list(range(1, 41))),
        "even": dict(prompts=64, n=1, new=128, stop=[])}


def prompts(count):
    return torch.randint(0, V, (count, 128), generator=torch.Generator().manual_seed(1)).tolist()


def ours(folder, dtype, device):
    init = Init(folder)                                   # not load(): there is no tokenizer
    with torch.device("meta"):
        model = Model(init.arch)
    model = init.fill(model.to(dtype).to_empty(device=device))
    door = TorchEngine(model, max_batch=BATCH, progress=False)

    def work(prompts, n, new, stop, seed):
        made = door.generate(prompts, n, max_new_tokens=new, stop=stop, seed=seed)
        return sum(len(s.tokens) for own in made for s in own)
    return work


def vllm(folder, dtype, device):
    door = engine(folder, "vllm", dtype=str(dtype).removeprefix("torch."), max_batch=BATCH)

    def work(prompts, n, new, stop, seed):
        made = door.generate(prompts, n, max_new_tokens=new, stop=stop, seed=seed)
        return sum(len(s.tokens) for own in made for s in own)
    return work


def transformers(folder, dtype, device):
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def work(prompts, n, new, stop, seed):
        torch.manual_seed(seed)
        made, stops = 0, torch.tensor(stop, device=device)
        for i in range(0, len(prompts), BATCH // n):
            ids = torch.tensor(prompts[i:i + BATCH // n], device=device)
            more = dict(eos_token_id=stop) if stop else dict(min_new_tokens=new)
            with torch.inference_mode():
                out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                                     temperature=1.0, max_new_tokens=new, num_return_sequences=n,
                                     pad_token_id=0, **more)[:, ids.shape[1]:]
            ended = torch.isin(out, stops)                # a sample is what it has up to its first stop
            before = ended.int().cumsum(1) - ended.int()
            made += int((before == 0).sum())
        return made
    return work


SIDES = {"ours": ours, "transformers": transformers, "vllm": vllm}


def memory():
    """Starts a measurement; the function returned gives the rise since then, at its highest, in MB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        return lambda: (torch.cuda.max_memory_allocated() - held) / 1e6

    def now(field):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith(field)) / 1e3

    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")                                      # VmHWM starts again from here
    held = now("VmRSS")
    return lambda: now("VmHWM") - held


def worker(pipe, side, folder, dtype, device):
    work = SIDES[side](folder, dtype, device)
    work(prompts(4), 1, 4, [], 0)
    pipe.send("ready")
    while (message := pipe.recv()) != "end":
        name, seed = message
        job = dict(WORK[name])
        asked = prompts(job.pop("prompts"))
        rise, start = memory(), time.perf_counter()
        made = work(asked, seed=seed, **job)
        pipe.send((made / (time.perf_counter() - start), rise()))


def compare(name, dtype, device, sides):
    with tempfile.TemporaryDirectory() as tmp:
        fresh(MODELS[name], os.path.join(tmp, "m"))
        spawn, pipes = multiprocessing.get_context("spawn"), {}
        for side in sides:
            pipes[side], there = spawn.Pipe()
            spawn.Process(target=worker, args=(there, side, os.path.join(tmp, "m"), dtype, device)).start()
            there.close()                                 # a side that dies is the end of its pipe
            pipes[side].recv()
        for work in WORK:
            rates, risen = {side: [] for side in sides}, dict.fromkeys(sides, 0)
            for repeat in range(3):
                for side, pipe in pipes.items():
                    pipe.send((work, repeat))
                    rate, rise = pipe.recv()
                    rates[side].append(rate)
                    risen[side] = max(risen[side], rise)
            median = {side: statistics.median(r) for side, r in rates.items()}
            print(f"{name:7s} {str(dtype).removeprefix('torch.'):9s} {work:9s}" + "".join(
                f" {median[side]:8.0f} tok/s {risen[side]:5.0f} MB" for side in sides) + "".join(
                f" {median['ours'] / median[side]:6.2f}" for side in sides if side != "ours"), flush=True)
        for pipe in pipes.values():
            pipe.send("end")


if __name__ == "__main__":
    device = dict(a.lstrip("-").split("=") for a in sys.argv[1:]).get("device", "cpu")
    sides = list(SIDES) if importlib.util.find_spec("vllm") else ["ours", "transformers"]
    import transformers as peer
    print(f"torch {torch.__version__}, transformers {peer.__version__}, {torch.get_num_threads()} threads, "
          f"{BATCH} samples at a time\n{'':27s}" + "".join(f" {side:>23s}" for side in sides)
          + "  ours over each of the others")
    for dtype in (torch.bfloat16, torch.float32):
        for name in MODELS:
            compare(name, dtype, device, sides)
