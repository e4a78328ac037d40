"""The kernels: softmax attention between two matrices over the heads, forward and backward.

For one batch item, with A = `before` and C = `after`, each optional:

    x_h = scale · q_h·k_h,   y = A x,   p_h = softmax(y_h),   w = C p,   out_h = sum_j w_hj v_hj

A program holds a tile of M query rows by N keys of all heads at once, and walks along the keys (or, for the
gradients of keys and values, along the queries). A mix needs the denominators of all heads before any weight
is final, so the log-sum-exp is a pass of its own. Backward computes the tiles again:

    dw_h = dout_h·v_h,   dp = Cᵀ dw,   delta_h = sum_j p_h dp_h,   dy = p (dp - delta),   dx = Aᵀ dy

    dA = sum dy xᵀ,   dC = sum dw pᵀ,   dq = scale · dx k,   dk = scale · dxᵀ q,   dv = wᵀ dout

Nobody adds to another program's memory: the gradients of the matrices are partial sums, one a program, so
that every number is the same from run to run.

Layout of a tile: `(GP, RP·M, N)`. Axis 0 are the key/value heads, axis 1 the query heads that share one, each
with M rows; both numbers of heads are padded to powers of two (GP, RP). For a mix it is read as `(HX, ·)`. A
product of matrices wants an inner size of 16: with fewer heads a head's pairs are split into F = HX / (GP·RP)
rows, and the matrix is A ⊗ 1_F. No pair is padded for it.

The columns of q, k, v and dout are read DB at a time, in a loop that the compiler keeps as one: whole rows of
all heads, held over the walk, do not fit into a multiprocessor's shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["delta_kernel", "keys_kernel", "lse_kernel", "out_kernel", "queries_kernel", "values_kernel"]


@triton.jit
def _place(m0, L, G: tl.constexpr, REP: tl.constexpr, GP: tl.constexpr, RP: tl.constexpr, M: tl.constexpr):
    """Of M rows from m0 on: index into (H·L) and whether it exists `(GP, RP·M)`; row numbers `(RP·M,)`."""
    g = tl.arange(0, GP)[:, None]
    p = tl.arange(0, RP * M)
    row = m0 + p % M
    index = (g * REP + (p // M)[None, :]).to(tl.int64) * L + row[None, :]
    return index, (g < G) & ((p // M < REP) & (row < L))[None, :], row


@triton.jit
def _keys(n0, S, padding, PADDED: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, N: tl.constexpr):
    """Of N keys from n0 on: index into (G·S) and whether to read it `(GP, N)`; positions, reality `(N,)`."""
    g = tl.arange(0, GP)[:, None]
    j = n0 + tl.arange(0, N)
    real = j < S
    if PADDED:
        real = real & (tl.load(padding + j, mask=real, other=0) != 0)
    return g.to(tl.int64) * S + j[None, :], (g < G) & real[None, :], j, real


@triton.jit
def _matrix(
    pointer,
    TRANSPOSED: tl.constexpr,
    G: tl.constexpr,
    REP: tl.constexpr,
    GP: tl.constexpr,
    RP: tl.constexpr,
    HX: tl.constexpr,
):
    """The matrix over the heads (or its transpose) ⊗ 1_F, zero at padded heads, `(HX, HX)`."""
    F: tl.constexpr = HX // (GP * RP)
    a = tl.arange(0, HX)[:, None]
    b = tl.arange(0, HX)[None, :]
    to, source = a // F, b // F
    there = (to // RP < G) & (to % RP < REP) & (source // RP < G) & (source % RP < REP) & (a % F == b % F)
    to, source = to // RP * REP + to % RP, source // RP * REP + source % RP
    at = source * (G * REP) + to if TRANSPOSED else to * (G * REP) + source
    return tl.load(pointer + at, mask=there, other=0.0)


@triton.jit
def _mix(x, matrix, HX: tl.constexpr, MIX: tl.constexpr):
    """The tile with its heads mixed."""
    size: tl.constexpr = x.shape[0] * x.shape[1] * x.shape[2]
    flat = tl.reshape(x, (HX, size // HX))
    return tl.reshape(tl.dot(matrix, flat, input_precision=MIX), x.shape)


@triton.jit
def _outer(total, a, b, HX: tl.constexpr, MIX: tl.constexpr):
    """total + sum over pairs a bᵀ, the gradient of a matrix ⊗ 1_F, in SPLIT parts `(SPLIT, HX, HX)`."""
    SPLIT: tl.constexpr = total.shape[0]
    size: tl.constexpr = a.shape[0] * a.shape[1] * a.shape[2]
    a = tl.permute(tl.reshape(a, (HX, SPLIT, size // (HX * SPLIT))), (1, 0, 2))
    b = tl.permute(tl.reshape(b, (HX, SPLIT, size // (HX * SPLIT))), (1, 2, 0))
    return tl.dot(a, b, total, input_precision=MIX)


@triton.jit
def _put_share(shares, total, HX: tl.constexpr):
    """Leave the share of a matrix's gradient; programs for other columns of these rows have the same one."""
    place = tl.arange(0, HX)[:, None] * HX + tl.arange(0, HX)[None, :]
    mine = (place >= 0) & (tl.program_id(1) == 0)
    tl.store(shares + tl.program_id(0).to(tl.int64) * (HX * HX) + place, tl.sum(total, 0), mask=mine)


