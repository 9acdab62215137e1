"""GRPO with verifiable rewards (PRISM, arXiv 2603.17074, section 9 and appendix 15), from a laptop to 128
GPUs.

    python rl.py --model=toy --init=runs/mt/model --out=runs/rl           # two CPU cores, the embedded world
    torchrun --nproc_per_node=8 rl.py --model=granite-3.3-8b --init=runs/mt-granite/model \\
        --prompts=runs/filter/balanced-MCS.jsonl --engine=vllm --out=runs/rl-granite
    python rl.py --model=toy --init=runs/mt/model --replay=runs/rl/samples.jsonl --out=runs/again  # no engine

A step: draw prompts, sample a group of responses to each, grade them, turn the rewards of a group into
advantages, pack the responses into rows, one update of the policy, push its weights into the engine. All of
it is in this file but for what other stages share: sampling (generate.py), verdicts (verify.py), the model.

    J   = sum_t w_t [min(pi_old / pi_gen, C) min(rho A, clip(rho, 1 - low, 1 + high) A) - beta KL(pi, pi_ref)]
    rho = pi / pi_old,   A_i = (r_i - mean r) / (std r + eta)                               (paper, section 9)

t runs over the counted tokens of all responses of a step, on all ranks, and w_t is known before the first
pass (1 / their number, as in the paper). So the loss is a plain sum: over whatever micro-batches, rows,
padding and ranks the tokens are spread, the gradients add up to the same.

P prompts, G responses a prompt, N rows, T tokens; log-probs are in nats.
"""

import copy
import dataclasses
import functools
import json
import math
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import presets
from cli import InputError, human, launch, read_jsonl, read_lines, write_atomic
from corpus.prompts import mixes, read_verdicts
from corpus.shards import best_fit
from data import need_sandbox, read_prompts
from engines.contract import known_ids
from engines.push import push
from generate import make_engine
from kernels.logprob import token_logprobs
from model import Init, Model, choose_kernels, kernels_in_use, preset, save
from runtime import Run, grad_norm, join_ranks, reduce_vectors, reshard, shard
from suite.intervals import pass_at_k
from verify import grade_batch, repetition, stop_penalty, think_format, timed_out

# -- config --------------------------------------------------------------------------------------------------


@dataclass
class Config:
    model: str = "toy"                   # preset, folder or hub id: architecture and recipe (presets/)
    init: str = ""                       # preset, folder, random:NAME[:SEED], 0.15*A + 0.85*B; else --model
    run: str = "runs/rl"                 # run folder, also --out (torchrun keeps --run); goes on from it
    prompts: str = "toy"                 # .jsonl of data.py's prompts or mix; toy = the embedded world's
    heldout: str = "toy"                 # .jsonl of prompts to evaluate on, none; toy = the embedded world's
    domains: str = "math+code+science"   # prompts of these are taken
    replay: str = ""                     # a samples.jsonl to train from, step by step, instead of sampling
    seed: int = 1                        # of the order of prompts and of the samples
    steps: int = 1000                    # paper
    batch: int = 64                      # prompts a step over all ranks; paper
    group: int = 16                      # responses a prompt; paper
    context: int = 16_384                # tokens of prompt and response; paper
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
    advantage: str = "std"               # std: (r - mean) / (std + eta), paper; mean: r - mean (dr-GRPO)
    eta: float = 1e-4                    # ours, the paper gives none: far below any std of 0 / 1 rewards
    clip_low: float = 0.2                # ours, open-instruct's; inert while on-policy
    clip_high: float = 0.2               # ours, open-instruct's of the paper's time
    tis: float = 2.0                     # C of truncated importance sampling, 0 = off; paper
    seq_low: float = 0.0                 # drop responses whose mean pi_old / pi_gen is below; 0, 0 = none
    seq_high: float = 0.0                # or above
    beta: float = 0.05                   # weight of the KL term; paper
    kl: str = "k3"                       # its estimator: k1, k2, k3 (ours, open-instruct's default)
    loss: str = "token"                  # weights of tokens: token (paper), constant (dr-GRPO), sequence
    ref_alpha: float = 0.6               # reference <- alpha policy + (1 - alpha) reference; open-instruct's
    ref_every: int = 100                 # steps between them, 0 = never; ours: the paper gives none
    ref_offload: bool = False            # keep the reference in host memory
    format: bool = True                  # without <think> thoughts </think> answer a response scores 0; paper
    stop_penalty: float = 0.5            # taken off where a response did not end by itself; size ours
    repetition_penalty: float = 0.5      # times the share of repeated 4-grams of tokens; ours
    mask_truncated: bool = False         # leave the tokens of such responses out of the loss; ours
    keep_equal: bool = False             # train (by the KL term alone) on groups all right or all wrong too
    refill: int = 0                      # times to sample new prompts in place of such groups; ours
    retire: float = 0.0                  # prompts of at least this pass rate are not drawn again; 0 = all are
    ahead: int = 0                       # 1: sample the next batch while training, one step off-policy
                                         # (resumed, the first batch is sampled anew, by newer weights)
    engine: str = "torch"                # torch (embedded), vllm
    layout: str = "inside"               # vllm: inside (shares the GPUs), beside (its own: --gpus)
    gpus: str = ""                       # vllm beside: its GPUs, "4,5,6,7"
    tensor_parallel: int = 1             # vllm: GPUs that hold a model together
    gpu_memory: float = 0.4              # vllm: share of a GPU's memory for weights and cache
    max_batch: int = 256                 # responses sampled at a time, a rank
    check: bool = True                   # prove after every push that the weights arrived (generate.push)
    dtype: str = "bfloat16"              # of training passes and engine; masters, reductions are float32
    replicate: int = 1                   # HSDP: copies of the sharded model
    shard: int = 0                       # HSDP: ranks a copy is sharded over; 0 = world / replicate
    recompute: str = "full"              # a layer's activations: off, full, selective
    kernels: str = "auto"                # auto (Triton on GPUs, torch on CPUs), torch, mamba-ssm (its scan)
    eval_every: int = 50                 # steps between evaluations; also before, after; 0 = only those
    eval_prompts: int = 256              # held-out prompts of each domain at most
    eval_samples: int = 8                # responses to each, at --temperature
    export_at: str = ""                  # steps after which to write run/models/step_N too: "20,40,80"
    checkpoint_every: int = 10           # steps between resumable checkpoints; 0 = only at the end
    keep: int = 2                        # checkpoints kept; 0 = all
    export_dtype: str = "bfloat16"       # of runs/.../model, the hub-format result
    filter: bool = False                 # no training: judge every prompt, write the paper's mixes
    unsafe_sandbox: bool = False         # run programs without bubblewrap (see verify.py)
    device: str = "auto"                 # auto, cpu, cuda
    allow_changed: bool = False          # go on with a run although its config changed


