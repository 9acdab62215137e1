"""A training step, ours against transformers: the same weights, the same batch, alternating in one process.

    python benchmarks/train.py                     # two CPU cores: about two minutes, needs transformers
    python benchmarks/train.py --device=cuda       # on a GPU (not yet measured)

A step is forward, loss, backward, global clipping, AdamW, on float32 master weights: ours sharded as in midtrain.py
(FSDP2 over however many processes there are, here one), transformers under torch.autocast with SDPA attention. Medians of
alternating steps; the share of the machine is FLOPs (every matrix product once, causal attention halved, no recomputation)
over the rate of a 1024^3 (GPU 8192^3) matrix product timed between the steps.
"""

import os
import statistics
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import midtrain  # noqa: E402
from model import Arch, Init, Model, _hub, _granite4, _mamba, flops_per_token, read_config, save  # noqa: E402
from runtime import grad_norm, ranks, reduce_vectors, shard  # noqa: E402

B, T = 16, 256
CONFIGS = {
    "dense": _hub("llama", "LlamaForCausalLM", 256, 4, 4, 2, 704, 4096, (0, 0, 0), rms_norm_eps=1e-5, rope_theta=1e4,
                  tie_word_embeddings=True, max_position_embeddings=4096),
    "hybrid": _hub("granitemoehybrid", "GraniteMoeHybridForCausalLM", 256, 4, 4, 2, 704, 4096, (0, 0, 0),
                   **_granite4(["mamba", "mamba", "attention", "mamba"], "nope"), **_mamba(16, 32, 32, 1, 32),
                   attention_multiplier=0.0156, logits_scaling=8.0),
}


def fresh(raw, folder):
    """Random weights of a config, saved in hub format for both sides."""
    torch.manual_seed(0)
    arch = read_config(raw)
    model = Model(arch)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.02 if "conv" not in name else 0.3)
            elif name.endswith("A_log"):
                p.copy_(torch.arange(1, len(p) + 1).log())
            elif name.endswith("dt_bias"):
                p.uniform_(-4, -1)
    save(model, folder)
    return arch


def ours(folder, cfg, me):
    init = Init(folder)
    with torch.device("meta"):
        model = Model(init.arch)
    shard(model, me.mesh, midtrain.DTYPES[cfg.dtype]).to_empty(device=me.device)
    init.fill(model)
    optimizer = midtrain.make_optimizer(model, cfg)
    parameters = list(model.parameters())

    def step(tokens, targets):
        loss = model(tokens, None, targets) / targets.numel()
        loss.backward()
        reduce_vectors(parameters)
        norm = grad_norm(parameters, me.mesh)
        if norm > cfg.clip:
            for p in parameters:
                p.grad.mul_(cfg.clip / norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())
    return step


def theirs(folder, cfg, device):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, cfg.weight_decay, fused=True)

    def step(tokens, targets):
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            loss = model(tokens, labels=tokens, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())
    return step


def clock(f, *args):
    start = time.perf_counter()
    value = f(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


def compare(name, dtype, me, repeats):
    cfg = midtrain.Config(dtype=dtype, lr=1e-4)
    n = 8192 if me.device.type == "cuda" else 1024
    a = torch.randn(n, n, dtype=midtrain.DTYPES[dtype], device=me.device)
    with tempfile.TemporaryDirectory() as tmp:
        arch: Arch = fresh(CONFIGS[name], os.path.join(tmp, "m"))
        sides = [ours(os.path.join(tmp, "m"), cfg, me), theirs(os.path.join(tmp, "m"), cfg, me.device)]
    row = torch.randint(0, arch.V, (B, T + 1), generator=torch.Generator().manual_seed(1)).to(me.device)
    tokens, targets = row[:, :-1].contiguous(), row[:, 1:].contiguous()
    times, losses, products = ([], []), ([], []), []
    for i in range(repeats + 2):                          # two to warm up
        for side, step in enumerate(sides):
            took, loss = clock(step, tokens, targets)
            losses[side].append(loss)
            if i >= 2:
                times[side].append(took)
        products.append(clock(lambda: a @ a)[0])
    ms = [statistics.median(t) for t in times]
    rate = 2 * n ** 3 / min(products)
    share = flops_per_token(arch, T, (T + 1) / 2) * B * T / ms[0] / rate
    print(f"{name:7s} {dtype:9s} ours {ms[0] * 1e3:7.0f} ms  transformers {ms[1] * 1e3:7.0f} ms  ratio {ms[1] / ms[0]:5.2f}  "
          f"{B * T / ms[0]:7.0f} tok/s  {share:4.0%} of {rate / 1e12:.2f} TFLOP/s  "
          f"first losses {losses[0][0]:.4f} {losses[1][0]:.4f}", flush=True)


if __name__ == "__main__":
    device = dict(a.lstrip("-").split("=") for a in sys.argv[1:]).get("device", "cpu")
    import transformers
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, {B} x {T}")
    with ranks(device) as me:
        for dtype in ("float32", "bfloat16"):
            for name in CONFIGS:
                compare(name, dtype, me, repeats=9)
