"""Against the recurrence, one token at a time, in float64. Tolerances are a little wider than a row kernel's:
fp32 2e-5 (the decays' exponents are sums of many terms), fp16 and bf16 two roundings of the products' inputs.
"""

import pytest
import torch
from oracle import DEVICE, DOT_DTYPES, INTERPRET, agree, documents, gradcheck, leaf, repeats, slow

from kernels import ssd

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


EXACT = torch.float64 if INTERPRET else torch.float32             # on a GPU float64 runs plain torch


def inputs(b, t, h, p, g, n, dtype=EXACT, initial=False):
    wide = torch.promote_types(dtype, torch.float32)
    A = (-torch.rand(h, dtype=torch.float64) * 3).to(wide).to(DEVICE).requires_grad_()
    return [leaf(b, t, h, p, dtype=dtype), leaf(b, t, h, low=0.01, dtype=wide), A,
            leaf(b, t, g, n, dtype=dtype), leaf(b, t, g, n, dtype=dtype), leaf(h, dtype=wide),
            leaf(b, h, p, n, dtype=wide) if initial else None]


def check(arguments, docs, chunk, tolerance=None):
    def ours(x, dt, A, B, C, D, initial):
        return ssd.ssd(x, dt, A, B, C, D, docs, chunk, True, initial)

    def exact(x, dt, A, B, C, D, initial):
        return ssd.recurrence(x, dt, A, B, C, D, docs, initial)

    agree(ours, exact, arguments, tolerance or TOLERANCE[arguments[0].dtype])


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("b, t, h, p, g, n, chunk, packed, initial", [
    (2, 37, 4, 8, 2, 5, 16, True, True),           # three chunks, the last not full; odd sizes
    slow(1, 33, 3, 17, 1, 16, 32, True, False),
    slow(1, 16, 2, 4, 1, 3, 16, False, True),      # exactly one chunk
    (2, 1, 2, 4, 2, 3, 16, True, True),            # one token
    slow(1, 70, 2, 16, 1, 16, 64, False, False)])
def test_the_recurrence(b, t, h, p, g, n, chunk, packed, initial, dtype):
    check(inputs(b, t, h, p, g, n, dtype, initial), documents(b, t) if packed else None, chunk)


@pytest.mark.parametrize("packed", [slow(False), True])
def test_tiles_within_a_chunk(packed):
    """64 tokens a chunk are two tiles by two."""
    check(inputs(1, 75, 2, 4, 2, 4), documents(1, 75, 5) if packed else None, 64)


@pytest.mark.parametrize("t, packed", [(9, True), slow(20, False), slow(20, True)])
def test_parts_of_a_group(t, packed):
    """18 heads a group are two programs."""
    check(inputs(1, t, 18, 2, 1, 2), documents(1, t) if packed else None, 16)


def test_every_token_a_document_of_its_own():
    check(inputs(1, 20, 2, 4, 1, 4, initial=True), torch.arange(20, device=DEVICE)[None], 16)


def test_no_rows():
    x, dt, A, B, C, D, _ = inputs(0, 9, 2, 4, 1, 4)
    y, state = ssd.ssd(x, dt, A, B, C, D, last=True)
    assert y.shape == (0, 9, 2, 4) and state.shape == (0, 2, 4, 4)
    with torch.no_grad():
        assert ssd.step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D).shape == (0, 2, 4)


def test_strides():
    """x, B and C as the convolution leaves them, slices of one tensor; an upstream gradient with strides."""
    wide, (_, dt, A, _, _, D, _) = leaf(2, 20, 4 * 6 + 2 * 2 * 5), inputs(2, 20, 4, 6, 2, 5)

    def split(scan):
        def run(wide, dt, A, D):
            x, B, C = wide.split([24, 10, 10], -1)
            B, C = B.unflatten(-1, (2, 5)), C.unflatten(-1, (2, 5))
            return scan(x.unflatten(-1, (4, 6)), dt, A, B, C, D).mT
        return run

    agree(split(lambda *a: ssd.ssd(*a, chunk=16)), split(lambda *a: ssd.recurrence(*a)[0]), [wide, dt, A, D])


@pytest.mark.parametrize("packed", [slow(False), True])
def test_extreme_decays(packed):
    """From none to e^-500 a token, and steps that would overflow were they not masked first."""
    x, dt, _, B, C, D, _ = inputs(1, 50, 2, 4, 1, 3)
    A = torch.tensor([-1e-3, -500.0], dtype=x.dtype, device=DEVICE, requires_grad=True)
    check([x, dt, A, B, C, D, None], documents(1, 50) if packed else None, 32)


