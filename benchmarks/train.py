"""A training step, ours against transformers: the same weights, the same batch, step by step in turn.

    make bench                                     # two CPU cores: about two minutes
    python benchmarks/train.py --device=cuda       # on a GPU (not yet measured)

A step is forward, loss, backward, global clipping, AdamW, on float32 master weights: ours sharded as in
midtrain.py (FSDP2, here over one process), transformers with SDPA attention under torch.autocast. Each side
is a process of its own, as it would be in use (one allocator's habits would colour the other); while one
steps the other waits. Medians. The share of the machine is FLOPs (every matrix product once, causal attention
halved, no recomputation) over the rate of a 1024^3 matrix product (GPU: 8192^3) timed between the steps.
transformers scans in chunks of the config's chunk_size: 256 in the hub's Granite-4-H, and beside it 32, its
best here; ours takes its own, the result is the same.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import midtrain  # noqa: E402
from model import Arch, Init, Model, _granite4, _hub, _mamba, flops_per_token, read_config, save  # noqa: E402
from runtime import grad_norm, join_ranks, reduce_vectors, shard  # noqa: E402

B, T = 16, 256
CONFIGS = {
    "dense": _hub("llama", "LlamaForCausalLM", 256, 4, 4, 2, 704, 4096, (0, 0, 0), rms_norm_eps=1e-5,
                  rope_theta=1e4, tie_word_embeddings=True, max_position_embeddings=4096),
} | {
    f"hybrid, chunk_size {chunk}": _hub(
        "granitemoehybrid", "GraniteMoeHybridForCausalLM", 256, 4, 4, 2, 704, 4096, (0, 0, 0),
        **_granite4(["mamba", "mamba", "attention", "mamba"], "nope"), **_mamba(16, 32, 32, 1, chunk),
        attention_multiplier=0.0156, logits_scaling=8.0) for chunk in (256, 32)
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
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="sdpa").to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps,
                                  cfg.weight_decay, fused=True)

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


def worker(pipe, side, device):
    """Serves one side: ("build", folder, dtype) makes its model, "step" runs a step and answers
    (seconds, loss)."""
    if side == "transformers":
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    with join_ranks(device) as me:
        while (message := pipe.recv()) != "end":
            if message != "step":
                _, folder, dtype = message
                cfg = midtrain.Config(dtype=dtype, lr=1e-4)
                step = ours(folder, cfg, me) if side == "ours" else theirs(folder, cfg, me.device)
                row = torch.randint(0, 4096, (B, T + 1),
                                    generator=torch.Generator().manual_seed(1)).to(me.device)
                pipe.send("ready")
            else:
                pipe.send(clock(step, row[:, :-1].contiguous(), row[:, 1:].contiguous()))


def compare(name, dtype, pipes, device, repeats=9):
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, dtype=midtrain.DTYPES[dtype], device=device)
    times, losses, products = ([], []), ([], []), []
    with tempfile.TemporaryDirectory() as tmp:
        arch: Arch = fresh(CONFIGS[name], os.path.join(tmp, "m"))
        for pipe in pipes:
            pipe.send(("build", os.path.join(tmp, "m"), dtype))
            pipe.recv()
    for i in range(repeats + 2):                          # two to warm up
        for side, pipe in enumerate(pipes):
            pipe.send("step")
            took, loss = pipe.recv()
            losses[side].append(loss)
            if i >= 2:
                times[side].append(took)
        products.append(clock(lambda: a @ a)[0])
    ms = [statistics.median(t) * 1e3 for t in times]
    rate = 2 * n ** 3 / min(products)
    share = flops_per_token(arch, T, (T + 1) / 2) * B * T / ms[0] * 1e3 / rate
    if abs(losses[0][0] - losses[1][0]) > (1e-3 if dtype == "bfloat16" else 1e-5) * losses[1][0]:
        sys.exit(f"{name} {dtype}: first losses {losses[0][0]} and {losses[1][0]} differ: not the same "
                 f"computation")
    print(f"{name:22s} {dtype:8s}  {ms[0]:6.0f} ms  {ms[1]:6.0f} ms  {ms[1] / ms[0]:5.2f}  "
          f"{B * T / ms[0] * 1e3:7.0f} tok/s  {share:4.0%} of {rate / 1e12:.2f} TFLOP/s", flush=True)


if __name__ == "__main__":
    device = dict(a.lstrip("-").split("=") for a in sys.argv[1:]).get("device", "cpu")
    import transformers
    spawn, pipes = multiprocessing.get_context("spawn"), []
    for side in ("ours", "transformers"):
        here, there = spawn.Pipe()
        spawn.Process(target=worker, args=(there, side, device), daemon=True).start()
        pipes.append(here)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} "
          f"threads, {B} x {T} tokens a step\n{'':32s}  {'ours':9s}  {'theirs':9s}  ratio")
    for dtype in ("bfloat16", "float32"):
        for name in CONFIGS:
            compare(name, dtype, pipes, device)
    for pipe in pipes:
        pipe.send("end")
