"""A mask of blocks that were chosen: which blocks of keys each block of queries of each head reads."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.masks.algebra import Bounds, Mask
from polyhead.attend.masks.checks import brief
from polyhead.checks import FARTHEST, given, is_integer_tensor, whole
from polyhead.errors import ConfigError, ShapeError
from polyhead.shapes import broadcast_shape

__all__ = ["Chosen", "chosen"]

_TABLE = 1 << 26  # blocks by blocks that are counted in advance; of more, a tile says that it does not know


class Chosen(Mask):
    """Blocks of keys that were picked for blocks of queries. See `chosen`."""

    index: Tensor
    rows: int
    cols: int
    first: int = 0

    def __post_init__(self) -> None:
        if not is_integer_tensor(self.index) or self.index.ndim != 4:
            raise ConfigError(
                "chosen: index must be an integer tensor (B, H, blocks of queries, K), with -1 where fewer "
                f"than K blocks are chosen; got {given(self.index)}"
            )
        for name in ("rows", "cols"):
            whole(f"chosen: {name}", getattr(self, name), 1)
        whole("chosen: first", self.first, -FARTHEST)

    def __repr__(self) -> str:
        first = f", first={self.first}" if self.first else ""
        return f"chosen({brief(self.index)}, rows={self.rows}, cols={self.cols}{first})"

    @cached_property
    def _ascending(self) -> Tensor:
        return self.index.to(torch.int64).sort(-1).values

    @cached_property
    def _counts(self) -> Tensor | None:
        """How many chosen blocks stand above and left of a corner, `(B, H, blocks + 1, blocks + 1)`."""
        index = self._ascending
        width = int(index.amax()) + 1 if index.numel() else 0
        if index.shape[:3].numel() * width > _TABLE:
            return None
        table = index.new_zeros(*index.shape[:3], width + 1)  # the last column takes the -1
        table.scatter_(-1, index.masked_fill(index < 0, width), 1)
        return F.pad(table[..., :width].cumsum(-1).cumsum(-2), (1, 0, 1, 0))

    def _place(self, b: Tensor, h: Tensor, i: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch item, head and block of a query in `index`, and whether there is such a block."""
        item = b if self.index.shape[0] != 1 else torch.zeros_like(b)
        head = h if self.index.shape[1] != 1 else torch.zeros_like(h)
        block = (i - self.first) // self.rows
        there = (block >= 0) & (block < self.index.shape[2])
        return item, head, block.clamp(0, max(self.index.shape[2] - 1, 0)), there

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        chosen = self._ascending.to(j.device)
        if not chosen.numel():
            return torch.zeros((), dtype=torch.bool, device=j.device)
        # neighbours share blocks: each block of queries is asked for each block of keys once
        blocks, back = j // self.cols, None
        if j.ndim == 1:
            blocks, back = blocks.unique_consecutive(return_inverse=True)
        item, head, block, there = self._place(b, h, i)
        around = broadcast_shape(item.shape, head.shape, block.shape)
        shape = broadcast_shape(around, blocks.shape)
        own = chosen[item, head, block]
        if len(around) and around[-1] == 1 and len(shape) > 1:
            own, wanted = own.squeeze(-2), blocks.expand(shape)  # one list for a whole row of keys
        else:
            wanted = blocks.expand(shape)[..., None]
        own = own.expand(*wanted.shape[:-1], own.shape[-1]).contiguous()
        at = torch.searchsorted(own, wanted.contiguous()).clamp(max=own.shape[-1] - 1)
        found = (own.gather(-1, at) == wanted).view(shape) & there
        return found if back is None else found[..., back]

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        counts = self._counts
        if counts is None:
            known = torch.ones((), dtype=torch.bool, device=j0.device)
            return known, ~known
        counts = counts.to(j0.device)
        width = counts.shape[-1] - 1
        item, head, top, there0 = self._place(b, h, i0)
        _, _, bottom, there1 = self._place(b, h, i1)
        left, right = (j0 // self.cols).clamp(max=width), (j1 // self.cols).clamp(max=width - 1)
        inside = (
            counts[item, head, bottom + 1, right + 1]
            - counts[item, head, top, right + 1]
            - counts[item, head, bottom + 1, left]
            + counts[item, head, top, left]
        )
        size = (bottom - top + 1) * (j1 // self.cols - j0 // self.cols + 1)
        # rows before the first block or behind the last one see nothing
        return (inside > 0) & (i1 >= self.first), (inside == size) & there0 & there1

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        blocks, own = -(-queries // self.rows), self.index.shape
        if own[0] not in (1, batch) or own[1] not in (1, heads) or own[2] != blocks:
            raise ShapeError(
                f"chosen: index has shape {tuple(own)}, but the call has {batch} batch items, {heads} heads "
                f"and {blocks} blocks of {self.rows} queries"
            )
        if self.first != offset:
            raise ShapeError(
                f"chosen: first must be the position that the call gives its first query, {offset}; "
                f"got {self.first}"
            )
        there = -(-keys // self.cols)
        if self.index.numel() and not -1 <= int(self.index.amin()) <= int(self.index.amax()) < there:
            raise ShapeError(
                f"chosen: index must hold blocks 0..{there - 1} of {self.cols} keys, or -1 for none; it "
                f"holds {int(self.index.amin())}..{int(self.index.amax())}"
            )


def chosen(index: Tensor, *, rows: int, cols: int, first: int = 0) -> Chosen:
    """Queries of block m read the keys of the blocks `index[b, h, m]`, and no others.

    Query r of the call is in block r // rows, key j in block j // cols; the last blocks may be shorter. What
    is allowed within a block is for other masks to say: `causal() & chosen(...)`.

    Args:
        index: integer `(B or 1, H or 1, blocks of queries, K)`; distinct blocks of keys, in any order, and -1
            where fewer than K are chosen.
        rows, cols: length of a block of queries and of keys.
        first: position of the call's first query, S - L for S keys and L queries.
    """
    return Chosen(index, rows, cols, first)
