"""New weights into an engine, and the proof that they arrived."""

import math
import re
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from cli import InputError
from engines.contract import EngineError, compute_dtype, known_ids, log_distribution
from runtime import reshard


class StaleWeights(EngineError):
    """The engine does not compute what the trainer computes."""


def push(engine, model, *, check=True, threshold=0.0, prompts=None, new_tokens=16):
    """Moves the trainer's weights into the engine and proves that they arrived: the engine samples a few
    tokens, the trainer scores them. Returns the mean |difference| of log-probs in nats, the worst rank's, or
    None unchecked.

    All ranks call it together. threshold: above it StaleWeights, a report that names the worst kind of
    tensor; 0 = 1e-4 if engine and trainer compute in fp32, else 0.05 (bf16's rounding makes up to 0.01).
    prompts: what the samples follow; None = four times 16 random ids.
    """
    engine.load_weights(full_tensors(model, engine.dtype))
    if not check:
        return None
    if not threshold:
        exact = engine.dtype == compute_dtype(model) == torch.float32
        threshold = 1e-4 if exact else 0.05
    if prompts is None:
        length = max(1, min(16, engine.context - new_tokens))
        rng = torch.Generator().manual_seed(0)
        prompts = torch.randint(engine.known, (4, length), generator=rng).tolist()
    samples = sample_all(engine, model, prompts, new_tokens)
    logprobs = [group[0].logprobs for group in samples]
    gap = worst_rank(difference(logprobs, score(model, prompts, samples)), model)
    if gap > threshold:
        raise StaleWeights(report(gap, threshold, probe(engine, model, prompts, new_tokens)))
    return gap


# -- the weights ---------------------------------------------------------------------------------------------

def tensor_kind(name):
    """"model.layers.3.self_attn.q_proj.weight" -> "self_attn.q_proj.weight"."""
    return re.sub(r"^.*\.layers\.\d+\.", "", name)


def full_tensors(model, dtype=None):
    """(hub name, whole tensor) of every parameter. Of a sharded model all ranks must go through it together:
    each tensor is gathered when its turn comes, matrices in `dtype`."""
    reshard(model)
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if dtype and tensor.ndim > 1:
            tensor = tensor.to(dtype)
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensors(model):
    """{kind of tensor: what this rank holds of it, in all layers}; writing to them changes the model."""
    reshard(model)
    kinds = {}
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        kinds.setdefault(tensor_kind(name), []).append(local.detach())
    return kinds


# -- both sides' log-probs -----------------------------------------------------------------------------------

def sample_all(engine, model, prompts, new_tokens):
    """Samples on every rank, or an error on every rank."""
    samples = problem = None
    try:
        samples = engine.generate(prompts, max_new_tokens=new_tokens, stop=[])
    except InputError as e:
        problem = e
    if worst_rank(float(problem is not None), model):
        raise problem or EngineError("the engine of another rank failed")
    return samples


@torch.no_grad()
def score(model, prompts, samples, temperature=1.0, top_p=1.0):
    """The model's log-probs of the first sample of each prompt, a list of tensors: one plain forward pass
    over the whole texts, the oracle of both engines. All ranks of a sharded model call it together."""
    answers = [group[0].tokens for group in samples]
    texts = [list(ids) + answer for ids, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, texts))
    tokens = torch.zeros(len(texts), width, dtype=torch.int64)
    where = []                                            # places, in the flattened texts, that predict
    targets = []                                          # these sampled tokens
    for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        tokens[row, :len(text)] = torch.tensor(text)
        first = row * width + len(text) - len(answer) - 1
        where += range(first, first + len(answer))
        targets += answer
    device = next(model.parameters()).device
    where = torch.tensor(where, device=device)
    targets = torch.tensor(targets, device=device)
    known = known_ids(model.arch, model.tokenizer)

    def sampled_logprobs(h, weight, scale):
        logits = (h[where] @ weight[:known].T).float() * scale
        logp = log_distribution(logits, temperature, top_p)
        return logp.gather(1, targets[:, None])[:, 0]

    logprobs = model(tokens.to(device), None, sampled_logprobs)
    reshard(model)
    return list(logprobs.cpu().split([len(answer) for answer in answers]))


