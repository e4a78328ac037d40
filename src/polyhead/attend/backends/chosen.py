"""Chosen blocks by torch's fused kernel on a CPU: exact softmax over the keys that were chosen, no others.

The call is cut into pieces p (`polyhead.attend.pieces`), whose outputs are merged by their log-sum-exps:

    out_i = Σ_p e^{l_pi - l_i} out_pi,   l_i = log Σ_p e^{l_pi}

Backward hands out and l of the whole row to the kernel's own backward, which then gives a piece's share of
every gradient.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.chosen_row import attend_row
from polyhead.attend.fused_cpu import HIDDEN, fused, fused_backward, unfit
from polyhead.attend.masks import Chosen, Mask
from polyhead.attend.pieces import Piece, Sizes, pieces, split, whole
from polyhead.attend.plan import Backend, Request
from polyhead.attend.precision import wide
from polyhead.errors import PolyheadError

__all__ = ["ChosenBlocks"]


class ChosenBlocks:
    """Plain softmax over blocks of keys that were chosen, on a CPU.

    Where everything that may be seen was chosen, the call goes on to `others` without the choice.
    """

    name = "chosen"
    dense = False
    opt_in = ""

    def __init__(self, others: tuple[Backend, ...]) -> None:
        self.others = others

    def refuse(self, request: Request) -> str:
        q, k, v, problem = request.q, request.k, request.v, request.problem
        if split(problem.mask) is None:
            return f"{problem.mask} is not one choice of blocks of keys, joined by & with other masks"
        reason = unfit(request)
        if reason:
            return reason
        if request.want_lse and request.needs_grad:
            return "it has no gradient of the log-sum-exp"
        if v.shape[-1] != k.shape[-1]:
            return "it needs values as wide as keys"
        if 0 in (*q.shape, *k.shape):
            return "there is nothing to choose from"
        return ""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        q, k, v, problem = request.q, request.k, request.v, request.problem
        found = split(problem.mask)
        assert found is not None
        choice, rest = found
        batch, heads, queries, width = q.shape
        if queries == 1 and not request.needs_grad and k.shape[2] >= choice.cols:
            return attend_row(q, k, v, choice, rest, problem.scale, request.want_lse)
        sizes = Sizes(batch, heads, k.shape[1], queries, k.shape[2], 2 * width * k.element_size())
        if not request.want_lse and whole(choice, rest, sizes):
            freed = replace(request, problem=replace(problem, mask=rest))
            return next(b for b in self.others if not b.opt_in and not b.refuse(freed)).run(freed)
        out, lse = _Chosen.apply(q, k, v, choice, rest, sizes, problem.scale)
        return out, lse if request.want_lse else None


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        choice: Chosen,
        rest: Mask | None,
        sizes: Sizes,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        spare = bool(sizes.queries % choice.rows)
        queries = _Rows(q, spare)
        keys, values = _blocks(k, choice.cols), _blocks(v, choice.cols)
        out = torch.zeros_like(queries.flat, dtype=wide(q.dtype))  # rounded once, when all is merged
        lse = out.new_full(out.shape[:1], -math.inf)
        for piece in pieces(choice, rest, sizes, q.dtype):
            own_keys, own_values = _gathered(keys, values, piece)
            share, own = fused(queries[piece.rows], own_keys, own_values, piece.added, scale, piece.skipped)
            at, own = piece.rows.view(-1), own.reshape(-1)
            share = share.reshape(-1, share.shape[-1]).to(out.dtype)
            if not piece.first:
                both = torch.logaddexp(lse[at], own)
                share, own = out[at].lerp_(share, (own - both).exp_()[:, None]), both
            out.index_copy_(0, at, share)
            lse.index_copy_(0, at, own)
        nothing = lse < HIDDEN / 2
        if bool(nothing.any()):
            out, lse = out.masked_fill_(nothing[:, None], 0.0), lse.masked_fill_(nothing, -math.inf)
        out, lse = (_without_spare(x, q.shape) for x in (out, lse))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = choice, rest, sizes, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise PolyheadError(
                "attend was asked for a gradient that can be differentiated again (create_graph=True), which "
                "only the dense form gives: use backend='reference'"
            )
        q, k, v, out, lse = ctx.saved_tensors
        choice, rest, sizes, scale = ctx.call
        nothing = lse.isneginf()
        spare = bool(sizes.queries % choice.rows)
        if bool(nothing.any()):
            grad, lse = grad.masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, 0.0)
        queries, outs, grads = _Rows(q, spare), _Rows(out, spare), _Rows(grad, spare)
        totals = F.pad(lse.reshape(-1), (0, int(spare)))
        keys, values = _blocks(k, choice.cols), _blocks(v, choice.cols)
        dtype = wide(q.dtype)
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (queries.flat, keys, values))
        for piece in pieces(choice, rest, sizes, q.dtype):
            rows = piece.rows
            own_keys, own_values = _gathered(keys, values, piece)
            found = fused_backward(
                *(grads[rows], queries[rows], own_keys, own_values, outs[rows]),
                totals[rows].unsqueeze(1),
                piece.added,
                scale,
                piece.skipped,
            )
            at, blocks = piece.rows.view(-1), piece.blocks.view(-1)
            dq.index_add_(0, at, found[0].reshape(len(at), -1).to(dtype))
            for total, share in zip((dk, dv), found[1:], strict=True):
                total.index_add_(0, blocks, share.reshape(len(blocks), *total.shape[1:]).to(dtype))
        return (
            _without_spare(dq, q.shape).to(q.dtype),
            _joined(dk, k),
            _joined(dv, v),
            *(None,) * 4,
        )


class _Rows:
    """Rows of `(B, H, L, D)` by their place in B·H·L; with `spare` one more row, of zeros, for nobody."""

    def __init__(self, x: Tensor, spare: bool) -> None:
        flat = x.reshape(-1, x.shape[-1])
        self.flat = F.pad(flat, (0, 0, 0, 1)) if spare else flat

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.flat.index_select(0, rows.view(-1)).view(rows.shape[0], 1, rows.shape[1], -1)


def _without_spare(flat: Tensor, shape: torch.Size) -> Tensor:
    """`(B, H, L, ...)` of rows by their place."""
    count = shape[:3].numel()
    return flat[:count].view(*shape[:3], *flat.shape[1:])


def _blocks(x: Tensor, cols: int) -> Tensor:
    """`(B, G, S, D)` as blocks `(B·G·blocks, C, D)`, the last ones filled up with zeros."""
    missing = -x.shape[2] % cols
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return x.reshape(-1, cols, x.shape[-1])


def _joined(blocks: Tensor, like: Tensor) -> Tensor:
    batch, heads, keys, width = like.shape
    return blocks.view(batch, heads, -1, width)[:, :, :keys].to(like.dtype)


def _gathered(keys: Tensor, values: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """The keys and the values of a piece, `(m, 1, n·C, D)`."""
    m, n = piece.blocks.shape
    if m == n == 1:
        one = int(piece.blocks)
        return keys[one][None, None], values[one][None, None]
    index, shape = piece.blocks.reshape(-1), (m, 1, n * keys.shape[1], keys.shape[2])
    return keys.index_select(0, index).view(shape), values.index_select(0, index).view(shape)
