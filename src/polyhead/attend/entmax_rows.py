"""α-entmax of rows in place, by a monotone Newton iteration instead of a sort.

For a row z of scores and 1 < α ≤ 2, with x = (α - 1) z and p = 1 / (α - 1): w_i = (x_i - τ)_+^p, where τ
makes the row sum to 1.

How τ is found: f(τ) = ||(x - τ)_+||_p - 1 is the norm of a convex function, hence convex, and it falls.
Newton's method started left of its root stays left of it, so every step only shrinks what is left,
y = (x - τ)_+, in place. Convexity gives f₂ / f₁ + s₂ / s₁ ≤ 1 for values f and slopes s before and after a
step, so f s falls to a quarter or below: from f s ≤ n² to rounding, whatever the row, in at most
log₂ n + log₄ (1 / eps) steps; in practice in three to five. The root for a part of the columns lies left of
the root for all, so the iteration starts from the maxima of strided groups of columns: a fraction of the
row that holds most of its support.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["entmax_", "entmax_alpha_vjp", "entmax_vjp_"]

_CHUNK = 1 << 21  # elements worked on at a time, so that a CPU finds them in its cache again
_GROUPS = 64  # groups of columns whose maxima give the start


def _chunks(rows: Tensor, alpha: float | Tensor, *more: Tensor) -> Iterator[tuple[Any, ...]]:
    """Rows, alpha and further row-wise tensors in pieces that fit a CPU's cache; else in one piece."""
    if rows.device.type != "cpu" or rows.numel() <= _CHUNK or torch.compiler.is_compiling():
        yield rows, alpha, *more
        return
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        yield rows[piece], alpha[piece] if isinstance(alpha, Tensor) else alpha, *(m[piece] for m in more)


def _sum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def _power(y: Tensor, exponent: float | Tensor, out: Tensor) -> Tensor:
    """y^exponent for y ≥ 0, also 0^0 = 0, so that it counts the support.

    Nearly twice as fast as `torch.pow`, and as exact where it matters: a relative error of
    eps |log₂ y^exponent| is one of eps or less of the largest power in the row.
    """
    if not isinstance(exponent, Tensor) and exponent in (1.0, 2.0, 3.0):
        return torch.pow(y, exponent, out=out)
    tiny = torch.finfo(y.dtype).tiny
    torch.clamp_min(y, tiny, out=out).log2_()
    # zeros, whose logarithms are slow, end far below all others, even times an exponent of almost 0
    torch.threshold_(out, math.log2(tiny) + 0.5, -1e35)
    exponent = exponent.clamp_min(1e-30) if isinstance(exponent, Tensor) else exponent
    return out.mul_(exponent).exp2_()


def _plain(p: float | Tensor) -> bool:
    """Whether alpha is 2 or 1.5 for all rows, where no power is needed."""
    return not isinstance(p, Tensor) and p in (1.0, 2.0)


