"""The tile engine: any mask, score and normaliser in O(L) memory, forward and backward.

It walks strips (`polyhead.attend.strips`): a few query rows by all the keys that they may see. For one strip

    scores = scale · Q Kᵀ → score maps → mask → normaliser → dropout → weights · V

and nothing of size L × S is ever held. Backward recomputes a strip, takes the closed-form
vector-Jacobian product of its normaliser and lets autograd differentiate the score maps alone. The values
are one consumer of the weights; `observe` walks the same strips for others, such as measurements of heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.normalizers import Normalizer, Softmax
from polyhead.attend.scores import Score
from polyhead.attend.strips import Frame, Strip, strips
from polyhead.attend.tile import Tile
from polyhead.description import Part

__all__ = ["Consumer", "Problem", "attend_tiles", "observe_tiles"]


class Problem(Part):
    """What is computed, apart from q, k and v: the key of every backend."""

    mask: Mask | None
    score: Score | None
    normalizer: Normalizer
    scale: float
    dropout: float = 0.0


class Consumer(Protocol):
    """Takes part in a walk over all weights, strip by strip (see `observe`)."""

    needs_logits: bool

    def visit(self, tile: Tile, logits: Tensor | None, weights: Tensor) -> None:
        """Take what is wanted from one strip; both buffers `(b, h, r, c)` are reused afterwards."""


def _frame(q: Tensor, k: Tensor) -> Frame:
    return Frame(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: half precisions are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class _Operands:
    """q (N, rep, L, D), k (N, S, D) and v (N, S, Dv) of a call with N = B·G, in the wide dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    frame: Frame
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory for one strip, the same for all: fresh pages for every strip cost more than the work."""
        size = math.prod(shape)
        held = self.buffers.get(name)
        if held is None or held.numel() < size:
            held = self.buffers[name] = self.q.new_empty(size)
        return held[:size].view(shape)

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> _Operands:
        frame, dtype = _frame(q, k), _wide(q.dtype)
        n, repeat = frame.batch * frame.kv_heads, frame.heads // frame.kv_heads
        return cls(
            q.to(dtype).reshape(n, repeat, frame.queries, q.shape[-1]),
            k.to(dtype).reshape(n, frame.keys, k.shape[-1]),
            v.to(dtype).reshape(n, frame.keys, v.shape[-1]),
            frame,
        )

    def pairs(self, strip: Strip) -> slice:
        """The strip's (batch item, KV head) pairs among N."""
        g = self.frame.kv_heads
        return slice(strip.b0 * g + strip.g0, (strip.b1 - 1) * g + strip.g1)


def _read(x: Tensor, pairs: slice, strip: Strip) -> Tensor:
    """The strip's keys or values (n, c, D): a view when the columns have no gap."""
    x = x[pairs]
    if len(strip.runs) == 1:
        return x[:, strip.runs[0].start : strip.runs[0].stop]
    return torch.cat([x[:, run.start : run.stop] for run in strip.runs], dim=1)


def _add(total: Tensor, pairs: slice, strip: Strip, rows: Tensor, weights: Tensor) -> None:
    """total[..., columns] += rowsᵀ weights, in place: total (N, D, S), rows (n, r, D), weights (n, r, c).

    The keys' gradients are summed transposed: the product then reads the weights in the order of memory.
    """
    start = 0
    for run in strip.runs:
        stop = start + run.stop - run.start
        total[pairs, :, run.start : run.stop].baddbmm_(rows.transpose(1, 2), weights[..., start:stop])
        start = stop


def _tile(strip: Strip, frame: Frame) -> Tile:
    repeat = frame.heads // frame.kv_heads
    device = frame.device
    cols = [torch.arange(run.start, run.stop, device=device) for run in strip.runs]
    return Tile(
        batch=strip.b1 - strip.b0,
        heads=(strip.g1 - strip.g0) * repeat,
        rows=torch.arange(strip.r0, strip.r1, device=device) + frame.offset,
        cols=cols[0] if len(cols) == 1 else torch.cat(cols),
        row_start=strip.r0,
        batch_start=strip.b0,
        head_start=strip.g0 * repeat,
        total_heads=frame.heads,
        consecutive=len(cols) == 1,
    )


