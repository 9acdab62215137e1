"""What training changed: weights, representations, behaviour (paper, section 10, appendices 18-20).

    python analyze.py weights runs/base/model runs/mt/model                        # and runs/other/model
    python analyze.py weights runs/mt/model runs/rl/model --null=runs/rl           # beside Adam on noise
    python analyze.py cka runs/base/model runs/mt/model runs/rl/model
    python analyze.py landscape runs/base/model runs/mt/model runs/rl/model
    python analyze.py trajectory runs/rl runs/mt/model runs/base/model
    python analyze.py behaviour runs/eval/base runs/eval/mt runs/eval/rl
    python analyze.py report runs runs/eval runs/analysis
    python analyze.py merge "0.15*runs/base/model + 0.85*runs/mt/model" runs/merged

Each command prints a table and puts what it found into runs/analysis (--out), from which `report` makes one
page. Weights are compared bit by bit and value by value in one pass over the files, beside what rounding
alone would give (`noise_null`); representations by CKA, biased as published and debiased.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice
from typing import Annotated

import numpy as np
import torch
import tyro
from tqdm import tqdm
from tyro.conf import Positional

from cli import InputError, appending, digest, read_jsonl, read_lines, split_flags, write_atomic
from corpus import world
from corpus.files import read_rows
from corpus.formats import text_of
from corpus.hashes import shuffle_key
from corpus.hub import Hub, get_part, is_there, raw_files
from corpus.registry import Part
from data import need_sandbox, read_prompts
from engines.contract import context_of
from generate import make_engine
from model import Folder, Init, Model, load, save
from reporting.page import report
from runtime import Run, join_ranks
from suite.intervals import aligned, interval, read_results
from verify import grade_batch, transient

# -- weights: the change of one tensor ---------------------------------------------------------------------
# The hot loop is numpy on a chunk of entries: its few buffers stay in cache, whatever the tensor's size.

THRESHOLDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)        # paper, section 10
CHUNK = 1 << 18                     # entries; 64k, of which all fits the cache, spends a fifth on calls
SPARSE = 0.2                        # fewer changed entries than this share: the rest is not looked at again


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
    if isinstance(x, torch.Tensor):
        x, known = x.detach().cpu(), (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        ok, dtype = x.dtype in known, x.dtype
        x = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy() if ok else x
    else:
        x = x.view(np.uint16) if x.dtype.name == "bfloat16" else x                     # of ml_dtypes
        ok, dtype = x.dtype in (np.uint16, np.float16, np.float32, np.float64), x.dtype
    if not ok:
        raise InputError(f"weights of {dtype} cannot be compared: bfloat16 or float16, 32, 64 are needed")
    return x.reshape(-1)


def sums(raw, thresholds):
    """What can be added over chunks and tensors, of raw = [old, new] or [old, new, other] (see `_raw`): the
    counts and sums of weight_change, and of `other` its own squares and its product with new's change."""
    total = dict(entries=0, nonfinite=0, bits=0, values=0, over=np.zeros(len(thresholds), np.int64), dw2=0.0,
                 w02=0.0, dot=0.0, max_dw=0.0) | (dict(other2=0.0, both=0.0) if len(raw) == 3 else {})
    narrow = raw[0].itemsize == 2 and all(x.dtype == raw[0].dtype for x in raw)
    room = min(CHUNK, raw[0].size)
    mask, buffers = np.empty(room, bool), np.empty((len(raw), room), np.float32)
    with np.errstate(all="ignore"):                       # x / 0 = inf is over every t, 0 / 0 = nan over none
        for start in range(0, raw[0].size, CHUNK):
            chunk = [x[start:start + CHUNK] for x in raw]
            _add(total, narrow and _narrow(chunk, thresholds, mask, buffers) or _exact(chunk, thresholds))
    return total


def _add(total, more):
    for what, value in more.items():
        total[what] = max(total[what], value) if what == "max_dw" else total[what] + value


def _float(x, out):
    """bf16 bits or fp16 to float32, into `out`. bf16 two at a time, so in another order: the low halves of
    the words, then the high ones."""
    out = out[:x.size]
    if x.dtype != np.uint16:
        out[...] = x
        return out
    half, bits = x.size // 2, out.view(np.uint32)
    pairs = x[:2 * half].view(np.uint32)
    np.left_shift(pairs, 16, out=bits[:half])
    np.bitwise_and(pairs, 0xffff0000, out=bits[half:2 * half])
    bits[2 * half:] = x[2 * half:]
    bits[2 * half:] <<= 16
    return out


def _dot(x, y):
    """The product of two float32 vectors: rows of 1,024 in float32, then float64. 2e-8 off; np.dot of 64k
    entries is 2e-6 low."""
    whole = x.size // 1024 * 1024
    rows = np.vecdot(x[:whole].reshape(-1, 1024), y[:whole].reshape(-1, 1024))
    return float(rows.sum(dtype=np.float64)) + float(
        np.dot(x[whole:].astype(np.float64), y[whole:].astype(np.float64)))


