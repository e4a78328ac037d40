"""Blocks of a grid of tokens, flattened row by row, as lists of runs of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.errors import ConfigError

__all__ = ["Partition"]


@dataclass(frozen=True)
class Partition:
    """A grid cut into blocks on every axis; those at the far border may be smaller.

    A run is the longest row of tokens that lie side by side, in the sequence as in every block.

    Attributes:
        grid: lengths of the axes.
        block: lengths of a block on them; an axis that is shorter is covered.
    """

    grid: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of a block, none longer than its axis."""
        return tuple(min(b, n) for b, n in zip(self.block, self.grid, strict=True))

    @property
    def axis(self) -> int:
        """The axis along which runs end: blocks cover all axes behind it."""
        part = [a for a, (b, n) in enumerate(zip(self.sizes, self.grid, strict=True)) if b < n]
        return part[-1] if part else 0

    @property
    def run(self) -> int:
        """Tokens of a run; where the first axis ends runs, the last one may be shorter."""
        return self.sizes[self.axis] * math.prod(self.grid[self.axis + 1 :])

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks along every axis."""
        return tuple(-(-n // b) for b, n in zip(self.sizes, self.grid, strict=True))

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return math.prod(self.counts)

    def check(self, owner: str) -> None:
        """Raise a `ConfigError` where runs would not be of one length."""
        axis, sizes = self.axis, self.sizes
        if axis and self.grid[axis] % sizes[axis]:
            raise ConfigError(
                f"{owner}: a block of {sizes[axis]} must divide axis {axis} of the grid, {self.grid[axis]}, "
                f"so that blocks are runs of tokens; got block={self.block} on grid={self.grid}"
            )

    def of_tokens(self, device: torch.device) -> Tensor:
        """The block of every token `(L,)`."""
        found = torch.zeros((), dtype=torch.int64, device=device)
        for n, b, count in zip(self.grid, self.sizes, self.counts, strict=True):
            found = found[..., None] * count + torch.arange(n, device=device) // b
        return found.reshape(-1)

    def of_runs(self, device: torch.device) -> Tensor:
        """The block of every run `(R,)`."""
        return self.of_tokens(device)[:: self.run]

    def tokens(self, device: torch.device) -> Tensor:
        """The tokens of every block in their order, `(blocks, tokens of the largest)`; -1 for none."""
        return _members(self.of_tokens(device), self.blocks, math.prod(self.sizes))

    def runs(self, device: torch.device) -> Tensor:
        """The runs of every block in their order, `(blocks, runs of the largest)`; -1 for none."""
        return _members(self.of_runs(device), self.blocks, -(-math.prod(self.sizes) // self.run))


def _members(of: Tensor, groups: int, most: int) -> Tensor:
    """The places of every number in `of`, ascending, as a table with -1 for none."""
    order = of.sort(stable=True).indices
    sizes = torch.bincount(of, minlength=groups)
    row = of[order]
    column = torch.arange(len(of), device=of.device) - (sizes.cumsum(0) - sizes)[row]
    found = torch.full((groups, most), -1, dtype=torch.int64, device=of.device)
    found[row, column] = order
    return found
