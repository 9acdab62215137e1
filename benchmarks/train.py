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
import presets  # noqa: E402
from model import Arch, Init, Model, flops_per_token, read_config, save  # noqa: E402
from runtime import grad_norm, join_ranks, reduce_vectors, scale_gradients, shard  # noqa: E402

B, T = 16, 256
SIZES = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=704, vocab_size=4096, bos_token_id=0, eos_token_id=0, pad_token_id=0)
HYBRID = dict(shared_intermediate_size=704, mamba_n_heads=16, attention_multiplier=0.0156, logits_scaling=8.0)
CONFIGS = {
    "dense": presets.read("toy-llama") | SIZES,
    "hybrid, chunk_size 256": presets.read("toy-granite-4-h") | SIZES | HYBRID | dict(mamba_chunk_size=256),
    "hybrid, chunk_size 32": presets.read("toy-granite-4-h") | SIZES | HYBRID | dict(mamba_chunk_size=32),
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


def ours(folder, cfg, ranks):
    """A function that runs one step of ours and returns its loss."""
    init = Init(folder)
    with torch.device("meta"):
        model = Model(init.arch)
    shard(model, ranks.mesh, midtrain.DTYPES[cfg.dtype]).to_empty(device=ranks.device)
    init.fill(model)
    optimizer = midtrain.make_optimizer(model, cfg)
    parameters = list(model.parameters())

    def step(tokens, targets):
        loss = model(tokens, None, targets) / targets.numel()
        loss.backward()
        reduce_vectors(parameters)
        norm = grad_norm(parameters, ranks.mesh)
        if norm > cfg.clip:
            scale_gradients(parameters, cfg.clip / norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())
    return step


def theirs(folder, cfg, device):
    """The same of transformers."""
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
    """(seconds, value) of f(*args)."""
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
    with join_ranks(device) as ranks:
        while (message := pipe.recv()) != "end":
            if message != "step":
                _, folder, dtype = message
                cfg = midtrain.Config(dtype=dtype, lr=1e-4)
                step = ours(folder, cfg, ranks) if side == "ours" else theirs(folder, cfg, ranks.device)
                generator = torch.Generator().manual_seed(1)
                rows = torch.randint(0, 4096, (B, T + 1), generator=generator).to(ranks.device)
                tokens = rows[:, :-1].contiguous()
                targets = rows[:, 1:].contiguous()
                pipe.send("ready")
            else:
                pipe.send(clock(step, tokens, targets))


def compare(name, dtype, pipes, device, repeats=9):
    """Prints a line of the table. pipes: to ours and to transformers."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, dtype=midtrain.DTYPES[dtype], device=device)
    seconds = ([], [])                                    # of a step, a list a side
    losses = ([], [])
    product_seconds = []
    with tempfile.TemporaryDirectory() as tmp:
        arch: Arch = fresh(CONFIGS[name], os.path.join(tmp, "m"))
        for pipe in pipes:
            pipe.send(("build", os.path.join(tmp, "m"), dtype))
            pipe.recv()
    for i in range(repeats + 2):                          # two to warm up
        for side, pipe in enumerate(pipes):
            pipe.send("step")
            step_seconds, loss = pipe.recv()
            losses[side].append(loss)
            if i >= 2:
                seconds[side].append(step_seconds)
        product_seconds.append(clock(lambda: a @ a)[0])
    first_ours, first_theirs = losses[0][0], losses[1][0]
    bound = 1e-3 if dtype == "bfloat16" else 1e-5
    if abs(first_ours - first_theirs) > bound * first_theirs:
        sys.exit(f"{name} {dtype}: first losses {first_ours} and {first_theirs} differ: not the same "
                 f"computation")
    ours_ms, theirs_ms = [statistics.median(s) * 1e3 for s in seconds]
    tokens_per_second = B * T / ours_ms * 1e3
    rate = 2 * n ** 3 / min(product_seconds)              # FLOP/s
    share = flops_per_token(arch, T, (T + 1) / 2) * tokens_per_second / rate
    print(f"{name:22s} {dtype:8s}  {ours_ms:6.0f} ms  {theirs_ms:6.0f} ms  {theirs_ms / ours_ms:5.2f}  "
          f"{tokens_per_second:7.0f} tok/s  {share:4.0%} of {rate / 1e12:.2f} TFLOP/s", flush=True)


if __name__ == "__main__":
    import transformers
    flags = dict(flag.lstrip("-").split("=") for flag in sys.argv[1:])
    device = flags.get("device", "cpu")
    spawn = multiprocessing.get_context("spawn")
    pipes = []
    for side in ("ours", "transformers"):
        pipe, workers_end = spawn.Pipe()
        spawn.Process(target=worker, args=(workers_end, side, device), daemon=True).start()
        pipes.append(pipe)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} "
          f"threads, {B} x {T} tokens a step\n{'':32s}  {'ours':9s}  {'theirs':9s}  ratio")
    for dtype in ("bfloat16", "float32"):
        for name in CONFIGS:
            compare(name, dtype, pipes, device)
    for pipe in pipes:
        pipe.send("end")
