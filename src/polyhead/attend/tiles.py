"""The tile engine: any mask, score and normaliser in O(L) memory, forward and backward.

It walks strips (`polyhead.attend.strips`): a few query rows by all the keys that they may see. For one strip

    scores = scale · Q Kᵀ → score maps → mask → normaliser → weight maps → dropout → weights · V

and nothing of size L × S is ever held. Backward recomputes a strip, takes the closed-form
vector-Jacobian products of its normaliser and of maps across heads, and lets autograd differentiate the
other maps alone. The values are one consumer of the weights; `observe_tiles` walks the same strips for
others, such as measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from polyhead.attend.map_stages import weight_stage
from polyhead.attend.normalizers import Softmax
from polyhead.attend.problem import Problem
from polyhead.attend.score_maps import score_maps
from polyhead.attend.stream import OwnGradients
from polyhead.attend.strip_work import Operands, StripWork, walk
from polyhead.attend.strips import Strip
from polyhead.attend.tile import Tile

__all__ = ["Consumer", "backward", "forward", "observe_tiles"]


class Consumer(Protocol):
    """Takes part in a walk over all weights, strip by strip (see `observe`)."""

    needs_logits: bool

    def visit(self, tile: Tile, logits: Tensor | None, weights: Tensor) -> None:
        """Take what is wanted from one strip; both buffers `(b, h, r, c)` are reused afterwards."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: Problem,
    *,
    seed: int = 0,
    want_lse: bool = False,
    consumers: Sequence[Consumer] = (),
    operands: type[Operands] = Operands,
) -> tuple[Tensor, Tensor | None]:
    """Output `(B, H, L, Dv)` and, if wanted, log-sum-exp `(B, H, L)`; consumers see every strip.

    `operands`: how queries and keys are held and multiplied.
    """
    x = operands.of(q, k, v)
    frame = x.frame
    out = torch.zeros(*x.q.shape[:3], v.shape[-1], dtype=x.v.dtype, device=q.device)
    lse = None
    if want_lse:
        assert isinstance(problem.normalizer, Softmax)
        nothing = problem.normalizer.lse(x.v.new_full((1, frame.heads, 1, 1), float("-inf")))
        lse = nothing.expand(frame.batch, -1, frame.queries).reshape(x.q.shape[:3]).clone()
    maps, after = score_maps(problem.score, x), weight_stage(problem.weight_map, x)
    keep_logits = any(consumer.needs_logits for consumer in consumers)
    for part, normalizer in walk(x, problem):
        lead = part.strip.lead
        rows = slice(part.strip.r0 + lead, part.strip.r1)
        raw = x.scores(part)
        scores = part.hide(maps.there(raw, part))
        logits = x.buffer("logits", part.shape).copy_(scores) if keep_logits else None
        if lse is None:
            weights = part.weigh(scores, normalizer, check=maps.may_hide)
        else:
            assert isinstance(normalizer, Softmax)
            weights, sums = part.weigh_with_lse(scores, normalizer, check=maps.may_hide)
            target = lse[part.pairs, :, rows]
            target.copy_(sums[:, :, lead:].reshape(target.shape))
        if after is not None:
            weights = after.there(weights, part)
        for consumer in consumers:
            consumer.visit(*_without_lead(part.tile, lead, logits, weights))
        factors = part.keep(problem, seed)
        if factors is not None:
            weights = weights.mul_(factors)
        target = out[part.pairs, :, rows]
        made = torch.bmm(part.flat(weights), part.v).unflatten(1, (target.shape[1], -1))
        target.copy_(made[:, :, lead:])
    shape = (frame.batch, frame.heads, frame.queries)
    return out.view(*shape, v.shape[-1]).to(q.dtype), None if lse is None else lse.view(shape)