TOY = dict(steps=50, batch=16, context=256, row_tokens=2048, lr=1e-4, dtype="float32", recompute="off",
           domains="math",               # science wants a longer mid-training, code bubblewrap
           ref_every=20, eval_every=25, eval_prompts=128, eval_samples=4, checkpoint_every=1,
           export_dtype="float32")
FREE = ("replicate", "shard", "row_tokens", "recompute", "kernels", "checkpoint_every", "keep", "device",
        "run", "allow_changed", "ref_offload", "check", "gpus", "gpu_memory", "max_batch", "export_at")
FIXED = ("model", "prompts", "domains", "seed", "batch", "group")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def exported(cfg):
    """The steps of --export_at."""
    return {int(n) for n in cfg.export_at.split(",") if n}


def recipe(model):
    """Defaults that go with --model: the paper's for the seven, a two-core one for the toys."""
    real = {"prompts": "data/mix.jsonl", "heldout": "none"}
    return {"model": model} | (TOY if presets.is_toy(model) else real)


def check(cfg, world_size):
    """Refuses what cannot run, naming the flag."""
    preset(cfg.model)
    for name, least in (("steps", 1), ("batch", 1), ("group", 2), ("context", 2), ("warmup", 0), ("lr", 0),
                        ("eps", 0), ("weight_decay", 0), ("clip", 0), ("updates", 1), ("eta", 0), ("tis", 0),
                        ("clip_low", 0), ("clip_high", 0), ("beta", 0), ("ref_alpha", 0), ("ref_every", 0),
                        ("seq_low", 0), ("seq_high", 0), ("stop_penalty", 0), ("repetition_penalty", 0),
                        ("refill", 0), ("retire", 0), ("eval_every", 0), ("eval_prompts", 1),
                        ("eval_samples", 1), ("checkpoint_every", 0), ("keep", 0), ("max_batch", 1)):
        if not least <= getattr(cfg, name) < math.inf:
            more = ": a group of one has nothing to compare with" if name == "group" else ""
            raise InputError(f"--{name}={getattr(cfg, name)} must be a finite number, at least {least}{more}")
    for name, known in (("dtype", DTYPES), ("export_dtype", DTYPES), ("advantage", ("std", "mean")),
                        ("recompute", ("off", "full", "selective")), ("kl", KL), ("ahead", (0, 1)),
                        ("loss", ("token", "constant", "sequence"))):
        if getattr(cfg, name) not in known:
            raise InputError(f"--{name}={getattr(cfg, name)!r} is not one of {', '.join(map(str, known))}")
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
    if cfg.ref_alpha > 1 or cfg.retire > 1:
        raise InputError(f"--ref_alpha={cfg.ref_alpha}, --retire={cfg.retire}: give shares, up to 1")
    if cfg.batch % world_size:
        raise InputError(f"--batch={cfg.batch} prompts do not divide by {world_size} ranks; take a multiple")
    if not all(n.isdecimal() and 0 < int(n) <= cfg.steps for n in cfg.export_at.split(",") if cfg.export_at):
        raise InputError(f"--export_at={cfg.export_at}: give steps of 1 to --steps={cfg.steps}, as in 20,40")
    if (cfg.seq_low or cfg.seq_high) and not cfg.seq_low < cfg.seq_high:
        raise InputError(f"--seq_low={cfg.seq_low} --seq_high={cfg.seq_high}: give a range, as in 0.5 and 2")
    if cfg.ahead and cfg.engine == "vllm" and cfg.layout == "inside" and cfg.tensor_parallel > 1:
        raise InputError(f"--ahead=1 with --tensor_parallel={cfg.tensor_parallel} inside the trainer: two "
                         f"threads would talk between the same GPUs; take --layout=beside, or --ahead=0")
    unknown = set(cfg.domains.split("+")) - {"math", "code", "science"}
    if unknown:
        raise InputError(f"--domains={cfg.domains}: {min(unknown)!r} is not one of math, code, science")


# -- rewards to advantages ---------------------------------------------------------------------------------

def advantages(rewards: torch.Tensor, eta: float = 1e-4, mode: str = "std") -> torch.Tensor:
    """rewards (P, G) to advantages (P, G) fp32. "std": (r - mean) / (std + eta), paper; "mean": r - mean
    (dr-GRPO: dividing favours prompts that are nearly always, or nearly never, solved).

    The standard deviation is the population's, as in open-instruct, with which the paper trained: 0 / 1
    rewards at pass rate q give sqrt((1 - q) / q) and -sqrt(q / (1 - q)), whatever G. The paper names no eta;
    1e-4 is ours, too small to matter beside 0 / 1 rewards. All G responses count here, also those whose
    tokens the loss leaves out. A group of equal rewards gets exactly 0."""
    r = rewards.double()
    centred = r - r.mean(1, keepdim=True)
    if mode == "std":
        centred = centred / (centred.square().mean(1, keepdim=True).sqrt() + eta)
    elif mode != "mean":
        raise InputError(f"advantages: mode {mode!r} is not one of std, mean")
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)            # their mean may be rounded off them
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

KL = ("k1", "k2", "k3")


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


def in_range(logp_old, logp_gen, counted, responses, low: float, high: float) -> torch.Tensor:
    """Whether the response of each token has its geometric mean of pi_old / pi_gen, over counted tokens, in
    low .. high. All of one shape; responses: whose token it is, any whole numbers. A row may hold several
    responses, but a response has to be here with all its tokens."""
    _, index = responses.flatten().unique(return_inverse=True)
    gaps = torch.where(counted, logp_old - logp_gen, 0.0).flatten()
    sums = torch.zeros_like(gaps).index_add(0, index, gaps)              # by response; never more than tokens
    sizes = torch.zeros_like(gaps).index_add(0, index, counted.flatten().to(gaps.dtype))
    mean = (sums / sizes.clamp_min(1)).exp()
    return ((low <= mean) & (mean <= high))[index].view_as(counted)


