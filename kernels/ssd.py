"""State-space duality: the Mamba-2 recurrence, computed chunk by chunk with matrix products.

Per head h with group g = h // (H // G), within one document:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t        S is (P, N), zero at a document's first token
    y_t = S_t C_t + D x_t

Within a chunk of Q tokens the sum over earlier tokens is a masked (Q, Q) product; between chunks only the
state travels. Work is O(T Q) instead of a T-step loop of tiny kernels. Source: Dao and Gu, arXiv 2405.21060,
section 6. The (Q, Q) part, which dwarfs the rest in memory traffic, has its backward pass written out;
autograd does the others.

Notation: B batch, T tokens, H heads, P head dim, G groups, N state, Q chunk, c chunks.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import kernels
from kernels import columns, constexpr, jit, load_wide, on_triton, program, tl, triton, wide, wide_tl


def recurrence(x, dt, A, B, C, D, docs=None, initial=None):
    """The definition, one token at a time: the oracle of every other path. Shapes as in `ssd`. Returns y and
    the last state."""
    b, t, h, p = x.shape
    n = B.shape[-1]
    B = B.repeat_interleave(h // B.shape[2], 2)                                       # (B, T, H, N)
    C = C.repeat_interleave(h // C.shape[2], 2)
    state = x.new_zeros(b, h, p, n) if initial is None else initial
    ys = []
    for i in range(t):
        if docs is not None and i:
            same = docs[:, i] == docs[:, i - 1]
            state = state * same[:, None, None, None]
        decay = torch.exp(dt[:, i] * A)[..., None, None]
        step = dt[:, i, :, None] * x[:, i]
        state = state * decay + step[..., None] * B[:, i, :, None]
        y = (state * C[:, i, :, None]).sum(-1)
        ys.append(y + D[:, None] * x[:, i])
    return torch.stack(ys, 1), state


class _Within(torch.autograd.Function):
    """y = (E * C B^T) xd with E_ij = exp(acc_i - acc_j) where same_ij, else 0; shapes as in `ssd`, G groups
    of H / G heads. E and acc share the scan's fp32 (or fp64); the products run in xd's dtype."""

    @staticmethod
    def forward(ctx, B, C, acc, xd, same):
        groups = B.shape[2]
        fall = acc[..., :, None] - acc[..., None, :]                                  # (B, c, H, Q, Q)
        decay = fall.masked_fill_(~same, -torch.inf).exp_()
        scores = (C @ B.transpose(-1, -2)).to(acc.dtype)[:, :, :, None]               # (B, c, G, 1, Q, Q)
        mix = decay.unflatten(2, (groups, -1)) * scores
        mix = mix.flatten(2, 3).to(xd.dtype)
        ctx.save_for_backward(B, C, xd, decay, mix)
        return mix @ xd

    @staticmethod
    def backward(ctx, dy):
        B, C, xd, decay, mix = ctx.saved_tensors
        groups = B.shape[2]
        dmix = (dy @ xd.transpose(-1, -2)).to(decay.dtype)
        dscores = (dmix * decay).unflatten(2, (groups, -1)).sum(3).to(B.dtype)
        # d / d (acc_i - acc_j): rows gain what columns lose. Not i = j, which would drown the rest in
        # rounding.
        dfall = dmix.mul_(mix)
        dfall.diagonal(dim1=-2, dim2=-1).zero_()
        dacc = dfall.sum(-1).sub_(dfall.sum(-2))
        dB = dscores.transpose(-1, -2) @ C
        dC = dscores @ B
        dxd = mix.transpose(-1, -2) @ dy
        return dB, dC, dacc, dxd, None


def chunk_length(P, N):
    """Tokens a chunk: (Q, Q) scores a chunk about balance the (P, N) states; a power of two."""
    return 1 << round(math.log2(P * N) / 2)


def _pad_tokens(z, pad):
    """z (B, T, ...) with zeros for `pad` tokens more."""
    return F.pad(z, [0, 0] * (z.dim() - 2) + [0, pad])


def _pad_documents(docs, pad):
    """docs (B, T) with the last document longer by `pad` tokens."""
    docs = docs[:, None].float()
    return F.pad(docs, (0, pad), mode="replicate")[:, 0].long()


def _chunked(x, dt, A, B, C, D, docs, initial, chunk, last):
    """The scan in plain torch."""
    b, t, h, p = x.shape
    n = B.shape[-1]
    q = min(chunk or chunk_length(p, n), t)
    pad = -t % q
    if pad:                                                   # dt = 0 in the padding: decay 1, nothing added
        x, dt, B, C = (_pad_tokens(z, pad) for z in (x, dt, B, C))
        docs = None if docs is None else _pad_documents(docs, pad)
    c = (t + pad) // q

    # same: which earlier tokens of its chunk a token sees; alive: which tokens see the state that enters.
    causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    if docs is None:
        same = causal                                                                 # (Q, Q)
        alive = None
    else:
        ids = docs.view(b, c, q)
        same = (ids[..., :, None] == ids[..., None, :]) & causal                      # (B, c, Q, Q)
        previous = torch.cat([ids[:, :1, 0], ids[:, :-1, -1]], 1)     # the document whose state enters
        alive = (ids == previous[..., None])[:, :, None, :, None]                     # (B, c, 1, Q, 1)

    def by_chunk(z):
        return z.view(b, c, q, *z.shape[2:]).transpose(2, 3)                          # (B, c, heads, Q, ...)

    dt = by_chunk(dt)                                                                 # (B, c, H, Q)
    xd = by_chunk(x) * dt[..., None].to(x.dtype)                                      # (B, c, H, Q, P)
    B = by_chunk(B)                                                                   # (B, c, G, Q, N)
    C = by_chunk(C)
    # The decays' exponents go from the document's start (or the chunk's) to each token: a masked sum, never a
    # plain cumsum.
    exponents = dt * A[:, None]
    acc = exponents @ same.to(dt.dtype).transpose(-1, -2)                             # (B, c, H, Q)
    same = same.unsqueeze(-3)                                                         # over the heads
    y = _Within.apply(B, C, acc, xd, same)                                            # (B, c, H, Q, P)
    state = None
    if c > 1 or last or initial is not None:
        late, state = _between(B, C, acc, xd, same, alive, initial)
        y = y + late
    y = y.transpose(2, 3).reshape(b, c * q, h, p)
    y = y + x * D[:, None].to(x.dtype)
    return y[:, :t], state


def _between(B, C, acc, xd, same, alive, initial):
    """What the states bring: y's part from before the chunk (B, c, H, Q, P), and the last state. Arguments as
    `_chunked` makes them."""
    b, c, h, q, p = xd.shape
    g, n = B.shape[2], B.shape[4]
    # Each chunk leaves a state of what it holds itself.
    rest = (acc[..., -1:] - acc).masked_fill(~same[..., -1, :], -torch.inf).exp()     # (B, c, H, Q)
    weighted = (xd * rest[..., None].to(xd.dtype)).view(b, c, g, h // g, q, p)
    left = weighted.transpose(-1, -2) @ B[:, :, :, None]
    left = left.view(b, c, h, p, n).to(acc.dtype)                                     # (B, c, H, P, N)
    carry = acc.exp()[..., None]                                                      # (B, c, H, Q, 1)
    if alive is not None:
        carry = carry * alive
    keep = carry[:, :, :, -1, :, None].unbind(1)                                      # (B, H, 1, 1) a chunk
    left = left.unbind(1)                        # unbind, not left[:, i]: its backward fills zeros c times
    # The running state goes from chunk to chunk.
    state = torch.zeros_like(left[0]) if initial is None else initial.to(acc.dtype)
    entering = []
    for i in range(c):
        entering.append(state)
        state = state * keep[i] + left[i]
    entering = torch.stack(entering, 1).to(xd.dtype).view(b, c, g, h // g, p, n)
    late = C[:, :, :, None] @ entering.transpose(-1, -2)                              # (B, c, G, H/G, Q, P)
    return late.view(b, c, h, q, p) * carry.to(xd.dtype), state


# -- Triton -------------------------------------------------------------------------------------------------
# The same algebra, Q = 256 tokens a chunk in tiles of 64 (32 in fp32). What is a number a token and head
# lies in (B, H, padded = c Q), so that a tile of it is one contiguous load: Steps, the dt; Exponent, the
# decay's since the document's or the chunk's start; Carry = exp(Exponent) where the state that enters the
# chunk is still alive, else 0; Rest = exp(Exponent_last - Exponent) where the token's document reaches the
# chunk's end, else 0. With S the scores C B^T of a group, E the state that enters the chunk and
# M_ij = S_ij exp(Exponent_i - Exponent_j):
#
#     y_i = sum_j M_ij dt_j x_j + Carry_i E C_i + D x_i,
#     next E = sum_j Rest_j dt_j x_j (outer) B_j + Carry_last E
#
# No atomics: what is summed over heads or tiles is summed by one program, or stored in parts and summed
# after, so the same inputs give the same bits. Only the inputs are kept: backward makes states and scores
# again.
#
# A program has a batch row b (grid axis 2), a chunk c (axis 1) and, by axis 0, a head h or group g and tiles
# of the chunk: i are the tokens of tile m, j those of tile k. Kernels with products all take the same sizes.

@jit
def _join(flag, a, next_flag, b):
    """Sums that begin again at a flag."""
    return flag | next_flag, tl.where(next_flag != 0, b, a + b)


@jit
def _document(Docs, b, t, T):
    """Document ids of tokens t; those of the padding as the last one's."""
    t = tl.minimum(tl.maximum(t, 0), T - 1)
    return tl.load(Docs + b * T + t)


