"""New weights into an engine, and the proof that they arrived."""

import math
import re

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from cli import InputError
from engines.contract import EngineError, known_ids, log_distribution
from runtime import reshard

# -- new weights, and the proof that they arrived ------------------------------------------------------------

class StaleWeights(EngineError):
    """The engine does not compute what the trainer computes."""


def tensor_kind(name):
    """"model.layers.3.self_attn.q_proj.weight" -> "self_attn.q_proj.weight"."""
    return re.sub(r"^.*\.layers\.\d+\.", "", name)


def full_tensors(model, dtype=None):
    """(hub name, whole tensor) of every parameter. Of a sharded model all ranks must go through it together:
    each tensor is gathered when its turn comes, matrices in `dtype`."""
    reshard(model)
    for name, p in model.named_parameters():
        p = p.detach()
        p = p.to(dtype) if dtype and p.ndim > 1 else p
        yield name, p.full_tensor() if isinstance(p, DTensor) else p


@torch.no_grad()
def score(model, prompts, samples, temperature=1.0, top_p=1.0):
    """The model's own log-probs of the first sample of each prompt, a list of tensors: one plain forward pass
    over the whole texts, the oracle of both engines. All ranks of a sharded model call it together."""
    rows = [list(ids) + own[0].tokens for ids, own in zip(prompts, samples, strict=True)]
    device, width = next(model.parameters()).device, max(map(len, rows))
    tokens, where, targets, sizes = torch.zeros(len(rows), width, dtype=torch.int64), [], [], []
    for i, (ids, own) in enumerate(zip(prompts, samples, strict=True)):
        tokens[i, :len(rows[i])] = torch.tensor(rows[i])
        where += range(i * width + len(ids) - 1, i * width + len(rows[i]) - 1)
        targets += own[0].tokens
        sizes.append(len(own[0].tokens))
    where, targets = torch.tensor(where, device=device), torch.tensor(targets, device=device)
    known = known_ids(model.arch, model.tokenizer)

    def read(h, weight, scale):                           # only where a sampled token is predicted
        logp = log_distribution((h[where] @ weight[:known].T).float() * scale, temperature, top_p)
        return logp.gather(1, targets[:, None])[:, 0]

    logp = model(tokens.to(device), None, read)
    reshard(model)
    return list(logp.cpu().split(sizes))


def difference(a, b):
    """Mean absolute difference of two lists of log-probs, in nats; inf where one is not a number."""
    a, b = (torch.cat([torch.as_tensor(x, dtype=torch.float64) for x in z]) for z in (a, b))
    return (a - b).abs().mean().nan_to_num(math.inf).item()


