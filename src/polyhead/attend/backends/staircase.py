"""A causal mask over rows that were picked out of a larger call, by torch's fused kernel on a CPU.

The pairs that such rows see make a staircase. Its lower half of rows sees all columns before the first of
its own: a full rectangle, which needs no mask. What is left are two staircases of half the size, and so on
down to a few rows with a table for a mask. A row's pieces p are merged by their log-sum-exps:

    out_i = Σ_p e^{l_pi - l_i} out_pi,   l_i = log Σ_p e^{l_pi}

Backward hands out and l of the whole row to the kernel's own backward, which then gives a piece's share of
every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyhead.attend.masks import Gathered, causal
from polyhead.attend.plan import Request
from polyhead.attend.refusals import ONE_STEP, beyond_softmax, inside_transform
from polyhead.errors import PolyheadError

__all__ = ["Staircase"]

_CAUSAL = causal()
_ROWS = 64  # of the last pieces; fewer compute less in vain, and more often
_LEAST_ROWS, _LEAST_KEYS = 2 * _ROWS, 512  # below these the tile engine is as quick
_HIDDEN = -1e30  # finite, so that a row that sees nothing of a piece gets a number, and weight 0

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Piece(NamedTuple):
    """Some rows and columns, and what is added to their scores, `(1, H, r, c)`; None: nothing is hidden."""

    rows: slice
    columns: slice
    added: Tensor | None


def _pieces(positions: Tensor, keys: int, dtype: torch.dtype) -> Iterator[_Piece]:
    """Pieces that hold every pair with column ≤ position, each once. positions: `(H, L)`, best ascending."""
    # of rows from r on the first position, of rows up to r the last one
    first = positions.amin(0).flip(0).cummin(0).values.flip(0).clamp(0, keys).tolist()
    last = positions.amax(0).cummax(0).values.clamp(-1, keys - 1).tolist()
    todo = [(0, positions.shape[1], 0)]  # rows, and the column before which their pairs are in pieces already
    while todo:
        start, stop, done = todo.pop()
        if stop - start > _ROWS:
            middle = (start + stop) // 2
            end = max(done, first[middle])
            if end > done:
                yield _Piece(slice(middle, stop), slice(done, end), None)
            todo += [(start, middle, done), (middle, stop, end)]
        elif last[stop - 1] >= done:
            end = last[stop - 1] + 1
            hidden = torch.arange(done, end, device=positions.device) > positions[:, start:stop, None]
            added = torch.zeros(1, *hidden.shape, dtype=dtype, device=positions.device)
            yield _Piece(slice(start, stop), slice(done, end), added.masked_fill_(hidden, _HIDDEN))


class Staircase:
    """A causal mask over queries that were picked out of a larger call, on a CPU."""

    name = "staircase"
    dense = False
    opt_in = ""

    def refuse(self, request: Request) -> str:
        q, k, v, problem = request.q, request.k, request.v, request.problem
        mask = problem.mask
        if not isinstance(mask, Gathered) or mask.positions is None or mask.mask != _CAUSAL:
            return f"{mask} is not a causal mask over queries that were picked out of a larger call"
        reason = beyond_softmax(request)
        if reason:
            return reason
        if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.float64):
            return f"it is for float32 and float64 on a CPU, not for {q.dtype} on {q.device.type}"
        if v.shape[-1] != k.shape[-1] or q.shape[1] != k.shape[1]:
            return "it needs values as wide as keys, and keys for every head"
        if 0 in (*q.shape, *k.shape) or q.shape[2] < _LEAST_ROWS or k.shape[2] < _LEAST_KEYS:
            return f"for fewer than {_LEAST_ROWS} rows or {_LEAST_KEYS} keys it would not be quicker"
        if inside_transform():
            return ONE_STEP
        return ""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        problem = request.problem
        assert isinstance(problem.mask, Gathered)
        assert problem.mask.positions is not None
        positions = problem.mask.positions.to(torch.int64)
        return _Merged.apply(request.q, request.k, request.v, positions, problem.scale), None


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        lse = q.new_full(q.shape[:3], -math.inf)
        for rows, columns, added in _pieces(positions, k.shape[2], q.dtype):
            share, own = _fused(
                q[:, :, rows], k[:, :, columns], v[:, :, columns], attn_mask=added, scale=scale
            )
            both = torch.logaddexp(lse[:, :, rows], own)
            out[:, :, rows].lerp_(share, (own - both).exp_()[..., None])
            lse[:, :, rows] = both
        out = _cleared(out, positions)
        ctx.save_for_backward(q, k, v, positions, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise PolyheadError(
                "attend was asked for a gradient that can be differentiated again (create_graph=True), which "
                "only the dense form gives: use backend='reference'"
            )
        q, k, v, positions, out, lse = ctx.saved_tensors
        grad = _cleared(grad.contiguous(), positions)
        totals = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for rows, columns, added in _pieces(positions, k.shape[2], q.dtype):
            found = _fused_backward(
                grad[:, :, rows],
                q[:, :, rows],
                k[:, :, columns],
                v[:, :, columns],
                out[:, :, rows],
                lse[:, :, rows],
                0.0,
                False,
                attn_mask=added,
                scale=ctx.scale,
            )
            for total, share, at in zip(totals, found, (rows, columns, columns), strict=True):
                total[:, :, at].add_(share)
        return *totals, None, None


def _cleared(x: Tensor, positions: Tensor) -> Tensor:
    """0 in rows that may look at nothing: those before the first key."""
    nothing = positions < 0
    return x.masked_fill(nothing[..., None], 0.0) if bool(nothing.any()) else x
