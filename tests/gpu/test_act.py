import pytest
import torch
from oracle import DTYPES, INTERPRET, agree, gradcheck, leaf, repeats, slow

from kernels import act


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 1), (0, 16), slow((5, 2056))])
def test_swiglu(shape, dtype):
    agree(act.swiglu, act.reference, [leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_halves(dtype):
    """One tensor with gate and up side by side, rows of a larger one, an upstream gradient with strides."""
    def halves(x):
        return act.reference(*x.chunk(2, -1))

    agree(act.swiglu, halves, [leaf(3, 5, 48, dtype=dtype)])
    agree(lambda x: act.swiglu(x[..., 4:20]), lambda x: halves(x[..., 4:20]), [leaf(3, 5, 48, dtype=dtype)])
    agree(lambda x: act.swiglu(x).transpose(0, 1), lambda x: halves(x).transpose(0, 1),
          [leaf(3, 5, 48, dtype=dtype)])
    agree(lambda x: act.swiglu(x.mT), lambda x: halves(x.mT), [leaf(3, 6, 4, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 40), (1,), (0, 16), slow((5, 2056))])
def test_relu2(shape, dtype):
    agree(act.relu2, act.reference_relu2, [leaf(*shape, dtype=dtype)])
    if len(shape) == 3:
        agree(lambda x: act.relu2(x.mT), lambda x: act.reference_relu2(x.mT), [leaf(*shape, dtype=dtype)])


def test_large_inputs_stay_finite():
    x = torch.tensor([[-1e30, -100.0, 0.0, 100.0]], device=leaf(1).device, requires_grad=True)
    y = act.swiglu(x, torch.ones_like(x))
    assert torch.equal(y[0, [0, 2, 3]], torch.tensor([0.0, 0.0, 100.0], device=y.device))
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="float64 by finite differences: under the interpreter")
def test_gradcheck():
    gradcheck(act.swiglu, [leaf(3, 5), leaf(3, 5)])
    gradcheck(act.swiglu, [leaf(3, 6)])
    gradcheck(act.relu2, [leaf(3, 5)])


@pytest.mark.slow                                          # the interpreter cannot but repeat itself
def test_same_bits_twice():
    repeats(act.swiglu, [leaf(8, 100, dtype=torch.float32), leaf(8, 100, dtype=torch.float32)])
    repeats(act.relu2, [leaf(8, 100, dtype=torch.float32)])
