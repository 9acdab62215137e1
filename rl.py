"""GRPO with verifiable rewards (PRISM, arXiv 2603.17074, section 9 and appendix 15), from a laptop to 128
GPUs.

    python rl.py --model=toy --init=runs/mt/model --out=runs/rl           # two CPU cores, the embedded world
    torchrun --nproc_per_node=8 rl.py --model=granite-3.3-8b --init=runs/mt-granite/model \\
        --prompts=runs/filter/balanced-MCS.jsonl --engine=vllm --out=runs/rl-granite
    python rl.py --model=toy --init=runs/mt/model --replay=runs/rl/samples.jsonl --out=runs/again  # no engine

A step draws prompts, samples a group of responses to each, grades them, turns the rewards of a group into
advantages, packs the responses into rows, updates the policy once and pushes its weights into the engine.
All of it is in this file but for what other stages share: sampling (generate.py), verdicts (verify.py), the
model.

    J   = sum_t w_t [min(pi_old / pi_gen, C) min(rho A, clip(rho, 1 - low, 1 + high) A) - beta KL(pi, pi_ref)]
    rho = pi / pi_old,   A_i = (r_i - mean r) / (std r + eta)                               (paper, section 9)

t runs over the counted tokens of all responses of a step, on all ranks, and w_t is known before the first
pass (1 / their number, as in the paper). So the loss is a plain sum: over whatever micro-batches, rows,
padding and ranks the tokens are spread, the gradients add up to the same.

P prompts, G responses a prompt, N predicted tokens of a row, T tokens of a row with its prompts; log-probs
are in nats.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import presets
from cli import InputError, check_bounds, human, launch, read_jsonl, read_lines, write_atomic
from corpus.prompts import mixes, read_verdicts
from corpus.shards import best_fit
from data import need_sandbox, read_prompts
from engines.contract import known_ids
from engines.push import push
from generate import make_engine
from kernels.logprob import token_logprobs
from model import Init, Model, choose_kernels, kernels_in_use, preset, save
from planning.rollouts import plan, refuse_memory
from runtime import Run, grad_norm, join_ranks, reduce_vectors, reshard, scale_gradients, shard
from suite.intervals import pass_at_k
from verify import grade_batch, repetition, stop_penalty, think_format, timed_out, transient

# -- config --------------------------------------------------------------------------------------------------

Advantage = Literal["std", "mean"]
Loss = Literal["token", "constant", "sequence"]
Estimator = Literal["k1", "k2", "k3"]
Dtype = Literal["bfloat16", "float32"]
Recompute = Literal["off", "full", "selective"]


@dataclass
class Config:
    model: str = "toy"                   # preset, folder or hub id: architecture and recipe (presets/)
    init: str = ""                       # starts from a preset, folder, random:NAME[:SEED], 0.15*A + 0.85*B
    run: str = "runs/rl"                 # run folder, also --out (torchrun keeps --run); resumed if it exists
    prompts: str = "toy"                 # prompts to train on: a .jsonl of data.py; toy = the embedded world
    heldout: str = "toy"                 # prompts to evaluate on: a .jsonl, toy or none
    domains: str = "math+code+science"   # only prompts of these domains are used
    replay: str = ""                     # a samples.jsonl to train from, step by step, instead of sampling
    seed: int = 1                        # of the order of prompts and of the samples
    steps: int = 1000                    # updates of the policy; paper
    batch: int = 64                      # prompts a step over all ranks; paper
    group: int = 16                      # responses a prompt; paper
    context: int = 16_384                # tokens of a prompt and its response at most; paper
    row_tokens: int = 0                  # tokens of a packed row; 0 = context, paper
    temperature: float = 1.0             # paper; top-p is 1 always: less would shift every ratio
    lr: float = 5e-7                     # falls linearly to 0; paper
    warmup: int = 0                      # steps of linear warm-up; the paper gives none
    beta1: float = 0.9                   # paper says AdamW only; these are mid-training's (table 16)
    beta2: float = 0.95
    eps: float = 1e-10
    weight_decay: float = 0.0            # ours, as open-instruct
    clip: float = 1.0                    # global gradient norm; ours, as open-instruct
    updates: int = 1                     # passes over a step's batch; paper: strictly on-policy, 1
    advantage: Advantage = "std"         # std: (r - mean) / (std + eta), paper; mean: r - mean (dr-GRPO)
    eta: float = 1e-4                    # ours, the paper gives none: far below any std of 0 / 1 rewards
    clip_low: float = 0.2                # ours, open-instruct's; inert while on-policy
    clip_high: float = 0.2               # ours, open-instruct's of the paper's time
    tis: float = 2.0                     # C of truncated importance sampling, 0 = off; paper
    beta: float = 0.05                   # weight of the KL term; paper
    kl: Estimator = "k3"                 # its estimator: k1, k2, k3 (ours, open-instruct's default)
    loss: Loss = "token"                 # weights of tokens: token (paper), constant (dr-GRPO), sequence
    ref_alpha: float = 0.6               # reference <- alpha policy + (1 - alpha) reference; open-instruct's
    ref_every: int = 100                 # steps between them, 0 = never; ours: the paper gives none
    ref_offload: bool = False            # keeps the reference in host memory
    format: bool = True                  # scores 0 what is not <think> thoughts </think> answer; paper
    stop_penalty: float = 0.5            # is taken off where a response did not end by itself; size ours
    repetition_penalty: float = 0.5      # is taken off times the share of repeated 4-grams of tokens; ours
    mask_truncated: bool = False         # leaves responses that did not end out of the loss; ours
    refill: int = 0                      # times to sample new prompts for groups all right or all wrong; ours
    # A resumed run samples its first batch anew, from newer weights than before.
    ahead: Literal[0, 1] = 0             # 1: samples the next batch while training, one step off-policy
    engine: str = "torch"                # torch (embedded), vllm
    layout: str = "inside"               # vllm: inside (shares the GPUs), beside (its own: --gpus)
    gpus: str = ""                       # vllm beside: its GPUs, "4,5,6,7"
    tensor_parallel: int = 1             # vllm: GPUs that hold a model together
    gpu_memory: float = 0.4              # vllm: share of a GPU's memory for weights and cache
    max_batch: int = 256                 # responses sampled at a time, a rank
    check: bool = True                   # proves after every push that the weights arrived (generate.push)
    dtype: Dtype = "bfloat16"            # of training passes and engine; masters, reductions are float32
    replicate: int = 1                   # HSDP: copies of the sharded model
    shard: int = 0                       # HSDP: ranks a copy is sharded over; 0 = world / replicate
    recompute: Recompute = "full"        # a layer's activations: off, full, selective
    kernels: str = "auto"                # auto (Triton on GPUs, torch on CPUs), torch, mamba-ssm (its scan)
    eval_every: int = 50                 # steps between evaluations; 0 = only before the first and at the end
    eval_prompts: int = 256              # held-out prompts of each domain at most
    eval_samples: int = 8                # responses to each, at --temperature
    export_at: str = ""                  # steps after which to write run/models/step_N too: "20,40,80"
    checkpoint_every: int = 10           # steps between resumable checkpoints; 0 = only at the end
    keep: int = 2                        # checkpoints kept; 0 = all
    export_dtype: Dtype = "bfloat16"     # of runs/.../model, the hub-format result
    filter: bool = False                 # trains nothing: judges every prompt and writes the paper's mixes
    unsafe_sandbox: bool = False         # runs programs without bubblewrap (see verify.py)
    device: str = "auto"                 # auto, cpu, cuda
    allow_changed: bool = False          # goes on with a run although its config changed
    response_tokens: int = 0             # of a response, as --dry_run reckons; 0 = a quarter of --context
    mfu: float = 0.0                     # MFU that --dry_run reckons with; 0 = 30 to 36 %, on paper
    gpu_gb: float = 0.0                  # GB of a GPU, for --dry_run; 0 = this machine's, without one 80
    dry_run: bool = False                # prints memory, cache, disk and hours, and stops


TOY = dict(steps=50, batch=16, context=256, row_tokens=2048, lr=1e-4, dtype="float32", recompute="off",
           domains="math",               # science wants a longer mid-training, code bubblewrap
           ref_every=20, eval_every=25, eval_prompts=128, eval_samples=4, checkpoint_every=1,
           export_dtype="float32")
FREE = ("replicate", "shard", "row_tokens", "recompute", "kernels", "checkpoint_every", "keep", "device",
        "run", "allow_changed", "ref_offload", "check", "gpus", "gpu_memory", "max_batch", "export_at",
        "response_tokens", "mfu", "gpu_gb", "dry_run")
FIXED = ("model", "prompts", "domains", "seed", "batch", "group")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def export_steps(cfg):
    """The steps of --export_at."""
    return {int(step) for step in cfg.export_at.split(",") if step}


def recipe(model):
    """Defaults that go with --model: the paper's for the seven, a two-core one for the toys."""
    real = {"prompts": "data/mix.jsonl", "heldout": "none"}
    return {"model": model} | (TOY if presets.is_toy(model) else real)