def grpo_loss(logp: torch.Tensor, logp_old: torch.Tensor, logp_gen: torch.Tensor,
              logp_ref: torch.Tensor | None, advantages: torch.Tensor, mask: torch.Tensor, cfg,
              weights: torch.Tensor | None = None, responses: torch.Tensor | None = None
              ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A micro-batch's share of the step's loss, -J, and of its metrics. Inputs are (N, T), or (T) of flat
    tokens, or broadcast to that; T may be 0. Only logp gets a gradient.

    logp: the policy's log-probs; logp_old: those before the step's first update (on-policy: logp itself);
    logp_gen: the sampler's; logp_ref: the reference's, or None if beta is 0 (k1, k2, k3 then read 0).
    advantages: (N, 1) or as logp. mask: which tokens count; where they do not the others may be anything,
    even NaN. weights: of each token, from `token_weights` for a batch that comes in parts; None = this is the
    whole step, a response a row. responses: see `in_range`; None = a response a row. cfg: loss (without
    weights); clip_low, clip_high; tis: C, 0 = no correction; beta, kl: "k1", "k2", "k3" (outside of the
    correction, as in the paper); seq_low, seq_high: responses out of this range are dropped, KL and all, but
    stay in the normaliser; 0, 0 = none are.

    Metrics are sums over counted tokens (dropped responses' too), 0-d float64, and the maxima called _max:
    `pool` them, then `averages`. ratio: rho. clip_low, clip_high: where clipping took the gradient. tis:
    pi_old / pi_gen before the cap, 1 on average over samples of pi_gen; tis_cut: where it was capped. k1, k2,
    k3: policy to reference. mismatch: |log pi_old - log pi_gen|; mismatch_kl: KL(pi_gen, pi_old), by k3.
    dropped: tokens of dropped responses."""
    counted = (mask > 0).expand_as(logp)
    if weights is None:
        weights = token_weights(counted.sum(-1), cfg.loss, logp.shape[-1])[..., None]
    ref = logp if logp_ref is None else logp_ref
    old, gen, ref = (torch.where(counted, x.detach(), 0.0) for x in (logp_old, logp_gen, ref))
    logp = torch.where(counted, logp, 0.0)                                # NaN * 0 would be NaN
    # e^20 is far beyond any clip; but with A < 0 nothing clips a large ratio, and inf must not come in
    ratio = (logp - old).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    policy = torch.maximum(-advantages * ratio, -advantages * clipped)
    tis, cap = (old - gen).clamp(-10, 10).exp(), cfg.tis or math.inf
    if cfg.tis:
        policy = policy * tis.clamp(max=cap)
    kl = {kind: kl_estimate(logp, ref, kind) for kind in KL}
    kept = counted
    if cfg.seq_high:
        if responses is None:
            responses = torch.arange(len(logp), device=logp.device)[:, None].expand_as(logp)
        kept = counted & in_range(old, gen, counted, responses, cfg.seq_low, cfg.seq_high)
    loss = torch.where(kept, weights * (policy + cfg.beta * kl[cfg.kl]), 0.0).sum()

    with torch.no_grad():
        sums = {"tokens": counted, "ratio": ratio, "clip_low": (advantages < 0) & (ratio < 1 - cfg.clip_low),
                "clip_high": (advantages > 0) & (ratio > 1 + cfg.clip_high), "tis": tis, "tis_cut": tis > cap,
                **kl, "mismatch": (old - gen).abs(), "mismatch_kl": kl_estimate(gen, old, "k3"),
                "dropped": ~kept}
        metrics = {name: torch.where(counted, x, 0).sum(dtype=torch.float64) for name, x in sums.items()}
        for name, x in (("ratio_max", ratio), ("tis_max", tis)):
            seen = torch.where(counted, x, 0).double()
            metrics[name] = seen.amax() if seen.numel() else seen.sum()   # an empty row has no maximum
    return loss, metrics


def pool(parts: list[dict]) -> dict:
    """The metrics of several micro-batches, or of several ranks, as one's."""
    return {name: (max if name.endswith("_max") else sum)(part[name] for part in parts) for name in parts[0]}


def averages(pooled: dict) -> dict[str, float]:
    """Means over the counted tokens, and the maxima, as numbers; all 0 if no token counted."""
    pooled = {name: float(x) for name, x in pooled.items()}
    tokens = max(pooled.pop("tokens"), 1)
    return {name: x if name.endswith("_max") else x / tokens for name, x in pooled.items()}


# -- rows --------------------------------------------------------------------------------------------------

def pack(lengths, capacity: int, ranks: int = 1) -> list[list[list[int]]]:
    """The rows of each rank, as lists of indices into lengths (tokens of prompt and response, 1 .. capacity).
    Every rank gets equally many, for a row is a pass of all ranks; empty ones fill up.

    Responses go, longest first, to the rank with the fewest tokens so far, then by best fit into its rows: no
    rank gets more than the mean and one longest response. (Dealing out full rows instead would give one of 4
    ranks twice the tokens of the others where there are 5.) A rank's rows are in order of falling length, so
    that ranks pass over like ones together."""
    lengths = [int(n) for n in lengths]
    for i, n in enumerate(lengths):
        if not 1 <= n <= capacity:
            raise InputError(f"pack: response {i} of {len(lengths)} has {n:,} tokens with its prompt, a row "
                             f"holds 1 to {capacity:,}: give longer rows, or fewer new tokens")
    mine, load = [[] for _ in range(ranks)], [0] * ranks
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = load.index(min(load))
        mine[rank].append(i)
        load[rank] += lengths[i]
    packed = []
    for items in mine:
        rows = {}
        for i, row in zip(items, best_fit([lengths[i] for i in items], capacity).tolist(), strict=True):
            rows.setdefault(row, []).append(i)
        packed.append(sorted(rows.values(), key=lambda row: -sum(lengths[i] for i in row)))
    most = max(map(len, packed))
    return [rows + [[] for _ in range(most - len(rows))] for rows in packed]


# -- the reference, pass@k ---------------------------------------------------------------------------------

@torch.no_grad()
def polyak(reference, policy, alpha: float) -> None:
    """reference <- alpha policy + (1 - alpha) reference, in place: the paper's soft update; it names no rate.
    Two iterables of tensors in one order, of one shape; DTensors shard by shard, each on the reference's
    device. Keep the reference in fp32: bf16 would round changes of under 0.4 % away."""
    for r, p in zip(reference, policy, strict=True):
        r, p = (x.to_local() if hasattr(x, "to_local") else x for x in (r, p))
        if r.shape != p.shape:
            raise ValueError(f"polyak: a tensor of shape {tuple(p.shape)} for one of {tuple(r.shape)}")
        r.lerp_(p.to(r.device, r.dtype), alpha)


# -- prompts -------------------------------------------------------------------------------------------------

@functools.lru_cache(2)
def epoch_order(epoch, count, seed):
    """All prompts, in this epoch's order: a pure function, so that the state to save is one integer."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def draw_prompts(progress, records, want, seed):
    """The next `want` indices, retired prompts passed over; moves progress["cursor"]."""
    retired, drawn, passed = set(progress["retired"]), [], 0
    while len(drawn) < want and passed < 2 * len(records):
        epoch, place = divmod(progress["cursor"], len(records))
        index = int(epoch_order(epoch, len(records), seed)[place])
        progress["cursor"] += 1
        passed += 1
        if records[index]["id"] not in retired:
            drawn.append(index)
    if len(drawn) < want:
        raise InputError(f"--retire: {len(retired)} of {len(records)} prompts are retired, {want} a step are "
                         f"needed: the run has learnt what there is. --allow_changed=True with --steps of "
                         f"the last step ends it there and writes its model")
    return drawn


# -- rollouts ------------------------------------------------------------------------------------------------

@dataclass
class Response:
    """One response and what became of it. gen: the engine's log-probs of its tokens; logp: the trainer's."""
    prompt: int                          # index of its record
    ids: list                            # of the prompt
    tokens: np.ndarray
    gen: np.ndarray
    finish: str
    text: str
    correct: bool = False
    verdict: str = ""
    terms: dict = field(default_factory=dict)
    reward: float = 0.0
    logp: np.ndarray = None


def judge(responses, records, cfg):
    """Fills in verdicts and rewards, term by term. correct: 1 or 0, what groups are filtered on. format:
    takes it back where the form is not kept. stop and repetition: penalties, 0 or less. Their sum is the
    reward."""
    verdicts = grade_batch([(records[r.prompt]["domain"], r.text, records[r.prompt]["truth"], r.finish)
                            for r in responses], unsafe_sandbox=cfg.unsafe_sandbox)
    for r, v in zip(responses, verdicts, strict=True):
        r.correct, r.verdict = v.correct, v.reason
        shaped = not cfg.format or think_format(r.text)
        r.terms = {"correct": float(v.correct), "format": 0.0 if shaped or not v.correct else -1.0,
                   "stop": stop_penalty(r.finish, cfg.stop_penalty),
                   "repetition": -cfg.repetition_penalty * repetition(r.tokens)}
        r.reward = sum(r.terms.values())
    return responses


def sample(door, records, asked, n, cfg, me):
    """n responses to each of the prompts asked, [(key, index)], flat, on the rank that made them. Their noise
    hangs on the key and the prompt, not on the number of ranks."""
    mine = asked[me.rank::me.world]
    groups = door.generate([records[i]["ids"] for _, i in mine], n, max_new_tokens=cfg.context, seed=cfg.seed,
                           temperature=cfg.temperature, keys=[(*key, records[i]["id"]) for key, i in mine])
    return [Response(i, records[i]["ids"], np.array(s.tokens, dtype=np.int32),
                     np.array(s.logprobs, dtype=np.float32), s.finish_reason, s.text)
            for (_, i), own in zip(mine, groups, strict=True) for s in own]


def everyone(mine, me):
    """Lists of all ranks, joined in their order, on every rank."""
    parts = [None] * me.world
    dist.all_gather_object(parts, mine, group=me.cpu_group)
    return [item for part in parts for item in part]


class Watch:
    """Seconds by what they went to."""

    def __init__(self):
        self.seconds, self.at = Counter(), time.perf_counter()

    def lap(self, name):
        """Adds the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] += now - self.at
        self.at = now


def differs(group, cfg):
    """Whether a group is trained on. Judged by correctness: shaping terms would keep groups that teach form
    alone."""
    return cfg.keep_equal or 0 < sum(r.correct for r in group) < len(group)


def rollouts(step, door, records, progress, cfg, me):
    """The groups of a step, the same on every rank: lists of cfg.group responses. Groups all right or all
    wrong are left out (unless keep_equal) and replaced up to `refill` times. Returns (groups, all that was
    sampled, the seconds of this rank)."""
    groups, everything, watch = [], [], Watch()
    for round_ in range(cfg.refill + 1):
        want = cfg.batch - len(groups)
        want = -(-want // me.world) * me.world            # every rank calls the engine
        indices = draw_prompts(progress, records, want, cfg.seed)
        asked = [(("train", step, round_, at), i) for at, i in enumerate(indices)]
        mine = sample(door, records, asked, cfg.group, cfg, me)
        watch.lap("generate_s")
        judge(mine, records, cfg)
        watch.lap("verify_s")
        made = everyone(mine, me)
        made = [made[i:i + cfg.group] for i in range(0, len(made), cfg.group)]
        everything += made
        groups += [g for g in made if differs(g, cfg)]
        if len(groups) >= cfg.batch:
            break
    if cfg.retire:
        progress["retired"] += sorted({records[g[0].prompt]["id"] for g in everything
                                       if sum(r.correct for r in g) >= cfg.retire * cfg.group}
                                      - set(progress["retired"]))
    return groups[:cfg.batch], everything, watch.seconds


def replayed(path, records, known, cfg):
    """{step: groups} of a samples.jsonl, graded as it says. known: how many ids the model can have said."""
    index, steps = {r["id"]: i for i, r in enumerate(records)}, {}
    for n, _, line in read_jsonl(path, "replay"):
        try:
            prompt = index[line["id"]]
            r = Response(prompt, records[prompt]["ids"], np.array(line["tokens"], dtype=np.int32),
                         np.array(line["gen"], dtype=np.float32), line["finish"], line["text"],
                         line["correct"], line["verdict"], line["terms"], float(line["reward"]))
            if not (r.tokens.ndim == 1 and r.tokens.shape == r.gen.shape and np.isfinite(r.gen).all()
                    and r.tokens.size and 0 <= r.tokens.min() <= r.tokens.max() < known
                    and math.isfinite(r.reward) and isinstance(r.terms, dict)):
                raise ValueError(f"{r.tokens.size} tokens and {r.gen.size} log-probs, which must be as many "
                                 f"finite numbers, of ids from 0 to {known - 1}; reward {r.reward}")
            place = steps.setdefault(int(line["step"]), {}).setdefault(line["group"], [])
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise InputError(f"--replay: {path}, line {n} is no rollout of these prompts ({e!r}); give the "
                             f"--prompts and --model that its run had") from None
        place.append(r)
    for step, groups in steps.items():
        for group, own in groups.items():
            prompts = len({r.prompt for r in own})
            if len(own) != cfg.group or prompts > 1:
                raise InputError(f"--replay: {path}, step {step}, group {group} has {len(own)} responses to "
                                 f"{prompts} prompts, not --group={cfg.group} to one: give the --group that "
                                 f"its run had, and the file of one run")
    if not steps:
        raise InputError(f"--replay={path} holds no responses")
    return {step: list(groups.values()) for step, groups in steps.items()}


# -- passes of the model -------------------------------------------------------------------------------------

def row_tensors(row, responses, device):
    """A packed row: tokens and documents (1, T), where responses begin to be predicted and what follows there
    (N), and whose tokens these are (N). An empty row is one token that nothing is read from."""
    tokens, docs, where, targets, owner, at = [], [], [], [], [], 0
    for i in row:
        r = responses[i]
        text = [*r.ids, *r.tokens.tolist()]
        tokens += text
        docs += [len(docs)] * len(text)                   # any number that is its own
        where += range(at + len(r.ids) - 1, at + len(text) - 1)
        targets += r.tokens.tolist()
        owner += [i] * len(r.tokens)
        at += len(text)
    return tuple(torch.tensor(x, dtype=torch.int64, device=device) for x in (
        [tokens or [0]], [docs or [0]], where, targets, owner))


def row_logprobs(model, tensors, temperature):
    """(logp, entropy) (N) of a row's responses; only their positions meet the head."""
    tokens, docs, where, targets, _ = tensors
    known = known_ids(model.arch, model.tokenizer)
    return model(tokens, docs, lambda h, weight, scale: token_logprobs(
        h[where], weight, targets, scale, temperature, known=known))


@torch.no_grad()
def score_rows(model, rows, temperature):
    """Log-probs of the responses of all rows, for the weights as they are."""
    found = [row_logprobs(model, row, temperature)[0] for row in rows]
    reshard(model)                                        # the next pass gathers what the weights then are
    return found


@torch.no_grad()
def exchange(reference, model):
    """Swaps the weights of model and reference, in place: the reference runs on the policy's memory."""
    for name, p in model.named_parameters():
        local = p.to_local() if isinstance(p, DTensor) else p
        mine = local.clone()
        local.copy_(reference[name])
        reference[name].copy_(mine)


def reference_state(reference, model):
    """The reference as a checkpoint wants it: sharded as the parameters are, on their device."""
    state = {}
    for name, p in model.named_parameters():
        local = reference[name].to(p.device)
        state[name] = DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape,
                                         stride=p.stride()) if isinstance(p, DTensor) else local
    return state


def make_optimizer(model, cfg):
    """AdamW; decay on matrices only. State exists from the start, so that a checkpoint can be loaded into
    it."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    for p in model.parameters():
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def lr_at(step, cfg):
    """Learning rate of step 0, 1, ...: linear warm-up, then linear decay to 0 after the last (paper)."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return cfg.lr * (cfg.steps - step) / (cfg.steps - cfg.warmup)


# -- evaluation ----------------------------------------------------------------------------------------------

def evaluate(step, door, held, progress, cfg, me):
    """Pass rates on held-out prompts by domain, unbiased pass@k, and the solvability frontier: of the prompts
    that no response solved before the first step, how many some response solves now, and their pass
    rate."""
    n, right = cfg.eval_samples, Counter({i: 0 for i in range(len(held))[me.rank::me.world]})
    made = judge(sample(door, held, [(("eval", step), i) for i in range(len(held))], n, cfg, me), held, cfg)
    for r in made:
        right[r.prompt] += r.correct
    right = dict(everyone(list(right.items()), me))
    lengths = everyone([len(r.tokens) for r in made], me)
    result = {}
    for domain in sorted({r["domain"] for r in held}):
        counts = [right[i] for i, r in enumerate(held) if r["domain"] == domain]
        result[domain] = {f"pass@{k}": sum(pass_at_k(n, c, k) for c in counts) / len(counts)
                          for k in sorted({1, n})}
    if progress["unsolved"] is None:
        progress["unsolved"] = [held[i]["id"] for i in range(len(held)) if not right[i]]
    known = set(progress["unsolved"])
    unsolved = [right[i] for i, r in enumerate(held) if r["id"] in known]
    result["frontier"] = {"unsolved": len(unsolved), "solved": sum(c > 0 for c in unsolved),
                          "pass": sum(unsolved) / (n * max(1, len(unsolved)))}
    result["pass"] = sum(right.values()) / (n * len(held))
    result["length"] = sum(lengths) / len(lengths)
    return result


def evaluation_line(step, result):
    parts = [f"{d} " + " ".join(f"{k} {v:.3f}" for k, v in scores.items()) for d, scores in result.items()
             if isinstance(scores, dict) and d != "frontier"]
    frontier = result["frontier"]
    return (f"held-out {step:5d} | pass {result['pass']:.3f} | " + " | ".join(parts) + f" | solved "
            f"{frontier['solved']} of {frontier['unsolved']} unsolved at first | len {result['length']:.0f}")


# -- the difficulty filter -----------------------------------------------------------------------------------

def difficulty(cfg):
    """How many of cfg.group responses to each prompt are right, and the paper's mixes by it (section 9):
    writes run/verdicts.jsonl, which data.py mix reads too, and run/{unbalanced,balanced}-{MC,MCS}.jsonl.
    Killed, it goes on with the prompts that have no verdict yet. Returns {file: prompts}."""
    domains = cfg.domains.split("+")
    with join_ranks(cfg.device, cfg.replicate, cfg.shard) as me:
        with me.first_on_node():
            init = Init(cfg.init or cfg.model)
        records, _ = read_prompts(cfg.prompts, "prompts", domains, init.tokenizer(), cfg.context)
        need_sandbox(records, cfg)
        os.makedirs(cfg.run, exist_ok=True)
        path, of = os.path.join(cfg.run, "verdicts.jsonl"), os.path.join(cfg.run, "filter.json")
        mine = {k: getattr(cfg, k) for k in ("init", "model", "prompts", "seed", "group", "context",
                                             "temperature", "dtype", "engine")}
        if me.rank == 0 and os.path.exists(of):
            with open(of) as f:
                before = json.load(f)
            changed = [k for k in mine if mine[k] != before.get(k)]
            if changed:
                raise InputError(f"--{changed[0]}={mine[changed[0]]}: {cfg.run} has verdicts made with "
                                 f"{before.get(changed[0])}; give another --run")
        if me.rank == 0:
            write_atomic(of, json.dumps(mine, indent=1))
        done = set()
        if me.rank == 0 and os.path.exists(path):
            whole = read_lines(path)                      # without a line that a kill cut short
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in whole))
            done = {line["id"] for line in whole}
        done = me.agree(done)
        pending = [i for i, r in enumerate(records) if r["id"] not in done]
        door = make_engine(cfg.init or cfg.model, cfg, me)
        with tqdm(total=len(records), initial=len(records) - len(pending), unit="prompt",
                  disable=None if me.rank == 0 else True) as bar:
            for at in range(0, len(pending), cfg.batch):
                asked = [(("filter",), i) for i in pending[at:at + cfg.batch]]
                made = everyone(judge(sample(door, records, asked, cfg.group, cfg, me), records, cfg), me)
                verdicts = {}
                for r in made:
                    verdicts.setdefault(records[r.prompt]["id"], []).append(bool(r.correct))
                if me.rank == 0:
                    with open(path, "a") as f:
                        f.write("".join(json.dumps({"id": k, "verdicts": v}) + "\n"
                                        for k, v in verdicts.items()))
                bar.update(len(asked))
        door.close()
        written = {}
        if me.rank == 0:
            passes = read_verdicts(path, cfg.group)
            for kind in ("unbalanced", "balanced"):
                for which in ("MC", "MCS"):
                    chosen = mixes(records, passes, kind, which, cfg.seed)
                    name = os.path.join(cfg.run, f"{kind}-{which}.jsonl")
                    lines = ({k: v for k, v in r.items() if k != "ids"} for r in chosen)
                    write_atomic(name, "".join(json.dumps(line) + "\n" for line in lines))
                    written[name] = len(chosen)
                    print(f"{name}: {len(chosen):,} of {len(records):,} prompts")
        return me.agree(written)


