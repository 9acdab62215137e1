import pytest
import torch
from oracle import DTYPES, INTERPRET, agree, gradcheck, leaf, repeats, slow

from kernels import rope


def reference(q, k, cos, sin):
    return rope.reference(q, cos, sin), rope.reference(k, cos, sin)


def angles(b, t, d, dtype=torch.float64):
    """cos and sin of any angles, (b, t, 1, d / 2)."""
    angle = leaf(b, t, 1, d // 2).detach() * 10
    return angle.cos().to(dtype), angle.sin().to(dtype)


def heads(b, t, n, d, dtype=torch.float64):
    return leaf(b, t, n, d, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b, t, h, kv, d", [
    slow(2, 9, 5, 1, 128), (2, 7, 4, 2, 80), slow(3, 1, 40, 8, 64), (1, 1, 1, 1, 2), slow(2, 3, 3, 3, 6),
    (0, 5, 4, 2, 8), (2, 0, 4, 2, 8)])
def test_rotate(b, t, h, kv, d, dtype):
    """Positions that all rows of the batch share, and each row's own."""
    for batch in {1, b}:
        agree(rope.rotate, reference, [heads(b, t, h, d, dtype), heads(b, t, kv, d, dtype),
                                       *angles(batch, t, d, dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """q and k as parts of one tensor; heads before tokens, and so the gradient; every other channel; angles
    that are expanded."""
    cos, sin = angles(1, 5, 16, dtype)

    def fused(op):
        def run(x):
            x = x.unflatten(-1, (-1, 16))
            return op(x[:, :, :4], x[:, :, 4:6], *(a.expand(3, -1, -1, -1).to(x.dtype) for a in (cos, sin)))
        return run

    def transposed(op):
        def run(q, k):
            y, z = op(q.transpose(1, 2), k[..., ::2], cos.to(q.dtype), sin.to(q.dtype))
            return y.transpose(1, 2), z.transpose(0, 3)
        return run

    agree(fused(rope.rotate), fused(reference), [leaf(3, 5, 8 * 16, dtype=dtype)])
    agree(transposed(rope.rotate), transposed(reference),
          [leaf(3, 4, 5, 16, dtype=dtype), leaf(3, 5, 2, 32, dtype=dtype)])


@pytest.mark.parametrize("only", [0, 1])
def test_one_of_them(only):
    """One is used further, or one wants a gradient: the other's is None, its own is right."""
    q, k, (cos, sin) = heads(2, 5, 4, 8), heads(2, 5, 2, 8), angles(2, 5, 8)
    agree(lambda *a: rope.rotate(*a)[only], lambda *a: reference(*a)[only], [q, k, cos, sin])
    frozen = [x if i == only else x.detach() for i, x in enumerate((q, k))]
    both, exact = rope.rotate(*frozen, cos, sin), reference(*frozen, cos, sin)
    for a, b in zip(both, exact, strict=True):
        assert (a - b).norm() <= 1e-11 * b.norm()
    agree(lambda x: rope.rotate(*[x if i == only else y for i, y in enumerate(frozen)], cos, sin)[only],
          lambda x: rope.reference(x, cos, sin), [frozen[only]])


def test_the_inverse_undoes_it():
    q, k, (cos, sin) = heads(2, 5, 4, 8), heads(2, 5, 2, 8), angles(2, 5, 8)
    for back, x in zip(rope.rotate(*rope.rotate(q, k, cos, sin), cos, -sin), (q, k), strict=True):
        assert (back - x).norm() <= 1e-11 * x.norm()


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="float64 by finite differences: under the interpreter")
def test_gradcheck():
    cos, sin = angles(1, 2, 4)
    gradcheck(lambda q, k: rope.rotate(q, k, cos, sin), [heads(2, 2, 2, 4), heads(2, 2, 1, 4)])


@pytest.mark.slow                                          # the interpreter cannot but repeat itself
def test_same_bits_twice():
    repeats(rope.rotate, [heads(2, 9, 5, 64, torch.float32), heads(2, 9, 2, 64, torch.float32),
                          *angles(2, 9, 64, torch.float32)])