LEAST = {"steps": 1, "batch": 1, "context": 2, "warmup": 0, "lr": 0, "eps": 0, "weight_decay": 0,
         "clip": 0, "updates": 1, "eta": 0, "tis": 0, "clip_low": 0, "clip_high": 0, "beta": 0,
         "ref_alpha": 0, "ref_every": 0, "stop_penalty": 0, "repetition_penalty": 0, "refill": 0,
         "eval_every": 0, "eval_prompts": 1, "eval_samples": 1, "checkpoint_every": 0, "keep": 0,
         "max_batch": 1, "response_tokens": 0, "mfu": 0, "gpu_gb": 0}


def check(cfg, world_size):
    """Refuses what cannot run, naming the flag."""
    preset(cfg.model)
    if cfg.group < 2:
        raise InputError(f"--group={cfg.group} must be a finite number, at least 2: a group of one has "
                         f"nothing to compare with")
    check_bounds(cfg, LEAST)
    if not 0.01 <= cfg.temperature <= 100:
        raise InputError(f"--temperature={cfg.temperature}: RL needs samples that differ, 0.01 to 100; the "
                         f"paper takes 1")
    for name in ("beta1", "beta2", "gpu_memory"):
        if not 0 <= getattr(cfg, name) < 1:
            raise InputError(f"--{name}={getattr(cfg, name)} must be in [0, 1)")
    if cfg.row_tokens and cfg.row_tokens < cfg.context:
        raise InputError(f"--row_tokens={cfg.row_tokens} does not hold a text of --context={cfg.context}")
    if cfg.warmup >= cfg.steps:
        raise InputError(f"--warmup={cfg.warmup} leaves nothing of --steps={cfg.steps}")
    if cfg.ref_alpha > 1:
        raise InputError(f"--ref_alpha={cfg.ref_alpha}: give a share, up to 1")
    if cfg.batch % world_size:
        raise InputError(f"--batch={cfg.batch} prompts do not divide by {world_size} ranks; take a multiple")
    for step in cfg.export_at.split(",") if cfg.export_at else ():
        if not (step.isdecimal() and 0 < int(step) <= cfg.steps):
            raise InputError(f"--export_at={cfg.export_at}: give steps of 1 to --steps={cfg.steps}, as in "
                             f"20,40")
    if cfg.ahead and cfg.engine == "vllm" and cfg.layout == "inside" and cfg.tensor_parallel > 1:
        raise InputError(f"--ahead=1 with --tensor_parallel={cfg.tensor_parallel} inside the trainer: two "
                         f"threads would talk between the same GPUs; take --layout=beside, or --ahead=0")
    unknown = set(cfg.domains.split("+")) - {"math", "code", "science"}
    if unknown:
        raise InputError(f"--domains={cfg.domains}: {min(unknown)!r} is not one of math, code, science")


# -- rewards to advantages ---------------------------------------------------------------------------------

def advantages(rewards: torch.Tensor, eta: float = 1e-4, mode: str = "std",
               graded: torch.Tensor | None = None) -> torch.Tensor:
    """rewards (P, G) to advantages (P, G) fp32. "std": (r - mean) / (std + eta), paper; "mean": r - mean
    (dr-GRPO: dividing favours prompts that are nearly always, or nearly never, solved).

    The standard deviation is the population's, as in open-instruct, with which the paper trained: 0 / 1
    rewards at pass rate q give sqrt((1 - q) / q) and -sqrt(q / (1 - q)), whatever G. The paper names no eta;
    1e-4 is ours, too small to matter beside 0 / 1 rewards. All G responses count here, also those whose
    tokens the loss leaves out, but those that are not `graded` (P, G; None = all are), whose advantage is 0.
    A group of equal rewards gets exactly 0."""
    if graded is None:
        graded = torch.ones_like(rewards, dtype=torch.bool)
    r = torch.where(graded, rewards.double(), 0.0)
    n = graded.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(graded, r - r.sum(1, keepdim=True) / n, 0.0)
    if mode == "std":
        std = (centred.square().sum(1, keepdim=True) / n).sqrt()
        centred = centred / (std + eta)
    elif mode != "mean":
        raise InputError(f"advantages: mode {mode!r} is not one of std, mean")
    # The mean of equal rewards may be rounded off them.
    highest = torch.where(graded, r, -math.inf).amax(1, keepdim=True)
    lowest = torch.where(graded, r, math.inf).amin(1, keepdim=True)
    equal = highest <= lowest                             # also where none is graded
    return torch.where(equal, 0.0, centred).float()


def token_weights(lengths: torch.Tensor, kind: str = "token", max_new_tokens: int = 0) -> torch.Tensor:
    """What a token of each response weighs in the loss: w_t. lengths: counted tokens of every response of the
    step, all ranks' together, any shape, 0 for one that is masked (truncated, say). That shape, fp32.

    "token": 1 / all counted tokens (paper). "constant": 1 / (responses x max_new_tokens), masked responses
    included (dr-GRPO): a token weighs the same at every step. "sequence": 1 / (unmasked responses x own
    length), the mean of their means. With nothing to count all weights are 0."""
    n = lengths.double()
    if kind == "token":
        weight = 1 / n.sum().expand_as(n)
    elif kind == "constant":
        weight = torch.full_like(n, 1 / max(n.numel() * max_new_tokens, 1))
    elif kind == "sequence":
        weight = 1 / (n * (n > 0).sum())
    else:
        raise InputError(f"token_weights: kind {kind!r} is not one of token, constant, sequence")
    return torch.where(n > 0, weight, 0.0).float()


# -- the loss ----------------------------------------------------------------------------------------------

KL = get_args(Estimator)


def kl_estimate(logp: torch.Tensor, logp_ref: torch.Tensor, kind: str) -> torch.Tensor:
    """KL(pi, pi_ref) estimated token by token from samples of pi; all of one shape. x = logp - logp_ref,
    clamped to +-40 so that exp stays finite (as open-instruct does). "k1": x, unbiased, of either sign (as a
    loss its gradient is zero on average); "k2": x^2 / 2; "k3": e^-x - 1 + x, unbiased, never negative."""
    x = (logp - logp_ref).clamp(-40, 40)
    if kind == "k1":
        return x
    if kind == "k2":
        return x.square() / 2
    if kind == "k3":
        return torch.expm1(-x) + x
    raise InputError(f"kl_estimate: kind {kind!r} is not one of {', '.join(KL)}")


