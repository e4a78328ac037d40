"""Rotary position embedding: queries and keys are turned by angles that grow with the position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyhead.checks import flag, given, number
from polyhead.errors import ConfigError
from polyhead.nn.positions.base import Position, widest
from polyhead.nn.positions.scaling import RopeScaling, scaling_from_parameters

__all__ = ["Rope", "rope", "rope_from_parameters"]


class Rope(Position):
    """Rotation of pairs of coordinates by p·ω_m, ω_m = base^(-2m/D'). Paper: RoFormer, arXiv 2104.09864.

    Attributes:
        base: of the geometric row of frequencies, above 1. Default 10000.
        fraction: the part of the head width that is turned, above 0 and at most 1: the first
            D' = ⌊fraction·D⌋ coordinates, an even number. Default 1.
        interleaved: whether pairs are neighbours (2m, 2m+1). Default False: halves (m, m + D'/2).
        scaling: a change of frequencies for longer contexts. Default `RopeScaling()`, none.

    Raises:
        ConfigError: a value is not allowed; or, where a module takes it, D' is odd or 0.
    """

    base: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RopeScaling = RopeScaling()

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", number("rope: base", self.base, above=1))
        object.__setattr__(self, "fraction", number("rope: fraction", self.fraction, above=0, most=1))
        flag("rope: interleaved", self.interleaved)
        if not isinstance(self.scaling, RopeScaling):
            raise ConfigError(
                f"rope: scaling must be a RopeScaling such as Yarn(...); got {given(self.scaling)}"
            )

    @property
    def stretching(self) -> bool:
        return self.scaling.stretching

    def check(self, *, dim: int, heads: int, head_dim: int) -> None:
        width = self.scaling.width(head_dim, self.fraction)
        if width < 2 or width % 2:
            raise ConfigError(
                f"rope: the rotated width must be even and at least 2; got {width} "
                f"(head_dim {head_dim} × fraction {self.fraction})"
            )
        self.scaling.frequencies(self.base, head_dim, self.fraction, length=1)

    def turned(self, positions: Tensor, head_dim: int, length: int) -> Tensor:
        """Rows of cos and of ±sin, `(..., 2, D')`, laid out as the coordinates are."""
        frequencies, factor = self.scaling.frequencies(self.base, head_dim, self.fraction, length)
        precise = widest(positions.device)
        angles = positions.to(precise)[..., None] * frequencies.to(positions.device, precise)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        if self.interleaved:
            return torch.stack(
                [cos.repeat_interleave(2, -1), torch.stack([-sin, sin], dim=-1).flatten(-2)], dim=-2
            )
        return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)], dim=-2)

    def turn(self, x: Tensor, table: Tensor) -> Tensor:
        cos, sin = table.unbind(-2)
        width = cos.shape[-1]
        part = x if width == x.shape[-1] else x[..., :width]
        if self.interleaved:
            partner = part.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            partner = part.roll(width // 2, dims=-1)
        # the table is wider than half precision, so the products are too and are rounded once
        out = torch.addcmul(part * cos, partner, sin).to(x.dtype)
        return out if width == x.shape[-1] else torch.cat([out, x[..., width:]], dim=-1)

    def stretches(self, length: int) -> object:
        return self.scaling.stretches(length)


def rope(
    base: float = 10000.0,
    *,
    fraction: float = 1.0,
    interleaved: bool = False,
    scaling: RopeScaling | None = None,
) -> Rope:
    """Rotary position embedding (RoPE).

    At position p the pair m of coordinates turns by the angle p·ω_m, ω_m = base^(-2m/D'):
    (a, b) → (a cos − b sin, b cos + a sin). Scores then depend on positions through their difference alone.

    Args:
        base: of the geometric row of frequencies, transformers' `rope_theta`.
        fraction: the part of the head width that is turned, the first D' = ⌊fraction·D⌋ coordinates.
        interleaved: pairs are neighbours (2m, 2m+1), as in the paper and in GPT-J; otherwise halves
            (m, m + D'/2), as in GPT-NeoX and Llama.
        scaling: a change of frequencies for longer contexts: `LinearScaling`, `DynamicNtk`, `Yarn`,
            `LongRope`, `Llama3Scaling`, `ProportionalScaling`.

    Paper: RoFormer, arXiv 2104.09864.
    """
    return Rope(base, fraction, interleaved, RopeScaling() if scaling is None else scaling)


def rope_from_parameters(
    parameters: Mapping[str, Any], *, max_position_embeddings: int | None = None, interleaved: bool = False
) -> Rope:
    """The `rope` that a transformers config names.

    Args:
        parameters: the config's `rope_parameters` (or the older `rope_scaling`, with `rope_theta` added).
        max_position_embeddings: of the same config; the dynamic, yarn and longrope types may read it.
        interleaved: transformers does not write this down; Llama and its relatives use halves.

    Raises:
        UnknownName: a `rope_type` that is not known.
        ConfigError: a parameter of the type is missing.
    """
    if not isinstance(parameters, Mapping):
        raise ConfigError(
            f"parameters must be the rope_parameters of a config, a dict; got {given(parameters)}"
        )
    scaling = scaling_from_parameters(parameters, max_position_embeddings)
    base, fraction = parameters.get("rope_theta"), parameters.get("partial_rotary_factor")
    return rope(
        10000.0 if base is None else base,
        fraction=1.0 if fraction is None else fraction,
        interleaved=interleaved,
        scaling=scaling,
    )
