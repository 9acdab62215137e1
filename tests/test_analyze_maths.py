"""The mathematics of analyze.py against plain float64 and explicit enumeration: changes of weights,
checkpoints on disk, singular subspaces, the noise null, CKA."""

import itertools
import json
import math
import os
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import analyze
import presets
from analyze import (
    THRESHOLDS,
    cka_bootstrap,
    cka_permuted,
    compare_checkpoints,
    gram,
    gram_cka,
    linear_cka,
    noise_null,
    part_of,
    top_singular,
    update_geometry,
    weight_change,
    without_top,
)
from cli import InputError
from model import Random, load, save

# -- the change of one tensor ------------------------------------------------------------------------------

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def plain(old, new, thresholds=THRESHOLDS):
    """weight_change in one piece, in float64."""
    w0, w1 = old.double().flatten(), new.double().flatten()
    ok = w0.isfinite() & w1.isfinite()
    w0, w1 = w0[ok], w1[ok]
    dw = w1 - w0
    return dict(entries=len(ok), nonfinite=int((~ok).sum()), values=int((dw != 0).sum()),
                bits=int(((dw != 0) | (w0.signbit() != w1.signbit())).sum()),
                over={t: int((dw.abs() > t * w0.abs()).sum()) for t in thresholds}, dw2=(dw @ dw).item(),
                w02=(w0 @ w0).item(), dot=(w0 @ dw).item(), max_dw=dw.abs().max().item() if len(dw) else 0.0)


def same(found, expected, rel=1e-7):
    for key, value in expected.items():
        if isinstance(value, float):
            scale = math.sqrt(expected["w02"] * expected["dw2"]) if key == "dot" else abs(value)
            assert abs(found[key] - value) <= rel * scale, key
        else:
            assert found[key] == value, key


def test_change_by_hand():
    old = torch.tensor([1.0, 0.0, 0.0, 0.0, -2.0, math.nan, 100.0, 3.0])
    new = torch.tensor([1.0, -0.0, 0.5, 0.0, -1.0, 1.0, 101.0, math.inf])
    found = weight_change(old, new, (0.001, 0.01, 0.5))
    assert found["entries"] == 8 and found["nonfinite"] == 2
    assert found["bits"] == 4 and found["values"] == 3
    assert found["over"] == {0.001: 3, 0.01: 2, 0.5: 1}   # 1 % of 100 and half of 2 are not over; 0 -> 0.5 is
    assert found["unchanged"] == {0.001: 3 / 6, 0.01: 4 / 6, 0.5: 5 / 6}
    assert found["dw2"] == 2.25 and found["w02"] == 10005 and found["dot"] == 98 and found["max_dw"] == 1
    assert found["relative_l2"] == math.sqrt(2.25 / 10005)
    assert found["bits_share"] == 4 / 6 and found["values_share"] == 3 / 6