def policy_ratio(logp, logp_old):
    """rho = pi / pi_old. It is clamped far beyond any clip: with A < 0 nothing clips a large ratio, and inf
    must not come in."""
    return (logp - logp_old).clamp(-20, 20).exp()


def importance_ratio(logp_old, logp_gen):
    """pi_old / pi_gen, the trainer's probability of a sampled token over the engine's, before the cap C."""
    return (logp_old - logp_gen).clamp(-10, 10).exp()


def grpo_loss(logp: torch.Tensor, logp_old: torch.Tensor, logp_gen: torch.Tensor,
              logp_ref: torch.Tensor | None, advantages: torch.Tensor, mask: torch.Tensor, cfg,
              weights: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A micro-batch's share of the step's loss, -J, and of its metrics (see `grpo_metrics`). Inputs are
    (N, T), or (T) of flat tokens, or broadcast to that; T may be 0. Only logp gets a gradient.

    logp: the policy's log-probs; logp_old: those before the step's first update (on-policy: logp itself);
    logp_gen: the sampler's; logp_ref: the reference's, or None if beta is 0 (k1, k2, k3 then read 0).
    advantages: (N, 1) or as logp. mask: which tokens count; where they do not the others may be anything,
    even NaN. weights: of each token, from `token_weights` for a batch that comes in parts; None = this is the
    whole step, a response a row. cfg: loss (without weights); clip_low, clip_high; tis: C, 0 = no correction;
    beta, kl: "k1", "k2", "k3" (outside of the correction, as in the paper).

    Left out of GRPO as it was published (DeepSeekMath, arXiv 2402.03300): the mean over each response's own
    tokens, since it makes a token of a long response weigh less (--loss=sequence has it). There is no critic
    (the group's mean is the baseline), no entropy bonus and no mask of whole responses that drifted from the
    sampler (study/ablations/sequence-mask.diff): the paper has none of them."""
    counted = (mask > 0).expand_as(logp)
    if weights is None:
        weights = token_weights(counted.sum(-1), cfg.loss, logp.shape[-1])[..., None]
    if logp_ref is None:
        logp_ref = logp
    # Tokens that do not count read 0 in all four, for NaN * 0 would be NaN.
    logp_old, logp_gen, logp_ref = (torch.where(counted, x.detach(), 0.0)
                                    for x in (logp_old, logp_gen, logp_ref))
    logp = torch.where(counted, logp, 0.0)

    ratio = policy_ratio(logp, logp_old)                                  # rho
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)            # clip(rho, 1 - low, 1 + high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)   # min(rho A, clip(rho) A)
    if cfg.tis:
        importance = importance_ratio(logp_old, logp_gen)                 # pi_old / pi_gen
        surrogate = importance.clamp(max=cfg.tis) * surrogate             # min(pi_old / pi_gen, C) min(...)
    kl = kl_estimate(logp, logp_ref, cfg.kl)                              # KL(pi, pi_ref)
    objective = weights * (surrogate - cfg.beta * kl)                     # w_t [...]
    loss = -torch.where(counted, objective, 0.0).sum()                    # -J
    return loss, grpo_metrics(logp, logp_old, logp_gen, logp_ref, advantages, counted, cfg)


@torch.no_grad()
def grpo_metrics(logp, logp_old, logp_gen, logp_ref, advantages, counted, cfg) -> dict[str, torch.Tensor]:
    """What to watch of a micro-batch: sums over its counted tokens, 0-d float64, and the maxima called _max.
    `pool` those of several micro-batches, then take `averages`. Inputs as in `grpo_loss`, but finite.

    ratio: rho. clip_low, clip_high: where clipping took the gradient. tis: pi_old / pi_gen before the cap, 1
    on average over samples of pi_gen; tis_cut: where it was capped. k1, k2, k3: policy to reference.
    mismatch: |log pi_old - log pi_gen|; mismatch_kl: KL(pi_gen, pi_old), by k3."""
    ratio = policy_ratio(logp, logp_old)
    importance = importance_ratio(logp_old, logp_gen)
    terms = {"tokens": counted, "ratio": ratio}
    terms["clip_low"] = (advantages < 0) & (ratio < 1 - cfg.clip_low)
    terms["clip_high"] = (advantages > 0) & (ratio > 1 + cfg.clip_high)
    terms["tis"] = importance
    terms["tis_cut"] = importance > (cfg.tis or math.inf)
    for kind in KL:
        terms[kind] = kl_estimate(logp, logp_ref, kind)
    terms["mismatch"] = (logp_old - logp_gen).abs()
    terms["mismatch_kl"] = kl_estimate(logp_gen, logp_old, "k3")
    metrics = {}
    for name, x in terms.items():
        metrics[name] = torch.where(counted, x, 0).sum(dtype=torch.float64)
    for name in ("ratio", "tis"):
        values = torch.where(counted, terms[name], 0).double()
        # An empty row has no maximum.
        metrics[f"{name}_max"] = values.amax() if values.numel() else values.sum()
    return metrics


def pool(parts: list[dict]) -> dict[str, float]:
    """The metrics of several micro-batches, or of several ranks, as one's. They come to the host by one
    transfer, and as numbers: a tensor that ranks tell each other would unpickle on the sender's device."""
    rows = [torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in part.values()]) for part in parts]
    columns = zip(*torch.stack(rows).tolist(), strict=True)
    pooled = {}
    for name, values in zip(parts[0], columns, strict=True):
        combine = max if name.endswith("_max") else sum
        pooled[name] = combine(values)
    return pooled


def averages(pooled: dict) -> dict[str, float]:
    """Means over the counted tokens, and the maxima, as numbers; all 0 if no token counted."""
    tokens = max(float(pooled["tokens"]), 1)
    means = {}
    for name, x in pooled.items():
        means[name] = float(x) if name.endswith("_max") else float(x) / tokens
    del means["tokens"]
    return means


# -- rows --------------------------------------------------------------------------------------------------

def pack(lengths, capacity: int, world: int = 1) -> list[list[list[int]]]:
    """The rows of each of `world` ranks, as lists of indices into lengths (tokens of prompt and response,
    1 .. capacity). Every rank gets equally many, for a row is a pass of all ranks; empty ones fill up.

    Responses go, longest first, to the rank with the fewest tokens so far, then by best fit into its rows: no
    rank gets more than the mean and one longest response. (Dealing out full rows instead would give one of 4
    ranks twice the tokens of the others where there are 5.) A rank's rows are in order of falling length, so
    that ranks pass over like ones together."""
    lengths = [int(n) for n in lengths]
    for i, n in enumerate(lengths):
        if not 1 <= n <= capacity:
            raise InputError(f"pack: response {i} of {len(lengths)} has {n:,} tokens with its prompt, a row "
                             f"holds 1 to {capacity:,}: give longer rows, or fewer new tokens")

    def size(row):
        return sum(lengths[i] for i in row)

    # Every response goes to a rank.
    shares = [[] for _ in range(world)]
    load = [0] * world
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += lengths[i]
    # The responses of each rank go into its rows.
    packed = []
    for share in shares:
        rows = defaultdict(list)
        bins = best_fit([lengths[i] for i in share], capacity)
        for i, row in zip(share, bins.tolist(), strict=True):
            rows[row].append(i)
        packed.append(sorted(rows.values(), key=size, reverse=True))
    # Empty rows make all ranks' numbers of rows equal.
    most = max(map(len, packed))
    for rows in packed:
        while len(rows) < most:
            rows.append([])
    return packed


class Row(NamedTuple):
    """Responses packed into one row of the model: T tokens, N of them predicted. An empty row is one token of
    which nothing is predicted."""
    tokens: torch.Tensor                 # (1, T) int64: prompts and responses, one after the other
    docs: torch.Tensor                   # (1, T) int64: a number for each response; none sees another
    positions: torch.Tensor              # (N) int64: where in T each response token is predicted
    targets: torch.Tensor                # (N) int64: the response tokens
    owner: torch.Tensor                  # (N) int64: whose they are, an index into the step's responses
    gen: torch.Tensor                    # (N) fp32: their log-probs when they were sampled
    lengths: list | None = None          # tokens of each response with its prompt; None: docs say it


