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

from kernels import constexpr, jit, on_triton, tl, triton, wide, wide_tl

IGNORE = -100
BLOCK = 32768                                      # of a row at a time, at most


def reference(h, weight, targets, scale=1.0):
    """The definition in a few lines of torch, logits and all: the oracle."""
    logits = (h @ weight.T).to(wide(h.dtype)) * scale
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def _rows(x, targets, scale, gradient):
    """Of a chunk's products x (n, V): the losses (n), and their gradient by x, in its dtype, or None."""
    dtype, counted, index = x.dtype, targets >= 0, targets.clamp_min(0)[:, None]
    x = x.to(wide(dtype))                          # logits; below they become their own gradient, in place
    if scale != 1.0:
        x *= scale
    top = x.amax(-1, keepdim=True)
    target = x.gather(1, index) - top
    total = x.sub_(top).exp_().sum(-1, keepdim=True)
    loss = (total.log() - target)[:, 0].masked_fill(~counted, 0)
    if not gradient:
        return loss, None
    factor = (counted.to(x.dtype) * scale)[:, None]                  # softmax - one-hot, times the scale
    return loss, x.mul_(factor / total).scatter_add_(1, index, -factor).to(dtype)


# -- Triton: a row a program -------------------------------------------------------------------------------
# Rows begin at multiples of 16 elements (`room`), so that a load masked by the row's stride, not its width,
# is of 128 bits whatever the width: what stands between the two is not looked at.

@jit
def _fold(top, total, moment, x, scale2, MOMENT: constexpr):
    """top, total, moment (L): of what came before, its maximum, the sum of exp(s (x - top)), and with MOMENT
    that of exp(s (x - top)) (x - top). Returns them with x (L, 8) added, each of the L for itself: eight
    neighbours are one thread's, so that threads need not meet before the row's end, and only one exp in nine
    is spent on a maximum that moved. scale2: s / ln 2."""
    new = tl.maximum(top, tl.max(x, 1))
    x -= new[:, None]
    p, shrink = tl.exp2(x * scale2), tl.exp2((top - new) * scale2)
    if MOMENT:
        moment = shrink * (moment + (top - new) * total) + tl.sum(p * x, 1)
    return new, shrink * total + tl.sum(p, 1), moment


