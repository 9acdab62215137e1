"""What rl.py --dry_run prints: memory of trainer and engine, the engine's cache, disk, hours.

cfg is rl.Config throughout, card the bytes of a GPU, world the ranks.
"""

import math
from typing import NamedTuple

import torch

from model import flops_per_token, keys_met, preset, total_parameters
from planning.memory import (
    CUDA_CONTEXT,
    HeadMemory,
    TrainingMemory,
    TrainingPass,
    attention_note,
    besides,
    card_bytes,
    changes_that_fit,
    layout_knobs,
    logits_bytes,
    memory_verdict,
    mfu_on_paper,
    needed_bytes,
    part_lines,
    refuse_oversized,
    sequence_bytes,
)

# What --dry_run assumes; none of it is measured here.

PROMPT_TOKENS = 256                      # of a prompt
VLLM_PASSES = 2e9                        # bytes of vLLM's share that its passes and CUDA graphs take
VLLM_ASLEEP = 1e9                        # bytes that it keeps while it sleeps
READ_RATE = 2.7e12                       # bytes a second that an H100 reads (its data sheet: 3.35e12)
PEAK_FLOPS = 989e12                      # a second, of an H100 in bf16
DISK_RATE = 2e9                          # bytes a second that all ranks write together
LINE_BYTES = 36                          # of samples.jsonl a token: its id, two log-probs, its text


