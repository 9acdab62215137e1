"""RMSNorm, optionally gated and over groups of channels (Mamba-2), with the backward pass written out.

    u = x * silu(gate)  (or x)   y = u / rms(u) * weight, rms over the last dimension or over each of G groups

All in fp32 whatever the input's dtype, rounded once at the end. Autograd of the plain formula walks over the
rows about twice as often and keeps three copies of them; here only x (and gate) and one number a row are
kept. With r = 1 / rms(u):

    du = r (g w - u r mean(g w u r)),   dw = sum over rows of g u r
"""

import torch
import torch.nn.functional as F


def reference(x, weight, eps, groups=1, gate=None):
    """The definition: the oracle."""
    u = x if gate is None else x * F.silu(gate)
    u = u.unflatten(-1, (groups, -1))
    return (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight


def _wide(x):
    """fp32, or fp64 as it is. One cast up front: mixed-dtype arithmetic is not vectorised on a CPU."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, groups, gate):
        u = _wide(x) if gate is None else F.silu(_wide(gate)).mul_(_wide(x))
        split = u.unflatten(-1, (groups, -1))
        r = torch.linalg.vector_norm(split, dim=-1, keepdim=True)
        r = r.square_().div_(split.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, gate, r)
        ctx.groups = groups
        return (split * r).flatten(-2).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, weight, gate, r = ctx.saved_tensors
        groups, wx, g = (ctx.groups, -1), _wide(x), _wide(g)
        if gate is not None:
            z = _wide(gate)
            silu = F.silu(z)
        normed = ((wx if gate is None else wx * silu).unflatten(-1, groups) * r)
        gu = normed.flatten(-2) * g
        dw = gu.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = gu.mul_(weight).unflatten(-1, groups).mean(-1, keepdim=True)
        du = (g * weight).unflatten(-1, groups).sub_(normed.mul_(mean)).mul_(r).flatten(-2)
        if gate is None:
            return du.to(x.dtype), dw, None, None, None
        dz = torch.ops.aten.silu_backward(du * wx, z)
        return du.mul_(silu).to(x.dtype), dw, None, None, dz.to(gate.dtype)


def rms_norm(x, weight, eps, groups=1, gate=None):
    """x (..., C), gate like x or None, weight (C) fp32; groups divides C. Returns x's shape and dtype."""
    return _RMSNorm.apply(x, weight, eps, groups, gate)
