"""Mid-training on weighted mixtures (PRISM, arXiv 2603.17074, section 4 and table 16), from a laptop to 128
GPUs.

    python midtrain.py --model=toy --mixture=base --steps=300 --out=runs/base   # two CPU cores
    python midtrain.py --model=toy --init=runs/base/model --out=runs/mt   # mid-train what came out
    torchrun --nproc_per_node=8 midtrain.py --model=mistral-24b --data=data/mcs   # the same lines
    python midtrain.py --model=mistral-24b --dry_run=True                 # parameters, memory, tokens, days

The recipe of a preset is its default; every flag can be overridden with --key=value, and the same command run
again goes on where it stopped. Each step: take the step's rows (a pure function of seed and step), sum the
loss over this rank's tokens, divide by the global token count, reduce, clip, AdamW.
"""

import collections
import json
import math
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

import data
import presets
from cli import InputError, check_bounds, human, launch, write_atomic
from corpus import tokenizing
from corpus.tokenizer import load_tokenizer
from model import (
    Init,
    Model,
    choose_kernels,
    flops_per_token,
    kernels_in_use,
    keys_met,
    parameter_counts,
    preset,
    save,
)
from planning.memory import (
    TOLERANCE,
    HeadMemory,
    TrainingMemory,
    TrainingPass,
    attention_note,
    besides,
    card_bytes,
    changes_that_fit,
    layout_knobs,
    logits_bytes,
    memory_verdict,
    mfu_on_paper,
    needed_bytes,
    part_lines,
    refuse_oversized,
)
from reporting.figures import line, lines, picture
from runtime import (
    Run,
    grad_norm,
    join_ranks,
    peak_tflops,
    reduce_vectors,
    scale_gradients,
    shard,
    to_device,
)

# -- config -------------------------------------------------------------------------------------------------

Dtype = Literal["bfloat16", "float32"]
Packing = Literal["concat", "bfd"]
Recompute = Literal["off", "full", "selective"]
Schedule = Literal["cosine", "exponential"]
Trained = Literal["all", "attention"]


@dataclass
class Config:
    model: str = "toy"                   # preset, folder or hub id: architecture and recipe (presets/)
    init: str = ""                       # starts from a preset, folder, random:NAME[:SEED], 0.15*A + 0.85*B
    run: str = "runs/midtrain"           # run folder, also --out (torchrun keeps --run); resumed if it exists
    data: str = "toy"                    # folder of prepared sources; toy = the embedded world, in data/toy
    tokenizer: str = ""                  # folder of a tokenizer; empty = the checkpoint's own
    mixture: str = "math+code+science"   # math, math+code, math+code+science, base, or source:percent,...
    seed: int = 1                        # of the order of rows
    steps: int = 25_000                  # paper, table 16
    seq_len: int = 8192                  # tokens a row; paper, table 16
    batch: int = 128                     # rows a step over all ranks; paper: 128 devices x 1
    micro_batch: int = 1                 # rows a forward pass of one rank; paper, table 16
    packing: Packing = "concat"          # concat: cut anywhere (paper silent); bfd: as data.py pack put them
    doc_mask: bool = True                # isolate documents in attention, conv and state; paper silent, ours
    lr: float = 5e-5                     # peak learning rate; paper, table 16
    warmup: int = 500                    # steps of linear warm-up; paper, table 16
    schedule: Schedule = "cosine"        # cosine (paper, table 16), exponential (long context, table 17)
    final_lr: float = 0.1                # last learning rate as a fraction of lr; paper, table 16
    weight_decay: float = 0.1            # paper, table 16; on matrices only (ours)
    beta1: float = 0.9                   # paper, table 16
    beta2: float = 0.95                  # paper, table 16
    eps: float = 1e-10                   # paper, table 16
    clip: float = 1.0                    # global gradient norm, after reduction; ours, the paper gives none
    max_skips: int = 5                   # non-finite steps in a row before the run stops; ours
    train: Trained = "all"               # all, or attention only (long-context restoration, section 8.1)
    dtype: Dtype = "bfloat16"            # compute: bfloat16 (paper), float32; masters, reductions are float32
    replicate: int = 1                   # HSDP: copies of the sharded model; paper: 16
    shard: int = 0                       # HSDP: ranks a copy is sharded over; paper: 8; 0 = world / replicate
    recompute: Recompute = "full"        # a layer's activations: off, full, selective (keeps matrix products)
    kernels: str = "auto"                # auto (Triton on GPUs, torch on CPUs), torch, mamba-ssm (its scan)
    compile: bool = False                # torch.compile each layer, out of the plain formulas
    eval_every: int = 500                # steps between held-out losses; also before, after; 0 = only those
    eval_rows: int = 16                  # held-out rows a source
    checkpoint_every: int = 500          # steps between resumable checkpoints; 0 = only at the end
    keep: int = 2                        # checkpoints kept; 0 = all
    log_every: int = 10                  # steps between step lines; every step is in metrics.jsonl
    prefetch: int = 2                    # steps of rows read ahead
    export_dtype: Dtype = "bfloat16"     # of runs/.../model, the hub-format result
    device: str = "auto"                 # auto, cpu, cuda
    peak_tflops: float = 0.0             # device rate for MFU; 0 = its data sheet, or a CPU's timed product
    mfu: float = 0.0                     # MFU that --dry_run reckons the days with; 0 = 30 to 36 %, on paper
    gpu_gb: float = 0.0                  # GB of a GPU, for --dry_run; 0 = this machine's, without one 80
    allow_changed: bool = False          # go on with a run although its config changed
    dry_run: bool = False                # print the plan and stop


