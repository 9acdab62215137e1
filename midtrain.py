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
from dataclasses import dataclass

import numpy as np
import torch

import data
import presets
from cli import InputError, human, launch, write_atomic
from corpus import tokenizing
from corpus.tokenizer import load_tokenizer
from kernels.ssd import chunk_length
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
from runtime import Run, grad_norm, join_ranks, peak_tflops, reduce_vectors, shard

# -- config -------------------------------------------------------------------------------------------------


@dataclass
class Config:
    model: str = "toy"                   # preset, folder or hub id: architecture and recipe (presets/)
    init: str = ""                       # preset, folder, random:NAME[:SEED], 0.15*A + 0.85*B; else --model
    run: str = "runs/midtrain"           # run folder, also --out (torchrun keeps --run); goes on from it
    data: str = "toy"                    # folder of prepared sources; toy = the embedded world, in data/toy
    tokenizer: str = ""                  # folder of a tokenizer; empty = the checkpoint's own
    mixture: str = "math+code+science"   # math, math+code, math+code+science, base, or source:percent,...
    seed: int = 1                        # of the order of rows
    steps: int = 25_000                  # paper, table 16
    seq_len: int = 8192                  # tokens a row; paper, table 16
    batch: int = 128                     # rows a step over all ranks; paper: 128 devices x 1
    micro_batch: int = 1                 # rows a forward pass of one rank; paper, table 16
    packing: str = "concat"              # concat: cut anywhere (paper silent); bfd: as data.py pack put them
    doc_mask: bool = True                # isolate documents in attention, conv and state; paper silent, ours
    lr: float = 5e-5                     # peak learning rate; paper, table 16
    warmup: int = 500                    # steps of linear warm-up; paper, table 16
    schedule: str = "cosine"             # cosine (paper, table 16), exponential (long context, table 17)
    final_lr: float = 0.1                # last learning rate as a fraction of lr; paper, table 16
    weight_decay: float = 0.1            # paper, table 16; on matrices only (ours)
    beta1: float = 0.9                   # paper, table 16
    beta2: float = 0.95                  # paper, table 16
    eps: float = 1e-10                   # paper, table 16
    clip: float = 1.0                    # global gradient norm, after reduction; ours, the paper gives none
    max_skips: int = 5                   # non-finite steps in a row before the run stops; ours
    train: str = "all"                   # all, or attention only (long-context restoration, section 8.1)
    dtype: str = "bfloat16"              # compute: bfloat16 (paper), float32; masters, reductions are float32
    replicate: int = 1                   # HSDP: copies of the sharded model; paper: 16
    shard: int = 0                       # HSDP: ranks a copy is sharded over; paper: 8; 0 = world / replicate
    recompute: str = "full"              # a layer's activations: off, full, selective (keeps matrix products)
    kernels: str = "auto"                # auto (Triton on GPUs, torch on CPUs), torch, mamba-ssm (its scan)
    compile: bool = False                # torch.compile each layer, out of the plain formulas
    eval_every: int = 500                # steps between held-out losses; also before, after; 0 = only those
    eval_rows: int = 16                  # held-out rows a source
    checkpoint_every: int = 500          # steps between resumable checkpoints; 0 = only at the end
    keep: int = 2                        # checkpoints kept; 0 = all
    log_every: int = 10                  # steps between step lines; every step is in metrics.jsonl
    prefetch: int = 2                    # steps of rows read ahead
    export_dtype: str = "bfloat16"       # of runs/.../model, the hub-format result
    device: str = "auto"                 # auto, cpu, cuda
    peak_tflops: float = 0.0             # device rate for MFU; 0 = its data sheet, or a CPU's timed product
    mfu: float = 0.4                     # MFU that --dry_run reckons the days with
    allow_changed: bool = False          # go on with a run although its config changed
    dry_run: bool = False                # print the plan and stop


TOY = dict(steps=1000, seq_len=256, batch=8, micro_batch=8, lr=3e-3, warmup=30, recompute="off",
           eval_every=200, checkpoint_every=200, log_every=50, eval_rows=4, export_dtype="float32")
