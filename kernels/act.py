"""The MLPs' activations: SwiGLU, silu(gate) * up, and squared ReLU, relu(x)^2 (Nemotron-H).

    y = g sigma(g) u        dg = dy u sigma(g) (1 + g (1 - sigma(g)))        du = dy g sigma(g)
    y = relu(x)^2           dx = 2 dy relu(x)

One pass forward and one backward, in fp32 whatever the dtype; only the inputs are kept. Plain torch makes
two passes forward, five backward, and keeps silu(gate) too: 16k tokens x 14336 channels in bf16 are 470 MB a
layer. Gate and up may be the halves of one tensor, as Granite 4's input_linear makes them: their gradients
are then written into halves of one tensor as well, without a copy.
"""

import torch
import torch.nn.functional as F

from kernels import as_rows, constexpr, jit, on_triton, tl, triton, wide_tl


def reference(gate, up):
    """SwiGLU, the definition: CPU path and oracle."""
    return F.silu(gate) * up


def reference_relu2(x):
    """Squared ReLU, the definition: CPU path and oracle."""
    return F.relu(x).square()


# -- Triton: a block of one row a program ------------------------------------------------------------------

@jit
def _swiglu(G, U, Y, g_row, u_row, width, BLOCK: constexpr, WIDE: constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(G + row * g_row + c, c < width, 0.0).to(WIDE)
    u = tl.load(U + row * u_row + c, c < width, 0.0).to(WIDE)
    tl.store(Y + row * width + c, (g * tl.sigmoid(g) * u).to(Y.dtype.element_ty), c < width)


@jit
def _swiglu_backward(G, U, DY, DG, DU, g_row, u_row, dg_row, du_row, width, BLOCK: constexpr,
                     WIDE: constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(G + row * g_row + c, c < width, 0.0).to(WIDE)
    u = tl.load(U + row * u_row + c, c < width, 0.0).to(WIDE)
    dy = tl.load(DY + row * width + c, c < width, 0.0).to(WIDE)
    s = tl.sigmoid(g)
    tl.store(DG + row * dg_row + c, (dy * u * s * (1 + g * (1 - s))).to(DG.dtype.element_ty), c < width)
    tl.store(DU + row * du_row + c, (dy * g * s).to(DU.dtype.element_ty), c < width)


@jit
def _relu2(X, Y, size, BLOCK: constexpr, WIDE: constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.maximum(tl.load(X + i, i < size, 0.0).to(WIDE), 0.0)
    tl.store(Y + i, (x * x).to(Y.dtype.element_ty), i < size)


@jit
def _relu2_backward(X, DY, DX, size, BLOCK: constexpr, WIDE: constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.maximum(tl.load(X + i, i < size, 0.0).to(WIDE), 0.0)
    dy = tl.load(DY + i, i < size, 0.0).to(WIDE)
    tl.store(DX + i, (2 * x * dy).to(DX.dtype.element_ty), i < size)


def _launch(width):
    return dict(BLOCK=min(2048, triton.next_power_of_2(max(width, 1))), num_warps=8)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):                    # up None: gate holds both halves
        ctx.save_for_backward(gate, up)
        g, u = map(as_rows, gate.chunk(2, -1) if up is None else (gate, up))
        y, how = g.new_empty(g.shape), _launch(g.shape[1])
        _swiglu[g.shape[0], triton.cdiv(g.shape[1], how["BLOCK"])](
            g, u, y, g.stride(0), u.stride(0), g.shape[1], WIDE=wide_tl(y.dtype), **how)
        return y.view(*gate.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        g, u = map(as_rows, gate.chunk(2, -1) if up is None else (gate, up))
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = None if up is None else torch.empty(up.shape, dtype=up.dtype, device=up.device)
        dg, du = map(as_rows, dgate.chunk(2, -1) if up is None else (dgate, dup))
        how = _launch(g.shape[1])
        _swiglu_backward[g.shape[0], triton.cdiv(g.shape[1], how["BLOCK"])](
            g, u, as_rows(dy).contiguous(), dg, du, g.stride(0), u.stride(0), dg.stride(0), du.stride(0),
            g.shape[1], WIDE=wide_tl(g.dtype), **how)
        return dgate, dup


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        y, how = torch.empty_like(x), _launch(x.numel())
        _relu2[(triton.cdiv(x.numel(), how["BLOCK"]),)](x, y, x.numel(), WIDE=wide_tl(x.dtype), **how)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        dx, how = torch.empty_like(x), _launch(x.numel())
        _relu2_backward[(triton.cdiv(x.numel(), how["BLOCK"]),)](x, dy.contiguous(), dx, x.numel(),
                                                                 WIDE=wide_tl(x.dtype), **how)
        return dx


def swiglu(gate, up=None):
    """silu(gate) * up. gate, up (..., F) of one dtype; with up None gate is (..., 2F), both side by side.
    Returns (..., F) in that dtype."""
    if on_triton(gate):
        return _SwiGLU.apply(gate, up)
    return reference(*(gate.chunk(2, -1) if up is None else (gate, up)))


def relu2(x):
    """relu(x)^2 of x (...), in its dtype."""
    return _Relu2.apply(x) if on_triton(x) else reference_relu2(x)