# -- main ----------------------------------------------------------------------------------------------------

def main(cfg):
    """Trains, exports run/model; returns {"curve": [(step, evaluation)], "reward": of the last step}. With
    --filter=True instead the verdicts and mixes of `difficulty`."""
    check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    if cfg.filter:
        try:
            return difficulty(cfg)
        except OSError as e:                              # NotADirectoryError, a full disk
            raise InputError(f"--run={cfg.run}: the verdicts could not be written ({e}); make room, or give "
                             f"another --run: the same command goes on where this one ended") from None
    domains = cfg.domains.split("+")
    with join_ranks(cfg.device, cfg.replicate, cfg.shard) as me:
        run = Run(cfg.run, cfg, me, FREE, FIXED, cfg.allow_changed)
        result = run.result("rl.json")
        if result and result["steps"] >= cfg.steps:
            run.log(f"{cfg.run} is finished (delete the folder to train again)\n"
                    + "\n".join(evaluation_line(*point) for point in result["curve"]))
            return result
        choose_kernels(cfg.kernels, me.device)

        # -- weights, prompts -------------------------------------------------------------------------------
        with me.first_on_node():                          # it downloads, the others find it
            init = Init(cfg.init or cfg.model)
        tokenizer = init.tokenizer()
        records, left_out = read_prompts(cfg.prompts, "prompts", domains, tokenizer, cfg.context)
        held = []
        if cfg.heldout != "none":
            held, _ = read_prompts(cfg.heldout, "heldout", domains, tokenizer, cfg.context, "heldout",
                                   cfg.eval_prompts)
            held = [r for d in domains for r in [r for r in held if r["domain"] == d][:cfg.eval_prompts]]
        need_sandbox(records + held, cfg)
        if cfg.batch > len(records):
            raise InputError(f"--batch={cfg.batch}: --prompts={cfg.prompts} has only {len(records)} prompts")

        # -- model, optimizer, reference, engine, what was done before --------------------------------------
        with torch.device("meta"):
            model = Model(init.arch)
        for layer in model.trunk.layers:
            layer.recompute = cfg.recompute
        shard(model, me.mesh, DTYPES[cfg.dtype]).to_empty(device=me.device)
        model.tokenizer = tokenizer
        init.fill(model)
        optimizer, parameters = make_optimizer(model, cfg), list(model.parameters())
        reference = {}
        if cfg.beta:
            for name, p in model.named_parameters():
                local = (p.to_local() if isinstance(p, DTensor) else p).detach().clone()
                reference[name] = local.cpu() if cfg.ref_offload else local
        progress = {"cursor": 0, "retired": [], "unsolved": None, "bytes": 0}
        start = run.latest() or 0

        def state():
            reshard(model)
            more = {"reference": reference_state(reference, model)} if cfg.beta else {}
            return {"model": dict(model.named_parameters()), "progress": progress,
                    "optimizer": {n: optimizer.state[p] for n, p in model.named_parameters()}} | more

        if start > cfg.steps:
            raise InputError(f"--steps={cfg.steps}: {cfg.run} is at step {start} already; give more")
        if start:
            saved = run.restore(state(), start)
            progress = saved["progress"]
            for name, p in saved.get("reference", {}).items():
                reference[name].copy_(p.to_local() if isinstance(p, DTensor) else p)
        run.prune(cfg.keep)
        told = run.rewind(start)
        curve = [(line["step"], line["eval"]) for line in told if "eval" in line]
        replay = None
        if cfg.replay:
            if os.path.realpath(cfg.replay) == os.path.realpath(run.path("samples.jsonl")):
                raise InputError(f"--replay={cfg.replay} is what this run writes; give another --run")
            replay = replayed(cfg.replay, records, known_ids(init.arch, tokenizer), cfg)
            missing = [n for n in range(start + 1, cfg.steps + 1) if n not in replay]
            if missing:
                raise InputError(f"--replay={cfg.replay} has no step {missing[0]}: give --steps of at most "
                                 f"{missing[0] - 1}")
        samples = open_samples(run, progress, me)
        door = make_engine(cfg.init or cfg.model, cfg, me) if replay is None else None
        run.log(f"{cfg.model} {sum(p.numel() for p in parameters):,} parameters | {me.world} x "
                f"{me.device.type} {cfg.dtype} | {len(records):,} prompts"
                + "".join(f", {n} left out {reason}" for reason, n in left_out.items())
                + f" | {cfg.batch} x {cfg.group} responses a step | engine: "
                + (f"none, replays {cfg.replay}" if replay is not None else cfg.engine)
                + f" | {kernels_in_use(me.device, DTYPES[cfg.dtype])}"
                + (f" | goes on at step {start}" if start else ""))

        def refresh():
            """The policy's weights to the engine; the proof's difference in nats, None unchecked."""
            return None if door is None else push(door, model, check=cfg.check)

        def export(step):
            if step in exported(cfg):
                save(model, run.path("models", f"step_{step:06d}"), DTYPES[cfg.export_dtype])

        away, pool_, future = dataclasses.replace(me, side=dist.new_group(
            backend="gloo", timeout=timedelta(hours=12))), None, None
        if cfg.ahead:
            pool_ = ThreadPoolExecutor(1)

        def sampled(step):
            """The step's rollouts and where they leave the prompts; with --ahead=1 in a thread: a group of
            its own for what ranks exchange, and a copy of progress, which no checkpoint may see yet."""
            after = copy.deepcopy(progress)
            return *rollouts(step, door, records, after, cfg, away), after

        def evaluation(step):
            if held and door is not None:
                curve.append((step, evaluate(step, door, held, progress, cfg, me)))
                run.metrics(step=step, eval=curve[-1][1])
                run.log(evaluation_line(*curve[-1]))

        # -- the loop ---------------------------------------------------------------------------------------
        export(start)                                     # it may have been killed before
        gap, m = refresh(), next((line for line in reversed(told) if "reward" in line), {})
        for step in range(start, cfg.steps):
            if step == 0 or (cfg.eval_every and step % cfg.eval_every == 0):
                if future:
                    future.result()                       # the engine is free, but of older weights
                    gap = refresh()
                evaluation(step)
            watch, made_in = Watch(), {}
            if replay is None:
                groups, everything, made_in, after = future.result() if future else sampled(step)
                progress.update(cursor=after["cursor"], retired=after["retired"])
                watch.lap("wait_s")
                if cfg.ahead and step + 1 < cfg.steps:
                    gap = refresh()
                    future = pool_.submit(sampled, step + 1)
                else:
                    future = None
                    door.sleep()
            else:
                everything = replay.get(step + 1, [])
                groups = [g for g in everything if differs(g, cfg)][:cfg.batch]
            watch.lap("push_s")

            # -- advantages, weights of tokens, rows ---------------------------------------------------------
            responses = [r for g in groups for r in g]
            adv = torch.tensor([r.reward for r in responses]).view(len(groups), cfg.group)
            adv = advantages(adv, cfg.eta, cfg.advantage).flatten()
            lengths = torch.tensor([0 if cfg.mask_truncated and r.finish != "stop" else len(r.tokens)
                                    for r in responses])
            weight = token_weights(lengths, cfg.loss, cfg.context) if responses else lengths
            rows = pack([len(r.ids) + len(r.tokens) for r in responses], cfg.row_tokens or cfg.context,
                        me.world)[me.rank]
            rows = [row_tensors(row, responses, me.device) for row in rows]
            adv, weight = adv.to(me.device), weight.to(me.device, torch.float32)
            gen = [torch.tensor(r.gen, device=me.device) for r in responses]
            gen = [torch.cat([gen[i] for i in owner.unique_consecutive().tolist()] or [adv[:0]])
                   for *_, owner in rows]

            # -- log-probs of the reference, and of the policy before more than one update -------------------
            ref = old = [None] * len(rows)
            if cfg.beta:
                exchange(reference, model)
                ref = score_rows(model, rows, cfg.temperature)
                exchange(reference, model)
            if cfg.updates > 1:
                old = score_rows(model, rows, cfg.temperature)
            watch.lap("score_s")

            # -- the update ----------------------------------------------------------------------------------
            lr, parts, loss, norm = lr_at(step, cfg), [], 0.0, 0.0
            for update in range(cfg.updates if (lengths > 0).any() else 0):
                total = torch.zeros((), device=me.device)
                for i, row in enumerate(rows):
                    model.set_requires_all_reduce(i + 1 == len(rows))
                    owner = row[-1]
                    logp, h = row_logprobs(model, row, cfg.temperature)
                    before = logp.detach() if old[i] is None else old[i]
                    share, part = grpo_loss(logp, before, gen[i], ref[i], adv[owner], weight[owner] > 0, cfg,
                                            weight[owner], owner)
                    share.backward()
                    total += share.detach()
                    entropy = torch.where(weight[owner] > 0, h.detach(), 0).sum(dtype=torch.float64)
                    parts.append(part | {"entropy": entropy})
                    if update == 0:
                        keep_logprobs(responses, owner, before)
                reduce_vectors(parameters)
                loss, norm = me.sum(float(total))[0], grad_norm(parameters, me.mesh)
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise InputError(f"step {step + 1}: loss {loss}, gradient norm {norm}: not finite; the "
                                     f"checkpoints before are kept: lower --lr and go on with "
                                     f"--allow_changed=True")
                if cfg.clip and norm > cfg.clip:
                    for p in parameters:
                        p.grad.mul_(cfg.clip / norm)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
            if cfg.beta and cfg.ref_every and (step + 1) % cfg.ref_every == 0:
                polyak(reference.values(), parameters, cfg.ref_alpha)
            watch.lap("train_s")

            # -- log, save -----------------------------------------------------------------------------------
            m = averages(pool(everyone([pool(parts)], me))) if parts else {}
            if not future:
                gap = refresh()
            watch.lap("push_s")
            write_samples(samples, run, step + 1, everything, records, progress, me)
            m |= summary(groups, everything, records, cfg.group) | made_in | watch.seconds
            m |= dict(loss=loss, gnorm=norm, lr=lr, push_gap=gap)
            m["tok_s"] = m["length"] * m["responses"] / sum(watch.seconds.values())
            run.metrics(step=step + 1, **m)
            if step + 1 == cfg.steps or (cfg.checkpoint_every and (step + 1) % cfg.checkpoint_every == 0):
                run.save(state(), step + 1, cfg.keep)     # what the step has left is on the disk before
                run.finish()                              # and no step that was saved is made again
            run.log(step_line(step + 1, m, cfg))
            export(step + 1)

        # -- result -----------------------------------------------------------------------------------------
        save(model, run.path("model"), DTYPES[cfg.export_dtype])
        evaluation(cfg.steps)
        result = {"steps": cfg.steps, "curve": curve, "reward": m.get("reward")}
        if me.rank == 0:
            with run.writing("the result"):
                write_atomic(run.path("rl.json"), json.dumps(result, indent=1))
        run.log(f"model: {run.path('model')}   rollouts: {run.path('samples.jsonl')}")
        if door is not None:
            door.close()
        return result


