"""Weights in few bits."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from polyhead.attend.tile import Tile
from polyhead.attend.weight_maps import WeightMap
from polyhead.checks import whole

__all__ = ["RoundedWeights", "rounded_weights"]


class RoundedWeights(WeightMap):
    """round(w (2^bits - 1)) / (2^bits - 1), clamped to 0..1; the gradient is passed on in 0..1."""

    bits: int = 8

    keeps_zeros: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole("bits", self.bits, 1, 16)

    def apply(self, weights: Tensor, tile: Tile) -> Tensor:
        levels = 2**self.bits - 1
        value = (weights.detach() * levels).round_().clamp_(0, levels).div_(levels)
        if not weights.requires_grad:
            return value
        path = weights.clamp(0, 1)
        return value + (path - path.detach())


def rounded_weights(bits: int = 8) -> RoundedWeights:
    """Weights rounded to 2^bits levels from 0 to 1, trained straight through: sums may differ from 1."""
    return RoundedWeights(bits)
