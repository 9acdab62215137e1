"""Everything that wants a GPU, in twelve minutes on one: `make gpu`.

    python benchmarks/gpu.py                              # all parts, each once: benchmarks/results/gpu.md
    python benchmarks/gpu.py --parts=decode,train --again=True --seconds=300
    python benchmarks/gpu.py --device=cpu --out=/tmp/gpu  # the same parts on toys, to try the script

Parts, in the order of their worth: decode (the embedded engine beside a whole forward pass, with CUDA graphs
and without), tests (tests/gpu), train (a step of a 3B beside transformers, and its memory beside
--dry_run's), rl (a step of a 3B), counts (launches of a pass and of a token), kernels
(benchmarks/kernels.py). Weights are random, nothing is downloaded, and the packages of requirements.txt are
enough, tyro and math-verify apart.

Each part is a process of its own with a limit of its own. What it has measured is written at once, a line a
row, into gpu.jsonl, and gpu.md is made anew from that after every part: a run that is cut leaves what it had,
and the same command goes on with the parts that have not ended well.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import midtrain  # noqa: E402
import presets  # noqa: E402
from cli import write_atomic  # noqa: E402
from engines.embedded import TorchEngine  # noqa: E402
from engines.push import difference, score  # noqa: E402
from model import Model, flops_per_token, keys_met, preset, save  # noqa: E402
from runtime import grad_norm, join_ranks, peak_tflops, reduce_vectors, scale_gradients  # noqa: E402

LIMITS = dict(decode=120, tests=180, train=200, rl=180, counts=40, kernels=400)       # seconds
FAR = 0.1                                # nats a token between engine and model: something else is computed
# What is measured on a GPU, and in miniature on a CPU.
SIZES = {
    "cuda": dict(models=["granite-4-micro", "granite-4-h-micro"], tokens=8192, samples=64, prompt=256,
                 new=256, context=768, batch=8, group=8, steps=5, dtype="bfloat16",
                 tests=["-n", "8", "tests/gpu"]),         # Triton compiles on many cores
    "cpu": dict(models=["toy", "toy-h"], tokens=128, samples=4, prompt=16,
                new=8, context=48, batch=2, group=2, steps=2, tests=["tests/gpu/test_rope.py"],
                dtype="float32"),
}


# -- what parts share ----------------------------------------------------------------------------------------

@torch.no_grad()
def randomize(model):
    """Random weights of the usual sizes, made on the device."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            p.normal_(0, 0.3 if "conv1d" in name else 0.02)
        elif name.endswith("A_log"):
            p.copy_(torch.arange(1, len(p) + 1, device=p.device).log())
        elif name.endswith("dt_bias"):
            p.uniform_(-4, -1)
        else:
            p.fill_(0 if name.endswith("bias") else 1)
    return model


def whole_model(name, device, dtype):
    with torch.device("meta"):
        model = Model(preset(name)).to(dtype)
    return randomize(model.to_empty(device=device))


