import math
from itertools import product

import pytest
import torch
from oracle import DEVICE, INTERPRET

from kernels import diff

THRESHOLDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)                # analyze.py's
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def by_hand(old, new, thresholds):
    """One entry at a time, in Python's own float64."""
    found = dict(nonfinite=0, bits=0, values=0, over=[0] * len(thresholds), max_dw=0.0) | {
        key: [] for key in ("dw2", "w02", "dot")}
    for w0, w1 in zip(old.double().flatten().tolist(), new.double().flatten().tolist(), strict=True):
        if not math.isfinite(w0) or not math.isfinite(w1):
            found["nonfinite"] += 1
            continue
        dw = w1 - w0
        found["bits"] += w0 != w1 or math.copysign(1, w0) != math.copysign(1, w1)
        found["values"] += w0 != w1
        for k, t in enumerate(thresholds):
            found["over"][k] += abs(dw) > t * abs(w0)
        for key, value in (("dw2", dw * dw), ("w02", w0 * w0), ("dot", w0 * dw)):
            found[key].append(value)
        found["max_dw"] = max(found["max_dw"], abs(dw))
    return found | dict(entries=old.numel()) | {k: math.fsum(found[k]) for k in ("dw2", "w02", "dot")}


def same(old, new, thresholds=THRESHOLDS, exact=by_hand, rel=1e-12):
    found = diff.statistics(old.to(DEVICE), new.to(DEVICE), thresholds)
    expected = exact(old, new, thresholds)
    assert found["over"].tolist() == list(expected["over"]) and found["over"].dtype == torch.int64
    for key in ("entries", "nonfinite", "bits", "values"):
        assert found[key] == expected[key], key
    scale = math.sqrt(expected["w02"] * expected["dw2"])
    for key, size in (("dw2", expected["dw2"]), ("w02", expected["w02"]), ("dot", scale), ("max_dw", None)):
        size = expected["max_dw"] if size is None else size
        assert abs(found[key] - expected[key]) <= rel * size or found[key] == expected[key], key
    return found


def moved(n, old, new, share=0.3):
    w = torch.randn(n) * 0.02
    w[::13] = 0
    changed = torch.where(torch.rand(n) < share, w * (1 + 0.03 * torch.randn(n)) + 1e-4, w)
    changed[::5] = -changed[::5]
    return w.to(old), changed.to(new)


@pytest.fixture
def small(monkeypatch):
    """Several programs of several steps each."""
    monkeypatch.setattr(diff, "SPAN", 4096)