# FREE: cannot change what is trained
FREE = ("replicate", "shard", "micro_batch", "recompute", "kernels", "compile", "checkpoint_every", "keep",
        "log_every", "prefetch", "device", "peak_tflops", "mfu", "allow_changed", "dry_run", "run")
FIXED = ("model", "mixture", "seed", "batch", "seq_len", "packing", "train")        # a checkpoint is of these


def recipe(model):
    """Defaults that go with --model: the paper's for the seven, a two-core one for the toys."""
    return {"model": model} | (TOY if presets.is_toy(model) else {})


def check(cfg, world):
    """Refuses what cannot run, naming the flag."""
    preset(cfg.model)
    for name, least in (("steps", 1), ("seq_len", 2), ("batch", 1), ("micro_batch", 1), ("warmup", 0),
                        ("eval_every", 0), ("eval_rows", 1), ("checkpoint_every", 0), ("keep", 0),
                        ("log_every", 1), ("prefetch", 1), ("max_skips", 0), ("lr", 0), ("clip", 0),
                        ("eps", 0), ("weight_decay", 0), ("final_lr", 0)):
        if not least <= getattr(cfg, name) < math.inf:    # refuses nan as well
            raise InputError(f"--{name}={getattr(cfg, name)} must be a finite number, at least {least}")
    for name, known in (("dtype", DTYPES), ("export_dtype", DTYPES), ("schedule", ("cosine", "exponential")),
                        ("recompute", ("off", "full", "selective")), ("train", ("all", "attention")),
                        ("packing", ("concat", "bfd"))):
        if getattr(cfg, name) not in known:
            raise InputError(f"--{name}={getattr(cfg, name)!r} is not one of {', '.join(known)}")
    if cfg.warmup >= cfg.steps:
        raise InputError(f"--warmup={cfg.warmup} leaves nothing of --steps={cfg.steps}; give fewer warm-up "
                         f"steps")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(cfg, name) < 1:
            raise InputError(f"--{name}={getattr(cfg, name)} must be in [0, 1)")
    if cfg.batch % world:
        raise InputError(f"--batch={cfg.batch} does not divide by {world} ranks; take a multiple of {world}")
    if cfg.batch // world % micro_rows(cfg, world):
        raise InputError(f"--batch={cfg.batch} over {world} ranks is {cfg.batch // world} rows a rank, which "
                         f"does not divide by --micro_batch={cfg.micro_batch}; take a divisor of "
                         f"{cfg.batch // world}")


