"""Compiles the Triton kernels for a GPU that need not be there, and reads what the compiler made of them.

    python tests/aot.py [sm_90 sm_80 sm_100]        the table: registers, stack, shared memory, instructions

The public functions themselves are called, at the seven models' sizes, on tensors of torch's meta device;
their launches are compiled as Triton's launcher would for the same arguments, and not started. So what is
checked is what a GPU would run: no second list of signatures and block sizes that could differ.
"""

import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import kernels  # noqa: E402

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


class Kernel(NamedTuple):
    """One launch, compiled."""
    name: str
    sizes: str                 # its block sizes and other compile-time numbers
    dtypes: str                # of the tensors it is given
    warps: int
    registers: int             # a thread
    stack: int                 # bytes a thread: spills, or arrays the compiler could not keep in registers
    shared: int                # bytes a block
    sass: dict                 # instruction (without its suffixes' types) -> how many

    def count(self, pattern):
        return sum(n for op, n in self.sass.items() if re.match(pattern, op))


class _Compiler:
    """What Triton asks a driver before it launches."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch                                   # Triton keeps what it compiled by device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


def compiled(arch, work):
    """[Kernel] of every launch that work() makes, in order, each once."""
    launches = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in launches:
            arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
            tensors = {str(v.dtype) for v in arguments.values() if isinstance(v, torch.Tensor)}
            dtypes = " ".join(sorted(tensors)).replace("torch.", "").replace("bfloat", "bf")
            sizes = {k: v for k, v in arguments.items() if k.isupper() and isinstance(v, int)}
            launches[kernel.hash] = kernel, dtypes, sizes
        return kernel

    chosen = kernels.chosen
    active = driver._active
    kernels.chosen = "compile only"
    JITFunction.run = compile_only
    driver.set_active(_Compiler(arch))
    try:
        work()
    finally:
        JITFunction.run = run
        kernels.chosen = chosen
        driver.set_active(active)
    return [_read(*f) for f in launches.values()]


def _read(kernel, dtypes, sizes):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        used, sass = (subprocess.run([os.path.join(TOOLS, "cuobjdump"), flag, f.name], text=True, check=True,
                                     capture_output=True).stdout for flag in ("-res-usage", "-sass"))
    number = {k: int(re.search(rf"{k}:(\d+)", used)[1]) for k in ("REG", "STACK", "LOCAL")}
    ops = {}
    for op in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M):
        ops[op] = ops.get(op, 0) + 1
    return Kernel(kernel.name, " ".join(f"{k.lower()}={v}" for k, v in sizes.items()),
                  dtypes, kernel.metadata.num_warps, number["REG"], number["STACK"] + number["LOCAL"],
                  kernel.metadata.shared, ops)


def tensor(*shape, dtype=torch.bfloat16, grad=True):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad and dtype.is_floating_point)


def both(op, *inputs, **options):
    """Forward and backward, of all outputs at once."""
    out = op(*inputs, **options)
    out = [y for y in (out if isinstance(out, tuple) else (out,)) if y.requires_grad]
    torch.autograd.backward(out, [torch.empty_like(y) for y in out])


# -- the launches of the seven models, 8,192 tokens ---------------------------------------------------------

def act():
    from kernels.act import relu2, swiglu
    for width in (8192, 12800, 14336, 32768):              # Granite 4, 3.3; Llama and Mistral 7B; 24B
        both(swiglu, tensor(8192, width), tensor(8192, width))
    both(swiglu, tensor(8192, 2 * 8192))                   # Granite 4: one tensor
    both(relu2, tensor(8192, 21504))                       # Nemotron-H


def ssd():
    from kernels.ssd import ssd, step
    for H, G in ((64, 1), (128, 8)):                       # Granite 4 h-micro, Nemotron-H
        width = H * 64 + 2 * G * 128
        x, B, C = tensor(1, 8192, width, grad=False).split([H * 64, G * 128, G * 128], -1)
        x, B, C = (z.unflatten(-1, (-1, k)).requires_grad_() for z, k in ((x, 64), (B, 128), (C, 128)))
        dt, A = tensor(1, 8192, H, dtype=torch.float32), tensor(H, dtype=torch.float32)
        docs = torch.empty(1, 8192, dtype=torch.int64, device="meta")
        both(ssd, x, dt, A, B, C, A, docs)
        with torch.no_grad():
            state = tensor(64, H, 64, 128, dtype=torch.float32)
            step(state, x[0, :64], dt[0, :64], A, B[0, :64], C[0, :64], A)


def ssd_otherwise():
    """Without documents; short, with states; fp32; a short prompt in fp32."""
    from kernels.ssd import ssd
    x, B, C = (tensor(1, 8192, heads, k) for heads, k in ((64, 64), (1, 128), (1, 128)))
    dt, A, docs = tensor(1, 8192, 64, dtype=torch.float32), tensor(64, dtype=torch.float32), tensor(
        1, 8192, dtype=torch.int64)
    both(ssd, x, dt, A, B, C, A)
    both(ssd, *(z.detach()[:, :100].requires_grad_() for z in (x, dt)), A,
         *(z.detach()[:, :100].requires_grad_() for z in (B, C)), A, docs[:, :100], last=True,
         initial=tensor(1, 64, 64, 128, dtype=torch.float32))
    both(ssd, *(z.detach().float().requires_grad_() for z in (x, dt, A, B, C, A)), docs)
    with torch.no_grad():
        short = [z[:, :32].float() for z in (x, dt, B, C)]
        ssd(*short[:2], A, *short[2:], A, last=True)


def conv1d():
    from kernels.conv1d import causal_conv1d, step
    docs = tensor(1, 8192, dtype=torch.int64)
    for E, conv in ((4096, 4352), (8192, 10240)):          # Granite-4-H-micro, Nemotron-H: x is a slice
        x = tensor(1, 8192, E + conv + E // 64)[..., E:E + conv]
        for ids in (None, docs):
            both(causal_conv1d, x, tensor(conv, 1, 4), tensor(conv), ids)
        step(tensor(64, 3, conv, grad=False), tensor(64, conv), tensor(conv, 1, 4), tensor(conv))


# vocabulary (49,159: a head with ids added), width
HEADS = ((32000, 4096), (49152, 4096), (49159, 4096), (100352, 2560), (128256, 4096), (131072, 5120))


def loss():
    from kernels.loss import linear_cross_entropy
    for V, C in HEADS:
        h, w, targets = tensor(8192, C), tensor(V, C), tensor(8192, dtype=torch.int64)
        both(linear_cross_entropy, h, w, targets, 0.1)
        with torch.no_grad():
            linear_cross_entropy(h, w, targets, 0.1)


def logprob():
    from kernels.logprob import token_logprobs
    for V, C in HEADS:
        h, w, targets = tensor(8192, C), tensor(V, C), tensor(8192, dtype=torch.int64)
        both(token_logprobs, h, w, targets, 0.1)
        both(lambda *inputs: token_logprobs(*inputs)[0], h, w, targets)        # an entropy that no loss uses


def norm():
    from kernels.norm import add_rms_norm, rms_norm
    for C in (2048, 2560, 4096, 5120):
        w = tensor(C, dtype=torch.float32)                 # vectors stay whole and fp32 (runtime.shard)
        both(rms_norm, tensor(8192, C), w, 1e-5)
        both(add_rms_norm, tensor(8192, C), tensor(8192, C), 0.22 if C < 4096 else 1.0, w, 1e-5)
    for C, groups in ((4096, 1), (8192, 8)):               # Granite 4 H, Nemotron-H: z begins in_proj's rows
        z = tensor(8192, 2 * C + 256 * groups + C // 64)[:, :C]
        both(rms_norm, tensor(8192, C), tensor(C, dtype=torch.float32), 1e-5, groups, z)


def rope():
    from kernels.rope import rotate
    for H, K, D in ((32, 8, 128), (40, 8, 64)):            # Granite 4 Micro: 64
        angles = tensor(1, 8192, 1, D // 2, grad=False)
        both(rotate, tensor(1, 8192, H, D), tensor(1, 8192, K, D), angles, angles)


OPS = {f.__name__: f for f in (act, conv1d, loss, logprob, norm, rope, ssd, ssd_otherwise)}


def table(compiled_kernels):
    lines = [f"{'kernel':24}{'warps':>6}{'registers':>10}{'stack':>6}{'shared':>8}{'128-bit':>8}{'tensor':>7}"
             "  sizes"]
    for k in compiled_kernels:
        vector = k.count(r"(LDG|STG|LDGSTS)\S*\.128|UTMA")
        lines.append(f"{k.name:24}{k.warps:6}{k.registers:10}{k.stack:6}{k.shared:8}{vector:8}"
                     f"{k.count(r'[A-Z]*MMA'):7}  {k.sizes}")
    return "\n".join(lines)


if __name__ == "__main__":
    for arch in sys.argv[1:] or ["sm_90"]:
        print(f"{arch}, triton {triton.__version__}")
        print(table([k for op in OPS.values() for k in compiled(int(arch.removeprefix("sm_")), op)]))