def backward(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, grad: Tensor, grad_lse: Tensor | None, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
    """Gradients for q, k and v, and by `id` for the tensors of `problem` that require one."""
    x = Operands.of(q, k, v)
    frame = x.frame
    up = grad.to(x.q.dtype).reshape(*x.q.shape[:3], v.shape[-1])
    up_lse = None if grad_lse is None else grad_lse.to(x.q.dtype).reshape(*x.q.shape[:3], 1)
    dq = torch.zeros_like(x.q)
    dk, dv = (t.new_zeros(t.shape[0], t.shape[2], t.shape[1]) for t in (x.k, x.v))
    own = OwnGradients(problem)
    maps, after = score_maps(problem.score, x, own), weight_stage(problem.weight_map, x, own)
    unseen = None if up_lse is None else torch.ones_like(up_lse)
    for part, normalizer in walk(x, problem):
        lead, rows = part.strip.lead, slice(part.strip.r0, part.strip.r1)
        raw = x.scores(part)
        scores = part.hide(maps.there(raw, part))
        weights = part.weigh(scores, normalizer, check=maps.may_hide)
        used = weights if after is None else after.there(weights, part)
        g = _without(up[part.pairs, :, rows], lead).reshape(part.q.shape[0], -1, v.shape[-1])
        gw = part.product(g, part.v, x.buffer("gradient", part.shape))
        factors = part.keep(problem, seed)
        _add(dv, part, g, used if factors is None else used * factors)
        if factors is not None:
            gw.mul_(factors)
        if after is not None:
            gw = after.back(gw, part)
        gs, found = normalizer.vjp(weights, gw)
        if up_lse is not None:
            assert isinstance(normalizer, Softmax)
            g_lse = _without(up_lse[part.pairs, :, rows], lead).reshape(*part.shape[:3], 1)
            gs, found = gs.addcmul_(weights, g_lse), normalizer.lse_vjp(weights, g_lse, found)
            assert unseen is not None
            unseen[part.pairs, :, part.strip.r0 + lead : part.strip.r1] = 0
        for leaf, d in zip(problem.normalizer.tensors(), found, strict=True):
            own.add(leaf, d, part.tile.head_slice)
        gs = maps.back(gs, part)
        target = dq[part.pairs, :, rows]
        target.add_(torch.bmm(part.flat(gs), part.k).view(target.shape))
        _add(dk, part, part.q, gs)
    maps.done()
    if after is not None:
        after.done()
    if up_lse is not None and unseen is not None and isinstance(problem.normalizer, Softmax):
        # rows that no strip holds: their log-sum-exp is that of the sink alone
        alone = (up_lse * unseen).view(frame.batch, frame.heads, frame.queries, 1)
        nothing = alone.new_zeros(*alone.shape[:3], 0)
        zero = tuple(torch.zeros_like(t) for t in problem.normalizer.tensors())
        for leaf, d in zip(
            problem.normalizer.tensors(), problem.normalizer.lse_vjp(nothing, alone, zero), strict=True
        ):
            own.add(leaf, d)
    return (
        dq.mul_(problem.scale).view(q.shape).to(q.dtype),
        dk.transpose(1, 2).reshape(k.shape).to(k.dtype),
        dv.transpose(1, 2).reshape(v.shape).to(v.dtype),
        own.done(),
    )


def _without(x: Tensor, lead: int) -> Tensor:
    """x (N, rep, r, ·) with 0 at the first `lead` rows, which are another strip's own."""
    if not lead:
        return x
    x = x.clone()
    x[:, :, :lead] = 0
    return x


def _without_lead(
    tile: Tile, lead: int, logits: Tensor | None, weights: Tensor
) -> tuple[Tile, Tensor | None, Tensor]:
    if not lead:
        return tile, logits, weights
    logits = None if logits is None else logits[:, :, lead:].contiguous()
    own = replace(tile, rows=tile.rows[lead:], row_start=tile.row_start + lead)
    return own, logits, weights[:, :, lead:].contiguous()


def _add(total: Tensor, part: StripWork, rows: Tensor, weights: Tensor) -> None:
    """total[..., columns] += rowsᵀ weights, in place: total (N, D, S), rows (n, r, D), weights (b, h, r, c).

    The keys' gradients are summed transposed: the product then reads the weights in the order of memory.
    """
    strip: Strip = part.strip
    rows, weights, start = rows.transpose(1, 2), part.flat(weights), 0
    for run in strip.runs:
        stop = start + run.stop - run.start
        total[part.pairs, :, run.start : run.stop].baddbmm_(rows, weights[..., start:stop])
        start = stop


@torch.no_grad()
def observe_tiles(q: Tensor, k: Tensor, v: Tensor, problem: Problem, consumers: Sequence[Consumer]) -> Tensor:
    """The output of a call, while every consumer sees every strip of its weights."""
    return forward(q, k, v, replace(problem, dropout=0.0), consumers=consumers)[0]