# The recipe of the toys: two CPU cores and a few minutes; ours.
TOY = dict(steps=1000, seq_len=256, batch=8, micro_batch=8, lr=3e-3, warmup=30, recompute="off",
           eval_every=200, checkpoint_every=200, log_every=50, eval_rows=4, export_dtype="float32")
# The flags that may change when a run is resumed: they cannot change what is trained.
FREE = ("replicate", "shard", "micro_batch", "recompute", "kernels", "compile", "checkpoint_every", "keep",
        "log_every", "prefetch", "device", "peak_tflops", "mfu", "gpu_gb", "allow_changed", "dry_run", "run")
# The flags that may not change even with --allow_changed: a checkpoint belongs to these.
FIXED = ("model", "mixture", "seed", "batch", "seq_len", "packing", "train")
# What the choices of Dtype are in torch, and the least values of numbers.
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LEAST = {"steps": 1, "seq_len": 2, "batch": 1, "micro_batch": 1, "warmup": 0, "eval_every": 0, "eval_rows": 1,
         "checkpoint_every": 0, "keep": 0, "log_every": 1, "prefetch": 1, "max_skips": 0, "lr": 0, "clip": 0,
         "eps": 0, "weight_decay": 0, "final_lr": 0, "mfu": 0, "gpu_gb": 0, "peak_tflops": 0}


def recipe(model):
    """Defaults that go with --model: the paper's for the seven, a two-core one for the toys."""
    return {"model": model} | (TOY if presets.is_toy(model) else {})


def check(cfg, world):
    """InputError on what cannot run on `world` ranks; it names the flag."""
    preset(cfg.model)
    check_bounds(cfg, LEAST)
    if cfg.warmup >= cfg.steps:
        raise InputError(f"--warmup={cfg.warmup} leaves nothing of --steps={cfg.steps}; give fewer warm-up "
                         f"steps")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(cfg, name) < 1:
            raise InputError(f"--{name}={getattr(cfg, name)} must be in [0, 1)")
    if cfg.batch % world:
        raise InputError(f"--batch={cfg.batch} does not divide by {world} ranks; take a multiple of {world}")
    rows_per_rank = cfg.batch // world
    if rows_per_rank % forward_rows(cfg, world):
        raise InputError(f"--batch={cfg.batch} over {world} ranks is {rows_per_rank} rows a rank, which "
                         f"does not divide by --micro_batch={cfg.micro_batch}; take a divisor of "
                         f"{rows_per_rank}")


def check_init(cfg, init):
    """InputError if the weights of --init do not have the sizes of --model."""
    arch = init.arch
    if sizes(arch) == sizes(preset(cfg.model)):
        return
    fitting = [name for name in presets.names() if sizes(preset(name)) == sizes(arch)]
    advice = fitting[0] if fitting else init.terms[0].checkpoint.path
    raise InputError(f"--init={cfg.init} is a {arch.family} model of {len(arch.layers)} layers, not "
                     f"the {cfg.model} of --model; give --model={advice}")


