"""Cross-entropy of a linear head without ever holding the logits.

    loss = sum_t [ logsumexp_v x_tv - x_{t, target_t} ]      x_tv = s h_t . w_v, over tokens with target >= 0

    d loss / d (h_t . w_v) = s (exp(x_tv - logsumexp_t) - 1[v = target_t])

A 16k x 131k logits matrix in fp32 is 8.6 GB. Here `chunk` tokens at a time become logits, and since the loss
is a plain sum, their gradient is known at once: it is formed in place of the logits and multiplied out in the
same pass, so the backward pass has nothing left to do but scale. Work 6NVC instead of 8NVC for recomputation.

On a GPU the products are cuBLAS's, and between them one kernel goes twice over a row of logits: for maximum
and sum in one reading, and back again, while the caches hold a part, to put the gradient in its place. These
are 6 bytes a logit at most (bf16); in plain torch, mostly fp32, about 50. What logprob.py does the same way
is here: the sums over a row, and how chunks are cut, made and added up.
"""

import torch

from kernels import constexpr, jit, load_wide, on_triton, program, tl, triton, wide, wide_tl

IGNORE = -100
BLOCK = 32768                                      # of a row at a time, at most


def reference(h, weight, targets, scale=1.0):
    """The definition in a few lines of torch, logits and all: the oracle."""
    logits = (h @ weight.T).to(wide(h.dtype)) * scale
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def _rows(x, targets, scale, gradient):
    """Of a chunk's products x (n, V): the losses (n), and their gradient by x, in its dtype, or None."""
    dtype = x.dtype
    counted = targets >= 0
    index = targets.clamp_min(0)[:, None]
    x = x.to(wide(dtype))                          # logits; below they become their own gradient, in place
    if scale != 1.0:
        x *= scale
    top = x.amax(-1, keepdim=True)
    target = x.gather(1, index) - top
    x.sub_(top).exp_()
    total = x.sum(-1, keepdim=True)
    loss = (total.log() - target)[:, 0]
    loss = loss.masked_fill(~counted, 0)
    if not gradient:
        return loss, None
    # The gradient is softmax - one-hot, times the scale.
    factor = (counted.to(x.dtype) * scale)[:, None]
    x.mul_(factor / total).scatter_add_(1, index, -factor)
    return loss, x.to(dtype)


# -- Triton: a row a program -------------------------------------------------------------------------------
# Rows begin at multiples of 16 elements (`logits_buffer`), so that a load masked by the row's stride, not its
# width, is of 128 bits whatever the width: what stands between the two is not looked at.

@jit
def _fold(top, total, moment, x, scale2, MOMENT: constexpr):
    """top, total, moment (L): of what came before, its maximum, the sum of exp(s (x - top)), and with MOMENT
    that of exp(s (x - top)) (x - top). Returns them with x (L, 8) added, each of the L for itself: eight
    neighbours are one thread's, so that threads need not meet before the row's end, and only one exp in nine
    is spent on a maximum that moved. scale2: s / ln 2."""
    new_top = tl.maximum(top, tl.max(x, 1))
    x -= new_top[:, None]
    p = tl.exp2(x * scale2)
    shrink = tl.exp2((top - new_top) * scale2)
    if MOMENT:
        moment = shrink * (moment + (top - new_top) * total) + tl.sum(p * x, 1)
    total = shrink * total + tl.sum(p, 1)
    return new_top, total, moment