# -- what a run leaves ---------------------------------------------------------------------------------------

def open_samples(run, progress, me):
    """samples.jsonl, cut back to what the checkpoint knew of."""
    if me.rank:
        return None
    with run.writing("samples.jsonl"):
        f = open(run.path("samples.jsonl"), "ab")
    if f.tell() < progress["bytes"]:
        raise InputError(f"{run.path('samples.jsonl')} has {f.tell():,} bytes, it had {progress['bytes']:,} "
                         f"when the checkpoint was made: put the file back, or start in another --run")
    f.truncate(progress["bytes"])
    f.seek(progress["bytes"])
    return f


def keep_logprobs(responses, owner, logp):
    """The trainer's log-probs of a row, to the responses they belong to."""
    logp = logp.float().cpu().numpy()
    owners, sizes = owner.unique_consecutive(return_counts=True)
    for i, own in zip(owners.tolist(), np.split(logp, np.cumsum(sizes.cpu().numpy()))[:-1], strict=True):
        responses[i].logp = own


def write_samples(samples, run, step, everything, records, progress, me):
    """One line a response. Log-probs are rounded to 1e-6; "old" is null where it was not trained on."""
    held = [(g, j, r.logp) for g, group in enumerate(everything) for j, r in enumerate(group)
            if r.logp is not None]
    for g, j, logp in everyone(held, me):
        everything[g][j].logp = logp
    if me.rank == 0:
        with run.writing("samples.jsonl"):
            for g, group in enumerate(everything):
                for r in group:
                    record = records[r.prompt]
                    old = None if r.logp is None else [round(x, 6) for x in r.logp.tolist()]
                    line = dict(step=step, group=g, id=record["id"], domain=record["domain"],
                                prompt=record["prompt"], text=r.text, tokens=r.tokens.tolist(),
                                gen=[round(x, 6) for x in r.gen.tolist()], old=old, finish=r.finish,
                                correct=r.correct, verdict=r.verdict, terms=r.terms, reward=r.reward)
                    samples.write(json.dumps(line).encode() + b"\n")
            samples.flush()
            progress["bytes"] = samples.tell()
    progress["bytes"] = me.agree(progress["bytes"])       # any rank may be the one that saves it


