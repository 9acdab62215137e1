"""Which attention runs, what of it recomputation keeps, and long rows with a sliding window."""

import importlib.metadata
import inspect
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels.attention
import model
from cli import InputError


class Ops(TorchDispatchMode):
    """Counts ops by name, and knows the largest tensor that one gave."""

    def __init__(self):
        super().__init__()
        self.counts = {}
        self.largest = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.counts[op.name()] = self.counts.get(op.name(), 0) + 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return out


def heads(T, H, K, D, device="cpu", dtype=torch.float32):
    torch.manual_seed(T)
    return [torch.randn(2, T, n, D, device=device, dtype=dtype, requires_grad=True) for n in (H, K, K)]


@pytest.mark.parametrize("T, window, block", [(61, 12, 5), (64, 16, 16), (40, 39, 8), (33, 2, 4)])
@pytest.mark.parametrize("lengths", [None, "two documents"])
def test_windows_in_blocks_are_the_dense_mask(T, window, block, lengths, monkeypatch):
    """Outputs and gradients, to 1e-6: blocks that divide the row and that do not."""
    q, k, v = heads(T, 6, 2, 8)
    lengths = lengths and [T, T - 7, 7]
    g = torch.randn(2, T, 6, 8)
    results = []
    for limit in (model.DENSE_MASK_TOKENS, 0):
        monkeypatch.setattr(model, "DENSE_MASK_TOKENS", limit)
        monkeypatch.setattr(model, "WINDOW_BLOCK", block)
        with Ops() as ops:
            y = model.attend_documents(q, k, v, lengths, 0.3, window)
        results.append([y, *torch.autograd.grad(y, (q, k, v), g)])
    for dense, blocks in zip(*results, strict=True):
        assert (dense - blocks).norm() <= 1e-6 * dense.norm()
    assert ops.counts["aten::_scaled_dot_product_flash_attention_for_cpu"] > 2         # it was blocks


def test_no_mask_over_all_pairs():
    """Over 4,096 tokens no tensor is a hundredth of T x T, forward or backward."""
    q, k, v = heads(4097, 2, 1, 4)
    with Ops() as ops:
        model.attend_documents(q, k, v, None, 0.5, 32).sum().backward()
    assert ops.largest <= 4097 ** 2 / 100


def forward_and_again(attend, *inputs):
    """The ops of a selectively recomputed attention, forward and backward."""
    with Ops() as ops:
        options = dict(use_reentrant=False, context_fn=model._selective)
        model.recomputed(lambda *x: attend(*(y * 1 for y in x)), *inputs, **options).sum().backward()
    return ops.counts


@pytest.mark.parametrize("window", [None, 16])
def test_selective_recompute_keeps_torchs_attention(window, monkeypatch):
    """SDPA's op as a CPU picks it, in a product and block by block; varlen_attn's on the meta device."""
    monkeypatch.setattr(model, "DENSE_MASK_TOKENS", 0)
    counts = forward_and_again(lambda *x: model.attend_documents(*x, None, 0.3, window), *heads(32, 4, 2, 8))
    assert counts["aten::_scaled_dot_product_flash_attention_for_cpu"] == (1 if window is None else 2)
    assert counts["aten::mul.Tensor"] > 3                                  # the rest is made again
    if model.varlen_attn is None:
        pytest.skip("varlen_attn of torch 2.13")
    monkeypatch.setattr(model, "flash_attn_varlen_func", None)
    cu_seqlens = torch.empty(5, device="meta", dtype=torch.int32)
    counts = forward_and_again(lambda *x: model.attend_varlen(*x, cu_seqlens, 16, 0.3, window),
                               *heads(32, 4, 2, 8, "meta", torch.bfloat16))
    assert counts["torch_attn::_varlen_attn"] == 1


@pytest.fixture
def flash_attn_op():
    """flash-attn 2's forward under the name that the package registers; the op says how often it ran."""
    library = torch.library.Library("flash_attn", "FRAGMENT")
    library.define("_flash_attn_varlen_forward(Tensor q) -> Tensor")
    library.impl("_flash_attn_varlen_forward", torch.sin, "CPU")
    yield torch.ops.flash_attn._flash_attn_varlen_forward
    library._destroy()


def test_selective_recompute_keeps_the_packages_attention(flash_attn_op):
    """An op that a package registers after model.py is imported: run once, its backward by what was kept."""
    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            out = flash_attn_op(q)
            ctx.save_for_backward(out)
            return out

        @staticmethod
        def backward(ctx, dout):
            return dout * ctx.saved_tensors[0]

    q = torch.randn(4, requires_grad=True)
    counts = forward_and_again(Attend.apply, q)
    assert counts["flash_attn::_flash_attn_varlen_forward"] == 1
    assert torch.equal(q.grad, q.sin())


# -- FlashAttention-4 --------------------------------------------------------------------------------------