@triton.jit
def _dot(a, b, total, DOT: tl.constexpr, WIDE: tl.constexpr):
    """total + a b, batched. WIDE is for Triton's interpreter, which cannot multiply bfloat16."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=DOT)


@triton.jit
def _product(
    rows, index, live, columns, at, seen,
    W: tl.constexpr, DB: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Products of a tile's rows and keys, `(GP, RP·M, N)`, DB of the W columns at a time."""
    total = tl.zeros((index.shape[0], index.shape[1], at.shape[1]), tl.float32)
    for start in range(0, W, DB):
        d = start + tl.arange(0, DB)
        inside = d < W
        a = tl.load(
            rows + index[:, :, None] * W + d[None, None, :],
            mask=live[:, :, None] & inside[None, None, :],
            other=0.0,
        )
        b = tl.load(
            columns + at[:, None, :] * W + d[None, :, None],
            mask=seen[:, None, :] & inside[None, :, None],
            other=0.0,
        )
        total = _dot(a, b, total, DOT, WIDE)
    return total


@triton.jit
def _read(pointer, index, live, start, W: tl.constexpr, DC: tl.constexpr):
    """Columns start..start+DC-1 of some rows, `(GP, ·, DC)`."""
    d = start + tl.arange(0, DC)
    mask = live[:, :, None] & (d < W)[None, None, :]
    return tl.load(pointer + index[:, :, None] * W + d[None, None, :], mask=mask, other=0.0)


@triton.jit
def _write(pointer, index, live, start, numbers, W: tl.constexpr, DC: tl.constexpr):
    """Put columns start..start+DC-1 of some rows, in the dtype of the memory."""
    d = start + tl.arange(0, DC)
    mask = live[:, :, None] & (d < W)[None, None, :]
    tl.store(
        pointer + index[:, :, None] * W + d[None, None, :], numbers.to(pointer.dtype.element_ty), mask=mask
    )


@triton.jit
def _hidden(y, live, i, j, real, left, right):
    """The logits with -inf where the mask, the padding or the end of the call hides a pair."""
    near = (j[None, :] >= i[:, None] - left) & (j[None, :] <= i[:, None] + right) & real[None, :]
    return tl.where(live[:, :, None] & near[None, :, :], y, float("-inf"))


@triton.jit
def _weigh(y, lse):
    """exp(y - lse); a row that sees nothing has lse -inf and gives zeros."""
    return tl.exp(y - tl.where(lse == float("-inf"), 0.0, lse)[:, :, None])


@triton.jit
def _visible_keys(m0, L, S, left, right, M: tl.constexpr, N: tl.constexpr):
    """First and last tile edge of the keys that the rows m0..m0+M-1 may see."""
    first = m0 + S - L
    last = tl.minimum(m0 + M, L) - 1 + S - L
    return tl.maximum(first - left, 0) // N * N, tl.minimum(last + right + 1, S)