@jit
def _same(Docs, b, i, j, T, PACKED: constexpr):
    """Whether token j <= i is of i's document."""
    same = i >= j
    if PACKED:
        same = same & (_document(Docs, b, i, T) == _document(Docs, b, j, T))
    return same


@jit
def _dot(x, y, WIDE: constexpr):
    """x y, summed in WIDE; fp32 without TF32."""
    return tl.dot(x, y, input_precision="ieee", out_dtype=WIDE)


@jit
def _load_tile(X, x_token, t, k, T, K):
    """(tokens, K) of one head or group, 0 outside."""
    rows = t.to(tl.int64) * x_token
    inside = (t[:, None] < T) & (k[None, :] < K)
    return tl.load(X + rows[:, None] + k[None, :], inside, 0.0)


@jit
def _store_tile(X, x_token, t, k, T, K, values):
    """(tokens, K) of one head or group, or a state; what is inside."""
    rows = t.to(tl.int64) * x_token
    inside = (t[:, None] < T) & (k[None, :] < K)
    tl.store(X + rows[:, None] + k[None, :], values, inside)


@jit
def _load_state(State, p, n, P, N):
    """A head's state at p and n, which are rows and columns, or for the transposed columns and rows; 0
    outside."""
    return tl.load(State + p * N + n, (p < P) & (n < N), 0.0)


@jit
def _square(Square, row, column, Q: constexpr):
    """Pointers to a tile of a chunk's (Q, Q); row and column are broadcast against each other."""
    return Square + row * Q + column


@jit
def _decay(exponent_i, exponent_j, same):
    """exp(exponent_i - exponent_j) where same is set; elsewhere 1, since what is masked could overflow."""
    fall = tl.where(same, exponent_i - exponent_j, 0.0)
    return tl.exp(fall)


@jit
def _heads_of_part(g, part, H, G, HEADS: constexpr):
    """The first head, and the one after the last, of a group's part of HEADS heads."""
    per_group = H // G
    first = g * per_group + part * HEADS
    end = g * per_group + tl.minimum((part + 1) * HEADS, per_group)
    return first, end


