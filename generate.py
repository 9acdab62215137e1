r"""Sampling from a model: one interface, two engines. rl.py, evaluate.py and analyze.py go through this door.

    python generate.py --init=runs/mt/model --prompt='What is 12 + 30?\n'          # try a checkpoint
    python generate.py --init=granite-3.3-8b --engine=vllm --n=4 --prompt=-        # the prompt from stdin

    engine = engine(model)                                     # embedded: plain torch, any machine
    engine = engine(model, kind="vllm")                        # real vLLM
    samples = engine.generate(prompts, n=16, max_new_tokens=512, seed=1)    # token ids in, Samples out
    push(engine, trainer)                                      # new weights, proved to have arrived

What both engines promise:
  - the log-probs are those of the distribution that was sampled from: after temperature and top-p, over the
    ids that have a text (a head may have more rows: they are never sampled). Greedy: at temperature 1;
  - the seed of a sample is a hash of (run seed, its prompt's key, its index), so no two samples share their
    noise, and a sample does not depend on which others are made with it, rounding aside;
  - only what `stop` names ends a sample early; the stop token is part of the sample and was sampled;
  - after load_weights() nothing of the old weights is left: no stale tensor, no stale prefix.

Notation: S samples being made, P their prompts, B rows of a step, T tokens, K kv heads, R query heads a kv
head, D head dim.
"""

import hashlib
import math
import operator
import os
import re
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from kernels import conv1d, ssd
from model import NAMES, Attention, Mamba, attend, load, project
from runtime import InputError, did_you_mean, human, launch, reshard

# -- requests: the same for both engines ---------------------------------------------------------------------


class EngineError(InputError):
    """The engine died, stalled or went wrong; the message says which side, and what is known of it."""


@dataclass
class Sample:
    """One answer. logprobs: of each token, under the distribution it was sampled from. text: the tokens
    decoded, without the stop that ended them ("" where there is no tokenizer)."""
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str                   # stop: ended by itself | length: cut by max_new_tokens or context
    text: str


@dataclass
class Request:
    """The n samples of one prompt."""
    ids: list[int]
    seeds: list[int]                     # one a sample
    room: int                            # new tokens at most
    index: int = 0                       # which prompt it is
    samples: list = field(default_factory=list)


@dataclass
class Stops:
    """What ends a sample: any of these ids, or a decoded text with any of these strings in it."""
    ids: list[int]
    strings: list[str]

    def text(self, tokenizer, tokens, finish_reason):
        """The text of a sample, without the stop that ended it."""
        if tokenizer is None:
            return ""
        if finish_reason == "stop" and tokens[-1] in self.ids:
            tokens = tokens[:-1]
        text = tokenizer.decode(tokens)
        ends = [at for at in map(text.find, self.strings) if at >= 0]
        return text[:min(ends)] if ends else text


