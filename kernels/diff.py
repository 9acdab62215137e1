"""What one checkpoint's tensor differs from another's by, in one pass over both: the sums and counts behind
analyze.py's weight_change, for tensors that lie on a GPU.

    dw = w1 - w0        sums of dw^2, w0^2, w0 dw        the largest |dw|
    entries with a NaN or infinity (left out of all else), of another bit pattern, of another value,
    and for every threshold t with |dw| > t |w0|

Nothing as large as the tensors is made; plain torch in float64 moves some hundred bytes an entry where two
bf16 tensors have four. Sums are float64 throughout, counts exact, and a comparison is |dw| > fl(t |w0|) in
float64, as in analyze.py.

Two tensors of one 16-bit dtype have so few bytes an entry that its instructions are what counts, about 30:
there a comparison is the sign of one fused multiply-add in fp32, with t taken 2^-22 larger. That is exact as
well: an entry near a threshold up to 0.4 has a dw without rounding, and |dw| / |w0| is a fraction over 4,096
at most, of which `_lifted` sees to it that none lies in between. (An entry that hits a decimal t such as 0.03
is then not over it, though the binary t is below 0.03: also as in analyze.py's pass over such tensors.) What
fp32 cannot hold shows in the sums, which are then not finite: those tensors are read again, in float64.
"""

from fractions import Fraction

import torch

from kernels import constexpr, jit, on_triton, tl, triton, wide_tl

SPAN = 1 << 16                                     # entries of a program
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def reference(old, new, thresholds):
    """The definition, in float64: CPU path and oracle."""
    w0, w1 = old.double().flatten(), new.double().flatten()
    ok = w0.isfinite() & w1.isfinite()
    entries, w0, w1 = len(ok), w0[ok], w1[ok]
    dw = w1 - w0
    over = [(dw.abs() > t * w0.abs()).sum() for t in thresholds]
    return dict(entries=entries, nonfinite=entries - len(dw),
                bits=int((w0.view(torch.int64) != w1.view(torch.int64)).sum()), values=int((dw != 0).sum()),
                over=torch.tensor(over, dtype=torch.int64), dw2=(dw @ dw).item(), w02=(w0 @ w0).item(),
                dot=(w0 @ dw).item(), max_dw=dw.abs().max().item() if len(dw) else 0.0)


# -- Triton: a span of both tensors a program ----------------------------------------------------------------

