"""Single keys by the score of the chunk that they are in, chunks being of different lengths."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.selectors.budgets import ordered
from polyhead.attend.selectors.chunks import Chunks, even_chunks
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.selector import Listing, Selector
from polyhead.attend.selectors.visible import seen
from polyhead.checks import given, whole
from polyhead.errors import ConfigError, unknown_name
from polyhead.shapes import broadcast_shape

__all__ = ["Dhsa", "dhsa"]

Pooling = Literal["sqrt", "mean", "max"]

_POOLINGS = ("sqrt", "mean", "max")
_HELD = 1 << 22  # scores that are held at a time


class Dhsa(Listing):
    """The keys of the best chunks, and the latest. See `dhsa`."""

    keep: int
    chunks: Chunks
    pooling: Pooling = "sqrt"
    local: int = 128
    last: int = 64
    rows: int = 64

    def __post_init__(self) -> None:
        for name, least in (("keep", 1), ("local", 1), ("last", 0), ("rows", 1)):
            whole(f"dhsa: {name}", getattr(self, name), least)
        if not isinstance(self.chunks, Chunks):
            raise ConfigError(f"dhsa: chunks must be such as even_chunks(32); got {given(self.chunks)}")
        if self.pooling not in _POOLINGS:
            raise unknown_name("dhsa: pooling", self.pooling, _POOLINGS)
        if not self.rows <= self.local <= self.keep:
            raise ConfigError(
                "dhsa: local must be at least rows, so that every query reads its own key, and at most keep; "
                f"got rows={self.rows}, local={self.local} and keep={self.keep}"
            )

    @property
    def cols(self) -> int:
        return 1

    def flops(self, grid: Grid, width: int) -> int:
        pairs = grid.batch * grid.row_blocks * self.chunks.most(grid.keys)
        return self.chunks.flops(grid, width) + 2 * pairs * width

    def places(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        keys = k.to(wide).mean(1)
        starts = self.chunks.starts(q, k, mask, grid).expand(grid.batch, -1).clone()
        starts[:, 0] = True
        own = starts.cumsum(-1) - 1  # the chunk of every key
        pooled = _pooled(keys, own, grid.real, self.pooling).mT[:, None]
        queries = q.to(wide).mean(1, keepdim=True)
        everything = grid.queries > self.last
        first_full = (grid.queries - self.last) // grid.rows if everything and self.last else grid.row_blocks

        def band(start: int, stop: int) -> Tensor:
            visible = seen(mask, grid, start, stop, q.device)
            scores = grid.mean_queries(queries, start, stop) @ pooled
            scores = scores.gather(-1, own[:, None, None].expand(-1, -1, stop - start, -1))
            shape = broadcast_shape(scores.shape, visible.shape)
            scores, visible = scores.expand(shape), visible.expand(shape)
            nearest = visible & (visible.flip(-1).cumsum(-1).flip(-1) <= self.local)
            order = ordered(scores, visible, nearest)
            found = order.masked_fill(~visible.gather(-1, order), -1)
            return found if start >= first_full else found[..., : self.keep]

        step = max(1, _HELD // max(1, grid.batch * grid.keys))
        edges = sorted({*range(0, grid.row_blocks, step), first_full, grid.row_blocks})
        found = [band(start, stop) for start, stop in pairwise(edges)]
        width = max(part.shape[-1] for part in found)
        pad = torch.nn.functional.pad
        return torch.cat([pad(part, (0, width - part.shape[-1]), value=-1) for part in found], 2)


def dhsa(
    keep: int = 2048,
    chunks: Chunks | None = None,
    *,
    pooling: Pooling = "sqrt",
    local: int = 128,
    last: int = 64,
    rows: int = 64,
) -> Selector:
    """DHSA: single keys by the score of their chunk, where chunks follow the text; all heads read the same.

        k̄[c]      = √|c| · mean over j in c of mean_h k[h, j]
        score[j]  = (mean over the block's queries and heads of q) · k̄[chunk of j]
        read      = the `local` latest keys that the block of queries sees, and keep - local of best score

    and of the keys of one chunk, whose scores are equal, the latest first. The last `last` queries of a
    longer call read everything: their blocks do. Only boundaries and chunk scores take matrix products; but
    keys are ranked, S of them for every block of queries, and read as single keys. Where blocks read
    everything, the choice holds a place for every key in every block of queries: L·S/rows numbers.

    Our readings: the factor √|b| of a block of queries is left out, it changes no ranking; √|c| counts keys
    that are no padding; `local` is at least `rows`, so that every query reads its own key. In a step of
    decoding, whose block is one query, boundaries are found anew among all keys, and what is read need not be
    what the whole call would read. In a call on a text, chunks that reach beyond the block of queries know of
    later keys, which is as it should be where a prompt is read at once.

    "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs" (paper 145, arXiv
    2510.24606).

    Args:
        keep: keys that a block of queries reads, at least `local`.
        chunks: `learned_chunks(...)`, `attention_chunks(...)`; by default `even_chunks(32)`.
        pooling: of a chunk's keys: "sqrt" as above, "mean" without √|c|, or "max", feature by feature.
        local: latest keys that are read in any case, at least `rows`.
        last: queries at the end that read everything, if the call has more, padding or not; 0 for none.
        rows: length of a block of queries.
    """
    return Dhsa(keep, even_chunks(32) if chunks is None else chunks, pooling, local, last, rows)


def _pooled(keys: Tensor, own: Tensor, real: Tensor | None, pooling: Pooling) -> Tensor:
    """A key of every chunk `(B, C, D)`, of keys `(B, S, D)` in the chunks `own`; 0 of padding alone."""
    batch, length, width = keys.shape
    there = keys.new_ones(batch, length) if real is None else real.expand(batch, -1).to(keys.dtype)
    chunks = int(own.amax()) + 1
    counts = keys.new_zeros(batch, chunks).scatter_add_(1, own, there)[..., None]
    at = own[..., None].expand(-1, -1, width)
    if pooling == "max":
        shown = keys.masked_fill(there[..., None] == 0, -torch.inf)
        most = keys.new_full((batch, chunks, width), -torch.inf).scatter_reduce_(1, at, shown, "amax")
        return most.masked_fill(counts == 0, 0.0)
    shown = keys.masked_fill(there[..., None] == 0, 0.0)
    sums = keys.new_zeros(batch, chunks, width).scatter_add_(1, at, shown)
    counts = counts.clamp(min=1)
    return sums / (counts.sqrt() if pooling == "sqrt" else counts)