@jit
def statistics(X, x_row, width, scale2, MOMENT: constexpr, BLOCK: constexpr, WIDE: constexpr):
    """Of a row of logits s x, s > 0: the maximum of x, the sum of exp(s (x - maximum)), and with MOMENT that
    of exp(s (x - maximum)) (x - maximum). One reading. -1e30 is where maxima begin: unlike -inf it can be
    subtracted from itself, and exp makes 0 of it beside any logit."""
    PART: constexpr = BLOCK // 4                   # a thread's: in bf16 one 128-bit load
    c = tl.arange(0, PART // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    top = tl.full((PART // 8,), -1e30, WIDE)
    total, moment = tl.zeros((PART // 8,), WIDE), tl.zeros((PART // 8,), WIDE)
    whole = width // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x0, x1 = tl.load(X + (start + c)), tl.load(X + (start + PART + c))
        x2, x3 = tl.load(X + (start + 2 * PART + c)), tl.load(X + (start + 3 * PART + c))
        top, total, moment = _fold(top, total, moment, x0.to(WIDE), scale2, MOMENT)
        top, total, moment = _fold(top, total, moment, x1.to(WIDE), scale2, MOMENT)
        top, total, moment = _fold(top, total, moment, x2.to(WIDE), scale2, MOMENT)
        top, total, moment = _fold(top, total, moment, x3.to(WIDE), scale2, MOMENT)
    for start in range(whole, width, PART):
        x = tl.load(X + (start + c), start + c < x_row, 0.0).to(WIDE)
        top, total, moment = _fold(top, total, moment, tl.where(start + c < width, x, -1e30), scale2, MOMENT)
    highest = tl.max(top, 0)
    below = top - highest
    shrink = tl.exp2(below * scale2)
    if MOMENT:
        moment = shrink * (moment + below * total)
    return highest, tl.sum(shrink * total, 0), tl.sum(moment, 0)


@jit
def _cross_entropy(X, Target, Loss, x_row, width, scale: "fp64", GRADIENT: constexpr,  # noqa: F821
                   BLOCK: constexpr, WIDE: constexpr):
    scale = tl.full((), scale, WIDE)
    row = tl.program_id(0).to(tl.int64)
    X += row * x_row
    HALF: constexpr = BLOCK // 2
    target, blocks = tl.load(Target + row).to(tl.int32), tl.cdiv(x_row, HALF)
    if target < 0:                                 # not counted
        tl.store(Loss + row, 0.0)
        if GRADIENT:
            for i in range(blocks):
                c = i * HALF + tl.arange(0, HALF)
                tl.store(X + c, tl.zeros((HALF,), X.dtype.element_ty), c < x_row)
    else:
        scale2 = scale * 1.4426950408889634        # exp2 is one instruction, exp five
        answer = tl.load(X + target).to(WIDE)
        top, total, _ = statistics(X, x_row, width, scale2, False, BLOCK, WIDE)
        tl.store(Loss + row, tl.log(total) + (top - answer) * scale)
        if GRADIENT:
            share = scale / total
            for i in range(blocks):                # backwards: what was read last is in the nearest cache
                c = (blocks - 1 - i) * HALF + tl.arange(0, HALF)
                x = tl.load(X + c, c < x_row, 0.0).to(WIDE)
                g = tl.exp2((x - top) * scale2) * share
                tl.store(X + c, tl.where(c == target, g - scale, g).to(X.dtype.element_ty), c < x_row)


def row_launch(x):
    """Threads by the length of a row of x, so that the rows an SM of 2,048 threads has at a time are half a
    megabyte at most, of which a second pass meets a good part in the caches; fewer of wider types, which
    take more registers."""
    warps = min(64 // x.element_size(), max(4, triton.next_power_of_2(x.shape[1] * x.element_size() // 8192)))
    return dict(BLOCK=min(BLOCK, 1024 * warps), num_warps=warps)


def _rows_triton(x, targets, scale, gradient):
    """As _rows; the gradient takes the place of x."""
    loss = torch.empty(x.shape[0], dtype=wide(x.dtype), device=x.device)
    _cross_entropy[(x.shape[0],)](x, targets, loss, x.stride(0), x.shape[1], scale, GRADIENT=gradient,
                                  WIDE=wide_tl(x.dtype), **row_launch(x))
    return loss, x if gradient else None


# -- chunks: what logprob.py does the same way -------------------------------------------------------------

def chunk_size(h, weight):
    """Tokens whose logits exist at a time, unless told.

    Triton: 2^29 logits, 1 GiB in bf16, in 256 .. 8192 tokens. Every chunk reads and writes the head's
    gradient, 8 VC bytes in fp32, beside its 6 VC operations a token: at V = 131072, C = 4096 on an H200 that
    is 1.0 ms beside 4.1 us a token, +48 % at 512 tokens, +6 % at the 4096 that this makes. Longer chunks gain
    little more and their logits cost what the gradient does. Plain torch on a GPU: 2^28, as it holds several
    buffers of fp32. A CPU: what stays in its cache."""
    if on_triton(h):
        return max(256, min(8192, (1 << 29) // weight.shape[0]))
    return max(64, (1 << (28 if h.is_cuda else 20)) // weight.shape[0])


def room(h, weight, chunk):
    """Where one chunk's products are written after the other's, for Triton; None in plain torch, which makes
    them anew. Rows begin at multiples of 16 elements, which cuBLAS reads faster too."""
    if not on_triton(h):
        return None
    n, V = min(chunk, h.shape[0]), weight.shape[0]
    return torch.empty(n, -(-V // 16) * 16, dtype=h.dtype, device=h.device)[:, :V]


def products(h, weight, room):
    """h . w (n, V) of a chunk."""
    return h @ weight.T if room is None else torch.mm(h, weight.T, out=room[:h.shape[0]])


def add_product(dw, grad, h):
    """dw (V, C) += grad.T @ h, dw in fp32 (float64) whatever their dtype. On a GPU within the product: no
    (V, C) beside dw, and no rounding of a chunk's part to bf16."""
    if not dw.is_cuda:
        dw += grad.T @ h
    elif dw.dtype == h.dtype:
        dw.addmm_(grad.T, h)
    else:
        torch.addmm(dw, grad.T, h, out_dtype=dw.dtype, out=dw)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, scale, chunk):
        want_h, want_w = ctx.needs_input_grad[:2]
        rows, buffer = _rows_triton if on_triton(h) else _rows, room(h, weight, chunk)
        loss = torch.zeros((), dtype=wide(h.dtype), device=h.device)
        dh = torch.empty_like(h) if want_h else None
        dw = torch.zeros_like(weight, dtype=loss.dtype) if want_w else None
        for i in range(0, h.shape[0], chunk):
            part = slice(i, i + chunk)
            losses, grad = rows(products(h[part], weight, buffer), targets[part], scale, want_h or want_w)
            loss += losses.sum()
            if want_h:
                torch.mm(grad, weight, out=dh[part])
            if want_w:
                add_product(dw, grad, h[part])
            del grad
        ctx.save_for_backward(dh, dw)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, upstream):
        dh, dw = ctx.saved_tensors
        # in fp32: 1 / tokens, rounded to bf16, would be up to 0.4 % off
        return (None if dh is None else (dh.to(upstream.dtype) * upstream).to(dh.dtype),
                None if dw is None else (dw * upstream).to(ctx.dtype), None, None, None)


def linear_cross_entropy(h, weight, targets, scale=1.0, chunk=None):
    """h (N, C), weight (V, C) of one dtype, targets (N) int64 with IGNORE = -100 where not counted.
    Returns the summed loss in nats, scalar, fp32 (float64 for float64). `scale` > 0 multiplies the logits
    (Granite: 1 / logits_scaling). chunk: tokens whose logits exist at a time (`chunk_size`)."""
    if not torch.is_grad_enabled():                       # needs_input_grad does not know of no_grad
        h, weight = h.detach(), weight.detach()
    return _LinearCrossEntropy.apply(h, weight, targets.contiguous(), scale, chunk or chunk_size(h, weight))
