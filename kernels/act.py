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

from kernels import as_rows, columns, constexpr, jit, load_wide, on_triton, program, tl, triton, wide_tl

WARPS = 8                                          # of a program


def reference(gate, up):
    """SwiGLU, the definition: CPU path and oracle."""
    return F.silu(gate) * up


def reference_relu2(x):
    """Squared ReLU, the definition: CPU path and oracle."""
    return F.relu(x).square()


# -- Triton: a block of one row a program ------------------------------------------------------------------

@jit
def _swiglu(Gate, Up, Y, gate_row, up_row, width, BLOCK: constexpr, WIDE: constexpr):
    row = program(0)
    c = columns(1, BLOCK)
    mask = c < width
    gate = load_wide(Gate + row * gate_row + c, mask, WIDE)
    up = load_wide(Up + row * up_row + c, mask, WIDE)
    y = gate * tl.sigmoid(gate) * up
    tl.store(Y + row * width + c, y, mask)


@jit
def _swiglu_backward(Gate, Up, DY, DGate, DUp, gate_row, up_row, dgate_row, dup_row, width,
                     BLOCK: constexpr, WIDE: constexpr):
    row = program(0)
    c = columns(1, BLOCK)
    mask = c < width
    gate = load_wide(Gate + row * gate_row + c, mask, WIDE)
    up = load_wide(Up + row * up_row + c, mask, WIDE)
    dy = load_wide(DY + row * width + c, mask, WIDE)
    sigma = tl.sigmoid(gate)
    dgate = dy * up * sigma * (1 + gate * (1 - sigma))
    dup = dy * gate * sigma
    tl.store(DGate + row * dgate_row + c, dgate, mask)
    tl.store(DUp + row * dup_row + c, dup, mask)


@jit
def _relu2(X, Y, size, BLOCK: constexpr, WIDE: constexpr):
    i = program(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    x = tl.maximum(load_wide(X + i, mask, WIDE), 0.0)
    tl.store(Y + i, x * x, mask)


@jit
def _relu2_backward(X, DY, DX, size, BLOCK: constexpr, WIDE: constexpr):
    i = program(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    x = tl.maximum(load_wide(X + i, mask, WIDE), 0.0)
    dy = load_wide(DY + i, mask, WIDE)
    tl.store(DX + i, 2 * x * dy, mask)


def _block_size(width):
    return min(2048, triton.next_power_of_2(max(width, 1)))


def _halves(gate, up):
    """Gate and up, each as rows; with up None gate holds both."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return as_rows(gate), as_rows(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):                    # up None: gate holds both halves
        ctx.save_for_backward(gate, up)
        g, u = _halves(gate, up)
        rows, width = g.shape
        block = _block_size(width)
        y = g.new_empty(rows, width)
        _swiglu[rows, triton.cdiv(width, block)](
            Gate=g, Up=u, Y=y,
            gate_row=g.stride(0), up_row=u.stride(0), width=width,
            BLOCK=block, WIDE=wide_tl(y.dtype), num_warps=WARPS)
        return y.view(*gate.shape[:-1], width)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        g, u = _halves(gate, up)
        rows, width = g.shape
        block = _block_size(width)
        # The gradients lie as their inputs do: two tensors, or the halves of one.
        dgate = gate.new_empty(gate.shape)
        dup = None if up is None else up.new_empty(up.shape)
        dg, du = _halves(dgate, dup)
        _swiglu_backward[rows, triton.cdiv(width, block)](
            Gate=g, Up=u, DY=as_rows(dy).contiguous(), DGate=dg, DUp=du,
            gate_row=g.stride(0), up_row=u.stride(0),
            dgate_row=dg.stride(0), dup_row=du.stride(0), width=width,
            BLOCK=block, WIDE=wide_tl(g.dtype), num_warps=WARPS)
        return dgate, dup


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        size = x.numel()
        block = _block_size(size)
        _relu2[(triton.cdiv(size, block),)](
            X=x, Y=y, size=size, BLOCK=block, WIDE=wide_tl(x.dtype), num_warps=WARPS)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        dx = torch.empty_like(x)
        size = x.numel()
        block = _block_size(size)
        _relu2_backward[(triton.cdiv(size, block),)](
            X=x, DY=dy.contiguous(), DX=dx, size=size,
            BLOCK=block, WIDE=wide_tl(x.dtype), num_warps=WARPS)
        return dx


def swiglu(gate, up=None):
    """silu(gate) * up. gate, up (..., F) of one dtype; with up None gate is (..., 2F), both side by side.
    Returns (..., F) in that dtype."""
    if on_triton(gate):
        return _SwiGLU.apply(gate, up)
    if up is None:
        gate, up = gate.chunk(2, -1)
    return reference(gate, up)


def relu2(x):
    """relu(x)^2 of x (...), in its dtype."""
    return _Relu2.apply(x) if on_triton(x) else reference_relu2(x)
