"""The embedded engine: continuous batching over the trainer's own model, on any device.

A prompt is read in one pass (prefill); then each of its samples grows by one token a step (decode). Both
passes are the model's own: only attention, convolution and scan ask the cache for what came before.

Notation: P prompts and B samples in the cache, T tokens, H query heads, K kv heads, D head dim, C channels.
"""

import os
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from cli import InputError
from engines.contract import (
    EngineError,
    Request,
    Sample,
    check_weights,
    context_of,
    draw,
    known_ids,
    make_requests,
)
from engines.graphs import CudaCapture, Graphs, bucket
from kernels import conv1d, ssd
from model import Attention, Mamba, attend_documents, project
from runtime import to_device

# -- the cache: what earlier tokens leave behind -------------------------------------------------------------

class KeysValues(NamedTuple):
    """What attention keeps."""
    keys: torch.Tensor                   # (rows, K, tokens, D)
    values: torch.Tensor                 # (rows, K, tokens, D)


class MambaState(NamedTuple):
    """What a Mamba layer keeps."""
    inputs: torch.Tensor                 # (rows, width - 1, channels): the convolution's last inputs
    state: torch.Tensor                  # (rows, heads, head dim, state) fp32


class LayerCache(NamedTuple):
    """What one layer keeps."""
    prompts: KeysValues | MambaState     # a row a prompt
    samples: KeysValues | MambaState     # a row a sample


class Cache:
    """Memory of everything read so far. Attention: keys and values of the prompts, which their samples share,
    and of the samples; with a window, only as many as can be seen (a ring). Mamba: the last inputs of the
    convolution and the state, at the end of each prompt and of each sample."""

    def __init__(self, model, prompt_rows, sample_rows, prompt_tokens, sample_tokens, samples_per_prompt):
        """Rows, and tokens a row, to make room for. samples_per_prompt: the most that share a prompt."""
        weight = model.trunk.embed.weight
        self.dtype = weight.dtype
        self.prompt_rows = prompt_rows
        self.sample_rows = sample_rows
        self.samples_per_prompt = min(samples_per_prompt, sample_rows)
        self.prompt_tokens = tokens_kept(model, prompt_tokens)
        self.sample_tokens = tokens_kept(model, sample_tokens)
        self.layers = {}                                  # module: LayerCache
        for module in caching_modules(model):
            prompts = zeros(module, prompt_rows, self.prompt_tokens, weight.dtype, weight.device)
            samples = zeros(module, sample_rows, self.sample_tokens, weight.dtype, weight.device)
            self.layers[module] = LayerCache(prompts, samples)

    @staticmethod
    def row_bytes(model, tokens):
        """Bytes of one row with room for that many tokens, over all layers."""
        dtype = model.trunk.embed.weight.dtype
        total = 0
        for module in caching_modules(model):
            row = zeros(module, 1, tokens_kept(model, tokens), dtype, "meta")
            total += sum(tensor.nbytes for tensor in row)
        return total

    def move_prompts(self, source, target):
        """Copies rows of prompts; source and target are index tensors."""
        for layer in self.layers.values():
            move_rows(layer.prompts, source, target)

    def move_samples(self, source, target):
        """Copies rows of samples; source and target are index tensors."""
        for layer in self.layers.values():
            move_rows(layer.samples, source, target)

    def begin_samples(self, prompt_rows, sample_rows):
        """Samples begin where their prompts end: the Mamba states are copied, keys and values shared."""
        for layer in self.layers.values():
            if isinstance(layer.samples, MambaState):
                for prompts, samples in zip(layer.prompts, layer.samples, strict=True):
                    samples[sample_rows] = prompts[prompt_rows]


def caching_modules(model):
    return [module for module in model.modules() if isinstance(module, Attention | Mamba)]


def tokens_kept(model, tokens):
    """How many of so many tokens the attention can still see."""
    window = model.arch.window
    return min(tokens, window) if window else tokens


