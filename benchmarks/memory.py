"""The memory of a training step, traced, beside what --dry_run says of it.

    python benchmarks/memory.py                                     # writes docs/memory.md: ten minutes
    python benchmarks/memory.py --model=llama-3.1-8b --shard=8      # one trace, of any flags of midtrain.py
    python benchmarks/memory.py rl --model=llama-3.1-8b --shard=8   # and of rl.py

No GPU is needed and none is used: tests/pretend_cuda has tensors of device cuda without data. The step is
that of midtrain.main at real sizes: FSDP2 on a process group of one process that stands for all, two
micro-batches, so that gradients of the first are there during the second, clipping, AdamW. A meter counts the
bytes of all live storages. What it cannot see --dry_run adds by assumption: the CUDA context, NCCL's buffers,
what the allocator loses. g++ is needed, once.
"""

import json
import sys
import textwrap
import time
import types
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pretend_cuda")]

import pretend  # noqa: E402  (before torch)
import torch  # noqa: E402

import midtrain  # noqa: E402
import presets  # noqa: E402
import rl  # noqa: E402
from cli import parse, write_atomic  # noqa: E402
from model import preset  # noqa: E402
from planning import rollouts  # noqa: E402

SEVEN = [name for name in presets.names() if not presets.is_toy(name)]
MODES = ("off", "selective", "full")
PASSES = 2                                      # micro-batches of a traced step


def trace(cfg):
    """{"peak": bytes of a rank, "planned": --dry_run's sum, "moment": where it has the peak, "moved":
    {collective: bytes of a rank in the step}}."""
    world = cfg.replicate * cfg.shard
    cfg = replace(cfg, batch=world * cfg.micro_batch * PASSES)
    moment, parts = midtrain.training_memory(cfg, world).peak()
    with pretend.ranks(cfg.replicate, cfg.shard) as ranks, pretend.cuda() as meter:
        model = midtrain.build_model(preset(cfg.model), cfg, ranks)
        optimizer = midtrain.make_optimizer(model, cfg)
        shape = PASSES * cfg.micro_batch, cfg.seq_len
        batch = [torch.zeros(shape, dtype=torch.int64, device="cuda") for _ in range(3)]
        meter.peak = meter.now                            # without what it took to build the model
        meter.moved.clear()
        lengths = [cfg.seq_len] * cfg.micro_batch         # a document a row
        pretend.training_step(model, optimizer, batch, lengths, ranks)
        moved = {f"{kind} {dtype}": size for (kind, dtype), size in meter.moved.items()}
    return {"peak": meter.peak, "planned": sum(parts.values()), "moment": moment, "moved": moved}


def rl_trace(cfg):
    """As `trace`, of RL's update without an engine: the reference scores a row, the policy trains on two; and
    "scoring", bytes while a row is scored."""
    world = cfg.replicate * cfg.shard
    cfg = replace(cfg, replay="samples.jsonl")
    plan = rollouts.plan_memory(cfg, world, 80e9)
    with pretend.ranks(cfg.replicate, cfg.shard) as ranks, pretend.cuda() as meter:
        init = types.SimpleNamespace(arch=preset(cfg.model), fill=lambda model: model)
        model = rl.make_policy(init, None, cfg, ranks)
        optimizer = rl.make_optimizer(model, cfg)
        reference = rl.copy_weights(model, cfg.ref_offload)
        tokens = torch.zeros(1, cfg.row_tokens or cfg.context, dtype=torch.int64, device="cuda")
        ids = tokens[0, 1:]                               # every token but the first is predicted
        log_probs = torch.zeros(len(ids), device="cuda")
        row = rl.Row(tokens, tokens, ids, ids, ids, log_probs, [tokens.shape[1]])
        meter.peak = meter.now
        with rl.reference_weights(reference, model):
            scores = rl.score_rows(model, [row], cfg.temperature)[0]
        scoring = meter.peak
        for last in (False, True):
            model.set_requires_all_reduce(last)
            logp, entropy = rl.row_logprobs(model, row, cfg.temperature)
            loss, metrics = rl.grpo_loss(logp, logp.detach(), row.gen, scores, log_probs, log_probs == 0, cfg,
                                         log_probs)
            loss.backward()
            del loss, logp, entropy
        optimizer.step()
    return {"peak": meter.peak, "planned": sum(plan.training.values()), "moment": plan.moment,
            "scoring": scoring, "scoring_planned": plan.scoring}


# -- docs/memory.md ------------------------------------------------------------------------------------------