def seconds_of(function, device):
    """Wall seconds of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_gb(device):
    """GB allocated and reserved at the most since the last reset."""
    if device.type != "cuda":
        return {}
    return {"GB allocated": torch.cuda.max_memory_allocated() / 1e9,
            "GB reserved": torch.cuda.max_memory_reserved() / 1e9}


def free(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# -- parts: each yields rows, {column: value} --------------------------------------------------------------

def decode(device, sizes):
    """Greedy log-probs of the engine against one whole forward pass; tokens a second of many samples."""
    worst = 0.0
    for name in sizes["models"]:
        model = whole_model(name, device, getattr(torch, sizes["dtype"]))
        length = sizes["prompt"] + sizes["new"]
        prompts = torch.randint(model.arch.V, (sizes["samples"] // 4, sizes["prompt"])).tolist()
        for graphs in (True, False) if device.type == "cuda" else (False,):
            engine = TorchEngine(model, context=length, graphs=graphs, progress=False)
            samples = engine.generate(prompts[:2], 1, max_new_tokens=sizes["new"], temperature=0, stop=[])
            exact = score(model, prompts[:2], samples)
            gap = difference([group[0].logprobs for group in samples], exact)
            worst = max(worst, gap)

            def sample(new, engine=engine, prompts=prompts):
                engine.generate(prompts, 4, max_new_tokens=new, stop=[])
            sample(4)                                     # compiles what so many samples need
            took = seconds_of(lambda s=sample: s(sizes["new"]), device)
            yield {"model": name, "graphs": graphs, "samples": sizes["samples"],
                   "nats from a whole pass": gap, "tokens/s": sizes["samples"] * sizes["new"] / took,
                   **peak_gb(device)}
        del model, engine, sample
        free(device)
    if worst > FAR:
        raise RuntimeError(f"the engine's log-probs are {worst:.3f} nats a token from a whole pass's")


def tests(device, sizes):
    """tests/gpu, whatever is marked slow too; on a CPU a file of it by Triton's interpreter."""
    env = os.environ | ({"TRITON_INTERPRET": "1"} if device.type == "cpu" else {})
    run = subprocess.Popen([sys.executable, "-m", "pytest", "-m", "", "-vv", "-p", "no:cacheprovider",
                            *sizes["tests"]], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    counts = {"PASSED": 0, "FAILED": 0, "SKIPPED": 0, "ERROR": 0}
    tail = []
    for line in run.stdout:
        tail = [*tail[-40:], line.rstrip()]
        for outcome in counts:
            counts[outcome] += f" {outcome}" in line and "::" in line
        if " FAILED" in line and "::" in line:
            yield {"failed": next(word for word in line.split() if "::" in word)}
    yield {key.lower(): count for key, count in counts.items()}
    if run.wait():
        raise RuntimeError("\n".join(tail))


def our_step(name, recompute, sizes, ranks):
    """A function that makes a step of midtrain.main, and what --dry_run says of its memory."""
    cfg = midtrain.Config(model=name, recompute=recompute, batch=1, seq_len=sizes["tokens"],
                          dtype=sizes["dtype"])
    model = randomize(midtrain.build_model(preset(name), cfg, ranks))
    optimizer = midtrain.make_optimizer(model, cfg)
    parameters = list(model.parameters())
    tokens = torch.randint(model.arch.V, (1, sizes["tokens"]), device=ranks.device)

    def step():
        (model(tokens, None, tokens) / sizes["tokens"]).backward()
        reduce_vectors(parameters)
        norm = grad_norm(parameters, ranks.mesh)
        scale_gradients(parameters, min(1.0, cfg.clip / norm))
        optimizer.step()
        optimizer.zero_grad()

    _, planned = midtrain.training_memory(cfg, 1).peak()
    return step, sum(planned.values()) / 1e9


def their_step(name, recompute, sizes, device):
    """The same of transformers: fp32 weights under bf16 autocast, fused AdamW."""
    from transformers import AutoConfig, AutoModelForCausalLM
    raw = dict(presets.read(name))
    with torch.device(device):
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().train()
    if recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), 5e-5, fused=True)
    tokens = torch.randint(config.vocab_size, (1, sizes["tokens"]), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=sizes["dtype"] == "bfloat16"):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, None


def train(device, sizes):
    """A step of a row of tokens, ours beside transformers'; one rank, fp32 masters, passes in bf16."""
    with join_ranks(device.type) as ranks:
        for name in sizes["models"]:
            arch, tokens = preset(name), sizes["tokens"]
            flops = tokens * flops_per_token(arch, tokens, keys_met([tokens], arch.window) / tokens)
            peak = peak_tflops(device, getattr(torch, sizes["dtype"])) * 1e12
            for who, recompute in (("ours", "full"), ("transformers", "full"), ("ours", "selective"),
                                   ("ours", "off")):
                step = None                               # of the row before, whatever became of it
                free(device)
                make = our_step if who == "ours" else their_step
                try:
                    step, planned = make(name, recompute, sizes, ranks if who == "ours" else device)
                    step()
                    step()                                # Triton compiles, the allocator settles
                    took = statistics.median(seconds_of(step, device) for _ in range(sizes["steps"]))
                except torch.OutOfMemoryError as e:
                    yield {"model": name, "whose": who, "recompute": recompute, "none, since": str(e)[:80]}
                    continue
                except Exception as e:                    # a peer's, whatever it is; ours ends the part
                    if who == "ours":
                        raise
                    yield {"model": name, "whose": who, "recompute": recompute, "none, since": repr(e)[:80]}
                    continue
                yield {"model": name, "whose": who, "recompute": recompute, "s a step": took,
                       "tokens/s": tokens / took, "MFU": flops / took / peak, **peak_gb(device),
                       "GB by --dry_run": planned}