@jit
def _decays(Dt, A, Docs, Steps, Exponent, Carry, Rest, T, H, padded, Q: constexpr, HEADS: constexpr,
            PACKED: constexpr, WIDE: constexpr):
    """The four numbers a token and head, of HEADS heads and a chunk."""
    h = columns(0, HEADS)
    c = tl.program_id(1)
    b = program(2)
    t = c * Q + tl.arange(0, Q)
    exists = h[None, :] < H
    token = (b * T + t[:, None]) * H + h[None, :]
    dt = load_wide(Dt + token, (t[:, None] < T) & exists, WIDE)
    a = load_wide(A + h, h < H, WIDE)
    steps = dt * a[None, :]
    # Exponents are sums from the chunk's start, begun again at each document's.
    if PACKED:
        doc = _document(Docs, b, t, T)
        begins = doc != _document(Docs, b, t - 1, T)
        begins = tl.broadcast_to(begins.to(tl.int32)[:, None], (Q, HEADS))
        _, acc = tl.associative_scan((begins, steps), 0, _join)
    else:
        acc = tl.cumsum(steps, 0)
    last = c * Q + Q - 1
    last_acc = tl.sum(tl.where((t == last)[:, None], acc, 0.0), 0)
    left = last_acc[None, :] - acc
    carry = tl.exp(acc)
    if PACKED:
        alive = doc == _document(Docs, b, c * Q - 1, T)
        reaches = (doc == _document(Docs, b, last, T))[:, None]
        carry = tl.where(alive[:, None], carry, 0.0)
        rest = tl.exp(tl.where(reaches, left, 0.0))
        rest = tl.where(reaches, rest, 0.0)
    else:
        rest = tl.exp(left)
    at = (b * H + h[None, :]) * padded + t[:, None]
    tl.store(Steps + at, dt, exists)
    tl.store(Exponent + at, acc, exists)
    tl.store(Carry + at, carry, exists)
    tl.store(Rest + at, rest, exists)


@jit
def _scores(B, C, Scores, b_batch, b_token, c_batch, c_token, T, H, G, P, N, padded,
            Q: constexpr, TILE: constexpr, BP: constexpr, BN: constexpr, WIDE: constexpr):
    """S = C B^T of a group and chunk, (Q, Q), the tiles on and below the diagonal."""
    tiles: constexpr = Q // TILE
    g = tl.program_id(0) // (tiles * tiles)
    m = tl.program_id(0) // tiles % tiles
    k = tl.program_id(0) % tiles
    c = tl.program_id(1)
    b = program(2)
    chunk = b * tl.num_programs(1) + c
    B += b * b_batch + g * N
    C += b * c_batch + g * N
    Scores += (chunk * G + g) * Q * Q
    if k <= m:
        n = tl.arange(0, BN)
        row = m * TILE + tl.arange(0, TILE)
        column = k * TILE + tl.arange(0, TILE)
        c_rows = _load_tile(C, c_token, c * Q + row, n, T, N)
        b_rows = _load_tile(B, b_token, c * Q + column, n, T, N)
        scores = _dot(c_rows, tl.trans(b_rows), WIDE)
        tl.store(_square(Scores, row[:, None], column[None, :], Q), scores)


@jit
def _outer(X, Y, Weight, Steps, Out, x_batch, x_token, y_batch, y_token, T, H, G, P, N, padded,
           TIMES_DT: constexpr, Q: constexpr, TILE: constexpr, BP: constexpr, BN: constexpr,
           WIDE: constexpr):
    """A chunk's sum over tokens of weight x (outer) y, with TIMES_DT of weight dt x (outer) y: (P, N), of
    every head."""
    h = tl.program_id(0)
    c = tl.program_id(1)
    b = program(2)
    g = h // (H // G)
    p = tl.arange(0, BP)
    n = tl.arange(0, BN)
    head = (b * H + h) * padded
    X += b * x_batch + h * P
    Y += b * y_batch + g * N
    total = tl.zeros((BP, BN), WIDE)
    for start in range(0, Q, TILE):
        t = c * Q + start + tl.arange(0, TILE)
        weight = tl.load(Weight + head + t)
        if TIMES_DT:
            weight *= tl.load(Steps + head + t)
        x = _load_tile(X, x_token, t, p, T, P)
        y = _load_tile(Y, y_token, t, n, T, N)
        weighted = x.to(WIDE) * weight[:, None]
        total += _dot(tl.trans(weighted.to(x.dtype)), y, WIDE)
    chunk = b * tl.num_programs(1) + c
    Out += (chunk * H + h) * P * N
    _store_tile(Out, N, p, n, P, N, total)


@jit
def _pass(Left, Initial, Carry, Entering, Last, size, chunks, padded, HAS_INITIAL: constexpr,
          BLOCK: constexpr, Q: constexpr, WIDE: constexpr):
    """The running state from chunk to chunk, BLOCK of its numbers a program; what enters each."""
    i = columns(0, BLOCK)
    h = tl.program_id(1)
    H = tl.num_programs(1)
    b = program(2)
    head = b * H + h
    inside = i < size
    state = tl.zeros((BLOCK,), WIDE)
    if HAS_INITIAL:
        state = load_wide(Initial + head * size + i, inside, WIDE)
    for c in range(chunks):
        at = ((b * chunks + c) * H + h) * size + i
        tl.store(Entering + at, state, inside)
        keep = tl.load(Carry + head * padded + c * Q + Q - 1)
        state = tl.load(Left + at, inside, 0.0) + keep * state
    tl.store(Last + head * size + i, state, inside)


@jit
def _pass_backward(DEntering, DLast, Carry, Entering, DLeft, DKeep, DInitial, size, chunks, padded,
                   HAS_DLAST: constexpr, BLOCK: constexpr, Q: constexpr, WIDE: constexpr):
    """The gradients of the states that chunks leave behind, from the last to the first, and of the factors
    between them: DKeep (B, H, chunks, blocks), in parts."""
    i = columns(0, BLOCK)
    h = tl.program_id(1)
    H = tl.num_programs(1)
    b = program(2)
    head = b * H + h
    inside = i < size
    dstate = tl.zeros((BLOCK,), WIDE)
    if HAS_DLAST:
        dstate = load_wide(DLast + head * size + i, inside, WIDE)
    for step in range(chunks):
        c = chunks - 1 - step
        at = ((b * chunks + c) * H + h) * size + i
        tl.store(DLeft + at, dstate, inside)
        entering = load_wide(Entering + at, inside, WIDE)
        part = (head * chunks + c) * tl.num_programs(0) + tl.program_id(0)
        tl.store(DKeep + part, tl.sum(dstate * entering, 0))
        keep = tl.load(Carry + head * padded + c * Q + Q - 1)
        dstate = tl.load(DEntering + at, inside, 0.0) + keep * dstate
    tl.store(DInitial + head * size + i, dstate, inside)