class Package:
    """What flash-attn-4's module computes at our call, in plain torch, with its five results."""

    @staticmethod
    def probabilities(q, k, cu_seqlens, scale, left):
        """(H, tokens, tokens) and their logarithms' normalizer."""
        documents = torch.searchsorted(cu_seqlens[1:], torch.arange(len(q)), right=True)
        index = torch.arange(len(q))
        distance = index[:, None] - index
        seen = (documents[:, None] == documents) & (distance >= 0)
        if left is not None:
            seen &= distance <= left
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (torch.einsum("ihd,jhd->hij", q, keys) * scale).masked_fill(~seen, -torch.inf)
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp(), lse

    def _flash_attn_fwd(self, q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                        softmax_scale, causal, window_size_left, window_size_right, return_lse):
        assert cu_seqlens_q is not None and causal and window_size_right == 0 and return_lse
        p, lse = self.probabilities(q, k, cu_seqlens_q, softmax_scale, window_size_left)
        values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return torch.einsum("hij,jhd->ihd", p, values).contiguous(), lse, None, None, None

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                        max_seqlen_k, softmax_scale, causal, window_size_left, window_size_right,
                        deterministic):
        p, normalizer = self.probabilities(q, k, cu_seqlens_q, softmax_scale, window_size_left)
        assert deterministic and torch.equal(lse, normalizer)
        shared = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(shared, dim=1) for x in (k, v))
        dp = torch.einsum("ihd,jhd->hij", dout, values) - (dout * out).sum(-1).T[..., None]
        ds = p * dp * softmax_scale
        dq = torch.einsum("hij,jhd->ihd", ds, keys)
        dk, dv = torch.einsum("hij,ihd->jhd", ds, q), torch.einsum("hij,ihd->jhd", p, dout)
        return dq, *(x.unflatten(1, (-1, shared)).sum(2) for x in (dk, dv))


@pytest.fixture
def flash_attn_4(monkeypatch):
    for module in (model, kernels.attention):
        monkeypatch.setattr(module, "flash_attn_4", Package)
    monkeypatch.setattr(model, "attention_kernel", lambda device, dtype: "FlashAttention-4 varlen")


@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
def test_flash_attention_4_as_an_op_of_torch(recompute, flash_attn_4):
    """A toy with sliding windows and documents: the loss and gradients of SDPA's. Selective recomputation
    runs its forward once."""
    tokens = torch.randint(0, 512, (2, 200), generator=torch.Generator().manual_seed(7))
    docs = torch.tensor([[0] * 150 + [1] * 50, [0] * 200])
    results = []
    for kernel in (lambda device, dtype: "torch SDPA", model.attention_kernel):
        net = model.load("random:toy-mistral")
        for layer in net.trunk.layers:
            layer.recompute = recompute
        with pytest.MonkeyPatch.context() as patch, Ops() as ops:
            patch.setattr(model, "attention_kernel", kernel)
            loss = net(tokens, docs, tokens)
            loss.backward()
        results.append([loss, *(p.grad for p in net.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()
    layers = len(net.trunk.layers)
    assert ops.counts["prism::flash_attn_4"] == (2 * layers if recompute == "full" else layers)
    assert ops.counts["prism::flash_attn_4_backward"] == layers


def test_flash_attention_4s_op_is_an_op(flash_attn_4):
    """As torch.compile wants it: shapes without data are those with data, also backward."""
    q, k, v = (x[0].detach().requires_grad_() for x in heads(24, 4, 2, 8))
    arguments = (q, k, v, torch.tensor([0, 9, 24], dtype=torch.int32), 15, 0.3, 7)
    torch.library.opcheck(kernels.attention._forward, arguments)


def test_which_attention_runs(monkeypatch):
    """FlashAttention-4 on an H100 that has it, not on an A100 or an RTX 5090, and never flash-attn's early
    copy; the start-up line says whose gradients are not deterministic."""
    installed = types.SimpleNamespace(_flash_attn_bwd=Package()._flash_attn_bwd)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", types.SimpleNamespace(interface=installed))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.0b36")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    find = kernels.attention.flash_attn_4.__wrapped__                      # without its memory
    for capability, expected in (((8, 0), None), ((12, 0), None), ((9, 0), installed), ((10, 0), installed)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of=capability: of)
        assert find() is expected
    gpu = torch.device("cuda")
    monkeypatch.setattr(model, "flash_attn_4", find)
    assert model.attention_kernel(gpu, torch.bfloat16) == "FlashAttention-4 varlen"
    assert "not deterministic" in model.attention_kernel(gpu, torch.float32)
    assert "deterministic" not in model.attention_kernel(torch.device("cpu"), torch.float32)
    installed._flash_attn_bwd = lambda q, k, v, out, dout, lse: None
    with pytest.raises(InputError, match="force-reinstall"):
        find()


def test_flash_attn_4_takes_what_we_give():
    """The installed package's functions have every argument that our ops give them."""
    interface = pytest.importorskip("flash_attn.cute.interface")
    ours = set(kernels.attention._arguments(None, 1, 1.0, None))
    for function, more in ((interface._flash_attn_fwd, {"return_lse"}),
                           (interface._flash_attn_bwd, {"deterministic"})):
        assert ours | more <= set(inspect.signature(function).parameters)
    forward = list(inspect.signature(interface._flash_attn_fwd).parameters)
    backward = list(inspect.signature(interface._flash_attn_bwd).parameters)
    assert forward[:3] == ["q", "k", "v"] and backward[:6] == ["q", "k", "v", "out", "dout", "lse"]