def rl_step(device, sizes):
    """Sampling by the embedded engine; then scoring and training on what was sampled, half of it called
    right, since random weights solve nothing. No checkpoint is written: a 3B's are of 41 and 54 GB."""
    import rl
    from corpus.tokenizer import toy_tokenizer

    class Unsaved(rl.Run):
        def save(self, state, step, keep):
            pass

    rl.Run = Unsaved                                      # in this part's own process
    name = sizes["models"][0]
    with tempfile.TemporaryDirectory() as folder:
        model = whole_model(name, device, getattr(torch, sizes["dtype"]))
        model.tokenizer = toy_tokenizer()
        save(model, f"{folder}/model")
        del model
        free(device)
        common = rl.recipe("toy") | dict(
            model=name, init=f"{folder}/model", heldout="none", steps=1, batch=sizes["batch"],
            group=sizes["group"], context=sizes["context"], row_tokens=0, dtype=sizes["dtype"],
            export_dtype="bfloat16", recompute="full", device=device.type, checkpoint_every=0)
        rl.main(rl.Config(**common | dict(run=f"{folder}/sampled", beta=0.0)))
        lines = [json.loads(line) for line in open(f"{folder}/sampled/samples.jsonl")]
        for i, line in enumerate(lines):
            line["correct"], line["reward"] = i % 2 == 0, float(i % 2 == 0)
        with open(f"{folder}/graded.jsonl", "w") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)
        free(device)
        rl.main(rl.Config(**common | dict(run=f"{folder}/trained", replay=f"{folder}/graded.jsonl")))
        sampled, trained = (json.loads(open(f"{folder}/{run}/metrics.jsonl").readline())
                            for run in ("sampled", "trained"))
    yield {"model": name, "responses": len(lines), "tokens": sum(len(line["tokens"]) for line in lines),
           "s of sampling": sampled["generate_s"], "s of pushing": sampled["push_s"],
           "nats after the push": sampled["push_gap"], "s of scoring": trained["score_s"],
           "s of training": trained["train_s"], "mismatch": trained["mismatch"], **peak_gb(device)}


def waits_of(function, device):
    """How often a call waits for the device, None where there is none to wait for."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def counts(device, sizes):
    """Launches by torch's profiler, of a training pass and of a decoded token; what waits for the device."""
    from torch.profiler import ProfilerActivity, profile
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")

    def launches_of(function):
        function()
        with profile(activities=activities) as profiler:
            function()
        events = profiler.events()
        if device.type == "cuda":
            return sum(event.device_type.name == "CUDA" for event in events)
        return sum(event.name.startswith("aten::") for event in events)

    def per_token(count, engine):
        """The difference of 24 new tokens and 8, a token: what a call costs once drops out."""
        def sample(new):
            return count(lambda: engine.generate([[1] * 16], 4, max_new_tokens=new, stop=[]))
        few, many = sample(8), sample(24)
        return None if few is None else (many - few) / 16

    for name in sizes["models"]:
        model = whole_model(name, device, getattr(torch, sizes["dtype"]))
        tokens = torch.zeros(1, sizes["tokens"], dtype=torch.int64, device=device)

        def training_pass(model=model, tokens=tokens):
            model(tokens, None, tokens).backward()

        row = {"model": name, "launches a pass": launches_of(training_pass),
               "waits a pass": waits_of(training_pass, device)}
        model.zero_grad()
        engine = TorchEngine(model, context=64, graphs=False, progress=False)
        row["launches a token"] = per_token(launches_of, engine)
        row["waits a token"] = per_token(lambda f: waits_of(f, device), engine)
        yield row
        del model, engine, training_pass
        free(device)


