"""Log-probs of given tokens, and entropies, under a linear head, without ever holding the logits.

    x_tv = scale h_t . w_v / temperature       logp_t = x_{t, target_t} - lse_t       lse_t = logsumexp_v x_tv
    p_tv = exp(x_tv - lse_t)                   H_t    = lse_t - sum_v p_tv x_tv

    dx_tv = dlogp_t (1[v = target_t] - p_tv) - dH_t p_tv (x_tv - lse_t + H_t)

A 16k x 131k logits matrix in fp32 is 8.6 GB, and plain autograd would keep it and its softmax until the
backward pass. Here `chunk` tokens at a time become logits; of a token only lse and H are kept (8 bytes), and
the backward pass makes the chunk's logits again. Work 8NVC instead of the 6NVC of loss.py, where gradients
are known in the forward pass: here every token has a factor of its own, known only after the RL loss.
"""

import torch
from torch.autograd.function import once_differentiable


def reference(h, weight, targets, scale=1.0, temperature=1.0, known=None):
    """The definition in a few lines of torch, logits and all: the oracle."""
    logp = ((h @ weight[:known].T).to(_wide(h.dtype)) * scale / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def _wide(dtype):
    """What sums are made in: fp32 at least; float64 stays."""
    return torch.promote_types(dtype, torch.float32)


def _logits(h, weight, factor):
    x = (h @ weight.T).to(_wide(h.dtype))
    return x if factor == 1.0 else x.mul_(factor)


# A chunk of n tokens each: functions, so that its (n, V) buffers are gone before the next chunk's are made.

def _forward(h, weight, targets, factor):
    """logp, entropy, lse (n)"""
    x = _logits(h, weight, factor)
    top = x.amax(-1)
    p = x.sub_(top[:, None]).exp()                                        # not yet divided by its sum
    total = p.sum(-1)
    entropy = total.log() - torch.einsum("tv,tv->t", p, x) / total
    return x.gather(1, targets[:, None])[:, 0] - total.log(), entropy, top + total.log()


def _backward(h, weight, targets, factor, lse, entropy, dlogp, dentropy):
    """The gradient of h . w (n, V), in h's dtype"""
    x = _logits(h, weight, factor).sub_(lse[:, None])                     # log p
    up = dlogp[:, None] * factor
    if dentropy is None:
        x = x.exp_().mul_(-up)
    else:
        slope = (x + entropy[:, None]).mul_(dentropy[:, None] * factor).add_(up)
        x = x.exp_().mul_(slope.neg_())
    return x.scatter_add_(1, targets[:, None], up).to(h.dtype)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, factor, chunk):
        logp, entropy, lse = (torch.empty(h.shape[0], dtype=_wide(h.dtype), device=h.device)
                              for _ in range(3))
        for i in range(0, h.shape[0], chunk):
            part = slice(i, i + chunk)
            logp[part], entropy[part], lse[part] = _forward(h[part], weight, targets[part], factor)
        ctx.save_for_backward(h, weight, targets, lse, entropy)
        ctx.factor, ctx.chunk = factor, chunk
        ctx.set_materialize_grads(False)                                  # None for an output without use
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy):
        h, weight, targets, lse, entropy = ctx.saved_tensors
        want_h, want_w = ctx.needs_input_grad[:2]
        dlogp = torch.zeros_like(lse) if dlogp is None else dlogp
        dh = torch.empty_like(h) if want_h else None
        dw = torch.zeros_like(weight, dtype=lse.dtype) if want_w else None
        for i in range(0, h.shape[0], ctx.chunk):
            part = slice(i, i + ctx.chunk)
            grad = _backward(h[part], weight, targets[part], ctx.factor, lse[part], entropy[part],
                             dlogp[part], None if dentropy is None else dentropy[part])
            if want_h:
                torch.mm(grad, weight, out=dh[part])
            if want_w:
                dw += grad.T @ h[part]
            del grad
        return dh, None if dw is None else dw.to(weight.dtype), None, None, None


def token_logprobs(h, weight, targets, scale=1.0, temperature=1.0, chunk=None, known=None):
    """h (N, C), weight (V, C) of one dtype, targets (N) int64 in 0 .. known - 1. Returns (logp, entropy), (N)
    in nats, fp32 (float64 for float64), of the distribution that a sampler at this temperature draws from.
    Both can be differentiated; an entropy that no loss uses costs the backward pass nothing. N may be 0.

    scale: multiplies the logits (Granite: 1 / logits_scaling). known: how many ids can be sampled; a padded
    head has more rows, which then do not count and get no gradient. chunk: tokens whose logits exist at a
    time; by default what makes 2^28 logits on a GPU (1 GB in fp32, two or three such buffers at once), on a
    CPU what stays in its cache."""
    weight = weight[:known]
    chunk = chunk or max(64, (1 << (28 if h.is_cuda else 20)) // weight.shape[0])
    return _TokenLogprobs.apply(h, weight, targets, scale / temperature, chunk)