def row_tensors(indices, responses, device) -> Row:
    """The Row of the responses at `indices`, on a device."""
    tokens, docs, positions, targets, owner, gen, lengths = ([] for _ in Row._fields)
    for i in indices:
        response = responses[i]
        start = len(tokens)
        tokens += response.prompt_ids
        tokens += response.tokens.tolist()
        lengths.append(len(tokens) - start)
        docs += [i] * lengths[-1]
        # A token is predicted from the position before it.
        positions += range(start + len(response.prompt_ids) - 1, len(tokens) - 1)
        targets += response.tokens.tolist()
        owner += [i] * len(response.tokens)
        gen += response.gen.tolist()

    def integers(values):
        return torch.tensor(values, dtype=torch.int64, device=device)

    gen = torch.tensor(gen, dtype=torch.float32, device=device)
    return Row(integers([tokens or [0]]), integers([docs or [0]]), integers(positions), integers(targets),
               integers(owner), gen, lengths or [1])


def make_rows(responses, cfg, ranks) -> list[Row]:
    """This rank's rows of a step; equally many on every rank."""
    lengths = [len(r.prompt_ids) + len(r.tokens) for r in responses]
    packed = pack(lengths, cfg.row_tokens or cfg.context, ranks.world)
    return [row_tensors(indices, responses, ranks.device) for indices in packed[ranks.rank]]


def counted_tokens(response, cfg):
    """How many tokens of a response count in the loss: none of one that could not be graded, or of a
    truncated one under --mask_truncated."""
    truncated = response.finish != "stop"
    masked = not response.graded or truncated and cfg.mask_truncated
    return 0 if masked else len(response.tokens)


# -- the reference -----------------------------------------------------------------------------------------

def local(p):
    """This rank's shard of a parameter, as a plain tensor on the same memory."""
    return p.to_local() if isinstance(p, DTensor) else p


@torch.no_grad()
def polyak(reference, policy, alpha: float) -> None:
    """reference <- alpha policy + (1 - alpha) reference, in place: the paper's soft update; it names no rate.
    Two iterables of tensors in one order, of one shape; DTensors shard by shard, each on the reference's
    device. Keep the reference in fp32: bf16 would round changes of under 0.4 % away."""
    for r, p in zip(reference, policy, strict=True):
        r = local(r)
        p = local(p)
        if r.shape != p.shape:
            raise ValueError(f"polyak: a tensor of shape {tuple(p.shape)} for one of {tuple(r.shape)}")
        r.lerp_(p.to(r.device, r.dtype), alpha)


def copy_weights(model, offload):
    """{name: this rank's shard} of all weights, in host memory if offloaded: the first reference."""
    reference = {}
    for name, p in model.named_parameters():
        weight = local(p).detach().clone()
        reference[name] = weight.cpu() if offload else weight
    return reference


@torch.no_grad()
def swap_weights(reference, model):
    """Swaps the weights of reference and model, in place."""
    for name, p in model.named_parameters():
        weight = local(p)
        policy = weight.clone()
        weight.copy_(reference[name])
        reference[name].copy_(policy)


@contextlib.contextmanager
def reference_weights(reference, model):
    """Within it the model has the reference's weights: the reference runs on the policy's memory."""
    swap_weights(reference, model)
    yield
    swap_weights(reference, model)


def reference_state(reference, model):
    """The reference as a checkpoint wants it: sharded as the parameters are, on their device."""
    state = {}
    for name, p in model.named_parameters():
        weight = reference[name].to(p.device)
        if isinstance(p, DTensor):
            weight = DTensor.from_local(weight, p.device_mesh, p.placements, run_check=False, shape=p.shape,
                                        stride=p.stride())
        state[name] = weight
    return state


# -- prompts -------------------------------------------------------------------------------------------------

@functools.lru_cache(2)
def epoch_order(epoch, count, seed):
    """All prompts, in this epoch's order: a pure function, so that the state to save is one integer."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def draw_prompts(cursor, count, wanted, seed):
    """Indices of the next prompts, `wanted` of `count`, and the cursor behind them: a place in all epochs'
    orders in a row."""
    indices = []
    while len(indices) < wanted:
        order = epoch_order(cursor // count, count, seed)
        indices.append(int(order[cursor % count]))
        cursor += 1
    return indices, cursor


# -- rollouts ------------------------------------------------------------------------------------------------

@dataclass
class Response:
    """One response and what became of it."""
    prompt: int                          # index of its record
    prompt_ids: list                     # tokens of the prompt
    tokens: np.ndarray                   # of the response, int32
    gen: np.ndarray                      # the engine's log-probs of its tokens, fp32
    finish: str                          # "stop", or why it did not end by itself
    text: str
    correct: bool = False
    verdict: str = ""                    # the grader's reason
    terms: dict = field(default_factory=dict)
    reward: float = 0.0                  # sum of the terms
    logp: np.ndarray = None              # the trainer's log-probs, where it was trained on

    @property
    def graded(self):
        """Whether it has a verdict: not where the machine failed the grader, even when asked again."""
        return not transient(self.verdict)


class Rollouts(NamedTuple):
    """What was sampled for a step, the same on every rank. A group is a list of cfg.group responses to one
    prompt."""
    groups: list                         # those to train on, cfg.batch at most
    sampled: list                        # all of them
    seconds: dict                        # what sampling and grading took on this rank
    cursor: int                          # place in the order of prompts that the step has come to


def judge(responses, records, cfg):
    """Fills in verdicts and rewards, term by term. correct: 1 or 0, what groups are filtered on. format:
    takes it back where the form is not kept. stop and repetition: penalties, 0 or less. Their sum is the
    reward, which says nothing of a response that is not `graded`."""
    answers = []
    for r in responses:
        record = records[r.prompt]
        answers.append((record["domain"], r.text, record["truth"], r.finish))
    verdicts = grade_batch(answers, unsafe_sandbox=cfg.unsafe_sandbox, again=1)
    for r, verdict in zip(responses, verdicts, strict=True):
        r.correct = verdict.correct
        r.verdict = verdict.reason
        malformed = cfg.format and not think_format(r.text)
        r.terms = {"correct": float(r.correct),
                   "format": -1.0 if r.correct and malformed else 0.0,
                   "stop": stop_penalty(r.finish, cfg.stop_penalty),
                   "repetition": -cfg.repetition_penalty * repetition(r.tokens)}
        r.reward = sum(r.terms.values())
    return responses


def sample(engine, records, indices, keys, n, cfg, ranks):
    """n responses to each of the prompts at `indices`, flat, on the rank that samples them: each takes its
    share. Their noise depends on the prompt and its key, a tuple, not on the number of ranks."""
    share = slice(ranks.rank, None, ranks.world)
    indices = indices[share]
    prompts = [records[i]["ids"] for i in indices]
    keys = [(*key, records[i]["id"]) for i, key in zip(indices, keys[share], strict=True)]
    groups = engine.generate(prompts, n, max_new_tokens=cfg.context, seed=cfg.seed,
                             temperature=cfg.temperature, keys=keys)
    responses = []
    for i, prompt, group in zip(indices, prompts, groups, strict=True):
        for s in group:
            tokens = np.array(s.tokens, dtype=np.int32)
            gen = np.array(s.logprobs, dtype=np.float32)
            responses.append(Response(i, prompt, tokens, gen, s.finish_reason, s.text))
    return responses


def all_gather(items, ranks):
    """Lists of all ranks, joined in their order, on every rank."""
    lists = [None] * ranks.world
    dist.all_gather_object(lists, items, group=ranks.cpu_group)
    return [item for items in lists for item in items]


class Timer:
    """Seconds by what they went to."""

    def __init__(self):
        self.seconds = Counter()
        self.last = time.perf_counter()

    def lap(self, name):
        """Adds the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] += now - self.last
        self.last = now


