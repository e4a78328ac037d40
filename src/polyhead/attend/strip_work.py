"""The work on one strip: its operands, its scores, what the mask says of it, its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from polyhead.attend.buffers import Buffers
from polyhead.attend.normalizers import Normalizer, Softmax
from polyhead.attend.precision import wide
from polyhead.attend.problem import Problem
from polyhead.attend.stream import of_heads
from polyhead.attend.strips import Frame, Strip, strips
from polyhead.attend.tile import Tile
from polyhead.shapes import broadcast_shape

__all__ = ["Operands", "StripWork", "read", "walk"]


def _frame(q: Tensor, k: Tensor) -> Frame:
    return Frame(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.device)


@dataclass
class Operands:
    """q (N, rep, L, D), k (N, S, D) and v (N, S, Dv) of a call with N = B·G, in the wide dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    frame: Frame

    @cached_property
    def buffer(self) -> Buffers:
        """Memory for one strip, the same for all."""
        return Buffers(self.v)

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        frame, dtype = _frame(q, k), wide(q.dtype)
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

    def queries(self, strip: Strip, scale: float) -> Tensor:
        """The strip's queries (n, rep·r, D), scaled."""
        q = self.q[self.pairs(strip), :, strip.r0 : strip.r1]
        return (q * scale).reshape(q.shape[0], -1, q.shape[-1])

    def scores(self, part: StripWork) -> Tensor:
        """The strip's scaled products of queries and keys (b, h, r, c)."""
        return part.product(part.q, part.k, self.buffer("scores", part.shape))


def read(x: Tensor, pairs: slice, strip: Strip) -> Tensor:
    """The strip's keys or values (n, c, D) of all (N, S, D): a view when the columns have no gap."""
    x = x[pairs]
    if len(strip.runs) == 1:
        return x[:, strip.runs[0].start : strip.runs[0].stop]
    return torch.cat([x[:, run.start : run.stop] for run in strip.runs], dim=1)


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


@dataclass
class StripWork:
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
    def of(cls, strip: Strip, x: Operands, problem: Problem) -> StripWork:
        tile, pairs = _tile(strip, x.frame), x.pairs(strip)
        q = x.queries(strip, problem.scale)
        forbidden = dead = None
        if strip.masked is not None and problem.mask is not None:
            lo, hi = strip.masked
            allowed = problem.mask.allowed(tile.b, tile.h, tile.i, tile.j[lo:hi])
            allowed = allowed.expand(broadcast_shape(allowed.shape, (1, 1, len(tile.rows), hi - lo)))
            forbidden = ~allowed
            if not strip.alive:
                dead = forbidden.all(-1, keepdim=True)
                if dead.device.type == "cpu" and not dead.any():  # elsewhere the question would cost a wait
                    dead = None
        return cls(strip, tile, pairs, q, read(x.k, pairs, strip), read(x.v, pairs, strip), forbidden, dead)

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

    def clear(self, weights: Tensor) -> Tensor:
        """Put 0 at forbidden pairs, in place."""
        if self.forbidden is not None and self.strip.masked is not None:
            lo, hi = self.strip.masked
            weights[..., lo:hi].masked_fill_(self.forbidden, 0.0)
        return weights

    def weigh(self, scores: Tensor, normalizer: Normalizer, *, check: bool) -> Tensor:
        """Weights of the strip; rows that may look at nothing get zeros.

        `check`: a score map may have put -inf where the mask did not.
        """
        dead = self._dead(scores, check)
        weights = normalizer.weights(scores)
        return weights if dead is None else weights.masked_fill_(dead, 0.0)

    def weigh_with_lse(self, scores: Tensor, normalizer: Softmax, *, check: bool) -> tuple[Tensor, Tensor]:
        """As `weigh`, and the log-sum-exp of every row `(b, h, r)`."""
        dead = self._dead(scores, check)
        weights, lse = normalizer.weights_and_lse(scores)
        return weights if dead is None else weights.masked_fill_(dead, 0.0), lse

    def _dead(self, scores: Tensor, check: bool) -> Tensor | None:
        return (scores == float("-inf")).all(-1, keepdim=True) if check else self.dead

    def keep(self, problem: Problem, seed: int) -> Tensor | None:
        """Dropout's factors: the same numbers in forward and backward, from the seed and the place."""
        if problem.dropout == 0.0:
            return None
        s = self.strip
        generator = torch.Generator(device=self.q.device)
        generator.manual_seed(
            (seed + 0x9E3779B1 * (s.r0 + 1) + 0x85EBCA6B * s.b0 + 0xC2B2AE35 * s.g0) % 2**63
        )
        keep = torch.empty(self.shape, device=self.v.device, dtype=self.v.dtype)
        keep.bernoulli_(1.0 - problem.dropout, generator=generator)
        return keep.div_(1.0 - problem.dropout)


def walk(x: Operands, problem: Problem) -> Iterator[tuple[StripWork, Normalizer]]:
    """The strips under way, each with the normaliser for its heads."""
    for strip in strips(x.frame, problem.mask, whole_heads=problem.whole_heads, rows_back=problem.rows_back):
        part = StripWork.of(strip, x, problem)
        yield part, of_heads(problem.normalizer, part.tile.head_slice, x.frame.heads)
