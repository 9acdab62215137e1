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

from kernels import as_rows, constexpr, jit, load_wide, on_triton, program, tl, triton, wide, wide_tl


def reference(x, weight, eps, groups=1, gate=None):
    """The definition: the oracle."""
    u = x if gate is None else x * F.silu(gate)
    u = u.unflatten(-1, (groups, -1))
    mean_square = u.square().mean(-1, keepdim=True)
    normed = u * torch.rsqrt(mean_square + eps)
    return normed.flatten(-2) * weight


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
        u = u.unflatten(-1, (groups, -1))
        channels = u.shape[-1]
        r = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        r = r.square_().div_(channels).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, gate, r)
        ctx.groups = groups
        normed = (u * r).flatten(-2)
        return normed.mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, gate, r = ctx.saved_tensors
        groups = ctx.groups, -1
        x_wide = _wide(x)
        dy = _wide(dy)
        # u is made again from what was kept.
        u = x_wide
        if gate is not None:
            z = _wide(gate)
            silu = F.silu(z)
            u = x_wide * silu
        normed = u.unflatten(-1, groups) * r
        # The weight's gradient is a sum over rows.
        product = normed.flatten(-2) * dy
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = product.flatten(0, -2).sum(0)
        # u's gradient takes away what lies along u itself.
        mean = product.mul_(weight).unflatten(-1, groups).mean(-1, keepdim=True)
        du = (dy * weight).unflatten(-1, groups)
        du = du.sub_(normed.mul_(mean)).mul_(r).flatten(-2)
        if gate is None:
            return du.to(x.dtype), dweight, None, None, None
        dz = torch.ops.aten.silu_backward(du * x_wide, z)
        dx = du.mul_(silu)
        return dx.to(x.dtype), dweight, None, None, dz.to(gate.dtype)


# -- Triton: Z is the gate (GATED), or the term to add (ADD), or None --------------------------------------

@jit
def _forward(X, Z, Weight, S, Y, R, x_row, z_row, y_row, width, scale: "fp64", eps: "fp64",  # noqa: F821
             ADD: constexpr, GATED: constexpr, BLOCK: constexpr, WIDE: constexpr):
    """A row of a group a program."""
    scale = tl.full((), scale, WIDE)
    eps = tl.full((), eps, WIDE)
    row = program(0)
    group = tl.program_id(1)
    c = tl.arange(0, BLOCK)
    mask = c < width
    c = group * width + c
    u = load_wide(X + row * x_row + c, mask, WIDE)
    if ADD:                                        # the norm is of the rounded sum, which is what others read
        z = load_wide(Z + row * z_row + c, mask, WIDE)
        s = (u + scale * z).to(S.dtype.element_ty)
        tl.store(S + row * y_row + c, s, mask)
        u = s.to(WIDE)
    if GATED:
        z = load_wide(Z + row * z_row + c, mask, WIDE)
        u *= z * tl.sigmoid(z)
    r = tl.rsqrt(tl.sum(u * u) / width + eps)
    tl.store(R + row * tl.num_programs(1) + group, r)
    weight = load_wide(Weight + c, mask, WIDE)
    tl.store(Y + row * y_row + c, u * r * weight, mask)


