"""Weights in few bits, or in one."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from polyhead.attend.tile import Tile
from polyhead.attend.weight_maps import WeightMap
from polyhead.checks import whole

_ROUNDED = 64  # units in the last place by which weights that are equal may come out apart

__all__ = ["BinaryWeights", "RoundedWeights", "rounded_weights"]


class BinaryWeights(WeightMap):
    """clamp(round(w / step), 0, 1), which is 1 where w > step / 2; `step` times it passes w's gradient on.

    Half a step is met exactly where keys draw the same weight, such as by equal signs: what lies above it by
    no more than weights are rounded in their dtype counts as half, and so as 0, in decoding as in one call.

    With y = step · map(w): ∂y/∂w = 1 where 0 ≤ w ≤ step, ∂y/∂step = 1 beyond, and round(w / step) - w / step
    there.

    Attributes:
        steps: step of every row, `(B, H, L, 1)`, with 1 for a size in which they are all the same.
    """

    steps: Tensor

    keeps_zeros: ClassVar[bool] = True

    def apply(self, weights: Tensor, tile: Tile) -> Tensor:
        steps = self.steps
        for dim, own in enumerate((tile.batch_slice, tile.head_slice, tile.row_slice)):
            if steps.shape[dim] > 1:
                steps = steps.narrow(dim, own.start, own.stop - own.start)
        ratio = weights / steps.to(weights.dtype)
        value = (ratio.detach() > 0.5 + _ROUNDED * torch.finfo(ratio.dtype).eps).to(ratio.dtype)
        if not ratio.requires_grad:
            return value
        path = ratio.clamp(0, 1)
        return value + (path - path.detach())


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