def _narrow(chunk, thresholds, mask, buffers):
    """`sums` of a chunk of bf16 or fp16 in float32; None where that is not enough: values not finite, squares
    outside float32's range. Near a threshold dw is exact, and rounding dw / w0 does not carry it over t: two
    such short significands have no quotient within 2^-24 of it."""
    old, new, n, raw = chunk[0], chunk[1], chunk[0].size, chunk[0].dtype
    differ = np.not_equal(old.view(np.uint16), new.view(np.uint16), out=mask[:n])
    bits = int(np.count_nonzero(differ))
    w0 = _float(old, buffers[0])
    found = dict(entries=n, bits=bits, w02=_dot(w0, w0))
    if len(chunk) == 2 and bits < SPARSE * n and n % 2 == 0:
        old, new = old.view(np.uint32), new.view(np.uint32)              # pairs: half the search
        pairs = np.flatnonzero(np.not_equal(old, new, out=mask[:n // 2]))
        old, new, n = old[pairs].view(raw), new[pairs].view(raw), 2 * pairs.size
        w0 = _float(old, buffers[0])
    dw = _float(new, buffers[1])
    np.subtract(dw, w0, out=dw)
    found |= dict(dw2=_dot(dw, dw), dot=_dot(w0, dw))
    if len(chunk) == 3:
        other = _float(chunk[2], buffers[2])
        np.subtract(other, w0, out=other)
        found |= dict(other2=_dot(other, other), both=_dot(other, dw))
    squares = [found["w02"], *([found["dw2"]] if bits else ()), found.get("other2") or 1]
    if not all(1e-25 < value < 1e35 for value in squares):
        return None
    np.abs(dw, out=dw)
    found["max_dw"] = float(dw.max(initial=0))
    ratio, over = np.divide(dw, np.abs(w0, out=w0), out=dw), mask[:n]
    found["values"], *counts = (int(np.count_nonzero(np.greater(ratio, t, out=over)))
                                for t in (0.0, *thresholds))
    return found | dict(over=np.array(counts))


def _exact(chunk, thresholds):
    """`sums` of a chunk in float64: any dtypes, any values."""
    wide = [((x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x).astype(np.float64)
            for x in chunk]
    finite = np.logical_and.reduce([np.isfinite(x) for x in wide])
    w0, w1 = (x[finite] for x in wide[:2])
    dw, size = w1 - w0, np.abs(w0)
    found = dict(entries=finite.size, nonfinite=finite.size - w0.size, w02=float(w0 @ w0), dw2=float(dw @ dw),
                 dot=float(w0 @ dw), bits=int(np.count_nonzero(w0.view(np.int64) != w1.view(np.int64))))
    if len(chunk) == 3:
        other = wide[2][finite] - w0
        found |= dict(other2=float(other @ other), both=float(other @ dw))
    np.abs(dw, out=dw)
    return found | dict(max_dw=float(dw.max(initial=0)), values=int(np.count_nonzero(dw)),
                        over=np.array([np.count_nonzero(dw > t * size) for t in thresholds]))


def summary(found, thresholds):
    """`sums` and what follows from them (see weight_change); of three checkpoints also `cosine`, between the
    two changes, None where one of them is 0."""
    n = found["entries"] - found["nonfinite"]
    over = dict(zip(thresholds, found["over"].tolist(), strict=True))
    found = found | dict(
        over=over, unchanged={t: (n - count) / n if n else None for t, count in over.items()},
        relative_l2=math.sqrt(found["dw2"] / found["w02"]) if found["w02"] else None,
        **{f"{key}_share": found[key] / n if n else None for key in ("bits", "values")})
    if "both" in found:
        size = math.sqrt(found["dw2"]) * math.sqrt(found["other2"])
        found["cosine"] = found["both"] / size if size else None
    return found


# -- weights: two checkpoints ------------------------------------------------------------------------------

# leaf of a tensor's name: (component, sub-component), the paper's rows; Mamba's D goes with A and dt
PARTS = {"q_proj": ("attention", "Q"), "k_proj": ("attention", "K"), "v_proj": ("attention", "V"),
         "o_proj": ("attention", "O"), "gate_proj": ("MLP", "gate"), "up_proj": ("MLP", "up"),
         "down_proj": ("MLP", "down"), "output_linear": ("MLP", "down"), "in_proj": ("Mamba", "in_proj"),
         "out_proj": ("Mamba", "out_proj"), "conv1d": ("Mamba", "conv1d"), "A_log": ("Mamba", "A/dt"),
         "dt_bias": ("Mamba", "A/dt"), "D": ("Mamba", "A/dt"), "embed_tokens": ("embedding", "embed"),
         "embeddings": ("embedding", "embed"), "lm_head": ("embedding", "head")}


def part(name):
    """A hub name to (layer or None, component, sub-component): attention Q K V O, MLP gate up down, Mamba
    in_proj out_proj conv1d A/dt, embedding embed head, norm norm (Mamba's gated norm among them)."""
    layer = re.search(r"\blayers\.(\d+)\.", name)
    leaf = re.sub(r"\.(weight|bias)$", "", name).rsplit(".", 1)[-1]
    kind = ("norm", "norm") if "norm" in leaf else PARTS.get(leaf)
    if kind is None:
        raise InputError(f"{name}: no part of the seven models' families (known: {', '.join(PARTS)}, norms)")
    return int(layer[1]) if layer else None, *kind


def pieces(name, rows):
    """The canonical view of a tensor: [(part, start row, stop row)]. Granite 4's input_linear is gate, then
    up; no family fuses Q, K and V."""
    if "input_linear" not in name:
        return [(part(name), 0, rows)]
    return [(part(name.replace("input_linear", leaf)), i * rows // 2, (i + 1) * rows // 2)
            for i, leaf in enumerate(("gate_proj", "up_proj"))]


def compare_checkpoints(old, new, other=None, thresholds=THRESHOLDS, threads=2):
    """Folders in hub format, `new` and perhaps `other` both trained from `old`, in one pass: dict(tensors,
    rows, missing, extra). tensors: `summary` of every piece with its name, layer, component, sub; rows: see
    `table`; missing, extra: names that not all of them have, of `old` and of the others. A tied head is left
    out even where a file repeats it. InputError on damaged files, other shapes, or nothing in common.

    safetensors maps the files: a tensor is read without a copy and takes no memory but the page cache's."""
    folders = [Folder(path) for path in (old, new, other) if path is not None]
    for folder in folders[1:]:
        if folder.arch != folders[0].arch:
            raise InputError(f"{old} and {folder.path} are of different architectures: only checkpoints of "
                             f"one model can be compared")
    names = [folder.names() - ({"lm_head.weight"} if folder.arch.tied else set()) for folder in folders]
    common = sorted(set.intersection(*names))
    if not common:
        raise InputError(f"{old} and {new} have no tensor in common: "
                         f"are they {folders[0].arch.family} and {folders[1].arch.family} models?")
    for name in common:
        shapes = [folder.shape(name) for folder in folders]
        for folder, shape in zip(folders, shapes, strict=True):
            if shape != shapes[0]:
                raise InputError(f"{folder.path}: {name} has shape {list(shape)}, in {old} it has "
                                 f"{list(shapes[0])}: only checkpoints of one model can be compared")
    cut = [(name, *piece) for name in common for piece in pieces(name, (*folders[0].shape(name), 1)[0])]
    cut.sort(key=lambda piece: (piece[1][0] is not None, *piece[1], *piece))     # by layer, component, name

    def one(piece):
        name, _, start, stop = piece
        try:
            return sums([_raw(folder.read(name, start, stop)) for folder in folders], thresholds)
        except InputError as e:
            raise InputError(f"{old}, {new}: {name}: {e}") from None

    with ThreadPoolExecutor(threads) as pool:             # numpy frees the interpreter in its loops
        found = list(pool.map(one, cut))
    tensors = [dict(name=name, layer=layer, component=component, sub=sub) | summary(own, thresholds)
               for (name, (layer, component, sub), *_), own in zip(cut, found, strict=True)]
    return dict(tensors=tensors, rows=table(tensors, found, thresholds),
                missing=sorted(names[0] - set(common)), extra=sorted(set().union(*names[1:]) - set(common)))


def table(tensors, found, thresholds):
    """Rows over pieces (tensors: their layer, component, sub; found: their `sums`), by total, component, sub,
    layer, and layer with component: dict(by, layer, component, sub, count) and `summary` of the pooled sums.
    Both averages that the paper's delta may mean: relative_l2 is pooled, sqrt(sum dw^2 / sum w0^2), in which
    norm weights near 1 weigh much; mean_l2 is the mean of the tensors' own ratios."""
    groups = {}
    for tensor, own in zip(tensors, found, strict=True):
        for by in ((), ("component",), ("component", "sub"), ("layer",), ("layer", "component")):
            key = tuple(tensor[k] for k in by)
            if by[:1] != ("layer",) or key[0] is not None:
                groups.setdefault((by, key), []).append((tensor["relative_l2"], own))
    rows = []
    for (by, key), members in groups.items():
        pooled = {key: value * 0 for key, value in members[0][1].items()}
        for _, own in members:
            _add(pooled, own)
        ratios = [ratio for ratio, _ in members if ratio is not None]
        rows.append(dict(by="+".join(by) or "total") | dict(zip(by, key, strict=True))
                    | dict(count=len(members), mean_l2=sum(ratios) / len(ratios) if ratios else None)
                    | summary(pooled, thresholds))
    return rows


# -- weights: where the change points, and what rounding alone would give ----------------------------------

def top_singular(w, k, iterations=6, seed=0):
    """The leading k singular triplets of a matrix (m, n): U (m, k), S (k,), V (n, k), by subspace iteration
    from a seeded Gaussian start with 10 or more vectors to spare (Halko et al., arXiv 0909.4061, algorithm
    4.4). At the crowded edge of a noise spectrum S is low: 4096 x 14336 by 3 % after 6 iterations, 0.3 %
    after 30."""
    rng = torch.Generator().manual_seed(seed)
    width = min(-(-(k + 10) // 16) * 16, *w.shape)        # a product of width 11 takes longer than of 16
    q = torch.linalg.qr(w @ torch.randn(w.shape[1], width, generator=rng).to(w.dtype))[0]
    for _ in range(iterations):
        q = torch.linalg.qr(w @ torch.linalg.qr((q.T @ w).T)[0])[0]        # (q^T w)^T: w.T @ q is slower
    u, s, v = torch.linalg.svd(q.T @ w, full_matrices=False)
    return (q @ u)[:, :k], s[:k], v[:k].T


def update_geometry(old, new, k=64, seed=0):
    """Of a matrix's change dw = new - old, float32: dict(k, stable_rank = ||dw||_F^2 / ||dw||_2^2, left and
    right = share of ||dw||_F^2 inside the span of old's k leading left and right singular vectors), and as
    `null` the same of dw with its entries permuted: rounding noise has full rank too. k is at most a quarter
    of the smaller side; all None without a change. 4096 x 14336 on one core: 15 s, and about 3 float32 copies
    in memory."""
    if old.ndim != 2 or old.shape != new.shape:
        raise InputError(f"update_geometry: two matrices of one shape are needed, not {list(old.shape)} and "
                         f"{list(new.shape)}")
    w0, dw = old.float(), new.float() - old.float()
    k = max(1, min(k, min(w0.shape) // 4))
    u, _, v = top_singular(w0, k, seed=seed)

    def measure(d):
        squares = torch.linalg.vector_norm(d, dtype=torch.float64).item() ** 2
        if squares == 0:
            return dict.fromkeys(("stable_rank", "left", "right"))
        inside = (torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2 for x in (u.T @ d, d @ v))
        spectral = top_singular(d, 1, iterations=30, seed=seed)[1].item()
        return dict(stable_rank=squares / spectral ** 2) | dict(zip(("left", "right"), (
            x / squares for x in inside), strict=True))

    found, flat = measure(dw), dw.flatten().numpy()
    np.random.default_rng(seed).shuffle(flat)
    return dict(k=k) | found | dict(null=measure(torch.from_numpy(flat).view(dw.shape)))


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
    rng, update = torch.Generator().manual_seed(seed), torch.nn.Parameter(torch.zeros(w0.numel()))
    optimizer = torch.optim.AdamW([update], betas=(beta1, beta2), eps=eps, weight_decay=0.0, fused=True)
    low, before, update.grad = w0.clone(), torch.zeros(w0.numel()), torch.empty(w0.numel())
    for lr in lrs:
        update.grad.normal_(generator=rng)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        low = (low + (update.detach() - before)).to(dtype)
        before.copy_(update.detach())
    masters = w0 + before                                 # bf16 + float32 is float32
    return {name: weight_change(w0, w, thresholds)
            for name, w in (("masters", masters.to(dtype)), ("float32", masters), ("stepwise", low))}


# -- representations: CKA ----------------------------------------------------------------------------------

def _centred(X):
    """(n, d) to float64 with columns of mean 0; a column that varies by rounding only becomes 0."""
    X = torch.as_tensor(X).detach().double().cpu().numpy()
    if X.ndim != 2:
        raise InputError(f"CKA: features (n, d) are needed, not shape {list(X.shape)}")
    centred = X - X.mean(0)
    centred[:, np.abs(centred).max(0) <= 1e-13 * np.abs(X).max(0)] = 0
    return centred


def gram(X):
    """Inner products (n, n), float64, of the centred rows of X (n, d): what the functions below take."""
    X = _centred(X)
    return X @ X.T


def without_top(X, k):
    """X (n, d) without its k dimensions of the largest variance: a massive activation can be all of CKA."""
    return X[:, np.sort(np.argsort(np.var(X, axis=0, dtype=np.float64), kind="stable")[:X.shape[1] - k])]


def centre(K, debiased):
    """A Gram matrix so that <K, L> is HSIC up to a factor of n: H K H; debiased U-centred, diagonal 0, whose
    product is the U-statistic of Song et al. (JMLR 2012, equation 5) and Szekely and Rizzo (2014)."""
    n, noise = len(K), 1e-14 * np.abs(K).max()            # what is rounding only becomes 0
    if debiased:
        K = K - np.diag(np.diag(K))
        rows = K.sum(0) / (n - 2)
        K = K - rows - rows[:, None] + rows.sum() / (n - 1)
        np.fill_diagonal(K, 0)
    else:
        rows = K.mean(0)
        K = K - rows - rows[:, None] + rows.mean()
    return np.where(np.abs(K) > noise, K, 0.0)


def _ratio(xy, xx, yy):
    """xy / sqrt(xx yy), nan where a self-similarity is not positive."""
    there = (xx > 0) & (yy > 0)
    return np.where(there, xy / np.sqrt(np.where(there, xx, 1.0)) / np.sqrt(np.where(there, yy, 1.0)), np.nan)


def linear_cka(X, Y, debiased=False):
    """Linear CKA of features X (n, d) and Y (n, e) of the same n inputs, in float64 (paper, appendix 19):
    ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of centred columns. Biased, as published, it is 0.95 for
    independent Gaussians at n = 200, d = 4,096 (about d / (d + n)); debiased it is about 0 there. nan for
    constant features, and debiased for n < 4 or a self-HSIC <= 0. By way of the n x n Grams unless n is at
    least d and e: then the d x e products are smaller, and the value is the same."""
    if len(X) != len(Y):
        raise InputError(f"CKA: {len(X)} and {len(Y)} inputs: the same ones are needed")
    if len(X) < (4 if debiased else 2):
        return math.nan
    X, Y = _centred(X), _centred(Y)
    if not debiased and len(X) >= max(X.shape[1], Y.shape[1]):
        xy, xx, yy = ((a.T @ b) for a, b in ((X, Y), (X, X), (Y, Y)))
        return float(_ratio((xy ** 2).sum(), (xx ** 2).sum(), (yy ** 2).sum()))
    return cka(X @ X.T, Y @ Y.T, debiased)


def cka(K, L, debiased=True):
    """`linear_cka` of two Gram matrices (n, n), see `gram`."""
    K, L = centre(K, debiased), centre(L, debiased)
    return float(_ratio(np.vdot(K, L), np.vdot(K, K), np.vdot(L, L)))


def cka_bootstrap(K, L, resamples=1000, seed=0, debiased=True):
    """CKA (resamples,) of random halves of the inputs, drawn without replacement: a repeated input is similar
    to itself in both, which lifts even independent features to 0.95. The same seed draws the same halves for
    every layer. All halves at once: with s the 0/1 vector of a half, each sum over its sub-Gram is a product
    with s."""
    n = len(K)
    half = n // 2
    s = np.zeros((resamples, n))
    np.put_along_axis(s, np.random.default_rng(seed).random((resamples, n)).argsort(1)[:, :half], 1.0, 1)
    if half < (4 if debiased else 2):
        return np.full(resamples, np.nan)
    K, L = centre(K, False), centre(L, False)             # no change of either statistic, smaller numbers
    if debiased:
        K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    corner, cross = ((half - 1) * (half - 2), half - 2) if debiased else (half ** 2, half)
    of_k, of_l = (s @ K) * s, (s @ L) * s                 # row sums of the sub-Grams, 0 outside

    def hsic(M, a, b):
        value = ((s @ M) * s).sum(1) + a.sum(1) * b.sum(1) / corner - 2 / cross * (a * b).sum(1)
        return np.where(np.abs(value) > 1e-13 * np.abs(M).sum(), value, 0.0)

    return _ratio(hsic(K * L, of_k, of_l), hsic(K * K, of_k, of_k), hsic(L * L, of_l, of_l))


def cka_permuted(K, L, permutations=1000, seed=0, debiased=True):
    """CKA (permutations,) with the inputs of L in another order: what unrelated features of these spectra
    score."""
    K, L, rng = centre(K, debiased), centre(L, debiased), np.random.default_rng(seed)
    orders = (rng.permutation(len(L)) for _ in range(permutations))
    xy = np.array([np.vdot(K, L[np.ix_(p, p)]) for p in orders])
    return _ratio(xy, np.vdot(K, K), np.vdot(L, L))


# -- the landscape: config -----------------------------------------------------------------------------------


@dataclass
class Landscape:
    base: Positional[str]                # weights at (0, 0): preset, folder
    mt: Positional[str]                  # at (1, 0)
    rl: Positional[str]                  # at (1, 1)
    run: str = "runs/analysis/landscape"                           # folder of the results, also --out
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
FREE = tuple(f.name for f in dataclasses.fields(Landscape))          # points know what they were made with
MADE_WITH = ("samples", "temperature", "top_p", "max_new_tokens", "context", "seed", "dtype",
             "engine")                                    # its noise is its own
DTYPES = ("bfloat16", "float32")


def check_landscape(cfg):
    """Refuses what cannot run, naming the flag."""
    if cfg.path < 3 or cfg.path % 2 == 0:
        raise InputError(f"--path={cfg.path}: give an odd number of points from 3 on, as mt is in the middle")
    if cfg.grid < 0 or cfg.grid == 1:
        raise InputError(f"--grid={cfg.grid}: give 2 points a side or more, or 0 for the path alone")
    for name in ("problems", "samples"):
        if getattr(cfg, name) < 1:
            raise InputError(f"--{name}={getattr(cfg, name)} must be at least 1")
    for name, known in (("dtype", DTYPES), ("engine", ("torch", "vllm"))):
        if getattr(cfg, name) not in known:
            raise InputError(f"--{name}={getattr(cfg, name)!r} is not one of {', '.join(known)}")
    unknown = set(cfg.domains.split("+")) - {"math", "code", "science"}
    if unknown:
        raise InputError(f"--domains={cfg.domains}: {min(unknown)!r} is not one of math, code, science")


# -- the landscape: weights of a point -----------------------------------------------------------------------

def at(alpha, beta, base, mt, rl):
    """W(alpha, beta) = base + alpha (mt - base) + beta (rl - mt), as text for Init. Terms of coefficient 0
    are left out: a corner is that checkpoint alone, bit by bit."""
    terms = (1 - alpha, base), (alpha - beta, mt), (beta, rl)
    return " + ".join(f"{weight!r}*{name}" for weight, name in terms if weight)


def tensors(init, dtype):
    """(hub name, whole tensor) of every parameter, one at a time, matrices in dtype: what load_weights takes.
    Vectors (norms, A_log) stay as the sum has them, float32: the engine rounds them if it wants to."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Model(init.arch).named_parameters()}
    for name, shape in shapes.items():
        whole = init.read(name, 0, shape[0])
        yield name, whole.to(dtype) if len(shape) > 1 else whole


def where(path, grid):
    """The points (alpha, beta) of the path, base to mt to rl, and of the plane, beta by beta."""
    steps = [i / (path // 2) for i in range(path // 2 + 1)]
    side = [i / (grid - 1) for i in range(grid)]
    return [(a, 0.0) for a in steps] + [(1.0, b) for b in steps[1:]], [(a, b) for b in side for a in side]


# -- the landscape: pass rates -------------------------------------------------------------------------------

def pass_rates(door, init, records, cfg, me):
    """([share of right samples] of all problems, how many samples the machine could not grade) at the weights
    of init. The keys are the same at every point: neighbours differ by their weights alone, not by luck."""
    door.load_weights(tensors(init, door.dtype))
    mine = records[me.rank::me.world]
    made = door.generate([r["ids"] for r in mine], cfg.samples, max_new_tokens=cfg.max_new_tokens,
                         temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed,
                         keys=[("landscape", r["id"]) for r in mine])
    answers = [(r["domain"], s.text, r["truth"], s.finish_reason)
               for r, own in zip(mine, made, strict=True) for s in own]
    verdicts = grade_batch(answers, unsafe_sandbox=cfg.unsafe_sandbox)
    again = [i for i, v in enumerate(verdicts) if transient(v.reason)]
    for i, verdict in zip(again, grade_batch([answers[i] for i in again], 1,
                                             unsafe_sandbox=cfg.unsafe_sandbox), strict=True):
        verdicts[i] = verdict
    shares = np.zeros(len(records))
    shares[me.rank::me.world] = np.reshape([v.correct for v in verdicts], (-1, cfg.samples)).mean(1)
    *shares, lost = me.sum(*shares, sum(transient(v.reason) for v in verdicts))
    return shares, int(lost)


def landscape(base, mt, rl, out, **how):
    """Pass rates of held-out problems at W(alpha, beta), on the path and on the plane (how: see Landscape).
    Returns {"path": [{"alpha", "beta", "score", "low", "high"}], "grid": the same, "problems", "samples"},
    also out/landscape.json. The weights of a point go tensor by tensor into one running engine, never to
    disk. out/landscape.jsonl gets a line a point, under a hash of all that made it: the same command goes on
    after a kill, and with every point there it starts no engine. The grader is not part of that hash: delete
    the file after a change of it."""
    cfg = Landscape(base, mt, rl, out, **how)
    usual = TOY if cfg.prompts == "toy" else PAPER
    cfg = dataclasses.replace(cfg, **{k: getattr(cfg, k) or value for k, value in usual.items()})
    check_landscape(cfg)
    with join_ranks(cfg.device) as me:
        run = Run(out, cfg, me, FREE)

        # -- weights, problems, what is there ----------------------------------------------------------------
        with me.first_on_node():                          # it downloads, the others find it
            inits = [Init(text) for text in (base, mt, rl)]
        for flag, init in zip(("base", "mt", "rl"), inits, strict=True):
            if len(init.terms) > 1:
                raise InputError(f"--{flag}={init.text!r} is a sum of {len(init.terms)} checkpoints; "
                                 f"write it as one first (merge), and give its folder")
        names = [init.terms[0][1].path for init in inits]            # of a preset: its folder in the cache
        Init(at(0.5, 0.25, *names))                       # all three: refuses other architectures
        tokenizer = inits[1].tokenizer()
        cfg = dataclasses.replace(cfg, context=context_of(inits[1].arch, cfg.context))
        records, left_out = read_prompts(cfg.prompts, "prompts", cfg.domains.split("+"), tokenizer,
                                         cfg.context, "heldout", 128)
        need_sandbox(records, cfg)
        records = sorted(records, key=lambda r: shuffle_key(r["id"]))[:cfg.problems]           # a fair sample
        weights = me.agree([init.identity() for init in inits] if me.rank == 0 else None)
        made_of = (weights, [(r["id"], r["ids"], r["truth"]) for r in records],
                   [getattr(cfg, name) for name in MADE_WITH])
        path, grid = where(cfg.path, cfg.grid)
        points = {point: digest(*made_of, *point) for point in dict.fromkeys(path + grid)}
        with contextlib.ExitStack() as stack:
            file, there = None, {}
            if me.rank == 0:
                with run.writing("landscape.jsonl"):
                    file = stack.enter_context(appending(run.path("landscape.jsonl")))
                lines = read_jsonl(run.path("landscape.jsonl"), "run")
                there = {line.get("key"): line for _, _, line in lines}
            there = me.agree(there)
            missing = [point for point, name in points.items() if name not in there]
            run.log(f"{len(points)} points, {len(missing)} to make, of {len(records)} problems"
                    + "".join(f" ({n} left out {reason})" for reason, n in left_out.items())
                    + f" x {cfg.samples} samples; base {base}, mt {mt}, rl {rl}")

            # -- point by point ------------------------------------------------------------------------------
            door = make_engine(inits[1].text, cfg, me) if missing else None
            for alpha, beta in missing:
                start = time.monotonic()
                shares, lost = pass_rates(door, Init(at(alpha, beta, *names)), records, cfg, me)
                line = {"key": points[alpha, beta], "alpha": alpha, "beta": beta}
                line |= interval(shares, cfg.samples)._asdict() | {"seconds": time.monotonic() - start}
                there[line["key"]] = line
                if me.rank == 0 and not lost:
                    with run.writing("landscape.jsonl"):
                        file.write(json.dumps(line).encode() + b"\n")
                        file.flush()
                run.log(f"alpha {alpha:.3f} beta {beta:.3f} | pass {line['score']:6.1%} [{line['low']:.1%}, "
                        f"{line['high']:.1%}] | {line['seconds']:.1f} s"
                        + f" | {lost} samples could not be graded: the next run makes it again" * bool(lost))
            if door is not None:
                door.close()

        told = {point: {k: there[name][k] for k in ("alpha", "beta", "score", "low", "high")}
                for point, name in points.items()}
        result = {"path": [told[point] for point in path], "grid": [told[point] for point in grid],
                  "problems": len(records), "samples": cfg.samples}
        if me.rank == 0:
            with run.writing("landscape.json"):
                write_atomic(run.path("landscape.json"), json.dumps(result, indent=1))
        return result


# -- the trajectory of RL ------------------------------------------------------------------------------------

def updates_of(run):
    """(config of a run of midtrain.py or rl.py, {step: learning rates of its optimizer steps}), as
    metrics.jsonl has them: those really used, also where --steps was changed on the way. A step of RL whose
    groups taught nothing (gnorm 0) did not touch the weights."""
    try:
        with open(os.path.join(run, "config.json")) as f:
            cfg = dict(json.load(f))
        own = [line for line in read_lines(os.path.join(run, "metrics.jsonl")) if "gnorm" in line]
        return cfg, {line["step"]: [line["lr"]] * (cfg.get("updates", 1) if line["gnorm"] else 0)
                     for line in own}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{run} is no run of midtrain.py or rl.py: config.json or metrics.jsonl cannot be "
                         f"read ({e!r}); give the --run folder that holds them") from None


def models_of(run):
    """{step: folder} of the models that a run of rl.py has exported, its last one included."""
    there = os.path.join(run, "models")
    steps = {int(name[5:]): os.path.join(there, name) for name in os.listdir(there)
             if re.fullmatch(r"step_\d+", name)} if os.path.isdir(there) else {}
    try:                                                  # comes last: of which step model/ is
        with open(os.path.join(run, "rl.json")) as f:
            steps.setdefault(json.load(f)["steps"], os.path.join(run, "model"))
    except FileNotFoundError:                             # has not ended
        pass
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{run}/rl.json is damaged ({e!r}): that run's command writes it again") from None
    if not steps:
        raise InputError(f"{run} has no models/step_N, no finished model: train with --export_at=20,40,80")
    return dict(sorted(steps.items()))


def some_weights(path, count=1 << 18, component="", seed=0):
    """`count` weights of a checkpoint or of its component (float32; all if there are fewer), each as likely
    as another."""
    folder = Folder(path)
    names = sorted(name for name in folder.names() - ({"lm_head.weight"} if folder.arch.tied else set())
                   if component in ("", pieces(name, 2)[0][0][1]))
    ends = np.cumsum([np.prod(folder.shape(name), dtype=np.int64) for name in names])
    chosen = np.sort(np.random.default_rng(seed).choice(ends[-1], min(count, ends[-1]), replace=False))
    found, of_each = [], np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    for name, end, own in zip(names, ends, of_each, strict=True):
        flat = folder.read(name, 0, folder.shape(name)[0]).flatten()
        found.append(flat[own - (end - len(flat))].float())
    return torch.cat(found)


def trajectory(run, start, base=None, thresholds=THRESHOLDS, count=1 << 18):
    """How far RL has come from where it started, and from the base, by step: {"run", "start", "base",
    "steps": [{"step", "model", "lr_sum", "start", "base" (None without one), "null"}]}.

    start, base: compare_checkpoints' row of the total. null: weight_change of a sample of `count` of start's
    weights after as many AdamW steps on noise, at the learning rates that the run had, float32 rounded once
    to its export's dtype (noise_null's masters). lr_sum: about the farthest those steps can move a weight."""
    cfg, lrs = updates_of(run)
    w0, steps = some_weights(start, count), []
    # a float32 start rounded to bfloat16 changes everywhere: noise tells nothing there
    noisy = narrow(Folder(start)) or cfg["export_dtype"] == "float32"

    def total(old, new):
        return next(row for row in compare_checkpoints(old, new, thresholds=thresholds)["rows"]
                    if row["by"] == "total")

    for step, model in models_of(run).items():
        lacking = [n for n in range(1, step + 1) if n not in lrs]
        if lacking:
            raise InputError(f"{run}: metrics.jsonl has no step {lacking[0]}, but {model} is of step {step}: "
                             f"put the run's own file back, or move that model away")
        own = [lr for n in range(1, step + 1) for lr in lrs[n]]
        # from the start for each model: the 48 of the paper's run are 23,520 steps, under a minute
        null = noisy and noise_null(w0, own, cfg["beta1"], cfg["beta2"], cfg["eps"],
                                    getattr(torch, cfg["export_dtype"]), thresholds=thresholds)["masters"]
        steps.append({"step": step, "model": model, "lr_sum": sum(own), "start": total(start, model),
                      "base": total(base, model) if base else None, "null": null or None})
    return {"run": run, "start": start, "base": base, "steps": steps}


# -- behaviour -----------------------------------------------------------------------------------------------

def behaviour(stages):
    """The paper's table 15, of evaluate.py's results, {stage: folder}: {"rows": [{"task", "stage", "score",
    "low", "high", "problems", "samples" (a problem), "all", "right", "wrong"}], "differ": {task: {setting:
    values by stage}}}. all, right, wrong: {"samples" (together), "median_tokens", "nll": mean over samples of
    the mean negative log-probability of a token, nats}, None of no sample. differ: what keeps the stages of a
    task from being comparable."""
    found = {stage: {task: r for task, r in read_results(folder)[0]["tasks"].items() if "score" in r}
             for stage, folder in stages.items()}
    shared = [task for task in next(iter(found.values()), {}) if all(task in own for own in found.values())]
    if not shared:
        raise InputError(f"{', '.join(stages.values()) or 'no folder'}: no task was graded in all of them; "
                         f"give evaluations of the same --tasks")
    kept = ("score", "low", "high", "problems", "samples", "all", "right", "wrong")
    rows, differ = [], {}
    for task in shared:
        rows += [{"task": task, "stage": stage} | {k: own[task][k] for k in kept}
                 for stage, own in found.items()]
        made = {stage: own[task].get("settings", {}) | {"problems": own[task]["problems"]}
                for stage, own in found.items()}
        for k in next(iter(made.values())):
            values = {stage: settings.get(k) for stage, settings in made.items()}
            if len(set(values.values())) > 1:
                differ.setdefault(task, {})[k] = values
    return {"rows": rows, "differ": differ}


# -- merging -------------------------------------------------------------------------------------------------

def merge(combination, out, dtype="bfloat16"):
    """A linear combination of checkpoints ("0.15*A + 0.85*B", what --init takes) as a folder in hub format,
    with the first one's tokenizer: summed in float32, rounded to dtype once. Holds the merged model, in
    dtype, in memory. A checkpoint that is there is replaced, but none of the terms."""
    if dtype not in DTYPES:
        raise InputError(f"--dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    there = sorted(os.listdir(out)) if os.path.isdir(out) else []
    known = "config.json", "generation_config.json", "model", "tokenizer", "special_tokens_map.json", "tekken"
    foreign = [name for name in there if not name.startswith(known) or os.path.isdir(os.path.join(out, name))]
    if foreign or os.path.exists(out) and "config.json" not in there:
        more = f" alone: it has {foreign[0]}" if foreign else ""
        raise InputError(f"--out={out} is there and is no checkpoint{more}; give another, or move it away")
    for _, term in Init(combination).terms:
        inside = os.path.realpath(term.path) + os.sep
        if inside.startswith(os.path.realpath(out) + os.sep):
            raise InputError(f"--out={out} is or holds a term of {combination!r}, which it would replace; "
                             f"give another")
    save(load(combination, dtype=getattr(torch, dtype)), out)
    return out


# -- the commands --------------------------------------------------------------------------------------------

def stages(paths):
    """{checkpoint or folder: its name in tables}: runs/mt/model is mt, or with more of its path where two
    would be called alike; a sum is its text. InputError where one is given twice."""
    if len(set(map(os.path.realpath, paths))) < len(paths):
        raise InputError(f"{', '.join(paths)}: one of them is given twice")
    parts = {path: [path] if "*" in path else [
        part for part in os.path.normpath(path).split(os.sep) if part not in ("model", "models")] or [path]
        for path in paths}
    for n in range(1, 1 + max(map(len, parts.values()))):
        names = {path: os.sep.join(own[-n:]) for path, own in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: path for path in paths}


def kept(out, name):
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


def keep(out, name, content):
    """Writes out/name.json."""
    try:
        write_atomic(os.path.join(out, f"{name}.json"), json.dumps(content, indent=1))
    except OSError as e:
        raise InputError(f"--out={out}: {name}.json cannot be written ({e.strerror}); make room") from None


def narrow(folder):
    """Whether a checkpoint's matrices are stored in bfloat16."""
    name = next(n for n in sorted(folder.names()) if len(folder.shape(n)) == 2)
    return folder.read(name, 0, 1).dtype == torch.bfloat16


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
    if rank not in ("off", "sampled", "all"):
        raise InputError(f"--rank={rank} is not one of off, sampled, all")
    names = stages([old, new, other] if other else [old, new])
    content, (cfg, lrs) = kept(out, "weights"), updates_of(null) if null else ({}, {})
    pairs = {tuple(map(os.path.realpath, pair["folders"])): pair for pair in content.get("pairs", [])}
    began = narrow(Folder(old))
    for folder in [new, other] if other else [new]:
        beside = other if other and folder == new else None
        found = compare_checkpoints(old, folder, beside)
        ended = narrow(Folder(folder))
        pair = dict(names=[names[old], names[folder]], folders=[old, folder], bf16=began and ended,
                    cosine_with=names.get(beside), null=None, nulls={}, geometry=[],
                    rows=found["rows"], missing=found["missing"], extra=found["extra"])
        if null and folder == new:
            if ended and not began:
                raise InputError(f"--null={null}: {old} is float32 and {new} bfloat16, so rounding alone "
                                 f"changes every weight; compare checkpoints of one dtype")
            for component in ("", *dict.fromkeys(t["component"] for t in found["tensors"])):
                noise = noise_null(some_weights(old, 1 << 17, component), sum(lrs.values(), []), cfg["beta1"],
                                   cfg["beta2"], cfg["eps"])
                pair["nulls"][component or "total"] = noise["masters" if ended else "float32"]
                pair["null"] = pair["null"] or noise
        if rank != "off":
            pair["geometry"] = geometry(old, folder, found["tensors"], rank == "all")
        pairs[os.path.realpath(old), os.path.realpath(folder)] = pair
        keep(out, "weights", {"thresholds": THRESHOLDS, "pairs": list(pairs.values())})
        print(weights_table(pair))


def geometry(old, new, tensors, every):
    """update_geometry of the matrices, or of the largest one of each sub-component."""
    a, b = Folder(old), Folder(new)
    names = list(dict.fromkeys(t["name"] for t in tensors if len(a.shape(t["name"])) == 2
                               and not t["nonfinite"]))
    if not every:
        largest = {pieces(n, 2)[0][0][2]: n for n in sorted(names, key=lambda n: math.prod(a.shape(n)))}
        names = sorted(largest.values())
    return [dict(name=n) | update_geometry(*(f.read(n, 0, f.shape(n)[0]) for f in (a, b)))
            for n in tqdm(names, unit="matrix", leave=False, disable=None)]


def weights_table(pair):
    """A pair's rows as text: by component and sub-component."""
    def share(x):
        return "-" if x is None else f"{100 * x:.1f}"

    def cells(row, null):
        l2 = [f"{row[k]:.3g}" if row[k] is not None else "-" for k in ("relative_l2", "mean_l2")]
        return [*l2, share(row["bits_share"]), *map(share, row["unchanged"].values()),
                f"{row['cosine']:.3f}" if row.get("cosine") is not None else "-",
                f"{share(null['unchanged'][0.01])}, {null['relative_l2']:.2g}" if null else "-"]

    lines = [[" to ".join(pair["names"]), "L2 pooled", "L2 mean", "bits, %", "same at 0.1 %", "0.5 %", "1 %",
              "2 %", "5 %", "10 %", f"cosine {pair['cosine_with'] or ''}".strip(), "null: same at 1 %, L2"]]
    for row in pair["rows"]:
        if row["by"] in ("total", "component", "component+sub"):
            name = "  " * row["by"].count("+") + (row.get("sub") or row.get("component") or "all")
            lines.append([name, *cells(row, pair["nulls"].get(row.get("component") or "total")
                                       if row["by"] != "component+sub" else None)])
    text = aligned(lines)
    total = next(row for row in pair["rows"] if row["by"] == "total")
    if total["nonfinite"]:
        text.append(f"{total['nonfinite']:,} entries are not finite, and left out")
    if pair["bf16"]:
        text.append("bfloat16: no change is under 0.39 %, so 0.1 % counts every changed value")
    for g in pair["geometry"]:
        text.append(f"{g['name']}: " + ", ".join(
            f"{k} {g[k]:.3g} (entries permuted {g['null'][k]:.3g})" for k in ("stable_rank", "left", "right")
            if g[k] is not None))
    return "\n".join(text) + "\n"


# -- representations: from texts to tables -------------------------------------------------------------------

CORPORA = {                                               # the paper's; revision: `main` at the first get
    "wikipedia": Part("wikimedia/wikipedia", "20231101.en/train-00000-of-*.parquet", ("text",),
                      partial(text_of, column="text")),
    "c4": Part("allenai/c4", "en/c4-validation.00000-of-*.json.gz", ("text",), partial(text_of, column="text")),
    "gsm8k": Part("openai/gsm8k", "main/test-*.parquet", ("question",), partial(text_of, column="question")),
}


def read_texts(corpus, count, raw):
    """`count` texts: of the embedded world (toy), of CORPORA, or of a .jsonl's text, prompt or question."""
    if corpus == "toy":
        found = [world.problem(d, "heldout", i).prompt for i in range(count) for d in ("math", "science")]
        prose = world.documents("dclm-edu", "heldout")
        found = [t for pair in zip(prose, found, strict=False) for t in pair]
    elif corpus in CORPORA:
        part = CORPORA[corpus]
        if not is_there(raw, corpus):
            get_part(Hub(), corpus, part, None, raw, 1)
        found = (part.read(row) for f in raw_files(raw, corpus, part) for _, row in read_rows(f, part.columns))
    elif os.path.exists(corpus):
        found = (row.get("text") or row.get("prompt") or row.get("question") or "" for _, row in read_rows(corpus))
    else:
        raise InputError(f"--texts={corpus}: give toy, {', '.join(CORPORA)}, or a .jsonl file")
    found = list(islice((t for t in found if isinstance(t, str) and t.strip()), count))
    if len(found) < max(8, count):
        raise InputError(f"--texts={corpus} has {len(found)} texts, --count={count} are wanted; give more, "
                         f"or a smaller --count (at least 8)")
    return found


POOLING = {"mean": lambda h: h.mean(0), "last": lambda h: h[-1], "first": lambda h: h[0]}


@torch.inference_mode()
def representations(path, texts, pooling, tokens, dtype, device):
    """Features of every residual stream, after the embedding, each layer, and the final norm: [(n, C) float32
    arrays]. One text at a time, so nothing is padded; the bos, if the model has one, is read and left out of
    the pooling (its activations are massive)."""
    model = load(path, dtype=getattr(torch, dtype), device=device)
    layers = None
    for t in tqdm(texts, unit="text", desc=path, leave=False, disable=None):
        before = model.tokenizer.bos_ids
        ids = [*before, *model.tokenizer.encode(t)[:tokens]]
        streams = model.hidden_states(torch.tensor([ids], device=device))
        pooled = [POOLING[pooling](h[0, len(before):].float()).cpu().numpy() for h in streams]
        layers = layers or [[] for _ in pooled]
        for own, h in zip(layers, pooled, strict=True):
            own.append(h)
    return [np.stack(own) for own in layers]


def cka_command(checkpoints: Positional[tuple[str, ...]], texts: str = "toy", count: int = 200,
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
    for flag, value, least in (("tokens", tokens, 1), ("without", without, 0), ("resamples", resamples, 1)):
        if value < least:
            raise InputError(f"--{flag}={value} must be at least {least}")
    names, depths = stages(checkpoints), {path: len(Init(path).arch.layers) for path in checkpoints}
    for path, depth in depths.items():
        if depth != depths[checkpoints[0]]:
            raise InputError(f"cka: {path} has {depth} layers, {checkpoints[0]} has "
                             f"{depths[checkpoints[0]]}: only models of one depth can be compared layer by "
                             f"layer")
    before = kept(out, "cka")
    chosen, every = read_texts(texts, count, raw), []
    with join_ranks(device) as me:                             # names a device that is not there
        for path in checkpoints:
            every.append(representations(path, chosen, pooling, tokens, dtype, me.device))
    names = list(names.values())
    found = {f"{names[i]} {names[j]}": [dict(layer=layer) | likeness(x, y, without, resamples, seed)
                                        for layer, (x, y) in enumerate(zip(every[i], every[j], strict=True))]
             for i, j in combinations(range(len(names)), 2)}
    for pair, curve in found.items():
        c = min(curve, key=lambda c: c["biased"])
        print(f"{pair}, {len(chosen)} texts of {texts}, least at layer {c['layer']}: biased "
              f"{c['biased']:.4f} +- {c['biased_std']:.4f} (paper's), debiased {c['debiased']:.4f} "
              f"[{c['low']:.4f}, {c['high']:.4f}], without the {without} largest dimensions "
              f"{c['without_top']:.4f}, permuted {c['null_low']:.3f} to {c['null_high']:.3f}")
    own = dict(names=names, texts=len(chosen), corpus=texts, pooling=pooling, without=without, pairs=found)
    keep(out, "cka", before | {texts if pooling == "mean" else f"{texts}, {pooling}": own})


def likeness(x, y, without, resamples, seed):
    """CKA of features x and y (n, C) of one layer: biased with the paper's deviation (of 20 halves), debiased
    with its 95 % interval over random halves, the 95 % band of permuted inputs, and the debiased one without
    each side's dimensions of the largest variance."""
    K, L = gram(x), gram(y)
    (low, high), (null_low, null_high) = (np.nanquantile(values, [0.025, 0.975]).tolist() for values in (
        cka_bootstrap(K, L, resamples, seed), cka_permuted(K, L, resamples, seed)))
    return dict(biased=cka(K, L, False), debiased=cka(K, L), low=low, high=high, null_low=null_low,
                null_high=null_high, biased_std=float(cka_bootstrap(K, L, 20, seed, False).std()),
                without_top=cka(gram(without_top(x, without)), gram(without_top(y, without))))


# -- the other commands --------------------------------------------------------------------------------------

def landscape_command(cfg: Annotated[Landscape, tyro.conf.arg(name="")]):
    """Pass rates between checkpoints: along base, mid-trained, RL, and on the plane through the three."""
    landscape(cfg.base, cfg.mt, cfg.rl, cfg.run, **{k: v for k, v in dataclasses.asdict(cfg).items()
                                                   if k not in ("base", "mt", "rl", "run")})


def trajectory_command(run: Positional[str], start: Positional[str], base: Positional[str] = "",
                       out: str = "runs/analysis"):
    """How far RL's weights have come, step by step, beside Adam on pure noise.

    Args:
        run: folder of a run of rl.py with --export_at models
        start: folder of the checkpoint that it began with
        base: of the base
        out: where trajectory.json goes; other runs that are there stay
    """
    before = kept(out, "trajectory").get("runs", [])
    found = trajectory(run, start, base or None)

    def short(row):
        return row and {"relative_l2": row["relative_l2"],
                        "changed": {str(t): 1 - share for t, share in row["unchanged"].items()}}

    steps = [{"step": s["step"], "from_mt": short(s["start"]), "from_base": short(s["base"]),
              "null": short(s["null"])} for s in found["steps"]]
    print("step   L2 from start   noise   changed by over 1 %   noise")
    for s in steps:
        null = s["null"] and f"{s['null']['changed']['0.01']:.1%}"
        print(f"{s['step']:4d}   {s['from_mt']['relative_l2']:13.3g}   "
              f"{format(s['null']['relative_l2'], '5.2g') if s['null'] else '    -'}   "
              f"{s['from_mt']['changed']['0.01']:19.1%}   {null or '-':>5s}")
    name = os.path.normpath(run)
    others = [r for r in before if r["name"] != name]
    keep(out, "trajectory", {"runs": [*others, {"name": name, "steps": steps}]})


def behaviour_command(evaluations: Positional[tuple[str, ...]], out: str = "runs/analysis"):
    """The paper's table 15: pass rate, length, negative log-probability by stage, of right and wrong answers.

    Args:
        evaluations: folders of evaluate.py
        out: where behaviour.json goes
    """
    kept(out, "behaviour")
    found = behaviour({name: folder for folder, name in stages(evaluations).items()})

    def numbers(row, what, form):
        return [form.format(row[of][what]) if row[of][what] is not None else "-"
                for of in ("all", "right", "wrong")]

    head = "task", "stage", "pass, %", "95 % interval", "tokens", "right", "wrong", "nll", "right", "wrong"
    lines = [head, *((row["task"], row["stage"], f"{100 * row['score']:.1f}",
                      f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
                      *numbers(row, "median_tokens", "{:.0f}"), *numbers(row, "nll", "{:.3f}"))
                     for row in found["rows"])]
    print("\n".join(aligned(lines, ">")))
    for task, settings in found["differ"].items():
        print(f"not made alike: {task}: {settings}")
    keep(out, "behaviour", found)


def report_command(folders: Positional[tuple[str, ...]], out: str = "runs/report"):
    """One page of pictures, tables and plain words: out/report.html, and each picture as PNG and SVG.

    Args:
        folders: runs, or folders of runs: what they are is found by the files in them
        out: the folder of the page
    """
    print(report(folders, out))


def merge_command(combination: Positional[str], out: Positional[str], dtype: str = "bfloat16"):
    """Writes a linear combination of checkpoints in hub format: "0.15*A + 0.85*B".

    Args:
        combination: coefficients that sum to 1, and folders or presets
        out: the folder
        dtype: bfloat16 or float32, of the file
    """
    print(f"{merge(combination, out, dtype)}")


if __name__ == "__main__":
    commands = {"weights": weights, "cka": cka_command, "landscape": landscape_command,
                "trajectory": trajectory_command, "behaviour": behaviour_command, "merge": merge_command,
                "report": report_command}
    given = split_flags(sys.argv[1:])
    if given[:1] == ["landscape"]:
        given = ["--run" if word == "--out" else word for word in given]
    try:
        tyro.extras.subcommand_cli_from_dict(commands, use_underscores=True,
                                             config=(tyro.conf.FlagConversionOff,),
                                             args=given)
    except InputError as e:
        print(f"error: {str(e).replace('--init: ', '')}", file=sys.stderr)     # there is no such flag here
        sys.exit(2)
