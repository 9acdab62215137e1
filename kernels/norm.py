"""RMSNorm, optionally of a sum (x + scale * out, a residual stream that takes in a sublayer's output), gated
and over groups of channels (Mamba-2), with the backward pass written out.

    u = x * silu(gate)  (or x)   y = u / rms(u) * weight, rms over the last dimension or over each of G groups

All in fp32 whatever the input's dtype, rounded once at the end. Autograd of the plain formula walks over the
rows about twice as often and keeps three copies of them; here only x (and gate) and one number a row are
kept. With r = 1 / rms(u):

    du = r (g w - u r mean(g w u r)),   dw = sum over rows of g u r

Sum and norm in one pass read x and out and write s and y, 4 C a row, where two read s once more: 16k tokens x
4096 channels in bf16 are 134 MB a sublayer; backward the gradient of s is added where it is made, 5 C for 8.
"""

import torch
import torch.nn.functional as F

from kernels import as_rows, constexpr, jit, on_triton, tl, triton, wide, wide_tl


def reference(x, weight, eps, groups=1, gate=None):
    """The definition: the oracle."""
    u = x if gate is None else x * F.silu(gate)
    u = u.unflatten(-1, (groups, -1))
    return (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight


def reference_add(x, out, scale, weight, eps):
    """Sum and norm, the definition."""
    s = torch.add(x, out, alpha=scale)
    return s, reference(s, weight, eps)


def _wide(x):
    """fp32, or fp64 as it is. One cast up front: mixed-dtype arithmetic is not vectorised on a CPU."""
    return x.to(wide(x.dtype))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, groups, gate):
        u = _wide(x) if gate is None else F.silu(_wide(gate)).mul_(_wide(x))
        split = u.unflatten(-1, (groups, -1))
        r = torch.linalg.vector_norm(split, dim=-1, keepdim=True)
        r = r.square_().div_(split.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, gate, r)
        ctx.groups = groups
        return (split * r).flatten(-2).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, weight, gate, r = ctx.saved_tensors
        groups, wx, g = (ctx.groups, -1), _wide(x), _wide(g)
        if gate is not None:
            z = _wide(gate)
            silu = F.silu(z)
        normed = ((wx if gate is None else wx * silu).unflatten(-1, groups) * r)
        gu = normed.flatten(-2) * g
        dw = gu.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = gu.mul_(weight).unflatten(-1, groups).mean(-1, keepdim=True)
        du = (g * weight).unflatten(-1, groups).sub_(normed.mul_(mean)).mul_(r).flatten(-2)
        if gate is None:
            return du.to(x.dtype), dw, None, None, None
        dz = torch.ops.aten.silu_backward(du * wx, z)
        return du.mul_(silu).to(x.dtype), dw, None, None, dz.to(gate.dtype)


# -- Triton: Z is the gate (GATED), or the term to add (ADD), or None --------------------------------------

@jit
def _forward(X, Z, W, S, Y, R, x_row, z_row, y_row, scale: "fp64", eps: "fp64", width,  # noqa: F821
             ADD: constexpr, GATED: constexpr, BLOCK: constexpr, WIDE: constexpr):
    """A row of a group a program."""
    scale, eps = tl.full((), scale, WIDE), tl.full((), eps, WIDE)
    row, group, c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    here, c = c < width, group * width + c
    u = tl.load(X + row * x_row + c, here, 0.0).to(WIDE)
    if ADD:                                        # the norm is of the rounded sum, which is what others read
        s = (u + scale * tl.load(Z + row * z_row + c, here, 0.0).to(WIDE)).to(S.dtype.element_ty)
        tl.store(S + row * y_row + c, s, here)
        u = s.to(WIDE)
    if GATED:
        z = tl.load(Z + row * z_row + c, here, 0.0).to(WIDE)
        u *= z * tl.sigmoid(z)
    r = tl.rsqrt(tl.sum(u * u) / width + eps)
    tl.store(R + row * tl.num_programs(1) + group, r)
    w = tl.load(W + c, here, 0.0).to(WIDE)
    tl.store(Y + row * y_row + c, (u * r * w).to(Y.dtype.element_ty), here)


@jit
def _backward(X, Z, W, R, DY, DS, DX, DZ, DW, x_row, z_row, dy_row, ds_row, dx_row, scale: "fp64",  # noqa: F821
              rows, width, ADD: constexpr, GATED: constexpr, SCALED: constexpr, BLOCK: constexpr,
              STAGES: constexpr, WIDE: constexpr):
    """Every n-th row of a group a program, n programs, each with a sum of its own for the weight. X is what
    the norm is of, or its factor beside the gate. ADD: DS is a further gradient of X; SCALED: DZ is scale *
    DX. Loads run STAGES - 1 rows ahead: one row's arithmetic is too short to hide them."""
    first, n, group = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(1)
    c, scale = tl.arange(0, BLOCK), tl.full((), scale, WIDE)
    here, c = c < width, group * width + c
    w, dw = tl.load(W + c, here, 0.0).to(WIDE), tl.zeros((BLOCK,), WIDE)
    for i in tl.range(tl.cdiv(rows - first, n), num_stages=STAGES):
        row = first + i * n
        r = tl.load(R + row * tl.num_programs(1) + group)
        u = tl.load(X + row * x_row + c, here, 0.0).to(WIDE)
        dy = tl.load(DY + row * dy_row + c, here, 0.0).to(WIDE)
        if GATED:
            z = tl.load(Z + row * z_row + c, here, 0.0).to(WIDE)
            s = tl.sigmoid(z)
            x, u = u, u * (z * s)
        g = dy * w
        du = r * (g - u * (tl.sum(g * u) / width * r * r))
        dw += dy * u * r
        if ADD:
            du += tl.load(DS + row * ds_row + c, here, 0.0).to(WIDE)
        if SCALED:
            tl.store(DZ + row * dx_row + c, (scale * du).to(DZ.dtype.element_ty), here)
        if GATED:
            dz = du * x * s * (1 + z * (1 - s))
            tl.store(DZ + row * dx_row + c, dz.to(DZ.dtype.element_ty), here)
            du *= z * s
        tl.store(DX + row * dx_row + c, du.to(DX.dtype.element_ty), here)
    tl.store(DW + first * dx_row + c, dw, here)


