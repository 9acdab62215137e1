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
import torch.distributed as dist  # noqa: E402

import midtrain  # noqa: E402
import presets  # noqa: E402
from engines.contract import make_requests  # noqa: E402
from engines.embedded import Batch, TorchEngine  # noqa: E402
from model import preset  # noqa: E402
from runtime import grad_norm, reduce_vectors, scale_gradients  # noqa: E402

DOCUMENTS = [700, 1300, 2000, 4192]                       # tokens


def of_triton(launches):
    return sum(count for name, count in launches.items() if name.startswith("triton"))


def training_step(name):
    """{column: count} of the passes and the update of midtrain.main's loop."""
    cfg = midtrain.Config(model=name)
    with pretend.ranks(1, 8) as ranks, pretend.cuda() as meter:
        model = midtrain.build_model(preset(name), cfg, ranks)
        optimizer = midtrain.make_optimizer(model, cfg)
        parameters = list(model.parameters())
        tokens, docs, targets = (torch.zeros(2, 8192, dtype=torch.int64, device="cuda") for _ in range(3))
        meter.launches.clear()
        meter.waits.clear()
        loss_sum = torch.zeros((), device=ranks.device)
        for i, row in enumerate((slice(0, 1), slice(1, 2))):
            model.set_requires_all_reduce(i == 1)
            loss = model(tokens[row], docs[row], targets[row], DOCUMENTS) / 100
            loss.backward()
            loss_sum += loss.detach()
        passes, triton = meter.launches.total() // 2, of_triton(meter.launches) // 2
        meter.launches.clear()
        loss_sum = loss_sum.double()
        dist.all_reduce(loss_sum)
        reduce_vectors(parameters)
        norm = grad_norm(parameters, ranks.mesh)
        float(loss_sum)
        scale_gradients(parameters, 1 / norm)
        optimizer.step()
        return {"a pass": passes, "of them Triton": triton, "the update": meter.launches.total(),
                "waits a step": meter.waits.total()}


def decoded_token(name):
    """{column: count} of a step of the embedded engine, op by op and as the replay of a graph."""
    with pretend.cuda() as meter, torch.no_grad():
        model = pretend.model(preset(name))
        engine = TorchEngine(model, context=2048, progress=False)

        def capture(function):
            function()
            return lambda: meter.launches.update(graph=1)

        engine.capture = lambda: capture
        requests, stops = make_requests(engine, [[1] * 200] * 4, n=16, max_new_tokens=6, stop=[], seed=0,
                                        temperature=1.0, top_p=1.0, keys=None, first=0)
        batch = Batch(engine, engine.allocate(requests), requests, stops, 1.0, 1.0, None)
        counts = []
        while batch.unfinished:
            meter.launches.clear()
            meter.waits.clear()
            batch.step()
            counts.append(meter.launches.total())
        return {"a token, op by op": max(counts[1:-1]), "as a graph": min(counts[1:]),
                "waits a token": meter.waits.total()}


def main(names):
    for i, name in enumerate(names or [name for name in presets.names() if not presets.is_toy(name)]):
        row = training_step(name) | decoded_token(name)
        if i == 0:
            print("| model | " + " | ".join(row) + " |\n" + "| --- " * (len(row) + 1) + "|")
        print(f"| {name} | " + " | ".join(f"{count:,}" for count in row.values()) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