@pytest.mark.parametrize("old, new", list(product((BF16, FP16, FP32, FP64), repeat=2)))
def test_every_pair_of_dtypes(small, old, new):
    for n in (0, 7, 5001):
        w, changed = moved(n, old, new)
        same(w, changed, rel=1e-6)                                    # 16 bits twice: dw is rounded to fp32
        if n > 100:
            changed[50], w[77] = math.nan, math.inf
            changed[77], w[78] = -math.inf, math.nan
            assert same(w, changed, rel=1e-6)["nonfinite"] == 3


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_sums_are_float64(small, dtype):
    same(*moved(9001, dtype, dtype))
    same(*(x.view(-1, 7).T for x in moved(700, dtype, dtype)))       # not contiguous


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_thresholds_hit(dtype):
    """Every significand against those of a half to four times it, both signs: |dw| > t |w0| in integers."""
    bits = 7 if dtype == BF16 else 10
    step = 2**bits
    w0 = torch.arange(step, 2 * step, step // 16)
    w1 = torch.cat([torch.arange(step, 2 * step, max(1, step // 128)) * scale for scale in (1, 2, 4)])
    w0, w1 = torch.cartesian_prod(w0 * 2, torch.cat([w1, -w1])).T.contiguous()
    assert (w0.to(dtype) == w0).all() and (w1.to(dtype) == w1).all()
    thresholds = (*THRESHOLDS, 0.03, 0.07, 0.25, 0.4)
    assert diff._lifted(thresholds)
    found = diff.statistics(w0.to(dtype).to(DEVICE), w1.to(dtype).to(DEVICE), thresholds)
    for t, over in zip(thresholds, found["over"].tolist(), strict=True):
        assert over == (1000 * (w1 - w0).abs() > round(1000 * t) * w0.abs()).sum(), t
    wide = diff.statistics(w0.float().to(DEVICE), w1.float().to(DEVICE), thresholds)
    assert torch.equal(wide["over"], diff.reference(w0.float(), w1.float(), thresholds)["over"])


def test_a_threshold_that_may_not_be_lifted():
    """100 / 4001 is 8e-8 of itself over t: between t and a lifted t. Then float64 compares."""
    t = 100 / 4001 * (1 - 8e-8)
    assert diff._lifted((0.01, t)) is None and diff._lifted((0.5,)) is None and diff._lifted((0.0,)) is None
    w0, w1 = torch.tensor([4001 / 2]).half(), torch.tensor([4101 / 2]).half()
    same(w0, w1, (0.01, t, 0.5, 0.0, 3.0))


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_at_any_scale(scale):
    w = (torch.randn(300) * scale).bfloat16()
    for changed in (w * 1.5, torch.where(torch.rand(300) < 0.02, w * 1.01, w), -w):
        same(w, changed, rel=1e-7)


def test_what_fp32_cannot_hold():
    """bf16's largest against its negative: dw is 6.8e38; and entries smaller than any fp32 of full width."""
    largest = torch.finfo(BF16).max
    same(torch.tensor([largest, -largest, 1.0]).bfloat16(), torch.tensor([-largest, largest, 1.1]).bfloat16())
    # the interpreter reads bf16 below 2^-126 wrongly
    for scale in (2.0**-24, 2.0**-125 if INTERPRET else 2.0**-133):
        tiny = torch.arange(1, 200) * torch.tensor(scale, dtype=FP64)
        for dtype in (BF16, FP16):
            same(tiny.to(dtype), tiny.to(dtype).flip(0), rel=1e-7)
            same(tiny.to(dtype), torch.zeros(len(tiny)).to(dtype), rel=1e-7)


def test_zeros_and_nothing():
    zero, w = torch.zeros(100).bfloat16(), torch.randn(100).bfloat16()
    for other in (-zero, w, -zero.float(), w.double()):
        same(zero, other, rel=1e-7)
        same(other, zero, rel=1e-7)
    assert same(zero, -zero)["bits"] == 100
    nan = torch.full((3,), math.nan)
    for dtype in (BF16, FP16, FP32, FP64):
        assert same(nan.to(dtype), nan.to(dtype))["nonfinite"] == 3
    same(zero, w, ())                                                # no threshold


def test_analyze_takes_it():
    """The same numbers as numpy's on the CPU, to the last count."""
    weight_change = pytest.importorskip("analyze").weight_change         # wants tyro
    for old, new in ((BF16, BF16), (FP32, BF16)):
        w, changed = moved(2000, old, new)
        ours = weight_change(w.to(DEVICE), changed.to(DEVICE), (0.001, 0.03))
        theirs = weight_change(*((x.view(torch.uint16) if x.dtype == BF16 else x).numpy()
                                 for x in (w, changed)), (0.001, 0.03))
        assert ours.keys() == theirs.keys() and ours["over"] == theirs["over"]
        for key in ("entries", "nonfinite", "bits", "values", "unchanged", "bits_share", "values_share"):
            assert ours[key] == theirs[key], key
        for key in ("dw2", "w02", "relative_l2", "max_dw"):
            assert math.isclose(ours[key], theirs[key], rel_tol=1e-7), key


def test_same_bits_twice():
    w, changed = (x.to(DEVICE) for x in moved(5001, FP32, FP32))
    first, second = (diff.statistics(w, changed, THRESHOLDS) for _ in range(2))
    assert torch.equal(first.pop("over"), second.pop("over")) and first == second
