"""Causal depthwise convolution of width K with bias and SiLU, reset at document boundaries (Mamba-2's short
filter).

    y_t = silu(bias + sum_s w_{K-1-s} x_{t-s}),   s = 0 .. K-1,   x of another document counts as zero

On a CPU written as K shifted multiply-adds: faster than conv1d, and the document mask costs one multiply a
shift. In Triton one pass forward, and one backward that computes the sum p before silu again:

    dp = dy sigma(p) (1 + p (1 - sigma(p)))        dx_t = sum_s w_{K-1-s} dp_{t+s}        db = sum_t dp_t
    dw_{K-1-s} = sum_t x_t dp_{t+s}

Kept are x, the taps and the document ids, not p, which would be as large as x: 16k tokens x 10,240 channels
in bf16 are 335 MB a layer. x may be a slice of in_proj's output, positions apart by more than C.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import (
    channels_adjacent,
    columns,
    constexpr,
    jit,
    load_wide,
    on_triton,
    program,
    tl,
    triton,
    wide,
    wide_tl,
)


def reference(x, weight, bias, docs=None):
    """One document at a time, with torch's own convolution: the oracle."""
    if docs is None:
        padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
        y = F.conv1d(padded, weight, bias, groups=x.shape[-1])
        return F.silu(y.transpose(1, 2))
    rows = []
    for row, ids in zip(x, docs, strict=True):
        _, lengths = torch.unique_consecutive(ids, return_counts=True)
        documents = [reference(document[None], weight, bias)[0] for document in row.split(lengths.tolist())]
        rows.append(torch.cat(documents))
    return torch.stack(rows)


def _shifts(docs, K, T):
    """(s, mask of the positions t >= s whose x_{t-s} is of the same document, or None) for s = 1 .. K-1."""
    for s in range(1, min(K, T)):
        same = None
        if docs is not None:
            same = (docs[:, s:] == docs[:, :-s])[..., None]
        yield s, same


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, taps, bias, docs):               # taps (K, C), contiguous: the newest position's last
        K = len(taps)
        if bias is None:
            p = x * taps[-1]
        else:
            p = torch.addcmul(bias, x, taps[-1])
        for s, same in _shifts(docs, K, x.shape[1]):
            past = x[:, :-s] if same is None else x[:, :-s] * same
            p[:, s:].addcmul_(past, taps[K - 1 - s])
        ctx.save_for_backward(x, taps, p, docs)
        ctx.bias = bias is not None
        return F.silu(p)

    @staticmethod
    def backward(ctx, dy):
        x, taps, p, docs = ctx.saved_tensors
        K = len(taps)
        dp = torch.ops.aten.silu_backward(dy, p)
        dx = dp * taps[-1]
        dtaps = torch.zeros_like(taps)
        dtaps[-1] = (dp * x).sum((0, 1))
        for s, same in _shifts(docs, K, x.shape[1]):
            later = dp[:, s:] if same is None else dp[:, s:] * same
            dx[:, :-s].addcmul_(later, taps[K - 1 - s])
            dtaps[K - 1 - s] = (later * x[:, :-s]).sum((0, 1))
        dbias = dp.sum((0, 1)) if ctx.bias else None
        return dx, dtaps, dbias, None


# -- Triton ------------------------------------------------------------------------------------------------

# A program is one warp: with a block of channels it goes along a span of one row. Each position is read once,
# and what the next ones need of it stays in registers; AHEAD positions are read before any is written.

class Pace(NamedTuple):
    ahead: int                                     # AHEAD
    warps: int                                     # that a multiprocessor's registers are enough for


SHORTEST = 32                                      # positions of a span, of a row that has as many
FORWARD = Pace(ahead=8, warps=12)
BACKWARD = Pace(ahead=2, warps=8)
REGISTER_BYTES = 512                               # x of one position, of a warp: 16 bytes a thread