@jit
def _sign(x):
    """1 where the fp32 x has its sign bit set."""
    return (x.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@jit
def _exact(a, b, some, T: constexpr, WIDE: constexpr):
    """What a tile adds, in float64: (w0^2, dw^2, w0 dw), |dw|, (nonfinite, bits, values, over each of T)."""
    INT: constexpr = tl.int64 if WIDE == tl.float64 else tl.int32
    a, b = a.to(WIDE), b.to(WIDE)
    finite = (tl.abs(a) < float("inf")) & (tl.abs(b) < float("inf"))
    a, b = tl.where(finite, a, 0.0), tl.where(finite, b, 0.0)
    w0, dw = a.to(tl.float64), b.to(tl.float64) - a.to(tl.float64)
    sums = w0 * w0, dw * dw, w0 * dw
    bits = a.to(INT, bitcast=True) != b.to(INT, bitcast=True)
    counts = ((some & (finite == 0)).to(tl.int32), bits.to(tl.int32), (a != b).to(tl.int32))
    w0, dw = tl.abs(w0), tl.abs(dw)
    for k in tl.static_range(len(T)):
        counts += ((dw > tl.full((), T[k], tl.float64) * w0).to(tl.int32),)
    return sums, dw, counts


@jit
def _short(a, b, T: constexpr):
    """The same of finite entries of one 16-bit dtype, products and comparisons in fp32."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    dw = b - a
    w64, dw64 = a.to(tl.float64), dw.to(tl.float64)       # no square of a bf16 fits fp32 for certain
    sums = w64 * w64, dw64 * dw64, w64 * dw64
    bits = a.to(tl.int32, bitcast=True) != b.to(tl.int32, bitcast=True)
    counts = (tl.zeros_like(a).to(tl.int32), bits.to(tl.int32), (a != b).to(tl.int32))
    a, dw = tl.abs(a), tl.abs(dw)
    for k in tl.static_range(len(T)):
        counts += (_sign(tl.fma(a, tl.full((), T[k], tl.float32), -dw)),)
    return sums, dw, counts


@jit
def _add(totals, more):
    """Each total (ROWS) and the sums over rows of its tile (ROWS, V): within a thread."""
    new = ()
    for k in tl.static_range(len(totals)):
        new += (totals[k] + tl.sum(more[k], 1),)
    return new


@jit
def _statistics(Old, New, Sums, n, T: constexpr, ROWS: constexpr, V: constexpr, SPAN: constexpr,
                SHORT: constexpr, WIDE: constexpr):
    """A row of Sums: w0^2, dw^2, w0 dw, max |dw|, nonfinite, bits, values, over each of T."""
    start = tl.program_id(0).to(tl.int64) * SPAN
    at = tl.arange(0, ROWS)[:, None] * V + tl.arange(0, V)[None, :]
    sums = (tl.zeros((ROWS,), tl.float64),) * 3
    most = tl.zeros((ROWS,), tl.float32 if SHORT else tl.float64)
    counts = (tl.zeros((ROWS,), tl.int32),) * (3 + len(T))
    for i in range(start, tl.minimum(start + SPAN, n), ROWS * V):
        i += at
        a, b = tl.load(Old + i, i < n, 0.0), tl.load(New + i, i < n, 0.0)
        if SHORT:
            products, dw, found = _short(a, b, T)
        else:
            products, dw, found = _exact(a, b, i < n, T, WIDE)
        most = tl.maximum(most, tl.max(dw, 1))
        sums = _add(sums, products)
        counts = _add(counts, found)
    Sums += tl.program_id(0).to(tl.int64) * (7 + len(T))
    for k in tl.static_range(3):
        tl.store(Sums + k, tl.sum(sums[k]))
    tl.store(Sums + 3, tl.max(most).to(tl.float64))
    for k in tl.static_range(3 + len(T)):
        tl.store(Sums + 4 + k, tl.sum(counts[k]).to(tl.float64))


def _lifted(thresholds):
    """Thresholds 2^-22 larger, for the short comparison; None where it may not be exact."""
    for t in thresholds:
        if not 1e-6 <= t <= 0.4:
            return None
        middle = Fraction(t) * (1 + Fraction(3, 1 << 24))              # rounded to fp32, it is below 3 / 2^23
        beyond = middle.limit_denominator(1 << 12) / Fraction(t) - 1
        if Fraction(1, 1 << 40) < beyond <= Fraction(3, 1 << 23):      # nearer: the decimal t itself, a hit
            return None
    return tuple(t * (1 + 2**-22) for t in thresholds)


def _launch(old, new, T, short):
    size = max(old.itemsize, new.itemsize)
    V = 8 if min(old.itemsize, new.itemsize) == 2 else 16 // size      # 128 bits a thread, or twice that
    programs = triton.cdiv(old.numel(), SPAN)
    found = torch.empty(programs, 7 + len(T), dtype=torch.float64, device=old.device)
    _statistics[(programs,)](
        old, new, found, old.numel(), T=T, ROWS=256, V=V, SPAN=SPAN, SHORT=short,
        WIDE=wide_tl(torch.promote_types(old.dtype, new.dtype)), num_warps=4)
    return torch.cat([found.sum(0), found[:, 3].amax(0, keepdim=True) if programs else found.new_zeros(1)])


def statistics(old, new, thresholds):
    """old, new: tensors of one shape and device, any of DTYPES. Returns a dict, numbers of Python:
    entries, nonfinite, bits, values (counts); over: int64 tensor (thresholds); dw2, w02, dot, max_dw."""
    if not on_triton(old):
        return reference(old, new, thresholds)
    old, new = old.detach().reshape(-1), new.detach().to(old.device).reshape(-1)
    thresholds = tuple(thresholds)
    lifted = _lifted(thresholds) if old.itemsize == 2 and old.dtype == new.dtype else None
    if lifted is not None:
        found = _launch(old, new, lifted, True).cpu()
    if lifted is None or not found.isfinite().all():
        found = _launch(old, new, thresholds, False).cpu()
    w02, dw2, dot, _, *counts, most = found.tolist()
    nonfinite, bits, values, *over = map(int, counts)
    return dict(entries=old.numel(), nonfinite=nonfinite, bits=bits, values=values,
                over=torch.tensor(over, dtype=torch.int64), dw2=dw2, w02=w02, dot=dot, max_dw=most)
