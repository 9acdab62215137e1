"""One op a file. First the definition in plain torch (`reference`: the oracle of everything else), then what
a CPU runs, then the Triton kernels that a GPU runs, then one public function that picks by device.

`--kernels` decides: auto = Triton on a GPU, plain torch on a CPU; torch = plain torch everywhere; mamba-ssm
= as auto, and the state-space scan from that package. Under torch.compile the plain formulas run, which
Inductor fuses itself. With TRITON_INTERPRET=1 set before Python starts, Triton's interpreter runs the kernels
on CPU tensors: slow, exact in fp32 and fp64, and how the tests prove them without a GPU.

In a Triton kernel a name with a capital is a pointer (X) or is known when the kernel is compiled (BLOCK:
constexpr). x_row and the like are strides, in elements. WIDE is the type that sums are made in.
"""

import os

import torch

try:
    import triton
    import triton.language as tl
    jit, constexpr = triton.jit, tl.constexpr
except ImportError:                                # none for this system (macOS), so no GPU that wants it
    triton = tl = constexpr = None

    def jit(kernel):
        return kernel

CHOICES = ("auto", "torch", "mamba-ssm")
INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
chosen = "auto"                                    # set by model.choose_kernels, once a process


def on_triton(x):
    """Whether an op on this tensor runs its Triton kernels."""
    if triton is None or chosen == "torch" or torch.compiler.is_compiling():
        return False
    return x.is_cuda or INTERPRET or chosen == "compile only"                     # the last: tests/aot.py


def wide(dtype):
    """What sums are made in: fp32 at least; float64 stays."""
    return torch.promote_types(dtype, torch.float32)


def wide_tl(dtype):
    """The same as a Triton type, for a kernel's WIDE argument."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def channels_adjacent(x):
    """x, or a copy where its last dimension is not the one side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rows(x):
    """x (..., C) as (rows, C), without a copy where one stride says how rows follow each other."""
    return channels_adjacent(x.reshape(-1, x.shape[-1]))


# -- what the Triton kernels of all files write the same way ------------------------------------------------
# tl.store rounds to the tensor's dtype by itself.

@jit
def program(axis: constexpr):
    """This program's place along an axis of the grid, in 64 bits: times a stride it may pass 2^31."""
    return tl.program_id(axis).to(tl.int64)


@jit
def columns(axis: constexpr, BLOCK: constexpr):
    """The BLOCK numbers that are this program's along an axis of the grid."""
    return tl.program_id(axis) * BLOCK + tl.arange(0, BLOCK)


@jit
def load_wide(pointers, mask, WIDE: constexpr):
    """What the pointers point at, in WIDE; 0 where the mask is not set."""
    return tl.load(pointers, mask, 0.0).to(WIDE)
