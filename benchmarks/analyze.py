"""Comparison of weights beside the plain torch way, and CKA: seconds, GB/s over both files, memory.

    python benchmarks/analyze.py                   # two CPU cores, 7 GB of disk: about five minutes

Two 2.1 GB bf16 checkpoints of 146 tensors are compared, at the paper's six thresholds: a pair as after
mid-training (all entries changed) and one as after RL (5 % changed). The plain way loads both, takes float32
and counts with bool sums. Each way is a process of its own, run in turns, so that both meet the same machine;
the least of the runs counts. Beside them what the machine gives: copying in memory and reading the file from
the page cache. Then CKA of 40 layers, n = 200, d = 4,096: point, 1,000 halves, 1,000 permutations.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import presets  # noqa: E402
from analyze import (  # noqa: E402
    THRESHOLDS,
    cka_bootstrap,
    cka_permuted,
    compare_checkpoints,
    gram,
    gram_cka,
)


def write(folder, change, layers=16, C=2048, F=8192, V=49152):
    """A checkpoint of Granite 3's names, weights of std 0.02, norms near 1, after change(w)."""
    rng, weights = torch.Generator().manual_seed(0), {}
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    for i in range(layers):
        layer = {"self_attn.q_proj": (C, C), "self_attn.k_proj": (C // 4, C), "self_attn.v_proj": (C // 4, C),
                 "self_attn.o_proj": (C, C), "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C),
                 "mlp.down_proj": (C, F), "input_layernorm": (C,), "post_attention_layernorm": (C,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        w = torch.empty(shape).normal_(0, 0.02, generator=rng) + ("norm" in name)
        weights[name] = change(w.bfloat16().float()).bfloat16()
    os.makedirs(folder)
    save_file(weights, os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(presets.read("granite-3.3-8b"), f)


def pair(root):
    rng = torch.Generator().manual_seed(1)
    write(f"{root}/base", lambda w: w)
    write(f"{root}/mt", lambda w: w + torch.empty(w.shape).normal_(0, 0.004, generator=rng))
    write(f"{root}/rl", lambda w: w * (1 + 2 ** -7 * (torch.rand(w.shape, generator=rng) < 0.05)))


def plain(old, new):
    """As a script that one writes for once."""
    A, B = (load_file(f"{folder}/model.safetensors") for folder in (old, new))
    n, changed, dw2, w02, dot, largest = 0, dict.fromkeys(THRESHOLDS, 0), 0.0, 0.0, 0.0, 0.0
    for name, a in A.items():
        w0, w1 = a.float(), B[name].float()
        dw = w1 - w0
        for t in THRESHOLDS:
            changed[t] += (dw.abs() > t * w0.abs()).sum().item()
        n += dw.numel()
        dw2 += dw.norm().item() ** 2
        w02 += w0.norm().item() ** 2
        dot += (w0 * dw).sum().item()
        largest = max(largest, dw.abs().max().item())
    return {t: c / n for t, c in changed.items()}, (dw2 / w02) ** 0.5


def ours(old, new, threads):
    total = compare_checkpoints(old, new, threads=threads)["rows"][0]
    return {t: 1 - share for t, share in total["unchanged"].items()}, total["relative_l2"]


def anonymous():
    """This process's anonymous memory, bytes; mapped files are the page cache's."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon")) * 1024


def measured(way, old, new):
    """In this process: seconds, CPU seconds, peak of anonymous memory, results."""
    peak, done = [anonymous()], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    found = plain(old, new) if way == "plain" else ours(old, new, int(way))
    result = time.perf_counter() - start, time.process_time() - cpu, peak[0], *found
    done.set()
    watcher.join()
    return result


def in_turns(root, kind, runs=3):
    """way: the fastest of its runs, each in a process of its own."""
    found = {"1": [], "2": [], "plain": []}
    for run in range(runs):
        for way, own in found.items():
            if way != "plain" or run == 0:                # a minute of the slow one is enough
                out = subprocess.run([sys.executable, __file__, way, f"{root}/base", f"{root}/{kind}"],
                                     check=True, capture_output=True, text=True,
                                     env=os.environ | {"OMP_NUM_THREADS": "2" if way == "plain" else "1"})
                own.append(json.loads(out.stdout))
    return {way: min(own) for way, own in found.items()}


def machine(path):
    """Bytes a second: a copy in memory, reading a file that is in the page cache."""
    a, b = np.ones(1 << 28, np.uint8), np.zeros(1 << 28, np.uint8)
    start = time.perf_counter()
    for _ in range(4):
        np.copyto(b, a)
    copy, room = 4 * len(a) / (time.perf_counter() - start), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as f:
        start = time.perf_counter()
        while f.readinto(room):
            pass
        return copy, os.path.getsize(path) / (time.perf_counter() - start)


def representations(layers=40, n=200, d=4096, draws=1000):
    rng = np.random.default_rng(0)
    seconds = dict.fromkeys(("Grams", "biased and debiased", f"{draws} halves", f"{draws} permutations"), 0.0)
    for _ in range(layers):
        X = rng.standard_normal((n, d))
        Y = X + rng.standard_normal((n, d))
        laps = [time.perf_counter()]
        K, L = gram(X), gram(Y)
        laps.append(time.perf_counter())
        gram_cka(K, L), gram_cka(K, L, debiased=False)
        laps.append(time.perf_counter())
        cka_bootstrap(K, L, draws)
        laps.append(time.perf_counter())
        cka_permuted(K, L, draws)
        laps.append(time.perf_counter())
        for key, a, b in zip(seconds, laps, laps[1:], strict=False):
            seconds[key] += b - a
    return seconds


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measured(*sys.argv[1:])))
        sys.exit()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        pair(root)
        size = 2 * os.path.getsize(f"{root}/base/model.safetensors")
        copy, read = machine(f"{root}/base/model.safetensors")
        print(f"two files of {size / 2e9:.2f} GB; memory copy {copy / 1e9:.1f} GB/s, file read (page cache) "
              f"{read / 1e9:.1f} GB/s, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print(f"{'pair':5} {'way':16} {'seconds':>8} {'CPU s':>7} {'GB/s':>6} {'GB/CPU s':>9} {'ratio':>6} "
              f"{'RssAnon':>9}  relative L2  changed by over 1 %")
        for kind in ("mt", "rl"):
            found = in_turns(root, kind)
            for way, (wall, cpu, peak, changed, l2) in found.items():
                name = "plain torch" if way == "plain" else f"ours, {way} thread{'s' * (way > '1')}"
                print(f"{kind:5} {name:16} {wall:8.2f} {cpu:7.2f} {size / wall / 1e9:6.2f} "
                      f"{size / cpu / 1e9:9.2f} {found['plain'][0] / wall:6.1f} {peak / 1e6:6.0f} MB  "
                      f"{l2:11.6f}  {100 * changed['0.01']:.2f} %", flush=True)
    seconds = representations()
    print(f"CKA, 40 layers, n = 200, d = 4,096: {sum(seconds.values()):.1f} s; "
          + ", ".join(f"{key} {value:.2f} s" for key, value in seconds.items()))