@jit
def _backward(X, Z, Weight, R, DY, DS, DX, DZ, DWeight, x_row, z_row, dy_row, ds_row, dx_row, rows, width,
              scale: "fp64", ADD: constexpr, GATED: constexpr, SCALED: constexpr,  # noqa: F821
              BLOCK: constexpr, STAGES: constexpr, WIDE: constexpr):
    """Every n-th row of a group a program, n programs, each with a sum of its own for the weight. X is what
    the norm is of, or its factor beside the gate. ADD: DS is a further gradient of X; SCALED: DZ is scale *
    DX. Loads run STAGES - 1 rows ahead: one row's arithmetic is too short to hide them."""
    first = program(0)
    n = tl.num_programs(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    scale = tl.full((), scale, WIDE)
    c = tl.arange(0, BLOCK)
    mask = c < width
    c = group * width + c
    weight = load_wide(Weight + c, mask, WIDE)
    dweight = tl.zeros((BLOCK,), WIDE)
    for i in tl.range(tl.cdiv(rows - first, n), num_stages=STAGES):
        row = first + i * n
        r = tl.load(R + row * groups + group)
        u = load_wide(X + row * x_row + c, mask, WIDE)
        dy = load_wide(DY + row * dy_row + c, mask, WIDE)
        if GATED:
            z = load_wide(Z + row * z_row + c, mask, WIDE)
            sigma = tl.sigmoid(z)
            x = u
            u = u * (z * sigma)
        g = dy * weight
        along = tl.sum(g * u) / width * r * r
        du = r * (g - u * along)
        dweight += dy * u * r
        if ADD:
            du += load_wide(DS + row * ds_row + c, mask, WIDE)
        if SCALED:
            tl.store(DZ + row * dx_row + c, scale * du, mask)
        if GATED:
            dz = du * x * sigma * (1 + z * (1 - sigma))
            tl.store(DZ + row * dx_row + c, dz, mask)
            du *= z * sigma
        tl.store(DX + row * dx_row + c, du, mask)
    tl.store(DWeight + first * dx_row + c, dweight, mask)


def _stride(x):
    return 0 if x is None else x.stride(0)


def _run_forward(x, z, weight, eps, groups, scale=None):
    """x (rows, C), z the gate, or with a scale the term to add, or None. Returns s or None, y, 1 / rms."""
    rows, C = x.shape
    width = C // groups
    add = scale is not None
    y = x.new_empty(rows, C)
    s = x.new_empty(rows, C) if add else None
    r = x.new_empty(rows, groups, dtype=wide(x.dtype))
    block = triton.next_power_of_2(width)
    warps = min(max(block // 512, 1), 16)                  # 16 channels a thread
    _forward[rows, groups](
        X=x, Z=z, Weight=weight.contiguous(), S=s, Y=y, R=r,
        x_row=x.stride(0), z_row=_stride(z), y_row=C, width=width,
        scale=scale or 0.0, eps=eps, ADD=add, GATED=z is not None and not add,
        BLOCK=block, WIDE=wide_tl(x.dtype), num_warps=warps)
    return s, y, r


def _run_backward(x, gate, weight, r, dy, ds=None, scale=1.0):
    """x, dy, gate or None, ds or None: (rows, C). Returns dx, dgate or scale * dx, dweight."""
    rows, C = x.shape
    groups = r.shape[1]
    width = C // groups
    gated = gate is not None
    scaled = scale != 1.0
    dx = x.new_empty(rows, C)
    if gated:
        dz = gate.new_empty(rows, C)
    elif scaled:
        dz = x.new_empty(rows, C)
    else:
        dz = dx
    block = triton.next_power_of_2(width)
    warps = min(max(block // 256, 1), 32)                  # 8 channels a thread: 64 registers, gated 96
    # The tensors of a row that are loaded ahead fit 96 KB of shared memory.
    row_bytes = block * x.element_size() * (2 + gated + (ds is not None))
    stages = min(3, 1 + (96 << 10) // row_bytes)
    # There are as many programs as fit on a GPU at once: each leaves a row of sums, and all end together.
    processors = 1
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs_each = max((20 if gated else 32) // warps, 1)
    n = min(rows, max(processors * programs_each // groups, 1))
    dweight = x.new_empty(n, C, dtype=wide(x.dtype))
    _backward[n, groups](
        X=x, Z=gate, Weight=weight.contiguous(), R=r, DY=dy, DS=ds, DX=dx, DZ=dz, DWeight=dweight,
        x_row=x.stride(0), z_row=_stride(gate), dy_row=dy.stride(0), ds_row=_stride(ds), dx_row=C,
        rows=rows, width=width, scale=scale,
        ADD=ds is not None, GATED=gated, SCALED=scaled,
        BLOCK=block, STAGES=stages, WIDE=wide_tl(x.dtype), num_warps=warps)
    return dx, dz, dweight.sum(0).to(weight.dtype)


def _rows_or_none(x):
    return None if x is None else as_rows(x)


class _TritonNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, groups, gate):
        _, y, r = _run_forward(as_rows(x), _rows_or_none(gate), weight, eps, groups)
        ctx.save_for_backward(x, weight, gate, r)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, weight, gate, r = ctx.saved_tensors
        dx, dz, dweight = _run_backward(as_rows(x), _rows_or_none(gate), weight, r, as_rows(dy))
        dgate = None if gate is None else dz.view(x.shape)
        return dx.view(x.shape), dweight, None, None, dgate


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
            dout = ds if ds is None or ctx.scale == 1.0 else ds * ctx.scale
            return ds, dout, None, None, None
        ds = _rows_or_none(ds)
        dx, dout, dweight = _run_backward(as_rows(s), None, weight, r, as_rows(dy), ds, ctx.scale)
        if dout is dx:                             # one object then: two views of it would be added to twice
            dx = dout = dx.view(s.shape)
        else:
            dx = dx.view(s.shape)
            dout = dout.view(s.shape)
        return dx, dout, None, dweight, None


def rms_norm(x, weight, eps, groups=1, gate=None):
    """x (..., C), gate like x or None, weight (C); groups divides C. Returns x's shape and dtype."""
    op = _TritonNorm if on_triton(x) else _RMSNorm
    return op.apply(x, weight, eps, groups, gate)


def add_rms_norm(x, out, scale, weight, eps):
    """s = x + scale * out, and rms_norm(s, weight, eps): x, out, s and the norm (..., C), of x's dtype."""
    if on_triton(x):
        return _TritonAddNorm.apply(x, out, scale, weight, eps)
    s = torch.add(x, out, alpha=scale)
    return s, rms_norm(s, weight, eps)
