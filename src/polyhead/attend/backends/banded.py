"""Windows along the sequence: blocks of queries read only the band of keys around them.

All blocks have the same shape, so one batched product serves many of them, over overlapping views of the
keys that are never copied. Sinks, the first keys that every query may see besides its window, are a second,
narrow product. Forward and backward cost O(L · window).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.masks import Band, Mask, band
from polyhead.attend.normalizers import Normalizer
from polyhead.attend.plan import Request
from polyhead.attend.scores import Positional
from polyhead.attend.tile import Tile
from polyhead.attend.tiles import Problem
from polyhead.description import Part

__all__ = ["Banded"]

_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}


class Banded:
    """A window around each query, with sinks, padding and documents."""

    name = "banded"
    dense = False
    opt_in = ""

    def refuse(self, request: Request) -> str:
        problem = request.problem
        if problem.mask is None:
            return "no mask limits the call to a band"
        found = band(problem.mask)
        if found is None:
            return f"{problem.mask} is not a window around each query"
        if problem.score is not None and not isinstance(problem.score, Positional):
            return f"its blocks share one bias by distance; {problem.score} depends on more"
        if problem.score is not None and found.sinks:
            return "a bias by distance differs from block to block at the sinks"
        if request.want_lse:
            return "it does not return the log-sum-exp"
        if problem.dropout:
            return "it has no dropout"
        if 0 in (*request.q.shape, *request.k.shape):
            return "it does not define attention over nothing"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return (
                "it is one step for autograd and cannot be looked into by torch.func transforms (vmap, jvp)"
            )
        queries, keys = request.q.shape[2], request.k.shape[2]
        width = _rows(found) + found.left + found.right + found.sinks
        if queries < 2 * _rows(found) or 2 * width > keys:
            return f"a block would read {width} of {keys} keys for {queries} queries, which saves too little"
        return ""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        spec, tensors = request.problem.flatten()
        return _Attend.apply(request.q, request.k, request.v, spec, *tensors), None


def _rows(shape: Band) -> int:
    """Queries of a block: a narrow window wants small blocks, since a block reads rows + window keys."""
    return 32 if shape.left + shape.right < 128 else 64


@dataclass
class _Blocks:
    """The operands cut into blocks: N = B·G pairs, T blocks of R queries, K keys in each band."""

    q: Tensor  # (N, T, rep·R, D), scaled
    k: Tensor  # (N, padded S, D)
    v: Tensor  # (N, padded S, Dv)
    sink_k: Tensor  # (N, sinks, D)
    sink_v: Tensor
    shape: Band
    problem: Problem
    batch: int
    kv_heads: int
    repeat: int
    queries: int
    keys: int
    rows: int
    front: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> _Blocks:
        assert problem.mask is not None
        shape = band(problem.mask)
        assert shape is not None
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        batch, heads, queries, _ = q.shape
        kv_heads, keys = k.shape[1], k.shape[2]
        repeat, rows = heads // kv_heads, _rows(shape)
        count = -(-queries // rows)
        offset = keys - queries
        front = max(0, shape.left - offset)
        last = front + offset - shape.left + (count - 1) * rows + _span(shape, rows)
        n = batch * kv_heads
        k, v = (
            F.pad(x.to(dtype).reshape(n, keys, -1), (0, 0, front, max(0, last - front - keys)))
            for x in (k, v)
        )
        q = cls.fold(q.to(dtype) * problem.scale, n, repeat, rows, count)
        sinks = slice(front, front + min(shape.sinks, keys))
        return cls(
            q,
            k,
            v,
            k[:, sinks],
            v[:, sinks],
            shape,
            problem,
            batch,
            kv_heads,
            repeat,
            queries,
            keys,
            rows,
            front,
        )

    @staticmethod
    def fold(x: Tensor, n: int, repeat: int, rows: int, count: int) -> Tensor:
        """(B, H, L, ·) as (N, T, rep·R, ·), the last block filled up with zeros."""
        x = F.pad(x.reshape(n, repeat, x.shape[2], x.shape[3]), (0, 0, 0, count * rows - x.shape[2]))
        return x.view(n, repeat, count, rows, -1).transpose(1, 2).reshape(n, count, repeat * rows, -1)

    def unfold(self, x: Tensor, width: int) -> Tensor:
        """The inverse of `fold`."""
        n, count = x.shape[:2]
        x = x.view(n, count, self.repeat, self.rows, width).transpose(1, 2)
        x = x.reshape(self.batch, self.kv_heads * self.repeat, count * self.rows, width)
        return x[:, :, : self.queries]

    @property
    def span(self) -> int:
        """Keys in a block's band, K."""
        return _span(self.shape, self.rows)

    @property
    def first(self) -> int:
        """Index among the padded keys of the first block's first key."""
        return self.front + self.keys - self.queries - self.shape.left

    def windows(self, x: Tensor, n: int, t0: int, t1: int) -> Tensor:
        """The bands (t, K, ·) of blocks t0..t1-1 as an overlapping view."""
        x = x[n]
        start = x.storage_offset() + (self.first + t0 * self.rows) * x.stride(0)
        return x.as_strided((t1 - t0, self.span, x.shape[-1]), (self.rows * x.stride(0), *x.stride()), start)

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Pairs (n, t0, t1): blocks whose scores together stay in the cache."""
        count = self.q.shape[1]
        budget = _ELEMENTS.get(self.q.device.type, 1 << 19)
        step = max(1, budget // (self.repeat * self.rows * (self.span + self.sink_k.shape[1])))
        for n in range(self.q.shape[0]):
            for t0 in range(0, count, step):
                yield n, t0, min(t0 + step, count)

    def heads(self, n: int) -> slice:
        """The query heads of pair n."""
        g = n % self.kv_heads
        return slice(g * self.repeat, (g + 1) * self.repeat)

    def normalizer(self, n: int) -> Normalizer:
        """The normaliser for the heads of pair n: its per-head tensors sliced."""
        total = self.kv_heads * self.repeat
        part: Normalizer = self.problem.normalizer._map(
            lambda t: t[self.heads(n)] if t.ndim == 1 and t.shape[0] == total else t
        )
        return part

    def bias(self) -> Tensor | None:
        """The score's bias (H, R, K) inside a band, the same for every block; with gradient."""
        if self.problem.score is None:
            return None
        device = self.q.device
        tile = Tile(
            batch=1,
            heads=self.kv_heads * self.repeat,
            rows=torch.arange(self.rows, device=device) + self.shape.left,
            cols=torch.arange(self.span, device=device),
            consecutive=True,
        )
        return self.problem.score.bias(tile, self.q.dtype)

    def outside(self) -> Tensor:
        """Pairs (R, K) of a block that lie outside the window."""
        r = torch.arange(self.rows, device=self.q.device)[:, None]
        c = torch.arange(self.span, device=self.q.device) - self.shape.left
        return (c < r - self.shape.left) | (c > r + self.shape.right)

    def scores(self, n: int, t0: int, t1: int, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores (t, rep, R, sinks + K) of some blocks, -inf at forbidden pairs; and the rows that see nothing.

        `base` is added: the bias of the heads with -inf outside the window, (rep or 1, R, K).
        """
        count, sinks = t1 - t0, self.sink_k.shape[1]
        q, device = self.q[n, t0:t1], self.q.device
        shape = (count, self.repeat, self.rows)
        near = torch.baddbmm(
            base.expand(self.repeat, -1, -1).reshape(1, -1, self.span),
            q,
            self.windows(self.k, n, t0, t1).transpose(1, 2),
        ).view(*shape, self.span)
        i = (torch.arange(t0 * self.rows, t1 * self.rows, device=device) + self.keys - self.queries).view(
            count, 1, self.rows, 1
        )
        j = i[:, :, :1] - self.shape.left + torch.arange(self.span, device=device)
        beyond = (j < 0) | (j >= self.keys)
        low, high = int(t0 * self.rows + self.first < self.front), self._end(t1) > self.front + self.keys
        if low or high:
            near.masked_fill_(beyond, float("-inf"))
        far = None
        if sinks:
            far = (q.view(-1, q.shape[-1]) @ self.sink_k[n].T).view(*shape, sinks)
            at = torch.arange(sinks, device=device)
            if self.keys - self.queries + t0 * self.rows - self.shape.left < sinks:
                far = far.masked_fill(at >= i - self.shape.left, float("-inf"))
        if self.shape.rest is not None:
            self._forbid(self.shape.rest, near, i, j.clamp(0, self.keys - 1), n)
            if far is not None:
                self._forbid(self.shape.rest, far, i, at.view(1, 1, 1, -1), n)
        scores = near if far is None else torch.cat([far, near], dim=-1)
        dead = None
        if self.shape.rest is not None or low or high or self.keys < self.queries:
            dead = (scores == float("-inf")).all(-1, keepdim=True)
        return scores, dead

    def _end(self, t1: int) -> int:
        return self.first + (t1 - 1) * self.rows + self.span

    def _forbid(self, rest: Mask, scores: Tensor, i: Tensor, j: Tensor, n: int) -> None:
        b = torch.full((1, 1, 1, 1), n // self.kv_heads, device=scores.device)
        heads = self.heads(n)
        h = torch.arange(heads.start, heads.stop, device=scores.device).view(-1, 1, 1)
        scores.masked_fill_(~rest.allowed(b, h, i.clamp(max=self.keys - 1), j), float("-inf"))

    def weights(self, n: int, t0: int, t1: int, base: Tensor) -> Tensor:
        """Weights (t, rep, R, sinks + K) of some blocks."""
        scores, dead = self.scores(n, t0, t1, base)
        weights = self.normalizer(n).weights(scores)
        return weights if dead is None else weights.masked_fill_(dead, 0.0)

    def base(self, bias: Tensor | None) -> Tensor:
        """What is added to every block's scores: the bias, -inf outside the window; (H or 1, R, K)."""
        start = self.q.new_zeros(1, self.rows, self.span) if bias is None else bias.detach()
        return start.masked_fill(self.outside(), float("-inf"))

    def of_heads(self, base: Tensor, n: int) -> Tensor:
        """The share of pair n in something (H or 1, R, K)."""
        return base if base.shape[0] == 1 else base[self.heads(n)]


def _span(shape: Band, rows: int) -> int:
    return rows + shape.left + shape.right


class _Attend(torch.autograd.Function):
    """All blocks as one node of the graph; backward recomputes their weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: Problem, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, *tensors)
        ctx.spec = spec
        x = _Blocks.of(q, k, v, spec.unflatten(tensors))
        base = x.base(x.bias())
        sinks = x.sink_k.shape[1]
        out = x.q.new_empty(*x.q.shape[:3], v.shape[-1])
        for n, t0, t1 in x.chunks():
            weights = x.weights(n, t0, t1, x.of_heads(base, n)).view(t1 - t0, x.q.shape[2], -1)
            torch.bmm(weights[..., sinks:], x.windows(x.v, n, t0, t1), out=out[n, t0:t1])
            if sinks:
                out[n, t0:t1] += weights[..., :sinks] @ x.sink_v[n]
        return x.unfold(out, v.shape[-1]).to(q.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, *tensors = ctx.saved_tensors
        leaves = tuple(
            t.detach().requires_grad_() if need else t
            for t, need in zip(tensors, ctx.needs_input_grad[4:], strict=True)
        )
        problem = ctx.spec.unflatten(leaves)
        x = _Blocks.of(q, k, v, problem)
        with torch.enable_grad():
            bias = x.bias()
        base, sinks, rows = x.base(bias), x.sink_k.shape[1], x.q.shape[2]
        up = x.fold(grad.to(x.q.dtype), x.q.shape[0], x.repeat, x.rows, x.q.shape[1])
        dq = torch.empty_like(x.q)
        # room behind the last band, so that it can be added in pieces of R keys
        pieces = -(-x.span // x.rows)
        room = x.first + (x.q.shape[1] - 1 + pieces) * x.rows
        dk, dv = (
            torch.zeros(t.shape[0], max(room, t.shape[1]), t.shape[2], dtype=t.dtype, device=t.device)
            for t in (x.k, x.v)
        )
        dbias = None if bias is None or not bias.requires_grad else torch.zeros_like(bias)
        own = problem.normalizer.tensors()
        totals = {id(t): torch.zeros_like(t) for t in leaves if t.requires_grad}
        for n, t0, t1 in x.chunks():
            weights = x.weights(n, t0, t1, x.of_heads(base, n))
            flat, g = weights.view(t1 - t0, rows, -1), up[n, t0:t1]
            gw = torch.empty_like(flat)
            torch.bmm(g, x.windows(x.v, n, t0, t1).transpose(1, 2), out=gw[..., sinks:])
            if sinks:
                gw[..., :sinks] = g @ x.sink_v[n].T
            _spread(dv[n], x, t0, t1, torch.bmm(flat[..., sinks:].transpose(1, 2), g))
            if sinks:
                dv[n, x.front : x.front + sinks] += _over_blocks(flat[..., :sinks], g)
            gs, gt = x.normalizer(n).vjp(weights, gw.view(weights.shape))
            for leaf, d in zip(own, gt, strict=True):
                if id(leaf) in totals:
                    target = totals[id(leaf)]
                    (target[x.heads(n)] if target.shape != d.shape else target).add_(d)
            if dbias is not None:
                part = gs[..., sinks:].sum(0)
                target = x.of_heads(dbias, n)
                target += part.sum_to_size(target.shape)
            gs = gs.view(t1 - t0, rows, -1)
            torch.bmm(gs[..., sinks:], x.windows(x.k, n, t0, t1), out=dq[n, t0:t1])
            _spread(dk[n], x, t0, t1, torch.bmm(gs[..., sinks:].transpose(1, 2), x.q[n, t0:t1]))
            if sinks:
                dq[n, t0:t1] += gs[..., :sinks] @ x.sink_k[n]
                dk[n, x.front : x.front + sinks] += _over_blocks(gs[..., :sinks], x.q[n, t0:t1])
        if bias is not None and dbias is not None:
            trained = _trainable(problem.score)
            for leaf, d in zip(trained, torch.autograd.grad(bias, trained, dbias), strict=True):
                totals[id(leaf)] += d
        real = slice(x.front, x.front + x.keys)
        return (
            x.unfold(dq, q.shape[-1]).mul(problem.scale).to(q.dtype),
            dk[:, real].reshape(k.shape).to(k.dtype),
            dv[:, real].reshape(v.shape).to(v.dtype),
            None,
            *(totals.get(id(leaf)) for leaf in leaves),
        )


def _trainable(part: Part | None) -> tuple[Tensor, ...]:
    return () if part is None else tuple(t for t in part.tensors() if t.requires_grad)


def _over_blocks(a: Tensor, b: Tensor) -> Tensor:
    """sum over blocks and rows of aᵀ b: (t, r, s), (t, r, d) -> (s, d)."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


def _spread(total: Tensor, x: _Blocks, t0: int, t1: int, bands: Tensor) -> None:
    """Add the blocks' bands (t, K, ·) to their keys; bands overlap, pieces of R keys do not."""
    for p0 in range(0, x.span, x.rows):
        size = min(x.rows, x.span - p0)
        start = x.first + t0 * x.rows + p0
        target = total[start : start + (t1 - t0) * x.rows].view(t1 - t0, x.rows, -1)
        target[:, :size] += bands[:, p0 : p0 + size]