def has_signal(group):
    """Whether a group can teach something: some of it is right, some wrong. Correctness decides, for shaping
    terms would keep groups that teach form alone."""
    verdicts = [r.correct for r in group if r.graded]
    return 0 < sum(verdicts) < len(verdicts)


def sample_step(step, cursor, engine, records, cfg, ranks) -> Rollouts:
    """The rollouts of a step, on every rank. Groups all right or all wrong are left out, and replaced by
    groups of new prompts up to --refill times."""
    groups, sampled = [], []
    timer = Timer()
    for attempt in range(cfg.refill + 1):
        # Every rank calls the engine, so the prompts are a multiple of the ranks.
        missing = cfg.batch - len(groups)
        wanted = math.ceil(missing / ranks.world) * ranks.world
        indices, cursor = draw_prompts(cursor, len(records), wanted, cfg.seed)
        keys = [("train", step, attempt, place) for place in range(wanted)]
        responses = sample(engine, records, indices, keys, cfg.group, cfg, ranks)
        timer.lap("generate_s")
        responses = judge(responses, records, cfg)
        timer.lap("verify_s")
        responses = all_gather(responses, ranks)
        for start in range(0, len(responses), cfg.group):
            group = responses[start:start + cfg.group]
            sampled.append(group)
            if has_signal(group):
                groups.append(group)
        if len(groups) >= cfg.batch:
            break
    return Rollouts(groups[:cfg.batch], sampled, timer.seconds, cursor)


class Sampler:
    """Gives each step its rollouts, and the engine the policy's weights.

    As a rule a step's rollouts are sampled when they are asked for; then the engine sleeps while the policy
    trains, and gets the new weights. With --ahead=1 a thread samples the next step's rollouts during the
    update, from weights that lack it. What ranks exchange in the thread has a process group of its own. The
    prompts' cursor moves when rollouts are handed out, so that no checkpoint skips those still under way."""

    def __init__(self, engine, model, records, progress, cfg, ranks):
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        self.ranks = dataclasses.replace(ranks, cpu_group=group)
        self.engine = engine
        self.model = model
        self.records = records
        self.progress = progress
        self.cfg = cfg
        self.thread = ThreadPoolExecutor(1)
        self.future = None                                # the next step's rollouts, being sampled
        self.push_gap = None                              # the last push's proof: a difference in nats

    def push(self):
        """Moves the policy's weights into the engine, which must be idle."""
        self.push_gap = push(self.engine, self.model, check=self.cfg.check)

    def _sample(self, step):
        cursor = self.progress["cursor"]
        return sample_step(step, cursor, self.engine, self.records, self.cfg, self.ranks)

    def next(self, step, timer) -> Rollouts:
        """The step's rollouts. The following step's are begun, or the engine goes to sleep."""
        rollouts = self.future.result() if self.future else self._sample(step)
        self.future = None
        self.progress["cursor"] = rollouts.cursor
        timer.lap("wait_s")
        if self.cfg.ahead and step + 1 < self.cfg.steps:
            self.push()
            self.future = self.thread.submit(self._sample, step + 1)
        else:
            self.engine.sleep()
        timer.lap("push_s")
        return rollouts

    def after_update(self, timer):
        """Gives the engine the new weights, unless it is sampling ahead."""
        if not self.future:
            self.push()
        timer.lap("push_s")

    def before_evaluation(self):
        """Waits until the engine is idle, and gives it the newest weights."""
        if self.future:
            self.future.result()
            self.push()

    def close(self):
        self.engine.close()


class Replay:
    """Gives each step the rollouts of a file, as Sampler does, without an engine. steps: of `read_replay`."""
    engine = None
    push_gap = None

    def __init__(self, steps, cfg):
        self.steps = steps
        self.cfg = cfg

    def next(self, step, timer) -> Rollouts:
        sampled = self.steps[step + 1]
        groups = [group for group in sampled if has_signal(group)]
        timer.lap("push_s")
        return Rollouts(groups[:self.cfg.batch], sampled, {}, 0)

    def push(self):
        pass

    def after_update(self, timer):
        timer.lap("push_s")

    def close(self):
        pass


def replayed_response(line, index, records, known) -> Response:
    """A line of samples.jsonl as a Response; KeyError, TypeError, ValueError or OverflowError if it is none.
    index: {id: place in records}."""
    prompt = index[line["id"]]
    tokens = np.array(line["tokens"], dtype=np.int32)
    gen = np.array(line["gen"], dtype=np.float32)
    r = Response(prompt, records[prompt]["ids"], tokens, gen, line["finish"], line["text"], line["correct"],
                 line["verdict"], line["terms"], float(line["reward"]))
    well_formed = tokens.ndim == 1 and tokens.shape == gen.shape and isinstance(r.terms, dict)
    finite = np.isfinite(gen).all() and math.isfinite(r.reward)
    if not (well_formed and finite and tokens.size and 0 <= tokens.min() <= tokens.max() < known):
        raise ValueError(f"{tokens.size} tokens and {gen.size} log-probs, which must be as many finite "
                         f"numbers, of ids from 0 to {known - 1}; reward {r.reward}")
    return r


def read_replay(path, records, known, cfg):
    """{step: groups} of a samples.jsonl, graded as it says. known: how many ids the model can have said."""
    index = {record["id"]: i for i, record in enumerate(records)}
    steps = defaultdict(dict)
    for n, _, line in read_jsonl(path, "replay"):
        try:
            response = replayed_response(line, index, records, known)
            group = steps[int(line["step"])].setdefault(line["group"], [])
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise InputError(f"--replay: {path}, line {n} is no rollout of these prompts ({e!r}); give the "
                             f"--prompts and --model that its run had") from None
        group.append(response)
    for step, groups in steps.items():
        for name, group in groups.items():
            prompts = len({r.prompt for r in group})
            if len(group) != cfg.group or prompts > 1:
                raise InputError(f"--replay: {path}, step {step}, group {name} has {len(group)} responses to "
                                 f"{prompts} prompts, not --group={cfg.group} to one: give the --group that "
                                 f"its run had, and the file of one run")
    if not steps:
        raise InputError(f"--replay={path} holds no responses")
    return {step: list(groups.values()) for step, groups in steps.items()}


def open_replay(start, run, records, known, cfg) -> Replay:
    """The rollouts of --replay for the steps from `start` on."""
    if os.path.realpath(cfg.replay) == os.path.realpath(run.path("samples.jsonl")):
        raise InputError(f"--replay={cfg.replay} is what this run writes; give another --run")
    steps = read_replay(cfg.replay, records, known, cfg)
    for step in range(start + 1, cfg.steps + 1):
        if step not in steps:
            raise InputError(f"--replay={cfg.replay} has no step {step}: give --steps of at most {step - 1}")
    return Replay(steps, cfg)


# -- model, optimizer ----------------------------------------------------------------------------------------

def make_policy(init, tokenizer, cfg, ranks):
    """The model with its first weights, sharded over the ranks."""
    with torch.device("meta"):
        model = Model(init.arch)
    for layer in model.trunk.layers:
        layer.recompute = cfg.recompute
    shard(model, ranks.mesh, DTYPES[cfg.dtype]).to_empty(device=ranks.device)
    model.tokenizer = tokenizer
    init.fill(model)
    return model


def row_logprobs(model, row, temperature):
    """(logp, entropy) (N) of a row's response tokens; only their positions meet the head."""
    known = known_ids(model.arch, model.tokenizer)

    def head(h, weight, scale):
        return token_logprobs(h[row.positions], weight, row.targets, scale, temperature, known=known)

    return model(row.tokens, row.docs, head, row.lengths)


