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
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import kernels
from kernels import constexpr, jit, on_triton, tl, triton, wide, wide_tl


def recurrence(x, dt, A, B, C, D, docs=None, initial=None):
    """The definition, one token at a time: the oracle of every other path. Shapes as in `ssd`. Returns y and
    the last state."""
    b, t, h, p = x.shape
    B, C = (z.repeat_interleave(h // z.shape[2], 2) for z in (B, C))                  # (B, T, H, N)
    state, ys = x.new_zeros(b, h, p, B.shape[-1]) if initial is None else initial, []
    for i in range(t):
        if docs is not None and i:
            state = state * (docs[:, i] == docs[:, i - 1])[:, None, None, None]
        state = (state * torch.exp(dt[:, i] * A)[..., None, None]
                 + (dt[:, i, :, None] * x[:, i])[..., None] * B[:, i, :, None])
        ys.append((state * C[:, i, :, None]).sum(-1) + D[:, None] * x[:, i])
    return torch.stack(ys, 1), state


class _Within(torch.autograd.Function):
    """y = (E * C B^T) xd with E_ij = exp(acc_i - acc_j) where same_ij, else 0; shapes as in `ssd`, G groups
    of H / G heads. E and acc share the scan's fp32 (or fp64); the products run in xd's dtype."""

    @staticmethod
    def forward(ctx, B, C, acc, xd, same):
        # decay (B, c, H, Q, Q)
        decay = (acc[..., :, None] - acc[..., None, :]).masked_fill_(~same, -torch.inf).exp_()
        scores = (C @ B.transpose(-1, -2)).to(acc.dtype)[:, :, :, None]               # (B, c, G, 1, Q, Q)
        mix = (decay.unflatten(2, (B.shape[2], -1)) * scores).flatten(2, 3).to(xd.dtype)
        ctx.save_for_backward(B, C, xd, decay, mix)
        return mix @ xd

    @staticmethod
    def backward(ctx, g):
        B, C, xd, decay, mix = ctx.saved_tensors
        dmix = (g @ xd.transpose(-1, -2)).to(decay.dtype)
        dscores = (dmix * decay).unflatten(2, (B.shape[2], -1)).sum(3).to(B.dtype)
        dacc = dmix.mul_(mix)                             # d / d acc_i - acc_j: rows gain what columns lose;
        dacc.diagonal(dim1=-2, dim2=-1).zero_()           # not i = j, which would drown the rest in rounding
        dacc = dacc.sum(-1).sub_(dacc.sum(-2))
        return dscores.transpose(-1, -2) @ C, dscores @ B, dacc, mix.transpose(-1, -2) @ g, None


def chunk_length(P, N):
    """Tokens a chunk: (Q, Q) scores a chunk about balance the (P, N) states; a power of two."""
    return 1 << round(math.log2(P * N) / 2)


def _chunked(x, dt, A, B, C, D, docs, initial, chunk, last):
    """The scan in plain torch."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    q = min(chunk or chunk_length(p, n), t)
    pad = -t % q                                              # dt = 0 in the padding: decay 1, nothing added
    if pad:
        x, dt, B, C = (F.pad(z, [0, 0] * (z.dim() - 2) + [0, pad]) for z in (x, dt, B, C))
        docs = (F.pad(docs[:, None].float(), (0, pad), mode="replicate")[:, 0].long()
                if docs is not None else None)
    c = (t + pad) // q

    causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    if docs is None:
        same, alive = causal, None                                                    # (Q, Q)
    else:
        d = docs.view(b, c, q)
        same = (d[..., :, None] == d[..., None, :]) & causal                          # (B, c, Q, Q)
        before = torch.cat([d[:, :1, 0], d[:, :-1, -1]], 1)       # the document whose state enters the chunk
        alive = (d == before[..., None])[:, :, None, :, None]                         # (B, c, 1, Q, 1)

    def heads(z):
        return z.view(b, c, q, *z.shape[2:]).transpose(2, 3)                          # (B, c, heads, Q, ...)

    dt = heads(dt)                                                                    # (B, c, H, Q)
    xd = heads(x) * dt[..., None].to(x.dtype)                                         # (B, c, H, Q, P)
    B, C = heads(B), heads(C)                                                         # (B, c, G, Q, N)
    # decay exponents from the document's start (or the chunk's) to each token: a masked sum, never a plain
    # cumsum
    acc = (dt * A[:, None]) @ same.to(dt.dtype).transpose(-1, -2)                     # (B, c, H, Q)
    same = same.unsqueeze(-3)                                                         # over the heads
    y = _Within.apply(B, C, acc, xd, same)                                            # (B, c, H, Q, P)

    # between chunks: each chunk's own final state, then the running state that enters each chunk
    state = None
    if c > 1 or last or initial is not None:
        rest = (acc[..., -1:] - acc).masked_fill(~same[..., -1, :], -torch.inf).exp()  # (B, c, H, Q)
        own = (xd * rest[..., None].to(x.dtype)).view(b, c, g, h // g, q, p)
        own = (own.transpose(-1, -2) @ B[:, :, :, None]).view(b, c, h, p, n).to(acc.dtype)  # (B, c, H, P, N)
        carry = acc.exp()[..., None]                                                  # (B, c, H, Q, 1)
        if alive is not None:
            carry = carry * alive
        keep = carry[:, :, :, -1, :, None].unbind(1)                                  # (B, H, 1, 1) a chunk
        own = own.unbind(1)                          # unbind, not own[:, i]: its backward fills zeros c times
        state, entering = torch.zeros_like(own[0]) if initial is None else initial.to(acc.dtype), []
        for i in range(c):
            entering.append(state)
            state = state * keep[i] + own[i]
        entering = torch.stack(entering, 1).to(x.dtype).view(b, c, g, h // g, p, n)
        late = C[:, :, :, None] @ entering.transpose(-1, -2)                          # (B, c, G, H/G, Q, P)
        y = y + late.view(b, c, h, q, p) * carry.to(x.dtype)
    y = y.transpose(2, 3).reshape(b, c * q, h, p) + x * D[:, None].to(x.dtype)
    return y[:, :t], state


# -- Triton -------------------------------------------------------------------------------------------------
# The same algebra, Q = 256 tokens a chunk in tiles of 64 (32 in fp32). What is a number a token and head
# lies in (B, H, c Q), so that a tile of it is one contiguous load: dt; acc, the decay's exponent since the
# document's or the chunk's start; carry = exp(acc) where the state that enters the chunk is still alive,
# else 0; rest = exp(acc_last - acc) where the token's document reaches the chunk's end, else 0. With S the
# scores C B^T of a group, E the state that enters the chunk and M_ij = S_ij exp(acc_i - acc_j):
#
#     y_i = sum_j M_ij dt_j x_j + carry_i E C_i + D x_i,
#     next E = sum_j rest_j dt_j x_j (outer) B_j + carry_last E
#
# No atomics: what is summed over heads or tiles is summed by one program, or stored in parts and summed
# after, so the same inputs give the same bits. Only the inputs are kept: backward makes states and scores
# again.

@jit
def _join(f, a, g, b):
    """Sums that begin again at a flag."""
    return f | g, tl.where(g != 0, b, a + b)


@jit
def _document(DOCS, b, t, T):
    """Document ids of tokens t; those of the padding as the last one's."""
    return tl.load(DOCS + b * T + tl.minimum(tl.maximum(t, 0), T - 1))


@jit
def _same(DOCS, b, i, j, T, PACKED: constexpr):
    """Whether token j <= i is of i's document."""
    same = i >= j
    if PACKED:
        same = same & (_document(DOCS, b, i, T) == _document(DOCS, b, j, T))
    return same


@jit
def _tile(X, row, t, k, T, K):
    """(tokens, K) of one head or group, 0 outside."""
    return tl.load(X + t.to(tl.int64)[:, None] * row + k[None, :], (t[:, None] < T) & (k[None, :] < K), 0.0)


@jit
def _decays(DT, A, DOCS, DTT, ACC, CARRY, REST, T, H, padded, Q: constexpr, HEADS: constexpr,
            PACKED: constexpr, WIDE: constexpr):
    h, c, b = tl.program_id(0) * HEADS + tl.arange(0, HEADS), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = c * Q + tl.arange(0, Q)
    there = (t[:, None] < T) & (h[None, :] < H)
    dt = tl.load(DT + (b * T + t[:, None]) * H + h[None, :], there, 0.0).to(WIDE)
    step = dt * tl.load(A + h, h < H, 0.0).to(WIDE)[None, :]
    if PACKED:
        doc = _document(DOCS, b, t, T)
        begins = (doc != _document(DOCS, b, t - 1, T)).to(tl.int32)
        _, acc = tl.associative_scan((tl.broadcast_to(begins[:, None], (Q, HEADS)), step), 0, _join)
    else:
        acc = tl.cumsum(step, 0)
    left = tl.sum(tl.where((t == c * Q + Q - 1)[:, None], acc, 0.0), 0)[None, :] - acc
    carry = tl.exp(acc)
    if PACKED:
        carry = tl.where((doc == _document(DOCS, b, c * Q - 1, T))[:, None], carry, 0.0)
        reaches = (doc == _document(DOCS, b, c * Q + Q - 1, T))[:, None]
        rest = tl.where(reaches, tl.exp(tl.where(reaches, left, 0.0)), 0.0)
    else:
        rest = tl.exp(left)
    at = (b * H + h[None, :]) * padded + t[:, None]
    tl.store(DTT + at, dt, h[None, :] < H)
    tl.store(ACC + at, acc, h[None, :] < H)
    tl.store(CARRY + at, carry, h[None, :] < H)
    tl.store(REST + at, rest, h[None, :] < H)


@jit
def _scores(B, C, S, T, G, N, b_b, b_t, c_b, c_t, Q: constexpr, TILE: constexpr, BN: constexpr,
            WIDE: constexpr, PRECISION: constexpr):
    """S = C B^T of a group and chunk, (Q, Q), the tiles on and below the diagonal."""
    tiles: constexpr = Q // TILE
    g, m, n = tl.program_id(0) // (tiles * tiles), tl.program_id(0) // tiles % tiles, tl.program_id(0) % tiles
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if n <= m:
        k, q = tl.arange(0, BN), tl.arange(0, TILE)
        x = _tile(C + b * c_b + g * N, c_t, c * Q + m * TILE + q, k, T, N)
        y = _tile(B + b * b_b + g * N, b_t, c * Q + n * TILE + q, k, T, N)
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION, out_dtype=WIDE)
        S += ((b * tl.num_programs(1) + c) * G + g) * Q * Q
        tl.store(S + (m * TILE + q)[:, None] * Q + n * TILE + q[None, :], s.to(S.dtype.element_ty))


@jit
def _outer(X, W, V, Y, OUT, T, H, P, N, padded, per_group, x_b, x_t, y_b, y_t, Q: constexpr, TILE: constexpr,
           BP: constexpr, BN: constexpr, TWO: constexpr, WIDE: constexpr, PRECISION: constexpr):
    """A chunk's sum over tokens of w x (outer) y (w v with TWO): (P, N), of every head."""
    h, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    total = tl.zeros((BP, BN), WIDE)
    for start in range(0, Q, TILE):
        t = c * Q + start + tl.arange(0, TILE)
        w = tl.load(W + (b * H + h) * padded + t)
        if TWO:
            w *= tl.load(V + (b * H + h) * padded + t)
        x = _tile(X + b * x_b + h * P, x_t, t, p, T, P)
        y = _tile(Y + b * y_b + h // per_group * N, y_t, t, n, T, N)
        x = (x.to(WIDE) * w[:, None]).to(x.dtype)
        total += tl.dot(tl.trans(x), y, input_precision=PRECISION, out_dtype=WIDE)
    OUT += ((b * tl.num_programs(1) + c) * H + h) * P * N
    tl.store(OUT + p[:, None] * N + n[None, :], total, (p[:, None] < P) & (n[None, :] < N))


@jit
def _pass(OWN, INITIAL, CARRY, ENTERING, LAST, size, chunks, padded, Q: constexpr, BLOCK: constexpr,
          INITIAL_GIVEN: constexpr, WIDE: constexpr):
    """The running state from chunk to chunk; what enters each."""
    i, h, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    state = tl.zeros((BLOCK,), WIDE)
    if INITIAL_GIVEN:
        state = tl.load(INITIAL + (b * H + h) * size + i, i < size, 0.0).to(WIDE)
    for c in range(chunks):
        at = ((b * chunks + c) * H + h) * size + i
        tl.store(ENTERING + at, state.to(ENTERING.dtype.element_ty), i < size)
        keep = tl.load(CARRY + (b * H + h) * padded + c * Q + Q - 1)
        state = tl.load(OWN + at, i < size, 0.0) + keep * state
    tl.store(LAST + (b * H + h) * size + i, state, i < size)


@jit
def _pass_backward(DENTERING, DLAST, CARRY, ENTERING, DSTATE, DKEEP, DINITIAL, size, chunks, padded,
                   Q: constexpr, BLOCK: constexpr, DLAST_GIVEN: constexpr, WIDE: constexpr):
    """The gradients of the states that chunks leave behind, from the last to the first, and of the factors
    between them: DKEEP (B, H, chunks, blocks), in parts."""
    i, h, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    state = tl.zeros((BLOCK,), WIDE)
    if DLAST_GIVEN:
        state = tl.load(DLAST + (b * H + h) * size + i, i < size, 0.0).to(WIDE)
    for j in range(chunks):
        c = chunks - 1 - j
        at = ((b * chunks + c) * H + h) * size + i
        tl.store(DSTATE + at, state.to(DSTATE.dtype.element_ty), i < size)
        entering = tl.load(ENTERING + at, i < size, 0.0).to(WIDE)
        tl.store(DKEEP + ((b * H + h) * chunks + c) * tl.num_programs(0) + tl.program_id(0),
                 tl.sum(state * entering, 0))
        keep = tl.load(CARRY + (b * H + h) * padded + c * Q + Q - 1)
        state = tl.load(DENTERING + at, i < size, 0.0) + keep * state
    tl.store(DINITIAL + (b * H + h) * size + i, state, i < size)


@jit
def _scan(X, DTT, ACC, CARRY, S, C, ENTERING, D, DOCS, Y, T, H, G, P, N, padded, x_b, x_t, c_b, c_t,
          Q: constexpr, TILE: constexpr, BP: constexpr, BN: constexpr, PACKED: constexpr, WIDE: constexpr,
          PRECISION: constexpr):
    """y of a head and tile of tokens."""
    tiles: constexpr = Q // TILE
    h, m, c, b = (tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1),
                  tl.program_id(2).to(tl.int64))
    g, head, chunk = h // (H // G), (b * H + h) * padded, b * tl.num_programs(1) + c
    q, p, n = tl.arange(0, TILE), tl.arange(0, BP), tl.arange(0, BN)
    i = c * Q + m * TILE + q
    acc = tl.load(ACC + head + i)
    entering = tl.load(ENTERING + (chunk * H + h) * P * N + p[None, :] * N + n[:, None],
                       (p[None, :] < P) & (n[:, None] < N), 0.0)
    y = tl.dot(_tile(C + b * c_b + g * N, c_t, i, n, T, N), entering, input_precision=PRECISION,
               out_dtype=WIDE) * tl.load(CARRY + head + i)[:, None]
    X += b * x_b + h * P
    S += (chunk * G + g) * Q * Q
    for k in range(0, m + 1):
        j = c * Q + k * TILE + q
        same = _same(DOCS, b, i[:, None], j[None, :], T, PACKED)
        fall = tl.exp(tl.where(same, acc[:, None] - tl.load(ACC + head + j)[None, :], 0.0))
        s = tl.load(S + (m * TILE + q)[:, None] * Q + k * TILE + q[None, :]).to(WIDE)
        mix = tl.where(same, s * fall * tl.load(DTT + head + j)[None, :], 0.0)
        x = _tile(X, x_t, j, p, T, P)
        y += tl.dot(mix.to(x.dtype), x, input_precision=PRECISION, out_dtype=WIDE)
    y += _tile(X, x_t, i, p, T, P).to(WIDE) * tl.load(D + h).to(WIDE)
    tl.store(Y + (b * T + i[:, None]) * H * P + h * P + p[None, :], y.to(Y.dtype.element_ty),
             (i[:, None] < T) & (p[None, :] < P))


@jit
def _scan_backward(X, DY, DTT, ACC, REST, S, B, DSTATE, D, DOCS, DX, DD, T, H, G, P, N, padded, x_b, x_t, b_b,
                   b_t, Q: constexpr, TILE: constexpr, BP: constexpr, BN: constexpr, PACKED: constexpr,
                   WIDE: constexpr, PRECISION: constexpr):
    """The gradient of x of a head and tile of tokens, and its part of D's: DD (B, chunks, H, tiles)."""
    tiles: constexpr = Q // TILE
    h, m, c, b = (tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1),
                  tl.program_id(2).to(tl.int64))
    g, head, chunk = h // (H // G), (b * H + h) * padded, b * tl.num_programs(1) + c
    q, p, n = tl.arange(0, TILE), tl.arange(0, BP), tl.arange(0, BN)
    j = c * Q + m * TILE + q
    acc = tl.load(ACC + head + j)
    state = tl.load(DSTATE + (chunk * H + h) * P * N + p[None, :] * N + n[:, None],
                    (p[None, :] < P) & (n[:, None] < N), 0.0)
    dx = tl.dot(_tile(B + b * b_b + g * N, b_t, j, n, T, N), state, input_precision=PRECISION,
                out_dtype=WIDE) * tl.load(REST + head + j)[:, None]
    DY += (b * T * H + h) * P
    S += (chunk * G + g) * Q * Q
    for k in range(m, tiles):
        i = c * Q + k * TILE + q
        same = _same(DOCS, b, i[None, :], j[:, None], T, PACKED)
        fall = tl.exp(tl.where(same, tl.load(ACC + head + i)[None, :] - acc[:, None], 0.0))
        s = tl.load(S + (k * TILE + q)[None, :] * Q + m * TILE + q[:, None]).to(WIDE)
        mix = tl.where(same, s * fall, 0.0)
        dy = _tile(DY, H * P, i, p, T, P)
        dx += tl.dot(mix.to(dy.dtype), dy, input_precision=PRECISION, out_dtype=WIDE)
    dy = _tile(DY, H * P, j, p, T, P).to(WIDE)
    x = _tile(X + b * x_b + h * P, x_t, j, p, T, P).to(WIDE)
    dx = dx * tl.load(DTT + head + j)[:, None] + dy * tl.load(D + h).to(WIDE)
    tl.store(DX + (b * T + j[:, None]) * H * P + h * P + p[None, :], dx.to(DX.dtype.element_ty),
             (j[:, None] < T) & (p[None, :] < P))
    tl.store(DD + (chunk * H + h) * tiles + m, tl.sum(tl.sum(dy * x, 1), 0))


