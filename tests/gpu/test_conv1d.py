import pytest
import torch
from oracle import DEVICE, DTYPES, INTERPRET, TOLERANCE, agree, documents, gradcheck, leaf, repeats, slow

from kernels import conv1d


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several programs along a row."""
    monkeypatch.setattr(conv1d, "_span", conv1d._span.__wrapped__)                 # the same, not remembered
    for name, value in (("SHORTEST", 4), ("FORWARD", conv1d.Pace(2, 12)), ("BACKWARD", conv1d.Pace(2, 8))):
        monkeypatch.setattr(conv1d, name, value)


def case(b, t, c, k=4, bias=True, packed=False, dtype=torch.float64):
    return [leaf(b, t, c, dtype=dtype), leaf(c, 1, k, dtype=dtype), leaf(c, dtype=dtype) if bias else None,
            documents(b, t) if packed else None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_conv1d(packed, dtype):
    """Programs that begin and end inside documents, and a last one that has no whole span."""
    agree(conv1d.causal_conv1d, conv1d.reference, case(2, 9, 21, packed=packed, dtype=dtype))


@pytest.mark.parametrize("packed", [slow(False), True])
@pytest.mark.parametrize("bias", [False, slow(True)])
@pytest.mark.parametrize("k", [1, slow(2), slow(3), slow(5), 8])
def test_other_widths(k, bias, packed):
    agree(conv1d.causal_conv1d, conv1d.reference, case(1, 9, 5, k, bias, packed))


@pytest.mark.parametrize("shape", [
    (1, 1, 1), slow((2, 2, 5)), slow((1, 3, 16)), slow((1, 3, 260)), slow((1, 8, 17))])
def test_shapes(shape):
    agree(conv1d.causal_conv1d, conv1d.reference, case(*shape, packed=shape[1] > 1, dtype=torch.float32))


@pytest.mark.parametrize("T", [0, 1, 31, 33, 1000, 8192, slow(131_072)])
def test_spans(T):
    """Every position once, programs that fill a GPU of 132 x 8 warps or run all at once."""
    for programs in (1, 17, 34, 40, 700, 5000):
        span = conv1d._span(T, programs, 132 * 8, 4)
        assert span > 0 and span % 4 == 0
        if T >= 1000:
            waves = programs * -(-T // span) / (132 * 8)
            assert -(-waves // 1) <= max(1.2 * waves, 1) or programs > 132 * 8, (programs, span)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_nothing(shape):
    x, w, b, _ = case(*shape)
    y = conv1d.causal_conv1d(x, w, b)
    assert y.shape == shape
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), (x, w, b)))


def test_a_slice_of_wider_rows():
    """As in_proj makes x; an upstream gradient with strides; x with channels not side by side."""
    def part(op):
        return lambda x, *others: op(x[..., 3:11], *others)

    def turned(op):
        return lambda x, *others: op(x.mT, *others)

    def upstream(op):
        return lambda *inputs: op(*inputs).transpose(0, 1)

    def slices(op):
        return lambda *inputs: op(*inputs).split([3, 5], -1)

    ours, exact = conv1d.causal_conv1d, conv1d.reference
    _, *others = case(2, 7, 8, packed=True)
    agree(part(ours), part(exact), [leaf(2, 7, 24), *others])
    agree(turned(ours), turned(exact), [leaf(2, 8, 7), *others])
    agree(upstream(ours), upstream(exact), [leaf(2, 7, 8), *others])
    agree(slices(ours), slices(exact), [leaf(2, 7, 8), *others])


@pytest.mark.slow
def test_every_border():
    """A border before each position in turn, programs' edges among them, and a document a position."""
    x, w, b, _ = case(9, 9, 3)
    docs = torch.arange(9)
    docs = torch.stack([docs >= border for border in range(1, 9)] + [docs])
    agree(conv1d.causal_conv1d, conv1d.reference, [x, w, b, docs.long().to(DEVICE)])


def test_another_documents_infinity_stays_there():
    x, w, b, _ = case(1, 12, 3, dtype=torch.float32)
    docs = torch.tensor([[0] * 5 + [1] * 7], device=DEVICE)
    with torch.no_grad():
        x[:, 4] = torch.inf
    y = conv1d.causal_conv1d(x, w, b, docs)
    dx, = torch.autograd.grad(y[:, 5:].sum(), x)
    assert torch.isfinite(y[:, 5:]).all() and torch.isfinite(dx[:, 5:]).all()


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="float64 by finite differences: under the interpreter")
def test_gradcheck():
    x, w, b, docs = case(1, 5, 2, k=3, packed=True)
    gradcheck(lambda *inputs: conv1d.causal_conv1d(*inputs, docs), [x, w, b])


@pytest.mark.slow                                          # the interpreter cannot but repeat itself
def test_same_bits_twice():
    repeats(conv1d.causal_conv1d, case(2, 6, 20, packed=True, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_step_is_the_last_position(bias, dtype):
    """Token by token what the whole row gives; the rows of a cache are updated in place, no others."""
    x, w, b, _ = (i if i is None else i.detach() for i in case(3, 6, 40, bias=bias, dtype=dtype))
    exact = conv1d.reference(*(None if i is None else i.double() for i in (x, w, b)))
    cache = torch.zeros(5, 3, 40, dtype=dtype, device=DEVICE)
    cache[3:] = 7
    got = torch.stack([conv1d.step(cache[:3], x[:, t], w, b) for t in range(6)], 1)
    assert (got - exact).norm() <= TOLERANCE[dtype] * exact.norm()
    assert torch.equal(cache[:3], x[:, -3:]) and (cache[3:] == 7).all()


@pytest.mark.parametrize("k", [1, slow(2), slow(8)])
def test_step_of_other_widths(k):
    x, w, b, _ = (i if i is None else i.detach() for i in case(2, 9, 300, k=k))
    state = torch.zeros(2, k - 1, 300, dtype=x.dtype, device=DEVICE)
    got = torch.stack([conv1d.step(state, x[:, t], w, b) for t in range(9)], 1)
    assert (got - conv1d.reference(x, w, b)).abs().max() < 1e-12
    assert conv1d.step(state[:0], x[:0, 0], w, b).shape == (0, 300)
