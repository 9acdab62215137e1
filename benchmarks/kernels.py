"""Kernels beside what the card gives and beside plain torch, torch.compile, Liger, flash-linear-attention
(fla) and mamba-ssm: the seven models' sizes, 8,192 tokens, bf16, forward and backward. Needs a CUDA GPU.

    make gpu                                      # the GPU tests, then this: benchmarks/results/kernels.md
    python benchmarks/kernels.py --only=norm,loss --out=FILE               # some files of kernels/

First the floors, in the same run: a copy within the card's memory, a bf16 matrix product. Every size is
compared with its definition in float64 before it is timed (||ours - exact|| / ||exact||, the worst of outputs
and gradients) and run twice for the same bits; a peer over 5 % off does something else and is not timed.
Times are medians of CUDA events, the caches refilled before each forward and each backward pass, with the GPU
kept waiting until Python has its launches ready. GB/s counts what must be read and written once; FLOP are
2MVD forward and 6MVD backward (cross-entropy: 6MVD, all forward), the scan's those of 256 tokens a chunk. A
peer's cell: its forward + backward, then how many times as long as ours each takes (the losses': the whole).
torch.compile gets an op's first size only, more would cost minutes.

Peers are optional: what does not import or run stands in the table with its reason. For a machine that
installs nothing they are carried in a folder of the repository that git ignores:

    pip install --no-deps --no-compile --target peers liger-kernel==0.8.5 fla-core==0.6.0 \\
        flash-linear-attention==0.6.0 einops packaging
    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-deps --no-compile --target peers \\
        --no-build-isolation mamba-ssm==2.3.2.post1   # its Triton part; wants torch, setuptools, wheel
"""

import argparse
import functools
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
import types
from datetime import date
from typing import NamedTuple

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
sys.path.append(os.path.join(ROOT, "peers"))

import kernels  # noqa: E402
from kernels import act, conv1d, logprob, loss, norm, rope, ssd  # noqa: E402

DEVICE, TOKENS, EPS = "cuda", 8192, 1e-5
BARS, PAIR, STRETCH = (0.85, 0.70), 64, 50               # shares of the copy's rate; ms
BLANK = "not yet measured"


class Case(NamedTuple):
    size: str
    inputs: object                # (tokens, device) -> the op's tensors; those that want gradients get them
    work: tuple                   # forward, backward: bytes or FLOP at TOKENS
    options: dict = {}            # the op's other arguments


class Op(NamedTuple):
    file: str                     # of kernels/
    title: str
    ours: object
    exact: object                 # the definition, given float64
    peers: dict                   # name -> function like ours, "torch": ours by another path, COMPILE,
                                  # or why there is none
    cases: list
    seconds: int                  # after which peers are left out
    floor: str = "copy"           # or "matmul"
    check: int = TOKENS           # tokens of the comparison with float64


# -- inputs ------------------------------------------------------------------------------------------------

def normal(*shape, device, grad=True, dtype=torch.bfloat16, scale=1.0):
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_(grad)


def like(*shapes):
    """Inputs of these shapes; "M" stands for the tokens."""
    def make(tokens, device):
        return [normal(*[tokens if n == "M" else n for n in shape], device=device) for shape in shapes]
    return make


def heads(H, K, D):
    def make(tokens, device):
        powers = 1e4 ** -torch.arange(0, 1, 2 / D, device=device)
        angles = torch.arange(tokens, device=device)[None, :, None, None] * powers
        table = [f(angles).bfloat16() for f in (torch.cos, torch.sin)]
        return [normal(1, tokens, H, D, device=device), normal(1, tokens, K, D, device=device), *table]
    return make


def head(V, D):
    def make(tokens, device):
        return [normal(tokens, D, device=device), normal(V, D, device=device, scale=D ** -0.5),
                torch.randint(0, V, (tokens,), device=device)]
    return make


def scan(H, G, P=64, N=128):
    def make(tokens, device):
        dt = torch.exp(torch.rand(1, tokens, H, device=device) * 4.6 - 6.9)               # 0.001 .. 0.1
        A = -1 - 15 * torch.rand(H, device=device)
        return [normal(1, tokens, H, P, device=device), dt.requires_grad_(), A.requires_grad_(),
                normal(1, tokens, G, N, device=device), normal(1, tokens, G, N, device=device),
                normal(H, device=device, dtype=torch.float32)]
    return make


def moved(forward, backward, *widths):
    """Bytes of rows read and written, by passes over them in bf16."""
    return tuple(2 * TOKENS * sum(widths) * n for n in (forward, backward))


