"""Rotary positions, half-split (NeoX) pairs (i, i + D/2), with the backward pass as the inverse rotation.

    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin

On a GPU queries and keys of a layer are one launch, forward and backward, each element read once and written
once: 16k tokens of 32 + 8 heads x 128 in bf16 are 336 MB. Plain torch's passes over halves are 840 MB.
"""

import torch

from kernels import channels_adjacent, constexpr, jit, load_wide, on_triton, tl, triton, wide_tl

PAIRS = 2048                                       # of a program: 16 a thread


def reference(x, cos, sin):
    """The definition, of q or of k: the oracle."""
    x1, x2 = x.chunk(2, -1)
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    return torch.cat([y1, y2], -1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, sin, -1), None, None


def _rotate(x, cos, sin, sign):
    """x rotated, with sign -1 back again."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x1, x2 = x.chunk(2, -1)
    y1, y2 = y.chunk(2, -1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    return y


# -- Triton: a block of heads, of q or of k, a program -----------------------------------------------------

@jit
def _rotate_block(X, Y, Cos, Sin, block, count, tokens, x_batch, x_token, x_head, cos_batch,
                  HEADS: constexpr, HALF: constexpr, SIGN: constexpr, ROWS: constexpr, BLOCK: constexpr,
                  WIDE: constexpr):
    """ROWS heads, from block * ROWS on, of the count that all tokens have together; tokens: in a row of the
    batch."""
    row = block * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)[None]
    mask = (row < count)[:, None] & (c < HALF)
    # A row of Y is a head; what it is of a token, and the token of a batch row:
    token = row // HEADS
    head = (row % HEADS).to(tl.int64)
    batch = (token // tokens).to(tl.int64)
    position = (token % tokens).to(tl.int64)
    X += (batch * x_batch + position * x_token + head * x_head)[:, None] + c
    Y += (row.to(tl.int64) * (2 * HALF))[:, None] + c
    angle = (batch * cos_batch + position * HALF)[:, None] + c
    cos = load_wide(Cos + angle, mask, WIDE)
    sin = load_wide(Sin + angle, mask, WIDE) * SIGN
    x1 = load_wide(X, mask, WIDE)
    x2 = load_wide(X + HALF, mask, WIDE)
    tl.store(Y, x1 * cos - x2 * sin, mask)
    tl.store(Y + HALF, x2 * cos + x1 * sin, mask)


@jit
def _rotation(Q, K, YQ, YK, Cos, Sin, q_count, k_count, tokens, q_batch, q_token, q_head,
              k_batch, k_token, k_head, cos_batch, Q_HEADS: constexpr, K_HEADS: constexpr, HALF: constexpr,
              SIGN: constexpr, ROWS: constexpr, BLOCK: constexpr, WIDE: constexpr):
    """The first programs rotate q, the others k."""
    block = tl.program_id(0)
    q_blocks = tl.cdiv(q_count, ROWS)
    if block < q_blocks:
        _rotate_block(Q, YQ, Cos, Sin, block, q_count, tokens, q_batch, q_token, q_head, cos_batch,
                      Q_HEADS, HALF, SIGN, ROWS, BLOCK, WIDE)
    else:
        _rotate_block(K, YK, Cos, Sin, block - q_blocks, k_count, tokens, k_batch, k_token, k_head, cos_batch,
                      K_HEADS, HALF, SIGN, ROWS, BLOCK, WIDE)


def _rotate_both(q, k, cos, sin, sign):
    """q and k (B, T, heads, D) of any strides, either None: both rotated, contiguous."""
    q_count = 0 if q is None else q.shape[:3].numel()
    k_count = 0 if k is None else k.shape[:3].numel()
    yq = None if q is None else q.new_empty(q.shape)
    yk = None if k is None else k.new_empty(k.shape)
    # One that comes alone stands in for its partner too, of which there are then 0 heads.
    x = channels_adjacent(k if q is None else q)
    z = x if q is None or k is None else channels_adjacent(k)
    cos = cos.contiguous()
    sin = sin.contiguous()
    half = cos.shape[-1]
    block = triton.next_power_of_2(half)
    rows = max(PAIRS // block, 1)
    programs = triton.cdiv(q_count, rows) + triton.cdiv(k_count, rows)
    _rotation[(programs,)](
        Q=x, K=z, YQ=yk if q is None else yq, YK=yq if k is None else yk, Cos=cos, Sin=sin,
        q_count=q_count, k_count=k_count, tokens=x.shape[1],
        q_batch=x.stride(0), q_token=x.stride(1), q_head=x.stride(2),
        k_batch=z.stride(0), k_token=z.stride(1), k_head=z.stride(2),
        cos_batch=0 if cos.shape[0] == 1 else cos.stride(0),
        Q_HEADS=x.shape[2], K_HEADS=z.shape[2], HALF=half, SIGN=sign,
        ROWS=rows, BLOCK=block, WIDE=wide_tl(x.dtype), num_warps=4)
    return yq, yk


class _TritonRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        return _rotate_both(q, k, cos, sin, 1)

    @staticmethod
    def backward(ctx, dq, dk):
        # A gradient that does not exist or that nobody wants costs nothing.
        cos, sin = ctx.saved_tensors
        want_q, want_k, _, _ = ctx.needs_input_grad
        dq = dq if want_q else None
        dk = dk if want_k else None
        if dq is None and dk is None:
            return None, None, None, None
        dq, dk = _rotate_both(dq, dk, cos, sin, -1)
        return dq, dk, None, None


def rotate(q, k, cos, sin):
    """q (B, T, heads, D), k (B, T, heads, D) of fewer heads or as many, cos and sin (1 or B, T, 1, D/2) of
    their dtype, no gradient. Returns both, contiguous."""
    if on_triton(q):
        return _TritonRotate.apply(q, k, cos, sin)
    if torch.compiler.is_compiling():       # fuses the plain formula itself, and fails on out= into a view
        return reference(q, cos, sin), reference(k, cos, sin)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)