def zeros(module, rows, tokens, dtype, device):
    """The empty memory of one layer."""
    if isinstance(module, Attention):
        arch = module.arch
        shape = (rows, arch.K, round_up(tokens), arch.D)
        return KeysValues(keys=torch.zeros(shape, dtype=dtype, device=device),
                          values=torch.zeros(shape, dtype=dtype, device=device))
    channels, _, width = module.conv1d.weight.shape
    sizes = module.sizes
    state = (rows, sizes.heads, sizes.head_dim, sizes.state)
    return MambaState(inputs=torch.zeros(rows, width - 1, channels, dtype=dtype, device=device),
                      state=torch.zeros(state, dtype=torch.float32, device=device))


def round_up(n, multiple=16):
    """n, or the next multiple: the GPU's attention kernel wants aligned masks."""
    return -(-n // multiple) * multiple


def move_rows(tensors, source, target):
    for tensor in tensors:
        tensor[target] = tensor[source]


# -- prefill: a pass over whole prompts ----------------------------------------------------------------------

class Prefill:
    """One pass over whole prompts, a row each, padded on the right: attention, convolution and scan as in
    training. What they leave behind goes into the prompts' rows of the cache."""

    def __init__(self, cache, rows, lengths, longest):
        """rows: the prompts' rows of the cache; lengths: their tokens; (P) int64 both, on the device.
        longest: the largest of the lengths."""
        self.cache = cache
        self.rows = rows
        self.lengths = lengths
        self.batch = torch.arange(len(rows), device=rows.device)[:, None]
        self.positions = torch.arange(longest, device=rows.device)[None]

    def attend(self, module, q, k, v, scale, window):
        """q (P, T, H, D), k and v (P, T, K, D) -> (P, T, H, D)."""
        memory = self.cache.layers[module].prompts
        kept = min(k.shape[1], self.cache.prompt_tokens)  # the window's, if it is shorter
        first = (self.lengths[:, None] - kept).clamp(min=0)
        index = first + torch.arange(kept, device=q.device)
        memory.keys[self.rows, :, :kept] = k[self.batch, index].transpose(1, 2)
        memory.values[self.rows, :, :kept] = v[self.batch, index].transpose(1, 2)
        return attend_documents(q, k, v, None, scale, window)    # padding comes last: no real token sees it

    def conv(self, module, x):
        """x (P, T, channels) -> the same shape."""
        weight = module.conv1d.weight
        width_before = weight.shape[-1] - 1
        padded = F.pad(x, (0, 0, width_before, 0))
        last = self.lengths[:, None] + torch.arange(width_before, device=x.device)
        self.cache.layers[module].prompts.inputs[self.rows] = padded[self.batch, last]
        return conv1d.causal_conv1d(x, weight, module.conv1d.bias)

    def scan(self, module, x, dt, *terms):
        """x (P, T, heads, head dim) -> the same shape."""
        real = self.positions < self.lengths[:, None]
        dt = dt * real[..., None]                         # padding leaves the state alone
        y, state = ssd.ssd(x, dt, *terms, last=True)
        self.cache.layers[module].prompts.state[self.rows] = state
        return y


# -- decode: a pass over one new token a sample --------------------------------------------------------------

MASKED = -1e30                                            # finite: a row without any key must not become NaN


def attention(q, k, v, mask, scale):
    """Softmax attention and its log-sum-exp, by which two of them over different keys can be joined.
    q (B, heads, Q, D); k, v (B, heads, T, D); mask (B, 1, 1 or Q, T), added. Returns (B, heads, Q, D) and
    fp32 (B, heads, Q), on a GPU neither of them contiguous: the queries come before the heads in memory, and
    the log-sum-exps of each head are padded. There D and the width T must be multiples of 8 (`round_up`)."""
    aten = torch.ops.aten
    if q.is_cpu:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    mask = mask.expand(*q.shape[:3], k.shape[2])
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, scale=scale)
    return out, lse[..., :q.shape[2]]


class DecodeSizes(NamedTuple):
    """What the shapes of a decode pass follow from."""
    samples: int                         # B
    prompts: int                         # P
    group: int                           # samples of a prompt, the most
    prompt_width: int                    # tokens of the prompts that are looked at
    sample_width: int                    # tokens of the samples that are looked at
    window_moves: bool                   # whether the window has left the first token of a prompt behind

    def bucket(self, cache):
        """The sizes of a graph that serves these too."""
        return DecodeSizes(
            samples=bucket(self.samples, cache.sample_rows),
            prompts=bucket(self.prompts, cache.prompt_rows),
            group=bucket(self.group, cache.samples_per_prompt),
            prompt_width=bucket(self.prompt_width, round_up(cache.prompt_tokens)),
            sample_width=bucket(self.sample_width, round_up(cache.sample_tokens)),
            window_moves=self.window_moves,
        )