@jit
def _scan(X, C, D, Docs, Steps, Exponent, Carry, Scores, Entering, Y, x_batch, x_token, c_batch, c_token,
          T, H, G, P, N, padded, PACKED: constexpr, Q: constexpr, TILE: constexpr, BP: constexpr,
          BN: constexpr, WIDE: constexpr):
    """y of a head and tile of tokens."""
    tiles: constexpr = Q // TILE
    h = tl.program_id(0) // tiles
    m = tl.program_id(0) % tiles
    c = tl.program_id(1)
    b = program(2)
    g = h // (H // G)
    chunk = b * tl.num_programs(1) + c
    p = tl.arange(0, BP)
    n = tl.arange(0, BN)
    row = m * TILE + tl.arange(0, TILE)
    i = c * Q + row
    head = (b * H + h) * padded
    Steps += head
    Exponent += head
    X += b * x_batch + h * P
    C += b * c_batch + g * N
    Y += (b * T * H + h) * P
    Scores += (chunk * G + g) * Q * Q
    Entering += (chunk * H + h) * P * N
    # The state that enters the chunk counts where it is alive.
    exponent_i = tl.load(Exponent + i)[:, None]
    carry = tl.load(Carry + head + i)
    entering = _load_state(Entering, p[None, :], n[:, None], P, N)
    c_rows = _load_tile(C, c_token, i, n, T, N)
    y = _dot(c_rows, entering, WIDE) * carry[:, None]
    # The chunk's tokens up to these come a tile at a time.
    for k in range(0, m + 1):
        column = k * TILE + tl.arange(0, TILE)
        j = c * Q + column
        same = _same(Docs, b, i[:, None], j[None, :], T, PACKED)
        exponent_j = tl.load(Exponent + j)[None, :]
        dt = tl.load(Steps + j)[None, :]
        scores = tl.load(_square(Scores, row[:, None], column[None, :], Q))
        mix = scores.to(WIDE) * _decay(exponent_i, exponent_j, same) * dt
        mix = tl.where(same, mix, 0.0)
        x = _load_tile(X, x_token, j, p, T, P)
        y += _dot(mix.to(x.dtype), x, WIDE)
    # The tokens themselves come last.
    x = _load_tile(X, x_token, i, p, T, P)
    y += x.to(WIDE) * tl.load(D + h).to(WIDE)
    _store_tile(Y, H * P, i, p, T, P, y)


@jit
def _scan_backward(X, DY, B, D, Docs, Steps, Exponent, Rest, Scores, DLeft, DX, DD, x_batch, x_token,
                   b_batch, b_token, T, H, G, P, N, padded, PACKED: constexpr, Q: constexpr, TILE: constexpr,
                   BP: constexpr, BN: constexpr, WIDE: constexpr):
    """The gradient of x of a head and tile of tokens, and its part of D's: DD (B, chunks, H, tiles)."""
    tiles: constexpr = Q // TILE
    h = tl.program_id(0) // tiles
    k = tl.program_id(0) % tiles
    c = tl.program_id(1)
    b = program(2)
    g = h // (H // G)
    chunk = b * tl.num_programs(1) + c
    p = tl.arange(0, BP)
    n = tl.arange(0, BN)
    column = k * TILE + tl.arange(0, TILE)
    j = c * Q + column
    head = (b * H + h) * padded
    Exponent += head
    B += b * b_batch + g * N
    DY += (b * T * H + h) * P
    Scores += (chunk * G + g) * Q * Q
    DLeft += (chunk * H + h) * P * N
    # The state that the chunk leaves has these tokens in it.
    exponent_j = tl.load(Exponent + j)[:, None]
    dleft = _load_state(DLeft, p[None, :], n[:, None], P, N)
    b_rows = _load_tile(B, b_token, j, n, T, N)
    dx = _dot(b_rows, dleft, WIDE)
    dx *= tl.load(Rest + head + j)[:, None]
    # The chunk's tokens from these on come a tile at a time, scores and decays transposed.
    for m in range(k, tiles):
        row = m * TILE + tl.arange(0, TILE)
        i = c * Q + row
        same = _same(Docs, b, i[None, :], j[:, None], T, PACKED)
        exponent_i = tl.load(Exponent + i)[None, :]
        decay = _decay(exponent_i, exponent_j, same)
        scores = tl.load(_square(Scores, row[None, :], column[:, None], Q)).to(WIDE)
        mix = scores * decay
        mix = tl.where(same, mix, 0.0)
        dy = _load_tile(DY, H * P, i, p, T, P)
        dx += _dot(mix.to(dy.dtype), dy, WIDE)
    # The tokens themselves come last, and their addresses: earlier these would take registers from the loop.
    X += b * x_batch + h * P
    DX += (b * T * H + h) * P
    dy_j = _load_tile(DY, H * P, j, p, T, P).to(WIDE)
    x = _load_tile(X, x_token, j, p, T, P).to(WIDE)
    dt = tl.load(Steps + head + j)[:, None]
    d = tl.load(D + h).to(WIDE)
    dx = dx * dt + dy_j * d
    _store_tile(DX, H * P, j, p, T, P, dx)
    dd = tl.sum(tl.sum(dy_j * x, 1), 0)
    tl.store(DD + (chunk * H + h) * tiles + k, dd)