def _measure(y: Tensor, p: float | Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """The p-norm of each row of y ≥ 0, and how far one unit of it moves τ: the inverse of its slope.

    Leaves y^p in `scratch` unless p is 1 or 2.
    """
    tiny = torch.finfo(y.dtype).tiny
    if _plain(p) and p == 1.0:
        count = torch.sign(y, out=scratch).sum(-1, keepdim=True)
        return _sum(y), count.clamp_min_(1.0).reciprocal_()
    if _plain(p):
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        return norm, norm / _sum(y).clamp_min_(tiny)
    _power(y, p - 1.0, scratch)
    slope = _sum(scratch).clamp_min_(tiny)
    total = scratch.mul_(y).sum(-1, keepdim=True)
    norm = total.pow(1.0 / p)
    return norm, total.div_(norm.clamp_min(tiny)).div_(slope)


def _start(x: Tensor, p: float | Tensor, goal: float) -> Tensor:
    """A lower bound of each row's τ, (R, 1): x has its maxima at 0."""
    tau = x.new_full((len(x), 1), -goal)
    columns = x.shape[1]
    groups = max(_GROUPS, columns // 16)
    if columns < 8 * groups:
        return tau
    whole = columns // groups * groups
    # strided, because neighbours tend to be in the support together
    y = x[:, :whole].view(len(x), -1, groups).amax(1)
    if whole < columns:
        y = torch.cat([y, x[:, whole:]], dim=1)
    y.sub_(tau).relu_()
    scratch = torch.empty_like(y)
    for _ in range(3):
        norm, gain = _measure(y, p, scratch)
        step = norm.sub_(goal).mul_(gain).clamp_min_(0.0)
        tau.add_(step)
        y.sub_(step).relu_()
    return tau


def entmax_(rows: Tensor, alpha: float | Tensor) -> Tensor:
    """α-entmax of every row of `(R, n)`, in place; -inf gives 0, and a row of only -inf gives zeros.

    Args:
        rows: contiguous, float32 or float64; overwritten with the weights.
        alpha: a number, or `(R, 1)` for one a row.
    """
    if rows.numel() == 0:
        return rows
    tiny, tolerance = torch.finfo(rows.dtype).tiny, 4 * torch.finfo(rows.dtype).eps
    steps = math.ceil(math.log2(rows.shape[1]) - math.log2(tolerance) / 2) + 2
    scratch = None
    for y, a in _chunks(rows, alpha):
        p = 1.0 / (a - 1.0)
        # norms are homogeneous: to aim at p instead of 1 spares y the multiplication by alpha - 1 = 1 / p
        plain = _plain(p)
        goal = p if plain else 1.0
        top = y.amax(-1, keepdim=True)
        y.sub_(top.masked_fill_(top == -torch.inf, 0.0))
        if not plain:
            y.mul_(a - 1.0)
        y.sub_(_start(y, p, goal)).relu_()
        scratch = torch.empty_like(y) if scratch is None else scratch[: len(y)]
        for _ in range(steps):
            norm, gain = _measure(y, p, scratch)
            excess = norm - goal
            # a compiled graph has no exit: it takes all the steps
            if not torch.compiler.is_compiling() and not bool((excess > tolerance * goal).any()):
                break
            # in a row that is done the step is rounding, and must not bring anything back
            y.sub_(excess.mul_(gain).clamp_min_(0.0)).relu_()
        if plain:
            y.div_(norm.clamp_min_(tiny))
            if p == 2.0:
                y.square_()
        else:
            torch.div(scratch, _sum(scratch).clamp_min_(tiny), out=y)
    return rows


def entmax_vjp_(weights: Tensor, grad: Tensor, alpha: float | Tensor) -> Tensor:
    """The gradient for the scores from the weights `(R, n)` and their gradient, which it overwrites.

    With s_i = w_i^(2 - α) on the support and 0 elsewhere: dz = s (g - sum(s g) / sum(s)).
    """
    if weights.numel() == 0:
        return grad
    tiny = torch.finfo(weights.dtype).tiny
    scratch = None
    for w, a, g in _chunks(weights, alpha, grad):
        scratch = w.new_empty(2, *w.shape) if scratch is None else scratch[:, : len(w)]
        s, sg = scratch
        if not isinstance(a, Tensor) and a == 2.0:
            torch.sign(w, out=s)
        elif not isinstance(a, Tensor) and a == 1.5:
            torch.clamp_min(w, tiny, out=s).rsqrt_().mul_(w)  # a square root, much faster on zeros
        else:
            _power(w, 2.0 - a, s)
        inner = torch.mul(s, g, out=sg).sum(-1, keepdim=True)
        g.sub_(inner.div_(_sum(s).clamp_min_(tiny))).mul_(s)
    return grad


def entmax_alpha_vjp(weights: Tensor, grad: Tensor, alpha: float | Tensor) -> Tensor:
    """The gradient `(R, 1)` for each row's alpha, from the weights `(R, n)` and their gradient.

    With s as in `entmax_vjp_`, t = s / sum(s), h_i = -w_i log w_i and a = α - 1, the published form is
    dw/dα = (w - t) / a² + (h - t sum(h)) / a. Here s = w (1 + m) with m = w^-a - 1 by expm1, so that
    w - t does not cancel as α nears 1.
    """
    out = weights.new_zeros(len(weights), 1)
    if weights.numel() == 0:
        return out
    scratch = None
    for w, alpha_, g, o in _chunks(weights, alpha, grad, out):
        a = alpha_ - 1.0
        scratch = w.new_empty(2, *w.shape) if scratch is None else scratch[:, : len(w)]
        log, x = scratch
        torch.clamp_min(w, torch.finfo(w.dtype).tiny, out=log).log_()
        g_w = _sum(torch.mul(w, g, out=x))
        sum_h = -_sum(torch.mul(w, log, out=x))
        g_h = -_sum(x.mul_(g))
        wm = log.mul_(-a).expm1_().mul_(w)
        total, g_wm = _sum(wm), _sum(wm.mul_(g))
        g_t = (g_w + g_wm) / (1.0 + total)
        spread = (g_w * total - g_wm) / (1.0 + total)
        o.copy_(spread / a**2 + (g_h - g_t * sum_h) / a)
    return out