class DecodeInputs(NamedTuple):
    """What a decode pass reads beside the cache: int64 arrays on the host, or tensors on the device."""
    tokens: np.ndarray | torch.Tensor              # (B): each sample's last token
    counts: np.ndarray | torch.Tensor              # (B): its tokens, that one included
    tokens_before: np.ndarray | torch.Tensor       # (B): its prompt's tokens
    prompt_of: np.ndarray | torch.Tensor           # (B): its prompt's row
    place: np.ndarray | torch.Tensor               # (B): where it stands among the samples of its prompt
    stored: np.ndarray | torch.Tensor              # (P): tokens of each prompt that the cache keeps
    members: np.ndarray | torch.Tensor             # (P, group): the samples of each prompt, padded by any row

    @staticmethod
    def numbers(samples, prompts, group):
        """How many numbers that is."""
        return 5 * samples + prompts + prompts * group

    @classmethod
    def views(cls, flat, sizes):
        """Views of a flat array or tensor of at least so many numbers."""
        views = []
        begin = 0
        for _ in range(5):
            views.append(flat[begin:begin + sizes.samples])
            begin += sizes.samples
        end = begin + sizes.prompts
        members = flat[end:end + sizes.prompts * sizes.group]
        return cls(*views, flat[begin:end], members.reshape(sizes.prompts, sizes.group))


def group_by_prompt(prompt_of, prompts):
    """members (P, most samples of a prompt): the samples of each prompt, padded by the first row; place (B):
    where a sample stands among them. prompt_of (B): each sample's prompt row; all int64 arrays."""
    order = np.argsort(prompt_of, kind="stable")
    sizes = np.bincount(prompt_of, minlength=prompts)
    first = sizes.cumsum() - sizes
    place = np.empty_like(prompt_of)
    place[order] = np.arange(len(prompt_of)) - first[prompt_of[order]]
    members = np.zeros((prompts, sizes.max()), dtype=np.int64)
    members[prompt_of, place] = np.arange(len(prompt_of))
    return members, place