def sizes(arch):
    """What makes two models the same one; RoPE bases, windows and padded vocabularies may differ."""
    mamba = arch.mamba
    scan = (mamba.heads, mamba.head_dim, mamba.state, mamba.groups) if mamba else None
    return arch.family, arch.layers, arch.C, arch.H, arch.K, arch.D, arch.F, scan


def forward_rows(cfg, world):
    """Rows of one forward pass: --micro_batch, or all the rows of a rank where those are fewer."""
    return min(cfg.micro_batch, cfg.batch // world)


# -- the recipe as functions -------------------------------------------------------------------------------

def lr_at(step, cfg):
    """Learning rate of step 0, 1, ...: linear warm-up, then cosine or exponential decay to final_lr * lr."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    decayed = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)                    # 0 to 1
    if cfg.schedule == "exponential":                     # factor 0 is out of reach; 1e-3 stands for it, ours
        return cfg.lr * max(cfg.final_lr, 1e-3) ** decayed
    cosine = 0.5 * (1 + math.cos(math.pi * decayed))                                  # 1 to 0
    return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * cosine)


def make_optimizer(model, cfg):
    """AdamW; decay on matrices only. State exists from the start, so that a checkpoint can be loaded into
    it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # Vectors (norms, biases, A_log, D, dt_bias) scale or shift what matrices give: to pull them to 0 is no
    # regularisation. The paper is silent, this is ours.
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    for p in trained:
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def choose_trained(model, which):
    """which = attention: freezes all but the attention projections. Of the hybrids that leaves four
    layers."""
    if which == "attention":
        for name, p in model.named_parameters():
            p.requires_grad_(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj"))


def batches(stream, cfg, ranks, start, window=None):
    """This rank's `data.Batch` of steps start, start + 1, ... One thread reads ahead, and counts what the
    step line says of the rows; it cannot change their order. window: keys that attention sees."""
    rows_per_rank = cfg.batch // ranks.world

    # A step's rows are numbered through, the ranks take them in turns of rows_per_rank.
    def read(step):
        first_row = step * cfg.batch + ranks.rank * rows_per_rank
        batch = stream.read(first_row, rows_per_rank)
        batch.counted = int((batch.targets >= 0).sum())
        lengths = data.document_lengths(batch.docs) if cfg.doc_mask else [cfg.seq_len] * rows_per_rank
        batch.keys_met = keys_met(lengths, window)
        batch.rows_per_source = np.bincount(batch.source, minlength=len(stream.mixture))
        return batch

    # Every step: one more read is asked for, so that --prefetch of them are always under way.
    with ThreadPoolExecutor(1) as pool:
        first_steps = range(start, min(start + cfg.prefetch, cfg.steps))
        ahead = collections.deque(pool.submit(read, step) for step in first_steps)
        for step in range(start, cfg.steps):
            if step + cfg.prefetch < cfg.steps:
                ahead.append(pool.submit(read, step + cfg.prefetch))
            yield ahead.popleft().result()


def on_device(device, *arrays):
    """numpy arrays of any shape as tensors on the device: a list in their order."""
    return [to_device(torch.from_numpy(array), device) for array in arrays]


@torch.no_grad()
def domain_losses(model, heldout, cfg, ranks):
    """Held-out loss in nats a token by domain, {domain: float}: the retention curve. heldout: {domain:
    Batch}. Rows are dealt to the ranks; every rank makes the same number of passes (sharded layers are
    gathered by all), the surplus ones count nothing."""
    losses = {}
    rows_per_round = ranks.world * forward_rows(cfg, ranks.world)
    for domain, batch in heldout.items():
        rows = len(batch.tokens)
        loss_sum = 0.0
        counted = 0
        for first in range(0, rows, rows_per_round):
            # This rank's rows of the round; one beyond the last repeats the last, and counts nothing.
            dealt = np.arange(first + ranks.rank, first + rows_per_round, ranks.world)
            chosen = np.minimum(dealt, rows - 1)
            targets = batch.targets[chosen]
            targets[dealt >= rows] = -100
            counted += int((targets >= 0).sum())
            docs = batch.docs[chosen]
            lengths = data.document_lengths(docs).tolist() if cfg.doc_mask else None
            tokens, docs, targets = on_device(ranks.device, batch.tokens[chosen], docs, targets)
            loss_sum += float(model(tokens, docs if cfg.doc_mask else None, targets, lengths))
        loss_sum, counted = ranks.sum(loss_sum, counted)
        losses[domain] = loss_sum / counted
    return losses


# -- plan, table, picture ----------------------------------------------------------------------------------

def duration(seconds):
    """1d03h, 2h05m or 3m20s."""
    seconds = int(seconds)
    minutes = seconds // 60
    hours = minutes // 60
    days = hours // 24
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds % 60:02d}s"


def plan(cfg, world):
    """What --dry_run prints: parameters, memory a GPU by part and whether it fits, tokens and epochs a
    source, FLOPs, days."""
    arch = preset(cfg.model)
    counts = parameter_counts(arch)
    parameters = sum(counts.values())
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
    passes = cfg.batch // world // forward_rows(cfg, world)
    rows = cfg.steps * cfg.batch
    tokens = rows * cfg.seq_len

    # Days at an MFU, from the work really done: causal attention meets half of the keys.
    mean_keys = keys_met([cfg.seq_len], arch.window) / cfg.seq_len
    causal_flops = flops_per_token(arch, cfg.seq_len, mean_keys) * tokens
    full_flops = flops_per_token(arch, cfg.seq_len) * tokens
    peak_flops = (cfg.peak_tflops or 989) * 1e12
    mfu = cfg.mfu or mfu_on_paper(arch)
    hours = causal_flops / (peak_flops * mfu * world) / 3600
    whose_mfu = "" if cfg.mfu else " (on paper, not yet measured; --mfu=... for another)"
    whose_peak = "" if cfg.peak_tflops else " (H100, bf16; --peak_tflops=... for another)"

    return "\n".join([
        f"{cfg.model}: {parameters:,} parameters ({parts})",
        f"{cfg.steps:,} steps x {cfg.batch} rows x {cfg.seq_len:,} tokens = {human(tokens)} tokens on "
        f"{world} devices ({cfg.replicate} x {world // cfg.replicate}), {passes} micro-batches a step",
        "",
        *memory_lines(cfg, world),
        f"a checkpoint: {12 * parameters / 1e9:.1f} GB on disk (kept: {cfg.keep or 'all'}, and one being "
        f"written), as much in host memory meanwhile",
        "",
        data.forecast(data.read_mixture(cfg.mixture), rows, cfg.seq_len, cfg.seed),
        "",
        f"{causal_flops:.3e} FLOPs with causal attention halved, {full_flops:.3e} undiscounted "
        f"(attention over {cfg.seq_len:,} keys)",
        f"{hours / 24:.2f} days, {hours:.1f} hours, at {mfu:.0%} MFU{whose_mfu} of {peak_flops / 1e12:.0f} "
        f"TFLOP/s a device{whose_peak}"])


def training_memory(cfg, world, fused_attention=False):
    """The `TrainingMemory` of a step on one of `world` ranks. fused_attention: in float32 too, where torch
    may have to do without."""
    rows = forward_rows(cfg, world)
    work = TrainingPass(
        arch=preset(cfg.model),
        rows=rows,
        tokens_per_row=cfg.seq_len,
        number=DTYPES[cfg.dtype].itemsize,
        shards=world // cfg.replicate,
        recompute=cfg.recompute,
        fused_attention=fused_attention or cfg.dtype == "bfloat16",
        only_attention=cfg.train == "attention",
        accumulates=cfg.batch // world > rows)
    return TrainingMemory(work, loss_memory(work))


def loss_memory(work):
    """`HeadMemory` of kernels/loss.py: N x C gradients of the final norm's output, and V x C in fp32 of the
    head. Their backward pass scales both, in fp32, before they take the dtype of the passes again."""
    arch, number = work.arch, work.number
    stream = work.tokens * arch.C
    head = arch.V * arch.C * work.trains("")
    rounded = number if number < 4 else 0                 # in fp32 the scaled ones stay as they are
    logits = logits_bytes(arch, work.tokens, number)
    scaling_stream = 4 * head + 2 * number * stream + (8 * stream if rounded else 0)
    scaling_head = (8 + rounded) * head + 2 * number * stream
    return HeadMemory(forward=logits + 4 * head + number * stream,
                      backward=max(scaling_stream, scaling_head),
                      gathered_in_backward=False)


def gpu_bytes(cfg, world):
    """Bytes that a GPU needs: a step's peak and what is beside it."""
    _, parts = training_memory(cfg, world).peak()
    return needed_bytes(sum(parts.values()), cfg.replicate, world // cfg.replicate)


def memory_lines(cfg, world):
    """Memory a GPU by part, and the verdict."""
    moment, parts = training_memory(cfg, world).peak()
    traced = sum(parts.values())
    beside = besides(traced, cfg.replicate, world // cfg.replicate)
    total = {f"sum (within {TOLERANCE:.0%} of traced steps, docs/memory.md)": traced}
    needed = traced + sum(beside.values())
    card = card_bytes(cfg.gpu_gb)
    return [f"memory a GPU at its peak, {moment}:",
            *part_lines(parts | total | beside),
            *attention_note(cfg.dtype),
            memory_verdict(needed, card, lambda: changes(cfg, world, card))]


def changes(cfg, world, card):
    """Flags with which a GPU of `card` bytes holds a step, found by trying: more recomputation, fewer rows a
    pass, more ranks to a copy of the model."""
    rows = forward_rows(cfg, world)
    fewer_rows = {"micro_batch": [n for n in range(rows - 1, 0, -1) if rows % n == 0]}
    knobs = layout_knobs(cfg, world) | fewer_rows

    def fits(other):
        ranks = cfg.replicate * (other.shard or world // cfg.replicate)
        return gpu_bytes(other, ranks) <= card

    return changes_that_fit(cfg, knobs, fits)


def refuse_memory(cfg, ranks):
    """InputError where a step surely does not fit the GPU. What torch.compile keeps of a layer is not known
    beforehand: the layer's input at least."""
    if ranks.device.type == "cuda":
        least = replace(cfg, recompute="full") if cfg.compile else cfg
        _, parts = training_memory(least, ranks.world, fused_attention=True).peak()
        refuse_oversized(sum(parts.values()), ranks.device, lambda card: changes(cfg, ranks.world, card))


def table(curve):
    """The retention table of [(step, {domain: loss})]: before, after, change."""
    _, before = curve[0]
    step, after = curve[-1]
    lines = [f"held-out loss, nats a token   before   after {step} steps   change   (kept: within 0.05)"]
    for domain in before:
        change = after[domain] - before[domain]
        verdict = "gained" if change < 0 else "lost"
        if abs(change) < 0.05:
            verdict = "kept"
        lines.append(f"  {domain:26s} {before[domain]:7.3f} {after[domain]:14.3f} {change:+11.3f}   "
                     f"{verdict}")
    return "\n".join(lines)


def last_step(curve):
    """The step of the last held-out losses in [(step, {domain: loss})]."""
    step, _ = curve[-1]
    return step


def retention(curve, title):
    """The panel of [(step, {domain: loss})]: a line a domain over the steps, general text and chat dashed."""
    _, first_losses = curve[0]
    series = []
    for i, domain in enumerate(first_losses):
        points = [(step, losses[domain]) for step, losses in curve]
        dashes = "--" if domain in ("general", "chat") else "-"
        series.append((domain, points, line(i + 1) | {"linestyle": dashes}))
    return lines(title, "step", "held-out loss, nats a token", series, 7, yscale="linear")


# -- what main is made of ------------------------------------------------------------------------------------

def build_model(arch, cfg, ranks):
    """The model, sharded over the ranks; its weights are still to be filled in."""
    with torch.device("meta"):                            # no memory yet: no device could hold 24B whole
        model = Model(arch)
    for layer in model.trunk.layers:
        layer.recompute = cfg.recompute
        if cfg.compile:
            layer.body = torch.compile(layer.body)
    choose_trained(model, cfg.train)
    # The loss makes the head's gradient in the forward pass: the backward pass does not want its weights.
    shard(model, ranks.mesh, DTYPES[cfg.dtype], head_in_backward=False)
    return model.to_empty(device=ranks.device)


def resume(run, cfg, state):
    """Loads the newest checkpoint of the run into `state`. Returns its step; 0 where there is none, and
    nothing is loaded. InputError if it is beyond --steps, or of other data."""
    start = run.latest()
    if start is None:
        return 0
    if start > cfg.steps:
        raise InputError(f"--steps={cfg.steps}: {cfg.run} is at step {start} already; give more, or "
                         f"another --run")
    fingerprint = state["progress"]["fingerprint"]
    run.restore(state, start)
    if state["progress"]["fingerprint"] != fingerprint and not cfg.allow_changed:
        raise InputError(f"--data={cfg.data}: the prepared data changed since {cfg.run} was started; "
                         f"restore it, or give another --run")
    state["progress"]["fingerprint"] = fingerprint
    return start


def log_start(run, cfg, model, ranks, peak_flops, start):
    """Before the loop: one line on how the run is computed, one on the sizes of a step and of the run."""
    parameters = sum(p.numel() for p in model.parameters())
    layout = f"{cfg.replicate} x {ranks.world // cfg.replicate}"
    words = [f"{cfg.model} {parameters:,} parameters",
             f"{ranks.world} x {ranks.device.type} ({layout}) {cfg.dtype}",
             kernels_in_use(ranks.device, DTYPES[cfg.dtype])]
    if cfg.compile:
        words.append("layers: torch.compile")
    words.append("documents masked" if cfg.doc_mask else "documents not masked")
    if math.isnan(peak_flops):
        name = torch.cuda.get_device_name(ranks.device)
        words.append(f"no MFU: no {cfg.dtype} rate is listed for {name} (--peak_tflops=...)")
    else:
        words.append(f"peak {peak_flops / 1e12:.3g} TFLOP/s")
    if start:
        words.append(f"goes on at step {start}")
    run.log(" | ".join(words))
    rows_per_pass = forward_rows(cfg, ranks.world)
    passes = cfg.batch // ranks.world // rows_per_pass
    tokens = cfg.batch * cfg.seq_len
    run.log(f"each step {human(tokens)} tokens: {ranks.world} ranks x {passes} passes x {rows_per_pass} rows "
            f"x {cfg.seq_len:,} tokens | {cfg.steps:,} steps {human(cfg.steps * tokens)} tokens")


def log_step(run, cfg, numbers, seconds_left):
    """One line of at most 115 columns on a step; its numbers are those of its line of metrics.jsonl."""
    step = numbers["step"]
    mfu = "-" if math.isnan(numbers["mfu"]) else f"{numbers['mfu']:.1%}"
    run.log(f"step {step:5d}/{cfg.steps} {step / cfg.steps:6.1%} | loss {numbers['loss']:.4f} | "
            f"gnorm {numbers['gnorm']:.2f} | lr {numbers['lr']:.2e} | {human(numbers['tok_s'])} tok/s | "
            f"mfu {mfu} | mem {numbers['memory'] / 1e9:.1f}G | eta {duration(seconds_left)}")


def log_skip(run, cfg, step, loss, norm, skips):
    """Says that a step was skipped because its loss or gradient is not finite. InputError when more than
    --max_skips were in a row."""
    run.log(f"step {step}: loss {loss}, gradient norm {norm}: skipped ({skips} in a row)")
    if skips > cfg.max_skips:
        raise InputError(f"{skips} non-finite steps in a row at step {step} "
                         f"(--max_skips={cfg.max_skips}); the checkpoints before are kept: lower "
                         f"--lr and go on from one with --allow_changed=True")


def check_rows(rows, mixture, cfg, step):
    """Rows counted of each source by the end of `step` must be the planned ones."""
    planned = data.planned_rows(mixture, cfg.seed, step * cfg.batch).tolist()
    if rows != planned:
        raise RuntimeError(f"rows counted {rows} are not the rows planned {planned}")


def speed(cfg, arch, keys, seconds, peak_flops):
    """What metrics.jsonl says of the speed of a step of so many seconds, on devices of peak_flops a second
    together. keys: those that its queries met; mfu counts them, mfu_full all keys of a row."""
    tokens = cfg.batch * cfg.seq_len
    flops = tokens * flops_per_token(arch, cfg.seq_len, keys / tokens)
    full_flops = tokens * flops_per_token(arch, cfg.seq_len)
    possible = peak_flops * seconds
    return dict(tok_s=tokens / seconds, mfu=flops / possible, mfu_full=full_flops / possible, step_s=seconds)


def peak_memory(device):
    """The most bytes this process has held: on its GPU, or, without one, in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- main --------------------------------------------------------------------------------------------------

def main(cfg):
    """Trains, exports run/model, returns {"curve": [(step, {domain: loss})], "loss": last training loss}."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.dry_run:
        devices = cfg.replicate * cfg.shard if cfg.shard else max(world, cfg.replicate)
        check(cfg, devices)
        if int(os.environ.get("RANK", 0)) == 0:
            print(plan(cfg, devices))
        return {}
    check(cfg, world)
    mixture = data.read_mixture(cfg.mixture)
    with (join_ranks(cfg.device, cfg.replicate, cfg.shard) as ranks,
          Run(cfg.run, cfg, ranks, FREE, FIXED, cfg.allow_changed) as run):
        refuse_memory(cfg, ranks)
        files = f"model: {run.path('model')}   figure: {run.path('figures', 'retention.png')}"
        result = run.result("retention.json")
        if result and last_step(result["curve"]) >= cfg.steps:
            run.log(f"{cfg.run} is finished (delete the folder to train again)\n{table(result['curve'])}\n"
                    f"{files}")
            return result
        choose_kernels(cfg.kernels, ranks.device, cfg.compile)
        peak_flops = (cfg.peak_tflops or peak_tflops(ranks.device, DTYPES[cfg.dtype])) * 1e12    # of one rank

        # -- weights, tokenizer, data -----------------------------------------------------------------------
        # Opens the checkpoint (its tensors are read later), then the prepared sources, comparing checksums.
        with ranks.first_on_node():                       # the first rank downloads, the others find it
            init = Init(cfg.init or cfg.model)
        arch = init.arch
        if cfg.init:
            check_init(cfg, init)
        tokenizer = load_tokenizer(cfg.tokenizer, arch.raw) if cfg.tokenizer else init.tokenizer()
        folder = "data/toy" if cfg.data == "toy" else cfg.data
        if cfg.data == "toy" and ranks.rank == 0:
            tokenizing.prepare_toy(folder, tokenizer)
        torch.distributed.barrier()
        across = not cfg.doc_mask                         # a document's first token is a target as well
        stream = data.Stream(folder, mixture, cfg.seed, cfg.seq_len, tokenizer, arch.V, across, cfg.packing)
        for source in stream.sources:
            source.verify(ranks.rank, ranks.world, splits=("train",))          # heldout verifies its own
        heldout = data.heldout(folder, tokenizer, arch.V, cfg.seq_len, cfg.eval_rows, across=across)

        # -- model, optimizer, and what a stopped run has done ----------------------------------------------
        # A checkpoint holds the three parts of `state`; weights are filled in only where there is none.
        model = build_model(arch, cfg, ranks)
        model.tokenizer = tokenizer
        optimizer = make_optimizer(model, cfg)
        weights = dict(model.named_parameters())
        parameters = [p for p in weights.values() if p.requires_grad]
        fingerprint = stream.fingerprint()
        state = {
            "model": weights,
            "progress": {"step": 0, "skips": 0, "rows": [0] * len(mixture), "fingerprint": fingerprint},
            "optimizer": {name: optimizer.state[p] for name, p in weights.items() if p.requires_grad},
        }
        start = resume(run, cfg, state)
        if start == 0:
            init.fill(model)
        progress = state["progress"]
        run.prune(cfg.keep)
        metrics = run.rewind(start)                       # the lines of metrics.jsonl up to here
        curve = [(line["step"], line["eval"]) for line in metrics if "eval" in line]
        past_losses = [line["loss"] for line in metrics if "loss" in line]
        loss = past_losses[-1] if past_losses else math.nan
        log_start(run, cfg, model, ranks, peak_flops, start)

        def evaluate(step):
            losses = domain_losses(model, heldout, cfg, ranks)
            curve.append((step, losses))
            run.metrics(step=step, eval=losses)
            run.log(f"held-out {step:5d} | " + " | ".join(f"{name} {v:.3f}" for name, v in losses.items()))

        # -- the loop ---------------------------------------------------------------------------------------
        # A step is rows_per_rank rows on every rank, rows_per_pass at a time.
        rows_per_rank = cfg.batch // ranks.world
        rows_per_pass = forward_rows(cfg, ranks.world)
        tokens_per_step = cfg.batch * cfg.seq_len
        reader = batches(stream, cfg, ranks, start, arch.window)
        loop_began = time.perf_counter()
        wait_seconds = 0.0
        train_seconds = 0.0
        for step in range(start, cfg.steps):
            # Before the first step and every --eval_every steps: held-out losses (all ranks take part).
            if step == 0 or (cfg.eval_every and step % cfg.eval_every == 0):
                evaluate(step)

            # Every step: take this rank's rows, which were read ahead: tensors (rows_per_rank, seq_len). What
            # they hold is summed over the ranks, for the loss, the MFU and the check against the plan.
            step_began = time.perf_counter()
            batch = next(reader)
            wait_seconds += time.perf_counter() - step_began
            tokens, targets, docs = on_device(ranks.device, batch.tokens, batch.targets, batch.docs)
            counted, keys, *rows = ranks.sum(batch.counted, batch.keys_met, *batch.rows_per_source)
            progress["rows"] = [n + int(new) for n, new in zip(progress["rows"], rows, strict=True)]

            # Every pass of rows_per_pass rows: forward and backward. Dividing by the tokens of all ranks lets
            # the parts sum to the mean over the batch, however it is split.
            loss_sum = torch.zeros((), device=ranks.device)
            for first in range(0, rows_per_rank, rows_per_pass):
                part = slice(first, first + rows_per_pass)
                docs_part = docs[part] if cfg.doc_mask else None
                lengths = data.document_lengths(batch.docs[part]).tolist() if cfg.doc_mask else None
                model.set_requires_all_reduce(first + rows_per_pass >= rows_per_rank)  # reduce-scatter always
                loss_part = model(tokens[part], docs_part, targets[part], lengths) / counted
                loss_part.backward()
                loss_sum += loss_part.detach()

            # Every step: reduce, clip by the global norm, AdamW. A step that is not finite leaves no trace in
            # the weights or the moments. Only here, for the norm, does the host wait for the device.
            loss_sum = loss_sum.double()
            torch.distributed.all_reduce(loss_sum)
            reduce_vectors(parameters)
            norm = grad_norm(parameters, ranks.mesh)
            loss = float(loss_sum)
            lr = lr_at(step, cfg)
            if math.isfinite(norm) and math.isfinite(loss):
                if cfg.clip and norm > cfg.clip:
                    scale_gradients(parameters, cfg.clip / norm)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                progress["skips"] = 0
            else:
                progress["skips"] += 1
                log_skip(run, cfg, step + 1, loss, norm, progress["skips"])
            optimizer.zero_grad()
            progress["step"] = step + 1

            # Every step: its numbers go to metrics.jsonl. Every --log_every steps, and at the last: its line.
            step_seconds = time.perf_counter() - step_began
            train_seconds += step_seconds
            numbers = dict(step=step + 1, loss=loss, gnorm=norm, lr=lr, tokens=(step + 1) * tokens_per_step,
                           counted=int(counted), **speed(cfg, arch, keys, step_seconds, peak_flops * world),
                           memory=peak_memory(ranks.device), skips=progress["skips"])
            run.metrics(**numbers)
            if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
                check_rows(progress["rows"], mixture, cfg, step + 1)
                log_step(run, cfg, numbers, (cfg.steps - step - 1) * train_seconds / (step + 1 - start))

            # Every --checkpoint_every steps, and at the last: a checkpoint, written while training goes on.
            run.poll()
            if step + 1 == cfg.steps or (cfg.checkpoint_every and (step + 1) % cfg.checkpoint_every == 0):
                run.save(state, step + 1, cfg.keep)

        # -- result: save before evaluating -----------------------------------------------------------------
        # The model is exported first, so that nothing is lost if what follows fails.
        run.finish()
        save(model, run.path("model"), DTYPES[cfg.export_dtype])
        evaluate(cfg.steps)
        tokens_per_source = [rows * cfg.seq_len for rows in progress["rows"]]
        result = {"curve": curve, "loss": loss, "tokens": dict(zip(mixture, tokens_per_source, strict=True))}
        if ranks.rank == 0:
            with run.writing("the result"):
                os.makedirs(run.path("figures"), exist_ok=True)
                picture(run.path("figures", "retention"), [retention(curve, f"{cfg.model}, {cfg.mixture}")])
                write_atomic(run.path("retention.json"), json.dumps(result, indent=1))
        loop_seconds = time.perf_counter() - loop_began
        run.log(f"\n{table(curve)}\nwaited for data {wait_seconds:.1f} s of {loop_seconds:.0f} s\n{files}")
        return result


if __name__ == "__main__":
    launch(main, Config, recipe)