def _of_heads(part: Any, strip: Strip, frame: Frame) -> Any:
    """The part for the strip's heads: its per-head tensors (H,) sliced."""
    if strip.g1 - strip.g0 == frame.kv_heads:
        return part
    repeat = frame.heads // frame.kv_heads
    heads = slice(strip.g0 * repeat, strip.g1 * repeat)
    return part._map(lambda t: t[heads] if t.ndim == 1 and t.shape[0] == frame.heads else t)


@dataclass
class _Strip:
    """One strip under way: its operands and what the mask says of it."""

    strip: Strip
    tile: Tile
    pairs: slice
    q: Tensor  # (n, rep·r, D), scaled
    k: Tensor  # (n, c, D)
    v: Tensor  # (n, c, Dv)
    forbidden: Tensor | None  # (b|1, h|1, r, masked columns)
    dead: Tensor | None  # rows that may look at nothing, (b|1, h|1, r, 1)

    @classmethod
    def of(cls, strip: Strip, x: _Operands, problem: Problem) -> _Strip:
        tile, pairs = _tile(strip, x.frame), x.pairs(strip)
        q = x.q[pairs, :, strip.r0 : strip.r1]
        q = (q * problem.scale).reshape(q.shape[0], -1, q.shape[-1])
        forbidden = dead = None
        if strip.masked is not None and problem.mask is not None:
            lo, hi = strip.masked
            allowed = problem.mask.allowed(tile.b, tile.h, tile.i, tile.j[lo:hi])
            allowed = allowed.expand(torch.broadcast_shapes(allowed.shape, (1, 1, len(tile.rows), hi - lo)))
            forbidden = ~allowed
            if not strip.alive:
                dead = forbidden.all(-1, keepdim=True)
        return cls(strip, tile, pairs, q, _read(x.k, pairs, strip), _read(x.v, pairs, strip), forbidden, dead)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (b, h, r, c) of the strip's scores."""
        return (self.tile.batch, self.tile.heads, len(self.tile.rows), self.k.shape[1])

    def flat(self, x: Tensor) -> Tensor:
        """(b, h, r, ·) as (n, rep·r, ·), the layout of the matrix products."""
        return x.view(self.q.shape[0], self.q.shape[1], x.shape[-1])

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """a bᵀ per pair, (n, rep·r, ·) and (n, c, ·), as (b, h, r, c) in the memory of `out`."""
        return torch.bmm(a, b.transpose(1, 2), out=out.view(a.shape[0], a.shape[1], b.shape[1])).view(
            self.shape
        )

    def hide(self, scores: Tensor) -> Tensor:
        """Put -inf at forbidden pairs, in place."""
        if self.forbidden is not None and self.strip.masked is not None:
            lo, hi = self.strip.masked
            scores[..., lo:hi].masked_fill_(self.forbidden, float("-inf"))
        return scores

    def weigh(self, scores: Tensor, normalizer: Normalizer) -> Tensor:
        """Weights of the strip; rows that may look at nothing get zeros."""
        weights = normalizer.weights(scores)
        return weights if self.dead is None else weights.masked_fill_(self.dead, 0.0)

    def keep(self, problem: Problem, seed: int, dtype: torch.dtype) -> Tensor | None:
        """Dropout's factors: the same numbers in forward and backward, from the seed and the place."""
        if problem.dropout == 0.0:
            return None
        s = self.strip
        generator = torch.Generator(device=self.q.device)
        generator.manual_seed(
            (seed + 0x9E3779B1 * (s.r0 + 1) + 0x85EBCA6B * s.b0 + 0xC2B2AE35 * s.g0) % 2**63
        )
        keep = torch.empty(self.shape, device=self.q.device, dtype=dtype)
        keep.bernoulli_(1.0 - problem.dropout, generator=generator)
        return keep.div_(1.0 - problem.dropout)


def _mapped(scores: Tensor, score: Score | None, tile: Tile) -> Tensor:
    """The score maps on a strip, in place where the map only adds a bias."""
    if score is None:
        return scores
    if score.positional:
        bias = score.bias(tile)
        return scores if bias is None else scores.add_(bias)
    mapped = score.apply(scores, tile)
    # the mask is written in place, which must not reach a tensor of the caller's
    return mapped.clone() if mapped is scores or not mapped.is_contiguous() else mapped