@jit
def _scores_backward(X, DY, DTT, ACC, S, DOCS, DS, ROWS, COLUMNS, DIAGONAL, T, H, G, P, padded, parts, x_b,
                     x_t, Q: constexpr, TILE: constexpr, BP: constexpr, HEADS: constexpr, PACKED: constexpr,
                     WIDE: constexpr, PRECISION: constexpr):
    """A tile of the gradient of a group's scores, DS (parts, B, chunks, G, Q, Q), each part of HEADS heads;
    and with f_ij = dy_i . x_j M_ij, of every head, ROWS = sum_j f_ij dt_j and COLUMNS = sum_i f_ij over the
    tile: (tiles, B, H, c Q), by the tile that is summed over. Without i = j, whose decay is 1: where decays
    are strong it would drown the rest in rounding. It is DIAGONAL (B, H, c Q)."""
    tiles: constexpr = Q // TILE
    at = tl.program_id(0)
    g, part = at // (tiles * tiles * parts), at // (tiles * tiles) % parts
    m, k = at // tiles % tiles, at % tiles
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if k <= m:
        q, p = tl.arange(0, TILE), tl.arange(0, BP)
        i, j = c * Q + m * TILE + q, c * Q + k * TILE + q
        same = _same(DOCS, b, i[:, None], j[None, :], T, PACKED)
        square = (m * TILE + q)[:, None] * Q + k * TILE + q[None, :]
        chunk = ((b * tl.num_programs(1) + c) * G + g) * Q * Q
        s = tl.load(S + chunk + square).to(WIDE)
        ds = tl.zeros((TILE, TILE), WIDE)
        side = tl.num_programs(2).to(tl.int64) * H * padded
        per_group = H // G
        first, end = g * per_group + part * HEADS, g * per_group + tl.minimum((part + 1) * HEADS, per_group)
        for h in range(first, end):
            head = (b * H + h) * padded
            dy = _tile(DY + (b * T * H + h) * P, H * P, i, p, T, P)
            x = _tile(X + b * x_b + h * P, x_t, j, p, T, P)
            fall = tl.load(ACC + head + i)[:, None] - tl.load(ACC + head + j)[None, :]
            f = tl.dot(dy, tl.trans(x), input_precision=PRECISION, out_dtype=WIDE)
            f = tl.where(same, f * tl.exp(tl.where(same, fall, 0.0)), 0.0)
            dt = tl.load(DTT + head + j)[None, :]
            ds += f * dt
            f *= s
            if k == m:
                tl.store(DIAGONAL + head + i, tl.sum(tl.where(i[:, None] == j[None, :], f, 0.0), 1))
            f = tl.where(i[:, None] > j[None, :], f, 0.0)
            tl.store(ROWS + k * side + head + i, tl.sum(f * dt, 1))
            tl.store(COLUMNS + m * side + head + j, tl.sum(f, 0))
        DS += part * tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * G * Q * Q
        tl.store(DS + chunk + square, ds.to(DS.dtype.element_ty))