@torch.no_grad()
def score_rows(model, rows, temperature):
    """Log-probs of the responses of all rows, for the weights as they are."""
    scores = []
    for row in rows:
        logp, _ = row_logprobs(model, row, temperature)
        scores.append(logp)
    reshard(model)                                        # the next pass gathers what the weights then are
    return scores


def make_optimizer(model, cfg):
    """AdamW; decay on matrices only. State exists from the start, so that a checkpoint can be loaded into
    it."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    betas = (cfg.beta1, cfg.beta2)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True)
    for p in model.parameters():
        state = optimizer.state[p]
        state["step"] = torch.zeros((), device=p.device)
        state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg_sq"] = torch.zeros_like(p)
    return optimizer


def lr_at(step, cfg):
    """Learning rate of step 0, 1, ...: linear warm-up, then linear decay to 0 after the last (paper)."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return cfg.lr * (cfg.steps - step) / (cfg.steps - cfg.warmup)


def refuse_non_finite(step, loss, norm):
    """InputError where an update would spoil the weights."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(f"step {step + 1}: loss {loss}, gradient norm {norm}: not finite; the checkpoints "
                         f"before are kept: lower --lr and go on with --allow_changed=True")


def optimizer_step(optimizer, parameters, lr, norm, clip):
    """AdamW with the gradients as they stand, whose global norm is `norm`, clipped to `clip` (0 = not)."""
    if clip and norm > clip:
        scale_gradients(parameters, clip / norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


# -- evaluation ----------------------------------------------------------------------------------------------

def mean(values):
    """The mean of any numbers; 0 of none."""
    values = list(values)
    return sum(values) / max(1, len(values))


def evaluate(step, engine, held, progress, cfg, ranks):
    """Pass rates on held-out prompts by domain, unbiased pass@k, and the solvability frontier: of the prompts
    that no response solved before the first step, how many some response solves now, and their pass
    rate. Responses that could not be graded count as wrong; "ungraded" is their number."""
    n = cfg.eval_samples
    keys = [("eval", step)] * len(held)
    responses = sample(engine, held, range(len(held)), keys, n, cfg, ranks)
    responses = judge(responses, held, cfg)
    lengths = all_gather([len(r.tokens) for r in responses], ranks)
    graded = all_gather([r.graded for r in responses], ranks)
    solved = Counter(all_gather([r.prompt for r in responses if r.correct], ranks))

    # Pass rates of each domain's prompts.
    result = {}
    for domain in sorted({record["domain"] for record in held}):
        counts = [solved[i] for i, record in enumerate(held) if record["domain"] == domain]
        result[domain] = {f"pass@{k}": mean(pass_at_k(n, c, k) for c in counts) for k in sorted({1, n})}

    # The frontier's prompts are those that the first evaluation found unsolved.
    if progress["unsolved"] is None:
        progress["unsolved"] = [record["id"] for i, record in enumerate(held) if not solved[i]]
    unsolved = set(progress["unsolved"])
    counts = [solved[i] for i, record in enumerate(held) if record["id"] in unsolved]
    result["frontier"] = {"unsolved": len(counts), "solved": sum(c > 0 for c in counts),
                          "pass": sum(counts) / (n * max(1, len(counts)))}
    result["pass"] = solved.total() / (n * len(held))
    result["length"] = mean(lengths)
    result["ungraded"] = graded.count(False)
    return result


# -- the difficulty filter -----------------------------------------------------------------------------------

FILTER_FLAGS = ("init", "model", "prompts", "seed", "group", "context", "temperature", "dtype", "engine")


def claim_filter(cfg):
    """Writes run/filter.json, the flags that verdicts depend on; InputError if the folder has verdicts made
    with others."""
    path = os.path.join(cfg.run, "filter.json")
    flags = {name: getattr(cfg, name) for name in FILTER_FLAGS}
    if os.path.exists(path):
        with open(path) as f:
            old = json.load(f)
        for name, value in flags.items():
            if value != old.get(name):
                raise InputError(f"--{name}={value}: {cfg.run} has verdicts made with {old.get(name)}; give "
                                 f"another --run")
    write_atomic(path, json.dumps(flags, indent=1))


def judged_before(path):
    """The ids of the prompts that have verdicts; a line that a kill cut short is taken out of the file."""
    if not os.path.exists(path):
        return set()
    lines = read_lines(path)
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
    return {line["id"] for line in lines}


def append_verdicts(path, responses, records):
    """A line a prompt: which of its responses are right. Returns how many prompts got no line, as responses
    to them could not be graded."""
    verdicts = defaultdict(list)
    ungraded = set()
    for r in responses:
        name = records[r.prompt]["id"]
        verdicts[name].append(bool(r.correct))
        if not r.graded:
            ungraded.add(name)
    with open(path, "a") as f:
        for name, values in verdicts.items():
            if name not in ungraded:
                f.write(json.dumps({"id": name, "verdicts": values}) + "\n")
    return len(ungraded)


def write_mixes(path, records, cfg):
    """The paper's four mixes by the verdicts at `path`, into the run folder. Returns {file: prompts}."""
    passes = read_verdicts(path, cfg.group)
    written = {}
    for kind in ("unbalanced", "balanced"):
        for domains in ("MC", "MCS"):
            mix = mixes(records, passes, kind, domains, cfg.seed)
            file = os.path.join(cfg.run, f"{kind}-{domains}.jsonl")
            for record in mix:                            # they are copies
                del record["ids"]
            write_atomic(file, "".join(json.dumps(record) + "\n" for record in mix))
            written[file] = len(mix)
            print(f"{file}: {len(mix):,} of {len(records):,} prompts")
    return written


def difficulty(cfg):
    """How many of cfg.group responses to each prompt are right, and the paper's mixes by it (section 9):
    writes run/verdicts.jsonl, which data.py mix reads too, and run/{unbalanced,balanced}-{MC,MCS}.jsonl.
    Killed, it goes on with the prompts that have no verdict yet. Returns {file: prompts}."""
    with join_ranks(cfg.device, cfg.replicate, cfg.shard) as ranks:
        with ranks.first_on_node():
            init = Init(cfg.init or cfg.model)
        records, _ = read_prompts(cfg.prompts, "prompts", cfg.domains.split("+"), init.tokenizer(),
                                  cfg.context)
        need_sandbox(records, cfg)
        os.makedirs(cfg.run, exist_ok=True)
        path = os.path.join(cfg.run, "verdicts.jsonl")
        judged = set()
        if ranks.rank == 0:
            claim_filter(cfg)
            judged = judged_before(path)
        judged = ranks.agree(judged)
        pending = [i for i, record in enumerate(records) if record["id"] not in judged]
        engine = make_engine(cfg.init or cfg.model, cfg, ranks)

        # A batch at a time is sampled, judged and written.
        ungraded = 0
        with tqdm(total=len(records), initial=len(records) - len(pending), unit="prompt",
                  disable=None if ranks.rank == 0 else True) as bar:
            for start in range(0, len(pending), cfg.batch):
                indices = pending[start:start + cfg.batch]
                keys = [("filter",)] * len(indices)
                responses = sample(engine, records, indices, keys, cfg.group, cfg, ranks)
                responses = all_gather(judge(responses, records, cfg), ranks)
                if ranks.rank == 0:
                    ungraded += append_verdicts(path, responses, records)
                bar.update(len(indices))
        engine.close()
        if ungraded:
            print(f"{ungraded} prompts have no verdicts: the machine had no room or time to grade responses "
                  f"to them; the same command judges them")
        written = write_mixes(path, records, cfg) if ranks.rank == 0 else None
        return ranks.agree(written)


