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

import torch
import torch.nn.functional as F

from kernels import constexpr, jit, on_triton, tl, triton, wide, wide_tl


def reference(x, weight, bias, docs=None):
    """One position at a time, with torch's own convolution when there is a single document: the oracle."""
    k = weight.shape[-1]
    if docs is None:
        return F.silu(F.conv1d(F.pad(x.transpose(1, 2), (k - 1, 0)), weight, bias,
                               groups=x.shape[-1]).transpose(1, 2))
    rows = [torch.cat([reference(piece[None], weight, bias)[0] for piece in
                       row.split(torch.unique_consecutive(d, return_counts=True)[1].tolist())])
            for row, d in zip(x, docs, strict=True)]
    return torch.stack(rows)


def _shifts(docs, k, t):
    """(s, mask of the positions t >= s whose x_{t-s} is of the same document, or None) for s = 1 .. K-1."""
    for s in range(1, min(k, t)):
        yield s, None if docs is None else (docs[:, s:] == docs[:, :-s])[..., None]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, taps, bias, docs):               # taps (K, C), contiguous: the newest position's last
        k = len(taps)
        pre = x * taps[-1] if bias is None else torch.addcmul(bias, x, taps[-1])
        for s, same in _shifts(docs, k, x.shape[1]):
            past = x[:, :-s] if same is None else x[:, :-s] * same
            pre[:, s:].addcmul_(past, taps[k - 1 - s])
        ctx.save_for_backward(x, taps, pre, docs)
        ctx.bias = bias is not None
        return F.silu(pre)

    @staticmethod
    def backward(ctx, g):
        x, taps, pre, docs = ctx.saved_tensors
        k = len(taps)
        g = torch.ops.aten.silu_backward(g, pre)
        dx, dtaps = g * taps[-1], torch.zeros_like(taps)
        dtaps[-1] = (g * x).sum((0, 1))
        for s, same in _shifts(docs, k, x.shape[1]):
            late = g[:, s:] if same is None else g[:, s:] * same
            dx[:, :-s].addcmul_(late, taps[k - 1 - s])
            dtaps[k - 1 - s] = (late * x[:, :-s]).sum((0, 1))
        return dx, dtaps, g.sum((0, 1)) if ctx.bias else None, None


# -- Triton ------------------------------------------------------------------------------------------------

# A program is one warp: with a block of channels it goes along a span of one row. Each position is read once,
# and what the next ones need of it stays in registers; AHEAD positions are read before any is written.

SHORTEST = 32                                      # positions of a span, of a row that has as many
FORWARD, BACKWARD = (8, 12), (2, 8)                # AHEAD, and how many warps' registers a multiprocessor has


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
def _slope(dy, p):
    s = tl.sigmoid(p)
    return dy * s * (1 + p * (1 - s))


@jit
def _begin(X, W, Bias, Docs, first, T, C, c, inside, x_row, COUNT: constexpr, K: constexpr, BIAS: constexpr,
           DOCS: constexpr, WIDE: constexpr):
    """Taps and bias, and COUNT positions from the (K - 1)th before `first` on: x and documents."""
    taps, window, ids, bias = (), (), (), tl.zeros_like(c).to(WIDE)
    if BIAS:
        bias = tl.load(Bias + c, inside, 0.0).to(WIDE)
    for k in tl.static_range(K):
        taps += (tl.load(W + k * C + c, inside, 0.0).to(WIDE),)
    for k in tl.static_range(COUNT):
        t = first - (K - 1) + k
        there = (t >= 0) & (t < T)
        window += (tl.load(X + t * x_row, inside & there, 0.0).to(WIDE),)
        if DOCS:
            ids += (tl.load(Docs + t, there, -1),)
    return taps, bias, window, ids


