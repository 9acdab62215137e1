r"""Sampling from a model: one interface, two engines. rl.py, evaluate.py and analyze.py go through this door.

    python generate.py --init=runs/mt/model --prompt='What is 12 + 30?\n'          # try a checkpoint
    python generate.py --init=granite-3.3-8b --engine=vllm --n=4 --prompt=-        # the prompt from stdin

    engine = engine(model)                                     # embedded: plain torch, any machine
    engine = engine(model, kind="vllm")                        # real vLLM
    samples = engine.generate(prompts, n=16, max_new_tokens=512, seed=1)    # token ids in, Samples out
    push(engine, trainer)                                      # new weights, proved to have arrived

What both engines promise:
  - the log-probs are those of the distribution that was sampled from: after temperature and top-p, over the
    ids that have a text (a head may have more rows: they are never sampled). Greedy: at temperature 1;
  - the seed of a sample is a hash of (run seed, its prompt's key, its index), so no two samples share their
    noise, and a sample does not depend on which others are made with it, rounding aside;
  - only what `stop` names ends a sample early; the stop token is part of the sample and was sampled;
  - after load_weights() nothing of the old weights is left: no stale tensor, no stale prefix.

Notation: S samples being made, P their prompts, B rows of a step, T tokens, K kv heads, R query heads a kv
head, D head dim.
"""

import os
import re
import sys
import time
from dataclasses import dataclass

import torch

from cli import InputError, did_you_mean, human, launch
from engines.embedded import TorchEngine
from engines.push import push
from model import load

__all__ = ["engine", "make_engine", "push"]


def make_engine(init, cfg, me):
    """The engine that a stage's flags ask for. init: a checkpoint, as --init has it."""
    options = dict(context=cfg.context, max_batch=cfg.max_batch)
    if cfg.engine == "vllm":
        options |= dict(layout=cfg.layout, gpus=cfg.gpus, tensor_parallel=cfg.tensor_parallel,
                        gpu_memory=cfg.gpu_memory)
    elif cfg.engine == "torch":
        init = load(init, dtype=getattr(torch, cfg.dtype), device=me.device)
    return engine(init, cfg.engine, dtype=cfg.dtype, **options)


# -- the door ------------------------------------------------------------------------------------------------

def engine(model, kind="torch", *, dtype=None, **options):
    """An engine that samples from model: a Model, or what --init takes. kind: "torch" or "vllm"; dtype:
    "float32" or "bfloat16", None = the Model's own, else float32; options: of TorchEngine or VllmEngine. A
    folder in hub format vLLM reads itself."""
    if isinstance(model, str):
        dtype = dtype or "float32"
    elif kind == "vllm" and dtype is None:                # sharded masters are fp32, whatever is computed in
        own = getattr(model, "compute_dtype", next(model.parameters()).dtype)
        dtype = str(own).removeprefix("torch.")
    if kind not in ("torch", "vllm"):
        raise InputError(f"--engine={kind}{did_you_mean(kind, ('torch', 'vllm'))} (known: torch, vllm)")
    if kind == "vllm":
        from engines.vllm_engine import VllmEngine, check_vllm
        check_vllm(options.get("allow_untested", False))
        if isinstance(model, str) and os.path.isdir(model):
            return VllmEngine(None, folder=model, dtype=dtype, **options)
        model = load(model, dtype=getattr(torch, dtype)) if isinstance(model, str) else model
        return VllmEngine(model, dtype=dtype, **options)
    if isinstance(model, str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load(model, dtype=getattr(torch, dtype), device=device)
    return TorchEngine(model, **options)


# -- from the shell ------------------------------------------------------------------------------------------

@dataclass
class Config:
    init: str = ""                       # weights: preset, folder, random:NAME[:SEED], 0.15*A + 0.85*B
    prompt: str = ""                     # text to go on from (\n at its end: a line break); - = stdin
    n: int = 1                           # samples
    max_new_tokens: int = 256            # of each; it may end earlier, with the end-of-text token
    temperature: float = 1.0             # 0 = the most probable token each time
    top_p: float = 1.0                   # of the probability's mass, the most probable part is sampled from
    stop: str = ""                       # a text that ends a sample too; \n at its end: a line break
    seed: int = 1                        # of the samples
    engine: str = "torch"                # torch (embedded) or vllm
    dtype: str = "float32"               # float32 or bfloat16
    context: int = 0                     # tokens of prompt and answer, 0 = the model's


def line_breaks(text):
    r"""A text with the line breaks that shells make hard to type: \n at its end, not the one of \neq."""
    end = re.search(r"(\\n)*$", text)
    return text[:end.start()] + "\n" * (len(end[0]) // 2)


def main(cfg):
    if not cfg.init:
        raise InputError("--init: name a checkpoint, a folder or a preset (--init=runs/mt/model)")
    if cfg.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype={cfg.dtype}: give float32 or bfloat16")
    door = engine(cfg.init, cfg.engine, dtype=cfg.dtype, context=cfg.context)
    tokenizer = door.tokenizer
    sys.stdout.reconfigure(errors="replace")              # a terminal that cannot show a sample
    text, stop = (line_breaks(t) for t in (cfg.prompt, cfg.stop))
    text = sys.stdin.read() if text == "-" else text
    ids = [*tokenizer.before, *tokenizer.encode(text)] or [tokenizer.eos_id]
    began = time.time()
    stop = [tokenizer.eos_id, stop] if stop else None
    samples, = door.generate([ids], cfg.n, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                             top_p=cfg.top_p, seed=cfg.seed, stop=stop)
    seconds, made = time.time() - began, sum(len(s.tokens) for s in samples)
    for i, s in enumerate(samples, 1):
        print(f"-- {i} of {cfg.n} | {len(s.tokens)} tokens | {s.finish_reason} | mean log-prob "
              f"{sum(s.logprobs) / len(s.logprobs):.3f}\n{text}{s.text}")
    print(f"-- {len(ids)} tokens of prompt, {made} sampled in {seconds:.1f} s: {human(made / seconds)} tok/s")
    door.close()
    return samples


if __name__ == "__main__":
    launch(main, Config)