# -- what a run writes ---------------------------------------------------------------------------------------

def open_samples(run, progress, ranks):
    """samples.jsonl, cut back to what the checkpoint knew of."""
    if ranks.rank:
        return None
    with run.writing("samples.jsonl"):
        f = open(run.path("samples.jsonl"), "ab")
    if f.tell() < progress["bytes"]:
        raise InputError(f"{run.path('samples.jsonl')} has {f.tell():,} bytes, it had {progress['bytes']:,} "
                         f"when the checkpoint was made: put the file back, or start in another --run")
    f.truncate(progress["bytes"])
    f.seek(progress["bytes"])
    return f


def keep_logprobs(responses, rows, logps):
    """The trainer's log-probs of the rows, to the responses they belong to."""
    for row, logp in zip(rows, logps, strict=True):
        logp = logp.float().cpu().numpy()
        owner = row.owner.cpu().numpy()
        for i in np.unique(owner):
            responses[i].logp = logp[owner == i]


def sample_line(step, group, response, records):
    """A line of samples.jsonl. Log-probs are rounded to 1e-6; "old" is null where it was not trained on."""
    record = records[response.prompt]
    old = None
    if response.logp is not None:
        old = [round(x, 6) for x in response.logp.tolist()]
    line = {"step": step,
            "group": group,
            "id": record["id"],
            "domain": record["domain"],
            "prompt": record["prompt"],
            "text": response.text,
            "tokens": response.tokens.tolist(),
            "gen": [round(x, 6) for x in response.gen.tolist()],
            "old": old,
            "finish": response.finish,
            "correct": response.correct,
            "verdict": response.verdict,
            "terms": response.terms,
            "reward": response.reward}
    return json.dumps(line) + "\n"


def write_samples(samples, run, step, sampled, records, progress, ranks):
    """One line a response, of all groups that were sampled."""
    # Each rank has the log-probs of the rows it trained on.
    responses = [r for group in sampled for r in group]
    trained = [(i, r.logp) for i, r in enumerate(responses) if r.logp is not None]
    for i, logp in all_gather(trained, ranks):
        responses[i].logp = logp
    if ranks.rank == 0:
        with run.writing("samples.jsonl"):
            for number, group in enumerate(sampled):
                for r in group:
                    samples.write(sample_line(step, number, r, records).encode())
            samples.flush()
            progress["bytes"] = samples.tell()
    progress["bytes"] = ranks.agree(progress["bytes"])    # any rank may be the one that saves it


def rollout_metrics(rollouts, records, cfg):
    """What a step's responses say of the policy: means over all that were sampled, trained on or not. Of
    rewards and verdicts they are over those that could be graded; "ungraded" counts the others."""
    responses = [r for group in rollouts.sampled for r in group]
    graded = [r for r in responses if r.graded]
    solved = []
    for group in rollouts.sampled:
        verdicts = [r.correct for r in group if r.graded]
        if verdicts:
            solved.append(sum(verdicts) / len(verdicts))
    m = {"reward": mean(r.reward for r in graded),
         "pass_rate": mean(r.correct for r in graded),
         "solve_none": mean(share == 0 for share in solved),
         "solve_all": mean(share == 1 for share in solved),
         "groups": len(rollouts.groups),
         "responses": len(responses),
         "length": mean(len(r.tokens) for r in responses),
         "truncated": mean(r.finish != "stop" for r in responses),
         "timeouts": sum(timed_out(r.verdict) for r in responses),
         "ungraded": len(responses) - len(graded)}
    for term in responses[0].terms if responses else ():
        m[f"reward_{term}"] = mean(r.terms.get(term, 0) for r in graded)
    by_domain = defaultdict(list)
    for r in graded:
        by_domain[records[r.prompt]["domain"]].append(r)
    for domain, members in by_domain.items():
        m[f"pass_{domain}"] = mean(r.correct for r in members)
        m[f"reward_{domain}"] = mean(r.reward for r in members)
    return m


def step_metrics(outcome, parts, rollouts, records, timer, cfg, ranks):
    """A step's line of metrics.jsonl. outcome: numbers of the update; parts: the metrics of this rank's rows,
    none if nothing was trained on. Seconds are this rank's."""
    m = {}
    if parts:
        m |= averages(pool(all_gather([pool(parts)], ranks)))
    m |= rollout_metrics(rollouts, records, cfg)
    m |= rollouts.seconds
    m |= timer.seconds
    m |= outcome
    m["tok_s"] = m["length"] * m["responses"] / timer.seconds.total()
    return m


# -- log lines -----------------------------------------------------------------------------------------------

def start_line(model, records, left_out, start, cfg, ranks):
    """What is trained, on what, by what."""
    count = sum(p.numel() for p in model.parameters())
    prompts = [f"{len(records):,} prompts"] + [f"{n} left out {reason}" for reason, n in left_out.items()]
    parts = [f"{cfg.model} {count:,} parameters",
             f"{ranks.world} x {ranks.device.type} {cfg.dtype}",
             ", ".join(prompts),
             f"{cfg.batch} x {cfg.group} responses a step",
             f"engine: none, replays {cfg.replay}" if cfg.replay else f"engine: {cfg.engine}",
             kernels_in_use(ranks.device, DTYPES[cfg.dtype])]
    if start:
        parts.append(f"goes on at step {start}")
    return " | ".join(parts)


def step_line(step, m, cfg):
    kl = f"kl {m['k3']:.4f}" if "k3" in m else "nothing to learn from: no group differs"
    ungraded = f" | {m['ungraded']} not graded" if m["ungraded"] else ""
    return (f"step {step:4d}/{cfg.steps} | reward {m['reward']:.3f} | pass {m['pass_rate']:.3f} | {kl} | "
            f"len {m['length']:.0f} | cut {m['truncated']:.0%} | {human(m['tok_s'])} tok/s | "
            f"{m.get('wait_s', 0):.1f} s gen + {m['score_s'] + m['train_s']:.1f} s train{ungraded}")


def evaluation_line(step, result):
    parts = [f"held-out {step:5d}", f"pass {result['pass']:.3f}"]
    for domain, scores in result.items():
        if isinstance(scores, dict) and domain != "frontier":
            parts.append(f"{domain} " + " ".join(f"{k} {score:.3f}" for k, score in scores.items()))
    frontier = result["frontier"]
    parts.append(f"solved {frontier['solved']} of {frontier['unsolved']} unsolved at first")
    parts.append(f"len {result['length']:.0f}")
    if result.get("ungraded"):                            # runs from before lack it
        parts.append(f"{result['ungraded']} not graded")
    return " | ".join(parts)


# -- main ----------------------------------------------------------------------------------------------------

