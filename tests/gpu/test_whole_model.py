"""model.py with the kernels and without: the same loss, gradients and log-probs, fp32. Where the two round
differently is in the order of sums: 3e-5 of a tensor's norm."""

import pytest
import torch
from oracle import DEVICE, INTERPRET, documents, slow

import kernels
import model
from generate import engine
from kernels.logprob import token_logprobs
from kernels.loss import linear_cross_entropy


def both(monkeypatch, run):
    """What run() returns with the kernels, and without."""
    out = []
    for chosen in ("auto", "torch"):
        monkeypatch.setattr(kernels, "chosen", chosen)
        assert kernels.on_triton(torch.empty(1, device=DEVICE)) == (chosen == "auto")
        out.append(run())
    return out


@pytest.mark.parametrize("preset, b, t", [
    ("toy-h", 1, 9), slow("toy-h", 2, 21), slow("toy", 2, 21), slow("toy-granite", 2, 21),
    slow("toy-nemotron-h", 2, 21)])
def test_loss_and_gradients(preset, b, t, monkeypatch):
    """Of mid-training's loss and of RL's log-probs and entropies."""
    net = model.load(f"random:{preset}", device=DEVICE)
    tokens, docs = torch.randint(0, 500, (b, t), device=DEVICE), documents(b, t)
    targets = torch.randint(0, 500, (b * t,), device=DEVICE)

    def head(h, weight, scale):
        loss = linear_cross_entropy(h, weight, targets.where(targets > 50, -100), scale)
        logp, entropy = token_logprobs(h, weight, targets, scale, 0.7, known=500)
        return torch.stack([loss, logp.sum(), entropy.sum()])

    def run():
        net.zero_grad()
        out = net(tokens, docs, head)
        (out @ torch.tensor([1.0, 0.3, 0.1], device=DEVICE)).backward()
        return [*out.detach(), *(p.grad.clone() for p in net.parameters())]

    for a, b in zip(*both(monkeypatch, run), strict=True):
        assert b.norm() > 0 and (a - b).norm() <= 3e-5 * b.norm()


@pytest.mark.parametrize("preset", ["toy", "toy-h"])
def test_generation(preset, monkeypatch):
    """The same greedy tokens, prompts read and tokens decoded by the kernels."""
    net = model.load(f"random:{preset}", device=DEVICE)

    def run():
        prompts = [[5, 6, 7, 8], [9, 10]]
        out = engine(net, progress=False).generate(prompts, n=1, max_new_tokens=4, temperature=0.0, seed=0)
        return [(s.tokens, s.logprobs) for p in out for s in p]

    for (ids, logp), (theirs, exact) in zip(*both(monkeypatch, run), strict=True):
        assert ids == theirs and torch.allclose(torch.tensor(logp), torch.tensor(exact), atol=1e-5)


@pytest.mark.skipif(not INTERPRET, reason="of the interpreter's start-up line")
def test_the_start_up_line_names_them():
    assert "Triton" in model.kernels_in_use(torch.device("cpu"), torch.float32)


@pytest.mark.skipif(INTERPRET, reason="kernels that need a GPU")
@pytest.mark.parametrize("window", [None, 5])
def test_varlen_attention(window):
    """flash-attn's or torch's, over packed documents in bf16, is SDPA document by document: 2e-2, the
    probabilities' roundings."""
    if "varlen" not in model.attention_kernel(torch.device("cuda"), torch.bfloat16):
        pytest.skip("neither flash-attn nor torch >= 2.13")
    lengths = [3, 17, 1, 11, 20, 12]                                    # of two rows of 32
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    q, k, v = (torch.randn(2, 32, heads, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
               for heads in (4, 2, 2))
    g, out = torch.randn(2, 32, 4, 64, device=DEVICE, dtype=torch.bfloat16), []
    for y in (model.attend_varlen(q, k, v, cu_seqlens, max(lengths), 0.125, window),
              model.attend_documents(q, k, v, lengths, 0.125, window)):
        out.append([y, *torch.autograd.grad(y, (q, k, v), g)])
    for a, b in zip(*out, strict=True):
        assert (a.double() - b.double()).norm() <= 2e-2 * b.double().norm()