@jit
def _group_backward(X, W, V, STATE, Y, OTHER, DS, DOUT, U, T, H, G, P, N, padded, parts, x_b, x_t, y_b, y_t,
                    o_b, o_t, Q: constexpr, TILE: constexpr, BP: constexpr, BN: constexpr, HEADS: constexpr,
                    OF_B: constexpr, WIDE: constexpr, PRECISION: constexpr):
    """The gradient of C or B, a part of HEADS heads each: DOUT (parts, B, T, G, N). Of C: X = dy, W = carry,
    STATE = entering, Y = C, OTHER = B; of B: X = x, W V = rest dt, STATE = the gradient of what is left
    behind, Y = B, OTHER = C. U (B, H, c Q) = y . (x state), of every head."""
    tiles: constexpr = Q // TILE
    at = tl.program_id(0)
    g, part, m = at // (tiles * parts), at // tiles % parts, at % tiles
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q, p, n = tl.arange(0, TILE), tl.arange(0, BP), tl.arange(0, BN)
    i, chunk = c * Q + m * TILE + q, b * tl.num_programs(1) + c
    y = _tile(Y + b * y_b + g * N, y_t, i, n, T, N).to(WIDE)
    out = tl.zeros((TILE, BN), WIDE)
    per_group = H // G
    for h in range(g * per_group + part * HEADS, g * per_group + tl.minimum((part + 1) * HEADS, per_group)):
        head = (b * H + h) * padded + i
        state = tl.load(STATE + (chunk * H + h) * P * N + p[:, None] * N + n[None, :],
                        (p[:, None] < P) & (n[None, :] < N), 0.0)
        x = _tile(X + b * x_b + h * P, x_t, i, p, T, P)
        z = tl.dot(x, state, input_precision=PRECISION, out_dtype=WIDE)
        w = tl.load(W + head)
        if OF_B:
            w *= tl.load(V + head)
        out += z * w[:, None]
        tl.store(U + head, tl.sum(z * y, 1))
    DS += ((part * tl.num_programs(2).to(tl.int64) * tl.num_programs(1) + chunk) * G + g) * Q * Q
    first, end = 0, m + 1
    if OF_B:
        first, end = m, tiles
    for k in range(first, end):
        other = _tile(OTHER + b * o_b + g * N, o_t, c * Q + k * TILE + q, n, T, N)
        if OF_B:
            ds = tl.load(DS + (k * TILE + q)[None, :] * Q + m * TILE + q[:, None])
        else:
            ds = tl.load(DS + (m * TILE + q)[:, None] * Q + k * TILE + q[None, :])
        out += tl.dot(ds, other, input_precision=PRECISION, out_dtype=WIDE)
    DOUT += part * tl.num_programs(2).to(tl.int64) * T * G * N
    tl.store(DOUT + (b * T + i[:, None]) * G * N + g * N + n[None, :], out,
             (i[:, None] < T) & (n[None, :] < N))