def _stride(x):
    return 0 if x is None else x.stride(0)


def _run_forward(x, z, weight, eps, groups, scale=None):
    """x (rows, C), z the gate, or with a scale the term to add, or None. Returns s or None, y, 1 / rms."""
    (rows, C), add = x.shape, scale is not None
    y, s = x.new_empty(x.shape), x.new_empty(x.shape) if add else None
    r = x.new_empty((rows, groups), dtype=wide(x.dtype))
    block = triton.next_power_of_2(C // groups)
    _forward[rows, groups](
        x, z, weight.contiguous(), s, y, r, x.stride(0), _stride(z), C, scale or 0.0, eps, C // groups,
        ADD=add, GATED=z is not None and not add, BLOCK=block, WIDE=wide_tl(x.dtype),
        num_warps=min(max(block // 512, 1), 16))           # 16 channels a thread
    return s, y, r


def _run_backward(x, gate, weight, r, dy, ds=None, scale=1.0):
    """x, dy, gate or None, ds or None: (rows, C). Returns dx, dgate or scale * dx, dweight."""
    (rows, C), groups, gated, scaled = x.shape, r.shape[1], gate is not None, scale != 1.0
    dx = x.new_empty(x.shape)
    dz = gate.new_empty(x.shape) if gated else x.new_empty(x.shape) if scaled else dx
    block = triton.next_power_of_2(C // groups)
    warps = min(max(block // 256, 1), 32)                  # 8 channels a thread: 64 registers, gated 96
    a_row = block * x.element_size() * (2 + gated + (ds is not None))
    # as many programs as fit on a GPU at once: each leaves a row of sums, and all end together
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    n = min(rows, max(processors * max((20 if gated else 32) // warps, 1) // groups, 1))
    dw = x.new_empty((n, C), dtype=wide(x.dtype))
    _backward[n, groups](
        x, gate, weight.contiguous(), r, dy, ds, dx, dz, dw, x.stride(0), _stride(gate), dy.stride(0),
        _stride(ds), C, scale, rows, C // groups, ADD=ds is not None, GATED=gated, SCALED=scaled,
        BLOCK=block, STAGES=min(3, 1 + (96 << 10) // a_row), WIDE=wide_tl(x.dtype), num_warps=warps)
    return dx, dz, dw.sum(0).to(weight.dtype)


class _TritonNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, groups, gate):
        _, y, r = _run_forward(as_rows(x), None if gate is None else as_rows(gate), weight, eps, groups)
        ctx.save_for_backward(x, weight, gate, r)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, weight, gate, r = ctx.saved_tensors
        gate = None if gate is None else as_rows(gate)
        dx, dz, dw = _run_backward(as_rows(x), gate, weight, r, as_rows(dy))
        return dx.view(x.shape), dw, None, None, None if gate is None else dz.view(x.shape)


class _TritonAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, out, scale, weight, eps):
        s, y, r = _run_forward(as_rows(x), as_rows(out), weight, eps, 1, scale)
        s = s.view(x.shape)
        ctx.save_for_backward(s, weight, r)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return s, y.view(x.shape)

    @staticmethod
    def backward(ctx, ds, dy):                     # either None: nothing depends on that output
        s, weight, r = ctx.saved_tensors
        if dy is None:
            return ds, ds if ds is None or ctx.scale == 1.0 else ds * ctx.scale, None, None, None
        ds = None if ds is None else as_rows(ds)
        dx, dout, dw = _run_backward(as_rows(s), None, weight, r, as_rows(dy), ds, ctx.scale)
        same, dx = dout is dx, dx.view(s.shape)    # one object then: two views of it would be added to twice
        return dx, dx if same else dout.view(s.shape), None, dw, None


def rms_norm(x, weight, eps, groups=1, gate=None):
    """x (..., C), gate like x or None, weight (C); groups divides C. Returns x's shape and dtype."""
    return (_TritonNorm if on_triton(x) else _RMSNorm).apply(x, weight, eps, groups, gate)


def add_rms_norm(x, out, scale, weight, eps):
    """s = x + scale * out, and rms_norm(s, weight, eps): x, out, s and the norm (..., C), of x's dtype."""
    if on_triton(x):
        return _TritonAddNorm.apply(x, out, scale, weight, eps)
    s = torch.add(x, out, alpha=scale)
    return s, rms_norm(s, weight, eps)