@jit
def _scores_backward(X, DY, Docs, Steps, Exponent, Scores, DScores, Rows, Columns, Diagonal, x_batch, x_token,
                     parts, T, H, G, P, N, padded, HEADS: constexpr, PACKED: constexpr, Q: constexpr,
                     TILE: constexpr, BP: constexpr, BN: constexpr, WIDE: constexpr):
    """A tile of the gradient of a group's scores, DScores (parts, B, chunks, G, Q, Q), each part of HEADS
    heads; and with f_ij = dy_i . x_j M_ij, of every head, Rows = sum_j f_ij dt_j and Columns = sum_i f_ij
    over the tile: (tiles, B, H, padded), by the tile that is summed over. Without i = j, whose decay is 1:
    where decays are strong it would drown the rest in rounding. It is Diagonal (B, H, padded)."""
    tiles: constexpr = Q // TILE
    at = tl.program_id(0)
    g = at // (tiles * tiles * parts)
    part = at // (tiles * tiles) % parts
    m = at // tiles % tiles
    k = at % tiles
    c = tl.program_id(1)
    b = program(2)
    batch = tl.num_programs(2).to(tl.int64)
    chunks = tl.num_programs(1)
    square = ((b * chunks + c) * G + g) * Q * Q
    X += b * x_batch
    DY += b * T * H * P
    Scores += square
    DScores += part * batch * chunks * G * Q * Q + square
    Rows += k * batch * H * padded
    Columns += m * batch * H * padded
    if k <= m:
        p = tl.arange(0, BP)
        row = m * TILE + tl.arange(0, TILE)
        column = k * TILE + tl.arange(0, TILE)
        i = c * Q + row
        j = c * Q + column
        same = _same(Docs, b, i[:, None], j[None, :], T, PACKED)
        scores = tl.load(_square(Scores, row[:, None], column[None, :], Q)).to(WIDE)
        dscores = tl.zeros((TILE, TILE), WIDE)
        first, end = _heads_of_part(g, part, H, G, HEADS)
        for h in range(first, end):
            head = (b * H + h) * padded
            exponent_i = tl.load(Exponent + head + i)[:, None]
            exponent_j = tl.load(Exponent + head + j)[None, :]
            dt = tl.load(Steps + head + j)[None, :]
            dy = _load_tile(DY + h * P, H * P, i, p, T, P)
            x = _load_tile(X + h * P, x_token, j, p, T, P)
            f = _dot(dy, tl.trans(x), WIDE)
            f = tl.where(same, f * _decay(exponent_i, exponent_j, same), 0.0)
            dscores += f * dt
            f *= scores
            if k == m:
                diagonal = tl.where(row[:, None] == column[None, :], f, 0.0)
                tl.store(Diagonal + head + i, tl.sum(diagonal, 1))
            f = tl.where(row[:, None] > column[None, :], f, 0.0)
            tl.store(Rows + head + i, tl.sum(f * dt, 1))
            tl.store(Columns + head + j, tl.sum(f, 0))
        tl.store(_square(DScores, row[:, None], column[None, :], Q), dscores)


@jit
def _group_backward(X, Y, Other, State, Weight, Steps, DScores, DOut, U, x_batch, x_token, y_batch, y_token,
                    other_batch, other_token, parts, T, H, G, P, N, padded, HEADS: constexpr, OF_B: constexpr,
                    Q: constexpr, TILE: constexpr, BP: constexpr, BN: constexpr, WIDE: constexpr):
    """The gradient of C or B, a part of HEADS heads each: DOut (parts, B, T, G, N). Of C: X = dy, Y = C,
    Other = B, State = what enters, Weight = Carry; of B: X = x, Y = B, Other = C, State = the gradient of
    what is left behind, Weight = Rest, times dt. U (B, H, padded) = y . (x state), of every head."""
    tiles: constexpr = Q // TILE
    g = tl.program_id(0) // (tiles * parts)
    part = tl.program_id(0) // tiles % parts
    m = tl.program_id(0) % tiles
    c = tl.program_id(1)
    b = program(2)
    batch = tl.num_programs(2).to(tl.int64)
    chunk = b * tl.num_programs(1) + c
    p = tl.arange(0, BP)
    n = tl.arange(0, BN)
    row = m * TILE + tl.arange(0, TILE)
    i = c * Q + row
    X += b * x_batch
    Y += b * y_batch + g * N
    Other += b * other_batch + g * N
    State += chunk * H * P * N
    DScores += ((part * batch * tl.num_programs(1) + chunk) * G + g) * Q * Q
    DOut += ((part * batch + b) * T * G + g) * N
    # One part of the gradient comes by way of the states.
    y = _load_tile(Y, y_token, i, n, T, N).to(WIDE)
    out = tl.zeros((TILE, BN), WIDE)
    first, end = _heads_of_part(g, part, H, G, HEADS)
    for h in range(first, end):
        at = (b * H + h) * padded + i
        state = _load_state(State + h * P * N, p[:, None], n[None, :], P, N)
        x = _load_tile(X + h * P, x_token, i, p, T, P)
        z = _dot(x, state, WIDE)
        weight = tl.load(Weight + at)
        if OF_B:
            weight *= tl.load(Steps + at)
        out += z * weight[:, None]
        tl.store(U + at, tl.sum(z * y, 1))
    # The other comes by way of the scores: C's tokens see the tiles up to theirs, B's are seen by those from
    # theirs on.
    first_tile = 0
    end_tile = m + 1
    if OF_B:
        first_tile = m
        end_tile = tiles
    for k in range(first_tile, end_tile):
        column = k * TILE + tl.arange(0, TILE)
        other = _load_tile(Other, other_token, c * Q + column, n, T, N)
        if OF_B:
            dscores = tl.load(_square(DScores, column[None, :], row[:, None], Q))
        else:
            dscores = tl.load(_square(DScores, row[:, None], column[None, :], Q))
        out += _dot(dscores, other, WIDE)
    _store_tile(DOut, G * N, i, n, T, N, out)