@triton.jit
def _seeing_rows(n0, L, S, left, right, M: tl.constexpr, N: tl.constexpr):
    """First and last tile edge of the rows that may see some of the keys n0..n0+N-1."""
    first = n0 + L - S
    last = tl.minimum(n0 + N, S) - 1 + L - S
    return tl.maximum(first - right, 0) // M * M, tl.minimum(last + left + 1, L)


@triton.jit
def lse_kernel(
    q, k, before, padding, lse, L, S, left, right, scale,
    D: tl.constexpr, BEFORE: tl.constexpr, PADDED: tl.constexpr, G: tl.constexpr, REP: tl.constexpr,
    GP: tl.constexpr, RP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HX: tl.constexpr,
    DB: tl.constexpr, DOT: tl.constexpr, MIX: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of the mixed logits, `(B, H, L)`: one program for M rows."""
    blocks = tl.cdiv(L, M)
    b, m0 = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * M
    q += b * (G * REP * L * D)
    k += b * (G * S * D)
    padding += b * S
    index, live, row = _place(m0, L, G, REP, GP, RP, M)
    if BEFORE:
        a = _matrix(before, False, G, REP, GP, RP, HX)
    top = tl.full((GP, RP * M), float("-inf"), tl.float32)
    total = tl.zeros((GP, RP * M), tl.float32)
    lo, hi = _visible_keys(m0, L, S, left, right, M, N)
    for n0 in range(lo, hi, N):
        at, seen, j, real = _keys(n0, S, padding, PADDED, G, GP, N)
        y = _product(q, index, live, k, at, seen, D, DB, DOT, WIDE) * scale
        if BEFORE:
            y = _mix(y, a, HX, MIX)
        y = _hidden(y, live, row + S - L, j, real, left, right)
        higher = tl.maximum(top, tl.max(y, 2))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(y - base[:, :, None]), 2)
        top = higher
    found = tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(lse + b * (G * REP * L) + index, found, mask=live)


@triton.jit
def out_kernel(
    q, k, v, before, after, padding, lse, out, L, S, left, right, scale,
    D: tl.constexpr, DV: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, PADDED: tl.constexpr,
    G: tl.constexpr, REP: tl.constexpr, GP: tl.constexpr, RP: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, HX: tl.constexpr, DB: tl.constexpr, DC: tl.constexpr, DOT: tl.constexpr,
    MIX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The output: one program for M rows and DC of its columns."""
    blocks = tl.cdiv(L, M)
    b, m0 = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * M
    start = tl.program_id(1) * DC
    q += b * (G * REP * L * D)
    k += b * (G * S * D)
    v += b * (G * S * DV)
    padding += b * S
    index, live, row = _place(m0, L, G, REP, GP, RP, M)
    sums = tl.load(lse + b * (G * REP * L) + index, mask=live, other=0.0)
    if BEFORE:
        a = _matrix(before, False, G, REP, GP, RP, HX)
    if AFTER:
        c = _matrix(after, False, G, REP, GP, RP, HX)
    total = tl.zeros((GP, RP * M, DC), tl.float32)
    lo, hi = _visible_keys(m0, L, S, left, right, M, N)
    for n0 in range(lo, hi, N):
        at, seen, j, real = _keys(n0, S, padding, PADDED, G, GP, N)
        y = _product(q, index, live, k, at, seen, D, DB, DOT, WIDE) * scale
        if BEFORE:
            y = _mix(y, a, HX, MIX)
        w = _weigh(_hidden(y, live, row + S - L, j, real, left, right), sums)
        if AFTER:
            w = _mix(w, c, HX, MIX)
        values = _read(v, at, seen, start, DV, DC)
        total = _dot(w.to(values.dtype), values, total, DOT, WIDE)
    _write(out + b * (G * REP * L * DV), index, live, start, total, DV, DC)


@triton.jit
def delta_kernel(
    q, k, v, before, after, padding, lse, dout, delta, dafter, L, S, left, right, scale,
    D: tl.constexpr, DV: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, PADDED: tl.constexpr,
    G: tl.constexpr, REP: tl.constexpr, GP: tl.constexpr, RP: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, HX: tl.constexpr, SPLIT: tl.constexpr, DB: tl.constexpr, DOT: tl.constexpr,
    MIX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """delta `(B, H, L)` and this program's share of dC: one program for M rows."""
    blocks = tl.cdiv(L, M)
    b, m0 = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * M
    q += b * (G * REP * L * D)
    k += b * (G * S * D)
    v += b * (G * S * DV)
    dout += b * (G * REP * L * DV)
    padding += b * S
    index, live, row = _place(m0, L, G, REP, GP, RP, M)
    sums = tl.load(lse + b * (G * REP * L) + index, mask=live, other=0.0)
    if BEFORE:
        a = _matrix(before, False, G, REP, GP, RP, HX)
    if AFTER:
        back = _matrix(after, True, G, REP, GP, RP, HX)
        dc = tl.zeros((SPLIT, HX, HX), tl.float32)
    found = tl.zeros((GP, RP * M), tl.float32)
    lo, hi = _visible_keys(m0, L, S, left, right, M, N)
    for n0 in range(lo, hi, N):
        at, seen, j, real = _keys(n0, S, padding, PADDED, G, GP, N)
        y = _product(q, index, live, k, at, seen, D, DB, DOT, WIDE) * scale
        if BEFORE:
            y = _mix(y, a, HX, MIX)
        p = _weigh(_hidden(y, live, row + S - L, j, real, left, right), sums)
        dp = _product(dout, index, live, v, at, seen, DV, DB, DOT, WIDE)
        if AFTER:
            dc = _outer(dc, dp, p, HX, MIX)
            dp = _mix(dp, back, HX, MIX)
        found += tl.sum(p * dp, 2)
    tl.store(delta + b * (G * REP * L) + index, found, mask=live)
    if AFTER:
        _put_share(dafter, dc, HX)


@triton.jit
def queries_kernel(
    q, k, v, before, after, padding, lse, dout, delta, dq, dbefore, L, S, left, right, scale,
    D: tl.constexpr, DV: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, PADDED: tl.constexpr,
    G: tl.constexpr, REP: tl.constexpr, GP: tl.constexpr, RP: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, HX: tl.constexpr, SPLIT: tl.constexpr, DB: tl.constexpr, DC: tl.constexpr,
    DOT: tl.constexpr, MIX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """DC columns of dq and this program's share of dA: one program for M rows."""
    blocks = tl.cdiv(L, M)
    b, m0 = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * M
    start = tl.program_id(1) * DC
    q += b * (G * REP * L * D)
    k += b * (G * S * D)
    v += b * (G * S * DV)
    dout += b * (G * REP * L * DV)
    padding += b * S
    index, live, row = _place(m0, L, G, REP, GP, RP, M)
    sums = tl.load(lse + b * (G * REP * L) + index, mask=live, other=0.0)
    less = tl.load(delta + b * (G * REP * L) + index, mask=live, other=0.0)
    if BEFORE:
        a = _matrix(before, False, G, REP, GP, RP, HX)
        there = _matrix(before, True, G, REP, GP, RP, HX)
        da = tl.zeros((SPLIT, HX, HX), tl.float32)
    if AFTER:
        back = _matrix(after, True, G, REP, GP, RP, HX)
    total = tl.zeros((GP, RP * M, DC), tl.float32)
    lo, hi = _visible_keys(m0, L, S, left, right, M, N)
    for n0 in range(lo, hi, N):
        at, seen, j, real = _keys(n0, S, padding, PADDED, G, GP, N)
        x = _product(q, index, live, k, at, seen, D, DB, DOT, WIDE) * scale
        y = x
        if BEFORE:
            y = _mix(x, a, HX, MIX)
        p = _weigh(_hidden(y, live, row + S - L, j, real, left, right), sums)
        dp = _product(dout, index, live, v, at, seen, DV, DB, DOT, WIDE)
        if AFTER:
            dp = _mix(dp, back, HX, MIX)
        dx = p * (dp - less[:, :, None])
        if BEFORE:
            da = _outer(da, dx, x, HX, MIX)
            dx = _mix(dx, there, HX, MIX)
        keys = _read(k, at, seen, start, D, DC)
        total = _dot(dx.to(keys.dtype), keys, total, DOT, WIDE)
    _write(dq + b * (G * REP * L * D), index, live, start, total * scale, D, DC)
    if BEFORE:
        _put_share(dbefore, da, HX)


@triton.jit
def keys_kernel(
    q, k, v, before, after, padding, lse, dout, delta, dk, L, S, left, right, scale,
    D: tl.constexpr, DV: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, PADDED: tl.constexpr,
    G: tl.constexpr, REP: tl.constexpr, GP: tl.constexpr, RP: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, HX: tl.constexpr, DB: tl.constexpr, DC: tl.constexpr, DOT: tl.constexpr,
    MIX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """DC columns of dk: one program for N keys."""
    blocks = tl.cdiv(S, N)
    b, n0 = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * N
    start = tl.program_id(1) * DC
    q += b * (G * REP * L * D)
    k += b * (G * S * D)
    v += b * (G * S * DV)
    dout += b * (G * REP * L * DV)
    lse += b * (G * REP * L)
    delta += b * (G * REP * L)
    at, seen, j, real = _keys(n0, S, padding + b * S, PADDED, G, GP, N)
    if BEFORE:
        a = _matrix(before, False, G, REP, GP, RP, HX)
        there = _matrix(before, True, G, REP, GP, RP, HX)
    if AFTER:
        back = _matrix(after, True, G, REP, GP, RP, HX)
    total = tl.zeros((GP, N, DC), tl.float32)
    lo, hi = _seeing_rows(n0, L, S, left, right, M, N)
    for m0 in range(lo, hi, M):
        index, live, row = _place(m0, L, G, REP, GP, RP, M)
        y = _product(q, index, live, k, at, seen, D, DB, DOT, WIDE) * scale
        if BEFORE:
            y = _mix(y, a, HX, MIX)
        sums = tl.load(lse + index, mask=live, other=0.0)
        p = _weigh(_hidden(y, live, row + S - L, j, real, left, right), sums)
        dp = _product(dout, index, live, v, at, seen, DV, DB, DOT, WIDE)
        if AFTER:
            dp = _mix(dp, back, HX, MIX)
        less = tl.load(delta + index, mask=live, other=0.0)
        dx = p * (dp - less[:, :, None])
        if BEFORE:
            dx = _mix(dx, there, HX, MIX)
        rows = _read(q, index, live, start, D, DC)
        total = _dot(tl.permute(dx.to(rows.dtype), (0, 2, 1)), rows, total, DOT, WIDE)
    _write(dk + b * (G * S * D), at, seen, start, total * scale, D, DC)


@triton.jit
def values_kernel(
    q, k, before, after, padding, lse, dout, dv, L, S, left, right, scale,
    D: tl.constexpr, DV: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, PADDED: tl.constexpr,
    G: tl.constexpr, REP: tl.constexpr, GP: tl.constexpr, RP: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, HX: tl.constexpr, DB: tl.constexpr, DC: tl.constexpr, DOT: tl.constexpr,
    MIX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """DC columns of dv: one program for N keys."""
    blocks = tl.cdiv(S, N)
    b, n0 = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * N
    start = tl.program_id(1) * DC
    q += b * (G * REP * L * D)
    k += b * (G * S * D)
    dout += b * (G * REP * L * DV)
    lse += b * (G * REP * L)
    at, seen, j, real = _keys(n0, S, padding + b * S, PADDED, G, GP, N)
    if BEFORE:
        a = _matrix(before, False, G, REP, GP, RP, HX)
    if AFTER:
        c = _matrix(after, False, G, REP, GP, RP, HX)
    total = tl.zeros((GP, N, DC), tl.float32)
    lo, hi = _seeing_rows(n0, L, S, left, right, M, N)
    for m0 in range(lo, hi, M):
        index, live, row = _place(m0, L, G, REP, GP, RP, M)
        y = _product(q, index, live, k, at, seen, D, DB, DOT, WIDE) * scale
        if BEFORE:
            y = _mix(y, a, HX, MIX)
        sums = tl.load(lse + index, mask=live, other=0.0)
        w = _weigh(_hidden(y, live, row + S - L, j, real, left, right), sums)
        if AFTER:
            w = _mix(w, c, HX, MIX)
        up = _read(dout, index, live, start, DV, DC)
        total = _dot(tl.permute(w.to(up.dtype), (0, 2, 1)), up, total, DOT, WIDE)
    _write(dv + b * (G * S * DV), at, seen, start, total, DV, DC)