@jit
def _filter(window, ids, taps, bias, K: constexpr, DOCS: constexpr):
    """The sum before silu of one position, from x (window) and documents (ids) of it and of the K - 1 before
    it, the oldest first."""
    p = bias
    for k in tl.static_range(K):
        x = window[k]
        if DOCS and k < K - 1:
            x = tl.where(ids[k] == ids[K - 1], x, 0.0)
        p += taps[k] * x
    return p


@jit
def _silu_backward(dy, p):
    sigma = tl.sigmoid(p)
    return dy * sigma * (1 + p * (1 - sigma))


@jit
def _begin(X, Taps, Bias, Docs, first, T, C, c, inside, x_row, COUNT: constexpr, K: constexpr,
           BIAS: constexpr, DOCS: constexpr, WIDE: constexpr):
    """Taps and bias, and COUNT positions from the (K - 1)th before `first` on: x and documents."""
    bias = tl.zeros_like(c).to(WIDE)
    if BIAS:
        bias = load_wide(Bias + c, inside, WIDE)
    taps = ()
    for k in tl.static_range(K):
        taps += (load_wide(Taps + k * C + c, inside, WIDE),)
    window = ()
    ids = ()
    for k in tl.static_range(COUNT):
        t = first - (K - 1) + k
        exists = (t >= 0) & (t < T)
        window += (load_wide(X + t * x_row, inside & exists, WIDE),)
        if DOCS:
            ids += (tl.load(Docs + t, exists, -1),)
    return taps, bias, window, ids