def sample_seed(seed, key, index):
    """63 bits from the run's seed, the prompt's key and the index of the sample: seeds that are near each
    other, or shared by prompts, make samples agree (RL.md, finding 4)."""
    digest = hashlib.sha256(repr(plain((seed, key, index))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def plain(key):
    """A key as Python's own ints, texts and tuples: equal keys, whatever made them, give equal noise."""
    if isinstance(key, tuple | list):
        return tuple(map(plain, key))
    return key if isinstance(key, str) else whole(key, "a key")


def whole(number, what):
    """A whole number (numpy's and torch's too) as an int."""
    try:
        return operator.index(number)
    except TypeError:
        raise InputError(f"{what} is {number!r:.60}; give whole numbers (for keys also texts and tuples)"
                         ) from None


def plan(engine, prompts, n, max_new_tokens, temperature, top_p, stop, seed, keys, first):
    """Checks what an engine's generate() was given; returns ([Request], Stops). InputError names what does
    not fit."""
    context, known, tokenizer = engine.context, engine.known, engine.tokenizer
    n, max_new_tokens = whole(n, "--n"), whole(max_new_tokens, "--max_new_tokens")
    for name, value, ok, need in (("n", n, n >= 1, "at least 1"),
                                  ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
                                  # vLLM would sample at 0.01 below it
                                  ("temperature", temperature, temperature == 0
                                   or 0.01 <= temperature < math.inf, "0, or 0.01 and more"),
                                  ("top_p", top_p, 0 < top_p <= 1, "over 0 and up to 1")):
        if not ok:
            raise InputError(f"--{name}={value}: give {need}")
    if stop is None:
        stop = [] if tokenizer is None else [tokenizer.eos_id]
    stop = list(stop) if isinstance(stop, list | tuple | set) else [stop]
    stops = Stops([whole(s, "stop") for s in stop if not isinstance(s, str)],
                  [s for s in stop if isinstance(s, str)])
    prompts = list(prompts)
    if any(isinstance(ids, str) or not hasattr(ids, "__iter__") for ids in prompts):
        raise InputError("prompts are lists of token ids, one a prompt: tokenizer.encode(text) makes one")
    prompts = [[whole(id, f"an id of prompt {i}") for id in ids] for i, ids in enumerate(prompts)]
    if stops.strings and (tokenizer is None or "" in stops.strings):
        raise InputError(f"stop={stop!r}: a string needs a tokenizer, and a letter at least")
    for what, ids in [("stop", stops.ids)] + [(f"prompt {i}", ids) for i, ids in enumerate(prompts)]:
        if ids and not 0 <= min(ids) <= max(ids) < known:
            wrong = max(ids) if max(ids) >= known else min(ids)
            raise InputError(f"{what} has the id {wrong}; the model knows 0 to {known - 1}: was it encoded "
                             f"by another tokenizer?")
    if keys is None:                     # a prompt is its tokens; a second copy of it is another prompt
        seen = Counter()
        keys = []
        for ids in map(tuple, prompts):
            keys.append((ids, seen[ids]))
            seen[ids] += 1
    keys = list(map(plain, keys))
    if len(set(keys)) != len(prompts):
        raise InputError(f"{len(prompts)} prompts, but {len(set(keys))} different keys: prompts that share a "
                         f"key would share their noise")
    requests = []
    for i, (ids, key) in enumerate(zip(prompts, keys, strict=True)):
        if not ids:
            raise InputError(f"prompt {i} is empty: give one token at least (the eos begins a new document)")
        if len(ids) >= context:
            raise InputError(f"prompt {i} has {len(ids)} tokens, the context is {context}: nothing can "
                             f"follow; shorten it, or raise --context")
        seeds = [sample_seed(seed, key, first + j) for j in range(n)]
        requests.append(Request(ids, seeds, min(max_new_tokens, context - len(ids))))
    return requests, stops


def context_of(arch, context):
    """Tokens of a prompt and its answer: context, or if that is 0 what config.json allows."""
    longest = arch.raw.get("max_position_embeddings") or 0
    if longest and context > longest or not (context or longest):
        raise InputError(f"--context={context}: the model's config.json says max_position_embeddings = "
                         f"{longest or 'nothing'}")
    return context or longest


def checked(pairs, arch, shapes):
    """(hub name, tensor) pairs as they come, with names and shapes compared with the architecture's; a tied
    head follows its embedding. InputError on what does not belong, came twice, or in the end is missing."""
    missing, embed = dict(shapes), NAMES[arch.family]["embed"] + ".weight"
    for name, tensor in pairs:
        if arch.tied and name == "lm_head.weight":
            continue
        if missing.get(name) != tuple(tensor.shape):
            raise InputError(f"load_weights: {name} {list(tensor.shape)}: " + (
                f"its shape is {list(shapes[name])}" if name in missing else "given twice" if name in shapes
                else f"this {arch.family} model has no such tensor{did_you_mean(name, shapes)}"))
        del missing[name]
        yield name, tensor.detach()
        if arch.tied and name == embed:
            yield "lm_head.weight", tensor.detach()
    if missing:
        raise InputError(f"load_weights: {len(missing)} of {len(shapes)} tensors are missing, "
                         f"{next(iter(missing))} for one; give them all, or the model is half old, half new")


def known_ids(arch, tokenizer):
    """How many ids can be sampled: those with a text. InputError if the model has fewer rows than that."""
    if tokenizer is None:
        return arch.V
    if tokenizer.vocab_size > arch.V:
        raise InputError(f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model only {arch.V} "
                         f"rows: they do not belong together; take the tokenizer that came with the model")
    return tokenizer.vocab_size


def log_distribution(logits, temperature=1.0, top_p=1.0):
    """Log-probs (..., V) fp32 that a sampler with these settings draws from; temperature 0 counts as 1. top-p
    keeps the most probable ids until their mass reaches top_p, the one that crosses it included."""
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if top_p == 1:
        return logp
    ordered, index = logp.sort(-1, descending=True)
    mass = ordered.exp().cumsum(-1)
    dropped = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, index, mass - ordered.exp() >= top_p)
    return logp.masked_fill(dropped, -math.inf).log_softmax(-1)


def draw(logits, uniform, temperature, top_p):
    """Token ids (B) and their log-probs (B) from logits (B, V), by inverting the cumulative distribution at
    uniform (B) fp64 in [0, 1): one number decides a token, so near-equal logits draw equal tokens."""
    logp = log_distribution(logits, temperature, 1.0 if temperature == 0 else top_p)
    if temperature == 0:
        ids = logits.argmax(-1)
    else:
        cumulative = logp.double().exp_().cumsum_(-1)     # fp32 would lose ids of a large vocabulary
        ids = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
        ids.clamp_(max=logits.shape[1] - 1)               # NaN: the caller sees it in the log-prob
    return ids, logp.gather(1, ids[:, None])[:, 0]


def make_engine(init, cfg, me):
    """The engine that a stage's flags ask for. init: a checkpoint, as --init has it."""
    options = dict(context=cfg.context, max_batch=cfg.max_batch)
    if cfg.engine == "vllm":
        options |= dict(layout=cfg.layout, gpus=cfg.gpus, tensor_parallel=cfg.tensor_parallel,
                        gpu_memory=cfg.gpu_memory)
    elif cfg.engine == "torch":
        init = load(init, dtype=getattr(torch, cfg.dtype), device=me.device)
    return engine(init, cfg.engine, dtype=cfg.dtype, **options)


# -- the embedded engine: what earlier tokens leave behind ---------------------------------------------------

MASKED = -1e30                                            # finite: a row without any key must not become NaN


def attention(q, k, v, mask, scale):
    """Softmax attention and its log-sum-exp, by which two of them over different keys can be joined.
    q (B, heads, Q, D); k, v (B, heads, T, D); mask (B, 1, 1 or Q, T), added. Returns (B, heads, Q, D) and
    fp32 (B, heads, Q)."""
    aten = torch.ops.aten
    if q.is_cpu:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    mask = mask.expand(*q.shape[:3], k.shape[2])
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, scale=scale)
    return out, lse[..., :q.shape[2]]