@jit
def _decays_backward(DTT, A, CARRY, REST, UC, UB, ROWS, COLUMNS, DIAGONAL, DKEEP, DOCS, DDT, DA, T, H,
                     padded, blocks, Q: constexpr, TILE: constexpr, HEADS: constexpr, PACKED: constexpr,
                     WIDE: constexpr):
    """Everything that moves an exponent comes together: the gradients of dt and, a chunk each, of A."""
    tiles: constexpr = Q // TILE
    h, c, b = tl.program_id(0) * HEADS + tl.arange(0, HEADS), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, real = tl.arange(0, Q), h[None, :] < H
    at = (b * H + h[None, :]) * padded + c * Q + t[:, None]
    side = tl.num_programs(2).to(tl.int64) * H * padded
    dt, carry = tl.load(DTT + at, real, 0.0), tl.load(CARRY + at, real, 0.0)
    late = tl.load(REST + at, real, 0.0) * tl.load(UB + at, real, 0.0)
    dacc = carry * tl.load(UC + at, real, 0.0) - dt * late       # of the state that enters; of what is left
    direct = late + tl.load(DIAGONAL + at, real, 0.0)
    for k in range(0, tiles):                                    # within the chunk: rows gain, columns lose
        column = tl.load(COLUMNS + k * side + at, real & (t[:, None] < (k + 1) * TILE), 0.0)
        dacc += tl.load(ROWS + k * side + at, real & (t[:, None] >= k * TILE), 0.0) - dt * column
        direct += column
    keep = tl.zeros((HEADS,), WIDE)
    for k in range(0, blocks):
        keep += tl.load(DKEEP + ((b * H + h) * tl.num_programs(1) + c) * blocks + k, h < H, 0.0)
    end = (t == Q - 1)[:, None]
    keep *= tl.sum(tl.where(end, carry, 0.0), 0)
    dacc += tl.where(end, (keep + tl.sum(dt * late, 0))[None, :], 0.0)
    if PACKED:
        ends = (_document(DOCS, b, c * Q + t, T) != _document(DOCS, b, c * Q + t + 1, T)).to(tl.int32)
        _, dstep = tl.associative_scan((tl.broadcast_to(ends[:, None], (Q, HEADS)), dacc), 0, _join,
                                       reverse=True)
    else:
        dstep = tl.cumsum(dacc, 0, reverse=True)
    a = tl.load(A + h, h < H, 0.0).to(WIDE)[None, :]
    tl.store(DDT + (b * T + c * Q + t[:, None]) * H + h[None, :], dstep * a + direct,
             real & (c * Q + t[:, None] < T))
    tl.store(DA + (b * tl.num_programs(1) + c) * H + h, tl.sum(dstep * dt, 0), h < H)


