"""State-space duality: the Mamba-2 recurrence, computed chunk by chunk with matrix products.

Per head h with group g = h // (H // G), within one document:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t        S is (P, N), zero at a document's first token
    y_t = S_t C_t + D x_t

Within a chunk of Q tokens the sum over earlier tokens is a masked (Q, Q) product; between chunks only the
state travels. Work is O(T Q) instead of a T-step loop of tiny kernels. Source: Dao and Gu, arXiv 2405.21060,
section 6. The (Q, Q) part, which dwarfs the rest in memory traffic, has its backward pass written out;
autograd does the others.

Notation: B batch, T tokens, H heads, P head dim, G groups, N state, Q chunk, c chunks.
"""

import math

import torch
import torch.nn.functional as F


def recurrence(x, dt, A, B, C, D, docs=None):
    """The definition, one token at a time: the oracle of every other path. Shapes as in `ssd`."""
    b, t, h, p = x.shape
    B, C = (z.repeat_interleave(h // z.shape[2], 2) for z in (B, C))                  # (B, T, H, N)
    state, ys = x.new_zeros(b, h, p, B.shape[-1]), []
    for i in range(t):
        if docs is not None and i:
            state = state * (docs[:, i] == docs[:, i - 1])[:, None, None, None]
        state = (state * torch.exp(dt[:, i] * A)[..., None, None]
                 + (dt[:, i, :, None] * x[:, i])[..., None] * B[:, i, :, None])
        ys.append((state * C[:, i, :, None]).sum(-1) + D[:, None] * x[:, i])
    return torch.stack(ys, 1)


class _Within(torch.autograd.Function):
    """y = (E * C B^T) xd with E_ij = exp(acc_i - acc_j) where same_ij, else 0; shapes as in `ssd`, G groups
    of H / G heads. E and acc share the scan's fp32 (or fp64); the products run in xd's dtype."""

    @staticmethod
    def forward(ctx, B, C, acc, xd, same):
        # decay (B, c, H, Q, Q)
        decay = (acc[..., :, None] - acc[..., None, :]).masked_fill_(~same, -torch.inf).exp_()
        scores = (C @ B.transpose(-1, -2)).to(acc.dtype)[:, :, :, None]               # (B, c, G, 1, Q, Q)
        mix = (decay.unflatten(2, (B.shape[2], -1)) * scores).flatten(2, 3).to(xd.dtype)
        ctx.save_for_backward(B, C, xd, decay, mix)
        return mix @ xd

    @staticmethod
    def backward(ctx, g):
        B, C, xd, decay, mix = ctx.saved_tensors
        dmix = (g @ xd.transpose(-1, -2)).to(decay.dtype)
        dscores = (dmix * decay).unflatten(2, (B.shape[2], -1)).sum(3).to(B.dtype)
        dacc = dmix.mul_(mix)                             # d / d acc_i - acc_j: rows gain what columns lose
        dacc = dacc.sum(-1).sub_(dacc.sum(-2))
        return dscores.transpose(-1, -2) @ C, dscores @ B, dacc, mix.transpose(-1, -2) @ g, None


def chunk_length(P, N):
    """Tokens a chunk: (Q, Q) scores a chunk about balance the (P, N) states; a power of two."""
    return 1 << round(math.log2(P * N) / 2)


def step(state, x, dt, A, B, C, D):
    """One token a row, for generation. state (B, H, P, N) fp32, updated in place; x (B, H, P); dt (B, H)
    fp32; A, D (H) fp32; B, C (B, G, N). Returns y (B, H, P) in x's dtype."""
    b, h, p, n = state.shape
    wide = x.to(state.dtype)
    B, C = (z.to(state.dtype).repeat_interleave(h // z.shape[1], 1).view(b * h, 1, n) for z in (B, C))
    flat = state.view(b * h, p, n)
    flat.mul_(torch.exp(dt * A).view(b * h, 1, 1))
    flat.baddbmm_((wide * dt[..., None]).view(b * h, p, 1), B)
    y = torch.bmm(flat, C.transpose(1, 2)).view(b, h, p)
    return y.addcmul_(wide, D[:, None]).to(x.dtype)


def ssd(x, dt, A, B, C, D, docs=None, chunk=None, last=False):
    """x (B, T, H, P); dt (B, T, H) fp32, positive; A, D (H) fp32, A negative; B, C (B, T, G, N);
    docs (B, T) int64 document ids, each a contiguous run, or None for one document a row; chunk: tokens,
    default `chunk_length(P, N)`, does not change the result. Returns y (B, T, H, P); with last=True also the
    state (B, H, P, N) after the last token (a token with dt = 0 leaves it as it was).

    Documents are isolated bit by bit: every masked term is an exact zero and decays are summed from the
    document's own start, so nothing of one document reaches the rounding of another.
    """
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    q = min(chunk or chunk_length(p, n), t)
    pad = -t % q                                              # dt = 0 in the padding: decay 1, nothing added
    if pad:
        x, dt, B, C = (F.pad(z, [0, 0] * (z.dim() - 2) + [0, pad]) for z in (x, dt, B, C))
        docs = (F.pad(docs[:, None].float(), (0, pad), mode="replicate")[:, 0].long()
                if docs is not None else None)
    c = (t + pad) // q

    causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    if docs is None:
        same, alive = causal, None                                                    # (Q, Q)
    else:
        d = docs.view(b, c, q)
        same = (d[..., :, None] == d[..., None, :]) & causal                          # (B, c, Q, Q)
        before = torch.cat([d[:, :1, 0], d[:, :-1, -1]], 1)       # the document whose state enters the chunk
        alive = (d == before[..., None])[:, :, None, :, None]                         # (B, c, 1, Q, 1)

    def heads(z):
        return z.view(b, c, q, *z.shape[2:]).transpose(2, 3)                          # (B, c, heads, Q, ...)

    dt = heads(dt)                                                                    # (B, c, H, Q)
    xd = heads(x) * dt[..., None].to(x.dtype)                                         # (B, c, H, Q, P)
    B, C = heads(B), heads(C)                                                         # (B, c, G, Q, N)
    # decay exponents from the document's start (or the chunk's) to each token: a masked sum, never a plain
    # cumsum
    acc = (dt * A[:, None]) @ same.to(dt.dtype).transpose(-1, -2)                     # (B, c, H, Q)
    same = same.unsqueeze(-3)                                                         # over the heads
    y = _Within.apply(B, C, acc, xd, same)                                            # (B, c, H, Q, P)

    # between chunks: each chunk's own final state, then the running state that enters each chunk
    state = None
    if c > 1 or last:
        rest = (acc[..., -1:] - acc).masked_fill(~same[..., -1, :], -torch.inf).exp()  # (B, c, H, Q)
        own = (xd * rest[..., None].to(x.dtype)).view(b, c, g, h // g, q, p)
        own = (own.transpose(-1, -2) @ B[:, :, :, None]).view(b, c, h, p, n).to(acc.dtype)  # (B, c, H, P, N)
        carry = acc.exp()[..., None]                                                  # (B, c, H, Q, 1)
        if alive is not None:
            carry = carry * alive
        keep = carry[:, :, :, -1, :, None].unbind(1)                                  # (B, H, 1, 1) a chunk
        own = own.unbind(1)                          # unbind, not own[:, i]: its backward fills zeros c times
        state, entering = own[0], [torch.zeros_like(own[0])]
        for i in range(1, c):
            entering.append(state)
            state = state * keep[i] + own[i]
        entering = torch.stack(entering, 1).to(x.dtype).view(b, c, g, h // g, p, n)
        late = C[:, :, :, None] @ entering.transpose(-1, -2)                          # (B, c, G, H/G, Q, P)
        y = y + late.view(b, c, h, q, p) * carry.to(x.dtype)
    y = y.transpose(2, 3).reshape(b, c * q, h, p) + x * D[:, None].to(x.dtype)
    return (y[:, :t], state) if last else y[:, :t]