def round_up(n, multiple=16):                             # the GPU's kernel wants aligned masks
    return -(-n // multiple) * multiple


class Cache:
    """Memory of everything read so far. Attention: keys and values of the prompts, a row each, which their
    samples share, and of the samples; with a window, only as many as can be seen (a ring). Mamba: the last
    inputs of the convolution and the state, at the end of each prompt and of each sample."""

    def __init__(self, model, prompts, samples, prompt_tokens, sample_tokens):
        """Rows and tokens a row to make room for."""
        window, weight = model.arch.window or math.inf, model.trunk[0].weight
        self.rows = prompts, samples
        self.sizes = [int(min(t, window)) for t in (prompt_tokens, sample_tokens)]
        self.layers = {}                                  # module: [tensors of prompts, tensors of samples]
        for module in model.modules():
            if isinstance(module, Attention | Mamba):
                self.layers[module] = [[torch.zeros(rows, *shape, dtype=dtype or weight.dtype,
                                                    device=weight.device)
                                        for shape, dtype in self.shapes(module, tokens)]
                                       for rows, tokens in zip((prompts, samples), self.sizes, strict=True)]

    @staticmethod
    def shapes(module, tokens):
        """What one row of a layer holds: [(shape, dtype or None for the weights')]."""
        if isinstance(module, Attention):
            return [((module.arch.K, round_up(tokens), module.arch.D), None)] * 2
        channels, _, width = module.conv1d.weight.shape
        return [((width - 1, channels), None), ((module.heads, module.P, module.S), torch.float32)]

    @classmethod
    def row_bytes(cls, model, tokens):
        """Bytes of one row with room for that many tokens, over all layers."""
        tokens = int(min(tokens, model.arch.window or math.inf))
        width = model.trunk[0].weight.itemsize
        return sum(math.prod(shape) * (dtype.itemsize if dtype else width)
                   for module in model.modules() if isinstance(module, Attention | Mamba)
                   for shape, dtype in cls.shapes(module, tokens))

    def move(self, which, source, target):
        """Rows of the prompts (0) or the samples (1): from source to target, index tensors."""
        for tensors in self.layers.values():
            for t in tensors[which]:
                t[target] = t[source]

    def begin(self, prompt_rows, sample_rows):
        """Samples begin where their prompts end: the Mamba states are copied, keys and values shared."""
        for module, (prompts, samples) in self.layers.items():
            if isinstance(module, Mamba):
                for prompt, sample in zip(prompts, samples, strict=True):
                    sample[sample_rows] = prompt[prompt_rows]


class Reading:
    """One pass over whole prompts, a row each, padded on the right: attention, convolution and scan as in
    training; what they leave behind goes into the prompts' rows of the cache."""

    def __init__(self, cache, rows, lengths):
        self.cache, self.rows, self.lengths = cache, rows, lengths          # (B) int64 each, on the device
        self.batch = torch.arange(len(rows), device=rows.device)[:, None]
        self.positions = torch.arange(int(lengths.max()), device=rows.device)[None]

    def attend(self, module, q, k, v, scale, window):
        kept = min(k.shape[1], self.cache.sizes[0])                         # the window's, if it is shorter
        index = (self.lengths[:, None] - kept).clamp(min=0) + torch.arange(kept, device=q.device)
        for memory, new in zip(self.cache.layers[module][0], (k, v), strict=True):
            memory[self.rows, :, :kept] = new[self.batch, index].transpose(1, 2)
        return attend(q, k, v, scale, window, None)       # padding comes last: no real token sees it

    def conv(self, module, x):
        weight = module.conv1d.weight
        before = weight.shape[-1] - 1
        last = self.lengths[:, None] + torch.arange(before, device=x.device)
        self.cache.layers[module][0][0][self.rows] = F.pad(x, (0, 0, before, 0))[self.batch, last]
        return conv1d.causal_conv1d(x, weight, module.conv1d.bias)

    def scan(self, module, x, dt, *terms):
        dt = dt * (self.positions < self.lengths[:, None])[..., None]       # padding leaves the state alone
        y, state = ssd.ssd(x, dt, *terms, last=True)
        self.cache.layers[module][0][1][self.rows] = state
        return y


class Writing:
    """One new token a sample. Attention is computed in two parts, over the shared keys of the prompts, where
    all samples of a prompt are the queries of one product, and over each sample's own; their log-sum-exps
    join them exactly."""

    def __init__(self, cache, arch, prompt_lengths, groups):
        """prompt_lengths (P) of the prompts' rows; groups (B): each sample's prompt row; int64, on the
        device."""
        self.cache, self.window, self.groups, self.heads = cache, arch.window, groups, arch.H // arch.K
        self.rows = torch.arange(len(groups), device=groups.device)
        # members (P, n): the samples of each prompt, padded by any row; place (B): the inverse
        order = torch.argsort(groups, stable=True)
        sizes = torch.bincount(groups, minlength=len(prompt_lengths))
        self.place = torch.empty_like(groups)
        self.place[order] = self.rows - (sizes.cumsum(0) - sizes)[groups[order]]
        self.members = torch.zeros(len(sizes), int(sizes.max()), dtype=torch.int64, device=groups.device)
        self.members[groups, self.place] = self.rows
        self.lengths, self.stored = prompt_lengths[groups], prompt_lengths.clamp(max=cache.sizes[0])
        self.longest = int(self.stored.max())
        self.prompt_tokens = round_up(self.longest)
        self.index = torch.arange(round_up(max(cache.sizes)), device=groups.device)
        self.exists = self.index[:self.prompt_tokens] < self.stored[:, None]
        self.prompt_mask = self._additive(self.exists[:, None, None])       # (P, 1, 1, T)

    def step(self, counts, most):
        """counts (B) int64: each sample's own tokens, the one being read included; most: the largest of
        them."""
        kept = self.cache.sizes[1]
        self.positions, self.at = (self.lengths + counts - 1)[:, None], (counts - 1) % kept     # maybe a ring
        self.tokens = round_up(min(most, kept))
        stored = counts.clamp(max=kept)[:, None]
        self.mask = self._additive((self.index[:self.tokens] < stored)[:, None, None])
        # what each sample still sees of its prompt, once the window has moved on; a row a query head
        if self.window and self.longest + most > self.window:
            from_ = (self.stored[:, None] + counts[self.members] - self.window)[..., None]
            seen = self.exists[:, None] & (self.index[:self.prompt_tokens] >= from_)
            seen = seen[:, None].repeat_interleave(self.heads, 2)           # (P, 1, n R, T)
            self.prompt_mask = self._additive(seen)
        return self

    def _additive(self, seen):
        dtype = next(iter(self.cache.layers.values()))[0][0].dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, MASKED)

    def attend(self, module, q, k, v, scale, window):
        (B, _, _, D), K, (P, n) = q.shape, k.shape[2], self.members.shape
        (prompt_k, prompt_v), (own_k, own_v) = self.cache.layers[module]
        own_k[self.rows, :, self.at], own_v[self.rows, :, self.at] = k[:, 0], v[:, 0]
        q = q.view(B, K, -1, D)                           # the query heads of a kv head as its queries
        R, t, tp = q.shape[2], self.tokens, self.prompt_tokens
        own, own_lse = attention(q, own_k[:B, :, :t], own_v[:B, :, :t], self.mask, scale)
        q = q[self.members].transpose(1, 2).reshape(P, K, n * R, D)
        out, lse = attention(q, prompt_k[:P, :, :tp], prompt_v[:P, :, :tp], self.prompt_mask, scale)
        out = out.view(P, K, n, R, D)[self.groups, :, self.place]
        lse = lse.view(P, K, n, R)[self.groups, :, self.place]
        share = torch.sigmoid(lse.float() - own_lse.float())[..., None]
        return torch.lerp(own.float(), out.float(), share).to(q.dtype).view(B, 1, -1, D)

    def conv(self, module, x):
        state = self.cache.layers[module][1][0][:len(x)]
        return conv1d.step(state, x[:, 0], module.conv1d.weight, module.conv1d.bias)[:, None]

    def scan(self, module, x, dt, A, B, C, D):
        state = self.cache.layers[module][1][1][:len(x)]
        return ssd.step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)[:, None]