@jit
def statistics(X, x_row, width, scale2, MOMENT: constexpr, BLOCK: constexpr, WIDE: constexpr):
    """Of a row of logits s x, s > 0: the maximum of x, the sum of exp(s (x - maximum)), and with MOMENT that
    of exp(s (x - maximum)) (x - maximum). One reading. -1e30 is where maxima begin: unlike -inf it can be
    subtracted from itself, and exp makes 0 of it beside any logit."""
    PART: constexpr = BLOCK // 4                   # a thread's: in bf16 one 128-bit load
    LANES: constexpr = PART // 8
    c = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    top = tl.full((LANES,), -1e30, WIDE)
    total = tl.zeros((LANES,), WIDE)
    moment = tl.zeros((LANES,), WIDE)
    whole = width // BLOCK * BLOCK
    # Whole blocks: four loads are under way at once, none of them masked.
    for start in range(0, whole, BLOCK):
        x0 = tl.load(X + (start + c))
        x1 = tl.load(X + (start + PART + c))
        x2 = tl.load(X + (start + 2 * PART + c))
        x3 = tl.load(X + (start + 3 * PART + c))
        top, total, moment = _fold(top, total, moment, x0.to(WIDE), scale2, MOMENT)
        top, total, moment = _fold(top, total, moment, x1.to(WIDE), scale2, MOMENT)
        top, total, moment = _fold(top, total, moment, x2.to(WIDE), scale2, MOMENT)
        top, total, moment = _fold(top, total, moment, x3.to(WIDE), scale2, MOMENT)
    # The rest comes a part at a time.
    for start in range(whole, width, PART):
        x = load_wide(X + (start + c), start + c < x_row, WIDE)
        x = tl.where(start + c < width, x, -1e30)
        top, total, moment = _fold(top, total, moment, x, scale2, MOMENT)
    # At the row's end the lanes meet, each shrunk to the highest maximum.
    highest = tl.max(top, 0)
    below = top - highest
    shrink = tl.exp2(below * scale2)
    if MOMENT:
        moment = shrink * (moment + below * total)
    return highest, tl.sum(shrink * total, 0), tl.sum(moment, 0)


@jit
def _cross_entropy(X, Target, Loss, x_row, width, scale: "fp64", GRADIENT: constexpr,  # noqa: F821
                   BLOCK: constexpr, WIDE: constexpr):
    """A row's loss; with GRADIENT its gradient takes the place of the products."""
    HALF: constexpr = BLOCK // 2
    scale = tl.full((), scale, WIDE)
    row = program(0)
    X += row * x_row
    target = tl.load(Target + row).to(tl.int32)
    blocks = tl.cdiv(x_row, HALF)
    if target < 0:                                 # not counted
        tl.store(Loss + row, 0.0)
        if GRADIENT:
            for i in range(blocks):
                c = i * HALF + tl.arange(0, HALF)
                tl.store(X + c, tl.zeros((HALF,), X.dtype.element_ty), c < x_row)
    else:
        scale2 = scale * 1.4426950408889634        # 1 / ln 2: exp2 is one instruction, exp five
        answer = tl.load(X + target).to(WIDE)
        top, total, _ = statistics(X, x_row, width, scale2, False, BLOCK, WIDE)
        tl.store(Loss + row, tl.log(total) + (top - answer) * scale)
        if GRADIENT:
            share = scale / total
            for i in range(blocks):                # backwards: what was read last is in the nearest cache
                c = (blocks - 1 - i) * HALF + tl.arange(0, HALF)
                x = load_wide(X + c, c < x_row, WIDE)
                dx = tl.exp2((x - top) * scale2) * share
                dx = tl.where(c == target, dx - scale, dx)
                tl.store(X + c, dx, c < x_row)


