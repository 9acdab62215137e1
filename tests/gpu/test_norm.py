import pytest
import torch
from oracle import DEVICE, DTYPES, INTERPRET, agree, gradcheck, leaf, repeats, slow

from kernels import norm

EPS = 1e-5


def ours(x, w, z=None, groups=1):
    return norm.rms_norm(x, w, EPS, groups, z)


def theirs(x, w, z=None, groups=1):
    return norm.reference(x, w, EPS, groups, z)


def added(scale):
    """add_rms_norm and its oracle, of x, out and the weight."""
    return [lambda x, out, w, op=op: op(x, out, scale, w, EPS)
            for op in (norm.add_rms_norm, norm.reference_add)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 7), (0, 16), slow((3, 2056))])
def test_rms_norm(shape, dtype):
    """The weight of the input's dtype, and wider. Long rows: several to a program, even here."""
    for weight in dict.fromkeys((dtype, torch.promote_types(dtype, torch.float32))):
        agree(ours, theirs, [leaf(*shape, dtype=dtype), leaf(shape[-1], dtype=weight)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shape", [(2, 3, 36), (1, 15), (0, 24), slow((8, 9))])
def test_gated(shape, groups, dtype):
    inputs = [leaf(*shape, dtype=dtype), leaf(shape[-1], dtype=dtype), leaf(*shape, dtype=dtype)]
    agree(lambda *a: ours(*a, groups), lambda *a: theirs(*a, groups), inputs)
    if groups > 1:
        agree(lambda x, w: ours(x, w, None, groups), lambda x, w: theirs(x, w, None, groups), inputs[:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """Rows of a larger tensor (z is part of in_proj's output), an upstream gradient with strides, columns."""
    inputs = [leaf(3, 5, 48, dtype=dtype), leaf(16, dtype=dtype)]
    agree(*[lambda x, w, op=op: op(x[..., :16], w, x[..., 20:36]) for op in (ours, theirs)], inputs)
    agree(*[lambda x, w, op=op: op(x[..., :16], x[..., 20:36], w) for op in added(0.22)], inputs)
    agree(lambda x, w: ours(x, w).transpose(0, 1), lambda x, w: theirs(x, w).transpose(0, 1),
          [leaf(3, 5, 16, dtype=dtype), leaf(16, dtype=dtype)])
    agree(lambda x, w: ours(x.mT, w[::2]), lambda x, w: theirs(x.mT, w[::2]),
          [leaf(3, 6, 4, dtype=dtype), leaf(12, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 7), (0, 16), slow((3, 2056))])
def test_add_rms_norm(shape, dtype):
    inputs = [leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype), leaf(shape[-1], dtype=dtype)]
    for scale in (1.0, 0.22):
        agree(*added(scale), inputs)


@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize("output", [0, 1])
def test_add_rms_norm_of_one_use(output, scale):
    """Only the sum is used, or only the norm; strided gradients of both."""
    inputs = [leaf(*shape, dtype=torch.float32) for shape in ((4, 3, 24), (4, 3, 24), (24,))]
    agree(*[lambda *a, op=op: op(*a)[output] for op in added(scale)], inputs[:2] + [inputs[2].detach()])
    agree(*[lambda *a, op=op: [y.transpose(0, 1) for y in op(*a)] for op in added(scale)], inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_of_the_rounded_sum(dtype):
    x, out, w = leaf(4, 100, dtype=dtype), leaf(4, 100, dtype=dtype), leaf(100, dtype=torch.float32)
    s, y = norm.add_rms_norm(x, out, 0.22, w, EPS)
    assert s.dtype == y.dtype == dtype and torch.equal(y, norm.rms_norm(s, w, EPS))
    if not INTERPRET:                                      # which truncates bf16
        assert torch.equal(s, torch.add(x, out, alpha=0.22))


def test_large_and_zero_inputs_stay_finite():
    x = torch.tensor([[0.0] * 4, [1e15, -1e15, 1.0, 0.0]], device=DEVICE, requires_grad=True)
    z = torch.tensor([[0.0, -1e30, 100.0, 1e15]] * 2, device=DEVICE, requires_grad=True)
    w = torch.ones(4, device=DEVICE, requires_grad=True)
    for gate in (None, z):
        y = ours(x, w, gate)
        grads = torch.autograd.grad(y.sum(), [x, w] + [z] * (gate is not None))
        assert all(torch.isfinite(g).all() for g in (y, *grads))


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="float64 by finite differences: under the interpreter")
def test_gradcheck():
    gradcheck(ours, [leaf(2, 3), leaf(3)])
    gradcheck(lambda x, w, z: ours(x, w, z, 2), [leaf(1, 4), leaf(4), leaf(1, 4)])
    gradcheck(added(0.22)[0], [leaf(2, 3), leaf(2, 3), leaf(3)])


@pytest.mark.slow                                          # the interpreter cannot but repeat itself
def test_same_bits_twice():
    x, z, w = (leaf(*shape, dtype=torch.float32) for shape in ((9, 64), (9, 64), (64,)))
    repeats(lambda *a: ours(*a, 2), [x, w, z])
    repeats(added(0.22)[0], [x, z, w])


def test_gradients_of_both_terms_add_up():
    """With scale 1 they are equal, but each accumulates on its own."""
    x, out, w = (leaf(*shape, dtype=torch.float32) for shape in ((3, 8), (3, 8), (8,)))
    for _ in range(2):
        torch.stack(norm.add_rms_norm(x, out, 1.0, w, EPS)).square().sum().backward()
    once, = torch.autograd.grad(torch.stack(norm.add_rms_norm(x, out, 1.0, w, EPS)).square().sum(), x)
    assert torch.equal(x.grad, 2 * once) and torch.equal(out.grad, 2 * once)