def document(rows, rl_rows, seconds):
    """The text of docs/memory.md. rows: [(model, mode, micro_batch, trace)]; rl_rows: [(model, rl_trace)]."""
    worst = max(abs(result["planned"] / result["peak"] - 1) for *_, result in rows)
    peaks = []
    for model, mode, micro_batch, result in rows:
        off = result["planned"] / result["peak"] - 1
        peaks.append(f"| {model} | {mode} | {micro_batch} | {result['peak'] / 1e9:.2f} | "
                     f"{result['planned'] / 1e9:.2f} | {off:+.1%} | {result['moment']} |")
    updates = []
    for model, result in rl_rows:
        off = result["planned"] / result["peak"] - 1
        updates.append(f"| {model} | {result['scoring'] / 1e9:.2f} | {result['scoring_planned'] / 1e9:.2f} | "
                       f"{result['peak'] / 1e9:.2f} | {result['planned'] / 1e9:.2f} | {off:+.1%} | "
                       f"{result['moment']} |")
    bytes_moved = []
    for model, mode, micro_batch, result in rows:
        if (mode, micro_batch) == ("full", 1):
            gathered = result["moved"]["allgather_base bfloat16"] / PASSES
            reduced = result["moved"]["reduce_scatter_base float32"] / PASSES
            bytes_moved.append(f"| {model} | {gathered / 1e9:.1f} | {reduced / 1e9:.1f} | "
                               f"{16 * (gathered + reduced) / 1e9:,.0f} |")
    date = time.strftime("%d %B %Y")
    about = (
        "Traced on pretend CUDA tensors, **not measured on a GPU** (`python benchmarks/memory.py`, "
        f"{date}, torch {torch.__version__}, {seconds / 60:.0f} minutes of a shared core): a step of "
        f"midtrain.py at real size, FSDP2 over 8 ranks, {PASSES} micro-batches of 1 or 2 rows of 8,192 "
        "tokens, bfloat16, AdamW. GB are 10^9 bytes of live storages of one rank at the step's peak. "
        "`--dry_run` reckons them from what each op keeps and from the order in which FSDP2 gathers, "
        f"frees and reduces (`TrainingMemory` in planning/memory.py); here it is off by {worst:.1%} at most. "
        "In neither number, and added by `--dry_run` as assumptions: the CUDA context (0.5 GB), NCCL's "
        "buffers (0.27 GB a communicator: 32 channels, to send and to receive, NCCL_BUFFSIZE's 4 MiB), "
        "and 5 % for what the allocator loses to fragmentation.")
    update = (
        "The reference scores a row of 16,384 tokens without gradients, the policy trains on two such "
        "rows, with full recomputation, on 8 ranks, without an engine and with the fp32 reference on the "
        "GPU; every token is predicted.")
    collectives = (
        "Bytes of one rank: what a gather gives it, what it puts into a reduction; the same in every "
        "mode. A layer is gathered for its forward and for its backward pass, an untied head and an "
        "embedding once. A step of the default batch on 8 GPUs is 16 passes; the gradients of vectors, "
        "a few MB a step, are not counted.")
    return "\n".join([
        "# Memory of a training step: traced, and by `--dry_run`",
        "",
        textwrap.fill(about, 124),
        "",
        "| model | recompute | rows | traced GB | dry run GB | off by | the peak is |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *peaks,
        "",
        "## RL's update",
        "",
        textwrap.fill(update, 124),
        "",
        "| model | scoring: traced GB | dry run | training: traced GB | dry run | off by | the peak is |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *updates,
        "",
        "## Collectives",
        "",
        textwrap.fill(collectives, 124),
        "",
        "| model | gathered a pass, GB in bf16 | reduced a pass, GB in fp32 | both a step, GB |",
        "| --- | --- | --- | --- |",
        *bytes_moved,
        ""])


def main():
    if sys.argv[1:2] == ["rl"]:
        cfg = parse(rl.Config, sys.argv[2:], rl.recipe)
        print(json.dumps(rl_trace(replace(cfg, shard=cfg.shard or 1))))
        return
    if len(sys.argv) > 1:
        cfg = parse(midtrain.Config, recipe=midtrain.recipe)
        print(json.dumps(trace(replace(cfg, shard=cfg.shard or 1))))
        return
    rows = []
    start = time.time()
    for model in SEVEN:
        for mode in MODES:
            for micro_batch in (1, 2):
                cfg = midtrain.Config(model=model, shard=8, recompute=mode, micro_batch=micro_batch)
                result = trace(cfg)
                rows.append((model, mode, micro_batch, result))
                print(model, mode, micro_batch, f"{result['peak'] / 1e9:.2f} GB traced, "
                      f"{result['planned'] / 1e9:.2f} planned, {time.time() - start:.0f} s", flush=True)
    rl_rows = [(model, rl_trace(rl.Config(model=model, shard=8))) for model in SEVEN]
    write_atomic(str(ROOT / "docs" / "memory.md"), document(rows, rl_rows, time.time() - start))


if __name__ == "__main__":
    main()