def kernels(device, sizes):
    """benchmarks/kernels.py; it writes its own file, op by op."""
    if device.type != "cuda":
        yield {"kernels": "want a GPU"}
        return
    run = subprocess.run([sys.executable, "benchmarks/kernels.py", "--out", f"{sizes['out']}/kernels.md"],
                         cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    yield {"kernels": "kernels.md", "status": run.returncode}
    if run.returncode:
        raise RuntimeError(run.stdout[-2000:])


PARTS = dict(decode=decode, tests=tests, train=train, rl=rl_step, counts=counts, kernels=kernels)


# -- the run -------------------------------------------------------------------------------------------------

def head(device):
    """Date, machine, versions, commit."""
    import transformers
    import triton
    commit = subprocess.getoutput(f"git -C {ROOT} rev-parse --short HEAD 2>/dev/null") or "unknown"
    name = "a CPU, toys: no figures of a GPU"
    if device == "cuda":
        driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
        name = f"{torch.cuda.get_device_name()}, driver {driver.splitlines()[0]}"
    return (f"{date.today()}, {name}, torch {torch.__version__}, triton {triton.__version__}, transformers "
            f"{transformers.__version__}, commit {commit}")


def read_lines(path):
    """The lines of gpu.jsonl; one that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def cell(value):
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def page(lines):
    """gpu.md of the lines of gpu.jsonl: of each part what its last run measured."""
    text = ["# On a GPU", "", "By `make gpu` (benchmarks/gpu.py says what the parts are)."]
    for part in PARTS:
        begins = [i for i, line in enumerate(lines) if line["part"] == part and "begins" in line]
        if not begins:
            text += ["", f"## {part}", "", "Not yet measured."]
            continue
        own = [line for line in lines[begins[-1]:] if line["part"] == part]
        end = next((line["ends"] for line in own if "ends" in line), "cut")
        text += ["", f"## {part}: {end}", "", own[0]["begins"] + "."]
        rows = [line["row"] for line in own if "row" in line]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        if rows:
            text += ["", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
            text += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
        for line in own:
            if "error" in line:
                text += ["", "```", *line["error"].splitlines()[-12:], "```"]
    return "\n".join(text) + "\n"


def run_part(part, limit, args):
    """One part in a process of its own, ended with all it started after `limit` seconds. Returns how it
    ended."""
    command = [sys.executable, __file__, f"--part={part}", f"--device={args.device}", f"--out={args.out}"]
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(limit)
        ended = "ok" if status == 0 else f"failed, status {status}"
    except subprocess.TimeoutExpired:
        ended = f"cut after {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"{ended}, {time.monotonic() - start:.0f} s"


def main(args):
    """All parts that have not ended well yet, within args.seconds."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gpu.jsonl"
    lines = read_lines(path)
    write_atomic(str(path), "".join(json.dumps(line) + "\n" for line in lines))
    done = {line["part"] for line in lines if line.get("ends", "").startswith("ok")}
    wanted = [part for part in args.parts.split(",") if args.again == "True" or part not in done]
    until = time.monotonic() + args.seconds
    endings = {}
    for part in wanted:
        limit = min(LIMITS[part], until - time.monotonic())
        if limit < 10:
            endings[part] = "no time left"
        else:
            print(f"{part}: at most {limit:.0f} s", flush=True)
            append(path, part=part, begins=head(args.device))
            endings[part] = run_part(part, limit, args)
            append(path, part=part, ends=endings[part])
        write_atomic(str(out / "gpu.md"), page(read_lines(path)))
        print(f"{part}: {endings[part]}", flush=True)
    print(f"{out / 'gpu.md'}")
    return not all(ending.startswith("ok") for ending in endings.values())


def append(path, **line):
    with open(path, "a") as f:
        f.write(json.dumps(line) + "\n")


def end_with(parent):
    """Ends this process, and all that it started, when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def work(args):
    """The process of a part: its rows go to gpu.jsonl as they come."""
    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    path = Path(args.out) / "gpu.jsonl"
    try:
        for row in PARTS[args.part](torch.device(args.device), SIZES[args.device] | {"out": args.out}):
            append(path, part=args.part, row=row)
            print("  " + ", ".join(f"{column} {cell(value)}" for column, value in row.items()), flush=True)
    except Exception as e:
        append(path, part=args.part, error=f"{type(e).__name__}: {e}")
        raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"))
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them")
    parser.add_argument("--seconds", type=float, default=720, help="for all parts")
    parser.add_argument("--again", default="False", choices=["True", "False"],
                        help="True: also the parts that ended well before")
    parser.add_argument("--device", default="cuda", choices=list(SIZES))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = os.path.abspath(args.out)
    if set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts={args.parts}: there are {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device=cpu tries the script on toys")
    sys.exit(work(args) if args.part else main(args))
