"""Log-probs of given tokens, and entropies, under a linear head, without ever holding the logits.

    x_tv = scale h_t . w_v / temperature       logp_t = x_{t, target_t} - lse_t       lse_t = logsumexp_v x_tv
    p_tv = exp(x_tv - lse_t)                   H_t    = lse_t - sum_v p_tv x_tv

    dx_tv = dlogp_t (1[v = target_t] - p_tv) - dH_t p_tv (x_tv - lse_t + H_t)

A 16k x 131k logits matrix in fp32 is 8.6 GB, and plain autograd would keep it and its softmax until the
backward pass. Here `chunk` tokens at a time become logits; of a token only lse and H are kept (8 bytes), and
the backward pass makes the chunk's logits again. Work 8NVC instead of the 6NVC of loss.py, where gradients
are known in the forward pass: here every token has a factor of its own, known only after the RL loss.

On a GPU one kernel reads a row of logits once for all three numbers, 2 bytes a logit (bf16), and one puts the
gradient in their place, 4 bytes; in plain torch these are about 45 and 45 to 80. The sums over a row, and the
chunks, are those of loss.py.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels import constexpr, jit, on_triton, tl, triton, wide, wide_tl
from kernels.loss import add_product, chunk_size, products, room, row_launch, statistics


def reference(h, weight, targets, scale=1.0, temperature=1.0, known=None):
    """The definition in a few lines of torch, logits and all: the oracle."""
    logp = ((h @ weight[:known].T).to(wide(h.dtype)) * scale / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


# Of a chunk's products x (n, V): functions, so that their buffers are gone before the next chunk's are made.

def _logits(x, factor):
    x = x.to(wide(x.dtype))
    return x if factor == 1.0 else x.mul_(factor)


def _forward(x, targets, factor):
    """logp, entropy, lse (n)"""
    x = _logits(x, factor)
    top = x.amax(-1)
    p = x.sub_(top[:, None]).exp()                                        # not yet divided by its sum
    total = p.sum(-1)
    entropy = total.log() - torch.einsum("tv,tv->t", p, x) / total
    return x.gather(1, targets[:, None])[:, 0] - total.log(), entropy, top + total.log()


def _backward(x, targets, factor, lse, entropy, dlogp, dentropy):
    """The gradient by x, in its dtype"""
    dtype, x = x.dtype, _logits(x, factor).sub_(lse[:, None])             # log p
    up = dlogp[:, None] * factor
    if dentropy is None:
        x = x.exp_().mul_(-up)
    else:
        slope = (x + entropy[:, None]).mul_(dentropy[:, None] * factor).add_(up)
        x = x.exp_().mul_(slope.neg_())
    return x.scatter_add_(1, targets[:, None], up).to(dtype)


# -- Triton: forward a row a program, backward a block of one ----------------------------------------------

@jit
def _token_logprobs(X, Target, Logp, Entropy, Lse, x_row, width, factor: "fp64",  # noqa: F821
                    BLOCK: constexpr, WIDE: constexpr):
    factor = tl.full((), factor, WIDE)
    row = tl.program_id(0).to(tl.int64)
    X += row * x_row
    answer = tl.load(X + tl.load(Target + row)).to(WIDE)
    top, total, moment = statistics(X, x_row, width, factor * 1.4426950408889634, True, BLOCK, WIDE)
    log_total = tl.log(total)
    tl.store(Logp + row, (answer - top) * factor - log_total)
    tl.store(Entropy + row, log_total - moment / total * factor)
    tl.store(Lse + row, top * factor + log_total)


@jit
def _token_logprobs_backward(X, Target, Lse, Entropy, DLogp, DEntropy, x_row, factor: "fp64",  # noqa: F821
                             ENTROPY: constexpr, BLOCK: constexpr, WIDE: constexpr):
    factor = tl.full((), factor, WIDE)
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    X += row * x_row + c
    target, up = tl.load(Target + row).to(tl.int32), tl.load(DLogp + row) * factor
    logp = tl.load(X, c < x_row, 0.0).to(WIDE) * factor - tl.load(Lse + row)
    slope = up
    if ENTROPY:
        slope = up + tl.load(DEntropy + row) * factor * (logp + tl.load(Entropy + row))
    g = -tl.exp2(logp * 1.4426950408889634) * slope
    tl.store(X, tl.where(c == target, g + up, g).to(X.dtype.element_ty), c < x_row)


def _forward_triton(x, targets, factor):
    logp, entropy, lse = torch.empty(3, x.shape[0], dtype=wide(x.dtype), device=x.device)
    _token_logprobs[(x.shape[0],)](x, targets, logp, entropy, lse, x.stride(0), x.shape[1], factor,
                                   WIDE=wide_tl(x.dtype), **row_launch(x))
    return logp, entropy, lse


def _backward_triton(x, targets, factor, lse, entropy, dlogp, dentropy):
    """In place of x"""
    block = min(2048, row_launch(x)["BLOCK"])
    _token_logprobs_backward[x.shape[0], triton.cdiv(x.shape[1], block)](
        x, targets, lse, entropy, dlogp, dlogp if dentropy is None else dentropy, x.stride(0), factor,
        ENTROPY=dentropy is not None, BLOCK=block, WIDE=wide_tl(x.dtype), num_warps=4)
    return x


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, factor, chunk):
        rows, buffer = _forward_triton if on_triton(h) else _forward, room(h, weight, chunk)
        logp, entropy, lse = (torch.empty(h.shape[0], dtype=wide(h.dtype), device=h.device)
                              for _ in range(3))
        for i in range(0, h.shape[0], chunk):
            part = slice(i, i + chunk)
            logp[part], entropy[part], lse[part] = rows(products(h[part], weight, buffer), targets[part],
                                                        factor)
        ctx.save_for_backward(h, weight, targets, lse, entropy)
        ctx.factor, ctx.chunk = factor, chunk
        ctx.set_materialize_grads(False)                                  # None for an output without use
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy):
        h, weight, targets, lse, entropy = ctx.saved_tensors
        want_h, want_w = ctx.needs_input_grad[:2]
        rows, buffer = _backward_triton if on_triton(h) else _backward, room(h, weight, ctx.chunk)
        dlogp = torch.zeros_like(lse) if dlogp is None else dlogp.contiguous()
        dentropy = None if dentropy is None else dentropy.contiguous()
        dh = torch.empty_like(h) if want_h else None
        dw = torch.zeros_like(weight, dtype=lse.dtype) if want_w else None
        for i in range(0, h.shape[0], ctx.chunk):
            part = slice(i, i + ctx.chunk)
            grad = rows(products(h[part], weight, buffer), targets[part], ctx.factor, lse[part],
                        entropy[part], dlogp[part], None if dentropy is None else dentropy[part])
            if want_h:
                torch.mm(grad, weight, out=dh[part])
            if want_w:
                add_product(dw, grad, h[part])
            del grad
        return dh, None if dw is None else dw.to(weight.dtype), None, None, None


def token_logprobs(h, weight, targets, scale=1.0, temperature=1.0, chunk=None, known=None):
    """h (N, C), weight (V, C) of one dtype, targets (N) int64 in 0 .. known - 1. Returns (logp, entropy), (N)
    in nats, fp32 (float64 for float64), of the distribution that a sampler at this temperature draws from.
    Both can be differentiated; an entropy that no loss uses costs the backward pass nothing. N may be 0.

    scale > 0 multiplies the logits (Granite: 1 / logits_scaling). known: how many ids can be sampled; a
    padded head has more rows, which then do not count and get no gradient. chunk: tokens whose logits exist
    at a time (`chunk_size`)."""
    weight = weight[:known]
    return _TokenLogprobs.apply(h, weight, targets.contiguous(), scale / temperature,
                                chunk or chunk_size(h, weight))