@pytest.mark.parametrize("old, new", [(BF16, BF16), (FP16, FP16), (FP32, FP32), (FP64, FP64), (BF16, FP32),
                                      (FP32, BF16), (FP16, BF16)])
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_change_is_plain_float64(monkeypatch, old, new, share):
    monkeypatch.setattr(analyze, "CHUNK", 2048)     # several chunks, and an odd piece at the end
    torch.manual_seed(0)
    for n in (1, 2, 7, 2048, 6001):
        w = torch.randn(n) * 0.02
        w[::13] = 0
        changed = torch.where(torch.rand(n) < share, w * (1 + 0.03 * torch.randn(n)) + 1e-4, w)
        w, changed = w.to(old), changed.to(new)
        same(weight_change(w, changed), plain(w, changed))
        changed[::5] = -changed[::5]
        if n > 100:
            changed[50] = math.nan
            w[77] = math.inf
        same(weight_change(w, changed), plain(w, changed))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_change_of_arrays(dtype):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(30, 50)).astype(dtype)
    moved = (w * 1.02).astype(dtype)
    expected = plain(torch.from_numpy(w), torch.from_numpy(moved))
    same(weight_change(w, moved), expected)
    same(weight_change(w.T, torch.from_numpy(moved).T), expected)          # not contiguous


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_thresholds_are_exact(dtype):
    """Every significand against every value from a half to four times it, both signs: |dw| > t |w0| in
    integers, so at the very edge (5 % of 1.25) too."""
    bits = 7 if dtype == BF16 else 10
    step = 2 ** bits
    w0 = torch.arange(step, 2 * step, max(1, step // 128))
    w1 = torch.cat([torch.arange(step, 2 * step) * scale for scale in (1, 2, 4)])
    w0, w1 = torch.cartesian_prod(w0 * 2, torch.cat([w1, -w1])).T.contiguous()
    found = weight_change(w0.to(dtype), w1.to(dtype))
    assert (w0.to(dtype) == w0).all() and (w1.to(dtype) == w1).all()
    for t in THRESHOLDS:
        assert found["over"][t] == (1000 * (w1 - w0).abs() > round(1000 * t) * w0.abs()).sum(), t


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_change_at_any_scale(scale):
    torch.manual_seed(0)
    w = (torch.randn(5000) * scale).bfloat16()
    for moved in (w * 1.5, torch.where(torch.rand(5000) < 0.02, w * 1.01, w), -w):
        same(weight_change(w, moved), plain(w, moved))


def test_change_of_nothing():
    zero, w = torch.zeros(100).bfloat16(), torch.randn(100).bfloat16()
    assert weight_change(zero, w)["relative_l2"] is None
    assert weight_change(zero, w)["over"][0.1] == 100
    assert weight_change(zero, -zero)["bits"] == 100 and weight_change(zero, -zero)["values"] == 0
    assert weight_change(zero[:0], zero[:0])["unchanged"][0.01] is None
    bits = zero.view(torch.uint16).numpy()                # numpy has no bfloat16: its bits will do
    assert weight_change(bits, w) == weight_change(zero, w)
    nan = torch.full((3,), math.nan)
    assert weight_change(nan, nan)["nonfinite"] == 3 and weight_change(nan, nan)["relative_l2"] is None
    with pytest.raises(InputError, match=r"\[100\] and \[99\]"):
        weight_change(w, w[:99])
    with pytest.raises(InputError, match="int64"):
        weight_change(w.long(), w.long())


def test_norms_of_many_entries():
    """torch's own norm is 3 % low on 2e8 float32 entries, a float32 dot of one chunk 2e-6."""
    torch.manual_seed(0)
    w = (torch.randn(3_000_001) * 0.02).bfloat16()
    moved = (w.float() + 0.001 * torch.randn(len(w))).bfloat16()
    same(weight_change(w, moved), plain(w, moved), rel=1e-7)


def test_memory_is_constant():
    w = torch.randn(4_000_000).bfloat16()
    moved = (w.float() * 1.01).bfloat16()
    weight_change(w, moved)
    tracemalloc.start()
    weight_change(w, moved)                               # 16 MB of weights, 32 MB in float32
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


# -- two checkpoints ---------------------------------------------------------------------------------------

def checkpoint(folder, name="toy-h", noise=0.0, seed=1, **options):
    model = load(f"random:{name}")
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += noise * torch.randn_like(p)
    save(model, str(folder), dtype=torch.bfloat16, **options)
    return str(folder)


def tensors(folder):
    return {k: v for f in sorted(os.listdir(folder)) if f.endswith(".safetensors")
            for k, v in load_file(os.path.join(folder, f)).items()}


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    root = tmp_path_factory.mktemp("trio")
    return [checkpoint(root / name, noise=noise, seed=seed, shard_bytes=size) for name, noise, seed, size in
            (("old", 0.0, 0, 4 << 30), ("new", 0.01, 1, 300_000), ("other", 0.02, 2, 4 << 30))]


def test_checkpoints(trio):
    """Of three, one in shards; every row against all its tensors in one piece."""
    found = compare_checkpoints(*trio)
    old, new, other = (tensors(folder) for folder in trio)
    assert found["missing"] == found["extra"] == []
    assert os.path.exists(trio[1] + "/model.safetensors.index.json")
    assert sum(t["entries"] for t in found["tensors"]) == sum(w.numel() for w in old.values())
    flat = [torch.cat([part[k].flatten() for k in old]) for part in (old, new, other)]
    total = found["rows"][0]
    same(total, plain(*flat[:2]) | dict(by="total"))
    b, c = ((x.double() - flat[0].double()) for x in flat[1:])
    assert total["cosine"] == pytest.approx((b @ c / b.norm() / c.norm()).item(), rel=1e-6)
    assert total["other2"] == pytest.approx((c @ c).item(), rel=1e-6)
    for row in found["rows"]:
        keys = [k for k in row["by"].split("+") if k != "total"]
        own = [t for t in found["tensors"] if all(t[k] == row[k] for k in keys)]
        assert row["count"] == len(own) and row["entries"] == sum(t["entries"] for t in own)
        ratios = [t["relative_l2"] for t in own if t["relative_l2"] is not None]       # conv1d.bias was 0
        assert row["mean_l2"] == pytest.approx(np.mean(ratios))
    both = compare_checkpoints(*trio[:2], threads=1)
    assert both["rows"][0] == {k: v for k, v in total.items() if k in both["rows"][0]}


def test_fused_matrix_is_split(trio):
    found = compare_checkpoints(*trio[:2])
    old, new = (tensors(folder)["model.layers.2.shared_mlp.input_linear.weight"] for folder in trio[:2])
    for sub, rows in (("gate", slice(0, 384)), ("up", slice(384, 768))):
        row, = (t for t in found["tensors"] if t["layer"] == 2 and t["sub"] == sub)
        same(row, plain(old[rows], new[rows]) | dict(component="MLP"))


def test_every_tensor_of_every_model_has_its_part():
    expected = {"attention": set("QKVO"), "MLP": {"gate", "up", "down"}, "norm": {"norm"},
                "Mamba": {"in_proj", "out_proj", "conv1d", "A/dt"}, "embedding": {"embed", "head"}}
    for name in presets.names():
        for tensor in Random(name).names():
            if "input_linear" not in tensor:
                layer, component, sub = part_of(tensor)
                assert sub in expected[component] and (layer is None) == ("layers" not in tensor)
    assert part_of("backbone.layers.12.mixer.norm.weight") == (12, "norm", "norm")
    assert part_of("model.layers.3.mamba.conv1d.bias") == (3, "Mamba", "conv1d")
    assert part_of("backbone.norm_f.weight") == (None, "norm", "norm")
    with pytest.raises(InputError, match="rotary"):
        part_of("model.layers.3.rotary")


def test_checkpoints_that_differ_in_names_and_shapes(trio, tmp_path):
    def copy(name, change):
        folder, own = tmp_path / name, tensors(trio[0])
        change(own)
        os.makedirs(folder)
        save_file(own, folder / "model.safetensors")
        (folder / "config.json").write_text(open(trio[0] + "/config.json").read())
        return str(folder)

    tied = copy("tied", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert compare_checkpoints(trio[0], tied)["rows"][0]["entries"] == sum(
        t.numel() for t in tensors(trio[0]).values())
    assert compare_checkpoints(trio[0], tied)["extra"] == []
    fewer = copy("fewer", lambda t: t.pop("model.norm.weight"))
    assert compare_checkpoints(trio[0], fewer)["missing"] == ["model.norm.weight"]
    assert compare_checkpoints(fewer, trio[0])["extra"] == ["model.norm.weight"]
    other = copy("other", lambda t: t.update({"model.norm.weight": torch.ones(7).bfloat16()}))
    with pytest.raises(InputError, match=r"other: model.norm.weight has shape \[7\], in .* \[128\]"):
        compare_checkpoints(trio[0], other)
    none = copy("none", lambda t: [t.pop(k) for k in list(t)[1:]] and t.update(x=t.pop(list(t)[0])))
    with pytest.raises(InputError, match="no tensor in common"):
        compare_checkpoints(trio[0], none)
    odd = copy("odd", lambda t: t.update({"model.norm.weight": torch.ones(128).long()}))
    with pytest.raises(InputError, match="odd: model.norm.weight.*int64"):
        compare_checkpoints(trio[0], odd)
    cut = copy("cut", lambda t: None) + "/model.safetensors"
    with open(cut, "r+b") as f:
        f.truncate(os.path.getsize(cut) - 100)
    with pytest.raises(InputError, match="cut/model.safetensors is truncated"):
        compare_checkpoints(trio[0], os.path.dirname(cut))
    index = json.load(open(trio[1] + "/model.safetensors.index.json"))
    gone = copy("gone", lambda t: None)
    json.dump(index, open(gone + "/model.safetensors.index.json", "w"))
    with pytest.raises(InputError, match="missing"):
        compare_checkpoints(trio[0], gone)


def test_tensors_at_odd_bytes(tmp_path):
    """A tensor behind one of odd length is not aligned to the pairs that are read."""
    torch.manual_seed(0)
    names = ("model.layers.0.a_norm.weight", "model.layers.0.self_attn.q_proj.weight")
    for name in ("old", "new"):
        os.makedirs(tmp_path / name)
        save_file(dict(zip(names, (torch.randn(5).bfloat16(), torch.randn(33, 7).bfloat16()), strict=True)),
                  tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(presets.read("toy")))
    found = {t["name"]: t for t in compare_checkpoints(tmp_path / "old", tmp_path / "new")["tensors"]}
    old, new = tensors(tmp_path / "old"), tensors(tmp_path / "new")
    for name in names:
        same(found[name], plain(old[name], new[name]))


# -- geometry, null ----------------------------------------------------------------------------------------

def test_singular_values_and_shares():
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(120, 80))[0], torch.linalg.qr(torch.randn(80, 80))[0]
    w = u @ torch.diag(0.9 ** torch.arange(80.0)) @ v.T
    s = top_singular(w, 20)[1]
    assert torch.allclose(s, torch.linalg.svdvals(w)[:20], rtol=1e-4)
    dw = torch.randn(120, 80) * 0.01 + 0.3 * u[:, :3] @ torch.randn(3, 80) * 0.1
    found = update_geometry(w, w + dw, k=20)
    dw = (w + dw) - w
    exact = torch.linalg.svdvals(dw.double())
    assert found["k"] == 20
    assert found["stable_rank"] == pytest.approx(((exact ** 2).sum() / exact[0] ** 2).item(), rel=1e-3)
    whole = (dw ** 2).sum()
    assert found["left"] == pytest.approx((((u[:, :20].T @ dw) ** 2).sum() / whole).item(), rel=1e-3)
    assert found["right"] == pytest.approx((((dw @ v[:, :20]) ** 2).sum() / whole).item(), rel=1e-3)
    assert found["null"]["left"] == pytest.approx(20 / 120, abs=0.02)
    assert found["null"]["right"] == pytest.approx(20 / 80, abs=0.02)
    assert found["null"]["stable_rank"] > 2 * found["stable_rank"]
    assert update_geometry(w, w + dw, k=20) == found      # seeded
    assert update_geometry(w, w)["stable_rank"] is None and update_geometry(w, w)["k"] == 20
    with pytest.raises(InputError, match="two matrices"):
        update_geometry(w[0], w[0])


def test_stable_rank_of_noise():
    """The edge of a random spectrum is crowded: the randomized value is within 1 %."""
    torch.manual_seed(0)
    dw = torch.randn(300, 500)
    found = update_geometry(torch.zeros(300, 500), dw, k=8)
    exact = torch.linalg.svdvals(dw)[0].item()
    assert top_singular(dw, 1, iterations=30)[1].item() == pytest.approx(exact, rel=0.01)
    assert found["stable_rank"] == pytest.approx(found["null"]["stable_rank"], rel=0.05)


def test_noise_null_is_adam():
    """The update computed apart is what AdamW does to the weights; weights that are rounded at every step
    hardly move."""
    torch.manual_seed(0)
    w, lrs = (torch.randn(1 << 14) * 0.02).bfloat16(), [5e-7 * (1 - t / 500) for t in range(500)]
    found = noise_null(w, lrs, seed=3)
    p, rng = torch.nn.Parameter(w.float()), torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW([p], betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    for lr in lrs:
        optimizer.param_groups[0]["lr"], p.grad = lr, torch.randn(len(w), generator=rng)
        optimizer.step()
    plain_found = weight_change(w, p.detach().bfloat16())
    assert found["masters"]["values"] == pytest.approx(plain_found["values"], abs=3)
    assert found["masters"]["values_share"] == pytest.approx(0.078, abs=0.006)
    assert found["float32"]["relative_l2"] == pytest.approx(3.3e-4, rel=0.03)
    assert found["float32"]["values_share"] > 0.999
    assert 0 < found["stepwise"]["values_share"] < 0.015


# -- CKA ---------------------------------------------------------------------------------------------------

def u_statistic(K, L):
    """HSIC as the mean over all 4-tuples of different inputs (Song et al., equation 4)."""
    values = [K[a, b] * (L[a, b] + L[c, d] - 2 * L[a, c])
              for a, b, c, d in itertools.permutations(range(len(K)), 4)]
    return np.mean(values)


@pytest.mark.parametrize("n", [4, 5, 6, 7])
def test_debiased_is_the_u_statistic(n):
    rng = np.random.default_rng(n)
    for _ in range(3):
        X, Y = rng.normal(size=(n, 3)), rng.normal(size=(n, 5)) + 2
        K, L = X @ X.T, Y @ Y.T                           # not centred: the statistic does not see it
        xy, xx, yy = u_statistic(K, L), u_statistic(K, K), u_statistic(L, L)
        expected = xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else math.nan
        assert linear_cka(X, Y, debiased=True) == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_biased_by_hand_and_by_definition():
    assert linear_cka([[1.0], [2.0], [3.0]], [[1.0], [0.0], [0.0]]) == pytest.approx(0.75)
    rng = np.random.default_rng(0)
    for n, d, e in ((6, 20, 30), (6, 4, 30), (40, 5, 7), (40, 40, 3)):       # Gram and feature routes
        X, Y = rng.normal(size=(n, d)) + 9, rng.normal(size=(n, e)) - 5
        x, y = X - X.mean(0), Y - Y.mean(0)
        expected = np.sum((y.T @ x) ** 2) / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
        assert linear_cka(X, Y) == pytest.approx(expected, rel=1e-12)
        assert gram_cka(gram(X), gram(Y), debiased=False) == pytest.approx(expected, rel=1e-12)
    x = torch.randn(10, 4)
    assert linear_cka(x.bfloat16(), x.bfloat16()) == pytest.approx(1)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_invariances(debiased):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 8))
    Y = X @ rng.normal(size=(8, 8)) + rng.normal(size=(60, 8))
    turn, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    value = linear_cka(X, Y, debiased)
    assert 0.2 < value < 1
    for other in (X @ turn, 1e-3 * X, X + 1e4 * rng.normal(size=8), np.hstack([X, np.full((60, 1), 0.1)])):
        assert linear_cka(other, Y, debiased) == pytest.approx(value, rel=1e-6)
    assert linear_cka(Y, X, debiased) == pytest.approx(value)
    assert linear_cka(X, -3 * X @ turn, debiased) == pytest.approx(1)
    order = rng.permutation(60)
    assert linear_cka(X[order], Y[order], debiased) == pytest.approx(value)


def test_cka_undefined():
    X = np.random.default_rng(0).normal(size=(10, 3))
    for debiased in (False, True):
        assert math.isnan(linear_cka(X, np.full((10, 3), 0.1), debiased))
    assert math.isnan(linear_cka(X[:3], X[:3], debiased=True))
    assert linear_cka(X[:3], X[:3]) == pytest.approx(1)
    assert math.isnan(linear_cka(np.eye(6), np.eye(6), debiased=True))       # self-HSIC is 0
    with pytest.raises(InputError, match="10 and 9 inputs"):
        linear_cka(X, X[:9])
    with pytest.raises(InputError, match=r"\(n, d\)"):
        linear_cka(X[:, 0], X[:, 0])


def test_cka_of_independent_features():
    """n = 200, d = 4,096: 0.953 biased, 0 debiased; one shared massive feature makes both 1, and removing it
    brings them back; repeated inputs lift the debiased value, halves without repeats do not."""
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(2, 200, 4096))
    K, L = gram(X), gram(Y)
    assert linear_cka(X, Y) == pytest.approx(0.953, abs=0.002)
    assert abs(linear_cka(X, Y, debiased=True)) < 0.02
    assert abs(cka_permuted(K, L, 50).mean()) < 0.01
    halves = cka_bootstrap(K, L, 100)
    assert abs(halves.mean()) < 0.03
    repeated = rng.integers(0, 200, 200)
    assert linear_cka(X[repeated], Y[repeated], debiased=True) > 0.9
    X[:, 7] = Y[:, 9] = 300 * rng.normal(size=200)
    assert linear_cka(X, Y) > 0.998 and linear_cka(X, Y, debiased=True) > 0.998
    assert abs(linear_cka(without_top(X, 1), without_top(Y, 1), debiased=True)) < 0.02
    assert without_top(X, 3).shape == (200, 4093)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("n", [12, 13])
def test_bootstrap_and_permutations_are_their_definitions(debiased, n):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 30))
    Y = X + rng.normal(size=(n, 30))
    halves = np.random.default_rng(5).random((20, n)).argsort(1)[:, :n // 2]
    expected = [linear_cka(X[h], Y[h], debiased) for h in halves]
    found = cka_bootstrap(gram(X), gram(Y), 20, seed=5, debiased=debiased)
    assert found == pytest.approx(expected, rel=1e-9)
    orders = np.random.default_rng(5)
    expected = [linear_cka(X, Y[orders.permutation(n)], debiased) for _ in range(20)]
    found = cka_permuted(gram(X), gram(Y), 20, seed=5, debiased=debiased)
    assert found == pytest.approx(expected, rel=1e-9)
    assert np.isnan(cka_bootstrap(gram(X[:6]), gram(Y[:6]), 3)).all()        # halves of 3