@jit
def _forward(X, W, Bias, Docs, Y, T, C, x_batch, x_row, span, K: constexpr, BIAS: constexpr, DOCS: constexpr,
             AHEAD: constexpr, CHANNELS: constexpr, WIDE: constexpr):
    blocks = tl.cdiv(C, CHANNELS)
    b, first = tl.program_id(1).to(tl.int64), (tl.program_id(0) // blocks).to(tl.int64) * span
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < C
    X += b * x_batch + c
    Y += b * T * C + c
    Docs += b * T
    taps, bias, window, ids = _begin(X, W, Bias, Docs, first, T, C, c, inside, x_row, K - 1, K, BIAS, DOCS,
                                     WIDE)
    for start in range(first, tl.minimum(first + span, T), AHEAD):
        x, doc = (), ()
        for k in tl.static_range(AHEAD):
            t = start + k
            x += (tl.load(X + t * x_row, inside & (t < T), 0.0),)
            if DOCS:
                doc += (tl.load(Docs + t, t < T, -1),)
        for k in tl.static_range(AHEAD):
            window, ids = window + (x[k].to(WIDE),), ids + doc[k:k + 1]
            p = _filter(window, ids, taps, bias, K, DOCS)
            tl.store(Y + (start + k) * C, (p * tl.sigmoid(p)).to(Y.dtype.element_ty),
                     inside & (start + k < T))
            window, ids = window[1:], ids[1:]


@jit
def _backward(X, W, Bias, Docs, DY, DX, Sums, T, C, x_batch, x_row, dy_batch, dy_row, span, K: constexpr,
              BIAS: constexpr, DOCS: constexpr, AHEAD: constexpr, CHANNELS: constexpr, WIDE: constexpr):
    """A row of Sums: dw (K, C), then db (C), of this program's positions as the x of the formula. dp: of a
    position and of the K - 1 after it."""
    blocks = tl.cdiv(C, CHANNELS)
    b, number = tl.program_id(1).to(tl.int64), (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside, first = c < C, number * span
    X += b * x_batch + c
    DY += b * dy_batch + c
    DX += b * T * C + c
    Docs += b * T
    taps, bias, window, ids = _begin(X, W, Bias, Docs, first, T, C, c, inside, x_row, 2 * (K - 1), K, BIAS,
                                     DOCS, WIDE)
    dp, sums = (), (tl.zeros((CHANNELS,), WIDE),) * (K + 1)
    for k in tl.static_range(K - 1):
        t = first + k
        up = tl.load(DY + t * dy_row, inside & (t < T), 0.0).to(WIDE)
        dp += (_slope(up, _filter(window[k:k + K], ids[k:k + K], taps, bias, K, DOCS)),)
    window, ids = window[K - 1:], ids[K - 1:]
    for start in range(first, tl.minimum(first + span, T), AHEAD):
        x, dy, doc = (), (), ()
        for k in tl.static_range(AHEAD):
            t = start + K - 1 + k
            x += (tl.load(X + t * x_row, inside & (t < T), 0.0),)
            dy += (tl.load(DY + t * dy_row, inside & (t < T), 0.0),)
            if DOCS:
                doc += (tl.load(Docs + t, t < T, -1),)
        for k in tl.static_range(AHEAD):
            window, ids = window + (x[k].to(WIDE),), ids + doc[k:k + 1]
            dp += (_slope(dy[k].to(WIDE), _filter(window, ids, taps, bias, K, DOCS)),)
            dx, new = tl.zeros((CHANNELS,), WIDE), ()
            for i in tl.static_range(K):
                late = dp[K - 1 - i]
                if DOCS and i < K - 1:
                    late = tl.where(ids[K - 1 - i] == ids[0], late, 0.0)
                dx += taps[i] * late
                new += (sums[i] + window[0] * late,)
            sums = new + (sums[K] + dp[0],)
            tl.store(DX + (start + k) * C, dx.to(DX.dtype.element_ty), inside & (start + k < T))
            window, ids, dp = window[1:], ids[1:], dp[1:]
    Sums += (b * tl.cdiv(T, span) + number) * (K + 1) * C + c
    for k in tl.static_range(K + 1):
        tl.store(Sums + k * C, sums[k], inside)


@jit
def _step(State, X, W, Bias, Y, C, state_batch, state_row, x_row, w_row, K: constexpr, BIAS: constexpr,
          CHANNELS: constexpr, WIDE: constexpr):
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < C
    State += b * state_batch + c
    acc = tl.zeros((CHANNELS,), WIDE)
    if BIAS:
        acc += tl.load(Bias + c, inside, 0.0).to(WIDE)
    for k in tl.static_range(K):
        if k < K - 1:
            x = tl.load(State + k * state_row, inside, 0.0)
        else:
            x = tl.load(X + b * x_row + c, inside, 0.0)
        if k > 0:
            tl.store(State + (k - 1) * state_row, x.to(State.dtype.element_ty), inside)
        w = tl.load(W + c * w_row + k, inside, 0.0).to(X.dtype.element_ty)
        acc += x.to(WIDE) * w.to(WIDE)
    tl.store(Y + b * C + c, (acc * tl.sigmoid(acc)).to(Y.dtype.element_ty), inside)


def _last_is_1(x):
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _span(T, programs, slots, ahead):
    """How many positions a program takes, a multiple of `ahead`, where a span of every row at once makes so
    many programs and so many run at a time: no last few that run alone, no more spans than needed."""
    def cost(span):
        return triton.cdiv(programs * triton.cdiv(T, span), slots) * (span + 8)    # 8: to begin and end one

    return min({triton.cdiv(triton.cdiv(T, n), ahead) * ahead
                for n in range(1, triton.cdiv(T, SHORTEST) + 1)}, key=cost, default=ahead)


def _launch(x, K, ahead, warps):
    """Grid, span, and the rest of what both kernels' launches share."""
    B, T, C = x.shape
    channels = 32 * 16 // x.itemsize // (1 if K <= 4 else 4)       # 128 bits a thread: registers for K = 4
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
    about = T if T < 256 else triton.cdiv(T, 256) * 256            # rows are of ever new lengths
    span = _span(about, B * triton.cdiv(C, channels), warps * processors, ahead)
    return (triton.cdiv(C, channels) * triton.cdiv(T, span), B), span, dict(
        K=K, AHEAD=ahead, CHANNELS=channels, WIDE=wide_tl(x.dtype), num_warps=1)


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, taps, bias, docs):
        x, docs = _last_is_1(x), None if docs is None else docs.contiguous()
        ctx.save_for_backward(x, taps, bias, docs)
        (_, T, C), (grid, span, how) = x.shape, _launch(x, len(taps), *FORWARD)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _forward[grid](x, taps, taps if bias is None else bias, taps if docs is None else docs, y, T, C,
                       x.stride(0), x.stride(1), span, BIAS=bias is not None, DOCS=docs is not None, **how)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, taps, bias, docs = ctx.saved_tensors
        (B, T, C), K, dy = x.shape, len(taps), _last_is_1(dy)
        grid, span, how = _launch(x, K, *BACKWARD)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = torch.empty(B * triton.cdiv(T, span), K + 1, C, dtype=wide(x.dtype), device=x.device)
        _backward[grid](x, taps, taps if bias is None else bias, taps if docs is None else docs, dy, dx, sums,
                        T, C, x.stride(0), x.stride(1), dy.stride(0), dy.stride(1), span,
                        BIAS=bias is not None, DOCS=docs is not None, **how)
        sums = sums.sum(0)
        return dx, sums[:K].to(taps.dtype), None if bias is None else sums[K].to(bias.dtype), None


def causal_conv1d(x, weight, bias, docs=None):
    """x (B, T, C), weight (C, 1, K) as on the hub, bias (C) or None, docs (B, T) int64 or None.
    Returns (B, T, C)."""
    taps = weight[:, 0].T.to(x.dtype).contiguous()
    op = _Triton if on_triton(x) else _Conv
    return op.apply(x, taps, None if bias is None else bias.to(x.dtype), docs)


def step(state, x, weight, bias):
    """One token a row, for generation. state (B, K-1, C): the inputs before this one, oldest first, updated
    in place; x (B, C); weight (C, 1, K). Returns (B, C)."""
    if on_triton(x):
        (B, C), x, K = x.shape, _last_is_1(x), weight.shape[-1]
        y, channels = torch.empty(B, C, dtype=x.dtype, device=x.device), 32 * 16 // x.itemsize
        _step[B, triton.cdiv(C, channels)](
            state, x, weight, weight if bias is None else bias, y, C, state.stride(0), state.stride(1),
            x.stride(0), weight.stride(0), K=K, BIAS=bias is not None, CHANNELS=channels,
            WIDE=wide_tl(x.dtype), num_warps=1)
        return y
    inputs = torch.cat([state, x[:, None]], 1)
    state.copy_(inputs[:, 1:])
    y = (inputs * weight[:, 0].T.to(x.dtype)).sum(1)
    return F.silu(y if bias is None else y + bias.to(x.dtype))