@jit
def _decays_backward(A, Docs, Steps, Carry, Rest, UC, UB, Rows, Columns, Diagonal, DKeep, DDt, DA,
                     T, H, padded, blocks, HEADS: constexpr, PACKED: constexpr, TILE: constexpr, Q: constexpr,
                     WIDE: constexpr):
    """Everything that moves an exponent comes together: the gradients of dt and, a chunk each, of A."""
    tiles: constexpr = Q // TILE
    h = columns(0, HEADS)
    c = tl.program_id(1)
    b = program(2)
    chunks = tl.num_programs(1)
    side = tl.num_programs(2).to(tl.int64) * H * padded
    q = tl.arange(0, Q)[:, None]
    t = c * Q + tl.arange(0, Q)
    exists = h[None, :] < H
    at = (b * H + h[None, :]) * padded + t[:, None]
    # An exponent decays the state that enters, and lessens what is left until the chunk's end.
    dt = tl.load(Steps + at, exists, 0.0)
    carry = tl.load(Carry + at, exists, 0.0)
    rest = tl.load(Rest + at, exists, 0.0)
    late = rest * tl.load(UB + at, exists, 0.0)
    dacc = carry * tl.load(UC + at, exists, 0.0) - dt * late
    direct = late + tl.load(Diagonal + at, exists, 0.0)
    # Within the chunk rows gain what columns lose.
    for k in range(0, tiles):
        above = q < (k + 1) * TILE
        below = q >= k * TILE
        column = tl.load(Columns + k * side + at, exists & above, 0.0)
        row = tl.load(Rows + k * side + at, exists & below, 0.0)
        dacc += row - dt * column
        direct += column
    # The last token's exponent is in the factor between the states, and in every token's rest.
    DKeep += ((b * H + h) * chunks + c) * blocks
    dkeep = tl.zeros((HEADS,), WIDE)
    for k in range(0, blocks):
        dkeep += tl.load(DKeep + k, h < H, 0.0)
    is_last = q == Q - 1
    dkeep *= tl.sum(tl.where(is_last, carry, 0.0), 0)
    dlast = dkeep + tl.sum(dt * late, 0)
    dacc += tl.where(is_last, dlast[None, :], 0.0)
    # An exponent is the sum of the steps up to it, so a step's gradient is the sum from it on.
    if PACKED:
        ends = _document(Docs, b, t, T) != _document(Docs, b, t + 1, T)
        ends = tl.broadcast_to(ends.to(tl.int32)[:, None], (Q, HEADS))
        _, dstep = tl.associative_scan((ends, dacc), 0, _join, reverse=True)
    else:
        dstep = tl.cumsum(dacc, 0, reverse=True)
    a = load_wide(A + h, h < H, WIDE)
    ddt = dstep * a[None, :] + direct
    da = tl.sum(dstep * dt, 0)
    token = (b * T + t[:, None]) * H + h[None, :]
    tl.store(DDt + token, ddt, exists & (t[:, None] < T))
    tl.store(DA + (b * chunks + c) * H + h, da, h < H)


@jit
def _step(State, X, Dt, A, B, C, D, Y, H, P, N, per_group, x_batch, b_batch, c_batch, BP: constexpr,
          BN: constexpr):
    """One token of a row and head."""
    h = tl.program_id(0)
    b = program(1)
    p = tl.arange(0, BP)
    n = tl.arange(0, BN)
    head = b * H + h
    group = h // per_group * N
    inside = (p[:, None] < P) & (n[None, :] < N)
    State += head * P * N + p[:, None] * N + n[None, :]
    state = tl.load(State, inside, 0.0)
    dtype = state.dtype
    x = load_wide(X + b * x_batch + h * P + p, p < P, dtype)
    b_row = load_wide(B + b * b_batch + group + n, n < N, dtype)
    c_row = load_wide(C + b * c_batch + group + n, n < N, dtype)
    dt = tl.load(Dt + head).to(dtype)
    a = tl.load(A + h).to(dtype)
    d = tl.load(D + h).to(dtype)
    state = state * tl.exp(dt * a) + (dt * x)[:, None] * b_row[None, :]
    tl.store(State, state, inside)
    y = tl.sum(state * c_row[None, :], 1)
    y += d * x
    tl.store(Y + head * P + p, y, p < P)


class _Plan:
    """Sizes, in small letters (B, C and D are tensors), and how the work is cut."""

    def __init__(self, x, B, docs, chunk):
        b, t, h, p = x.shape
        g, n = B.shape[2:]
        # In fp32 a chunk of a single tile makes the compiler keep whole tiles a thread: 6 kB of stack.
        least = 64 if x.dtype == torch.float32 else 16
        q = max(least, triton.next_power_of_2(min(chunk or 256, t)))
        c = triton.cdiv(t, q)
        tile = min(64 if x.itemsize == 2 else 32, q)
        block = min(1024, triton.next_power_of_2(p * n))       # of a state's numbers, a program
        self.batch = b
        self.chunks = c
        self.heads = h
        self.groups = g
        self.per_group = h // g                                # heads
        self.tile = tile                                       # tokens
        self.tiles = q // tile                                 # of a chunk
        self.blocks = triton.cdiv(p * n, block)                # of a state
        self.packed = docs is not None
        self.dtype = wide(x.dtype)                             # of sums
        # These are the shapes of what the kernels write.
        self.token_shape = b, h, c * q
        self.scores_shape = b, c, g, q, q
        self.state_shape = b, h, p, n
        self.states_shape = b, c, h, p, n
        # Kernels share arguments: all but `_step` these, then those with decays, with states, with products.
        self.chunk_args = dict(Q=q, WIDE=wide_tl(x.dtype))
        self.decay_args = dict(T=t, H=h, padded=c * q, PACKED=self.packed, **self.chunk_args)
        self.state_args = dict(size=p * n, chunks=c, padded=c * q, BLOCK=block, **self.chunk_args)
        self.product_args = dict(
            T=t, H=h, G=g, P=p, N=n, padded=c * q, TILE=tile,
            BP=max(16, triton.next_power_of_2(p)), BN=max(16, triton.next_power_of_2(n)), **self.chunk_args)

    def grid(self, programs):
        """A grid of so many programs a chunk of a row."""
        return programs, self.chunks, self.batch

    def empty(self, like, *shape, dtype=None):
        """A tensor where `like` is, of the sums' dtype."""
        return like.new_empty(shape, dtype=dtype or self.dtype)


class _Chunks(NamedTuple):
    """What forward and backward share."""
    steps: torch.Tensor             # (B, H, padded), as the next three
    exponent: torch.Tensor
    carry: torch.Tensor
    rest: torch.Tensor
    scores: torch.Tensor            # (B, c, G, Q, Q)
    entering: torch.Tensor          # (B, c, H, P, N): the states that enter the chunks
    last: torch.Tensor              # (B, H, P, N)


def _strides(**tensors):
    """x_batch and x_token of each x=(B, T, heads, k)."""
    strides = {}
    for name, tensor in tensors.items():
        strides[f"{name}_batch"] = tensor.stride(0)
        strides[f"{name}_token"] = tensor.stride(1)
    return strides