def main(cfg):
    """Trains, exports run/model; returns {"curve": [(step, evaluation)], "reward": of the last step}. With
    --filter=True instead the verdicts and mixes of `difficulty`."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.dry_run:
        devices = cfg.replicate * cfg.shard if cfg.shard else max(world, cfg.replicate)
        check(cfg, devices)
        if int(os.environ.get("RANK", 0)) == 0:
            print(plan(cfg, devices))
        return {}
    check(cfg, world)
    if cfg.filter:
        try:
            return difficulty(cfg)
        except OSError as e:                              # NotADirectoryError, a full disk
            raise InputError(f"--run={cfg.run}: the verdicts could not be written ({e}); make room, or give "
                             f"another --run: the same command goes on where this one ended") from None
    with (join_ranks(cfg.device, cfg.replicate, cfg.shard) as ranks,
          Run(cfg.run, cfg, ranks, FREE, FIXED, cfg.allow_changed) as run):
        refuse_memory(cfg, ranks)
        result = run.result("rl.json")
        if result and result["steps"] >= cfg.steps:
            run.log("\n".join([f"{cfg.run} is finished (delete the folder to train again)",
                               *(evaluation_line(step, scores) for step, scores in result["curve"])]))
            return result
        choose_kernels(cfg.kernels, ranks.device)

        # -- weights, prompts -------------------------------------------------------------------------------
        with ranks.first_on_node():                       # the first downloads what the others find
            init = Init(cfg.init or cfg.model)
        tokenizer = init.tokenizer()
        domains = cfg.domains.split("+")
        records, left_out = read_prompts(cfg.prompts, "prompts", domains, tokenizer, cfg.context)
        held = []
        if cfg.heldout != "none":
            held, _ = read_prompts(cfg.heldout, "heldout", domains, tokenizer, cfg.context, "heldout",
                                   cfg.eval_prompts)
        need_sandbox(records + held, cfg)
        if cfg.batch > len(records):
            raise InputError(f"--batch={cfg.batch}: --prompts={cfg.prompts} has only {len(records)} prompts")

        # -- model, optimizer, reference, what was done before ----------------------------------------------
        model = make_policy(init, tokenizer, cfg, ranks)
        parameters = list(model.parameters())
        optimizer = make_optimizer(model, cfg)
        reference = copy_weights(model, cfg.ref_offload) if cfg.beta else {}
        progress = {"cursor": 0,                          # place in the order of prompts
                    "unsolved": None,                     # held-out prompts, see `evaluate`
                    "bytes": 0}                           # of samples.jsonl

        def state():
            """What a checkpoint holds."""
            reshard(model)
            weights = dict(model.named_parameters())
            moments = {name: optimizer.state[p] for name, p in weights.items()}
            state = {"model": weights, "progress": progress, "optimizer": moments}
            if cfg.beta:
                state["reference"] = reference_state(reference, model)
            return state

        start = run.latest() or 0
        if start > cfg.steps:
            raise InputError(f"--steps={cfg.steps}: {cfg.run} is at step {start} already; give more")
        if start:
            saved = run.restore(state(), start)
            progress = saved["progress"]
            for name, weight in saved.get("reference", {}).items():
                reference[name].copy_(local(weight))
        run.prune(cfg.keep)
        lines = run.rewind(start)
        curve = [(line["step"], line["eval"]) for line in lines if "eval" in line]
        metrics = next((line for line in reversed(lines) if "reward" in line), {})    # of the last step

        # -- engine, files ----------------------------------------------------------------------------------
        if cfg.replay:
            sampler = open_replay(start, run, records, known_ids(init.arch, tokenizer), cfg)
        samples = open_samples(run, progress, ranks)
        if not cfg.replay:
            engine = make_engine(cfg.init or cfg.model, cfg, ranks)
            sampler = Sampler(engine, model, records, progress, cfg, ranks)
        run.log(start_line(model, records, left_out, start, cfg, ranks))

        def export(step):
            if step in export_steps(cfg):
                save(model, run.path("models", f"step_{step:06d}"), DTYPES[cfg.export_dtype])

        def evaluation(step):
            if held and sampler.engine is not None:
                sampler.before_evaluation()
                scores = evaluate(step, sampler.engine, held, progress, cfg, ranks)
                curve.append((step, scores))
                run.metrics(step=step, eval=scores)
                run.log(evaluation_line(step, scores))

        # -- the loop ---------------------------------------------------------------------------------------
        export(start)                                     # a run that was killed may lack it
        sampler.push()
        for step in range(start, cfg.steps):
            # Before the first step and every eval_every: pass rates on held-out prompts.
            if step == 0 or (cfg.eval_every and step % cfg.eval_every == 0):
                evaluation(step)
            timer = Timer()

            # The step's rollouts: a group of graded responses to each of its prompts, on every rank.
            rollouts = sampler.next(step, timer)
            responses = [r for group in rollouts.groups for r in group]

            # Each response has an advantage over its group, and its tokens have a weight in the loss.
            rewards = torch.tensor([r.reward for r in responses])
            graded = torch.tensor([r.graded for r in responses], dtype=torch.bool).view(-1, cfg.group)
            advantage = advantages(rewards.view(-1, cfg.group), cfg.eta, cfg.advantage, graded)
            advantage = advantage.flatten().to(ranks.device)
            lengths = torch.tensor([counted_tokens(r, cfg) for r in responses])
            weight = token_weights(lengths, cfg.loss, cfg.context).to(ranks.device)
            rows = make_rows(responses, cfg, ranks)

            # Log-probs of the rows, by the reference, and by the policy where it will change more than once.
            logps_ref, logps_old = [None] * len(rows), [None] * len(rows)
            if cfg.beta:
                with reference_weights(reference, model):
                    logps_ref = score_rows(model, rows, cfg.temperature)
            if cfg.updates > 1:
                logps_old = score_rows(model, rows, cfg.temperature)
            timer.lap("score_s")

            # The update, once as a rule: gradients add up over the rows, then the optimizer takes a step.
            lr = lr_at(step, cfg)
            parts, loss, norm = [], 0.0, 0.0
            for _ in range(cfg.updates if lengths.any() else 0):
                loss = torch.zeros((), device=ranks.device)
                for i, row in enumerate(rows):
                    model.set_requires_all_reduce(i + 1 == len(rows))
                    logp, entropy = row_logprobs(model, row, cfg.temperature)
                    logp_old = logp.detach() if logps_old[i] is None else logps_old[i]
                    counted = weight[row.owner] > 0
                    row_loss, row_metrics = grpo_loss(logp, logp_old, row.gen, logps_ref[i],
                                                      advantage[row.owner], counted, cfg, weight[row.owner])
                    row_loss.backward()
                    loss += row_loss.detach()
                    entropy = torch.where(counted, entropy.detach(), 0)
                    row_metrics["entropy"] = entropy.sum(dtype=torch.float64)
                    parts.append(row_metrics)
                    logps_old[i] = logp_old
                loss = loss.double()
                dist.all_reduce(loss)
                reduce_vectors(parameters)
                norm = grad_norm(parameters, ranks.mesh)
                loss = float(loss)
                refuse_non_finite(step, loss, norm)
                optimizer_step(optimizer, parameters, lr, norm, cfg.clip)
            if parts:
                keep_logprobs(responses, rows, logps_old)

            # Every ref_every steps the reference follows the policy.
            if cfg.beta and cfg.ref_every and (step + 1) % cfg.ref_every == 0:
                polyak(reference.values(), parameters, cfg.ref_alpha)
            timer.lap("train_s")

            # The engine gets the new weights; then everything that the step has left goes to the disk.
            sampler.after_update(timer)
            write_samples(samples, run, step + 1, rollouts.sampled, records, progress, ranks)
            outcome = dict(loss=loss, gnorm=norm, lr=lr, push_gap=sampler.push_gap)
            metrics = step_metrics(outcome, parts, rollouts, records, timer, cfg, ranks)
            run.metrics(step=step + 1, **metrics)
            run.poll()                                    # a checkpoint is written while the run goes on
            if step + 1 == cfg.steps or (cfg.checkpoint_every and (step + 1) % cfg.checkpoint_every == 0):
                run.save(state(), step + 1, cfg.keep)
            run.log(step_line(step + 1, metrics, cfg))
            export(step + 1)

        # -- result -----------------------------------------------------------------------------------------
        run.finish()
        save(model, run.path("model"), DTYPES[cfg.export_dtype])
        evaluation(cfg.steps)
        result = {"steps": cfg.steps, "curve": curve, "reward": metrics.get("reward")}
        if ranks.rank == 0:
            with run.writing("the result"):
                write_atomic(run.path("rl.json"), json.dumps(result, indent=1))
        run.log(f"model: {run.path('model')}   rollouts: {run.path('samples.jsonl')}")
        sampler.close()
        return result


if __name__ == "__main__":
    launch(main, Config, recipe)
