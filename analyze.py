"""What training changed: weights, representations, behaviour (paper, section 10, appendices 18-20).

    python analyze.py compare runs/eval/base runs/eval/mt runs/eval/rl             # gains, paired by problem
    python analyze.py weights runs/base/model runs/mt/model                        # and runs/other/model
    python analyze.py weights runs/mt/model runs/rl/model --null=runs/rl           # beside Adam on noise
    python analyze.py cka runs/base/model runs/mt/model runs/rl/model
    python analyze.py landscape runs/base/model runs/mt/model runs/rl/model
    python analyze.py trajectory runs/rl runs/mt/model runs/base/model
    python analyze.py behaviour runs/eval/base runs/eval/mt runs/eval/rl
    python analyze.py report runs runs/eval runs/analysis
    python analyze.py merge "0.15*runs/base/model + 0.85*runs/mt/model" runs/merged

Each command prints a table and puts its numbers into runs/analysis (--out), from which `report` makes one
page. Weights are compared bit by bit and value by value in one pass over the files, beside what rounding
alone would give (`noise_null`); representations by CKA, biased as published and debiased.

w0 weights before, dw their change. X, Y features (n, d) of n inputs; K, L their Gram matrices (n, n).
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm
from tyro.conf import Positional

from cli import (
    InputError,
    appending,
    commands,
    digest,
    read_jsonl,
    read_lines,
    refuse_below,
    refuse_choice,
    write_atomic,
)
from corpus import registry, world
from corpus.files import read_rows
from corpus.formats import text_of
from corpus.hashes import shuffle_key
from corpus.hub import Hub, get_part, is_there, raw_files
from data import need_sandbox, read_prompts
from engines.contract import context_of
from generate import make_engine
from model import Folder, Init, Model, load, save
from reporting import comparison, page
from runtime import Run, join_ranks
from suite.intervals import aligned, interval, number, percent, read_results
from verify import grade_batch, transient

# -- weights: the change of one tensor ---------------------------------------------------------------------
# The hot loop is numpy on a chunk of entries: its few buffers stay in cache, whatever the tensor's size.

THRESHOLDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)        # paper, section 10
CHUNK = 1 << 18                     # entries; 64k, of which all fits the cache, spends a fifth on calls
SPARSE = 0.2                        # fewer changed entries than this share: the rest is not looked at again
TORCH_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
NUMPY_FLOATS = (np.uint16, np.float16, np.float32, np.float64)         # uint16: the bits of bfloat16


def weight_change(old, new, thresholds=THRESHOLDS):
    """How far `new` is from `old`: arrays or tensors of one shape, any float dtypes, to a dict of

    entries, nonfinite   numbers; entries with a NaN or infinity are left out of all that follows
    bits, values         changed entries: of another bit pattern (+0 and -0 differ), of another value
    over                 {t: entries with |dw| > t |w0|}; w0 = 0 and dw != 0 is over every t
    dw2, w02, dot        sums of dw^2, w0^2, w0 dw (float64); max_dw: the largest |dw|
    relative_l2          sqrt(dw2 / w02), the paper's delta(W); None when w0 is 0

    and shares of the finite entries (None without any): bits_share, values_share, unchanged {t: share}.
    InputError on other shapes or dtypes. In bf16 no relative change is below 2^-8 = 0.39 %: thresholds under
    it count every changed value."""
    if tuple(old.shape) != tuple(new.shape):
        raise InputError(f"weights of shapes {list(old.shape)} and {list(new.shape)} cannot be compared")
    return summary(sums([_raw(old), _raw(new)], thresholds), thresholds)


def _raw(x):
    """A tensor or array as a flat numpy array without copying; bfloat16 as its bits, uint16 (a numpy array of
    uint16 is taken for such bits)."""
    is_tensor = isinstance(x, torch.Tensor)
    if not is_tensor and x.dtype.name == "bfloat16":      # of ml_dtypes
        x = x.view(np.uint16)
    if x.dtype not in (TORCH_FLOATS if is_tensor else NUMPY_FLOATS):
        raise InputError(f"weights of {x.dtype} cannot be compared: bfloat16 or float16, 32, 64 are needed")
    if is_tensor:
        x = x.detach().cpu()
        x = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    return x.reshape(-1)


class Buffers(NamedTuple):
    """Memory for one chunk that every chunk uses again."""
    mask: np.ndarray                     # bool
    old: np.ndarray                      # float32, as the others
    new: np.ndarray
    other: np.ndarray | None = None      # where three checkpoints are compared


def sums(raw, thresholds):
    """What can be added over chunks and tensors, of raw = [old, new] or [old, new, other] (see `_raw`): the
    counts and sums of weight_change, and of `other` its own squares and its product with new's change."""
    total = dict(entries=0, nonfinite=0, bits=0, values=0, over=np.zeros(len(thresholds), np.int64), dw2=0.0,
                 w02=0.0, dot=0.0, max_dw=0.0)
    if len(raw) == 3:
        total |= dict(other2=0.0, both=0.0)
    size = raw[0].size
    room = min(CHUNK, size)
    buffers = Buffers(np.empty(room, bool), *np.empty((len(raw), room), np.float32))
    sixteen_bits = raw[0].itemsize == 2 and all(x.dtype == raw[0].dtype for x in raw)
    with np.errstate(all="ignore"):                       # x / 0 = inf is over every t, 0 / 0 = nan over none
        for start in range(0, size, CHUNK):
            chunk = [x[start:start + CHUNK] for x in raw]
            measured = None
            if sixteen_bits:
                measured = _in_float32(chunk, thresholds, buffers)
            if measured is None:
                measured = _in_float64(chunk, thresholds)
            _add(total, measured)
    return total


def _add(total, measured):
    """Adds the sums of a chunk or tensor to others."""
    for key, value in measured.items():
        if key == "max_dw":
            total[key] = max(total[key], value)
        else:
            total[key] = total[key] + value


def _in_float32(chunk, thresholds, buffers):
    """`sums` of a chunk of bf16 or fp16 in float32; None where that is not enough: values not finite, squares
    outside float32's range. Near a threshold dw is exact, and rounding dw / w0 does not carry it over t: two
    such short significands have no quotient within 2^-24 of it."""
    old, new, *others = chunk
    differs = np.not_equal(old.view(np.uint16), new.view(np.uint16), out=buffers.mask[:old.size])
    bits = int(np.count_nonzero(differs))
    w0 = _widened(old, buffers.old)
    measured = dict(entries=old.size, bits=bits, w02=_dot(w0, w0))
    squares = [measured["w02"]]                           # what float32 must hold

    # Where few entries changed, what follows looks at those alone.
    if not others and bits < SPARSE * old.size and old.size % 2 == 0:
        old, new = _changed_pairs(old, new, buffers.mask)
        w0 = _widened(old, buffers.old)

    w1 = _widened(new, buffers.new)
    dw = np.subtract(w1, w0, out=w1)                      # takes the memory of w1, which is done with
    measured |= dict(dw2=_dot(dw, dw), dot=_dot(w0, dw))
    if bits:
        squares.append(measured["dw2"])
    if others:
        w2 = _widened(others[0], buffers.other)
        other_dw = np.subtract(w2, w0, out=w2)
        measured |= dict(other2=_dot(other_dw, other_dw), both=_dot(other_dw, dw))
        if measured["other2"] != 0:
            squares.append(measured["other2"])
    if not all(1e-25 < value < 1e35 for value in squares):
        return None

    distance = np.abs(dw, out=dw)                         # each of these, too, takes the memory of the last
    measured["max_dw"] = float(distance.max(initial=0))
    ratio = np.divide(distance, np.abs(w0, out=w0), out=distance)
    counts = []
    for t in (0.0, *thresholds):
        over = np.greater(ratio, t, out=buffers.mask[:ratio.size])
        counts.append(int(np.count_nonzero(over)))
    measured["values"] = counts[0]
    measured["over"] = np.array(counts[1:])
    return measured


def _widened(x, out):
    """bf16 bits or fp16 to float32, into `out`. bf16 two at a time, so in another order: the low halves of
    the words, then the high ones."""
    out = out[:x.size]
    if x.dtype != np.uint16:
        out[...] = x
        return out
    half = x.size // 2
    bits = out.view(np.uint32)
    pairs = x[:2 * half].view(np.uint32)
    np.left_shift(pairs, 16, out=bits[:half])
    np.bitwise_and(pairs, 0xffff0000, out=bits[half:2 * half])
    bits[2 * half:] = x[2 * half:]
    bits[2 * half:] <<= 16
    return out