def _chunks(plan, x, dt, A, B, C, docs, initial):
    """Decays, a group's scores, and states."""
    steps = plan.empty(x, *plan.token_shape)
    exponent = torch.empty_like(steps)
    carry = torch.empty_like(steps)
    rest = torch.empty_like(steps)
    _decays[plan.grid(triton.cdiv(plan.heads, 16))](
        Dt=dt, A=A, Docs=docs, Steps=steps, Exponent=exponent, Carry=carry, Rest=rest,
        HEADS=16, num_warps=8, **plan.decay_args)
    scores = plan.empty(x, *plan.scores_shape, dtype=x.dtype)
    _scores[plan.grid(plan.groups * plan.tiles ** 2)](
        B=B, C=C, Scores=scores, num_warps=8,
        **_strides(b=B, c=C), **plan.product_args)
    # Each chunk leaves a state of what it holds itself; then the running state goes through all chunks.
    left = plan.empty(x, *plan.states_shape)
    _outer[plan.grid(plan.heads)](
        X=x, Y=B, Weight=rest, Steps=steps, Out=left, TIMES_DT=True,
        **_strides(x=x, y=B), **plan.product_args)
    entering = plan.empty(x, *plan.states_shape, dtype=x.dtype)
    last = plan.empty(x, *plan.state_shape)
    _pass[plan.blocks, plan.heads, plan.batch](
        Left=left, Initial=initial, Carry=carry, Entering=entering, Last=last,
        HAS_INITIAL=initial is not None, **plan.state_args)
    return _Chunks(steps, exponent, carry, rest, scores, entering, last)


def _heads_adjacent(z):
    """(B, T, heads, k) with nothing between the heads of a token; tokens may be apart."""
    adjacent = z.stride(-1) == 1 and z.stride(-2) == z.shape[-1]
    return z if adjacent else z.contiguous()


def _contiguous_or_none(z):
    return None if z is None else z.contiguous()


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, docs, initial, chunk):
        x = _heads_adjacent(x)
        B = _heads_adjacent(B)
        C = _heads_adjacent(C)
        dt, A, D, docs, initial = map(_contiguous_or_none, (dt, A, D, docs, initial))
        ctx.save_for_backward(x, dt, A, B, C, D, docs, initial)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        plan = _Plan(x, B, docs, chunk)
        chunks = _chunks(plan, x, dt, A, B, C, docs, initial)
        y = x.new_empty(x.shape)
        _scan[plan.grid(plan.heads * plan.tiles)](
            X=x, C=C, D=D, Docs=docs, Y=y,
            Steps=chunks.steps, Exponent=chunks.exponent, Carry=chunks.carry,
            Scores=chunks.scores, Entering=chunks.entering,
            PACKED=plan.packed, **_strides(x=x, c=C), **plan.product_args)
        return y, chunks.last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, docs, initial = ctx.saved_tensors
        plan = _Plan(x, B, docs, ctx.chunk)
        chunks = _chunks(plan, x, dt, A, B, C, docs, initial)
        dy = x.new_zeros(x.shape) if dy is None else dy.contiguous()
        dlast = _contiguous_or_none(dlast)
        dleft, dkeep, dinitial = _states_backward(plan, chunks, dy, dlast, C)
        dx, dD = _x_backward(plan, chunks, x, dy, B, D, docs, dleft)
        dB, dC, parts = _matrices_backward(plan, chunks, x, dy, B, C, docs, dleft)
        ddt, dA = _exponents_backward(plan, chunks, parts, dkeep, dt, A, docs)
        dA = dA.to(A.dtype)
        dB = dB.to(B.dtype)
        dC = dC.to(C.dtype)
        dD = dD.to(D.dtype)
        dinitial = None if initial is None else dinitial.to(initial.dtype)
        return dx, ddt, dA, dB, dC, dD, None, dinitial, None


def _states_backward(plan, chunks, dy, dlast, C):
    """The gradients of the states that chunks leave (B, c, H, P, N), from the last to the first: each is
    read by the next chunk's tokens and passed on. Also those of the factors between them and of the first
    state."""
    dentering = plan.empty(dy, *plan.states_shape)
    _outer[plan.grid(plan.heads)](
        X=dy, Y=C, Weight=chunks.carry, Steps=None, Out=dentering, TIMES_DT=False,
        **_strides(x=dy, y=C), **plan.product_args)
    dleft = torch.empty_like(chunks.entering)
    dkeep = plan.empty(dy, plan.batch, plan.heads, plan.chunks, plan.blocks)
    dinitial = plan.empty(dy, *plan.state_shape)
    _pass_backward[plan.blocks, plan.heads, plan.batch](
        DEntering=dentering, DLast=dlast, Carry=chunks.carry, Entering=chunks.entering,
        DLeft=dleft, DKeep=dkeep, DInitial=dinitial,
        HAS_DLAST=dlast is not None, **plan.state_args)
    return dleft, dkeep, dinitial


def _x_backward(plan, chunks, x, dy, B, D, docs, dleft):
    """The gradients of x and D."""
    dx = x.new_empty(x.shape)
    dD = plan.empty(x, plan.batch, plan.chunks, plan.heads, plan.tiles)
    _scan_backward[plan.grid(plan.heads * plan.tiles)](
        X=x, DY=dy, B=B, D=D, Docs=docs, DX=dx, DD=dD,
        Steps=chunks.steps, Exponent=chunks.exponent, Rest=chunks.rest,
        Scores=chunks.scores, DLeft=dleft,
        PACKED=plan.packed, **_strides(x=x, b=B), **plan.product_args)
    return dx, dD.sum((0, 1, 3))


class _Parts(NamedTuple):
    """What moves an exponent within a chunk and by way of the states, see the kernels."""
    rows: torch.Tensor              # (tiles, B, H, padded)
    columns: torch.Tensor
    diagonal: torch.Tensor          # (B, H, padded), as the next two
    uB: torch.Tensor
    uC: torch.Tensor


