"""Linear maps between signs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polyhead.nn.projections import FanInLinear, OutputProjection, Projection
from polyhead.nn.straight_through import elastic_signs, slowed, weight_signs

__all__ = ["LEAST_STEP", "BinaryOutput", "BinaryProjection", "first_step"]

LEAST_STEP = 1e-5


def first_step(device: Any = None, dtype: Any = None) -> nn.Parameter:
    """The step of a signed binariser at the start: 2 mean |x| of a standard normal x."""
    return nn.Parameter(torch.full((), 2 * math.sqrt(2 / math.pi), device=device, dtype=dtype))


class BinaryLinear(FanInLinear):
    """y = step · mean |W| · sign(x + shift) sign(W - mean W)ᵀ + bias.

    Signs are multiplied by themselves, so that sums are exact integers. Gradients go straight through: to W
    as if it were what it is replaced by, to x where |x + shift| ≤ step, to the step with 1 / √(numbers of x).

    Attributes:
        shift: added to every channel of the input; zeros at the start.
        step: one number, kept above 1e-5.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(inputs, outputs, bias=bias, device=device, dtype=dtype)
        self.shift = nn.Parameter(torch.zeros(inputs, device=device, dtype=dtype))
        self.step = first_step(device, dtype)

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        step = self.step.clamp(min=LEAST_STEP)
        signs, size = weight_signs(self.weight)
        y = F.linear(elastic_signs(x + self.shift, step), signs) * (slowed(step, x.numel()) * size)
        return y if self.bias is None else y + self.bias


class BinaryProjection(Projection):
    """Queries, keys and values through `BinaryLinear`; the arguments are those of `Projection`."""

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        for name in ("query", "key", "value"):
            plain = getattr(self, name)
            kind = {"device": plain.weight.device, "dtype": plain.weight.dtype}
            made = BinaryLinear(plain.in_features, plain.out_features, bias=plain.bias is not None, **kind)
            setattr(self, name, made)


class BinaryOutput(OutputProjection):
    """Heads side by side, mapped as `BinaryLinear` maps; the arguments are those of `OutputProjection`."""

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        device, dtype = self.weight.device, self.weight.dtype
        self.shift = nn.Parameter(torch.zeros(self.in_features, device=device, dtype=dtype))
        self.step = first_step(device, dtype)

    def forward(self, heads: Float[Tensor, "B H L Dv"]) -> Float[Tensor, "B L d"]:
        return BinaryLinear.forward(self, heads.transpose(1, 2).flatten(2))  # type: ignore[arg-type]
