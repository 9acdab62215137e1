"""Rotary positions, half-split (NeoX) pairs (i, i + D/2), with the backward pass as the inverse rotation.

    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin
"""

import torch


def reference(x, cos, sin):
    """The definition: the oracle."""
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


def rotate(x, cos, sin):
    """x (B, T, heads, D), cos and sin (1 or B, T, 1, D/2) of x's dtype, no gradient. Returns x's shape."""
    if torch.compiler.is_compiling():       # fuses the plain formula itself, and fails on out= into a view
        return reference(x, cos, sin)
    return _Rotate.apply(x, cos, sin)
