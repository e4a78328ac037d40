"""Noise on weights, where the heads of a group look at the same."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from polyhead.attend.precision import wide
from polyhead.attend.tile import Tile
from polyhead.attend.weight_maps import WeightMap
from polyhead.checks import number, whole

__all__ = ["PerturbedWeights"]

# odd, and far from one another: multipliers of b, h, i and j, and of two rounds of mixing
_PLACES = (0x2545F4914F6CDD1D, 0x1B873593CC9E2D51, 0x27D4EB2F165667C5, 0x165667B19E3779F9)
_ROUNDS = (0x4F51AFD7ED558CCD, 0x44CEB9FE1A85EC53)


class PerturbedWeights(WeightMap):
    """w_hij - strength · s_hi · z_hij / n_i for pairs that are seen, but those with j = i.

    z is standard normal, n_i the number of keys that are seen, and s_hi the mean cosine of row i of head h
    and that of each other head of its group: heads that differ, or are alone in their group, are left as
    they are. s is a constant to the gradient. z is made of the seed and the indices of the pair: the same in
    every pass over the same call, whatever the tiles.

    Attributes:
        group: heads in a row that are a group.
        strength: of the noise.
        seed: int64 scalar.
    """

    group: int
    strength: float
    seed: Tensor

    whole_heads: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole("group", self.group, 1)
        number("strength", self.strength, least=0)

    def apply(self, weights: Tensor, tile: Tile) -> Tensor:
        if self.group == 1:
            return weights
        rows = weights.detach()
        seen = rows != 0
        size = self.strength * self.likeness(rows) / seen.sum(-1).clamp(min=1)
        noise = self.noise(tile).to(weights.dtype) * size[..., None]
        return weights - noise.masked_fill(~(seen & (tile.i != tile.j)), 0.0)

    def likeness(self, weights: Tensor) -> Tensor:
        """s, `(B, H, r)`, from 0 to 1."""
        each = weights.unflatten(1, (-1, self.group))
        unit = each / each.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(each.dtype).tiny)
        others = unit.sum(2, keepdim=True) - unit
        return ((unit * others).sum(-1) / (self.group - 1)).clamp(0, 1).flatten(1, 2)

    def noise(self, tile: Tile) -> Tensor:
        """z, `(B, H, r, c)`."""
        key = self.seed.to(tile.rows.device)
        for place, many in zip((tile.b, tile.h, tile.i, tile.j), _PLACES, strict=True):
            key = key + place * many
        for many in _ROUNDS:
            key = (key ^ (key >> 29)) * many
        key = key ^ (key >> 32)
        low, high = (key & 0x7FFFFFFF), (key >> 31) & 0x7FFFFFFF
        dtype = wide(torch.get_default_dtype())
        radius = (-2 * ((low.to(dtype) + 1) / (2**31 + 1)).log()).clamp(min=0).sqrt()
        return radius * (high.to(dtype) * (2 * math.pi / 2**31)).cos()
