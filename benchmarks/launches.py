"""Launches, and waits of the host, of a training step and of a decoded token: what a GPU would be asked to do
and how often, counted without one.

    python benchmarks/launches.py [MODEL ...]            the seven presets; a Markdown table

Traced on pretend CUDA tensors (tests/pretend_cuda) at real sizes: a step of midtrain.py over 8 ranks, two
passes of a row of 8,192 tokens with documents; a decoded token of 64 samples. A launch is an op of torch or a
Triton kernel; a wait is whatever the host reads back.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "pretend_cuda"), str(ROOT)]

import pretend  # noqa: E402  (before torch)
import torch  # noqa: E402

import midtrain  # noqa: E402
import presets  # noqa: E402
from model import preset  # noqa: E402

DOCUMENTS = [700, 1300, 2000, 4192]                       # tokens


def of_triton(launches):
    return sum(count for name, count in launches.items() if name.startswith("triton"))


def training_step(name):
    """{column: count} of the passes and the update of midtrain.main's loop."""
    cfg = midtrain.Config(model=name)
    with pretend.ranks(1, 8) as ranks, pretend.cuda() as meter:
        model = midtrain.build_model(preset(name), cfg, ranks)
        optimizer = midtrain.make_optimizer(model, cfg)
        batch = [torch.zeros(2, 8192, dtype=torch.int64, device="cuda") for _ in range(3)]
        meter.launches.clear()
        meter.waits.clear()
        loss_sum = pretend.passes(model, batch, DOCUMENTS, ranks)
        launches, triton = meter.launches.total() // 2, of_triton(meter.launches) // 2
        meter.launches.clear()
        float(pretend.update(model, optimizer, loss_sum, ranks))
        return {"a pass": launches, "of them Triton": triton, "the update": meter.launches.total(),
                "waits a step": meter.waits.total()}


def decoded_token(name):
    """{column: count} of a step of the embedded engine, op by op and as the replay of a graph."""
    with pretend.cuda() as meter, torch.no_grad():
        model = pretend.model(preset(name))
        launches, waits = zip(*pretend.decode_steps(model, [[1] * 200] * 4, 16, 6, meter, context=2048),
                              strict=True)
        return {"a token, op by op": max(launches[1:-1]), "as a graph": min(launches[1:]),
                "waits a token": waits[-1]}


def main(names):
    for i, name in enumerate(names or [name for name in presets.names() if not presets.is_toy(name)]):
        row = training_step(name) | decoded_token(name)
        if i == 0:
            print("| model | " + " | ".join(row) + " |\n" + "| --- " * (len(row) + 1) + "|")
        print(f"| {name} | " + " | ".join(f"{count:,}" for count in row.values()) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
