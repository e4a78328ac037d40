"""Regions of a grid of tokens choose regions, by their mean queries and mean keys.

q̄_r, k̄_s = means of q over region r and of k over region s, all heads side by side
S_r = the `top_k` regions s with the largest q̄_r · k̄_s;   tokens of r read all tokens of S_r
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.selectors.budgets import ordered
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.partition import Partition
from polyhead.attend.selectors.selector import Listing
from polyhead.checks import given, several, whole
from polyhead.errors import ConfigError, ShapeError

__all__ = ["RegionRouting", "region_routing"]


class RegionRouting(Listing):
    """Regions of a grid that choose regions. See `region_routing`."""

    region: int
    top_k: int
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        whole("region_routing: region", self.region, 1)
        whole("region_routing: top_k", self.top_k, 1)
        if self.grid is None:
            return
        if not several(self.grid) or len(self.grid) != 2:
            raise ConfigError(
                f"region_routing: grid must be (height, width) in tokens; got {given(self.grid)}"
            )
        object.__setattr__(self, "grid", tuple(whole("region_routing: grid", n, 1) for n in self.grid))
        if self.grid[1] % self.region:
            raise ConfigError(
                f"region_routing: region must divide the width of the grid, {self.grid[1]}, so that regions "
                f"are runs of tokens; got {self.region}"
            )

    @property
    def rows(self) -> int:
        return self.region if self.grid is None else self._regions(0).run

    @property
    def cols(self) -> int:
        return self.rows

    def _regions(self, tokens: int) -> Partition:
        grid = (tokens,) if self.grid is None else self.grid
        return Partition(grid, (self.region,) * len(grid))

    def places(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        if grid.queries != grid.keys or (self.grid is not None and grid.keys != self.grid[0] * self.grid[1]):
            wanted = "as many queries as keys" if self.grid is None else "the tokens of " + repr(self)
            raise ShapeError(
                f"region_routing takes {wanted}; the call has {grid.queries} queries and {grid.keys} keys"
            )
        at = self._regions(grid.keys)
        own, count = at.of_tokens(q.device), at.blocks
        real = own.new_ones(1, len(own), dtype=torch.bool) if grid.real is None else grid.real
        sizes = torch.zeros(len(real), count, device=q.device).index_add_(1, own, real.float())
        means = (_sums(x, own, real, count) / sizes.clamp(min=1)[:, None, :, None] for x in (q, k))
        queries, keys = (x.transpose(1, 2).flatten(2) for x in (next(means), grid.spread(next(means))))
        there = (sizes > 0)[:, None].expand(grid.batch, count, count)
        best = ordered(queries @ keys.mT, there, torch.zeros_like(there))[..., : self.top_k]  # B R K
        best = best.masked_fill(~there.gather(-1, best), -1)
        runs = at.runs(q.device)[best.clamp(min=0)].masked_fill((best < 0)[..., None], -1)  # B R K tall
        return runs.flatten(2)[:, None, at.of_runs(q.device)]

    def flops(self, grid: Grid, width: int) -> int:
        at = self._regions(grid.keys)
        return 2 * grid.batch * grid.heads * at.blocks**2 * width


def _sums(x: Tensor, own: Tensor, real: Tensor, count: int) -> Tensor:
    """Sums of the real tokens of every region, `(B, H, L, D)` to `(B, H, count, D)`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = torch.where(real[:, None, :, None], x, 0.0)
    return x.new_zeros(*x.shape[:2], count, x.shape[3]).index_add_(2, own, x)


def region_routing(region: int, top_k: int, grid: tuple[int, int] | None = None) -> RegionRouting:
    """Every region of P × P tokens reads the `top_k` regions whose mean keys suit its mean query best.

    One choice for all heads: means of all heads are taken side by side. Queries and keys are those of the
    same tokens. A region is chosen by what stands anywhere in it, so this is not for causal calls. Padding
    has no part in means, and regions of nothing else are not chosen. Of other masks the choice knows nothing:
    what they hide stays hidden, be it all that was chosen. Regions at the lower border may be smaller. Of
    equal regions the later is taken.

    It costs ⌈L/P²⌉² products as wide as all heads; then L · top_k · P² pairs are read. On a grid the choice
    is of runs of P tokens, which are P of its rows for a region.

    Paper 027: BiFormer, arXiv 2303.08810.

    Args:
        region: P, the side of a region; a divisor of the grid's width.
        top_k: regions that are read, all where there are fewer.
        grid: height and width in tokens, row by row; None: a sequence in runs of P tokens.
    """
    return RegionRouting(region, top_k, grid)