class EnginePlan(NamedTuple):
    """The engines of a run, on paper. An engine is one model that samples."""
    engines: int                         # 0: none, a replay
    gpus: int                            # of each
    sampling: dict                       # {text: bytes} of a trainer's GPU while they sample
    training: dict                       # and while the policy trains
    cache: float                         # bytes of each GPU for keys, values and states
    sequence: float                      # bytes of each GPU that a sequence of --context takes

    def sequences(self, context_share=1.0):
        """Sequences of a share of --context that an engine's cache holds."""
        return max(0, int(self.cache // (self.sequence * context_share)))

    def can_sample(self):
        """Whether an engine's cache holds a sequence of --context; a replay has none."""
        return self.engines == 0 or self.sequences() > 0


def training_memory(cfg, world, fused_attention=False):
    """The `TrainingMemory` of the policy's passes on one of `world` ranks."""
    work = TrainingPass(
        arch=preset(cfg.model),
        rows=1,
        tokens_per_row=cfg.row_tokens or cfg.context,
        number=getattr(torch, cfg.dtype).itemsize,
        shards=world // cfg.replicate,
        recompute=cfg.recompute,
        fused_attention=fused_attention or cfg.dtype == "bfloat16")
    return TrainingMemory(work, logprob_memory(work))


def logprob_memory(work):
    """`HeadMemory` of kernels/logprob.py where every token of a row is predicted: it keeps the final norm's
    output at those tokens, and makes a chunk of logits in both passes; the head's gradient is V x C in fp32,
    then in the dtype of the passes."""
    arch, number = work.arch, work.number
    stream = number * work.tokens * arch.C
    logits = logits_bytes(arch, work.tokens, number)
    rounded = number if number < 4 else 0
    return HeadMemory(forward=stream + logits,
                      backward=2 * stream + logits + (4 + rounded) * arch.V * arch.C,
                      gathered_in_backward=True)


def reference_bytes(cfg, memory):
    """Of a rank's fp32 reference, wherever it is kept."""
    return memory.states()["weights, fp32, sharded"] if cfg.beta else 0


def plan_engines(cfg, world, card, held):
    """The `EnginePlan`. card: bytes of a GPU; held: bytes that a trainer's GPU holds while they sample."""
    arch = preset(cfg.model)
    number = getattr(torch, cfg.dtype).itemsize
    weights = number * total_parameters(arch)
    sequence = sequence_bytes(arch, cfg.context, number)
    if cfg.replay:
        return EnginePlan(0, 0, {}, {}, 0, sequence)
    if cfg.engine == "torch":
        whole = {"engine: whole weights": weights}
        cache = min(max(0, card - held - weights) / 2, cfg.max_batch * sequence)
        sampling = whole | {"engine: its cache, at most half of what is free": cache}
        return EnginePlan(world, 1, sampling, sampling if cfg.ahead else whole, cache, sequence)
    gpus = cfg.tensor_parallel
    share = cfg.gpu_memory * card
    cache = share - weights / gpus - VLLM_PASSES
    if cfg.layout == "beside":
        return EnginePlan(1, gpus, {}, {}, cache, sequence / gpus)
    sampling = {f"vLLM's share, --gpu_memory={cfg.gpu_memory}": share}
    training = sampling if cfg.ahead else {"vLLM asleep (assumed)": VLLM_ASLEEP}
    return EnginePlan(world // gpus, gpus, sampling, training, cache, sequence / gpus)


class MemoryPlan(NamedTuple):
    """Bytes of a trainer's GPU, {text: bytes}, and its engines."""
    moment: str                          # the peak of the policy's passes
    training: dict
    sampling: dict
    scoring: float                       # bytes: a pass without gradients takes less than one with them
    engines: EnginePlan

    def traced(self):
        """Bytes of the larger."""
        return max(sum(self.training.values()), sum(self.sampling.values()))


def plan_memory(cfg, world, card, fused_attention=False):
    """The `MemoryPlan` of a rank on a GPU of `card` bytes."""
    memory = training_memory(cfg, world, fused_attention)
    moment, passes = memory.peak()
    reference = {"reference, fp32, sharded": 0 if cfg.ref_offload else reference_bytes(cfg, memory)}
    states = memory.states() | reference
    engines = plan_engines(cfg, world, card, sum(states.values()) + CUDA_CONTEXT)
    scoring = memory.scoring() + sum(reference.values()) + sum(engines.training.values())
    return MemoryPlan(moment, passes | reference | engines.training, states | engines.sampling, scoring,
                      engines)


def fits(cfg, world, card):
    """Whether a GPU of `card` bytes holds trainer and engine, and the engine a sequence of --context."""
    memory = plan_memory(cfg, world, card)
    needed = needed_bytes(memory.traced(), cfg.replicate, world // cfg.replicate)
    return needed <= card and memory.engines.can_sample()


def changes(cfg, world, card):
    """Flags with which a GPU of `card` bytes holds trainer and engine, found by trying."""
    knobs = layout_knobs(cfg, world)
    if cfg.beta and not cfg.ref_offload:
        knobs["ref_offload"] = [True]
    if cfg.engine == "torch":
        knobs["engine"] = ["vllm"]
    else:
        knobs["gpu_memory"] = sorted((0.2, 0.3, 0.5, 0.6, 0.7, 0.8), key=lambda x: abs(x - cfg.gpu_memory))
        knobs["tensor_parallel"] = [n for n in (2, 4, 8) if n > cfg.tensor_parallel and world % n == 0]

    def fit(other):
        return fits(other, cfg.replicate * (other.shard or world // cfg.replicate), card)

    return changes_that_fit(cfg, knobs, fit)


def refuse_memory(cfg, ranks):
    """InputError where trainer and engine surely do not fit the GPU."""
    if ranks.device.type == "cuda":
        card = torch.cuda.get_device_properties(ranks.device).total_memory
        memory = plan_memory(cfg, ranks.world, card, fused_attention=True)
        refuse_oversized(memory.traced(), ranks.device, lambda card: changes(cfg, ranks.world, card))


class StepSeconds(NamedTuple):
    """Seconds of a step on paper."""
    sampling: float
    scoring: float
    training: float
    at_a_time: int                       # responses that an engine samples


def step_seconds(cfg, world, engines):
    """`StepSeconds`. Sampling is bound by memory: every token of the batch reads all weights once, and its
    sequence's cache. Training is flops_per_token at the MFU of mid-training, scoring a third of it."""
    arch = preset(cfg.model)
    number = getattr(torch, cfg.dtype).itemsize
    weights = number * total_parameters(arch)
    new = response_tokens(cfg)
    length = PROMPT_TOKENS + new
    responses = cfg.batch * cfg.group
    sampling = at_a_time = 0
    if engines.engines:
        share = math.ceil(responses / engines.engines)
        whole = sequence_bytes(arch, cfg.context, number)
        room = engines.sequences(sequence_bytes(arch, length, number) / whole)
        at_a_time = max(1, min(cfg.max_batch, share, room))
        halfway = sequence_bytes(arch, PROMPT_TOKENS + new // 2, number)
        states = sequence_bytes(arch, 0, number)          # are written as well
        read = (weights + at_a_time * (halfway + states)) / engines.gpus
        sampling = math.ceil(share / at_a_time) * new * read / READ_RATE
    keys = keys_met([length], arch.window) / length
    flops = responses * length * flops_per_token(arch, length, keys)
    training = flops / (PEAK_FLOPS * (cfg.mfu or mfu_on_paper(arch)) * world)
    scorings = (cfg.beta > 0) + (cfg.updates > 1)
    return StepSeconds(sampling, scorings * training / 3, cfg.updates * training, at_a_time)


def response_tokens(cfg):
    """Tokens that --dry_run assumes a response to have."""
    return cfg.response_tokens or cfg.context // 4


def plan(cfg, world):
    """What --dry_run prints: memory a GPU while the policy trains and while it is sampled from, whether it
    fits, the engines' cache, what goes to the disk, hours."""
    arch = preset(cfg.model)
    parameters = total_parameters(arch)
    card = card_bytes(cfg.gpu_gb)
    memory = plan_memory(cfg, world, card)
    traced = memory.traced()
    beside = besides(traced, cfg.replicate, world // cfg.replicate)
    engine = "none, a replay" if cfg.replay else cfg.engine
    if cfg.engine == "vllm" and not cfg.replay:
        engine += f" {cfg.layout}"
    return "\n".join([
        f"{cfg.model}: {parameters:,} parameters",
        f"{cfg.steps:,} steps x {cfg.batch} prompts x {cfg.group} responses, texts of up to {cfg.context:,} "
        f"tokens, on {world} devices ({cfg.replicate} x {world // cfg.replicate}); engine: {engine}",
        "",
        *summed_lines(f"while the policy trains, {memory.moment}", memory.training),
        f"memory a GPU while rows are scored: {memory.scoring / 1e9:.2f} GB",
        *summed_lines("while it is sampled from", memory.sampling),
        *summed_lines("besides", beside),
        *attention_note(cfg.dtype),
        verdict_line(cfg, world, card, traced + sum(beside.values()), memory.engines),
        *cache_lines(cfg, memory.engines),
        "",
        *disk_lines(cfg, world, parameters),
        "",
        *hours_lines(cfg, world, memory.engines)])


def summed_lines(when, parts):
    """{text: bytes} as lines, with their sum."""
    return [f"memory a GPU {when}:", *part_lines(parts | {"sum": sum(parts.values())})]


def verdict_line(cfg, world, card, needed, engines):
    """Whether a GPU of `card` bytes is enough for `needed` ones, and what to change if not."""
    if needed <= card and not engines.can_sample():
        return (f"does not fit {card / 1e9:.0f} GB (the engine's cache holds no sequence of "
                f"--context={cfg.context}): {changes(cfg, world, card)}")
    return memory_verdict(needed, card, lambda: changes(cfg, world, card))


def cache_lines(cfg, engines):
    """How many sequences an engine's cache holds, and whether the model takes such long ones."""
    if not engines.engines:
        return []
    longest = preset(cfg.model).raw.get("max_position_embeddings") or cfg.context
    refused = []
    if cfg.context > longest:
        refused = [f"the engine refuses --context={cfg.context}: the model's config.json says "
                   f"max_position_embeddings = {longest}; give --context={longest}"]
    return [f"engines: {engines.engines}, each on {engines.gpus} GPU, with {max(engines.cache, 0) / 1e9:.1f} "
            f"GB for keys, values and states: {engines.sequences()} sequences of {cfg.context:,} tokens "
            f"({engines.sequence / 1e9:.2f} GB each), {cfg.max_batch} at most", *refused]


def disk_lines(cfg, world, parameters):
    """What goes to the disk, and how long it takes."""
    reference = 4 * parameters * (cfg.beta > 0)
    checkpoint = 12 * parameters + reference
    written = cfg.steps * cfg.batch * cfg.group * response_tokens(cfg) * LINE_BYTES
    lines = [f"a checkpoint: {checkpoint / 1e9:.1f} GB ({reference / 1e9:.1f} of them the reference), every "
             f"{cfg.checkpoint_every or cfg.steps} steps, {checkpoint / DISK_RATE:.0f} s at "
             f"{DISK_RATE / 1e9:.0f} GB/s (assumed); kept: {cfg.keep or 'all'}, and one being written",
             f"samples.jsonl: {written / 1e9:.1f} GB ({LINE_BYTES} bytes a token)"]
    if cfg.ref_offload and reference:
        lines.append(f"the reference in host memory: {reference * cfg.replicate / 1e9:.1f} GB over all nodes")
    return lines


def hours_lines(cfg, world, engines):
    """Hours of the run on paper, and what bounds them."""
    seconds = step_seconds(cfg, world, engines)
    training = seconds.scoring + seconds.training
    step = max(seconds.sampling, training) if cfg.ahead else seconds.sampling + training
    bound = "sampling" if seconds.sampling > training else "training"
    mfu = cfg.mfu or mfu_on_paper(preset(cfg.model))
    return [f"assumed: responses of {response_tokens(cfg):,} tokens (--response_tokens=...) to prompts of "
            f"{PROMPT_TOKENS}; a GPU's {READ_RATE / 1e12:.1f} TB/s, and {PEAK_FLOPS / 1e12:.0f} TFLOP/s at "
            f"{mfu:.0%} MFU (H100, on paper, not yet measured)",
            f"a step: {seconds.sampling:.0f} s of sampling, {seconds.at_a_time} responses at a time an "
            f"engine, {seconds.scoring:.0f} s of scoring, {seconds.training:.0f} s of training; grading and "
            f"what a GPU waits for are not counted",
            f"{cfg.steps * step / 3600:.1f} hours for {cfg.steps:,} steps at least, bound by {bound}"]