@jit
def _step(STATE, X, DT, A, B, C, D, Y, H, P, N, per_group, x_b, b_b, c_b, BP: constexpr, BN: constexpr):
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    there = (p[:, None] < P) & (n[None, :] < N)
    at = STATE + (b * H + h) * P * N + p[:, None] * N + n[None, :]
    state = tl.load(at, there, 0.0)
    x = tl.load(X + b * x_b + h * P + p, p < P, 0.0).to(state.dtype)
    dt = tl.load(DT + b * H + h).to(state.dtype)
    g = h // per_group * N + n
    state = (state * tl.exp(dt * tl.load(A + h).to(state.dtype))
             + (dt * x)[:, None] * tl.load(B + b * b_b + g, n < N, 0.0).to(state.dtype)[None, :])
    y = tl.sum(state * tl.load(C + b * c_b + g, n < N, 0.0).to(state.dtype)[None, :], 1)
    tl.store(at, state, there)
    y += tl.load(D + h).to(state.dtype) * x
    tl.store(Y + (b * H + h) * P + p, y.to(Y.dtype.element_ty), p < P)


def _packed(z):
    """(B, T, heads, k) with nothing between the heads of a token; tokens may be apart."""
    return z if z.stride(3) == 1 and z.stride(2) == z.shape[3] else z.contiguous()


