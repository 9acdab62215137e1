"""That the pretend GPU finds what it is for: faults that only a real one would show, made on purpose."""

import pretend
import pytest
import torch

from kernels.act import swiglu


def test_a_mix_of_devices_raises():
    with pretend.cuda():
        x = torch.zeros(4, 4, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            x + torch.zeros(4, 4)
        with pytest.raises(RuntimeError, match="mixes devices"):
            x[torch.tensor([0, 1])]
        with pytest.raises(ValueError, match="_swiglu: a pointer to a cpu tensor"):
            swiglu(x, torch.zeros(4, 4))


@pytest.mark.parametrize("read", [
    lambda x: float(x.sum()), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: bool(x.any()),
    lambda x: torch.tensor([1, 2], device="cuda"), lambda x: torch.zeros(3).to("cuda")])
def test_a_wait_counts(read):
    with pretend.cuda() as meter:
        x = torch.zeros(4, device="cuda")
        assert not meter.waits
        read(x)
        assert meter.waits.total() == 1, meter.waits


def test_what_does_not_wait():
    with pretend.cuda() as meter:
        x = torch.zeros(3).pin_memory().to("cuda", non_blocking=True)
        (x * 2 + x.mean()).relu()
        assert not meter.waits
        with pytest.raises(TypeError, match="cuda tensor to numpy"):
            x.numpy()


def test_a_layout_that_only_cuda_has():
    """The queries come before the heads in what CUDA's memory-efficient attention returns."""
    with pretend.cuda():
        q = torch.zeros(4, 2, 8, 64, device="cuda", dtype=torch.bfloat16)
        out, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, q, q, None, True)
        assert out.shape == q.shape and not out.is_contiguous()
        with pytest.raises((RuntimeError, ValueError), match="view"):
            out.view(4, -1)


def test_live_bytes():
    """What is freed no longer counts, and the peak stays; views hold no memory of their own."""
    with pretend.cuda() as meter:
        x = torch.empty(1000, device="cuda")
        y = x.view(10, 100)[2:5]
        assert meter.now == 4000
        z = y + 1
        assert meter.now == 4000 + 1200
        del x, y, z
    assert (meter.now, meter.peak) == (0, 5200)