@jit
def _forward(X, Taps, Bias, Docs, Y, T, C, span, x_batch, x_row, K: constexpr, BIAS: constexpr,
             DOCS: constexpr, AHEAD: constexpr, CHANNELS: constexpr, WIDE: constexpr):
    blocks = tl.cdiv(C, CHANNELS)
    b = program(1)
    first = (tl.program_id(0) // blocks).to(tl.int64) * span
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < C
    X += b * x_batch + c
    Y += b * T * C + c
    Docs += b * T
    # The positions before the span are read; the window holds what the next position's filter needs.
    taps, bias, window, ids = _begin(X, Taps, Bias, Docs, first, T, C, c, inside, x_row, K - 1,
                                     K, BIAS, DOCS, WIDE)
    for start in range(first, tl.minimum(first + span, T), AHEAD):
        # AHEAD loads are under way at once.
        x = ()
        doc = ()
        for k in tl.static_range(AHEAD):
            t = start + k
            x += (tl.load(X + t * x_row, inside & (t < T), 0.0),)
            if DOCS:
                doc += (tl.load(Docs + t, t < T, -1),)
        # The window moves along, a position a turn.
        for k in tl.static_range(AHEAD):
            t = start + k
            window = window + (x[k].to(WIDE),)
            ids = ids + doc[k:k + 1]
            p = _filter(window, ids, taps, bias, K, DOCS)
            tl.store(Y + t * C, p * tl.sigmoid(p), inside & (t < T))
            window = window[1:]
            ids = ids[1:]


@jit
def _backward(X, Taps, Bias, Docs, DY, DX, Sums, T, C, span, x_batch, x_row, dy_batch, dy_row,
              K: constexpr, BIAS: constexpr, DOCS: constexpr, AHEAD: constexpr, CHANNELS: constexpr,
              WIDE: constexpr):
    """A row of Sums: dw (K, C), then db (C), of this program's positions as the x of the formula. dp: of a
    position and of the K - 1 after it."""
    blocks = tl.cdiv(C, CHANNELS)
    b = program(1)
    number = (tl.program_id(0) // blocks).to(tl.int64)
    first = number * span
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < C
    X += b * x_batch + c
    DY += b * dy_batch + c
    DX += b * T * C + c
    Docs += b * T
    taps, bias, window, ids = _begin(X, Taps, Bias, Docs, first, T, C, c, inside, x_row, 2 * (K - 1),
                                     K, BIAS, DOCS, WIDE)
    # dp of the span's first K - 1 positions is made ahead: the loop adds that of a later one at each turn.
    dp = ()
    for k in tl.static_range(K - 1):
        t = first + k
        upstream = load_wide(DY + t * dy_row, inside & (t < T), WIDE)
        p = _filter(window[k:k + K], ids[k:k + K], taps, bias, K, DOCS)
        dp += (_silu_backward(upstream, p),)
    window = window[K - 1:]
    ids = ids[K - 1:]
    sums = (tl.zeros((CHANNELS,), WIDE),) * (K + 1)
    for start in range(first, tl.minimum(first + span, T), AHEAD):
        # AHEAD loads are under way at once, K - 1 positions after those whose gradients are next.
        x = ()
        dy = ()
        doc = ()
        for k in tl.static_range(AHEAD):
            t = start + K - 1 + k
            x += (tl.load(X + t * x_row, inside & (t < T), 0.0),)
            dy += (tl.load(DY + t * dy_row, inside & (t < T), 0.0),)
            if DOCS:
                doc += (tl.load(Docs + t, t < T, -1),)
        for k in tl.static_range(AHEAD):
            # dp of the newest position; window and ids are then its, and of the K - 1 before it.
            window = window + (x[k].to(WIDE),)
            ids = ids + doc[k:k + 1]
            p = _filter(window, ids, taps, bias, K, DOCS)
            dp += (_silu_backward(dy[k].to(WIDE), p),)
            # The oldest position's x meets every tap once.
            dx = tl.zeros((CHANNELS,), WIDE)
            new_sums = ()
            for i in tl.static_range(K):
                later = dp[K - 1 - i]
                if DOCS and i < K - 1:
                    later = tl.where(ids[K - 1 - i] == ids[0], later, 0.0)
                dx += taps[i] * later
                new_sums += (sums[i] + window[0] * later,)
            sums = new_sums + (sums[K] + dp[0],)
            t = start + k
            tl.store(DX + t * C, dx, inside & (t < T))
            window = window[1:]
            ids = ids[1:]
            dp = dp[1:]
    Sums += (b * tl.cdiv(T, span) + number) * (K + 1) * C + c
    for k in tl.static_range(K + 1):
        tl.store(Sums + k * C, sums[k], inside)


@jit
def _step(State, X, Weight, Bias, Y, C, state_batch, state_row, x_row, weight_row, K: constexpr,
          BIAS: constexpr, CHANNELS: constexpr, WIDE: constexpr):
    """One position of a row, of a block of channels; the state moves on by one position."""
    b = program(0)
    c = columns(1, CHANNELS)
    inside = c < C
    State += b * state_batch + c
    p = tl.zeros((CHANNELS,), WIDE)
    if BIAS:
        p += load_wide(Bias + c, inside, WIDE)
    for k in tl.static_range(K):
        if k < K - 1:
            x = tl.load(State + k * state_row, inside, 0.0)
        else:
            x = tl.load(X + b * x_row + c, inside, 0.0)
        if k > 0:
            tl.store(State + (k - 1) * state_row, x, inside)
        tap = tl.load(Weight + c * weight_row + k, inside, 0.0).to(X.dtype.element_ty)
        p += x.to(WIDE) * tap.to(WIDE)
    tl.store(Y + b * C + c, p * tl.sigmoid(p), inside)


@functools.cache
def _span(T, programs, slots, ahead):
    """How many positions a program takes, a multiple of `ahead`, where a span of every row at once makes so
    many programs and so many run at a time: no last few that run alone, no more spans than needed."""
    def cost(span):
        turns = triton.cdiv(programs * triton.cdiv(T, span), slots)
        return turns * (span + 8)                  # 8: to begin and end one

    spans = set()
    for count in range(1, triton.cdiv(T, SHORTEST) + 1):
        length = triton.cdiv(T, count)
        spans.add(triton.cdiv(length, ahead) * ahead)
    return min(spans, key=cost, default=ahead)


class _Launch(NamedTuple):
    grid: tuple
    span: int                                      # positions of a program
    spans: int                                     # of a row
    constants: dict                                # of both kernels


def _launch(x, taps, bias, docs, pace):
    """How both kernels are launched for these tensors."""
    B, T, C = x.shape
    K = len(taps)
    channels = REGISTER_BYTES // x.itemsize
    if K > 4:
        channels //= 4                             # registers are enough for K = 4
    blocks = triton.cdiv(C, channels)
    processors = 132                               # an H200's
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    rounded = T if T < 256 else triton.cdiv(T, 256) * 256          # rows are of ever new lengths
    span = _span(rounded, B * blocks, pace.warps * processors, pace.ahead)
    spans = triton.cdiv(T, span)
    constants = dict(K=K, BIAS=bias is not None, DOCS=docs is not None, AHEAD=pace.ahead, CHANNELS=channels,
                     WIDE=wide_tl(x.dtype), num_warps=1)
    return _Launch((blocks * spans, B), span, spans, constants)


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, taps, bias, docs):
        x = channels_adjacent(x)
        docs = None if docs is None else docs.contiguous()
        ctx.save_for_backward(x, taps, bias, docs)
        _, T, C = x.shape
        launch = _launch(x, taps, bias, docs, FORWARD)
        y = x.new_empty(x.shape)
        # Where there is no bias or no documents some pointer stands in, which is not read.
        _forward[launch.grid](
            X=x, Taps=taps, Bias=taps if bias is None else bias, Docs=taps if docs is None else docs, Y=y,
            T=T, C=C, span=launch.span, x_batch=x.stride(0), x_row=x.stride(1), **launch.constants)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, taps, bias, docs = ctx.saved_tensors
        dy = channels_adjacent(dy)
        B, T, C = x.shape
        K = len(taps)
        launch = _launch(x, taps, bias, docs, BACKWARD)
        dx = x.new_empty(x.shape)
        sums = x.new_empty(B * launch.spans, K + 1, C, dtype=wide(x.dtype))
        _backward[launch.grid](
            X=x, Taps=taps, Bias=taps if bias is None else bias, Docs=taps if docs is None else docs,
            DY=dy, DX=dx, Sums=sums,
            T=T, C=C, span=launch.span, x_batch=x.stride(0), x_row=x.stride(1),
            dy_batch=dy.stride(0), dy_row=dy.stride(1), **launch.constants)
        sums = sums.sum(0)
        dbias = None if bias is None else sums[K].to(bias.dtype)
        return dx, sums[:K].to(taps.dtype), dbias, None


def _triton_step(state, x, weight, bias):
    B, C = x.shape
    x = channels_adjacent(x)
    y = x.new_empty(B, C)
    channels = REGISTER_BYTES // x.itemsize
    _step[B, triton.cdiv(C, channels)](
        State=state, X=x, Weight=weight, Bias=weight if bias is None else bias, Y=y, C=C,
        state_batch=state.stride(0), state_row=state.stride(1),
        x_row=x.stride(0), weight_row=weight.stride(0),
        K=weight.shape[-1], BIAS=bias is not None, CHANNELS=channels, WIDE=wide_tl(x.dtype), num_warps=1)
    return y


def causal_conv1d(x, weight, bias, docs=None):
    """x (B, T, C), weight (C, 1, K) as on the hub, bias (C) or None, docs (B, T) int64 or None.
    Returns (B, T, C)."""
    taps = weight[:, 0].T.to(x.dtype).contiguous()
    if bias is not None:
        bias = bias.to(x.dtype)
    op = _Triton if on_triton(x) else _Conv
    return op.apply(x, taps, bias, docs)


def step(state, x, weight, bias):
    """One token a row, for generation. state (B, K-1, C): the inputs before this one, oldest first, updated
    in place; x (B, C); weight (C, 1, K). Returns (B, C)."""
    if on_triton(x):
        return _triton_step(state, x, weight, bias)
    inputs = torch.cat([state, x[:, None]], 1)
    state.copy_(inputs[:, 1:])
    taps = weight[:, 0].T.to(x.dtype)
    p = (inputs * taps).sum(1)
    if bias is not None:
        p = p + bias.to(x.dtype)
    return F.silu(p)
