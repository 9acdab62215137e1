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
import os
import re
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from kernels import conv1d, ssd
from model import NAMES, Attention, Mamba, attend, load, project
from runtime import InputError, did_you_mean, human, launch

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
    """63 bits from the run's seed, the prompt's key (anything with a repr) and the index of the sample: seeds
    that are near each other, or shared by prompts, make samples agree (RL.md, finding 4)."""
    digest = hashlib.sha256(repr((seed, key, index)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def plan(engine, prompts, n, max_new_tokens, temperature, top_p, stop, seed, keys, first):
    """Checks what an engine's generate() was given; returns ([Request], Stops). InputError names what does
    not fit."""
    context, known, tokenizer = engine.context, engine.known, engine.tokenizer
    for name, value, ok, need in (("n", n, n >= 1, "at least 1"),
                                  ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
                                  ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
                                  ("top_p", top_p, 0 < top_p <= 1, "over 0 and up to 1")):
        if not ok:
            raise InputError(f"--{name}={value}: give {need}")
    if stop is None:
        stop = [] if tokenizer is None else [tokenizer.eos_id]
    stop = [stop] if isinstance(stop, str | int) else stop
    stops = Stops([s for s in stop if not isinstance(s, str)], [s for s in stop if isinstance(s, str)])
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
    if len(set(map(repr, keys))) != len(prompts):
        raise InputError(f"{len(prompts)} prompts, but {len(set(map(repr, keys)))} different keys: prompts "
                         f"that share a key would share their noise")
    requests = []
    for i, (ids, key) in enumerate(zip(prompts, keys, strict=True)):
        if not ids:
            raise InputError(f"prompt {i} is empty: give one token at least (the eos begins a new document)")
        if len(ids) >= context:
            raise InputError(f"prompt {i} has {len(ids)} tokens, the context is {context}: nothing can "
                             f"follow; shorten it, or raise --context")
        seeds = [sample_seed(seed, key, first + j) for j in range(n)]
        requests.append(Request(list(ids), seeds, min(max_new_tokens, context - len(ids))))
    return requests, stops


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
        """Rows of the prompts (0) or the samples (1): from source to target, both index tensors."""
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

    def __init__(self, cache, window, prompt_lengths, groups):
        """prompt_lengths (P) of the prompts' rows; groups (B): each sample's prompt row; int64, on the
        device."""
        self.cache, self.window, self.groups = cache, window, groups
        self.rows = torch.arange(len(groups), device=groups.device)
        # members (P, n): the samples of each prompt, padded by any row; place (B): the inverse
        order = torch.argsort(groups, stable=True)
        sizes = torch.bincount(groups, minlength=len(prompt_lengths))
        self.place = torch.empty_like(groups)
        self.place[order] = self.rows - (sizes.cumsum(0) - sizes)[groups[order]]
        self.members = torch.zeros(len(sizes), int(sizes.max()), dtype=torch.int64, device=groups.device)
        self.members[groups, self.place] = self.rows
        self.lengths, self.stored = prompt_lengths[groups], prompt_lengths.clamp(max=cache.sizes[0])
        self.prompt_tokens = round_up(int(self.stored.max()))
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
        if self.window:                                   # what each sample still sees of its prompt
            from_ = (self.stored[:, None] + counts[self.members] - self.window)[..., None]
            seen = self.exists[:, None] & (self.index[:self.prompt_tokens] >= from_)
            self.prompt_mask = self._additive(seen[:, None])                # (P, 1, n, T)
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
        mask = self.prompt_mask
        if mask.shape[2] > 1:                             # a row of the mask for each query head
            mask = mask.repeat_interleave(R, 2)
        out, lse = attention(q, prompt_k[:P, :, :tp], prompt_v[:P, :, :tp], mask, scale)
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
        self.context = context or model.arch.raw.get("max_position_embeddings") or 1 << 30
        self.known, self.read_tokens = known_ids(model.arch, model.tokenizer), read_tokens
        self.device, self.dtype = model.trunk[0].weight.device, model.trunk[0].weight.dtype
        if not cache_gb:
            cache_gb = torch.cuda.mem_get_info(self.device)[0] / 2e9 if self.device.type == "cuda" else 4.0
        self.cache_bytes = cache_gb * 1e9

    def load_weights(self, pairs):
        """pairs: (hub name, whole tensor) of every parameter, copied in place; InputError on a name or shape
        that does not belong here, and on one that did not come."""
        own = dict(self.model.named_parameters())
        missing = set(own)
        for name, tensor in pairs:
            if name == "lm_head.weight" and self.model.arch.tied:
                continue                                  # the embedding, which comes under its own name
            if name not in own or own[name].shape != tensor.shape:
                what = f"shape {list(tensor.shape)}, here it is {list(own[name].shape)}" if name in own else \
                    f"a name this model does not have{did_you_mean(name, own)}"
                raise InputError(f"load_weights: {name} has {what}")
            with torch.no_grad():
                own[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise InputError(f"load_weights: {len(missing)} tensors did not come, {min(missing)} for one: "
                             f"the model would be half old, half new")

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

        def prompts(samples):                             # the first and the last may be partly done
            return min(len(requests), samples, -(-samples // n) + 1)

        samples = min(self.max_batch, n * len(requests))
        while samples and samples * a_sample + prompts(samples) * a_prompt > self.cache_bytes:
            samples -= 1
        if not samples:
            raise InputError(f"--cache_gb={self.cache_bytes / 1e9:g} does not hold one sample: a prompt of "
                             f"{prompt_tokens} tokens and {own_tokens} new ones need "
                             f"{(a_prompt + a_sample) / 1e9:.3g} GB; raise it, or lower --max_new_tokens")
        try:
            return Cache(self.model, prompts(samples), samples, prompt_tokens, own_tokens), samples
        except torch.OutOfMemoryError as e:
            raise InputError(f"--cache_gb={self.cache_bytes / 1e9:g}: the device has not that much left "
                             f"({str(e).splitlines()[0]}); lower it") from None

    @torch.inference_mode()
    def generate(self, prompts, n=1, *, max_new_tokens, temperature=1.0, top_p=1.0, stop=None, seed=0,
                 keys=None, first=0):
        """prompts: lists of token ids. Returns a list of n Samples for each.

        stop: ids and strings that end a sample; None = the tokenizer's eos, [] = nothing does. seed, keys
        (one a prompt, anything with a repr; None = its tokens), first: sample j of a prompt draws its noise
        from (seed, key, first + j)."""
        requests, stops = plan(self, prompts, n, max_new_tokens, temperature, top_p, stop, seed, keys, first)
        if not requests:
            return []
        batch = Batch(self, *self._allocate(requests), requests, stops, temperature, top_p)
        with tqdm(total=n * len(requests), unit="sample", leave=False, mininterval=1,
                  disable=None if self.progress else True) as bar:
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

    def __init__(self, engine, cache, size, requests, stops, temperature, top_p):
        self.engine, self.model, self.cache, self.size = engine, engine.model, cache, size
        self.stops, self.temperature, self.top_p = stops, temperature, top_p
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
            self.open[-1].samples = [None] * len(self.open[-1].seeds)
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
            *_, h = self.model.stream(tokens.to(self.engine.device), cache=Reading(self.cache, rows, lengths))
            self.prompt_hidden[rows] = h[torch.arange(len(rows), device=h.device), lengths - 1]

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
            p, tokens = self.group[row], self.tokens[row, :self.count[row]].tolist()
            reason = "stop" if stopped[row] else "length"
            self.open[p].samples[self.index[row]] = Sample(
                tokens, self.logprobs[row, :len(tokens)].tolist(), reason,
                stops.text(self.engine.tokenizer, tokens, reason))
            self.ended[p] += 1
        if over:
            self.close(over)
        return len(over)

    def says_stop(self, row):
        """Whether the last token completed a stop string: a token is a byte at least, so few have to be
        read."""
        longest = max(len(s.encode()) for s in self.stops.strings)
        tail = self.tokens[row, max(0, self.count[row] - longest - 4):self.count[row]].tolist()
        text = self.engine.tokenizer.decode(tail)
        return any(s in text for s in self.stops.strings)

    def close(self, over):
        """Takes rows out, and with the last sample of a prompt the prompt's row."""
        self.rows, source, target = squeeze(self.rows, over)
        if source:
            for numbers in self.per_row:
                numbers[target] = numbers[source]
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
                self.prompt_hidden[target] = self.prompt_hidden[source]
                self.cache.move(0, source, target)
        self.writing = None

    def read_on(self):
        """One step of the model over the tokens just drawn."""
        if not self.rows:
            return
        if self.writing is None:                          # other rows than at the step before
            lengths = self.device([len(request.ids) for request in self.open])
            self.writing = Writing(self.cache, self.model.arch.window, lengths,
                                   self.device(self.group[:self.rows]))
        count = self.count[:self.rows]
        phase = self.writing.step(self.device(count), int(count.max()))
        tokens = self.device(self.tokens[self.now[:self.rows], count - 1])[:, None]
        *_, h = self.model.stream(tokens, cache=phase)
        self.hidden[:self.rows] = h[:, 0]


# -- new weights, and the proof that they arrived ------------------------------------------------------------

class StaleWeights(EngineError):
    """The engine does not compute what the trainer computes."""


def tensor_kind(name):
    """"model.layers.3.self_attn.q_proj.weight" -> "self_attn.q_proj.weight"."""
    return re.sub(r"^.*\.layers\.\d+\.", "", name)


def full_tensors(model, dtype=None):
    """(hub name, whole tensor) of every parameter, a tied head under its own name too. Of a sharded model all
    ranks must go through it together: each tensor is gathered when its turn comes, matrices in `dtype`."""
    for name, p in model.named_parameters():
        p = p.detach()
        p = p.to(dtype) if dtype and p.ndim > 1 else p
        p = p.full_tensor() if isinstance(p, DTensor) else p
        yield name, p
        if model.arch.tied and name == NAMES[model.arch.family]["embed"] + ".weight":
            yield "lm_head.weight", p


@torch.no_grad()
def score(model, prompts, samples, temperature=1.0, top_p=1.0):
    """The model's own log-probs of the first sample of each prompt, a list of tensors: one plain forward pass
    over the whole texts. The oracle of both engines."""
    rows = [ids + own[0].tokens for ids, own in zip(prompts, samples, strict=True)]
    device = next(model.parameters()).device
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[:len(ids)] = torch.tensor(ids)
    logits = model(tokens.to(device))[..., :known_ids(model.arch, model.tokenizer)]
    logp = log_distribution(logits, temperature, top_p)[:, :-1]
    logp = logp.gather(2, tokens.to(device)[:, 1:, None])[..., 0]
    return [row[len(ids) - 1:len(ids) - 1 + len(own[0].tokens)].cpu()
            for row, ids, own in zip(logp, prompts, samples, strict=True)]


def difference(a, b):
    """Mean absolute difference of two lists of log-probs, in nats."""
    a, b = (torch.cat([torch.as_tensor(x, dtype=torch.float64) for x in z]) for z in (a, b))
    return (a - b).abs().mean().item()


def push(engine, model, *, check=True, threshold=0.0, prompts=None, new_tokens=16):
    """Moves the trainer's weights into the engine and proves that they arrived: the engine samples a few
    tokens, the trainer scores them. Returns the mean |difference| of log-probs in nats (None unchecked).

    All ranks of a sharded model call it together. threshold: above it StaleWeights, a report that names the
    worst kind of tensor; 0 = 1e-4 for a fp32 engine, 0.05 for bf16 (whose own rounding makes 0.005 to 0.01).
    prompts: what the samples follow; None = four times 16 random ids.
    """
    engine.load_weights(full_tensors(model, engine.dtype))
    if not check:
        return None
    threshold = threshold or (1e-4 if engine.dtype == torch.float32 else 0.05)
    if prompts is None:
        known = known_ids(model.arch, model.tokenizer)
        prompts = torch.randint(known, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
    samples = engine.generate(prompts, max_new_tokens=new_tokens, stop=[])
    own = [s[0].logprobs for s in samples]
    gap = difference(own, score(model, prompts, samples))
    if not gap <= threshold:                              # a NaN is stale as well
        raise StaleWeights(report(gap, threshold, probe(engine, model, prompts, new_tokens)))
    return gap


def probe(engine, model, prompts, new_tokens):
    """Which kinds of tensor a push does not reach: each is changed in the trainer, pushed, and the same
    samples are asked for again. Returns {kind: (answer, moved)} in nats a token: how far that moved the
    engine's log-probs, and how far the trainer's. answer 0: the engine goes on as before, to the last bit.
    Trainer and engine end with the weights they had."""
    kinds, found = {}, {}
    for name, p in model.named_parameters():
        kinds.setdefault(tensor_kind(name), []).append(p.to_local() if isinstance(p, DTensor) else p)
    old = engine.generate(prompts, max_new_tokens=new_tokens, stop=[])
    for kind, tensors in kinds.items():
        before, scale, moved = [p.detach().clone() for p in tensors], 0.25, 0.0
        own = score(model, prompts, old)
        while not moved > 0.5 and scale < 10:             # nats: far above any rounding
            scale *= 2
            rng = torch.Generator().manual_seed(0)        # the same on every rank: replicas stay equal
            with torch.no_grad():
                for p, b in zip(tensors, before, strict=True):
                    size = b.float().square().mean().sqrt().item() if b.numel() else 0.0
                    noise = torch.randn(b.shape, generator=rng).to(b.device, b.dtype)
                    p.copy_(b + noise * scale * (size or 0.1))
            moved = difference(own, score(model, prompts, old))
        engine.load_weights(full_tensors(model, engine.dtype))
        new = engine.generate(prompts, max_new_tokens=new_tokens, stop=[])
        with torch.no_grad():
            for p, b in zip(tensors, before, strict=True):
                p.copy_(b)
        answer = []                                       # as far as they follow the same tokens
        for (a,), (b,) in zip(old, new, strict=True):
            same = next((t for t in range(new_tokens) if a.tokens[t] != b.tokens[t]), new_tokens - 1) + 1
            answer.append(difference([a.logprobs[:same]], [b.logprobs[:same]]))
        found[kind] = sum(answer) / len(answer), moved
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

def engine(model, kind="torch", *, dtype="float32", **options):
    """An engine that samples from model: a Model, or what --init takes, then in dtype. kind: "torch" or
    "vllm"; options: of TorchEngine or VllmEngine. A folder in hub format vLLM reads itself."""
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
    init: str = ""                       # weights: preset, folder, random:NAME, 0.15*A + 0.85*B
    prompt: str = ""                     # text to go on from, \n a line break; - = stdin; "" = a new document
    n: int = 1                           # samples
    max_new_tokens: int = 256            # of each; it may end earlier, with the end-of-text token
    temperature: float = 1.0             # 0 = the most probable token each time
    top_p: float = 1.0                   # of the probability's mass, the most probable part is sampled from
    stop: str = ""                       # a text that ends a sample too; \n a line break
    seed: int = 1                        # of the samples
    engine: str = "torch"                # torch (embedded) or vllm
    dtype: str = "float32"               # float32 or bfloat16
    context: int = 0                     # tokens of prompt and answer, 0 = the model's


def main(cfg):
    if not cfg.init:
        raise InputError("--init: name a checkpoint, a folder or a preset (--init=runs/mt/model)")
    if cfg.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype={cfg.dtype}: give float32 or bfloat16")
    door = engine(cfg.init, cfg.engine, dtype=cfg.dtype, context=cfg.context)
    tokenizer = door.tokenizer
    text, stop = (t.replace("\\n", "\n") for t in (cfg.prompt, cfg.stop))
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