def micro_rows(cfg, world):
    """Rows of one forward pass: --micro_batch, or all a rank has where that is less."""
    return min(cfg.micro_batch, cfg.batch // world)


def sizes(arch):
    """What makes two models the same one; RoPE bases, windows and padded vocabularies may differ."""
    mamba = arch.mamba
    scan = (mamba.heads, mamba.head_dim, mamba.state, mamba.groups) if mamba else None
    return arch.family, arch.layers, arch.C, arch.H, arch.K, arch.D, arch.F, scan


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


# -- the recipe as functions -------------------------------------------------------------------------------

def lr_at(step, cfg):
    """Learning rate of step 0, 1, ...: linear warm-up, then cosine or exponential decay to final_lr * lr."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    t = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    if cfg.schedule == "exponential":                     # factor 0 is out of reach; 1e-3 stands for it, ours
        return cfg.lr * max(cfg.final_lr, 1e-3) ** t
    return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * t)))


def make_optimizer(model, cfg):
    """AdamW; decay on matrices only. State exists from the start, so that a checkpoint can be loaded into
    it."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=(cfg.beta1, cfg.beta2),
                                  eps=cfg.eps, fused=True)
    for _, p in trained:
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def choose_trained(model, which):
    """which = attention: freezes all but the attention projections. Of the hybrids that leaves four
    layers."""
    if which == "attention":
        for name, p in model.named_parameters():
            p.requires_grad_(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj"))


def batches(stream, cfg, ranks, start):
    """This rank's rows of steps start, start + 1, ...; read ahead in a thread, which cannot change their
    order."""
    local = cfg.batch // ranks.world

    def read(step):
        return stream.read(step * cfg.batch + ranks.rank * local, local)

    with ThreadPoolExecutor(1) as pool:
        ahead = collections.deque(pool.submit(read, s)
                                  for s in range(start, min(start + cfg.prefetch, cfg.steps)))
        for step in range(start, cfg.steps):
            if step + cfg.prefetch < cfg.steps:
                ahead.append(pool.submit(read, step + cfg.prefetch))
            yield ahead.popleft().result()


@torch.no_grad()
def domain_losses(model, held, cfg, ranks):
    """Held-out loss in nats a token by domain: the retention curve. Rows are dealt to the ranks; every rank
    makes the same number of passes (sharded layers are gathered by all), the surplus ones count nothing."""
    losses, together = {}, ranks.world * micro_rows(cfg, ranks.world)
    for domain, b in held.items():
        total, counted, n = 0.0, 0, len(b.tokens)
        for i in range(0, n, together):
            mine = np.arange(i + ranks.rank, i + together, ranks.world)
            tokens, docs, targets = (z[np.minimum(mine, n - 1)] for z in (b.tokens, b.docs, b.targets))
            targets[mine >= n] = -100
            counted += int((targets >= 0).sum())
            tokens, docs, targets = (torch.from_numpy(z).to(ranks.device) for z in (tokens, docs, targets))
            total += float(model(tokens, docs if cfg.doc_mask else None, targets))
        total, counted = ranks.sum(total, counted)
        losses[domain] = total / counted
    return losses


# -- plan, table, picture ----------------------------------------------------------------------------------

def duration(s):
    s = int(s)
    return f"{s // 86400}d{s % 86400 // 3600:02d}h" if s >= 86400 else (
        f"{s // 3600}h{s % 3600 // 60:02d}m" if s >= 3600 else f"{s // 60}m{s % 60:02d}s")


def plan(cfg, world):
    """What --dry_run prints: parameters, memory a device by part, tokens and epochs a source, FLOPs, days."""
    arch, counts = preset(cfg.model), parameter_counts(preset(cfg.model))
    n, width = sum(counts.values()), (cfg.shard or world // cfg.replicate)
    bytes_, T, rows = (2 if cfg.dtype == "bfloat16" else 4), cfg.seq_len, micro_rows(cfg, world)
    whole, table_ = counts["norms"], arch.V * arch.C
    kinds = {arch.layers.index(k) for k in set(arch.layers)}
    layer = max(sum(parameter_counts(_only(arch, i)).values()) for i in kinds)
    inner = max(activations(arch, kinds) for kinds in set(arch.layers)) * T * rows * bytes_
    stack = sum(activations(arch, kinds) for kinds in arch.layers) * T * rows * bytes_
    saved = {"full": len(arch.layers) * T * rows * arch.C * bytes_ + inner, "off": stack,
             "selective": stack / 2}[cfg.recompute]       # about half are products' outputs, which it keeps
    memory = {
        "weights, fp32, sharded": 4 * n / width + 4 * whole,
        "Adam moments, fp32, sharded": 8 * n / width + 8 * whole,
        "gradients, fp32, sharded": 4 * n / width + 4 * whole,
        f"gathered in {cfg.dtype}: two layers, embedding, head":
            bytes_ * (2 * layer + table_ * (2 - arch.tied)),
        f"activations, recompute={cfg.recompute} (estimate)": saved,
        "gradients of a layer, and of two in fp32 as they are reduced": layer * (bytes_ + 8),
        "loss: a chunk of logits, gradients of the head":
            min(2048, T * rows) * arch.V * (4 + bytes_) + (8 + bytes_) * table_,
    }
    tokens = cfg.steps * cfg.batch * T
    exact, full = (flops_per_token(arch, T, a) * tokens for a in (keys_met([T], arch.window) / T, None))
    peak = (cfg.peak_tflops or 989) * 1e12
    lines = [f"{cfg.model}: {n:,} parameters ({', '.join(f'{k} {v:,}' for k, v in counts.items() if v)})",
             f"{cfg.steps:,} steps x {cfg.batch} rows x {T:,} tokens = {human(tokens)} tokens on {world} "
             f"devices ({cfg.replicate} x {width}), {cfg.batch // world // rows} micro-batches a step", "",
             "memory a device:"]
    memory["sum"] = sum(memory.values())
    lines += [f"  {k:63s} {v / 1e9:8.2f} GB" for k, v in memory.items()]
    lines += [f"a checkpoint: {12 * n / 1e9:.1f} GB on disk (kept: {cfg.keep or 'all'}, and one being "
              f"written), as much in host memory meanwhile", ""]
    mixture = data.read_mixture(cfg.mixture)
    lines += [data.forecast(mixture, cfg.steps * cfg.batch, T, cfg.seed), "",
              f"{exact:.3e} FLOPs with causal attention halved, {full:.3e} undiscounted "
              f"(attention over {T:,} keys)",
              f"{exact / (peak * cfg.mfu * world) / 86400:.2f} days at {cfg.mfu:.0%} of "
              f"{peak / 1e12:.0f} TFLOP/s a device"
              + ("" if cfg.peak_tflops else " (H100, bf16; --peak_tflops=... for another)")]
    return "\n".join(lines)


def activations(arch, kinds):
    """Numbers a token that the sublayers of one layer keep for their backward pass (an estimate; the scan's
    fp32 counts two)."""
    kept = {"a": 2 * arch.C + 2 * (arch.H + arch.K) * arch.D,
            "f": 2 * arch.C + (3 if arch.family == "nemotron_h" else 4) * arch.F}
    if arch.mamba:
        mamba = arch.mamba
        chunk = chunk_length(mamba.head_dim, mamba.state)
        kept["m"] = 2 * arch.C + 3 * (mamba.inner + mamba.conv_channels) + 3 * mamba.heads * chunk
    return sum(kept[kind] for kind in kinds)


def _only(arch, i):
    """The architecture with layer i alone and an embedding of one row: what a gathered layer weighs."""
    from dataclasses import replace
    return replace(arch, layers=(arch.layers[i],), V=1, tied=True)


def table(curve):
    """The retention table of [(step, {domain: loss})]: before, after, change."""
    (_, before), (step, after) = curve[0], curve[-1]
    lines = [f"held-out loss, nats a token   before   after {step} steps   change   (kept: within 0.05)"]
    lines += [
        f"  {d:26s} {before[d]:7.3f} {after[d]:14.3f} {after[d] - before[d]:+11.3f}   "
        f"{'kept' if abs(after[d] - before[d]) < 0.05 else 'gained' if after[d] < before[d] else 'lost'}"
        for d in before]
    return "\n".join(lines)


def picture(curve, path, title):
    """Loss by domain over steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4))
    for domain in curve[0][1]:
        ax.plot([s for s, _ in curve], [losses[domain] for _, losses in curve], marker="o", markersize=3,
                linestyle="--" if domain in ("general", "chat") else "-", label=domain)
    ax.set(xlabel="step", ylabel="held-out loss, nats a token", title=title)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fig.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(fig)


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
    with join_ranks(cfg.device, cfg.replicate, cfg.shard) as me:
        run = Run(cfg.run, cfg, me, FREE, FIXED, cfg.allow_changed)
        result = run.result("retention.json")
        if result and result["curve"][-1][0] >= cfg.steps:
            run.log(f"{cfg.run} is finished (delete the folder to train again)\n{table(result['curve'])}\n"
                    f"model: {run.path('model')}   figure: {run.path('figures', 'retention.png')}")
            return result

        choose_kernels(cfg.kernels, me.device, cfg.compile)
        peak = (cfg.peak_tflops or peak_tflops(me.device, DTYPES[cfg.dtype])) * 1e12

        # -- weights, tokenizer, data -----------------------------------------------------------------------
        with me.first_on_node():                          # it downloads, the others find it
            init = Init(cfg.init or cfg.model)
        arch = init.arch
        if cfg.init and sizes(arch) != sizes(preset(cfg.model)):
            same = [name for name in presets.names() if sizes(preset(name)) == sizes(arch)]
            raise InputError(f"--init={cfg.init} is a {arch.family} model of {len(arch.layers)} layers, not "
                             f"the {cfg.model} of --model; give "
                             f"--model={same[0] if same else init.terms[0].checkpoint.path}")
        tokenizer = load_tokenizer(cfg.tokenizer, arch.raw) if cfg.tokenizer else init.tokenizer()
        folder = "data/toy" if cfg.data == "toy" else cfg.data
        if cfg.data == "toy" and me.rank == 0:
            tokenizing.prepare_toy(folder, tokenizer)
        torch.distributed.barrier()
        stream = data.Stream(folder, mixture, cfg.seed, cfg.seq_len, tokenizer, arch.V,
                             not cfg.doc_mask, cfg.packing)
        for source in stream.sources:
            source.verify(me.rank, me.world, splits=("train",))                # heldout verifies its own
        held = data.heldout(folder, tokenizer, arch.V, cfg.seq_len, cfg.eval_rows, across=not cfg.doc_mask)

        # -- model, optimizer, what was done before ---------------------------------------------------------
        with torch.device("meta"):
            model = Model(arch)
        for layer in model.trunk[1]:
            layer.recompute = cfg.recompute
            if cfg.compile:
                layer.body = torch.compile(layer.body)
        choose_trained(model, cfg.train)
        shard(model, me.mesh, DTYPES[cfg.dtype]).to_empty(device=me.device)
        model.tokenizer = tokenizer
        optimizer = make_optimizer(model, cfg)
        parameters = [p for p in model.parameters() if p.requires_grad]
        fingerprint = stream.fingerprint()
        progress = {"step": 0, "skips": 0, "rows": [0] * len(mixture), "fingerprint": fingerprint}
        state = {"model": dict(model.named_parameters()), "progress": progress,
                 "optimizer": {n: optimizer.state[p] for n, p in model.named_parameters()
                               if p in optimizer.state}}
        start = run.latest()
        if start is None:
            init.fill(model)
            start = 0
        elif start > cfg.steps:
            raise InputError(f"--steps={cfg.steps}: {cfg.run} is at step {start} already; give more, or "
                             f"another --run")
        else:
            progress = run.restore(state, start)["progress"]
            if progress["fingerprint"] != fingerprint and not cfg.allow_changed:
                raise InputError(f"--data={cfg.data}: the prepared data changed since {cfg.run} was started; "
                                 f"restore it, or give another --run")
            progress["fingerprint"] = fingerprint
        run.prune(cfg.keep)
        lines = run.rewind(start)
        run.log(f"{cfg.model} {sum(p.numel() for p in model.parameters()):,} parameters | {me.world} x "
                f"{me.device.type} ({cfg.replicate} x {me.world // cfg.replicate}) {cfg.dtype} | "
                f"{kernels_in_use(me.device, DTYPES[cfg.dtype])}{' | layers: torch.compile' * cfg.compile} | "
                f"documents {'masked' if cfg.doc_mask else 'not masked'} | peak {peak / 1e12:.3g} TFLOP/s"
                + (f" | goes on at step {start}" if start else ""))
        curve = [(line["step"], line["eval"]) for line in lines if "eval" in line]
        loss = ([float("nan")] + [line["loss"] for line in lines if "loss" in line])[-1]

        # -- the loop ---------------------------------------------------------------------------------------
        def evaluate(step):
            losses = domain_losses(model, held, cfg, me)
            curve.append((step, losses))
            run.metrics(step=step, eval=losses)
            run.log(f"held-out {step:5d} | " + " | ".join(f"{d} {v:.3f}" for d, v in losses.items()))

        mark, spent, waited = time.perf_counter(), 0.0, 0.0
        micro, rows = micro_rows(cfg, me.world), batches(stream, cfg, me, start)
        for step in range(start, cfg.steps):
            if step == 0 or (cfg.eval_every and step % cfg.eval_every == 0):
                evaluate(step)
            began = time.perf_counter()
            batch = next(rows)
            waited += time.perf_counter() - began
            tokens, targets, docs = (torch.from_numpy(z).to(me.device, non_blocking=True)
                                     for z in (batch.tokens, batch.targets, batch.docs))
            edges = np.diff(np.flatnonzero(np.diff(batch.docs, axis=1, prepend=-1).ravel()),
                            append=batch.docs.size)
            attended = keys_met(edges if cfg.doc_mask else [cfg.seq_len] * len(docs), arch.window)
            counted, attended, *taken = me.sum(int((batch.targets >= 0).sum()), attended,
                                               *np.bincount(batch.source, minlength=len(mixture)))
            progress["rows"] = [a + int(b) for a, b in zip(progress["rows"], taken, strict=True)]

            total = torch.zeros((), device=me.device)
            for i in range(0, len(tokens), micro):
                part = slice(i, i + micro)
                model.set_requires_all_reduce(i + micro >= len(tokens))     # reduce-scatter always
                share = model(tokens[part], docs[part] if cfg.doc_mask else None, targets[part]) / counted
                share.backward()
                total += share.detach()
            reduce_vectors(parameters)
            loss, norm = me.sum(float(total))[0], grad_norm(parameters, me.mesh)

            lr = lr_at(step, cfg)
            if math.isfinite(norm) and math.isfinite(loss):
                if cfg.clip and norm > cfg.clip:
                    for p in parameters:
                        p.grad.mul_(cfg.clip / norm)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                progress["skips"] = 0
            else:                                         # no trace of it in the weights or the moments
                progress["skips"] += 1
                run.log(f"step {step + 1}: loss {loss}, gradient norm {norm}: skipped "
                        f"({progress['skips']} in a row)")
                if progress["skips"] > cfg.max_skips:
                    run.finish()                          # the checkpoint under way is of before
                    raise InputError(f"{progress['skips']} non-finite steps in a row at step {step + 1} "
                                     f"(--max_skips={cfg.max_skips}); the checkpoints before are kept: lower "
                                     f"--lr and go on from one with --allow_changed=True")
            optimizer.zero_grad()
            progress["step"] = step + 1

            # -- log, save ----------------------------------------------------------------------------------
            took = time.perf_counter() - began
            spent += took
            n = cfg.batch * cfg.seq_len
            rate = [flops_per_token(arch, cfg.seq_len, a) * n / took / (peak * me.world)
                    for a in (attended / n, None)]
            memory = torch.cuda.max_memory_allocated() if me.device.type == "cuda" else \
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            run.metrics(step=step + 1, loss=loss, gnorm=norm, lr=lr, tokens=(step + 1) * n,
                        counted=int(counted), tok_s=n / took, mfu=rate[0], mfu_full=rate[1], step_s=took,
                        memory=memory, skips=progress["skips"])
            if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
                planned = data.planned_rows(mixture, cfg.seed, (step + 1) * cfg.batch).tolist()
                if progress["rows"] != planned:
                    raise RuntimeError(f"rows counted {progress['rows']} are not the rows planned {planned}")
                done, left = (step + 1) / cfg.steps, (cfg.steps - step - 1) * spent / (step + 1 - start)
                run.log(f"step {step + 1:5d}/{cfg.steps} {done:6.1%} | loss {loss:.4f} | gnorm {norm:.2f} | "
                        f"lr {lr:.2e} | {human(n / took)} tok/s | mfu {rate[0]:.1%} | "
                        f"mem {memory / 1e9:.1f}G | eta {duration(left)}")
            run.poll()
            if step + 1 == cfg.steps or (cfg.checkpoint_every and (step + 1) % cfg.checkpoint_every == 0):
                state["progress"] = progress
                run.save(state, step + 1, cfg.keep)

        # -- result: save before evaluating -----------------------------------------------------------------
        run.finish()
        save(model, run.path("model"), DTYPES[cfg.export_dtype])
        evaluate(cfg.steps)
        taken = [r * cfg.seq_len for r in progress["rows"]]
        result = {"curve": curve, "loss": loss, "tokens": dict(zip(mixture, taken, strict=True))}
        if me.rank == 0:
            with run.writing("the result"):
                picture(curve, run.path("figures", "retention.png"), f"{cfg.model}, {cfg.mixture}")
                write_atomic(run.path("retention.json"), json.dumps(result, indent=1))
        run.log(f"\n{table(curve)}\nwaited for data {waited:.1f} s of {time.perf_counter() - mark:.0f} s\n"
                f"model: {run.path('model')}   figure: {run.path('figures', 'retention.png')}")
        return result


if __name__ == "__main__":
    launch(main, Config, recipe)
