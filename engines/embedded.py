"""The embedded engine: continuous batching over the trainer's own model, on any device."""

import math
import os
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from cli import InputError
from engines.contract import EngineError, Sample, checked, context_of, draw, known_ids, plan
from kernels import conv1d, ssd
from model import Attention, Mamba, attend_documents, project

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
        sizes = module.sizes
        return [((width - 1, channels), None), ((sizes.heads, sizes.head_dim, sizes.state), torch.float32)]

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
        return attend_documents(q, k, v, None, scale, window)    # padding comes last: no real token sees it

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