# -- the embedded engine -------------------------------------------------------------------------------------

class TorchEngine:
    """Continuous batching in plain torch: a row that ends makes place for the next sample; a prompt is read
    once for all its samples; memory is set aside once a call, as much as cache_gb allows, and what does not
    fit waits."""

    def __init__(self, model, *, context=0, max_batch=256, cache_gb=0.0, read_tokens=8192, progress=True):
        """model: a whole Model (not sharded), used as it is, weights shared. context: tokens of a prompt and
        its answer, 0 = what config.json says. max_batch: samples at a time. cache_gb: of keys, values and
        states, 0 = half of what is free on a GPU, 4 on a CPU. read_tokens: of prompts at a time."""
        sharded = [n for n, p in model.named_parameters() if isinstance(p, DTensor)]
        if sharded:
            raise InputError(f"the engine needs whole weights, but {sharded[0]} is sharded: give it a model "
                             f"of its own, and push() the trainer's weights into it")
        self.model, self.tokenizer = model, model.tokenizer
        self.max_batch, self.progress = max_batch, progress
        self.context, self.cache_gb, self.broken = context_of(model.arch, context), cache_gb, False
        self.known, self.read_tokens = known_ids(model.arch, model.tokenizer), read_tokens
        self.device, self.dtype = model.trunk[0].weight.device, model.trunk[0].weight.dtype

    @torch.no_grad()
    def load_weights(self, pairs):
        """pairs: (hub name, whole tensor) of every parameter, copied in place; see `checked`. After an error
        the engine refuses to sample until all have come."""
        own, self.broken = dict(self.model.named_parameters()), True
        for name, tensor in checked(pairs, self.model.arch, {n: tuple(p.shape) for n, p in own.items()}):
            if name in own:                               # not the tied head: it is the embedding
                own[name].copy_(tensor)
        self.broken = False

    def sleep(self):
        """Gives the memory between two calls back (the cache is gone already)."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self):
        pass

    def close(self):
        pass

    def _allocate(self, requests):
        """A cache for as many samples at a time as the budget holds; and that number."""
        n = len(requests[0].seeds)
        prompt_tokens = max(len(r.ids) for r in requests)
        own_tokens = max(r.room for r in requests)
        a_prompt, a_sample = (Cache.row_bytes(self.model, t) for t in (prompt_tokens, own_tokens))

        budget = self.cache_gb * 1e9
        if not budget:
            budget = torch.cuda.mem_get_info(self.device)[0] / 2 if self.device.type == "cuda" else 4e9
        samples = min(self.max_batch, n * len(requests))
        while samples:                                    # the first and the last prompt may be partly done
            prompts = min(len(requests), samples, -(-samples // n) + 1)
            if samples * a_sample + prompts * a_prompt <= budget:
                break
            samples -= 1
        if not samples:
            raise InputError(f"--cache_gb={budget / 1e9:g} does not hold one sample: a prompt of "
                             f"{prompt_tokens} tokens and {own_tokens} new ones need "
                             f"{(a_prompt + a_sample) / 1e9:.3g} GB; raise it, or lower --max_new_tokens")
        # more prompts than that, if there is room: a prompt's row is free only when its last sample has ended
        prompts = int(min(len(requests), samples, (budget - samples * a_sample) // a_prompt))
        try:
            return Cache(self.model, prompts, samples, prompt_tokens, own_tokens), samples
        except RuntimeError as e:                         # torch.OutOfMemoryError is one, a CPU's has no name
            raise InputError(f"--cache_gb={budget / 1e9:g}: the device has not that much left "
                             f"({str(e).splitlines()[0]}); lower it") from None

    @torch.inference_mode()
    def generate(self, prompts, n=1, *, max_new_tokens, temperature=1.0, top_p=1.0, stop=None, seed=0,
                 keys=None, first=0, on_sample=None):
        """prompts: lists of token ids. Returns a list of n Samples for each.

        stop: ids and strings that end a sample; None = the tokenizer's eos, [] = nothing does. seed, keys
        (one a prompt: whole numbers, texts, tuples of them; None = its tokens), first: sample j of a prompt
        draws its noise from (seed, key, first + j). on_sample(i, j, sample): called as each one ends."""
        if self.broken:
            raise EngineError("the last load_weights() did not end well: load all weights before sampling")
        requests, stops = plan(self, prompts, n, max_new_tokens, temperature, top_p, stop, seed, keys, first)
        if not requests:
            return []
        batch = Batch(self, *self._allocate(requests), requests, stops, temperature, top_p, on_sample)
        with tqdm(total=n * len(requests), unit="sample", leave=False, mininterval=1,
                  disable=None if self.progress and os.environ.get("RANK", "0") == "0" else True) as bar:
            while batch.admit():
                bar.update(batch.sample())
                batch.read_on()
        return [request.samples for request in requests]


def squeeze(rows, ended):
    """How to close the gaps when some of the first `rows` rows end: (rows left, from, to)."""
    left, gone = rows - len(ended), set(ended)
    return left, [r for r in range(left, rows) if r not in gone], sorted(r for r in gone if r < left)


class Batch:
    """The samples being made. They fill the first rows of the cache: when one ends, the last row moves into
    its place. The device holds the cache and the hidden states from which the next tokens will be drawn; all
    else, numbers a row, is the host's."""

    def __init__(self, engine, cache, size, requests, stops, temperature, top_p, on_sample):
        self.engine, self.model, self.cache, self.size = engine, engine.model, cache, size
        self.stops, self.temperature, self.top_p, self.on_sample = stops, temperature, top_p, on_sample
        self.longest_stop = max((len(s.encode()) for s in stops.strings), default=0)
        for i, request in enumerate(requests):
            request.index, request.samples = i, [None] * len(request.seeds)
        self.waiting, self.rows, room = deque(requests), 0, max(r.room for r in requests)
        head, width = self.model.trunk[3], self.model.arch.C
        self.head = (self.model.trunk[0] if head is None else head).weight[:engine.known]
        # by row of the prompts
        self.open = []                                    # the requests that have been read
        self.begun, self.ended = [], []                   # how many of their samples have
        self.prompt_hidden = torch.zeros(cache.rows[0], width, dtype=engine.dtype, device=engine.device)
        # by row of the samples
        self.hidden = torch.zeros(size, width, dtype=engine.dtype, device=engine.device)
        self.group, self.index, self.count, self.room = np.zeros((4, size), dtype=np.int64)
        self.tokens, self.uniform = np.zeros((size, room), dtype=np.int64), np.zeros((size, room))
        self.logprobs, self.now = np.zeros((size, room), dtype=np.float32), np.arange(size)
        self.per_row = (self.group, self.index, self.count, self.room, self.tokens, self.logprobs,
                        self.uniform)

    def admit(self):
        """Begins waiting samples in free rows, a good number at a time (a pass over a single prompt costs as
        much as a step of many rows). Returns whether there is any sample to go on with."""
        free = self.size - self.rows
        if self.rows and free < max(1, self.size // 8):
            return True
        starts = []                                       # (row of the prompt, index of the sample)
        unread = len(self.open)
        while len(starts) < free:
            for p, request in enumerate(self.open):
                more = min(len(request.samples) - self.begun[p], free - len(starts))
                starts += [(p, self.begun[p] + j) for j in range(more)]
                self.begun[p] += more
            if not self.waiting or len(self.open) == self.cache.rows[0] or len(starts) == free:
                break
            self.open.append(self.waiting.popleft())
            self.begun.append(0)
            self.ended.append(0)
        self.read(range(unread, len(self.open)))
        if starts:
            rows = range(self.rows, self.rows + len(starts))
            for row, (p, j) in zip(rows, starts, strict=True):
                request = self.open[p]
                self.group[row], self.index[row], self.count[row], self.room[row] = p, j, 0, request.room
                rng = np.random.default_rng(request.seeds[j])
                self.uniform[row, :request.room] = rng.random(request.room)
            rows, prompts = self.device(list(rows)), self.device([p for p, _ in starts])
            self.hidden[rows] = self.prompt_hidden[prompts]
            self.cache.begin(prompts, rows)
            self.rows += len(starts)
            self.writing = None
        return self.rows > 0

    def device(self, numbers):
        return torch.as_tensor(numbers, device=self.engine.device)

    def read(self, prompts):
        """Passes over the prompts of these rows, those of a length together."""
        prompts = deque(sorted(prompts, key=lambda p: -len(self.open[p].ids)))
        while prompts:
            longest = len(self.open[prompts[0]].ids)
            together = max(1, self.engine.read_tokens // longest)
            rows = [prompts.popleft() for _ in range(min(len(prompts), together))]
            tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
            for i, p in enumerate(rows):
                tokens[i, :len(self.open[p].ids)] = torch.tensor(self.open[p].ids)
            lengths = self.device([len(self.open[p].ids) for p in rows])
            rows = self.device(rows)
            reading = Reading(self.cache, rows, lengths)
            for h in self.model.stream(tokens.to(self.engine.device), cache=reading):
                last = h                                  # not a list: that would keep every layer's
            self.prompt_hidden[rows] = last[torch.arange(len(rows), device=last.device), lengths - 1]

    def sample(self):
        """Draws a token for every row and takes out the rows that have ended; returns how many have."""
        now, B, stops = self.now[:self.rows], self.rows, self.stops
        logits = project(self.hidden[:B], self.head, self.model.arch.logits_scale, None)
        uniform = self.device(self.uniform[now, self.count[:B]])
        ids, logprobs = draw(logits, uniform, self.temperature, self.top_p)
        ids = ids.cpu().numpy()
        self.tokens[now, self.count[:B]], self.logprobs[now, self.count[:B]] = ids, logprobs.cpu().numpy()
        if np.isnan(self.logprobs[now, self.count[:B]]).any():
            raise InputError("the model's output is not a number: its weights hold NaN or inf, or overflow "
                             f"in {self.engine.dtype}")
        self.count[:B] += 1
        stopped = np.isin(ids, stops.ids)
        if stops.strings:
            stopped |= [self.says_stop(row) for row in now]
        over = np.flatnonzero(stopped | (self.count[:B] == self.room[:B])).tolist()
        for row in over:
            p, j = self.group[row], int(self.index[row])
            tokens = self.tokens[row, :self.count[row]].tolist()
            reason = "stop" if stopped[row] else "length"
            made = Sample(tokens, self.logprobs[row, :len(tokens)].tolist(), reason,
                          stops.text(self.engine.tokenizer, tokens, reason))
            self.open[p].samples[j] = made
            self.ended[p] += 1
            if self.on_sample:
                self.on_sample(self.open[p].index, j, made)
        if over:
            self.close(over)
        return len(over)

    def says_stop(self, row):
        """Whether the last token completed a stop string: a token is a byte at least, so few have to be
        read."""
        tail = self.tokens[row, max(0, self.count[row] - self.longest_stop - 4):self.count[row]].tolist()
        text = self.engine.tokenizer.decode(tail)
        return any(s in text for s in self.stops.strings)

    def close(self, over):
        """Takes rows out, and with the last sample of a prompt the prompt's row."""
        self.rows, source, target = squeeze(self.rows, over)
        if source:
            for numbers in self.per_row:
                numbers[target] = numbers[source]
            source, target = self.device(source), self.device(target)
            self.hidden[target] = self.hidden[source]
            self.cache.move(1, source, target)
        done = [p for p, request in enumerate(self.open) if self.ended[p] == len(request.samples)]
        if done:
            left, source, target = squeeze(len(self.open), done)
            for p, q in zip(source, target, strict=True):
                self.group[:self.rows][self.group[:self.rows] == p] = q
                for numbers in (self.open, self.begun, self.ended):
                    numbers[q] = numbers[p]
            for numbers in (self.open, self.begun, self.ended):
                del numbers[left:]
            if source:
                source, target = self.device(source), self.device(target)
                self.prompt_hidden[target] = self.prompt_hidden[source]
                self.cache.move(0, source, target)
        self.writing = None

    def read_on(self):
        """One step of the model over the tokens just drawn."""
        if not self.rows:
            return
        if self.writing is None:                          # other rows than at the step before
            lengths = self.device([len(request.ids) for request in self.open])
            self.writing = Writing(self.cache, self.model.arch, lengths,
                                   self.device(self.group[:self.rows]))
        count = self.count[:self.rows]
        phase = self.writing.step(self.device(count), int(count.max()))
        tokens = self.device(self.tokens[self.now[:self.rows], count - 1])[:, None]
        for h in self.model.stream(tokens, cache=phase):
            last = h
        self.hidden[:self.rows] = last[:, 0]


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


# -- the door ------------------------------------------------------------------------------------------------

def engine(model, kind="torch", *, dtype=None, **options):
    """An engine that samples from model: a Model, or what --init takes. kind: "torch" or "vllm"; dtype:
    "float32" or "bfloat16", None = the Model's own, else float32; options: of TorchEngine or VllmEngine. A
    folder in hub format vLLM reads itself."""
    if isinstance(model, str):
        dtype = dtype or "float32"
    elif kind == "vllm" and dtype is None:                # sharded masters are fp32, whatever is computed in
        own = getattr(model, "compute_dtype", next(model.parameters()).dtype)
        dtype = str(own).removeprefix("torch.")
    if kind not in ("torch", "vllm"):
        raise InputError(f"--engine={kind}{did_you_mean(kind, ('torch', 'vllm'))} (known: torch, vllm)")
    if kind == "vllm":
        from vllm_engine import VllmEngine, check_vllm
        check_vllm(options.get("allow_untested", False))
        if isinstance(model, str) and os.path.isdir(model):
            return VllmEngine(None, folder=model, dtype=dtype, **options)
        model = load(model, dtype=getattr(torch, dtype)) if isinstance(model, str) else model
        return VllmEngine(model, dtype=dtype, **options)
    if isinstance(model, str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load(model, dtype=getattr(torch, dtype), device=device)
    return TorchEngine(model, **options)


# -- from the shell ------------------------------------------------------------------------------------------

@dataclass
class Config:
    init: str = ""                       # weights: preset, folder, random:NAME[:SEED], 0.15*A + 0.85*B
    prompt: str = ""                     # text to go on from (\n at its end: a line break); - = stdin
    n: int = 1                           # samples
    max_new_tokens: int = 256            # of each; it may end earlier, with the end-of-text token
    temperature: float = 1.0             # 0 = the most probable token each time
    top_p: float = 1.0                   # of the probability's mass, the most probable part is sampled from
    stop: str = ""                       # a text that ends a sample too; \n at its end: a line break
    seed: int = 1                        # of the samples
    engine: str = "torch"                # torch (embedded) or vllm
    dtype: str = "float32"               # float32 or bfloat16
    context: int = 0                     # tokens of prompt and answer, 0 = the model's


def line_breaks(text):
    r"""A text with the line breaks that shells make hard to type: \n at its end, not the one of \neq."""
    end = re.search(r"(\\n)*$", text)
    return text[:end.start()] + "\n" * (len(end[0]) // 2)


def main(cfg):
    if not cfg.init:
        raise InputError("--init: name a checkpoint, a folder or a preset (--init=runs/mt/model)")
    if cfg.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype={cfg.dtype}: give float32 or bfloat16")
    door = engine(cfg.init, cfg.engine, dtype=cfg.dtype, context=cfg.context)
    tokenizer = door.tokenizer
    sys.stdout.reconfigure(errors="replace")              # a terminal that cannot show a sample
    text, stop = (line_breaks(t) for t in (cfg.prompt, cfg.stop))
    text = sys.stdin.read() if text == "-" else text
    ids = [*tokenizer.before, *tokenizer.encode(text)] or [tokenizer.eos_id]
    began = time.time()
    stop = [tokenizer.eos_id, stop] if stop else None
    samples, = door.generate([ids], cfg.n, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                             top_p=cfg.top_p, seed=cfg.seed, stop=stop)
    seconds, made = time.time() - began, sum(len(s.tokens) for s in samples)
    for i, s in enumerate(samples, 1):
        print(f"-- {i} of {cfg.n} | {len(s.tokens)} tokens | {s.finish_reason} | mean log-prob "
              f"{sum(s.logprobs) / len(s.logprobs):.3f}\n{text}{s.text}")
    print(f"-- {len(ids)} tokens of prompt, {made} sampled in {seconds:.1f} s: {human(made / seconds)} tok/s")
    door.close()
    return samples


if __name__ == "__main__":
    launch(main, Config)