class Decode:
    """One pass over one new token a sample. Attention is computed in two parts: over the shared keys of the
    prompts, where all samples of a prompt are the queries of one product, and over each sample's keys. Their
    log-sum-exps join them exactly. Nothing here waits for the device or depends on what a tensor holds: a
    graph repeats it."""

    def __init__(self, cache, arch, inputs, sizes):
        """inputs: DecodeInputs on the device."""
        counts = inputs.counts
        device = counts.device
        self.cache = cache
        self.window = arch.window
        self.queries_per_kv = arch.H // arch.K
        self.inputs = inputs
        self.sizes = sizes
        self.rows = torch.arange(sizes.samples, device=device)
        self.positions = (inputs.tokens_before + counts - 1)[:, None]
        self.slots = (counts - 1) % cache.sample_tokens   # where its key goes: a ring, if there is a window
        index = torch.arange(max(sizes.prompt_width, sizes.sample_width), device=device)
        stored = counts.clamp(max=cache.sample_tokens)[:, None]
        self.sample_mask = self._additive((index[:sizes.sample_width] < stored)[:, None, None])
        # the prompts' keys and values are read up to a common width; those that a prompt lacks are masked
        index = index[:sizes.prompt_width]
        exists = index < inputs.stored[:, None]
        if sizes.window_moves:
            seen = self._seen_by_window(exists, index)
        else:
            seen = exists[:, None, None]
        self.prompt_mask = self._additive(seen)           # (P, 1, 1 or samples x queries, T)

    def _seen_by_window(self, exists, index):
        """What each sample still sees of its prompt, once the window has moved on."""
        first_seen = self.inputs.stored[:, None] + self.inputs.counts[self.inputs.members] - self.window
        seen = index >= first_seen[..., None]
        seen = exists[:, None] & seen                     # (P, samples, T)
        return seen[:, None].repeat_interleave(self.queries_per_kv, 2)      # a row a query head

    def _additive(self, seen):
        mask = torch.zeros(seen.shape, dtype=self.cache.dtype, device=seen.device)
        return mask.masked_fill_(~seen, MASKED)

    def attend(self, module, q, k, v, scale, window):
        """q (B, 1, H, D), k and v (B, 1, K, D) -> (B, 1, H, D)."""
        batch, _, heads, head_dim = q.shape
        kv_heads = k.shape[2]
        inputs, sizes = self.inputs, self.sizes
        memory = self.cache.layers[module]
        memory.samples.keys[self.rows, :, self.slots] = k[:, 0]
        memory.samples.values[self.rows, :, self.slots] = v[:, 0]

        # each sample over its tokens: the query heads of a kv head are the queries of one product
        q = q.view(batch, kv_heads, -1, head_dim)
        keys = memory.samples.keys[:batch, :, :sizes.sample_width]
        values = memory.samples.values[:batch, :, :sizes.sample_width]
        sample_out, sample_lse = attention(q, keys, values, self.sample_mask, scale)

        # each prompt for all its samples at once, whose queries stand side by side; and back by sample
        queries = q[inputs.members].transpose(1, 2).reshape(sizes.prompts, kv_heads, -1, head_dim)
        keys = memory.prompts.keys[:sizes.prompts, :, :sizes.prompt_width]
        values = memory.prompts.values[:sizes.prompts, :, :sizes.prompt_width]
        out, lse = attention(queries, keys, values, self.prompt_mask, scale)
        out = out.reshape(sizes.prompts, kv_heads, sizes.group, -1, head_dim)
        lse = lse.reshape(sizes.prompts, kv_heads, sizes.group, -1)
        prompt_out = out[inputs.prompt_of, :, inputs.place]
        prompt_lse = lse[inputs.prompt_of, :, inputs.place]

        # joined by how much of the softmax's mass each part has
        prompt_share = torch.sigmoid(prompt_lse.float() - sample_lse.float())[..., None]
        joined = torch.lerp(sample_out.float(), prompt_out.float(), prompt_share)
        return joined.to(q.dtype).reshape(batch, 1, heads, head_dim)

    def conv(self, module, x):
        """x (B, 1, channels) -> the same shape."""
        inputs = self.cache.layers[module].samples.inputs[:len(x)]
        return conv1d.step(inputs, x[:, 0], module.conv1d.weight, module.conv1d.bias)[:, None]

    def scan(self, module, x, dt, A, B, C, D):
        """x (B, 1, heads, head dim) -> the same shape."""
        state = self.cache.layers[module].samples.state[:len(x)]
        return ssd.step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)[:, None]


class Decoder:
    """Decode passes, one after the other. Where graphs are used, a pass is rounded up to sizes that repeat:
    its further rows belong to nobody, and what is computed there is finite and never read."""

    def __init__(self, model, cache, hidden, graphs):
        """hidden (B, C): where the final norm's output goes; graphs: Graphs or None."""
        self.model = model
        self.cache = cache
        self.hidden = hidden
        self.graphs = graphs
        most = DecodeInputs.numbers(cache.sample_rows, cache.prompt_rows, cache.samples_per_prompt)
        on_gpu = hidden.device.type == "cuda"
        self.host = torch.zeros(most, dtype=torch.int64, pin_memory=on_gpu)
        self.flat = torch.zeros(most, dtype=torch.int64, device=hidden.device)

    def regroup(self, lengths, prompt_of):
        """Other samples than at the pass before. lengths (P): tokens of the prompts; prompt_of (B): each
        sample's prompt row; int64 arrays."""
        members, place = group_by_prompt(prompt_of, len(lengths))
        stored = lengths.clip(max=self.cache.prompt_tokens)
        self.longest_stored = int(stored.max())
        self.sizes = DecodeSizes(len(prompt_of), *members.shape, round_up(self.longest_stored),
                                 sample_width=0, window_moves=False)
        padded = self.sizes.bucket(self.cache) if self.graphs else self.sizes
        self.numbers = DecodeInputs.numbers(*padded[:3])
        self.host[:self.numbers] = 0
        self.inputs = DecodeInputs.views(self.host.numpy(), padded)
        self.inputs.counts[:] = 1                         # of the rows that belong to nobody
        self.inputs.tokens_before[:len(prompt_of)] = lengths[prompt_of]
        self.inputs.prompt_of[:len(prompt_of)] = prompt_of
        self.inputs.place[:len(place)] = place
        self.inputs.stored[:len(stored)] = stored
        self.inputs.members[:len(members), :members.shape[1]] = members

    def step(self, tokens, counts):
        """Reads tokens (B), each sample's last, of which it has counts (B); int64 arrays."""
        self.inputs.tokens[:len(tokens)] = tokens
        self.inputs.counts[:len(counts)] = counts
        self.flat[:self.numbers].copy_(self.host[:self.numbers], non_blocking=True)
        longest = int(counts.max())
        window = self.model.arch.window
        sizes = self.sizes._replace(
            sample_width=round_up(min(longest, self.cache.sample_tokens)),
            window_moves=bool(window and self.longest_stored + longest > window))
        if self.graphs is None:
            self._run(sizes)
        else:
            sizes = sizes.bucket(self.cache)
            self.graphs.run(sizes, lambda: self._run(sizes))

    def _run(self, sizes):
        inputs = DecodeInputs.views(self.flat, sizes)
        decode = Decode(self.cache, self.model.arch, inputs, sizes)
        last = forward(self.model, inputs.tokens[:, None], decode)
        self.hidden[:sizes.samples] = last[:, 0]


