r"""Sampling from a model: one interface, two engines. rl.py, evaluate.py and analyze.py sample through it.

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
"""

import os
import re
import sys
import time
from dataclasses import dataclass

from cli import InputError, did_you_mean, human, launch
from engines.contract import compute_dtype, load_model
from engines.embedded import TorchEngine
from engines.push import push

__all__ = ["engine", "make_engine", "push"]

# -- an engine -----------------------------------------------------------------------------------------------

def engine(model, kind="torch", *, dtype=None, device=None, **options):
    """An engine that samples from model: a Model, or what --init takes. kind: "torch" or "vllm"; dtype:
    "float32" or "bfloat16", None = the Model's, else float32; device: of a Model made here, None = a GPU if
    there is one; options: of TorchEngine or VllmEngine. A folder in hub format vLLM reads itself."""
    if kind == "torch":
        if isinstance(model, str):
            model = load_model(model, dtype or "float32", device)
        return TorchEngine(model, **options)
    if kind == "vllm":
        return _vllm_engine(model, dtype, options)
    raise InputError(f"--engine={kind}{did_you_mean(kind, ('torch', 'vllm'))} (known: torch, vllm)")


def _vllm_engine(model, dtype, options):
    from engines.vllm_engine import VllmEngine, check_vllm
    check_vllm(options.get("allow_untested", False))
    if not isinstance(model, str):
        return VllmEngine(model, dtype=dtype or str(compute_dtype(model)).removeprefix("torch."), **options)
    dtype = dtype or "float32"
    if os.path.isdir(model):
        return VllmEngine(None, folder=model, dtype=dtype, **options)
    return VllmEngine(load_model(model, dtype, "cpu"), dtype=dtype, **options)


def make_engine(init, cfg, ranks):
    """The engine that a stage's flags ask for. init: a checkpoint, as --init has it."""
    options = dict(context=cfg.context, max_batch=cfg.max_batch)
    if cfg.engine == "vllm":
        options |= dict(layout=cfg.layout, gpus=cfg.gpus, tensor_parallel=cfg.tensor_parallel,
                        gpu_memory=cfg.gpu_memory)
    return engine(init, cfg.engine, dtype=cfg.dtype, device=ranks.device, **options)


# -- the command ---------------------------------------------------------------------------------------------

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
    count = len(end[0]) // len(r"\n")
    return text[:end.start()] + "\n" * count


def main(cfg):
    if not cfg.init:
        raise InputError("--init: name a checkpoint, a folder or a preset (--init=runs/mt/model)")
    if cfg.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype={cfg.dtype}: give float32 or bfloat16")
    sampler = engine(cfg.init, cfg.engine, dtype=cfg.dtype, context=cfg.context)
    tokenizer = sampler.tokenizer
    prompt = line_breaks(cfg.prompt)
    if prompt == "-":
        prompt = sys.stdin.read()
    ids = [*tokenizer.bos_ids, *tokenizer.encode(prompt)] or [tokenizer.eos_id]
    stop = [tokenizer.eos_id]
    if cfg.stop:
        stop.append(line_breaks(cfg.stop))

    start = time.time()
    samples, = sampler.generate([ids], cfg.n, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                                top_p=cfg.top_p, seed=cfg.seed, stop=stop)
    seconds = time.time() - start
    sampler.close()

    sys.stdout.reconfigure(errors="replace")              # a terminal may not be able to show a sample
    for i, sample in enumerate(samples, 1):
        mean = sum(sample.logprobs) / len(sample.logprobs)
        print(f"-- {i} of {cfg.n} | {len(sample.tokens)} tokens | {sample.finish_reason} | mean log-prob "
              f"{mean:.3f}\n{prompt}{sample.text}")
    count = sum(len(sample.tokens) for sample in samples)
    print(f"-- {len(ids)} tokens of prompt, {count} sampled in {seconds:.1f} s: "
          f"{human(count / seconds)} tok/s")
    return samples


if __name__ == "__main__":
    launch(main, Config)
