"""Neighbourhoods on a grid by torch's fused kernel on a CPU, tile by tile.

The queries of a box of the grid see keys within a box; both are gathered, and the kernel is given one small
table of who sees what for all tiles that are alike. Every query is in one tile, with all its keys: there is
nothing to merge. A dilated neighbourhood is as many neighbourhoods as there are remainders, each on its own
places. Memory is O(L), and the work O(L) windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.fused_cpu import HIDDEN, fused, fused_backward, unfit
from polyhead.attend.grid_tiles import kinds, sizes
from polyhead.attend.masks import Mask, Neighborhood, all_of, terms_of
from polyhead.attend.plan import Request
from polyhead.attend.precision import wide
from polyhead.attend.problem import Problem
from polyhead.attend.stream import stream
from polyhead.shapes import broadcast_shape

__all__ = ["Neighborhoods"]

_BYTES = 1 << 22  # of gathered keys and values, or of a table: more does not stay in the cache of a core


class Neighborhoods:
    """Plain softmax over the neighbourhoods of a whole grid, and other masks besides, on a CPU."""

    name = "neighborhood"
    dense = False
    opt_in = ""

    def refuse(self, request: Request) -> str:
        q, k, problem = request.q, request.k, request.problem
        found = _split(problem.mask)
        if found is None:
            return f"{problem.mask} is not a neighborhood, joined by & with other masks"
        reason = unfit(request)
        if reason:
            return reason
        places = found[0].places
        if not q.shape[2] == k.shape[2] == places:
            return f"it takes the whole grid of {places} places; got {q.shape[2]} queries, {k.shape[2]} keys"
        if 0 in (*q.shape, *k.shape, *request.v.shape):
            return "it does not define attention over nothing"
        return ""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        return stream(
            self, request.q, request.k, request.v, request.problem, seed=0, want_lse=request.want_lse
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, seed: int, want_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        call = _Call(q, k, v, problem, max(q.shape[-1], v.shape[-1]))
        out = call.rows(q.new_empty(*q.shape[:3], v.shape[-1]))
        lse = call.rows(q.new_empty(*q.shape[:3], 1, dtype=wide(q.dtype)))
        for part in call.parts():
            own, total = part.attend()
            if call.rest is not None:
                nothing = _nothing(total)
                own = own.masked_fill(nothing[..., None], 0.0)
                total = total.masked_fill(nothing, -math.inf)
            part.store(out, own)
            if want_lse:
                part.store(lse, total[..., None])
        return out.view(*q.shape[:3], -1), lse.view(q.shape[:3]) if want_lse else None

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        problem: Problem,
        grad: Tensor,
        grad_lse: Tensor | None,
        *,
        seed: int,
    ) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
        # From the gradient of each weight of a row the kernel takes the sum of grad · out. A column more, in
        # which values are 0, grad is 1 and out is -grad_lse, so adds the gradient of the log-sum-exp.
        width = v.shape[-1]
        if grad_lse is not None:
            one = torch.ones_like(grad[..., :1])
            grad, width = torch.cat([grad, one], -1), width + 1
        call = _Call(q, k, v, problem, max(q.shape[-1], width))
        up = call.flat(grad)
        up_lse = None if grad_lse is None else call.flat(grad_lse[..., None].to(q.dtype), pad=False)
        dq = call.rows(torch.empty_like(q, memory_format=torch.contiguous_format))
        dk, dv = (call.cols(torch.zeros_like(x, dtype=wide(x.dtype))) for x in (k, v))
        for part in call.parts():
            own, lse = part.attend()
            g = part.rows_of(up)
            if up_lse is not None:
                own = own.clone()
                own[..., width - 1 : width] = -part.rows_of(up_lse)
            if call.rest is not None:
                nothing = _nothing(lse)
                g, lse = g.masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, 0.0)
            found = fused_backward(g, part.q, part.k, part.v, own, lse, part.added, problem.scale)
            part.store(dq, found[0])
            part.add(dk, found[1])
            part.add(dv, found[2])
        return dq.view(q.shape), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), {}


class _Call:
    """A call by key/value heads of all batch items, N of them: queries `(N, rep·L, W)`, keys `(N, L, W)`.

    W is the width of the kernel, which wants values as wide as keys.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem, width: int) -> None:
        found = _split(problem.mask)
        assert found is not None
        self.mask, self.rest = found
        self.scale, self.width = problem.scale, width
        self.heads, self.kv_heads = q.shape[1], k.shape[1]
        self.repeat, self.count, self.length = (
            self.heads // self.kv_heads,
            k.shape[0] * k.shape[1],
            k.shape[2],
        )
        self.q, self.k, self.v = map(self.flat, (q, k, v))

    def flat(self, x: Tensor, pad: bool = True) -> Tensor:
        """`(B, H or G, L, ·)` as `(N, L or rep·L, W)`."""
        x = x.reshape(self.count, -1, x.shape[-1])
        return F.pad(x, (0, self.width - x.shape[-1])) if pad and x.shape[-1] < self.width else x

    def rows(self, x: Tensor) -> Tensor:
        """A contiguous `(B, H, L, ·)` as `(N, rep, *grid, ·)`."""
        return x.view(self.count, self.repeat, *self.mask.grid, x.shape[-1])

    def cols(self, x: Tensor) -> Tensor:
        """`(B, G, L, ·)` as `(N, *grid, ·)`."""
        return x.reshape(self.count, *self.mask.grid, x.shape[-1])

    def parts(self) -> Iterator[_Part]:
        """Every query of every head once."""
        axes = tuple(self.mask.axes())
        together = torch.arange(self.repeat)[:, None] * self.length
        for kind in kinds(axes, sizes(axes, self.count * self.repeat)):
            rows, cols = kind.queries(self.mask.grid), kind.keys(self.mask.grid)
            boxes = tuple(zip(kind.boxes("queries"), kind.boxes("keys"), strict=True))
            table = kind.table()
            added = None if table is None or self.rest is not None else self._added(table)[None, None]
            held = 2 * cols.shape[1] * self.width * self.k.element_size()
            if self.rest is not None:  # a table for each
                held += self.repeat * rows.shape[1] * cols.shape[1] * wide(self.q.dtype).itemsize
            most = max(1, _BYTES // held)
            heads, tiles = max(1, most // len(boxes)), min(most, len(boxes))
            for t in range(0, len(boxes), tiles):
                at = slice(t, t + tiles)
                index = (rows[at, None] + together).view(-1), cols[at].reshape(-1)
                for n in range(0, self.count, heads):
                    own = slice(n, min(n + heads, self.count))
                    if self.rest is not None:
                        added = self._added(self._visible(own, rows[at], cols[at], table)).flatten(0, 1)
                    yield _Part(self, own, boxes[at], *index, added)

    def _added(self, table: Tensor) -> Tensor:
        return torch.zeros(table.shape, dtype=wide(self.q.dtype)).masked_fill_(~table, HIDDEN)

    def _visible(self, own: slice, rows: Tensor, cols: Tensor, table: Tensor | None) -> Tensor:
        """Who sees what of some heads and tiles, `(N, tiles, rep or 1, r, n)`."""
        assert self.rest is not None
        n = torch.arange(own.start, own.stop).view(-1, 1, 1, 1, 1)
        h = n % self.kv_heads * self.repeat + torch.arange(self.repeat).view(-1, 1, 1)
        seen = self.rest.allowed(n // self.kv_heads, h, rows[:, None, :, None], cols[:, None, None, :])
        seen = seen if table is None else seen & table
        shape = broadcast_shape(seen.shape, (len(n), len(rows), 1, rows.shape[1], cols.shape[1]))
        return seen.expand(shape)


@dataclass
class _Part:
    """Some tiles of one kind, of some heads: M of them, `(M, rep, r, W)` and `(M, 1, n, W)`."""

    call: _Call
    own: slice
    boxes: tuple[tuple[tuple[slice, ...], tuple[slice, ...]], ...]
    rows: Tensor  # (tiles · rep · r)
    cols: Tensor  # (tiles · n)
    added: Tensor | None

    def rows_of(self, x: Tensor) -> Tensor:
        """Rows of an `x` that is laid out as the queries."""
        found = x[self.own].index_select(1, self.rows)
        return found.view(found.shape[0] * len(self.boxes), self.call.repeat, -1, x.shape[-1])

    def _cols_of(self, x: Tensor) -> Tensor:
        found = x[self.own].index_select(1, self.cols)
        found = found.view(found.shape[0] * len(self.boxes), 1, -1, x.shape[-1])
        return found.expand(-1, self.call.repeat, -1, -1)

    @cached_property
    def q(self) -> Tensor:
        """The queries."""
        return self.rows_of(self.call.q)

    @cached_property
    def k(self) -> Tensor:
        """Their keys."""
        return self._cols_of(self.call.k)

    @cached_property
    def v(self) -> Tensor:
        """Their values."""
        return self._cols_of(self.call.v)

    def attend(self) -> tuple[Tensor, Tensor]:
        """Output `(M, rep, r, W)` and log-sum-exp `(M, rep, r)`."""
        return fused(self.q, self.k, self.v, self.added, self.call.scale)

    def store(self, target: Tensor, found: Tensor) -> None:
        """Put `(M, rep, r, ·)` into a grid `(N, rep, *grid, ·)`, which may be narrower."""
        found = found[..., : target.shape[-1]].unflatten(0, (-1, len(self.boxes)))
        for t, (box, _) in enumerate(self.boxes):
            there = target[(self.own, slice(None), *box)]
            there.copy_(found[:, t].reshape(there.shape))

    def add(self, target: Tensor, found: Tensor) -> None:
        """Add `(M, rep, n, ·)`, over all rep, to a grid `(N, *grid, ·)`, which may be narrower."""
        found = found[..., : target.shape[-1]]
        found = found.sum(1) if self.call.repeat > 1 else found[:, 0]
        found = found.unflatten(0, (-1, len(self.boxes)))
        for t, (_, box) in enumerate(self.boxes):
            there = target[(self.own, *box)]
            there += found[:, t].reshape(there.shape)


def _split(mask: Mask | None) -> tuple[Neighborhood, Mask | None] | None:
    """The first neighbourhood among masks joined by &, and the others; None if there is none."""
    terms = terms_of(mask)
    for n, term in enumerate(terms):
        if isinstance(term, Neighborhood):
            return term, all_of(terms[:n] + terms[n + 1 :])
    return None


def _nothing(lse: Tensor) -> Tensor:
    """Rows that see nothing."""
    return lse < HIDDEN / 2