def _matrices_backward(plan, chunks, x, dy, B, C, docs, dleft):
    """The gradients of B and C, by way of the scores and of the states; and `_Parts`."""
    heads = min(16, plan.per_group)                       # of a program: with all of one group's, too few run
    parts = triton.cdiv(plan.per_group, heads)
    warps = 8 if x.itemsize == 2 else 16
    args = dict(parts=parts, HEADS=heads, num_warps=warps, **plan.product_args)
    dscores = plan.empty(x, parts, *plan.scores_shape, dtype=x.dtype)
    rows = plan.empty(x, plan.tiles, *plan.token_shape)
    columns = torch.empty_like(rows)
    diagonal = plan.empty(x, *plan.token_shape)
    _scores_backward[plan.grid(plan.groups * parts * plan.tiles ** 2)](
        X=x, DY=dy, Docs=docs, Steps=chunks.steps, Exponent=chunks.exponent,
        Scores=chunks.scores, DScores=dscores,
        Rows=rows, Columns=columns, Diagonal=diagonal,
        PACKED=plan.packed, **_strides(x=x), **args)
    dB = plan.empty(x, parts, *B.shape)
    dC = torch.empty_like(dB)
    uB = torch.empty_like(diagonal)
    uC = torch.empty_like(diagonal)
    grid = plan.grid(plan.groups * parts * plan.tiles)
    _group_backward[grid](
        X=dy, Y=C, Other=B, DScores=dscores, DOut=dC, U=uC,
        State=chunks.entering, Weight=chunks.carry, Steps=None,
        OF_B=False, **_strides(x=dy, y=C, other=B), **args)
    _group_backward[grid](
        X=x, Y=B, Other=C, DScores=dscores, DOut=dB, U=uB,
        State=dleft, Weight=chunks.rest, Steps=chunks.steps,
        OF_B=True, **_strides(x=x, y=B, other=C), **args)
    return dB.sum(0), dC.sum(0), _Parts(rows, columns, diagonal, uB, uC)


def _exponents_backward(plan, chunks, parts, dkeep, dt, A, docs):
    """The gradients of dt and A."""
    ddt = torch.empty_like(dt)
    dA = plan.empty(dt, plan.batch, plan.chunks, plan.heads)
    _decays_backward[plan.grid(triton.cdiv(plan.heads, 8))](
        A=A, Docs=docs, Steps=chunks.steps, Carry=chunks.carry, Rest=chunks.rest,
        Rows=parts.rows, Columns=parts.columns, Diagonal=parts.diagonal, UB=parts.uB, UC=parts.uC,
        DKeep=dkeep, DDt=ddt, DA=dA, blocks=plan.blocks,
        TILE=plan.tile, HEADS=8, num_warps=8, **plan.decay_args)
    return ddt, dA.sum((0, 1))


def _triton_step(state, x, dt, A, B, C, D):
    b, h, p, n = state.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x = _heads_adjacent(x)
    B = _heads_adjacent(B)
    C = _heads_adjacent(C)
    _step[h, b](
        State=state, X=x, Dt=dt.contiguous(), A=A, B=B, C=C, D=D, Y=y,
        H=h, P=p, N=n, per_group=h // B.shape[1],
        x_batch=x.stride(0), b_batch=B.stride(0), c_batch=C.stride(0),
        BP=triton.next_power_of_2(p), BN=triton.next_power_of_2(n), num_warps=8)
    return y


# -- in use --------------------------------------------------------------------------------------------------

def step(state, x, dt, A, B, C, D):
    """One token a row, for generation. state (B, H, P, N) fp32, updated in place; x (B, H, P); dt (B, H)
    fp32; A, D (H) fp32; B, C (B, G, N). Returns y (B, H, P) in x's dtype."""
    if on_triton(x):
        return _triton_step(state, x, dt, A, B, C, D)
    b, h, p, n = state.shape
    per_group = h // B.shape[1]
    B = B.to(state.dtype).repeat_interleave(per_group, 1).view(b * h, 1, n)
    C = C.to(state.dtype).repeat_interleave(per_group, 1).view(b * h, 1, n)
    x_wide = x.to(state.dtype)
    flat = state.view(b * h, p, n)
    flat.mul_(torch.exp(dt * A).view(b * h, 1, 1))
    flat.baddbmm_((x_wide * dt[..., None]).view(b * h, p, 1), B)
    y = torch.bmm(flat, C.transpose(1, 2)).view(b, h, p)
    return y.addcmul_(x_wide, D[:, None]).to(x.dtype)


def _mamba_ssm(x, dt, A, B, C, D, docs, initial, chunk):
    """The scan of the package mamba-ssm: not deterministic by default, documents as here."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    if docs is not None:
        docs = (docs - docs[:, :1]).int()                 # it takes the initial state for document 0's
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk or 256, D=D, seq_idx=docs, initial_states=initial,
                                     return_final_states=True)


def ssd(x, dt, A, B, C, D, docs=None, chunk=None, last=False, initial=None):
    """x (B, T, H, P); dt (B, T, H) fp32, positive; A, D (H) fp32, A negative; B, C (B, T, G, N);
    docs (B, T) int64 document ids, each a contiguous run, or None for one document a row; chunk: tokens,
    default `chunk_length(P, N)` (Triton: 256), does not change the result; initial (B, H, P, N) fp32: the
    state before the first token, of the first token's document. Returns y (B, T, H, P); with last=True also
    the state (B, H, P, N) after the last token (a token with dt = 0 leaves it as it was). Gradients of both.

    Documents are isolated bit by bit: every masked term is an exact zero and decays are summed from the
    document's own start, so nothing of one document reaches the rounding of another.
    """
    if kernels.INTERPRET and x.dtype == torch.bfloat16:
        raise RuntimeError("Triton's interpreter takes bfloat16 matrices for integers: use float32")
    if kernels.chosen == "mamba-ssm" and x.is_cuda:
        y, state = _mamba_ssm(x, dt, A, B, C, D, docs, initial, chunk)
    elif on_triton(x) and (kernels.INTERPRET or x.dtype != torch.float64):
        y, state = _SSD.apply(x, dt, A, B, C, D, docs, initial, chunk)
    else:
        y, state = _chunked(x, dt, A, B, C, D, docs, initial, chunk, last)
    return (y, state) if last else y