def forward(model, tokens, cache):
    """The final norm's output (rows, T, C). cache: Prefill or Decode."""
    for h in model.stream(tokens, cache=cache):
        last = h                                          # not a list: that would keep every layer's
    return last


# -- the engine ----------------------------------------------------------------------------------------------

class TorchEngine:
    """Continuous batching in plain torch: a row that ends makes place for the next sample; a prompt is read
    once for all its samples; memory is set aside once a call, as much as cache_gb allows, and what does not
    fit waits."""

    capture = CudaCapture                # makes what records a graph; tests put their own in its place

    def __init__(self, model, *, context=0, max_batch=256, cache_gb=0.0, read_tokens=8192, progress=True,
                 graphs=None):
        """model: a whole Model (not sharded), used as it is, weights shared. context: tokens of a prompt and
        its answer, 0 = what config.json says. max_batch: samples at a time. cache_gb: of keys, values and
        states, 0 = half of what is free on a GPU, 4 on a CPU. read_tokens: of prompts in one pass. graphs:
        whether decode steps become CUDA graphs, None = on a GPU."""
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                raise InputError(f"the engine needs whole weights, but {name} is sharded: give it a model of "
                                 f"its own, and push() the trainer's weights into it")
        self.model = model
        self.tokenizer = model.tokenizer
        self.max_batch = max_batch
        self.cache_gb = cache_gb
        self.read_tokens = read_tokens
        self.progress = progress
        self.context = context_of(model.arch, context)
        self.known = known_ids(model.arch, model.tokenizer)
        weight = model.trunk.embed.weight
        self.device = weight.device
        self.dtype = weight.dtype
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        self.broken = False                               # half of the weights are new

    @torch.no_grad()
    def load_weights(self, pairs):
        """pairs: (hub name, whole tensor) of every parameter, copied in place; see `check_weights`. After an
        error the engine refuses to sample until all have come."""
        self.broken = True
        parameters = dict(self.model.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        for name, tensor in check_weights(pairs, self.model.arch, shapes):
            if name in parameters:                        # not the tied head: it is the embedding
                parameters[name].copy_(tensor)
        self.broken = False

    def sleep(self):
        """Gives the memory between two calls back (the cache is gone already)."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self):
        pass

    def close(self):
        pass

    @torch.inference_mode()
    def generate(self, prompts, n=1, *, max_new_tokens, temperature=1.0, top_p=1.0, stop=None, seed=0,
                 keys=None, first=0, on_sample=None):
        """prompts: lists of token ids. Returns a list of n Samples for each.

        stop: ids and strings that end a sample; None = the tokenizer's eos, [] = nothing does. seed, keys
        (one a prompt: whole numbers, texts, tuples of them; None = its tokens), first: sample j of a prompt
        draws its noise from (seed, key, first + j). on_sample(i, j, sample): called as each one ends."""
        if self.broken:
            raise EngineError("the last load_weights() did not end well: load all weights before sampling")
        requests, stops = make_requests(self, prompts, n=n, max_new_tokens=max_new_tokens, stop=stop,
                                        temperature=temperature, top_p=top_p, seed=seed, keys=keys,
                                        first=first)
        if not requests:
            return []
        batch = Batch(self, self.allocate(requests), requests, stops, temperature, top_p, on_sample)
        shown = self.progress and os.environ.get("RANK", "0") == "0"
        with tqdm(total=batch.unfinished, unit="sample", leave=False, mininterval=1,
                  disable=None if shown else True) as bar:
            while batch.unfinished:
                bar.update(batch.step())
        return [request.samples for request in requests]

    def allocate(self, requests):
        """A cache for as many samples at a time as the budget holds."""
        samples_per_prompt = len(requests[0].seeds)
        prompt_tokens = max(len(request.ids) for request in requests)
        sample_tokens = max(request.max_tokens for request in requests)
        prompt_bytes = Cache.row_bytes(self.model, prompt_tokens)
        sample_bytes = Cache.row_bytes(self.model, sample_tokens)
        budget = self._cache_bytes()

        samples = min(self.max_batch, samples_per_prompt * len(requests))
        while samples:
            full_prompts = -(-samples // samples_per_prompt)
            # one more, since the first and the last may be partly done
            prompts = min(len(requests), samples, full_prompts + 1)
            if samples * sample_bytes + prompts * prompt_bytes <= budget:
                break
            samples -= 1
        if not samples:
            raise InputError(f"--cache_gb={budget / 1e9:g} does not hold one sample: a prompt of "
                             f"{prompt_tokens} tokens and {sample_tokens} new ones need "
                             f"{(prompt_bytes + sample_bytes) / 1e9:.3g} GB; raise it, or lower "
                             f"--max_new_tokens")
        # more prompts than that, if there is room: a prompt's row is free only when its last sample has ended
        affordable = int((budget - samples * sample_bytes) // prompt_bytes)
        prompts = min(len(requests), samples, affordable)
        try:
            return Cache(self.model, prompts, samples, prompt_tokens, sample_tokens, samples_per_prompt)
        except RuntimeError as e:                         # torch.OutOfMemoryError is one, a CPU's has no name
            raise InputError(f"--cache_gb={budget / 1e9:g}: the device has not that much left "
                             f"({str(e).splitlines()[0]}); lower it") from None

    def _cache_bytes(self):
        if self.cache_gb:
            return self.cache_gb * 1e9
        if self.device.type != "cuda":
            return 4e9
        free, _ = torch.cuda.mem_get_info(self.device)
        return free / 2


# -- continuous batching -------------------------------------------------------------------------------------

@dataclass
class ActivePrompt:
    """A prompt that has been read, and how far its samples are."""
    request: Request
    started: int = 0
    ended: int = 0

    def start(self, most):
        """The indices of the samples that begin now, `most` of them or what is left."""
        first = self.started
        self.started = min(first + most, len(self.request.seeds))
        return range(first, self.started)

    def is_done(self):
        return self.ended == len(self.request.samples)


def compact(rows, removed):
    """How the rows that stay fill the gaps when some of the first `rows` rows go: (from, to), two lists."""
    left = rows - len(removed)
    removed = set(removed)
    source = [row for row in range(left, rows) if row not in removed]
    target = sorted(row for row in removed if row < left)
    return source, target


class Batch:
    """The samples that are being made, of N new tokens at most. They fill the first rows of the cache: when
    one ends, the last row moves into its place. So do the prompts in their rows.

    By prompt row, P of them in use:
        prompts         list[ActivePrompt]      where a prompt stands
        prompt_hidden   (P, C)       device     the final norm's output at the prompt's last token
    By sample row, the first `running` of them in use:
        hidden          (B, C)       device     the final norm's output from which the next token is drawn
        prompt_of       (B) int64    host       the sample's prompt row
        sample_index    (B) int64    host       which of its prompt's samples it is
        count           (B) int64    host       tokens it has
        limit           (B) int64    host       tokens it may have
        tokens          (B, N) int64 host       those tokens
        logprobs        (B, N) fp32  host       and their log-probs
        uniform         (B, N) fp64  host       the noise of each token, in [0, 1)
    """

    def __init__(self, engine, cache, requests, stops, temperature, top_p, on_sample):
        self.engine = engine
        self.model = engine.model
        self.cache = cache
        self.stops = stops
        self.temperature = temperature
        self.top_p = top_p
        self.on_sample = on_sample
        self.longest_stop = max((len(string.encode()) for string in stops.strings), default=0)
        embedding, _, _, head = self.model.trunk
        self.head = (embedding if head is None else head).weight[:engine.known]
        self.waiting = deque(requests)
        self.unfinished = sum(len(request.seeds) for request in requests)
        self.running = 0
        self.regrouped = False                            # whether other samples run than at the step before

        C = self.model.arch.C
        self.prompts = []
        self.prompt_hidden = torch.zeros(cache.prompt_rows, C, dtype=engine.dtype, device=engine.device)
        B = cache.sample_rows
        N = max(request.max_tokens for request in requests)
        self.hidden = torch.zeros(B, C, dtype=engine.dtype, device=engine.device)
        graphs = Graphs(engine.capture()) if engine.graphs else None
        self.decoder = Decoder(self.model, cache, self.hidden, graphs)
        self.prompt_of = np.zeros(B, dtype=np.int64)
        self.sample_index = np.zeros(B, dtype=np.int64)
        self.count = np.zeros(B, dtype=np.int64)
        self.limit = np.zeros(B, dtype=np.int64)
        self.tokens = np.zeros((B, N), dtype=np.int64)
        self.logprobs = np.zeros((B, N), dtype=np.float32)
        self.uniform = np.zeros((B, N))
        self.host_arrays = (self.prompt_of, self.sample_index, self.count, self.limit, self.tokens,
                            self.logprobs, self.uniform)

    def step(self):
        """One token more for every running sample; waiting ones begin where rows are free. Returns how many
        ended."""
        self.decode()
        new_prompts, new_samples = self.schedule()
        self.prefill(new_prompts)
        self.begin(new_samples)
        ended = self.sample()
        self.remove_samples(ended)
        return len(ended)

    def device(self, numbers):
        return to_device(torch.as_tensor(numbers), self.engine.device)

    def schedule(self):
        """Chooses what begins now: the rows of new prompts, and (prompt row, index of the sample) of new
        samples. A good number at a time, since a pass over a single prompt costs as much as a step of many
        rows."""
        free = self.cache.sample_rows - self.running
        first_new = len(self.prompts)
        starts = []
        if free >= max(1, self.cache.sample_rows // 8) or not self.running:
            for row, prompt in enumerate(self.prompts):
                starts += [(row, index) for index in prompt.start(free - len(starts))]
            while self.waiting and len(self.prompts) < self.cache.prompt_rows and len(starts) < free:
                row, prompt = len(self.prompts), ActivePrompt(self.waiting.popleft())
                starts += [(row, index) for index in prompt.start(free - len(starts))]
                self.prompts.append(prompt)
        return range(first_new, len(self.prompts)), starts

    def prefill(self, prompt_rows):
        """Reads the prompts of these rows, those of about one length in one pass."""
        rows = sorted(prompt_rows, key=lambda row: -len(self.prompts[row].request.ids))
        while rows:
            longest = len(self.prompts[rows[0]].request.ids)
            count = max(1, self.engine.read_tokens // longest)
            self._prefill_pass(rows[:count], longest)
            rows = rows[count:]

    def _prefill_pass(self, rows, longest):
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        lengths = []
        for i, row in enumerate(rows):
            ids = self.prompts[row].request.ids
            tokens[i, :len(ids)] = torch.tensor(ids)
            lengths.append(len(ids))
        rows = self.device(rows)
        lengths = self.device(lengths)
        last = forward(self.model, self.device(tokens), Prefill(self.cache, rows, lengths, longest))
        self.prompt_hidden[rows] = last[torch.arange(len(rows), device=last.device), lengths - 1]

    def begin(self, starts):
        """Gives new samples the next free rows. starts: [(prompt row, index of the sample)]."""
        if not starts:
            return
        first = self.running
        self.running += len(starts)
        for row, (prompt_row, index) in enumerate(starts, first):
            request = self.prompts[prompt_row].request
            self.prompt_of[row] = prompt_row
            self.sample_index[row] = index
            self.count[row] = 0
            self.limit[row] = request.max_tokens
            noise = np.random.default_rng(request.seeds[index])
            self.uniform[row, :request.max_tokens] = noise.random(request.max_tokens)
        prompt_rows = self.device(self.prompt_of[first:self.running])
        sample_rows = torch.arange(first, self.running, device=self.engine.device)
        self.hidden[sample_rows] = self.prompt_hidden[prompt_rows]
        self.cache.begin_samples(prompt_rows, sample_rows)
        self.regrouped = True

    def decode(self):
        """Reads the token drawn last of every running sample."""
        if not self.running:
            return
        if self.regrouped:
            lengths = np.array([len(prompt.request.ids) for prompt in self.prompts])
            self.decoder.regroup(lengths, self.prompt_of[:self.running])
            self.regrouped = False
        count = self.count[:self.running]
        self.decoder.step(self.tokens[np.arange(self.running), count - 1], count)

    def sample(self):
        """Draws the next token of every running sample; returns the rows of those that it ends."""
        rows = np.arange(self.running)
        place = rows, self.count[:self.running]
        logits = project(self.hidden[:self.running], self.head, self.model.arch.logits_scale, None)
        ids, logprobs = draw(logits, self.device(self.uniform[place]), self.temperature, self.top_p)
        ids = ids.cpu().numpy()
        logprobs = logprobs.cpu().numpy()
        if np.isnan(logprobs).any():
            raise InputError("the model's output is not a number: its weights hold NaN or inf, or overflow "
                             f"in {self.engine.dtype}")
        self.tokens[place] = ids
        self.logprobs[place] = logprobs
        self.count[:self.running] += 1

        # a sample ends by a stop, or when it has all the tokens it may have
        stopped = np.isin(ids, self.stops.ids)
        if self.stops.strings:
            stopped |= [self._says_stop(row) for row in rows]
        full = self.count[:self.running] == self.limit[:self.running]
        ended = np.flatnonzero(stopped | full).tolist()
        for row in ended:
            self._finish(row, "stop" if stopped[row] else "length")
        return ended

    def _says_stop(self, row):
        """Whether the last token completed a stop string: a token is a byte at least, so few have to be
        read."""
        count = self.count[row]
        first = max(0, count - self.longest_stop - 4)
        text = self.engine.tokenizer.decode(self.tokens[row, first:count].tolist())
        return any(string in text for string in self.stops.strings)

    def _finish(self, row, reason):
        """Hands a sample over."""
        count = self.count[row]
        tokens = self.tokens[row, :count].tolist()
        logprobs = self.logprobs[row, :count].tolist()
        text = self.stops.text(self.engine.tokenizer, tokens, reason)
        sample = Sample(tokens, logprobs, reason, text)
        prompt = self.prompts[self.prompt_of[row]]
        index = int(self.sample_index[row])
        prompt.request.samples[index] = sample
        prompt.ended += 1
        self.unfinished -= 1
        if self.on_sample:
            self.on_sample(prompt.request.index, index, sample)

    def remove_samples(self, rows):
        """Takes rows out, and with the last sample of a prompt the prompt's row."""
        if not rows:
            return
        source, target = compact(self.running, rows)
        self.running -= len(rows)
        self.regrouped = True
        if source:                                        # the last rows move into the gaps
            for array in self.host_arrays:
                array[target] = array[source]
            source, target = self.device(source), self.device(target)
            self.hidden[target] = self.hidden[source]
            self.cache.move_samples(source, target)
        self._remove_prompts([row for row, prompt in enumerate(self.prompts) if prompt.is_done()])

    def _remove_prompts(self, rows):
        source, target = compact(len(self.prompts), rows)
        left = len(self.prompts) - len(rows)
        prompt_of = self.prompt_of[:self.running]
        for old, new in zip(source, target, strict=True):
            prompt_of[prompt_of == old] = new
            self.prompts[new] = self.prompts[old]
        del self.prompts[left:]
        if source:
            source, target = self.device(source), self.device(target)
            self.prompt_hidden[target] = self.prompt_hidden[source]
            self.cache.move_prompts(source, target)