def row_launch(x):
    """Threads by the length of a row of x, so that the rows an SM of 2,048 threads has at a time are half a
    megabyte at most, of which a second pass meets a good part in the caches; fewer of wider types, which
    take more registers."""
    row_bytes = x.shape[1] * x.element_size()
    warps = max(4, triton.next_power_of_2(row_bytes // 8192))
    warps = min(64 // x.element_size(), warps)
    return dict(BLOCK=min(BLOCK, 1024 * warps), num_warps=warps)


def _rows_triton(x, targets, scale, gradient):
    """As _rows; the gradient takes the place of x."""
    n, V = x.shape
    loss = x.new_empty(n, dtype=wide(x.dtype))
    _cross_entropy[(n,)](
        X=x, Target=targets, Loss=loss, x_row=x.stride(0), width=V, scale=scale,
        GRADIENT=gradient, WIDE=wide_tl(x.dtype), **row_launch(x))
    return loss, x if gradient else None


# -- chunks: what logprob.py does the same way -------------------------------------------------------------

def chunk_size(h, weight):
    """Tokens whose logits exist at a time, where the caller names no number.

    Triton: 2^29 logits, 1 GiB in bf16, in 256 .. 8192 tokens. Every chunk reads and writes the head's
    gradient, 8 VC bytes in fp32, beside its 6 VC operations a token: at V = 131072, C = 4096 on an H200 that
    is 1.0 ms beside 4.1 us a token, +48 % at 512 tokens, +6 % at the 4096 that this makes. Longer chunks gain
    little more and their logits cost what the gradient does. Plain torch on a GPU: 2^28, as it holds several
    buffers of fp32. A CPU: what stays in its cache."""
    V = weight.shape[0]
    if on_triton(h):
        return triton_chunk(V)
    logits = 1 << (28 if h.is_cuda else 20)
    return max(64, logits // V)


def triton_chunk(V):
    """The tokens of a chunk for Triton, of a head of V rows: see `chunk_size`."""
    return max(256, min(8192, (1 << 29) // V))


def logits_buffer(h, weight, chunk):
    """Where one chunk's products are written after the other's, for Triton; None in plain torch, which makes
    them anew. Rows begin at multiples of 16 elements, which cuBLAS reads faster too."""
    if not on_triton(h):
        return None
    rows = min(chunk, h.shape[0])
    V = weight.shape[0]
    padded = -(-V // 16) * 16
    return h.new_empty(rows, padded)[:, :V]


def products(h, weight, buffer):
    """h . w (n, V) of a chunk."""
    if buffer is None:
        return h @ weight.T
    return torch.mm(h, weight.T, out=buffer[:h.shape[0]])


def add_product(dw, dx, h):
    """dw (V, C) += dx.T @ h, dw in fp32 (float64) whatever their dtype. On a GPU within the product: no
    (V, C) beside dw, and no rounding of a chunk's part to bf16."""
    if not dw.is_cuda:
        dw += dx.T @ h
    elif dw.dtype == h.dtype:
        dw.addmm_(dx.T, h)
    else:
        torch.addmm(dw, dx.T, h, out_dtype=dw.dtype, out=dw)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, scale, chunk):
        want_h, want_w = ctx.needs_input_grad[:2]
        run = _rows_triton if on_triton(h) else _rows
        buffer = logits_buffer(h, weight, chunk)
        loss = h.new_zeros((), dtype=wide(h.dtype))
        dh = torch.empty_like(h) if want_h else None
        dw = torch.zeros_like(weight, dtype=loss.dtype) if want_w else None
        # A chunk becomes logits, then their gradient, which is multiplied out at once.
        for start in range(0, h.shape[0], chunk):
            rows = slice(start, start + chunk)
            losses, dx = run(products(h[rows], weight, buffer), targets[rows], scale, want_h or want_w)
            loss += losses.sum()
            if want_h:
                torch.mm(dx, weight, out=dh[rows])
            if want_w:
                add_product(dw, dx, h[rows])
            del dx                                 # before the next chunk's is made
        ctx.save_for_backward(dh, dw)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, upstream):
        # The factor multiplies in fp32: 1 / tokens, rounded to bf16, would be up to 0.4 % off.
        dh, dw = ctx.saved_tensors
        if dh is not None:
            dh = (dh.to(upstream.dtype) * upstream).to(dh.dtype)
        if dw is not None:
            dw = (dw * upstream).to(ctx.dtype)
        return dh, dw, None, None, None


def linear_cross_entropy(h, weight, targets, scale=1.0, chunk=None):
    """h (N, C), weight (V, C) of one dtype, targets (N) int64 with IGNORE = -100 where not counted.
    Returns the summed loss in nats, scalar, fp32 (float64 for float64). `scale` > 0 multiplies the logits
    (Granite: 1 / logits_scaling). chunk: tokens whose logits exist at a time (`chunk_size`)."""
    if not torch.is_grad_enabled():                       # needs_input_grad does not know of no_grad
        h = h.detach()
        weight = weight.detach()
    if not chunk:
        chunk = chunk_size(h, weight)
    return _LinearCrossEntropy.apply(h, weight, targets.contiguous(), scale, chunk)