def _walk(x: _Operands, problem: Problem) -> Iterator[tuple[_Strip, Normalizer]]:
    """The strips under way, each with the normaliser for its heads."""
    for strip in strips(x.frame, problem.mask):
        yield _Strip.of(strip, x, problem), _of_heads(problem.normalizer, strip, x.frame)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: Problem,
    seed: int,
    want_lse: bool,
    consumers: Sequence[Consumer] = (),
) -> tuple[Tensor, Tensor | None]:
    x = _Operands.of(q, k, v)
    frame, dtype = x.frame, x.q.dtype
    out = torch.zeros(*x.q.shape[:3], v.shape[-1], dtype=dtype, device=q.device)
    lse = None
    if want_lse:
        lse = torch.full(x.q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    keep_logits = any(consumer.needs_logits for consumer in consumers)
    for part, normalizer in _walk(x, problem):
        rows = slice(part.strip.r0, part.strip.r1)
        raw = part.product(part.q, part.k, x.buffer("scores", part.shape))
        scores = part.hide(_mapped(raw, problem.score, part.tile))
        n, repeat = part.q.shape[0], frame.heads // frame.kv_heads
        if lse is not None:
            assert isinstance(normalizer, Softmax)
            lse[part.pairs, :, rows] = normalizer.lse(scores).view(n, repeat, -1).float()
        logits = x.buffer("logits", part.shape).copy_(scores) if keep_logits else None
        weights = part.weigh(scores, normalizer)
        for consumer in consumers:
            consumer.visit(part.tile, logits, weights)
        factors = part.keep(problem, seed, dtype)
        if factors is not None:
            weights = weights.mul_(factors)
        out[part.pairs, :, rows] = torch.bmm(part.flat(weights), part.v).view(n, repeat, -1, v.shape[-1])
    shape = (frame.batch, frame.heads, frame.queries)
    return out.view(*shape, v.shape[-1]).to(q.dtype), None if lse is None else lse.view(shape)


class _Attend(torch.autograd.Function):
    """Forward and backward of the walk as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: Problem, seed: int, want_lse: bool, *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(q, k, v, *tensors)
        ctx.spec, ctx.seed = spec, seed
        out, lse = _forward(q, k, v, spec.unflatten(tensors), seed, want_lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[6:]
        with torch.enable_grad():
            leaves = tuple(
                t.detach().requires_grad_() if need else t for t, need in zip(tensors, wanted, strict=True)
            )
        grads = _backward(q, k, v, ctx.spec, leaves, ctx.seed, grad, grad_lse)
        return (*grads[:3], None, None, None, *grads[3:])


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Problem,
    leaves: tuple[Tensor, ...],
    seed: int,
    grad: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    problem = spec.unflatten(leaves)
    x = _Operands.of(q, k, v)
    frame, dtype = x.frame, x.q.dtype
    repeat = frame.heads // frame.kv_heads
    if grad is None:
        grad = q.new_zeros(*q.shape[:3], v.shape[-1])
    upstream = grad.to(dtype).reshape(*x.q.shape[:3], v.shape[-1])
    upstream_lse = None if grad_lse is None else grad_lse.to(dtype).reshape(x.q.shape[:3])
    dq = torch.zeros_like(x.q)
    dk, dv = (t.new_zeros(t.shape[0], t.shape[2], t.shape[1]) for t in (x.k, x.v))
    score_leaves = () if problem.score is None else _trainable(problem.score)
    own = problem.normalizer.tensors()
    totals: dict[int, Tensor] = {id(t): torch.zeros_like(t) for t in leaves if t.requires_grad}
    for part, normalizer in _walk(x, problem):
        rows = slice(part.strip.r0, part.strip.r1)
        n = part.q.shape[0]
        raw = part.product(part.q, part.k, x.buffer("scores", part.shape))
        source, mapped, bias = raw, raw, None
        if problem.score is not None and problem.score.positional:
            with torch.enable_grad():
                bias = problem.score.bias(part.tile)
            if bias is not None:
                mapped = raw.add_(bias.detach())
        elif problem.score is not None:
            with torch.enable_grad():
                source = raw.requires_grad_()
                mapped = problem.score.apply(source, part.tile)
        scores = mapped.detach()
        scores = part.hide(scores.clone() if scores is not raw else scores)
        with torch.no_grad():
            weights = part.weigh(scores, normalizer)
            g = upstream[part.pairs, :, rows].reshape(n, -1, v.shape[-1])
            gw = part.product(g, part.v, x.buffer("gradient", part.shape))
            factors = part.keep(problem, seed, dtype)
            kept = weights if factors is None else weights * factors
            _add(dv, part.pairs, part.strip, g, part.flat(kept))
            if factors is not None:
                gw.mul_(factors)
            extra_lse = None
            if upstream_lse is not None:
                extra_lse = upstream_lse[part.pairs, :, rows].reshape(*part.shape[:3], 1)
            gs, gt = normalizer.vjp(weights, gw)
            if extra_lse is not None:
                assert isinstance(normalizer, Softmax)
                gs = gs.addcmul_(weights, extra_lse)
                gt = normalizer.lse_vjp(weights, extra_lse, gt)
            _collect(totals, own, gt, part, frame)
        if bias is not None and score_leaves:
            down = gs.sum_to_size(torch.broadcast_shapes((1,) * (4 - bias.ndim) + bias.shape)).view(
                bias.shape
            )
            if bias.requires_grad:
                for leaf, d in zip(
                    score_leaves,
                    torch.autograd.grad(bias, score_leaves, down, allow_unused=True),
                    strict=True,
                ):
                    if d is not None:
                        totals[id(leaf)] += d
        elif problem.score is not None and bias is None and mapped is not source:
            ds, *rest = torch.autograd.grad(mapped, (source, *score_leaves), gs, allow_unused=True)
            gs = torch.zeros_like(gs) if ds is None else ds
            for leaf, d in zip(score_leaves, rest, strict=True):
                if d is not None:
                    totals[id(leaf)] += d
        gs = part.flat(gs if gs.is_contiguous() else gs.contiguous())
        dq[part.pairs, :, rows] = torch.bmm(gs, part.k).view(n, repeat, -1, q.shape[-1])
        _add(dk, part.pairs, part.strip, part.q, gs)
    dq.mul_(problem.scale)
    return (
        dq.view(q.shape).to(q.dtype),
        dk.transpose(1, 2).reshape(k.shape).to(k.dtype),
        dv.transpose(1, 2).reshape(v.shape).to(v.dtype),
        *(totals.get(id(leaf)) for leaf in leaves),
    )


def _trainable(part: Part) -> tuple[Tensor, ...]:
    return tuple(t for t in part.tensors() if t.requires_grad)


def _collect(
    totals: dict[int, Tensor], own: tuple[Tensor, ...], grads: tuple[Tensor, ...], part: _Strip, frame: Frame
) -> None:
    """Add a strip's gradients of the normaliser's per-head tensors."""
    for leaf, d in zip(own, grads, strict=True):
        if id(leaf) in totals and d is not None:
            target = totals[id(leaf)]
            if target.ndim == 1 and target.shape[0] == frame.heads and d.shape[0] != frame.heads:
                target[part.tile.head_slice] += d
            else:
                target += d.view(target.shape)


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, seed: int = 0, want_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Output `(B, H, L, Dv)` and, if wanted, log-sum-exp `(B, H, L)` of a call, with gradients."""
    spec, tensors = problem.flatten()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *tensors)):
        out, lse = _Attend.apply(q, k, v, spec, seed, want_lse, *tensors)
        return out, lse
    with torch.no_grad():
        return _forward(q, k, v, problem, seed, want_lse)


@torch.no_grad()
def observe_tiles(q: Tensor, k: Tensor, v: Tensor, problem: Problem, consumers: Sequence[Consumer]) -> Tensor:
    """The output of a call, while every consumer sees every strip of its weights."""
    return _forward(q, k, v, replace(problem, dropout=0.0), 0, False, consumers)[0]
