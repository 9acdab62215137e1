"""Rotary positions, half-split (NeoX) pairs (i, i + D/2), with the backward pass as the inverse rotation.

    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin

On a GPU queries and keys of a layer are one launch, forward and backward, each element read once and written
once: 16k tokens of 32 + 8 heads x 128 in bf16 are 336 MB. Plain torch's passes over halves are 840 MB.
"""

import torch

from kernels import constexpr, jit, on_triton, tl, triton, wide_tl


def reference(x, cos, sin):
    """The definition, of q or of k: the oracle."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, g):
        return _rotate(g, *ctx.saved_tensors, -1), None, None


def _rotate(x, cos, sin, sign):
    (x1, x2), y = x.chunk(2, -1), torch.empty_like(x, memory_format=torch.contiguous_format)
    y1, y2 = y.chunk(2, -1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    return y


# -- Triton: a block of heads, of q or of k, a program -----------------------------------------------------

@jit
def _block(X, Y, COS, SIN, program, count, tokens, x_batch, x_token, x_head, cos_batch, HEADS: constexpr,
           HALF: constexpr, SIGN: constexpr, ROWS: constexpr, BLOCK: constexpr, WIDE: constexpr):
    """Heads program * ROWS .. of the count that all tokens have together; tokens: in a row of the batch."""
    row, c = program * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None]
    token = row // HEADS
    here, batch = (row < count)[:, None] & (c < HALF), (token // tokens).to(tl.int64)
    place, head = (token % tokens).to(tl.int64), (row % HEADS).to(tl.int64)
    angle = (batch * cos_batch + place * HALF)[:, None] + c
    X += (batch * x_batch + place * x_token + head * x_head)[:, None] + c
    Y += (row.to(tl.int64) * (2 * HALF))[:, None] + c
    cos = tl.load(COS + angle, here, 0.0).to(WIDE)
    sin = tl.load(SIN + angle, here, 0.0).to(WIDE) * SIGN
    x1, x2 = tl.load(X, here, 0.0).to(WIDE), tl.load(X + HALF, here, 0.0).to(WIDE)
    tl.store(Y, (x1 * cos - x2 * sin).to(Y.dtype.element_ty), here)
    tl.store(Y + HALF, (x2 * cos + x1 * sin).to(Y.dtype.element_ty), here)


@jit
def _rotation(Q, K, YQ, YK, COS, SIN, q_count, k_count, tokens, q_batch, q_token, q_head, k_batch, k_token,
              k_head, cos_batch, H: constexpr, KV: constexpr, HALF: constexpr, SIGN: constexpr,
              ROWS: constexpr, BLOCK: constexpr, WIDE: constexpr):
    program, of_q = tl.program_id(0), tl.cdiv(q_count, ROWS)
    if program < of_q:
        _block(Q, YQ, COS, SIN, program, q_count, tokens, q_batch, q_token, q_head, cos_batch, H, HALF, SIGN,
               ROWS, BLOCK, WIDE)
    else:
        _block(K, YK, COS, SIN, program - of_q, k_count, tokens, k_batch, k_token, k_head, cos_batch, KV,
               HALF, SIGN, ROWS, BLOCK, WIDE)


def _both(q, k, cos, sin, sign):
    """q and k (B, T, heads, D) of any strides, either None: both rotated, contiguous."""
    given = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k) if x is not None]
    made = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given]
    counts = [x.shape[:3].numel() for x in given] + [0] * (2 - len(given))     # alone, it is its own partner
    (a, b), half, cos, sin = (given[0], given[-1]), cos.shape[-1], cos.contiguous(), sin.contiguous()
    block = triton.next_power_of_2(half)
    rows = max(2048 // block, 1)                   # 16 pairs a thread
    _rotation[(sum(triton.cdiv(n, rows) for n in counts),)](
        a, b, made[0], made[-1], cos, sin, *counts, a.shape[1], *a.stride()[:3], *b.stride()[:3],
        0 if cos.shape[0] == 1 else cos.stride(0), H=a.shape[2], KV=b.shape[2], HALF=half, SIGN=sign,
        ROWS=rows, BLOCK=block, WIDE=wide_tl(a.dtype), num_warps=4)
    return tuple(None if x is None else made.pop(0) for x in (q, k))


class _TritonRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        return _both(q, k, cos, sin, 1)

    @staticmethod
    def backward(ctx, gq, gk):                     # a gradient that nobody has or wants costs nothing
        gq, gk = (g if need else None for g, need in zip((gq, gk), ctx.needs_input_grad[:2], strict=True))
        if gq is None and gk is None:
            return None, None, None, None
        return *_both(gq, gk, *ctx.saved_tensors, -1), None, None


def rotate(q, k, cos, sin):
    """q (B, T, heads, D), k (B, T, heads, D) of fewer heads or as many, cos and sin (1 or B, T, 1, D/2) of
    their dtype, no gradient. Returns both, contiguous."""
    if on_triton(q):
        return _TritonRotate.apply(q, k, cos, sin)
    if torch.compiler.is_compiling():       # fuses the plain formula itself, and fails on out= into a view
        return reference(q, cos, sin), reference(k, cos, sin)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)
