"""Blocks scored twice: by the fast features of rotary positions, and by the slow ones."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from polyhead.attend.masks import sink, window
from polyhead.attend.selectors.budgets import keep_mass
from polyhead.attend.selectors.fixed import fixed
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.ranked import select
from polyhead.attend.selectors.scorers import Scorer, Scores, mean_of_blocks
from polyhead.attend.selectors.selector import Selector
from polyhead.checks import flag, number
from polyhead.errors import ShapeError, unknown_name

__all__ = ["BandMeans", "band_means", "prism"]


class BandMeans(Scorer):
    """scale · √(D/d) / t · mean(q) · mean(k) over d of the D features. See `band_means`."""

    band: Literal["high", "low"]
    share: float
    calibrated: bool = True
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.band not in ("high", "low"):
            raise unknown_name("band_means: band", self.band, ("high", "low"))
        object.__setattr__(self, "share", number("band_means: share", self.share, above=0, most=1))
        flag("band_means: calibrated", self.calibrated)
        flag("band_means: interleaved", self.interleaved)

    def features(self, width: int, device: torch.device) -> Tensor:
        """The features of the band, of a head of this width."""
        if width % 2:
            raise ShapeError(f"band_means: features are turned in pairs, but heads are {width} wide")
        pairs = width // 2
        taken = max(1, round(self.share * pairs))
        first = 0 if self.band == "high" else pairs - taken
        pair = torch.arange(first, first + taken, device=device)
        return torch.cat([2 * pair, 2 * pair + 1] if self.interleaved else [pair, pair + pairs])

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        own = self.features(q.shape[-1], q.device)
        queries, keys = grid.mean_queries(q, 0, grid.row_blocks), mean_of_blocks(k, grid)
        wide = torch.promote_types(keys.dtype, torch.float32)
        queries, keys = queries.to(wide), keys.to(wide)
        part = math.sqrt(len(own) / q.shape[-1])
        if self.calibrated:
            asked, real = queries, grid.real_queries
            if real is not None:  # what stands at padding must not count
                shown = torch.where(real[:, None, :, None], q, 0.0)
                asked = grid.mean_queries(shown, 0, grid.row_blocks).to(wide)
            t = part * _kept(asked, own) * grid.spread(_kept(keys, own))
            queries = torch.where(t > 0, queries / t, 0.0)
        queries = queries[..., own] * (grid.scale / part)
        keys = keys[..., own]

        def scores(start: int, stop: int) -> Tensor:
            return grid.products(queries[:, :, start:stop], keys)

        return scores


def _kept(means: Tensor, own: Tensor) -> Tensor:
    """Root mean square of the means in a band, by that of all features: `(B, H, 1, 1)`; 0 where all are 0."""
    band, every = (x.square().mean((2, 3), keepdim=True).sqrt() for x in (means[..., own], means))
    return (band / every).nan_to_num(0.0)


def band_means(
    band: Literal["high", "low"], share: float, *, calibrated: bool = True, interleaved: bool = False
) -> Scorer:
    """A block is worth the product of its mean key and the mean query in the fast or the slow features.

        scale · √(D/d) / t · q̄_band · k̄_band,      t = √(d/D) · r(q̄_band)/r(q̄) · r(k̄_band)/r(k̄)

    d is the width of the band, r the root mean square over all blocks of a sequence's head. Rotary positions
    turn a pair of features by the angle θ a token, and the mean over C tokens shrinks it by

        |sin(C·θ/2) / (C·sin(θ/2))|

    so that plain `mean_keys` hardly sees the fast pairs, which say how near a key is. Alone, at the
    temperature t that pooling has left them, they are seen. With share 1 it is `mean_keys()`.

    The temperature is taken over all blocks of the call, later ones among them.

    Args:
        band: "high", the fastest pairs, or "low", the slowest.
        share: of the pairs, above 0 and at most 1.
        calibrated: False for t = 1.
        interleaved: pairs are the features (2m, 2m + 1), as in `rope(interleaved=True)`; else (m, m + D/2).
    """
    return BandMeans(band, share, calibrated, interleaved)


def prism(
    mass: float = 0.95,
    *,
    high: float = 0.5,
    low: float = 0.75,
    calibrated: bool = True,
    interleaved: bool = False,
    rows: int = 128,
    cols: int = 128,
) -> Selector:
    """Prism: what the fast and what the slow features of rotary positions read, each until it has `mass`.

        select(band_means("high", high), keep_mass(mass)) | select(band_means("low", low), keep_mass(mass))
            | fixed(sink(1) | window(0))

    The first block and the query's own are always read besides. For queries and keys that their positions
    have turned. "Prism: Spectral-Aware Block-Sparse Attention" (paper 064); there a last, shorter block is
    filled up with zeros before it is pooled, here it is the mean of what it has; and its decoding is dense,
    here that is `ph.sparse(..., decode=False)`.

    Args:
        mass: 0 to 1 of each band's softmax; 1 reads everything.
        high, low: shares of the pairs in the bands, which may overlap; the paper takes 64 and 96 of 128.
        calibrated, interleaved: see `band_means`.
        rows, cols: length of a block of queries and of keys.
    """

    def of(band: Literal["high", "low"], share: float) -> Selector:
        share = number(f"prism: {band}", share, above=0, most=1)
        scorer = band_means(band, share, calibrated=calibrated, interleaved=interleaved)
        return select(scorer, keep_mass(mass), rows=rows, cols=cols)

    return of("high", high) | of("low", low) | fixed(sink(1) | window(0), rows=rows, cols=cols)
