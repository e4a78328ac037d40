"""A few queries of every item of a batch, real ones, that are asked in place of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.tile import Tile

__all__ = ["Probes", "even_probes", "last_probes"]


@dataclass(frozen=True)
class Probes:
    """Some queries of every item of a call.

    Attributes:
        grid: of the call.
        rows: `(B or 1, n)`, their places among the call's queries, ascending.
        there: bool of the same shape; False: the item has fewer, and this one is to count for nothing.
    """

    grid: Grid
    rows: Tensor
    there: Tensor

    @property
    def positions(self) -> Tensor:
        """Where they stand, `(B or 1, 1, n, 1)`."""
        return self.rows[:, None, :, None] + self.grid.offset

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """scale · q·k with all keys, `(B, H, n, S)`, in float32 or float64."""
        wide = torch.promote_types(q.dtype, torch.float32)
        at = self.rows[:, None, :, None].expand(len(q), q.shape[1], -1, q.shape[3])
        asked = q.gather(2, at).to(wide).unflatten(1, (self.grid.kv_heads, -1))
        return (asked @ k.to(wide)[:, :, None].mT).flatten(1, 2) * self.grid.scale

    def scored(self, logits: Tensor) -> Tensor:
        """Their logits `(B, H, n, S)` behind the call's score maps."""
        score, alike = self.grid.score, len(self.rows) == 1
        if score is None:
            return logits
        items = self.grid.batch if alike else 1
        j = torch.arange(self.grid.keys, device=logits.device)

        def row(item: int, n: int, at: int) -> Tensor:
            tile = Tile(
                batch=items,
                heads=self.grid.heads,
                rows=j.new_tensor([at + self.grid.offset]),
                cols=j,
                row_start=at,
                batch_start=item,
                consecutive=True,
            )
            return score.apply(logits[item : item + items, :, n : n + 1], tile)

        found = [
            torch.cat([row(item, n, at) for n, at in enumerate(places)], 2)
            for item, places in enumerate(self.rows.tolist())
        ]
        return torch.cat(found)

    def seen(self, mask: Mask | None) -> Tensor:
        """Which keys they may see, bool, broadcastable to `(B, H, n, S)`; one that is not there sees none."""
        there, device = self.there[:, None, :, None], self.rows.device
        if mask is None:
            return there
        b = torch.arange(self.grid.batch, device=device).view(-1, 1, 1, 1)
        h = torch.arange(self.grid.heads, device=device).view(-1, 1, 1)
        j = torch.arange(self.grid.keys, device=device)
        return there & mask.allowed(b, h, self.positions, j)


def last_probes(grid: Grid, count: int, device: torch.device) -> Probes:
    """The last `count` real queries of every item."""
    real = _real(grid, device)
    rows = real.to(torch.uint8).sort(dim=-1, stable=True).indices[:, -min(count, grid.queries) :]
    return Probes(grid, rows, real.gather(1, rows))


def even_probes(grid: Grid, count: int, device: torch.device) -> Probes:
    """`count` real queries of every item, the first, the last and those at even distances between them."""
    real = _real(grid, device)
    order = (~real).to(torch.uint8).sort(dim=-1, stable=True).indices
    number = real.sum(-1, keepdim=True)
    asked = number.clamp(max=count)
    place, parts = torch.arange(min(count, grid.queries), device=device), (asked - 1).clamp(min=1)
    rank = (2 * place * (number - 1) + parts) // (2 * parts)  # rounded
    there = place < asked
    return Probes(grid, order.gather(1, rank.masked_fill(~there, 0)), there)


def _real(grid: Grid, device: torch.device) -> Tensor:
    real = grid.real_queries
    return torch.ones(1, grid.queries, dtype=torch.bool, device=device) if real is None else real