def _changed_pairs(old, new, mask):
    """The entries of two arrays of 16 bits, in pairs, of which one or both differ: half the search."""
    old_pairs, new_pairs = old.view(np.uint32), new.view(np.uint32)
    differs = np.not_equal(old_pairs, new_pairs, out=mask[:old_pairs.size])
    chosen = np.flatnonzero(differs)
    return old_pairs[chosen].view(old.dtype), new_pairs[chosen].view(new.dtype)


def _dot(x, y):
    """The product of two float32 vectors: rows of 1,024 in float32, then float64. 2e-8 off; np.dot of 64k
    entries is 2e-6 low."""
    end = x.size // 1024 * 1024
    x_rows = x[:end].reshape(-1, 1024)
    y_rows = y[:end].reshape(-1, 1024)
    rows = np.vecdot(x_rows, y_rows).sum(dtype=np.float64)
    rest = np.dot(x[end:].astype(np.float64), y[end:].astype(np.float64))
    return float(rows) + float(rest)


def _in_float64(chunk, thresholds):
    """`sums` of a chunk in float64: any dtypes, any values."""
    wide = [_as_float64(x) for x in chunk]
    finite = np.logical_and.reduce([np.isfinite(x) for x in wide])
    w0, w1, *others = [x[finite] for x in wide]
    dw = w1 - w0
    distance = np.abs(dw)
    size = np.abs(w0)
    bits_differ = w0.view(np.int64) != w1.view(np.int64)
    over = [np.count_nonzero(distance > t * size) for t in thresholds]
    measured = dict(
        entries=finite.size,
        nonfinite=finite.size - w0.size,
        bits=int(np.count_nonzero(bits_differ)),
        values=int(np.count_nonzero(dw)),
        over=np.array(over),
        dw2=float(dw @ dw),
        w02=float(w0 @ w0),
        dot=float(w0 @ dw),
        max_dw=float(distance.max(initial=0)))
    if others:
        other_dw = others[0] - w0
        measured |= dict(other2=float(other_dw @ other_dw), both=float(other_dw @ dw))
    return measured


def _as_float64(x):
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def summary(total, thresholds):
    """`sums` and what follows from them (see weight_change); of three checkpoints also `cosine`, between the
    two changes, None where one of them is 0."""
    finite = total["entries"] - total["nonfinite"]
    over = dict(zip(thresholds, total["over"].tolist(), strict=True))
    result = total | dict(
        over=over,
        unchanged={t: (finite - count) / finite if finite else None for t, count in over.items()},
        relative_l2=math.sqrt(total["dw2"] / total["w02"]) if total["w02"] else None,
        bits_share=total["bits"] / finite if finite else None,
        values_share=total["values"] / finite if finite else None)
    if "both" in total:
        lengths = math.sqrt(total["dw2"]) * math.sqrt(total["other2"])
        result["cosine"] = total["both"] / lengths if lengths else None
    return result


# -- weights: two checkpoints ------------------------------------------------------------------------------

# leaf of a tensor's name: (component, sub-component), the paper's rows; Mamba's D goes with A and dt
PARTS = {
    "q_proj": ("attention", "Q"),
    "k_proj": ("attention", "K"),
    "v_proj": ("attention", "V"),
    "o_proj": ("attention", "O"),
    "gate_proj": ("MLP", "gate"),
    "up_proj": ("MLP", "up"),
    "down_proj": ("MLP", "down"),
    "output_linear": ("MLP", "down"),
    "in_proj": ("Mamba", "in_proj"),
    "out_proj": ("Mamba", "out_proj"),
    "conv1d": ("Mamba", "conv1d"),
    "A_log": ("Mamba", "A/dt"),
    "dt_bias": ("Mamba", "A/dt"),
    "D": ("Mamba", "A/dt"),
    "embed_tokens": ("embedding", "embed"),
    "embeddings": ("embedding", "embed"),
    "lm_head": ("embedding", "head"),
}


class Part(NamedTuple):
    """What a tensor is in the model."""
    layer: int | None                    # None: outside the layers
    component: str                       # attention, MLP, Mamba, embedding, norm
    sub: str                             # Q, K, V, O; gate, up, down; in_proj, out_proj, conv1d, A/dt; ...


class Piece(NamedTuple):
    """Rows of a tensor that are one Part."""
    name: str                            # of the tensor
    part: Part
    start: int
    stop: int


def part_of(name):
    """The Part of a hub name; Mamba's gated norm is a norm. InputError on an unknown name."""
    layer = re.search(r"\blayers\.(\d+)\.", name)
    leaf = re.sub(r"\.(weight|bias)$", "", name).rsplit(".", 1)[-1]
    kind = ("norm", "norm") if "norm" in leaf else PARTS.get(leaf)
    if kind is None:
        raise InputError(f"{name}: no part of the seven models' families (known: {', '.join(PARTS)}, norms)")
    return Part(int(layer[1]) if layer else None, *kind)