def summary(groups, everything, records, size):
    """What a step's responses say of the policy: means over all that were sampled, kept or not."""
    tell = [r for g in everything for r in g]
    n = max(1, len(tell))
    right = [sum(r.correct for r in g) for g in everything]
    m = dict(reward=sum(r.reward for r in tell) / n, pass_rate=sum(r.correct for r in tell) / n,
             solve_none=right.count(0) / max(1, len(right)), solve_all=right.count(size) / max(1, len(right)),
             groups=len(groups), responses=len(tell), length=sum(len(r.tokens) for r in tell) / n,
             truncated=sum(r.finish != "stop" for r in tell) / n,
             timeouts=sum(timed_out(r.verdict) for r in tell))
    m |= {f"reward_{k}": sum(r.terms.get(k, 0) for r in tell) / n for k in (tell[0].terms if tell else ())}
    by_domain = {}
    for r in tell:
        by_domain.setdefault(records[r.prompt]["domain"], []).append(r)
    for d, own in by_domain.items():
        m |= {f"pass_{d}": sum(r.correct for r in own) / len(own),
              f"reward_{d}": sum(r.reward for r in own) / len(own)}
    return m


def step_line(step, m, cfg):
    middle = f"kl {m['k3']:.4f}" if "k3" in m else "nothing to learn from: no group differs"
    return (f"step {step:4d}/{cfg.steps} | reward {m['reward']:.3f} | pass {m['pass_rate']:.3f} | {middle} | "
            f"len {m['length']:.0f} | cut {m['truncated']:.0%} | {human(m['tok_s'])} tok/s | "
            f"{m.get('wait_s', 0):.1f} s gen + {m['score_s'] + m['train_s']:.1f} s train")


if __name__ == "__main__":
    launch(main, Config, recipe)