def worst_rank(value, model):
    """The largest of all ranks' values: they go on together, or stop together."""
    value = torch.tensor(value, dtype=torch.float64, device=next(model.parameters()).device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def sample_all(engine, model, prompts, new_tokens):
    """Samples on every rank, or an error on every rank."""
    samples, problem = None, None
    try:
        samples = engine.generate(prompts, max_new_tokens=new_tokens, stop=[])
    except InputError as e:
        problem = e
    if worst_rank(float(problem is not None), model):
        raise problem or EngineError("the engine of another rank failed")
    return samples


def push(engine, model, *, check=True, threshold=0.0, prompts=None, new_tokens=16):
    """Moves the trainer's weights into the engine and proves that they arrived: the engine samples a few
    tokens, the trainer scores them. Returns the mean |difference| of log-probs in nats, the worst rank's, or
    None unchecked.

    All ranks call it together. threshold: above it StaleWeights, a report that names the worst kind of
    tensor; 0 = 1e-4 if engine and trainer compute in fp32, else 0.05 (bf16's own rounding makes up to 0.01).
    prompts: what the samples follow; None = four times 16 random ids.
    """
    engine.load_weights(full_tensors(model, engine.dtype))
    if not check:
        return None
    computes = getattr(model, "compute_dtype", next(model.parameters()).dtype)
    threshold = threshold or (1e-4 if engine.dtype == computes == torch.float32 else 0.05)
    if prompts is None:
        length = max(1, min(16, engine.context - new_tokens))
        rng = torch.Generator().manual_seed(0)
        prompts = torch.randint(engine.known, (4, length), generator=rng).tolist()
    samples = sample_all(engine, model, prompts, new_tokens)
    gap = difference([own.logprobs for own, in samples], score(model, prompts, samples))
    gap = worst_rank(gap, model)
    if gap > threshold:
        raise StaleWeights(report(gap, threshold, probe(engine, model, prompts, new_tokens)))
    return gap


@torch.no_grad()
def probe(engine, model, prompts, new_tokens):
    """Which kinds of tensor a push does not reach: each is changed in the trainer, pushed, and the same
    samples are asked for again. Returns {kind: (answer, moved)} in nats a token: how far that moved the
    engine's log-probs, and how far the trainer's. answer 0: the engine goes on as before, to the last bit.
    Trainer and engine end with the weights they had."""
    kinds, found = {}, {}
    reshard(model)
    for name, p in model.named_parameters():
        kinds.setdefault(tensor_kind(name), []).append(p.to_local() if isinstance(p, DTensor) else p.detach())
    old = sample_all(engine, model, prompts, new_tokens)
    own = score(model, prompts, old)
    for kind, tensors in kinds.items():
        before, scale, moved = [p.clone() for p in tensors], 0.25, 0.0
        try:
            while not moved > 0.5 and scale < 10:         # nats: far above any rounding
                scale *= 2
                rng = torch.Generator().manual_seed(0)    # the same on every rank: replicas stay equal
                for p, b in zip(tensors, before, strict=True):
                    size = b.float().square().mean().sqrt().item() if b.numel() else 0.0
                    noise = torch.randn(b.shape, generator=rng).to(b.device, b.dtype)
                    p.copy_(b + noise * scale * (size or 0.1))
                moved = worst_rank(difference(own, score(model, prompts, old)), model)
            engine.load_weights(full_tensors(model, engine.dtype))
            new = sample_all(engine, model, prompts, new_tokens)
        finally:                                          # whatever happens, the trainer keeps its weights
            for p, b in zip(tensors, before, strict=True):
                p.copy_(b)
        answer = 0.0
        for (a,), (b,) in zip(old, new, strict=True):     # as far as they follow the same tokens
            pairs = list(zip(a.tokens, b.tokens, strict=False))
            same = next((t for t, (x, y) in enumerate(pairs) if x != y), len(pairs) - 1) + 1
            answer += difference([a.logprobs[:same]], [b.logprobs[:same]]) / len(old)
        found[kind] = -worst_rank(-answer, model), moved          # of the engine that answers least
    engine.load_weights(full_tensors(model, engine.dtype))
    return found


def report(gap, threshold, found):
    """What push() says when the engine is stale; found: of probe()."""
    share = {kind: answer / moved if moved else math.inf for kind, (answer, moved) in found.items()}
    worst, *others = sorted(found, key=share.get)
    text = (f"after a push the engine's log-probs are {gap:.2g} nats a token from the trainer's (threshold "
            f"{threshold:g}): it does not sample from these weights. Each kind of tensor was changed and "
            f"pushed again: ")
    if share[worst] > 0.1:
        return text + (f"all arrive, {worst} the least ({share[worst]:.0%}). That push was cut short, a part "
                       f"of that kind is stale, or the engine computes otherwise (dtype, context, version)")
    stale = [worst] + [kind for kind in others if share[kind] <= 0.1]
    return text + "; ".join(f"{kind} does not arrive (moves the trainer by {found[kind][1]:.2g} nats, the "
                            f"engine by {found[kind][0]:.2g})" for kind in stale
                            ) + f". The other {len(found) - len(stale)} kinds do"
