"""Causal attention inside packed documents by FlashAttention-4 (the package flash-attn-4), as ops of torch.

The package compiles its kernels when they first run and registers no op, so its own autograd.Function hides
from selective recomputation, which would compute attention twice, and from torch.compile. The ops here wrap
the two functions that torch's own hook for it calls too (torch.nn.attention, "FA4"; in torch 2.13 that hook
takes two results of the first one, which gives more since 4.0.0b19).
"""

import functools
import importlib.metadata
import inspect

import torch
from torch import Tensor

from cli import InputError


@functools.cache
def flash_attn_4():
    """The package's module; None where it is not installed, or where the GPU is not one for which its
    backward is deterministic: Hopper (compute capability 9) and the Blackwells of data centres (10, 11)."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (9, 10, 11):
        return None
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:      # flash-attn 2.8 has an early copy: never that one
        return None
    from flash_attn.cute import interface
    if "deterministic" not in inspect.signature(interface._flash_attn_bwd).parameters:
        raise InputError("flash-attn wrote its early copy of flash_attn/cute over flash-attn-4's: pip "
                         "uninstall flash-attn, then pip install --force-reinstall --no-deps flash-attn-4")
    return interface


def _arguments(cu_seqlens, max_seqlen, scale, left):
    """What the forward and the backward are both told."""
    return dict(
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=True,
        window_size_left=left,                           # keys before the query's own, None: all
        window_size_right=0,
    )


@torch.library.custom_op("prism::flash_attn_4", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
             left: int | None) -> tuple[Tensor, Tensor]:
    arguments = _arguments(cu_seqlens, max_seqlen, scale, left)
    out, lse, *_ = flash_attn_4()._flash_attn_fwd(q, k, v, **arguments, return_lse=True)
    return out, lse


@_forward.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, scale, left):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("prism::flash_attn_4_backward", mutates_args=())
def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
              max_seqlen: int, scale: float, left: int | None) -> tuple[Tensor, Tensor, Tensor]:
    arguments = _arguments(cu_seqlens, max_seqlen, scale, left)
    dq, dk, dv = flash_attn_4()._flash_attn_bwd(q, k, v, out, dout, lse, **arguments,
                                                deterministic=True)    # a resumed run must end the same
    return dq, dk, dv


@_backward.register_fake
def _(dout, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, left):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _differentiate(ctx, dout, dlse):
    return *_backward(dout, *ctx.saved_tensors, *ctx.numbers), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def attend_flash_attn_4(q, k, v, cu_seqlens, max_seqlen, scale, window=None):
    """q (tokens, H, D), k and v (tokens, K, D), bf16; cu_seqlens (documents + 1) int32: where the documents
    begin, and the tokens in all; max_seqlen: of the longest. Query i sees keys j with i - window < j <= i."""
    left = window - 1 if window else None
    out, _ = _forward(q, k, v, cu_seqlens, max_seqlen, scale, left)
    return out