def test_strong_decays_keep_their_digits():
    """What is left of the gradients of dt and A, terms e^-8 times smaller than those that cancel."""
    x, _, _, B, C, D, _ = inputs(1, 50, 4, 4, 1, 4, torch.float32)
    dt, A = leaf(1, 50, 4, dtype=torch.float32, low=0.1), leaf(4, dtype=torch.float32, low=0.0)
    with torch.no_grad():
        A.mul_(-16).sub_(8)
    check([x, dt, A, B, C, D, None], None, 32, 1e-4)


@pytest.mark.skipif(INTERPRET, reason="real sizes: on a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("g", [1, 2])
def test_real_sizes(g, dtype):
    """Chunks of 256 in tiles, several programs a group, documents, states."""
    check(inputs(2, 700, 32, 64, g, 128, dtype, True), documents(2, 700, 6), None)


@pytest.mark.skipif(INTERPRET, reason="on a GPU")
@pytest.mark.parametrize("packed", [False, True])
def test_mamba_ssm_is_the_same(packed, monkeypatch):
    pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
    monkeypatch.setattr(ssd.kernels, "chosen", "mamba-ssm")
    docs = documents(2, 300) if packed else None
    check(inputs(2, 300, 8, 64, 2, 128, torch.float32, True), docs, None, 1e-2)


def test_documents_are_isolated_bit_by_bit():
    x, dt, A, B, C, D, _ = inputs(1, 40, 2, 4, 1, 4, torch.float32)
    docs = torch.tensor([[0] * 11 + [1] * 18 + [2] * 11], device=DEVICE)
    one = ssd.ssd(x, dt, A, B, C, D, docs, 16)
    with torch.no_grad():
        x[:, :11], x[:, 29:], dt[:, :11], B[:, 29:] = 1e6, -7.0, 0.9, 3e4
    assert torch.equal(ssd.ssd(x, dt, A, B, C, D, docs, 16)[:, 11:29], one[:, 11:29])


def test_one_pass_is_two():
    """The state after one half is the other's initial state."""
    x, dt, A, B, C, D, _ = inputs(2, 40, 2, 4, 1, 4)
    whole, end = ssd.ssd(x, dt, A, B, C, D, chunk=16, last=True)
    first, state = ssd.ssd(x[:, :23], dt[:, :23], A, B[:, :23], C[:, :23], D, chunk=16, last=True)
    second, last = ssd.ssd(x[:, 23:], dt[:, 23:], A, B[:, 23:], C[:, 23:], D, None, 16, True, state)
    for a, b in ((torch.cat([first, second], 1), whole), (last, end)):
        assert (a - b).norm() <= TOLERANCE[EXACT] * b.norm()


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_step(dtype):
    """Decoding token by token is the scan."""
    x, dt, A, B, C, D, initial = inputs(3, 5, 4, 6, 2, 5, dtype, initial=True)
    state = initial.detach().clone()
    with torch.no_grad():
        ys = torch.stack([ssd.step(state, x[:, i], dt[:, i], A, B[:, i], C[:, i], D) for i in range(5)], 1)
    x, dt, A, B, C, D, initial = (z.detach().double() for z in (x, dt, A, B, C, D, initial))
    exact, last = ssd.recurrence(x, dt, A, B, C, D, None, initial)
    for a, b in ((ys, exact), (state, last)):
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm()


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="float64 by finite differences: under the interpreter")
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    docs = documents(1, 4, 2) if packed else None
    gradcheck(lambda x, dt, A, B, C, D, s: ssd.ssd(x, dt, A, B, C, D, docs, 16, True, s),
              inputs(1, 4, 1, 2, 1, 2, initial=True))


@pytest.mark.slow                                          # the interpreter cannot but repeat itself
def test_same_bits_twice():
    docs = documents(1, 20)
    repeats(lambda *a: ssd.ssd(*a[:6], docs, 16, True, a[6]), inputs(1, 20, 4, 4, 2, 4, torch.float32, True))


@pytest.mark.skipif(not INTERPRET, reason="a trap of the interpreter")
def test_the_interpreter_refuses_bf16():
    with pytest.raises(RuntimeError, match="bfloat16"):
        ssd.ssd(*inputs(1, 4, 2, 4, 1, 4, torch.bfloat16)[:6])
