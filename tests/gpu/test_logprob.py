import math

import pytest
import torch
from oracle import DEVICE, DTYPES, INTERPRET, agree, gradcheck, head, leaf, repeats, slow

from kernels import logprob, loss
from kernels.logprob import token_logprobs


@pytest.fixture(autouse=True)
def several_blocks_a_row(monkeypatch):
    """Rows of two blocks of 64 and of two parts of a block, the last of 5, instead of blocks of thousands."""
    monkeypatch.setattr(loss, "BLOCK", 64)


BOTH, LOGP, ENTROPY = (lambda x: x), (lambda x: x[0]), (lambda x: x[1])


def same(pick=BOTH, chunk=None, prepare=lambda h, w, targets: (h, w, targets), **options):
    """The op and its reference, both of what `prepare` makes of the inputs: log-probs, entropies or both."""
    return (lambda *inputs: pick(token_logprobs(*prepare(*inputs), chunk=chunk, **options)),
            lambda *inputs: pick(logprob.reference(*prepare(*inputs), **options)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, V", [(5, 149), slow(2, 128), slow(3, 63), (1, 17), (0, 149)])
def test_token_logprobs(n, V, dtype):
    agree(*same(), head(n, V, dtype=dtype))


@pytest.mark.parametrize("pick", [BOTH, slow(LOGP), slow(ENTROPY)])
@pytest.mark.parametrize("chunk", [slow(1), 3, slow(50)])
def test_scale_temperature_known_and_chunks(chunk, pick):
    """Gradients of both, of log-probs alone and of entropies alone; rows of the head that do not count."""
    for dtype, known in ((torch.float64, 77), (torch.float32, None)):
        agree(*same(pick, chunk, scale=0.125, temperature=0.6, known=known),
              head(5, dtype=dtype, size=1.0, known=known))


def test_real_blocks(monkeypatch):
    monkeypatch.setattr(loss, "BLOCK", 32768)
    for V in (5000, 33001):
        agree(*same(), head(2, V, 8, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_larger_tensors(dtype):
    """Hidden states, targets and upstream gradients with strides."""
    strided = same(prepare=lambda h, w, targets: (h[::2, 3:19], w[:, 3:19], targets[::2]))
    agree(lambda *inputs: torch.stack(strided[0](*inputs), -1)[:, :1].expand(-1, 2),
          lambda *inputs: torch.stack(strided[1](*inputs), -1)[:, :1].expand(-1, 2), head(12, dtype=dtype))
    agree(lambda *inputs: strided[0](*inputs)[1].sum(), lambda *inputs: strided[1](*inputs)[1].sum(),
          head(12, dtype=dtype))


def test_what_is_not_wanted():
    h, w, targets = head(4)
    for frozen in ((h.detach(), w, targets), (h, w.detach(), targets)):
        agree(*same(), frozen)
    with torch.no_grad():
        plain = token_logprobs(h, w, targets)
    assert not any(x.requires_grad for x in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, token_logprobs(h, w, targets), strict=True))


def test_one_id_has_it_all():
    """Logits of +-1e5, scaled: log-probs of 0 and of the difference, entropies of 0, gradients of neither
    infinity nor nan."""
    h, w, targets = head(4, dtype=torch.float32)
    logp, entropy = token_logprobs(h * 1e6, w, targets, 0.3)
    assert torch.isfinite(logp).all() and (logp <= 0).all() and (entropy >= 0).all() and (entropy < 6).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(logp.sum() + entropy.sum(), (h, w)))
    for V in (149, 64):
        h = torch.eye(2, 8, device=DEVICE).mul_(1e5).requires_grad_()
        w = torch.zeros(V, 8, device=DEVICE)
        w[V - 1, 0] = w[3, 1] = 1
        for ids, cost in (((V - 1, 3), 0), ((0, V - 1), -1e5)):
            logp, entropy = token_logprobs(h, w, torch.tensor(ids, device=DEVICE))
            assert (logp == cost).all() and (entropy == 0).all()
            dh, = torch.autograd.grad(logp.sum() + entropy.sum(), h)
            assert (dh.diagonal() == (-1 if cost else 0)).all()


def test_uniform_is_log_of_the_vocabulary():
    h, w, targets = torch.zeros(3, 8, dtype=torch.float64), leaf(149, 8), torch.tensor([0, 70, 148])
    logp, entropy = token_logprobs(h.to(DEVICE), w, targets.to(DEVICE))
    assert ((entropy - math.log(149)).abs() < 1e-13).all() and ((logp + entropy).abs() < 1e-13).all()


def test_what_lies_between_rows_is_not_read(monkeypatch):
    def once():
        out = token_logprobs(h, w, targets)
        return *out, *torch.autograd.grad(out[0].sum() + out[1].sum(), (h, w))

    def poisoned(h, weight, chunk, logits_buffer=loss.logits_buffer):
        x = logits_buffer(h, weight, chunk)
        x.as_strided((x.shape[0], x.stride(0)), x.stride()).fill_(math.nan)
        return x

    h, w, targets = head(3, dtype=torch.float32)
    clean = once()
    monkeypatch.setattr(logprob, "logits_buffer", poisoned)
    assert all(torch.equal(a, b) for a, b in zip(clean, once(), strict=True))


@pytest.mark.skipif(INTERPRET, reason="4 GB of logits: on a GPU")
def test_rows_beyond_2_31():
    x = torch.zeros((1 << 14) + 1, 1 << 17, dtype=torch.bfloat16, device=DEVICE)
    targets = torch.full((x.shape[0],), 5, device=DEVICE)
    logp, entropy, lse = logprob._forward_triton(x, targets, 1.0)
    assert (entropy - 17 * math.log(2)).abs().max() < 1e-4 and (logp + lse).abs().max() < 1e-4
    grad = logprob._backward_triton(x, targets, 1.0, lse, entropy, torch.ones_like(logp), None)
    assert (grad[:, 5] > 0.99).all() and (grad[-1, 6:] + 2.0 ** -17).abs().max() < 1e-9


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="float64 by finite differences: under the interpreter")
def test_gradcheck():
    h, w, targets = head(3, 9, 2, size=1.0)
    gradcheck(lambda h, w: token_logprobs(h, w, targets, 0.7, 1.3, 2), [h, w])


@pytest.mark.slow                                          # the interpreter cannot but repeat itself
def test_same_bits_twice():
    repeats(token_logprobs, head(dtype=torch.float32))