def difference(a, b):
    """Mean absolute difference of two lists of log-probs, in nats; inf where one is not a number."""
    a = torch.cat([torch.as_tensor(logprobs, dtype=torch.float64) for logprobs in a])
    b = torch.cat([torch.as_tensor(logprobs, dtype=torch.float64) for logprobs in b])
    return (a - b).abs().mean().nan_to_num(math.inf).item()


def worst_rank(value, model):
    """The largest of all ranks' values: they go on together, or stop together."""
    value = torch.tensor(value, dtype=torch.float64, device=next(model.parameters()).device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


# -- which kind of tensor does not arrive --------------------------------------------------------------------

class Reach(NamedTuple):
    """How far a changed kind of tensor moved the log-probs, in nats a token."""
    engine: float
    trainer: float

    def share(self):
        return self.engine / self.trainer if self.trainer else math.inf


@torch.no_grad()
def probe(engine, model, prompts, new_tokens):
    """Which kinds of tensor a push does not reach: each is changed in the trainer, pushed, and the same
    samples are asked for again. Returns {kind: Reach}; an engine that is moved by 0 goes on as before, to the
    last bit. Trainer and engine end with the weights they had."""
    reaches = {}
    kinds = local_tensors(model)
    old_samples = sample_all(engine, model, prompts, new_tokens)
    old_scores = score(model, prompts, old_samples)
    for kind, tensors in kinds.items():
        originals = [tensor.clone() for tensor in tensors]
        scale = 0.25
        moved = 0.0
        try:
            while not moved > 0.5 and scale < 10:         # nats: far above any rounding
                scale *= 2
                disturb(tensors, originals, scale)
                moved = difference(old_scores, score(model, prompts, old_samples))
                moved = worst_rank(moved, model)
            engine.load_weights(full_tensors(model, engine.dtype))
            new_samples = sample_all(engine, model, prompts, new_tokens)
        finally:                                          # whatever happens, the trainer keeps its weights
            for tensor, original in zip(tensors, originals, strict=True):
                tensor.copy_(original)
        answer = samples_difference(old_samples, new_samples)
        least_answer = -worst_rank(-answer, model)        # of the engine that answers least
        reaches[kind] = Reach(least_answer, moved)
    engine.load_weights(full_tensors(model, engine.dtype))
    return reaches


def disturb(tensors, originals, scale):
    """Adds noise of `scale` times a tensor's own size, the same on every rank: replicas stay equal."""
    rng = torch.Generator().manual_seed(0)
    for tensor, original in zip(tensors, originals, strict=True):
        size = original.float().square().mean().sqrt().item() if original.numel() else 0.0
        noise = torch.randn(original.shape, generator=rng).to(original.device, original.dtype)
        tensor.copy_(original + noise * scale * (size or 0.1))


def samples_difference(old, new):
    """Mean difference of two lists of samples' log-probs, as far as they follow the same tokens."""
    total = 0.0
    for (a,), (b,) in zip(old, new, strict=True):
        compared = tokens_compared(a.tokens, b.tokens)
        total += difference([a.logprobs[:compared]], [b.logprobs[:compared]]) / len(old)
    return total


def tokens_compared(a, b):
    """How many of the first tokens follow the same tokens: up to the first that differs, that one too."""
    length = min(len(a), len(b))
    for place in range(length):
        if a[place] != b[place]:
            return place + 1
    return length


def report(gap, threshold, reaches):
    """What push() says when the engine is stale; reaches: of probe()."""
    text = (f"after a push the engine's log-probs are {gap:.2g} nats a token from the trainer's (threshold "
            f"{threshold:g}): it does not sample from these weights. Each kind of tensor was changed and "
            f"pushed again: ")
    worst = min(reaches, key=lambda kind: reaches[kind].share())
    stale = [kind for kind in reaches if reaches[kind].share() <= 0.1]
    if not stale:
        return text + (f"all arrive, {worst} the least ({reaches[worst].share():.0%}). That push was cut "
                       f"short, a part of that kind is stale, or the engine computes otherwise (dtype, "
                       f"context, version)")
    stale.sort(key=lambda kind: reaches[kind].share())
    lines = []
    for kind in stale:
        lines.append(f"{kind} does not arrive (moves the trainer by {reaches[kind].trainer:.2g} nats, the "
                     f"engine by {reaches[kind].engine:.2g})")
    return text + "; ".join(lines) + f". The other {len(reaches) - len(stale)} kinds do"
