"""Cross-entropy of a linear head without ever holding the logits.

    loss = sum_t [ logsumexp_v(s h_t . w_v) - s h_t . w_{target_t} ]        over tokens with target >= 0

A 16k x 131k logits matrix in fp32 is 8.6 GB. Here `chunk` tokens at a time become logits, and since the loss
is a plain sum, their gradient is known at once: it is formed in place of the logits and multiplied out in the
same pass, so the backward pass has nothing left to do but scale. Work 6NVC instead of 8NVC for recomputation.
"""

import torch

IGNORE = -100


def reference(h, weight, targets, scale=1.0):
    """The definition in a few lines of torch, logits and all: the oracle."""
    logits = (h @ weight.T).float() * scale
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, scale, chunk):
        want_h, want_w = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=h.device)
        dh = torch.empty_like(h) if want_h else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if want_w else None
        for i in range(0, h.shape[0], chunk):
            hc, tc = h[i:i + chunk], targets[i:i + chunk]
            counted, index = tc != IGNORE, tc.clamp_min(0)[:, None]
            x = (hc @ weight.T).float()              # logits; below they become their own gradient, in place
            if scale != 1.0:
                x *= scale
            top = x.amax(-1, keepdim=True)
            target = x.gather(1, index) - top
            total = x.sub_(top).exp_().sum(-1, keepdim=True)
            loss += (total.log() - target)[:, 0].masked_fill(~counted, 0).sum()
            if want_h or want_w:                     # softmax - one-hot, times the logits' scale
                factor = (counted * scale)[:, None]
                grad = x.mul_(factor / total).scatter_add_(1, index, -factor.to(x.dtype)).to(h.dtype)
                if want_h:
                    torch.mm(grad, weight, out=dh[i:i + chunk])
                if want_w:
                    dw += grad.T @ hc
        ctx.save_for_backward(dh, dw)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, upstream):
        dh, dw = ctx.saved_tensors
        # in fp32: 1 / tokens, rounded to bf16, would be up to 0.4 % off
        return (None if dh is None else (dh.float() * upstream).to(dh.dtype),
                None if dw is None else (dw * upstream).to(ctx.dtype), None, None, None)


def linear_cross_entropy(h, weight, targets, scale=1.0, chunk=None):
    """h (N, C), weight (V, C) of one dtype, targets (N) int64 with IGNORE = -100 where not counted.
    Returns the summed loss in nats, fp32 scalar. `scale` multiplies the logits (Granite: 1 / logits_scaling).
    chunk: tokens whose logits exist at a time; default 2048 on a GPU (the gradient of the head is added up
    once a chunk), on a CPU what stays in its cache."""
    if not torch.is_grad_enabled():                       # needs_input_grad does not know of no_grad
        h, weight = h.detach(), weight.detach()
    chunk = chunk or (2048 if h.is_cuda else max(64, (1 << 20) // weight.shape[0]))
    return _LinearCrossEntropy.apply(h, weight, targets, scale, chunk)
