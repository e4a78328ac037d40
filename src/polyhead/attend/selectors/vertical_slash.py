"""Whole columns and whole diagonals of the attention map, found by its last rows."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.selectors.budgets import heads_fit, per_head
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.probes import Probes, last_probes
from polyhead.attend.selectors.selector import Kept, Selector
from polyhead.checks import whole

__all__ = ["VerticalSlash", "vertical_slash"]


class VerticalSlash(Selector):
    """The keys and the distances that get most of what the last queries give. See `vertical_slash`."""

    verticals: int | Tensor
    slashes: int | Tensor
    first: int = 30
    nearest: int = 100
    probes: int = 64
    rows: int = 64
    cols: int = 16

    def __post_init__(self) -> None:
        for name in ("verticals", "slashes"):
            own = per_head(f"vertical_slash: {name}", getattr(self, name), 1, None, True)
            object.__setattr__(self, name, own)
        whole("vertical_slash: first", self.first, 0)
        for name in ("nearest", "probes", "rows", "cols"):
            whole(f"vertical_slash: {name}", getattr(self, name), 1)

    def check(self, heads: int) -> None:
        heads_fit("vertical_slash: verticals", self.verticals, heads)
        heads_fit("vertical_slash: slashes", self.slashes, heads)

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        columns, diagonals = _sums(q, k, mask, last_probes(grid, self.probes, q.device))
        if grid.real is None:
            columns[..., : self.first] = torch.inf
        else:  # the first keys of the text itself, behind padding on the left
            first = (grid.real & (grid.real.cumsum(-1) <= self.first))[:, None]
            columns = columns.masked_fill(~grid.real[:, None], -torch.inf).masked_fill(first, torch.inf)
        diagonals[..., : self.nearest] = torch.inf
        verticals = _best(columns, self.verticals)
        held = grid.blocks_of_keys(verticals[..., None].float())[..., 0].any(-1)  # (B, H, N)
        # how many of the distances below a number are read, (B, H, S + 1)
        below = torch.nn.functional.pad(_best(diagonals, self.slashes).long().cumsum(-1), (1, 0))
        left = torch.arange(grid.col_blocks, device=q.device) * grid.cols
        right = (left + grid.cols).clamp(max=grid.keys) - 1

        def kept(start: int, stop: int, visible: Tensor) -> Tensor:
            row = torch.arange(start, stop, device=q.device)[:, None] * grid.rows
            last = (row + grid.rows).clamp(max=grid.queries) - 1
            least = (row + grid.offset - right).clamp(0, grid.keys)
            most = (last + grid.offset - left + 1).clamp(0, grid.keys)
            crossed = below[..., torch.maximum(least, most)] > below[..., least]
            return (crossed | held[:, :, None]) & visible

        return kept


def vertical_slash(
    verticals: int | Tensor = 1000,
    slashes: int | Tensor = 6096,
    *,
    first: int = 30,
    nearest: int = 100,
    probes: int = 64,
    rows: int = 64,
    cols: int = 16,
) -> Selector:
    """Columns and diagonals of the attention map that hold most of the last queries' attention.

        A     = softmax of the last `probes` queries over all keys, causal
        keys j         with the largest Σ_i A[i, j]        are read by every query
        distances s    with the largest Σ_i A[i, i - s]    are read by every query i: the key i - s

    A block of queries reads the blocks of keys that hold such a key, or through which such a diagonal passes
    within its rows. With `cols=1` columns are read alone, and a diagonal as the `rows` keys that it crosses,
    as the authors' kernel does; wider blocks read more of their
    surroundings, and are gathered faster.

    Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse
    Attention", arXiv 2407.02490. There every head has numbers, or another pattern, that a search found for it
    in advance.

    Args:
        verticals: keys that are read; or a tensor `(H,)`, one number a head.
        slashes: distances that are read; or a tensor `(H,)`.
        first: keys at the start, padding not counted, that are taken first, and count among `verticals`.
        nearest: distances from 0 that are taken first, and count among `slashes`; at least 1.
        probes: the last queries that are asked, padding not counted, 1/L of the cost of dense scores each.
        rows, cols: length of a block of queries and of keys.
    """
    return VerticalSlash(verticals, slashes, first, nearest, probes, rows, cols)


def _sums(q: Tensor, k: Tensor, mask: Mask | None, probes: Probes) -> tuple[Tensor, Tensor]:
    """What some queries give to every key and to every distance, `(B, H, S)` each."""
    away = probes.positions - torch.arange(k.shape[2], device=q.device)
    seen = probes.seen(mask) & (away >= 0)
    weights = probes.logits(q, k).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    diagonals = torch.zeros_like(weights[:, :, 0])
    away = away.clamp(min=0).flatten(1).expand(len(q), -1)  # the future weighs nothing
    for own, item, given in zip(diagonals, away, weights.flatten(2), strict=True):
        own.index_add_(-1, item, given)
    return weights.sum(2), diagonals


def _best(sums: Tensor, count: int | Tensor) -> Tensor:
    """Where the largest are, of equal ones the first: bool of the same shape."""
    order = sums.sort(dim=-1, descending=True, stable=True).indices
    number = torch.as_tensor(count, device=sums.device).view(-1, 1)
    taken = torch.arange(sums.shape[-1], device=sums.device) < number
    return torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, order, taken.expand_as(order))
