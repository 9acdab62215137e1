"""Causal depthwise convolution of width K with bias and SiLU, reset at document boundaries (Mamba-2's short
filter).

    y_t = silu(bias + sum_s w_{K-1-s} x_{t-s}),   s = 0 .. K-1,   x of another document counts as zero

Written as K shifted multiply-adds: on a CPU faster than conv1d, and the document mask costs one multiply a
shift.
"""

import torch
import torch.nn.functional as F


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


def causal_conv1d(x, weight, bias, docs=None):
    """x (B, T, C), weight (C, 1, K) as on the hub, bias (C) or None, docs (B, T) int64 or None.
    Returns (B, T, C)."""
    taps = weight[:, 0].T.to(x.dtype).contiguous()
    return _Conv.apply(x, taps, None if bias is None else bias.to(x.dtype), docs)


def step(state, x, weight, bias):
    """One token a row, for generation. state (B, K-1, C): the inputs before this one, oldest first, updated
    in place; x (B, C); weight (C, 1, K). Returns (B, C)."""
    inputs = torch.cat([state, x[:, None]], 1)
    state.copy_(inputs[:, 1:])
    y = (inputs * weight[:, 0].T.to(x.dtype)).sum(1)
    return F.silu(y if bias is None else y + bias.to(x.dtype))
