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

from kernels import columns, constexpr, jit, load_wide, on_triton, program, tl, triton, wide, wide_tl
from kernels.loss import add_product, chunk_size, logits_buffer, products, row_launch, statistics


def reference(h, weight, targets, scale=1.0, temperature=1.0, known=None):
    """The definition in a few lines of torch, logits and all: the oracle."""
    logits = (h @ weight[:known].T).to(wide(h.dtype)) * scale / temperature
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


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
    log_total = total.log()
    logp = x.gather(1, targets[:, None])[:, 0] - log_total
    entropy = log_total - torch.einsum("tv,tv->t", p, x) / total
    return logp, entropy, top + log_total


def _backward(x, targets, factor, lse, entropy, dlogp, dentropy):
    """The gradient by x, in its dtype"""
    dtype = x.dtype
    x = _logits(x, factor).sub_(lse[:, None])                             # log p
    upstream = dlogp[:, None] * factor
    if dentropy is None:
        x = x.exp_().mul_(-upstream)
    else:
        slope = (x + entropy[:, None]).mul_(dentropy[:, None] * factor)
        slope.add_(upstream)
        x = x.exp_().mul_(slope.neg_())
    x.scatter_add_(1, targets[:, None], upstream)
    return x.to(dtype)


# -- Triton: forward a row a program, backward a block of one ----------------------------------------------

@jit
def _token_logprobs(X, Target, Logp, Entropy, Lse, x_row, width, factor: "fp64",  # noqa: F821
                    BLOCK: constexpr, WIDE: constexpr):
    factor = tl.full((), factor, WIDE)
    factor2 = factor * 1.4426950408889634                                 # 1 / ln 2: exp2 for exp
    row = program(0)
    X += row * x_row
    answer = tl.load(X + tl.load(Target + row)).to(WIDE)
    top, total, moment = statistics(X, x_row, width, factor2, True, BLOCK, WIDE)
    log_total = tl.log(total)
    tl.store(Logp + row, (answer - top) * factor - log_total)
    tl.store(Entropy + row, log_total - moment / total * factor)
    tl.store(Lse + row, top * factor + log_total)


@jit
def _token_logprobs_backward(X, Target, Lse, Entropy, DLogp, DEntropy, x_row, factor: "fp64",  # noqa: F821
                             ENTROPY: constexpr, BLOCK: constexpr, WIDE: constexpr):
    factor = tl.full((), factor, WIDE)
    row = program(0)
    c = columns(1, BLOCK)
    mask = c < x_row
    X += row * x_row + c
    target = tl.load(Target + row).to(tl.int32)
    upstream = tl.load(DLogp + row) * factor
    logp = load_wide(X, mask, WIDE) * factor - tl.load(Lse + row)
    slope = upstream
    if ENTROPY:
        dentropy = tl.load(DEntropy + row) * factor
        slope = upstream + dentropy * (logp + tl.load(Entropy + row))
    dx = -tl.exp2(logp * 1.4426950408889634) * slope
    dx = tl.where(c == target, dx + upstream, dx)
    tl.store(X, dx, mask)


def _forward_triton(x, targets, factor):
    """As _forward."""
    n, V = x.shape
    logp, entropy, lse = x.new_empty(3, n, dtype=wide(x.dtype))
    _token_logprobs[(n,)](
        X=x, Target=targets, Logp=logp, Entropy=entropy, Lse=lse, x_row=x.stride(0), width=V, factor=factor,
        WIDE=wide_tl(x.dtype), **row_launch(x))
    return logp, entropy, lse


def _backward_triton(x, targets, factor, lse, entropy, dlogp, dentropy):
    """As _backward; the gradient takes the place of x."""
    n, V = x.shape
    block = min(2048, row_launch(x)["BLOCK"])
    _token_logprobs_backward[n, triton.cdiv(V, block)](
        X=x, Target=targets, Lse=lse, Entropy=entropy,
        DLogp=dlogp, DEntropy=dlogp if dentropy is None else dentropy,    # not read where it is None
        x_row=x.stride(0), factor=factor,
        ENTROPY=dentropy is not None, BLOCK=block, WIDE=wide_tl(x.dtype), num_warps=4)
    return x


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, factor, chunk):
        run = _forward_triton if on_triton(h) else _forward
        buffer = logits_buffer(h, weight, chunk)
        N = h.shape[0]
        logp = h.new_empty(N, dtype=wide(h.dtype))
        entropy = torch.empty_like(logp)
        lse = torch.empty_like(logp)
        for start in range(0, N, chunk):
            rows = slice(start, start + chunk)
            outputs = run(products(h[rows], weight, buffer), targets[rows], factor)
            logp[rows], entropy[rows], lse[rows] = outputs
        ctx.save_for_backward(h, weight, targets, lse, entropy)
        ctx.factor = factor
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)                                  # None for an output without use
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy):
        h, weight, targets, lse, entropy = ctx.saved_tensors
        want_h, want_w = ctx.needs_input_grad[:2]
        run = _backward_triton if on_triton(h) else _backward
        buffer = logits_buffer(h, weight, ctx.chunk)
        dlogp = torch.zeros_like(lse) if dlogp is None else dlogp.contiguous()
        dentropy = None if dentropy is None else dentropy.contiguous()
        dh = torch.empty_like(h) if want_h else None
        dw = torch.zeros_like(weight, dtype=lse.dtype) if want_w else None
        # A chunk's logits are made again and become their gradient, which is multiplied out at once.
        for start in range(0, h.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            dentropy_rows = None if dentropy is None else dentropy[rows]
            dx = run(products(h[rows], weight, buffer), targets[rows], ctx.factor, lse[rows], entropy[rows],
                     dlogp[rows], dentropy_rows)
            if want_h:
                torch.mm(dx, weight, out=dh[rows])
            if want_w:
                add_product(dw, dx, h[rows])
            del dx                                                        # before the next chunk's is made
        if want_w:
            dw = dw.to(weight.dtype)
        return dh, dw, None, None, None


def token_logprobs(h, weight, targets, scale=1.0, temperature=1.0, chunk=None, known=None):
    """h (N, C), weight (V, C) of one dtype, targets (N) int64 in 0 .. known - 1. Returns (logp, entropy), (N)
    in nats, fp32 (float64 for float64), of the distribution that a sampler at this temperature draws from.
    Both can be differentiated; an entropy that no loss uses costs the backward pass nothing. N may be 0.

    scale > 0 multiplies the logits (Granite: 1 / logits_scaling). known: how many ids can be sampled; a
    padded head has more rows, which then do not count and get no gradient. chunk: tokens whose logits exist
    at a time (`chunk_size`)."""
    weight = weight[:known]
    if not chunk:
        chunk = chunk_size(h, weight)
    return _TokenLogprobs.apply(h, weight, targets.contiguous(), scale / temperature, chunk)