# -- ours and the peers, with one signature an op ----------------------------------------------------------

def liger(module, function, *args):
    module = importlib.import_module(f"liger_kernel.ops.{module}")
    return getattr(module, f"Liger{function}Function").apply(*args)


def liger_add(x, out, w, scale):
    y, s = liger("fused_add_rms_norm", "FusedAddRMSNorm", out if scale == 1 else out * scale, x, w, EPS)
    return s, y


def liger_rotate(q, k, cos, sin):
    q, k = liger("rope", "Rope", q.transpose(1, 2), k.transpose(1, 2),
                 *(torch.cat([z, z], -1)[:, :, 0] for z in (cos, sin)))
    return q.transpose(1, 2), k.transpose(1, 2)


def liger_loss(h, w, targets):
    return liger("fused_linear_cross_entropy", "FusedLinearCrossEntropy", h, w, targets, None, None,
                 -100, 0.0, 0.0, "sum", None, False, torch.float32)[0]     # sums the head's gradient in fp32


def liger_logprobs(h, w, targets):
    nll, entropy = liger("fused_linear_scaled_cross_entropy", "FusedLinearScaledCrossEntropy", h, w, targets,
                         1.0, -100, 1, True)
    return -nll, entropy


def fla_gated(x, gate, w, groups):
    from fla.modules.norm.layernorm_gated import rmsnorm_fn
    return rmsnorm_fn(x, w, None, gate, EPS, x.shape[-1] // groups, norm_before_gate=False)


def fla_conv(x, w, bias):
    from fla.modules.causal_conv1d import causal_conv1d
    return causal_conv1d(x, w[:, 0], bias, activation="silu")[0]


def fla_scan(x, dt, A, B, C, D):
    from fla.ops.simple_gla import chunk_simple_gla
    B, C = (z.repeat_interleave(x.shape[2] // z.shape[2], 2) for z in (B, C))
    y, _ = chunk_simple_gla(C, B, x * dt[..., None].to(x.dtype), dt * A, scale=1.0)
    return y + x * D[:, None].to(x.dtype)


def mamba_ssm(*args):
    if "mamba_ssm" not in sys.modules:      # its __init__ wants CUDA extensions that its Triton part does not
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None:
            raise ModuleNotFoundError("No module named 'mamba_ssm'")
        sys.modules["mamba_ssm"] = package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations)
    return ssd.ssd(*args, chunk=256)


COMPILE = "torch.compile"                   # of the definition
HEADS = [(131072, 4096), (131072, 5120), (128256, 4096), (100352, 2560), (100352, 2048), (49152, 4096),
         (32000, 4096)]                     # Nemotron-H; Mistral 24B; Llama; Granite 4; 4 H; 3.3; Mistral 7B


def mvd(forward, backward):
    return [Case(f"{V} x {D}", head(V, D), (forward * TOKENS * V * D, backward * TOKENS * V * D))
            for V, D in HEADS]


def scan_case(H, G, T=TOKENS, Q=256, P=64, N=128):
    flop = 2 * T * Q * (N * G + P * H) + 4 * T * P * N * H
    return Case(f"{H} heads, {G} group{'s' * (G > 1)}", scan(H, G), (flop, 2 * flop))


OPS = [                                   # in the order of their worth: the run may be cut
    Op("loss", "linear + cross-entropy", loss.linear_cross_entropy, loss.reference,
       {"torch": "torch", "F.linear_cross_entropy": lambda h, w, t: F.linear_cross_entropy(
           h, w, t, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()),
        COMPILE: COMPILE, "Liger": liger_loss}, mvd(6, 0), 45, "matmul", 3072),
    Op("logprob", "linear + log-prob + entropy", logprob.token_logprobs, logprob.reference,
       {"torch": "torch", "torch, 512 tokens a chunk": functools.partial(logprob.token_logprobs, chunk=512),
        COMPILE: COMPILE, "Liger": liger_logprobs}, mvd(2, 6), 50, "matmul", 3072),
    Op("norm", "RMSNorm", lambda x, w: norm.rms_norm(x, w, EPS), lambda x, w: norm.reference(x, w, EPS),
       {"torch": "torch", "F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, EPS), COMPILE: COMPILE,
        "Liger": lambda x, w: liger("rms_norm", "RMSNorm", x, w, EPS, 0.0, "llama", False)},
       [Case(f"{C}", like(("M", C), (C,)), moved(2, 3, C)) for C in (4096, 2048, 2560, 5120)], 30),
    Op("norm", "s = x + scale out, RMSNorm",
       lambda x, out, w, scale: norm.add_rms_norm(x, out, scale, w, EPS),
       lambda x, out, w, scale: norm.reference_add(x, out, scale, w, EPS),
       {"torch": "torch", COMPILE: COMPILE, "Liger": liger_add},
       [Case(f"{C}, scale {m:g}", like(("M", C), ("M", C), (C,)), moved(4, 4 + (m != 1), C), dict(scale=m))
        for C, m in ((4096, 1.0), (4096, 0.22), (2048, 0.22), (2560, 0.22), (5120, 1.0))], 30),
    Op("norm", "gated RMSNorm over groups",
       lambda x, gate, w, groups: norm.rms_norm(x, w, EPS, groups, gate),
       lambda x, gate, w, groups: norm.reference(x, w, EPS, groups, gate),
       {"torch": "torch", COMPILE: COMPILE, "fla": fla_gated},
       [Case(f"{C}, {G} group{'s' * (G > 1)}", like(("M", C), ("M", C), (C,)), moved(3, 5, C), dict(groups=G))
        for C, G in ((8192, 8), (4096, 1))], 25),
    Op("ssd", "state-space scan, 64 a head, state 128", ssd.ssd, lambda *z: ssd.recurrence(*z)[0],
       {"torch": "torch", COMPILE: "left out: a loop over chunks", "fla": fla_scan,
        "mamba-ssm": mamba_ssm}, [scan_case(128, 8), scan_case(64, 1)], 75, "matmul", 1024),
    Op("rope", "rotation of queries and keys", lambda *z: rope.rotate(*z),
       lambda q, k, cos, sin: (rope.reference(q, cos, sin), rope.reference(k, cos, sin)),
       {"torch": "torch", COMPILE: COMPILE, "Liger": liger_rotate},
       [Case(f"{H} + {K} heads of {D}", heads(H, K, D), moved(2, 2, H * D, K * D))
        for H, K, D in ((32, 8, 128), (40, 8, 64))], 20),
    Op("act", "SwiGLU", act.swiglu,
       lambda gate, up=None: act.reference(*(gate.chunk(2, -1) if up is None else (gate, up))),
       {"torch": "torch", COMPILE: COMPILE, "Liger": lambda *z: liger(
           "swiglu", "SiLUMul" if len(z) == 2 else "FusedGateUpSiLUMul", *z)},
       [Case(f"{C}", like(("M", C), ("M", C)), moved(3, 5, C)) for C in (14336, 12800, 32768)]
       + [Case("8192, one tensor", like(("M", 2 * 8192)), moved(3, 5, 8192))], 30),
    Op("act", "squared ReLU", act.relu2, act.reference_relu2,
       {"torch": "torch", COMPILE: COMPILE, "Liger": lambda x: liger("relu_squared", "ReLUSquared", x)},
       [Case("21504", like(("M", 21504)), moved(2, 3, 21504))], 10),
    Op("conv1d", "causal convolution, bias, SiLU", conv1d.causal_conv1d, conv1d.reference,
       {"torch": "torch", COMPILE: COMPILE, "fla": fla_conv},
       [Case(f"{C}", like((1, "M", C), (C, 1, 4), (C,)), moved(2, 3, C)) for C in (10240, 4352)], 30)]
CHOSEN = {"torch": "torch", "torch, 512 tokens a chunk": "torch", "mamba-ssm": "mamba-ssm"}  # kernels.chosen


# -- measurement -------------------------------------------------------------------------------------------

def several(x):
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def fresh(inputs, dtype=None):
    """Copies: a peer may overwrite what it is given."""
    return [x.detach().to(dtype if dtype and x.is_floating_point() else x.dtype, copy=True)
            .requires_grad_(x.requires_grad) for x in inputs]


def gradients(out, inputs, upstream):
    wanted = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(out, wanted, [g.to(y.dtype) for y, g in zip(out, upstream, strict=True)])


def compare(op, case, device, tokens):
    """Two functions: values(fn): its outputs and gradients; error(values)."""
    torch.manual_seed(0)
    inputs = case.inputs(tokens, device)
    with torch.no_grad():
        upstream = [torch.randn_like(y) for y in several(op.ours(*fresh(inputs), **case.options))]

    def values(fn, dtype=None):
        copies = fresh(inputs, dtype)
        out = several(fn(*copies, **case.options))
        grads = gradients(out, copies, [g.clone() for g in upstream]) if out[0].requires_grad else ()
        return [y.detach().clone() for y in out] + list(grads)

    exact = values(op.exact, torch.float64)

    def error(outputs):
        return max(((a.double() - b).norm() / b.double().norm().clamp_min(1e-30)).item()
                   for a, b in zip(outputs, exact, strict=True))
    return values, error


def measured(fn, inputs, options, seconds=0.25):
    """Milliseconds of forward and of backward, medians; bytes at the peak beyond the inputs."""
    inputs, upstream, cache = fresh(inputs), [], torch.zeros(1 << 26, device=DEVICE)

    def once():
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]

        def timed(step, work):
            cache.sum()                               # read, not written: nothing is left to write back
            torch.cuda._sleep(4_000_000)              # 2 ms, while Python gets the launches ready
            marks[step].record()
            result = work()
            marks[step + 1].record()
            return result

        out = several(timed(0, lambda: fn(*inputs, **options)))
        if out[0].requires_grad:
            upstream.extend(torch.randn_like(y) for y in out[len(upstream):])
            timed(2, lambda: gradients(out, inputs, upstream))
        return marks if out[0].requires_grad else marks[:2]

    once()                                            # compiles, tunes
    torch.cuda.synchronize()
    held, start = torch.cuda.memory_allocated(), time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    once()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    runs = [once() for _ in range(min(15, max(3, int(seconds / (time.perf_counter() - start)))))]
    torch.cuda.synchronize()
    return [statistics.median(m[i].elapsed_time(m[i + 1]) for m in runs)
            for i in range(0, len(runs[0]), 2)], peak


def floors():
    """What the card gives: bytes a second of a copy, read and written; FLOP a second of bf16 8192^3."""
    a, b = (torch.zeros(1 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    x, y = (normal(8192, 8192, device=DEVICE, grad=False) for _ in range(2))
    (copy,), _ = measured(lambda a, b: b.copy_(a), [a, b], {})
    (matmul,), _ = measured(torch.mm, [x, y], {})
    return {"copy": 2e3 * a.numel() / copy, "matmul": 2e3 * 8192 ** 3 / matmul}


# -- the table ---------------------------------------------------------------------------------------------

def clock(ms):
    return f"{ms * 1e3:.0f} us" if ms < 10 else f"{ms:.1f} ms"


def verdict(op, case, times, shares, peers):
    """What was asked of this row, and whether it is met."""
    if op.floor == "copy":
        return ", ".join(f"{name} {bar:.0%} {'met' if share >= bar else 'MISSED'}" for name, share, bar in
                         zip(("forward", "backward"), shares, BARS, strict=False))
    if op.file == "logprob" and case is op.cases[0]:
        met = "MISSED" if sum(times) > PAIR else "met" + ", the stretch too" * (sum(times) <= STRETCH)
        return f"{sum(times):.1f} of {PAIR} ms {met}"
    if op.file == "ssd":
        them = peers.get("mamba-ssm", [math.nan])
        ratio = min(them[0] / times[0], sum(them) / sum(times))
        met = "unknown" if math.isnan(ratio) else "MISSED" if ratio < 1 else "met"
        return f"no slower than mamba-ssm: {met}" + ", the stretch too" * (ratio >= 1.5)
    return "-"


def beside(op, case, name, inputs, values, error):
    """A peer's times and memory, or an exception that says why there are none."""
    peer = op.peers[name]
    if peer == COMPILE:
        torch._dynamo.reset()
        peer = torch.compile(op.exact, dynamic=False)
    elif isinstance(peer, str) and peer != "torch":
        raise RuntimeError(peer)
    peer = op.ours if peer == "torch" else peer
    if name != COMPILE and not (off := error(values(peer))) <= 0.05:
        raise RuntimeError(f"something else, {off:.0%} off")
    return measured(peer, inputs, case.options)


def row(op, case, floor, deadline):
    values, error = compare(op, case, DEVICE, op.check)
    first = values(op.ours)
    proof = [f"{error(first):.1e}", "yes" if all(map(torch.equal, first, values(op.ours))) else "NO"]
    torch.manual_seed(0)
    inputs = case.inputs(TOKENS, DEVICE)
    ours, peak = measured(op.ours, inputs, case.options)
    peers = {}
    cells = []                                        # of the peers
    whole = op.file in ("loss", "logprob")
    for name in op.peers:
        if name == COMPILE and case is not op.cases[0] or time.perf_counter() > deadline:
            cells.append("first size only" if name == COMPILE else "no time left")
            continue
        kernels.chosen = CHOSEN.get(name, "auto")
        try:
            peers[name], memory = beside(op, case, name, inputs, values, error)
        except Exception as problem:                  # a peer's, whatever it is; one of ours ends the run
            reason = " ".join(f"{type(problem).__name__}: {problem}".removeprefix("RuntimeError: ").split())
            cells.append(reason.replace("|", "/")[:90])
            print(f"{op.title}, {case.size}, {name}: {reason[:600]}", file=sys.stderr, flush=True)
            continue
        finally:
            kernels.chosen = "auto"
        pairs = [(sum(peers[name]), sum(ours))] if whole else zip(peers[name], ours, strict=True)
        cells.append(" + ".join(map(clock, peers[name])) + ", " + " ".join(f"{b / a:.2f}x" for b, a in pairs)
                    + f", {memory / 1e9:.2f} GB" * whole)
    rates = [1e3 * work / ms for work, ms in zip(case.work, ours, strict=False) if work]
    shares = [rate / floor for rate in rates]
    unit, scale = ("GB/s", 1e9) if op.floor == "copy" else ("TFLOP/s", 1e12)
    both = [*map(clock, ours), "-"][:2], [f"{rate / scale:.0f} {unit}, {share:.0%}" for rate, share in
                                          zip(rates, shares, strict=True)] + ["-"]
    torch.cuda.empty_cache()
    return [both[0][0], both[1][0], both[0][1], both[1][1], verdict(op, case, ours, shares, peers), *proof,
            f"{peak / 1e9:.2f} GB", *cells]


def section(op, rows):
    share = f"rate, of the {'copy' if op.floor == 'copy' else 'matrix product'}"
    titles = ["size", "forward", share, "backward", share, "asked for", "error", "same bits", "peak memory"]
    lines = [[*titles, *op.peers], ["---"] * (len(titles) + len(op.peers)), *rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([f"## {op.file}: {op.title}", "", *lines, ""])


def write(out, head, sections):
    about = (f"{TOKENS:,} tokens, bf16; how it is measured and what the columns mean: the top of "
             f"`benchmarks/kernels.py`. Asked for: of a row kernel {BARS[0]:.0%} of the copy's rate forward, "
             f"{BARS[1]:.0%} backward; of linear + log-prob + entropy at 131072 x 4096 {PAIR} ms in all, "
             f"stretch {STRETCH}; of the scan to be no slower than mamba-ssm, stretch 1.5 times as fast.")
    with open(out, "w") as f:
        f.write("\n".join(["# Kernels beside their peers", "", head, "", about, "", *sections]))


def run(only, out):
    def stated(floor):
        return f"copy {floor['copy'] / 1e12:.2f} TB/s, matrix product {floor['matmul'] / 1e12:.0f} TFLOP/s"

    driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    start, sections, floor = time.perf_counter(), [], floors()
    head = (f"{date.today()}, {torch.cuda.get_device_name()}, driver {driver.splitlines()[0]}, torch "
            f"{torch.__version__}, triton {kernels.triton.__version__}. Floors: {stated(floor)}")
    print(head, flush=True)
    for op in OPS:
        if only and op.file not in only:
            continue
        begun = time.perf_counter()
        sections.append(section(op, [[case.size, *row(op, case, floor[op.floor], begun + op.seconds)]
                                     for case in op.cases]))
        print(f"\n{sections[-1]}{time.perf_counter() - begun:.0f} s of {op.seconds}", flush=True)
        if out:                                       # after every op: what is cut short keeps what it has
            write(out, head + ".", sections)
    head += f"; at the end {stated(floors())}; {time.perf_counter() - start:.0f} s in all."
    print(head)
    if out:
        write(out, head, sections)


if __name__ == "__main__":
    files = list(dict.fromkeys(op.file for op in OPS))
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"some of {','.join(files)}; written only with --out")
    parser.add_argument("--out", help="default: benchmarks/results/kernels.md, when all are measured")
    parser.add_argument("--blank", action="store_true", help="writes the table without figures")
    args = parser.parse_args()
    only = set(filter(None, args.only.split(",")))
    if only - set(files):
        parser.error(f"--only: there are {', '.join(files)}")
    out = args.out or ("" if only and not args.blank else f"{ROOT}/benchmarks/results/kernels.md")
    if args.blank:
        write(out, f"{BLANK.capitalize()}: `make gpu` on a machine with a CUDA GPU fills this file.", [
            section(op, [[case.size, *[BLANK] * (8 + len(op.peers))] for case in op.cases]) for op in OPS])
    elif not torch.cuda.is_available() or kernels.triton is None:
        print("benchmarks/kernels.py needs a CUDA GPU and Triton; this machine lacks one", file=sys.stderr)
        sys.exit(2)
    else:
        run(only, out)