def _states(x, dt, A, B, C, docs, initial, chunk):
    """What forward and backward share: sizes and block sizes, (B, H, c Q) numbers a token, a group's scores,
    the states (P, N) that enter the chunks and the last one."""
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    q = max(16, triton.next_power_of_2(min(chunk or 256, t)))
    c, tile, of = triton.cdiv(t, q), min(64 if x.itemsize == 2 else 32, q), wide(x.dtype)
    plain = dict(Q=q, WIDE=wide_tl(x.dtype))
    dot = dict(TILE=tile, BP=max(16, triton.next_power_of_2(p)), PRECISION="ieee", **plain)
    per_token = [x.new_empty(b, h, c * q, dtype=of) for _ in range(4)]
    dtt, acc, carry, rest = per_token
    _decays[triton.cdiv(h, 16), c, b](dt, A, docs, *per_token, t, h, c * q, HEADS=16, PACKED=docs is not None,
                                      num_warps=8, **plain)
    scores, BN = x.new_empty(b, c, g, q, q), max(16, triton.next_power_of_2(n))
    _scores[g * (q // tile) ** 2, c, b](B, C, scores, t, g, n, *B.stride()[:2], *C.stride()[:2], TILE=tile,
                                        BN=BN, PRECISION="ieee", num_warps=8, **plain)
    own = x.new_empty(b, c, h, p, n, dtype=of)
    _outer[h, c, b](x, rest, dtt, B, own, t, h, p, n, c * q, h // g, *x.stride()[:2], *B.stride()[:2], BN=BN,
                    TWO=True, **dot)
    entering, last = x.new_empty(b, c, h, p, n), x.new_empty(b, h, p, n, dtype=of)
    block = min(1024, triton.next_power_of_2(p * n))
    _pass[triton.cdiv(p * n, block), h, b](own, initial, carry, entering, last, p * n, c, c * q, BLOCK=block,
                                           INITIAL_GIVEN=initial is not None, **plain)
    return SimpleNamespace(b=b, t=t, h=h, p=p, g=g, n=n, c=c, padded=c * q, tiles=q // tile, BN=BN,
                           block=block, packed=docs is not None, of=of, plain=plain, dot=dot, dtt=dtt,
                           acc=acc, carry=carry, rest=rest, scores=scores, entering=entering, last=last)


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, docs, initial, chunk):
        x, B, C, (dt, A, D) = _packed(x), _packed(B), _packed(C), (z.contiguous() for z in (dt, A, D))
        docs, initial = (None if z is None else z.contiguous() for z in (docs, initial))
        ctx.save_for_backward(x, dt, A, B, C, D, docs, initial)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        f = _states(x, dt, A, B, C, docs, initial, chunk)
        y = x.new_empty(f.b, f.t, f.h, f.p)
        _scan[f.h * f.tiles, f.c, f.b](x, f.dtt, f.acc, f.carry, f.scores, C, f.entering, D, docs, y, f.t,
                                       f.h, f.g, f.p, f.n, f.padded, *x.stride()[:2], *C.stride()[:2],
                                       BN=f.BN, PACKED=f.packed, **f.dot)
        return y, f.last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, docs, initial = ctx.saved_tensors
        f = _states(x, dt, A, B, C, docs, initial, ctx.chunk)
        b, t, h, p, g, n, c, padded, tiles = f.b, f.t, f.h, f.p, f.g, f.n, f.c, f.padded, f.tiles
        dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if dy is None else dy.contiguous()
        xs, dys, bs, cs = (z.stride()[:2] for z in (x, dy, B, C))

        def empty(*shape, dtype=f.of):
            return x.new_empty(shape, dtype=dtype)

        # the states, from the last to the first: each is read by its chunk's tokens and passed on
        dentering, dstate, dinitial = empty(b, c, h, p, n), torch.empty_like(f.entering), empty(b, h, p, n)
        _outer[h, c, b](dy, f.carry, None, C, dentering, t, h, p, n, padded, h // g, *dys, *cs, BN=f.BN,
                        TWO=False, **f.dot)
        blocks = triton.cdiv(p * n, f.block)
        dkeep = empty(b, h, c, blocks)
        _pass_backward[blocks, h, b](dentering, None if dlast is None else dlast.contiguous(), f.carry,
                                     f.entering, dstate, dkeep, dinitial, p * n, c, padded, BLOCK=f.block,
                                     DLAST_GIVEN=dlast is not None, **f.plain)
        # x and D
        dx, dD = empty(b, t, h, p, dtype=x.dtype), empty(b, c, h, tiles)
        _scan_backward[h * tiles, c, b](x, dy, f.dtt, f.acc, f.rest, f.scores, B, dstate, D, docs, dx, dD,
                                        t, h, g, p, n, padded, *xs, *bs, BN=f.BN, PACKED=f.packed, **f.dot)
        # B and C, by way of the scores and of the states; 16 heads a program, or one group would be too few
        heads = min(16, h // g)
        parts = triton.cdiv(h // g, heads)
        how = dict(HEADS=heads, num_warps=8 if x.itemsize == 2 else 16, **f.dot)
        dscores, (rows, columns) = empty(parts, *f.scores.shape, dtype=x.dtype), empty(2, tiles, b, h, padded)
        diagonal = empty(b, h, padded)
        _scores_backward[g * parts * tiles ** 2, c, b](
            x, dy, f.dtt, f.acc, f.scores, docs, dscores, rows, columns, diagonal, t, h, g, p, padded, parts,
            *xs, PACKED=f.packed, **how)
        (dB, dC), (uB, uC) = empty(2, parts, b, t, g, n), empty(2, b, h, padded)
        _group_backward[g * parts * tiles, c, b](
            dy, f.carry, None, f.entering, C, B, dscores, dC, uC, t, h, g, p, n, padded, parts, *dys, *cs,
            *bs, BN=f.BN, OF_B=False, **how)
        _group_backward[g * parts * tiles, c, b](
            x, f.rest, f.dtt, dstate, B, C, dscores, dB, uB, t, h, g, p, n, padded, parts, *xs, *bs,
            *cs, BN=f.BN, OF_B=True, **how)
        # the decays
        ddt, dA = torch.empty_like(dt), empty(b, c, h)
        _decays_backward[triton.cdiv(h, 8), c, b](
            f.dtt, A, f.carry, f.rest, uC, uB, rows, columns, diagonal, dkeep, docs, ddt, dA, t, h, padded,
            blocks, TILE=f.dot["TILE"], HEADS=8, PACKED=f.packed, num_warps=8, **f.plain)
        return (dx, ddt, dA.sum((0, 1)).to(A.dtype), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype),
                dD.sum((0, 1, 3)).to(D.dtype), None,
                None if initial is None else dinitial.to(initial.dtype), None)


def _triton_step(state, x, dt, A, B, C, D):
    (b, h, p, n), y = state.shape, torch.empty_like(x, memory_format=torch.contiguous_format)
    x, B, C = (z if z.stride(2) == 1 and z.stride(1) == z.shape[2] else z.contiguous() for z in (x, B, C))
    _step[h, b](state, x, dt.contiguous(), A, B, C, D, y, h, p, n, h // B.shape[1], x.stride(0), B.stride(0),
                C.stride(0), BP=triton.next_power_of_2(p), BN=triton.next_power_of_2(n), num_warps=8)
    return y


# -- in use --------------------------------------------------------------------------------------------------

def step(state, x, dt, A, B, C, D):
    """One token a row, for generation. state (B, H, P, N) fp32, updated in place; x (B, H, P); dt (B, H)
    fp32; A, D (H) fp32; B, C (B, G, N). Returns y (B, H, P) in x's dtype."""
    if on_triton(x):
        return _triton_step(state, x, dt, A, B, C, D)
    b, h, p, n = state.shape
    wide = x.to(state.dtype)
    B, C = (z.to(state.dtype).repeat_interleave(h // z.shape[1], 1).view(b * h, 1, n) for z in (B, C))
    flat = state.view(b * h, p, n)
    flat.mul_(torch.exp(dt * A).view(b * h, 1, 1))
    flat.baddbmm_((wide * dt[..., None]).view(b * h, p, 1), B)
    y = torch.bmm(flat, C.transpose(1, 2)).view(b, h, p)
    return y.addcmul_(wide, D[:, None]).to(x.dtype)


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