def pieces(name, rows):
    """The Pieces of a tensor of so many rows. Granite 4's input_linear is gate, then up; no family fuses Q, K
    and V."""
    if "input_linear" not in name:
        return [Piece(name, part_of(name), 0, rows)]
    gate = part_of(name.replace("input_linear", "gate_proj"))
    up = part_of(name.replace("input_linear", "up_proj"))
    return [Piece(name, gate, 0, rows // 2), Piece(name, up, rows // 2, rows)]


def first_part(name):
    """The Part of a tensor's first row."""
    return pieces(name, 2)[0].part


def compared_names(folder):
    """Names of the tensors of a checkpoint that are compared: a tied head is left out even where the file
    repeats it."""
    return folder.names() - ({"lm_head.weight"} if folder.arch.tied else set())


def compare_checkpoints(old, new, other=None, thresholds=THRESHOLDS, threads=2):
    """Folders in hub format, `new` and perhaps `other` both trained from `old`, in one pass: dict(tensors,
    rows, missing, extra). tensors: `summary` of every piece with its name, layer, component, sub; rows: see
    `grouped`; missing, extra: names that not all of them have, of `old` and of the others. A tied head is
    left out. InputError on damaged files, other shapes, or nothing in common.

    safetensors maps the files: a tensor is read without a copy and takes no memory but the page cache's."""
    folders = [Folder(path) for path in (old, new, other) if path is not None]
    names = [compared_names(folder) for folder in folders]
    common = set.intersection(*names)
    _check_comparable(folders, common)

    def place(piece):
        """By layer, then component and name; what is outside the layers comes first."""
        return piece.part.layer is not None, piece.part, piece

    def measure(piece):
        try:
            raw = [_raw(folder.read(piece.name, piece.start, piece.stop)) for folder in folders]
            return sums(raw, thresholds)
        except InputError as e:
            raise InputError(f"{old}, {new}: {piece.name}: {e}") from None

    cut = []
    for name in common:
        shape = folders[0].shape(name)
        cut += pieces(name, shape[0] if shape else 1)
    cut.sort(key=place)
    with ThreadPoolExecutor(threads) as pool:             # numpy frees the interpreter in its loops
        measured = list(pool.map(measure, cut))
    tensors = []
    for piece, piece_sums in zip(cut, measured, strict=True):
        tensors.append({"name": piece.name} | piece.part._asdict() | summary(piece_sums, thresholds))
    return dict(tensors=tensors, rows=grouped(tensors, measured, thresholds),
                missing=sorted(names[0] - common), extra=sorted(set().union(*names[1:]) - common))


def _check_comparable(folders, common):
    """InputError unless Folders are of one architecture and their common tensors of one shape."""
    first = folders[0]
    for folder in folders[1:]:
        if folder.arch != first.arch:
            raise InputError(f"{first.path} and {folder.path} are of different architectures: only "
                             f"checkpoints of one model can be compared")
    if not common:
        raise InputError(f"{first.path} and {folders[1].path} have no tensor in common: "
                         f"are they {first.arch.family} and {folders[1].arch.family} models?")
    for name in sorted(common):
        for folder in folders:
            if folder.shape(name) != first.shape(name):
                raise InputError(f"{folder.path}: {name} has shape {list(folder.shape(name))}, in "
                                 f"{first.path} it has {list(first.shape(name))}: only checkpoints of one "
                                 f"model can be compared")


GROUPS = ((), ("component",), ("component", "sub"), ("layer",), ("layer", "component"))


def grouped(tensors, measured, thresholds):
    """Rows over pieces (tensors: their layer, component, sub; measured: their `sums`), by total, component,
    sub, layer, and layer with component: dict(by, layer, component, sub, count) and `summary` of the pooled
    sums. Both averages that the paper's delta may mean: relative_l2 is pooled, sqrt(sum dw^2 / sum w0^2), in
    which norm weights near 1 weigh much; mean_l2 is the mean of the tensors' own ratios."""
    groups = {}                                           # {(by, their values): [place in tensors]}
    for i, tensor in enumerate(tensors):
        for by in GROUPS:
            values = tuple(tensor[key] for key in by)
            if None not in values:                        # what is outside the layers has no row by layer
                groups.setdefault((by, values), []).append(i)
    rows = []
    for (by, values), members in groups.items():
        pooled = {key: 0 * value for key, value in measured[members[0]].items()}
        ratios = []
        for i in members:
            _add(pooled, measured[i])
            if tensors[i]["relative_l2"] is not None:
                ratios.append(tensors[i]["relative_l2"])
        mean = sum(ratios) / len(ratios) if ratios else None
        rows.append({"by": "+".join(by) or "total"} | dict(zip(by, values, strict=True))
                    | {"count": len(members), "mean_l2": mean} | summary(pooled, thresholds))
    return rows


# -- weights: where the change points, and what rounding alone would give ----------------------------------

def top_singular(w, k, iterations=6, seed=0):
    """The leading k singular triplets of a matrix (m, n): U (m, k), S (k,), V (n, k), by subspace iteration
    from a seeded Gaussian start with 16 vectors to spare (Halko et al., arXiv 0909.4061, algorithm 4.4). At
    the crowded edge of a noise spectrum S is low: 4096 x 14336 by 3 % after 6 iterations, 0.3 % after 30."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(w, q=min(k + 16, *w.shape), niter=iterations)
    return u[:, :k], s[:k], v[:, :k]


def update_geometry(old, new, k=64, seed=0):
    """Of a matrix's change dw = new - old, float32: dict(k, stable_rank = ||dw||_F^2 / ||dw||_2^2, left and
    right = share of ||dw||_F^2 inside the span of old's k leading left and right singular vectors), and as
    `null` the same of dw with its entries permuted: rounding noise has full rank too. k is at most a quarter
    of the smaller side; all None without a change. 4096 x 14336 on one core: 15 s, and about 3 float32 copies
    in memory."""
    if old.ndim != 2 or old.shape != new.shape:
        raise InputError(f"update_geometry: two matrices of one shape are needed, not {list(old.shape)} and "
                         f"{list(new.shape)}")
    w0 = old.float()
    dw = new.float() - w0
    k = max(1, min(k, min(w0.shape) // 4))
    u, _, v = top_singular(w0, k, seed=seed)

    def measure(d):
        squares = squared_norm(d)
        if squares == 0:
            return dict(stable_rank=None, left=None, right=None)
        largest = top_singular(d, 1, iterations=30, seed=seed)[1].item()
        return dict(stable_rank=squares / largest ** 2, left=squared_norm(u.T @ d) / squares,
                    right=squared_norm(d @ v) / squares)

    measured = measure(dw)
    flat = dw.flatten().numpy()
    np.random.default_rng(seed).shuffle(flat)             # in place: shares dw's memory, or is a copy
    permuted = torch.from_numpy(flat).view(dw.shape)
    return dict(k=k) | measured | dict(null=measure(permuted))


def squared_norm(x):
    """The sum of squares, summed in float64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2


def noise_null(w0, lrs, beta1=0.9, beta2=0.95, eps=1e-10, dtype=torch.bfloat16, seed=0,
               thresholds=THRESHOLDS):
    """What AdamW (without decay) does to weights w0 when every gradient is Gaussian noise, at learning rates
    lrs, one a step (a stage's lr_at): {variant: weight_change(w0, result)} of
    masters     float32 weights, rounded to dtype once, after the last step: as rl.py trains and exports
    float32     the same, not rounded
    stepwise    weights kept in dtype: rounded after every step
    Adam does not see the gradients' scale, nor, without decay, the weights: the update is computed apart.
    A sample of 2^18 entries gives a share of 1 % to within 2 % of it, and takes a second for 500 steps."""
    w0 = w0.detach().flatten().to(dtype)
    rng = torch.Generator().manual_seed(seed)
    update = torch.nn.Parameter(torch.zeros(w0.numel()))  # of all steps so far
    update.grad = torch.empty(w0.numel())
    optimizer = torch.optim.AdamW([update], betas=(beta1, beta2), eps=eps, weight_decay=0.0, fused=True)
    previous = torch.zeros(w0.numel())                    # the update before this step
    stepwise = w0.clone()
    for lr in lrs:
        update.grad.normal_(generator=rng)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        stepwise = (stepwise + (update.detach() - previous)).to(dtype)
        previous.copy_(update.detach())
    masters = w0 + previous                               # bf16 + float32 is float32
    results = {"masters": masters.to(dtype), "float32": masters, "stepwise": stepwise}
    return {variant: weight_change(w0, weights, thresholds) for variant, weights in results.items()}


# -- representations: CKA ----------------------------------------------------------------------------------

def _centred(X):
    """(n, d) to float64 with columns of mean 0; a column that varies by rounding only becomes 0."""
    X = torch.as_tensor(X).detach().double().cpu().numpy()
    if X.ndim != 2:
        raise InputError(f"CKA: features (n, d) are needed, not shape {list(X.shape)}")
    centred = X - X.mean(0)
    rounding = 1e-13 * np.abs(X).max(0)
    centred[:, np.abs(centred).max(0) <= rounding] = 0
    return centred


def gram(X):
    """Inner products (n, n), float64, of the centred rows of X (n, d): what the functions below take."""
    X = _centred(X)
    return X @ X.T


def without_top(X, k):
    """X (n, d) without its k dimensions of the largest variance: a massive activation can be all of CKA."""
    by_variance = np.argsort(np.var(X, axis=0, dtype=np.float64), kind="stable")
    return X[:, np.sort(by_variance[:X.shape[1] - k])]


def centre(K, debiased):
    """A Gram matrix so that <K, L> is HSIC up to a factor of n: H K H; debiased U-centred, diagonal 0, whose
    product is the U-statistic of Song et al. (JMLR 2012, equation 5) and Szekely and Rizzo (2014)."""
    n = len(K)
    rounding = 1e-14 * np.abs(K).max()                    # what is rounding only becomes 0
    if debiased:
        K = K - np.diag(np.diag(K))
        rows = K.sum(0) / (n - 2)
        K = K - rows - rows[:, None] + rows.sum() / (n - 1)
        np.fill_diagonal(K, 0)
    else:
        rows = K.mean(0)
        K = K - rows - rows[:, None] + rows.mean()
    return np.where(np.abs(K) > rounding, K, 0.0)


def _ratio(xy, xx, yy):
    """xy / sqrt(xx yy), nan where a self-similarity is not positive."""
    defined = (xx > 0) & (yy > 0)
    x_norm = np.sqrt(np.where(defined, xx, 1.0))
    y_norm = np.sqrt(np.where(defined, yy, 1.0))
    return np.where(defined, xy / x_norm / y_norm, np.nan)


def linear_cka(X, Y, debiased=False):
    """Linear CKA of features X (n, d) and Y (n, e) of the same n inputs, in float64 (paper, appendix 19):
    ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of centred columns. Biased, as published, it is 0.95 for
    independent Gaussians at n = 200, d = 4,096 (about d / (d + n)); debiased it is about 0 there. nan for
    constant features, and debiased for n < 4 or a self-HSIC <= 0. By way of the n x n Grams unless n is at
    least d and e: then the d x e products are smaller, and the value is the same."""
    n = len(X)
    if n != len(Y):
        raise InputError(f"CKA: {n} and {len(Y)} inputs: the same ones are needed")
    if n < (4 if debiased else 2):
        return math.nan
    X = _centred(X)
    Y = _centred(Y)
    if debiased or n < max(X.shape[1], Y.shape[1]):
        return gram_cka(X @ X.T, Y @ Y.T, debiased)
    return float(_ratio(np.sum((X.T @ Y) ** 2), np.sum((X.T @ X) ** 2), np.sum((Y.T @ Y) ** 2)))


def gram_cka(K, L, debiased=True):
    """`linear_cka` of two Gram matrices (n, n), see `gram`."""
    K, L = centre(K, debiased), centre(L, debiased)
    return float(_ratio(np.vdot(K, L), np.vdot(K, K), np.vdot(L, L)))


def cka_bootstrap(K, L, resamples=1000, seed=0, debiased=True):
    """CKA (resamples,) of random halves of the inputs, drawn without replacement: a repeated input is similar
    to itself in both, which lifts even independent features to 0.95. The same seed draws the same halves for
    every layer.

    All halves at once. For h inputs with sub-Grams K, L (diagonals 0 where debiased), centring by hand gives

        HSIC = sum_ij K_ij L_ij + sum(K) sum(L) / h^2 - 2 / h sum_i K_i. L_i.

    with K_i. the sum of row i, up to a factor; debiased (h - 1)(h - 2) and h - 2 stand for h^2 and h (Song et
    al., equation 5). With a half as a 0/1 vector s each sum is a product with it: K_i. is s_i (K s)_i."""
    h = len(K) // 2
    if h < (4 if debiased else 2):
        return np.full(resamples, np.nan)
    s = random_halves(len(K), resamples, seed)
    K, L = centre(K, False), centre(L, False)             # no change of either statistic, smaller numbers
    if debiased:
        np.fill_diagonal(K, 0)
        np.fill_diagonal(L, 0)

    def hsic(products, K_rows, L_rows):
        """products: K_ij L_ij (n, n); K_rows, L_rows: K_i. and L_i. of each half (resamples, n)."""
        pairs = (h - 1) * (h - 2) if debiased else h ** 2
        others = h - 2 if debiased else h
        value = ((s @ products) * s).sum(1)
        value = value + K_rows.sum(1) * L_rows.sum(1) / pairs
        value = value - 2 / others * (K_rows * L_rows).sum(1)
        rounding = 1e-13 * np.abs(products).sum()
        return np.where(np.abs(value) > rounding, value, 0.0)

    K_rows = (s @ K) * s
    L_rows = (s @ L) * s
    return _ratio(hsic(K * L, K_rows, L_rows), hsic(K * K, K_rows, K_rows), hsic(L * L, L_rows, L_rows))


def random_halves(n, resamples, seed):
    """(resamples, n) of 0 and 1: in each row a random half of n inputs."""
    order = np.random.default_rng(seed).random((resamples, n)).argsort(1)
    halves = np.zeros((resamples, n))
    np.put_along_axis(halves, order[:, :n // 2], 1.0, axis=1)
    return halves


def cka_permuted(K, L, permutations=1000, seed=0, debiased=True):
    """CKA (permutations,) with the inputs of L in another order: what unrelated features of these spectra
    score."""
    K, L = centre(K, debiased), centre(L, debiased)
    rng = np.random.default_rng(seed)
    products = []
    for _ in range(permutations):
        order = rng.permutation(len(L))
        products.append(np.vdot(K, L[np.ix_(order, order)]))
    return _ratio(np.array(products), np.vdot(K, K), np.vdot(L, L))


# -- the landscape: config -----------------------------------------------------------------------------------

@dataclass
class Landscape:
    base: Positional[str]                # weights at (0, 0): preset, folder
    mt: Positional[str]                  # at (1, 0)
    rl: Positional[str]                  # at (1, 1)
    run: Annotated[str, tyro.conf.arg(name="out", aliases=("--run",))] = \
        "runs/analysis/landscape"        # folder of the results
    path: int = 11                       # points from base by way of mt to rl, odd
    grid: int = 5                        # points a side of the plane; 0 = the path alone; paper
    prompts: str = "toy"                 # .jsonl of held-out prompts (paper: of MATH500); toy = the world's
    domains: str = "math+science"        # prompts of these are taken
    problems: int = 0                    # of the prompts, 0 = the paper's 200 (toy 100)
    samples: int = 0                     # a problem, 0 = the paper's 8 (toy 2)
    temperature: float = 0.6             # paper
    top_p: float = 0.95                  # paper
    max_new_tokens: int = 0              # 0 = the paper's 7,680 (toy 96)
    context: int = 0                     # of prompt and answer, 0 = what config.json allows (toy 256)
    seed: int = 1                        # of the samples
    engine: str = "torch"                # torch (embedded), vllm
    layout: str = "inside"               # vllm: inside this process, beside (its own GPUs: --gpus)
    gpus: str = ""                       # vllm beside: its GPUs, "4,5,6,7"
    tensor_parallel: int = 1             # vllm: GPUs that hold a model together
    gpu_memory: float = 0.9              # vllm: share of a GPU's memory for weights and cache
    max_batch: int = 256                 # samples made at a time, a rank
    dtype: str = ""                      # of the engine, rounded to once; "" = bfloat16 (toy float32)
    unsafe_sandbox: bool = False         # run programs without bubblewrap (see verify.py)
    device: str = "auto"                 # auto, cpu, cuda


PAPER = dict(problems=200, samples=8, max_new_tokens=7680, dtype="bfloat16")
TOY = dict(problems=100, samples=2, max_new_tokens=96, dtype="float32", context=256)
FREE = tuple(field.name for field in dataclasses.fields(Landscape))  # points know what they were made with
MADE_WITH = ("samples", "temperature", "top_p", "max_new_tokens", "context", "seed", "dtype",
             "engine")                                    # its noise is its own
DTYPES = ("bfloat16", "float32")


def check_landscape(cfg):
    """Refuses what cannot run, naming the flag."""
    if cfg.path < 3 or cfg.path % 2 == 0:
        raise InputError(f"--path={cfg.path}: give an odd number of points from 3 on, as mt is in the middle")
    if cfg.grid < 0 or cfg.grid == 1:
        raise InputError(f"--grid={cfg.grid}: give 2 points a side or more, or 0 for the path alone")
    refuse_below("--problems", cfg.problems, 1)
    refuse_below("--samples", cfg.samples, 1)
    refuse_choice("--dtype", cfg.dtype, DTYPES)
    refuse_choice("--engine", cfg.engine, ("torch", "vllm"))
    unknown = set(cfg.domains.split("+")) - {"math", "code", "science"}
    if unknown:
        raise InputError(f"--domains={cfg.domains}: {min(unknown)!r} is not one of math, code, science")


# -- the landscape: weights of a point -----------------------------------------------------------------------

class Point(NamedTuple):
    """W(alpha, beta) = base + alpha (mt - base) + beta (rl - mt)."""
    alpha: float
    beta: float


def combination(point, base, mt, rl):
    """The weights of a Point as text for Init. Terms of coefficient 0 are left out: a corner is that
    checkpoint alone, bit by bit."""
    alpha, beta = point
    terms = ((1 - alpha, base), (alpha - beta, mt), (beta, rl))
    return " + ".join(f"{weight!r}*{name}" for weight, name in terms if weight)


def path_and_grid(path, grid):
    """The Points of the path, base to mt to rl, and of the plane, beta by beta. path: points in all, odd;
    grid: points a side."""
    half = path // 2
    to_mt = [Point(i / half, 0.0) for i in range(half + 1)]
    to_rl = [Point(1.0, i / half) for i in range(1, half + 1)]
    side = [i / (grid - 1) for i in range(grid)]
    return to_mt + to_rl, [Point(alpha, beta) for beta in side for alpha in side]


def whole_tensors(init, dtype):
    """(hub name, whole tensor) of every parameter, one at a time, matrices in dtype: what load_weights takes.
    Vectors (norms, A_log) stay as the sum has them, float32: the engine rounds them if it wants to."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Model(init.arch).named_parameters()}
    for name, shape in shapes.items():
        whole = init.read(name, 0, shape[0])
        yield name, whole.to(dtype) if len(shape) > 1 else whole


# -- the landscape: pass rates -------------------------------------------------------------------------------

def landscape_scores(base, mt, rl, out, **how):
    """Pass rates of held-out problems at W(alpha, beta), on the path and on the plane (how: see Landscape).
    Returns {"path": [{"alpha", "beta", "score", "low", "high"}], "grid": the same, "problems", "samples"},
    also out/landscape.json. The weights of a point go tensor by tensor into one running engine, never to
    disk. out/landscape.jsonl gets a line a point, under a hash of all that made it: the same command goes on
    after a kill, and with every point there it starts no engine. The grader is not part of that hash: delete
    the file after a change of it."""
    cfg = with_defaults(Landscape(base, mt, rl, out, **how))
    check_landscape(cfg)
    with join_ranks(cfg.device) as ranks:
        run = Run(out, cfg, ranks, FREE)
        with ranks.first_on_node():                       # it downloads, the others find it
            corners = open_corners(cfg)
        cfg = dataclasses.replace(cfg, context=context_of(corners.mt.arch, cfg.context))
        records, left_out = landscape_problems(cfg, corners.mt.tokenizer())
        path, grid = path_and_grid(cfg.path, cfg.grid)
        keys = point_keys(path + grid, corners, records, cfg, ranks)

        # Every point that has no line yet is made, and its line kept unless something could not be graded.
        with saved_points(run, ranks) as (file, lines):
            missing = [point for point, key in keys.items() if key not in lines]
            reasons = "".join(f" ({n} left out {reason})" for reason, n in left_out.items())
            run.log(f"{len(keys)} points, {len(missing)} to make, of {len(records)} problems{reasons}"
                    f" x {cfg.samples} samples; base {base}, mt {mt}, rl {rl}")
            engine = make_engine(corners.mt.text, cfg, ranks) if missing else None
            for point in missing:
                line, ungraded = score_point(engine, corners.mixed(point), point, records, cfg, ranks)
                line = {"key": keys[point]} | line
                lines[line["key"]] = line
                if ranks.rank == 0 and not ungraded:
                    with run.writing("landscape.jsonl"):
                        file.write(json.dumps(line).encode() + b"\n")
                        file.flush()
                run.log(point_text(line, ungraded))
            if engine is not None:
                engine.close()

        scores = {}
        for point, key in keys.items():
            scores[point] = {name: lines[key][name] for name in ("alpha", "beta", "score", "low", "high")}
        result = {"path": [scores[point] for point in path],
                  "grid": [scores[point] for point in grid],
                  "problems": len(records),
                  "samples": cfg.samples}
        if ranks.rank == 0:
            with run.writing("landscape.json"):
                write_atomic(run.path("landscape.json"), json.dumps(result, indent=1))
        return result


def with_defaults(cfg):
    """A Landscape whose zeros and empty texts are the paper's values, or the toys'."""
    defaults = TOY if cfg.prompts == "toy" else PAPER
    unset = {name: value for name, value in defaults.items() if not getattr(cfg, name)}
    return dataclasses.replace(cfg, **unset)


class Corners(NamedTuple):
    """The three checkpoints of the plane, each an Init of a single term."""
    base: Init
    mt: Init
    rl: Init

    def mixed(self, point):
        """The Init of a Point. InputError where the three are of different architectures."""
        paths = [init.terms[0].checkpoint.path for init in self]       # of a preset: its folder in the cache
        return Init(combination(point, *paths))


def open_corners(cfg):
    """The Corners of a Landscape. InputError on sums, and on different architectures."""
    inits = {}
    for flag in Corners._fields:
        text = getattr(cfg, flag)
        inits[flag] = Init(text)
        terms = len(inits[flag].terms)
        if terms > 1:
            raise InputError(f"--{flag}={text!r} is a sum of {terms} checkpoints; write it as one first "
                             f"(merge), and give its folder")
    corners = Corners(**inits)
    corners.mixed(Point(0.5, 0.25))
    return corners


def point_keys(points, corners, records, cfg, ranks):
    """{point: a hash of all that makes its pass rate}: weights, problems, how answers are sampled."""
    weights = None
    if ranks.rank == 0:
        weights = [init.identity() for init in corners]
    problems = [(record["id"], record["ids"], record["truth"]) for record in records]
    settings = [getattr(cfg, name) for name in MADE_WITH]
    made_of = ranks.agree(weights), problems, settings
    return {point: digest(*made_of, *point) for point in points}


def landscape_problems(cfg, tokenizer):
    """(records of the problems to answer, {why some were left out: how many}); a fair sample, the same one in
    every run."""
    records, left_out = read_prompts(cfg.prompts, "prompts", cfg.domains.split("+"), tokenizer, cfg.context,
                                     "heldout", 128)
    need_sandbox(records, cfg)
    records = sorted(records, key=lambda record: shuffle_key(record["id"]))
    return records[:cfg.problems], left_out


@contextlib.contextmanager
def saved_points(run, ranks):
    """(file, {key: line}) of landscape.jsonl: open for more lines on rank 0, else None; the lines that are
    there, on every rank."""
    file = None
    lines = {}
    with contextlib.ExitStack() as stack:
        if ranks.rank == 0:
            with run.writing("landscape.jsonl"):
                file = stack.enter_context(appending(run.path("landscape.jsonl")))
            for _, _, line in read_jsonl(run.path("landscape.jsonl"), "run"):
                lines[line.get("key")] = line
        yield file, ranks.agree(lines)


def score_point(engine, init, point, records, cfg, ranks):
    """({"alpha", "beta", "score", "low", "high", "seconds"}, how many samples could not be graded)."""
    start = time.monotonic()
    shares, ungraded = pass_rates(engine, init, records, cfg, ranks)
    score = interval(shares, cfg.samples)._asdict()
    return point._asdict() | score | {"seconds": time.monotonic() - start}, ungraded


def point_text(line, ungraded):
    """A point in the log."""
    text = (f"alpha {line['alpha']:.3f} beta {line['beta']:.3f} | pass {line['score']:6.1%} "
            f"[{line['low']:.1%}, {line['high']:.1%}] | {line['seconds']:.1f} s")
    if ungraded:
        text += f" | {ungraded} samples could not be graded: the next run makes it again"
    return text


def pass_rates(engine, init, records, cfg, ranks):
    """([share of right samples] of all problems, how many samples the machine could not grade) at the weights
    of init. The keys are the same at every point: neighbours differ by their weights alone, not by luck."""
    engine.load_weights(whole_tensors(init, engine.dtype))
    local = records[ranks.rank::ranks.world]
    prompts = [record["ids"] for record in local]
    keys = [("landscape", record["id"]) for record in local]
    samples = engine.generate(prompts, cfg.samples, max_new_tokens=cfg.max_new_tokens,
                              temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed, keys=keys)
    answers = []
    for record, record_samples in zip(local, samples, strict=True):
        for sample in record_samples:
            answers.append((record["domain"], sample.text, record["truth"], sample.finish_reason))
    verdicts = grade_batch(answers, unsafe_sandbox=cfg.unsafe_sandbox, again=1)
    right = np.reshape([verdict.correct for verdict in verdicts], (-1, cfg.samples))
    shares = np.zeros(len(records))
    shares[ranks.rank::ranks.world] = right.mean(1)
    ungraded = sum(transient(verdict.reason) for verdict in verdicts)
    *shares, ungraded = ranks.sum(*shares, ungraded)
    return shares, int(ungraded)


# -- the trajectory of RL ------------------------------------------------------------------------------------

def learning_rates(run):
    """(config of a run of midtrain.py or rl.py, {step: learning rates of its optimizer steps}), as
    metrics.jsonl has them: those really used, also where --steps was changed on the way. A step of RL whose
    groups taught nothing (gnorm 0) did not touch the weights."""
    try:
        with open(os.path.join(run, "config.json")) as f:
            cfg = dict(json.load(f))
        rates = {}
        for line in read_lines(os.path.join(run, "metrics.jsonl")):
            if "gnorm" in line:
                updates = cfg.get("updates", 1) if line["gnorm"] else 0
                rates[line["step"]] = [line["lr"]] * updates
        return cfg, rates
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{run} is no run of midtrain.py or rl.py: config.json or metrics.jsonl cannot be "
                         f"read ({e!r}); give the --run folder that holds them") from None


def exported_models(run):
    """{step: folder} of the models that a run of rl.py has exported, its last one included."""
    folder = os.path.join(run, "models")
    models = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if re.fullmatch(r"step_\d+", name):
            models[int(name.removeprefix("step_"))] = os.path.join(folder, name)
    try:                                                  # comes last: of which step model/ is
        with open(os.path.join(run, "rl.json")) as f:
            models.setdefault(json.load(f)["steps"], os.path.join(run, "model"))
    except FileNotFoundError:                             # has not ended
        pass
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{run}/rl.json is damaged ({e!r}): that run's command writes it again") from None
    if not models:
        raise InputError(f"{run} has no models/step_N, no finished model: train with --export_at=20,40,80")
    return dict(sorted(models.items()))


def sampled_weights(path, count=1 << 18, component="", seed=0):
    """`count` weights of a checkpoint or of its component (float32; all if there are fewer), each as likely
    as another."""
    folder = Folder(path)
    names = sorted(compared_names(folder))
    if component:
        names = [name for name in names if first_part(name).component == component]
    sizes = [math.prod(folder.shape(name)) for name in names]
    ends = np.cumsum(sizes)                               # of the tensors, laid end to end
    total = int(ends[-1])
    chosen = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
    chosen.sort()
    by_tensor = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    weights = []
    for name, end, size, places in zip(names, ends, sizes, by_tensor, strict=True):
        rows = folder.shape(name)[0]
        flat = folder.read(name, 0, rows).flatten()
        weights.append(flat[places - (end - size)].float())
    return torch.cat(weights)


def weight_trajectory(run, start, base=None, thresholds=THRESHOLDS, count=1 << 18):
    """How far RL has come from where it started, and from the base, by step: {"run", "start", "base",
    "steps": [{"step", "model", "lr_sum", "start", "base" (None without one), "null"}]}.

    start, base: compare_checkpoints' row of the total. null: weight_change of a sample of `count` of start's
    weights after as many AdamW steps on noise, at the learning rates that the run had, float32 rounded once
    to its export's dtype (noise_null's masters). lr_sum: about the farthest those steps can move a weight."""
    cfg, rates = learning_rates(run)
    w0 = sampled_weights(start, count)
    # A float32 start that is rounded to bfloat16 changes everywhere: noise tells nothing there.
    has_null = is_bf16(Folder(start)) or cfg["export_dtype"] == "float32"

    def total(old, new):
        rows = compare_checkpoints(old, new, thresholds=thresholds)["rows"]
        return next(row for row in rows if row["by"] == "total")

    steps = []
    for step, model in exported_models(run).items():
        lrs = []                                          # of every optimizer step so far
        for n in range(1, step + 1):
            if n not in rates:
                raise InputError(f"{run}: metrics.jsonl has no step {n}, but {model} is of step {step}: put "
                                 f"the run's own file back, or move that model away")
            lrs += rates[n]
        null = None
        if has_null:                                      # the 48 models of the paper's run: under a minute
            null = noise_null(w0, lrs, cfg["beta1"], cfg["beta2"], cfg["eps"],
                              getattr(torch, cfg["export_dtype"]), thresholds=thresholds)["masters"]
        steps.append({"step": step, "model": model, "lr_sum": sum(lrs), "start": total(start, model),
                      "base": total(base, model) if base else None, "null": null})
    return {"run": run, "start": start, "base": base, "steps": steps}


# -- behaviour -----------------------------------------------------------------------------------------------

def behaviour_table(stages):
    """The paper's table 15, of evaluate.py's results, {stage: folder}: {"rows": [{"task", "stage", "score",
    "low", "high", "problems", "samples" (a problem), "all", "right", "wrong"}], "differ": {task: {setting:
    values by stage}}}. all, right, wrong: {"samples" (together), "median_tokens", "nll": mean over samples of
    the mean negative log-probability of a token, nats}, None of no sample. differ: what keeps the stages of a
    task from being comparable."""
    graded_tasks = {}                                     # {stage: {task: result}}
    for stage, folder in stages.items():
        results, _ = read_results(folder)
        graded_tasks[stage] = {task: r for task, r in results["tasks"].items() if "score" in r}
    first = next(iter(graded_tasks.values()), {})
    shared = [task for task in first if all(task in tasks for tasks in graded_tasks.values())]
    if not shared:
        raise InputError(f"{', '.join(stages.values()) or 'no folder'}: no task was graded in all of them; "
                         f"give evaluations of the same --tasks")
    columns = ("score", "low", "high", "problems", "samples", "all", "right", "wrong")
    rows = []
    differ = {}
    for task in shared:
        settings = {}                                     # {stage: what its samples were made with}
        for stage, tasks in graded_tasks.items():
            result = tasks[task]
            rows.append({"task": task, "stage": stage} | {key: result[key] for key in columns})
            settings[stage] = result.get("settings", {}) | {"problems": result["problems"]}
        for key in next(iter(settings.values())):
            values = {stage: made_with.get(key) for stage, made_with in settings.items()}
            if len(set(values.values())) > 1:
                differ.setdefault(task, {})[key] = values
    return {"rows": rows, "differ": differ}


# -- what the commands share ---------------------------------------------------------------------------------

def names_by_path(paths):
    """{checkpoint or folder: its name in tables}, see comparison.run_names. InputError where one is given
    twice."""
    if len(set(map(os.path.realpath, paths))) < len(paths):
        raise InputError(f"{', '.join(paths)}: one of them is given twice")
    return dict(zip(paths, comparison.run_names(paths), strict=True))


def read_analysis(out, name):
    """out/name.json, or {}; the folder is made."""
    path = os.path.join(out, f"{name}.json")
    try:
        os.makedirs(out, exist_ok=True)
        if os.path.exists(path):
            with open(path) as f:
                return dict(json.load(f))
    except OSError as e:
        raise InputError(f"--out={out}: cannot write there ({e.strerror}); give another folder") from None
    except (ValueError, TypeError) as e:
        raise InputError(f"--out: {path} is damaged ({e}); remove it") from None
    return {}


def write_analysis(out, name, content):
    """Writes out/name.json."""
    try:
        write_atomic(os.path.join(out, f"{name}.json"), json.dumps(content, indent=1))
    except OSError as e:
        raise InputError(f"--out={out}: {name}.json cannot be written ({e.strerror}); make room") from None


def is_bf16(folder):
    """Whether a checkpoint's matrices are stored in bfloat16."""
    matrix = next(name for name in sorted(folder.names()) if len(folder.shape(name)) == 2)
    return folder.read(matrix, 0, 1).dtype == torch.bfloat16


# -- the commands: weights -----------------------------------------------------------------------------------

def weights(old: Positional[str], new: Positional[str], other: Positional[str] = "", null: str = "",
            rank: str = "off", out: str = "runs/analysis"):
    """How far the weights of a checkpoint moved: by component and layer, with the thresholds of the paper.

    Args:
        old: folder of the checkpoint that training began with
        new: folder of the one it ended with
        other: another one that began with old: also the cosine of the two changes
        null: run folder that made new from old: what its learning rates would do on pure noise
        rank: off, sampled (a matrix of each kind), all: stable rank of the change and its place in old's top
            subspaces
        out: where weights.json goes; pairs that are there already stay
    """
    refuse_choice("--rank", rank, ("off", "sampled", "all"))
    changed = [new, other] if other else [new]
    names = names_by_path([old, *changed])
    pairs = {}                                            # {(old, new) as real paths: pair}
    for pair in read_analysis(out, "weights").get("pairs", []):
        pairs[tuple(map(os.path.realpath, pair["folders"]))] = pair
    null_run = learning_rates(null) if null else None
    began_bf16 = is_bf16(Folder(old))
    for folder in changed:
        beside = other if other and folder == new else None
        compared = compare_checkpoints(old, folder, beside)
        ended_bf16 = is_bf16(Folder(folder))
        pair = {
            "names": [names[old], names[folder]],
            "folders": [old, folder],
            "bf16": began_bf16 and ended_bf16,
            "cosine_with": names.get(beside),
            "null": None,                                 # noise_null of all weights
            "nulls": {},                                  # of all and of each component, rounded as the file
            "geometry": [],
            "rows": compared["rows"],
            "missing": compared["missing"],
            "extra": compared["extra"],
        }
        if null and folder == new:
            if ended_bf16 and not began_bf16:
                raise InputError(f"--null={null}: {old} is float32 and {new} bfloat16, so rounding alone "
                                 f"changes every weight; compare checkpoints of one dtype")
            nulls = component_nulls(old, compared["tensors"], *null_run)
            variant = "masters" if ended_bf16 else "float32"
            pair["null"] = nulls["total"]
            pair["nulls"] = {component: noise[variant] for component, noise in nulls.items()}
        if rank != "off":
            pair["geometry"] = geometry(old, folder, compared["tensors"], rank == "all")
        pairs[os.path.realpath(old), os.path.realpath(folder)] = pair
        write_analysis(out, "weights", {"thresholds": THRESHOLDS, "pairs": list(pairs.values())})
        print(weights_table(pair))


def component_nulls(old, tensors, cfg, rates):
    """{"total" or a component: noise_null of a sample of its weights} at the learning rates of a run."""
    lrs = sum(rates.values(), [])
    nulls = {}
    for component in ("", *dict.fromkeys(tensor["component"] for tensor in tensors)):
        w0 = sampled_weights(old, 1 << 17, component)
        nulls[component or "total"] = noise_null(w0, lrs, cfg["beta1"], cfg["beta2"], cfg["eps"])
    return nulls


def geometry(old, new, tensors, all_matrices):
    """update_geometry of all matrices, or of the largest one of each sub-component."""
    folders = Folder(old), Folder(new)
    shapes = {}                                           # of the matrices
    for tensor in tensors:
        shape = folders[0].shape(tensor["name"])
        if len(shape) == 2 and not tensor["nonfinite"]:
            shapes[tensor["name"]] = shape
    names = list(shapes)
    if not all_matrices:
        largest = {}                                      # by sub-component
        for name in sorted(names, key=lambda name: math.prod(shapes[name])):
            largest[first_part(name).sub] = name
        names = sorted(largest.values())
    measured = []
    for name in tqdm(names, unit="matrix", leave=False, disable=None):
        rows = shapes[name][0]
        matrices = [folder.read(name, 0, rows) for folder in folders]
        measured.append({"name": name} | update_geometry(*matrices))
    return measured


def weights_table(pair):
    """A pair's rows as text: by component and sub-component."""
    head = [" to ".join(pair["names"]), "L2 pooled", "L2 mean", "bits, %", "same at 0.1 %", "0.5 %", "1 %",
            "2 %", "5 %", "10 %", f"cosine {pair['cosine_with'] or ''}".strip(), "null: same at 1 %, L2"]
    lines = [head]
    for row in pair["rows"]:
        if row["by"] not in ("total", "component", "component+sub"):
            continue
        null_text = "-"
        null = pair["nulls"].get(row.get("component", "total"))
        if null and row["by"] != "component+sub":
            null_text = f"{percent(null['unchanged'][0.01])}, {number(null['relative_l2'], '{:.2g}')}"
        indent = "  " if row["by"] == "component+sub" else ""
        lines.append([indent + (row.get("sub") or row.get("component") or "all"),
                      number(row["relative_l2"]), number(row["mean_l2"]), percent(row["bits_share"]),
                      *map(percent, row["unchanged"].values()), number(row.get("cosine"), "{:.3f}"),
                      null_text])
    text = aligned(lines)
    total = next(row for row in pair["rows"] if row["by"] == "total")
    if total["nonfinite"]:
        text.append(f"{total['nonfinite']:,} entries are not finite, and left out")
    if pair["bf16"]:
        text.append("bfloat16: no change is under 0.39 %, so 0.1 % counts every changed value")
    for matrix in pair["geometry"]:
        figures = [f"{key} {matrix[key]:.3g} (entries permuted {matrix['null'][key]:.3g})"
                   for key in ("stable_rank", "left", "right") if matrix[key] is not None]
        text.append(f"{matrix['name']}: {', '.join(figures)}")
    return "\n".join(text) + "\n"


# -- the commands: representations ---------------------------------------------------------------------------

def _corpus(repo, files, column):
    return registry.Part(repo, files, (column,), partial(text_of, column=column))


CORPORA = {                                               # the paper's; revision: `main` at the first get
    "wikipedia": _corpus("wikimedia/wikipedia", "20231101.en/train-00000-of-*.parquet", "text"),
    "c4": _corpus("allenai/c4", "en/c4-validation.00000-of-*.json.gz", "text"),
    "gsm8k": _corpus("openai/gsm8k", "main/test-*.parquet", "question"),
}


def read_texts(corpus, count, raw):
    """`count` texts: of the embedded world (toy), of CORPORA, or of a .jsonl's text, prompt or question."""
    if corpus == "toy":
        texts = _toy_texts(count)
    elif corpus in CORPORA:
        texts = _hub_texts(corpus, raw)
    elif os.path.exists(corpus):
        texts = (row.get("text") or row.get("prompt") or row.get("question") for _, row in read_rows(corpus))
    else:
        raise InputError(f"--texts={corpus}: give toy, {', '.join(CORPORA)}, or a .jsonl file")
    texts = (text for text in texts if isinstance(text, str) and text.strip())
    texts = list(islice(texts, count))
    if len(texts) < max(8, count):
        raise InputError(f"--texts={corpus} has {len(texts)} texts, --count={count} are wanted; give more, "
                         f"or a smaller --count (at least 8)")
    return texts


def _toy_texts(count):
    """Prose of the embedded world and its problems in turns: math, then science."""
    prose = world.documents("dclm-edu", "heldout")
    for i, text in zip(range(2 * count), prose, strict=False):
        yield text
        yield world.problem(("math", "science")[i % 2], "heldout", i // 2).prompt


def _hub_texts(corpus, raw):
    """The texts of one of CORPORA, which is downloaded if it is not there yet."""
    part = CORPORA[corpus]
    if not is_there(raw, corpus):
        get_part(Hub(), corpus, part, None, raw, 1)
    for file in raw_files(raw, corpus, part):
        for _, row in read_rows(file, part.columns):
            yield part.read(row)


POOLING = {"mean": lambda h: h.mean(0), "last": lambda h: h[-1], "first": lambda h: h[0]}


@torch.inference_mode()
def representations(path, texts, pooling, tokens, dtype, device):
    """Features of every residual stream, after the embedding, each layer, and the final norm: [(n, C) float32
    arrays]. One text at a time, so nothing is padded; the bos, if the model has one, is read and left out of
    the pooling (its activations are massive)."""
    model = load(path, dtype=getattr(torch, dtype), device=device)
    bos = model.tokenizer.bos_ids                         # [] or [the token]
    pool = POOLING[pooling]
    by_text = []                                          # the streams' features (L + 2, C) of each text
    for text in tqdm(texts, unit="text", desc=path, leave=False, disable=None):
        ids = bos + model.tokenizer.encode(text)[:tokens]
        streams = model.hidden_states(torch.tensor([ids], device=device))
        features = torch.stack([pool(h[0, len(bos):].float()) for h in streams])
        by_text.append(features.cpu().numpy())            # the text's one wait for the device
    return list(np.stack(by_text, axis=1))


def cka(checkpoints: Positional[tuple[str, ...]], texts: str = "toy", count: int = 200,
        pooling: str = "mean", tokens: int = 512, without: int = 4, resamples: int = 1000,
        dtype: str = "float32", device: str = "auto", raw: str = "data/raw", seed: int = 0,
        out: str = "runs/analysis"):
    """How alike checkpoints represent the same texts, layer by layer: linear CKA, as published and debiased.

    Args:
        checkpoints: two or more folders
        texts: toy, wikipedia, c4, gsm8k, or a .jsonl file
        count: texts; the paper takes 200
        pooling: of a text's positions: mean (paper), last, first
        tokens: of a text at most
        without: dimensions of the largest variance that the variant leaves out
        resamples: random halves of the texts for the interval, and permutations for the band
        dtype: of the models
        device: auto, cpu, cuda
        raw: where downloads are kept
        seed: of halves and permutations
        out: where cka.json goes; other texts that are there stay
    """
    if len(checkpoints) < 2 or pooling not in POOLING or dtype not in DTYPES:
        raise InputError(f"cka: give two checkpoints or more, --pooling={' or '.join(POOLING)}, "
                         f"--dtype={' or '.join(DTYPES)}")
    refuse_below("--tokens", tokens, 1)
    refuse_below("--without", without, 0)
    refuse_below("--resamples", resamples, 1)
    names = names_by_path(checkpoints)
    _check_depths(checkpoints)
    saved = read_analysis(out, "cka")
    chosen = read_texts(texts, count, raw)
    features = {}                                         # {name: [(n, C) of each stream]}
    with join_ranks(device) as ranks:                     # names a device that is not there
        for path, name in names.items():
            features[name] = representations(path, chosen, pooling, tokens, dtype, ranks.device)
    pairs = {}                                            # {pair: [CKA of each stream]}
    for one, two in combinations(features, 2):
        curve = []
        for layer, (x, y) in enumerate(zip(features[one], features[two], strict=True)):
            curve.append({"layer": layer} | layer_cka(x, y, without, resamples, seed))
        pairs[f"{one} {two}"] = curve
        print(cka_text(f"{one} {two}, {len(chosen)} texts of {texts}", curve, without))
    content = dict(names=list(features), texts=len(chosen), corpus=texts, pooling=pooling, without=without,
                   pairs=pairs)
    key = texts if pooling == "mean" else f"{texts}, {pooling}"
    write_analysis(out, "cka", saved | {key: content})


def _check_depths(checkpoints):
    """InputError unless checkpoints have as many layers as the first one."""
    wanted = len(Init(checkpoints[0]).arch.layers)
    for path in checkpoints:
        depth = len(Init(path).arch.layers)
        if depth != wanted:
            raise InputError(f"cka: {path} has {depth} layers, {checkpoints[0]} has {wanted}: only models of "
                             f"one depth can be compared layer by layer")


def layer_cka(x, y, without, resamples, seed):
    """CKA of features x and y (n, C) of one layer: biased with the paper's deviation (of 20 halves), debiased
    with its 95 % interval over random halves, the 95 % band of permuted inputs, and the debiased one without
    each side's dimensions of the largest variance."""
    K, L = gram(x), gram(y)
    halves = cka_bootstrap(K, L, resamples, seed)
    permuted = cka_permuted(K, L, resamples, seed)
    low, high = np.nanquantile(halves, [0.025, 0.975]).tolist()
    null_low, null_high = np.nanquantile(permuted, [0.025, 0.975]).tolist()
    few_halves = cka_bootstrap(K, L, 20, seed, debiased=False)
    K_without, L_without = gram(without_top(x, without)), gram(without_top(y, without))
    return {"biased": gram_cka(K, L, debiased=False),
            "debiased": gram_cka(K, L),
            "low": low,
            "high": high,
            "null_low": null_low,
            "null_high": null_high,
            "biased_std": float(few_halves.std()),
            "without_top": gram_cka(K_without, L_without)}


def cka_text(title, curve, without):
    """The layer of the least CKA, as text."""
    least = min(curve, key=lambda layer: layer["biased"])
    return (f"{title}, least at layer {least['layer']}: biased {least['biased']:.4f} +- "
            f"{least['biased_std']:.4f} (paper's), debiased {least['debiased']:.4f} [{least['low']:.4f}, "
            f"{least['high']:.4f}], without the {without} largest dimensions {least['without_top']:.4f}, "
            f"permuted {least['null_low']:.3f} to {least['null_high']:.3f}")


# -- the other commands --------------------------------------------------------------------------------------

def compare(evaluations: Positional[tuple[str, ...]], out: str = ""):
    """Evaluations beside each other: scores, gains paired by problem, what becomes of unsolved problems.

    Args:
        evaluations: folders of evaluate.py, in the order of training
        out: where compare.json, .png and .svg go; "" = the last of the folders
    """
    comparison.compare(list(evaluations), out)


def landscape(cfg: Annotated[Landscape, tyro.conf.arg(name="")]):
    """Pass rates between checkpoints: along base, mid-trained, RL, and on the plane through the three."""
    how = dataclasses.asdict(cfg)
    landscape_scores(how.pop("base"), how.pop("mt"), how.pop("rl"), how.pop("run"), **how)


def trajectory(run: Positional[str], start: Positional[str], base: Positional[str] = "",
               out: str = "runs/analysis"):
    """How far RL's weights have come, step by step, beside Adam on pure noise.

    Args:
        run: folder of a run of rl.py with --export_at models
        start: folder of the checkpoint that it began with
        base: of the base
        out: where trajectory.json goes; other runs that are there stay
    """
    saved = read_analysis(out, "trajectory").get("runs", [])
    moved = weight_trajectory(run, start, base or None)
    steps = []
    print("step   L2 from start   noise   changed by over 1 %   noise")
    for step in moved["steps"]:
        from_start = step_change(step["start"])
        null = step_change(step["null"])
        steps.append({"step": step["step"], "from_mt": from_start, "from_base": step_change(step["base"]),
                      "null": null})
        null_l2 = f"{null['relative_l2']:5.2g}" if null else "    -"
        null_changed = f"{null['changed']['0.01']:.1%}" if null else "-"
        print(f"{step['step']:4d}   {from_start['relative_l2']:13.3g}   {null_l2}   "
              f"{from_start['changed']['0.01']:19.1%}   {null_changed:>5s}")
    name = os.path.normpath(run)
    others = [other for other in saved if other["name"] != name]
    write_analysis(out, "trajectory", {"runs": [*others, {"name": name, "steps": steps}]})


def step_change(row):
    """What trajectory.json keeps of a row of weight_change, or None."""
    if row is None:
        return None
    changed = {str(t): 1 - share for t, share in row["unchanged"].items()}
    return {"relative_l2": row["relative_l2"], "changed": changed}


def behaviour(evaluations: Positional[tuple[str, ...]], out: str = "runs/analysis"):
    """The paper's table 15: pass rate, length, negative log-probability by stage, of right and wrong answers.

    Args:
        evaluations: folders of evaluate.py
        out: where behaviour.json goes
    """
    read_analysis(out, "behaviour")
    table = behaviour_table({name: folder for folder, name in names_by_path(evaluations).items()})
    lines = [("task", "stage", "pass, %", "95 % interval", "tokens", "right", "wrong", "nll", "right",
              "wrong")]
    for row in table["rows"]:
        kinds = [row[kind] for kind in ("all", "right", "wrong")]
        tokens = [number(kind["median_tokens"], "{:.0f}") for kind in kinds]
        nll = [number(kind["nll"], "{:.3f}") for kind in kinds]
        lines.append((row["task"], row["stage"], percent(row["score"]),
                      f"{percent(row['low'])} to {percent(row['high'])}", *tokens, *nll))
    print("\n".join(aligned(lines, ">")))
    for task, settings in table["differ"].items():
        print(f"not made alike: {task}: {settings}")
    write_analysis(out, "behaviour", table)


def report(folders: Positional[tuple[str, ...]], out: str = "runs/report"):
    """One page of pictures, tables and plain words: out/report.html, and each picture as PNG and SVG.

    Args:
        folders: runs, or folders of runs: what they are is found by the files in them
        out: the folder of the page
    """
    print(page.report(folders, out))


def merge(combination: Positional[str], out: Positional[str], dtype: str = "bfloat16"):
    """Writes a linear combination of checkpoints in hub format: "0.15*A + 0.85*B".

    Args:
        combination: coefficients that sum to 1, and folders or presets; the tokenizer is the first one's
        out: the folder; a checkpoint that is there is replaced, but none of the terms
        dtype: bfloat16 or float32, of the file; sums are float32, rounded once
    """
    refuse_choice("--dtype", dtype, DTYPES)
    present = sorted(os.listdir(out)) if os.path.isdir(out) else []
    parts = "config.json", "generation_config.json", "model", "tokenizer", "special_tokens_map.json", "tekken"
    foreign = [name for name in present
               if not name.startswith(parts) or os.path.isdir(os.path.join(out, name))]
    if foreign or os.path.exists(out) and "config.json" not in present:
        what = f"no checkpoint alone: it has {foreign[0]}" if foreign else "no checkpoint"
        raise InputError(f"--out={out} is there and is {what}; give another, or move it away")
    for term in Init(combination).terms:
        inside = os.path.realpath(term.checkpoint.path) + os.sep
        if inside.startswith(os.path.realpath(out) + os.sep):
            raise InputError(f"--out={out} is or holds a term of {combination!r}, which it would replace; "
                             f"give another")
    save(load(combination, dtype=getattr(torch, dtype)), out)
    print(out)
    return out


if __name__ == "__main__":
    commands(compare, weights, cka, landscape, trajectory, behaviour, report, merge)
