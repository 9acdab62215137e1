"""What the kernels' tests share: inputs, and the comparison with float64.

Tolerances, of ||ours - exact|| / ||exact|| for every output and every gradient, exact being the reference in
float64 on the same (rounded) inputs: float64 1e-11 and fp32 1e-5, rounding of sums; fp16 2e-3 and bf16 8e-3,
one rounding of an output (2^-11 and 2^-9) where the interpreter truncates instead (2^-8), and in the ops with
two roundings in a row."""

import pytest
import torch

from kernels import INTERPRET

DEVICE = "cpu" if INTERPRET else "cuda"
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def slow(*values):
    """A parametrized case for `make soak` and `make gpu`."""
    return pytest.param(*values, marks=pytest.mark.slow)


# DTYPES are for row kernels. Those with products leave bf16 to a GPU: the interpreter multiplies its bits as
# integers. On every commit float64 runs, where one odd shape finds what ten find. A GPU's time goes to the
# dtypes that are trained in.
if INTERPRET:
    DTYPES = [torch.float64, slow(torch.float32), slow(torch.float16), slow(torch.bfloat16)]
    DOT_DTYPES = [torch.float64, slow(torch.float32), slow(torch.float16)]
else:
    DTYPES = DOT_DTYPES = [torch.float32, torch.bfloat16]


def leaf(*shape, dtype=torch.float64, low=None):
    """Normal, or with low uniform in low .. low + 1; the same numbers on every device."""
    x = (torch.randn(*shape, dtype=torch.float64) if low is None else
         torch.rand(*shape, dtype=torch.float64) + low)
    return x.to(dtype).to(DEVICE).requires_grad_()


def head(n=9, V=149, C=24, dtype=torch.float64, size=0.25, known=None):
    """Hidden states, a head and targets, of which some are the first, the last, and the last and first of two
    neighbouring blocks. Logits of about 1, whose rounding in 16 bits costs no more than that of an output."""
    h, w = (leaf(rows, C, dtype=dtype).detach().mul_(size).requires_grad_() for rows in (n, V))
    V = known or V
    targets = torch.randint(0, V, (n,))
    extremes = torch.tensor([0, V - 1, 63, 64, V - 5])[:n].clamp(0, V - 1)
    targets[:len(extremes)] = extremes
    return h, w, targets.to(DEVICE)


def documents(b, t, n=4):
    """Document ids (B, T): n runs a row at random places."""
    return torch.sort(torch.randint(0, n, (b, t))).values.to(DEVICE)


def several(x):
    return x if isinstance(x, tuple | list) else (x,)


def agree(op, reference, inputs, tolerance=None):
    """op and reference: functions of the inputs (None: absent) that return a tensor or several. Values, and
    the gradients of a random projection of all of them, by every input that wants one."""
    tolerance = tolerance or TOLERANCE[inputs[0].dtype]
    exact = [None if x is None else x.detach().double().requires_grad_(x.requires_grad)
             if x.is_floating_point() else x for x in inputs]
    ours, theirs = several(op(*inputs)), several(reference(*exact))
    upstream = [torch.randn(y.shape, dtype=torch.float64).to(y.device).to(y.dtype) for y in ours]
    wanted = [i for i, x in enumerate(inputs) if x is not None and x.requires_grad]
    pairs = list(zip(ours, theirs, strict=True)) + list(zip(
        torch.autograd.grad(ours, [inputs[i] for i in wanted], upstream, allow_unused=True),
        torch.autograd.grad(theirs, [exact[i] for i in wanted], [g.double() for g in upstream],
                            allow_unused=True), strict=True))
    for i, (a, b) in enumerate(pairs):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and torch.isfinite(a).all()
            error, size = (a.double() - b).norm().item(), b.norm().item()
            assert error <= tolerance * max(size, 1e-6), f"{i} of {len(pairs)}: {error} of {size}"


def gradcheck(op, inputs):
    """torch's finite differences in float64 through the kernels themselves: interpreter only."""
    assert torch.autograd.gradcheck(op, inputs, fast_mode=False)


def repeats(op, inputs):
    """Outputs and gradients twice: the same bits."""
    def once():
        out = several(op(*inputs))
        return out + torch.autograd.grad([y.double().square().sum() for y in out],
                                         [x for x in inputs if x is not None and x.requires_grad])
    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)
