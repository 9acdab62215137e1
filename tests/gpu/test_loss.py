import math

import oracle
import pytest
import torch
from oracle import DEVICE, DTYPES, INTERPRET, agree, gradcheck, leaf, repeats, slow

from kernels import loss
from kernels.loss import IGNORE, linear_cross_entropy


@pytest.fixture(autouse=True)
def several_blocks_a_row(monkeypatch):
    """Rows of two blocks of 64 and of two parts of a block, the last of 5, instead of blocks of thousands."""
    monkeypatch.setattr(loss, "BLOCK", 64)


def head(*sizes, **options):
    """The same with some targets ignored, of the extremes none."""
    h, w, targets = oracle.head(*sizes, **options)
    targets[5::3] = IGNORE
    return h, w, targets


def same(scale=1.0, chunk=None, prepare=lambda h, w, targets: (h, w, targets)):
    """The op and its reference, both of what `prepare` makes of the inputs."""
    return (lambda *inputs: linear_cross_entropy(*prepare(*inputs), scale, chunk),
            lambda *inputs: loss.reference(*prepare(*inputs), scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, V", [(7, 149), slow(2, 128), slow(3, 63), (1, 17), (2, 1), (0, 149)])
def test_linear_cross_entropy(n, V, dtype):
    agree(*same(), head(n, V, dtype=dtype))


@pytest.mark.parametrize("chunk", [slow(1), 3, slow(50)])
@pytest.mark.parametrize("scale", [slow(1.0), 0.3])
def test_scale_and_chunks(scale, chunk):
    agree(*same(scale, chunk), head(7))
    agree(*same(scale, chunk), head(7, dtype=torch.float32, size=1.0))


def test_real_blocks(monkeypatch):
    monkeypatch.setattr(loss, "BLOCK", 32768)
    for V in (5000, 33001):
        agree(*same(), head(3, V, 8, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_larger_tensors(dtype):
    """Hidden states and targets with strides, a head with more rows than count."""
    agree(*same(prepare=lambda h, w, targets: (h[::2, 3:19], w[:77, 3:19], targets[::2].clamp(max=76))),
          head(10, dtype=dtype))


def test_what_is_not_wanted():
    h, w, targets = head(4)
    for frozen in ((h.detach(), w, targets), (h, w.detach(), targets)):
        agree(*same(), frozen)
    with torch.no_grad():
        assert not (plain := linear_cross_entropy(h, w, targets)).requires_grad
    assert torch.allclose(plain, loss.reference(h, w, targets), atol=0, rtol=1e-12)
    h, w = h.detach(), w.detach()
    assert torch.equal(plain, linear_cross_entropy(h, w, targets))


def test_ignored_rows_are_exact_zeros():
    h, w, targets = head(dtype=torch.float32)
    dh, = torch.autograd.grad(linear_cross_entropy(h, w, targets), h)
    assert (dh[targets == IGNORE] == 0).all() and (dh[targets != IGNORE] != 0).any(1).all()
    none = linear_cross_entropy(h, w, torch.full_like(targets, IGNORE))
    assert none == 0 and all((g == 0).all() for g in torch.autograd.grad(none, (h, w)))


def test_one_id_has_it_all():
    """Logits of +-1e5: the right id costs nothing and moves nothing, a wrong one costs the difference."""
    h, w, targets = head(4, dtype=torch.float32)
    big = linear_cross_entropy(h * 1e6, w, targets)
    assert torch.isfinite(big) and all(torch.isfinite(g).all() for g in torch.autograd.grad(big, (h, w)))
    for V in (149, 64):
        h = torch.eye(2, 8, device=DEVICE).mul_(1e5).requires_grad_()
        w = torch.zeros(V, 8, device=DEVICE)
        w[V - 1, 0] = w[3, 1] = 1
        right = linear_cross_entropy(h, w, torch.tensor([V - 1, 3], device=DEVICE))
        assert right == 0 and (torch.autograd.grad(right, h)[0] == 0).all()
        wrong = linear_cross_entropy(h, w, torch.tensor([0, V - 1], device=DEVICE))
        assert wrong == 2e5 and (torch.autograd.grad(wrong, h)[0][0, 0] == 1)


def test_uniform_is_log_of_the_vocabulary():
    h, w, targets = torch.zeros(3, 8, dtype=torch.float64), leaf(149, 8), torch.tensor([0, 70, 148])
    flat = linear_cross_entropy(h.to(DEVICE), w, targets.to(DEVICE))
    assert abs(flat.item() - 3 * math.log(149)) < 1e-12


def test_what_lies_between_rows_is_not_read(monkeypatch):
    h, w, targets = head(dtype=torch.float32)
    clean = [x := linear_cross_entropy(h, w, targets), *torch.autograd.grad(x, (h, w))]

    def poisoned(h, weight, chunk, logits_buffer=loss.logits_buffer):
        x = logits_buffer(h, weight, chunk)
        x.as_strided((x.shape[0], x.stride(0)), x.stride()).fill_(math.nan)
        return x

    monkeypatch.setattr(loss, "logits_buffer", poisoned)
    dirty = [x := linear_cross_entropy(h, w, targets), *torch.autograd.grad(x, (h, w))]
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.skipif(INTERPRET, reason="4 GB of logits: on a GPU")
def test_rows_beyond_2_31():
    x = torch.zeros((1 << 14) + 1, 1 << 17, dtype=torch.bfloat16, device=DEVICE)
    targets = torch.full((x.shape[0],), 5, device=DEVICE)
    losses, grad = loss._rows_triton(x, targets, 1.0, True)
    assert (losses - 17 * math.log(2)).abs().max() < 1e-4
    assert (grad[:, 5] < -0.99).all() and (grad[-1, 6:] == 2.0 ** -17).all()


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="float64 by finite differences: under the interpreter")
def test_gradcheck():
    h, w, targets = head(3, 9, 2, size=1.0)
    gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, 0.7, 2), [h, w])


@pytest.mark.slow                                          # the interpreter cannot but repeat itself
def test_same_bits_twice():
    repeats(linear_cross_entropy, head(dtype=torch.float32))
