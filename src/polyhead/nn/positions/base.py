"""What a position encoding is, and the small ones: none, sinusoidal, ALiBi."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.scores import Score, alibi
from polyhead.checks import number
from polyhead.description import Part
from polyhead.errors import ConfigError

__all__ = [
    "AlibiPosition",
    "NoPosition",
    "Position",
    "Sinusoidal",
    "alibi_position",
    "no_position",
    "sinusoidal",
]


def widest(device: torch.device) -> torch.dtype:
    """The dtype that angles are worked out in: the widest that `device` has."""
    return torch.float32 if device.type == "mps" else torch.float64


class Position(Part):
    """A position encoding; it acts at one or more of three places, and each defaults to doing nothing.

    A table holds what is needed at given positions; it is worked out in float64 and applied in float32 or
    better, so that angles stay right in half precision at any length.
    """

    @property
    def stretching(self) -> bool:
        """Whether the table depends on the length of the sequence."""
        return False

    def check(self, *, dim: int, heads: int, head_dim: int) -> None:
        """Raise a `ConfigError` if the encoding cannot serve a module of this size."""

    def added(self, positions: Tensor, dim: int) -> Tensor | None:
        """What to add to the inputs at `positions`, shape `positions.shape + (dim,)`; None for nothing."""
        return None

    def turned(self, positions: Tensor, head_dim: int, length: int) -> Tensor | None:
        """The table that `turn` needs at `positions`, leading shape `positions.shape`; None for nothing.

        `length` is the number of tokens up to the last position: scalings that stretch with the sequence
        read it.
        """
        return None

    def turn(self, x: Tensor, table: Tensor) -> Tensor:
        """Queries or keys `(B, H, L, D)` turned by a table `(L, ...)` or `(B, 1, L, ...)`."""
        return x

    def stretches(self, length: int) -> object:
        """A value that changes when the table for the same positions changes with `length`."""
        return None

    def score(self, heads: int) -> Score | None:
        """What the encoding does to the scores of `heads` heads."""
        return None


class NoPosition(Position):
    """No encoding: attention sees a set, but for what the mask says."""


def no_position() -> NoPosition:
    """No position encoding."""
    return NoPosition()


class Sinusoidal(Position):
    """Sines and cosines added to the inputs `(B, L, d)`, d even: sin and cos of p / base^(2m/d) at p.

    Paper: Attention Is All You Need, arXiv 1706.03762.

    Attributes:
        base: of the geometric row of frequencies, above 1. Default 10000.

    Raises:
        ConfigError: `base` is not above 1; or, where a module takes it, d is odd.
    """

    base: float = 10000.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", number("sinusoidal: base", self.base, above=1))

    def check(self, *, dim: int, heads: int, head_dim: int) -> None:
        if dim % 2:
            raise ConfigError(f"sinusoidal: dim must be even, for sines and cosines come in pairs; got {dim}")

    def added(self, positions: Tensor, dim: int) -> Tensor:
        precise = widest(positions.device)
        steps = torch.arange(0, dim, 2, dtype=precise, device=positions.device) / dim
        angles = positions.to(precise)[..., None] * self.base**-steps
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def sinusoidal(base: float = 10000.0) -> Sinusoidal:
    """x_p += PE(p) with PE(p, 2m) = sin(p / base^(2m/d)) and PE(p, 2m+1) = cos(p / base^(2m/d)).

    It is added before the projections, so queries, keys and values all carry it.
    Paper: Attention Is All You Need, arXiv 1706.03762.

    Args:
        base: of the geometric row of frequencies.
    """
    return Sinusoidal(base)


class AlibiPosition(Position):
    """ALiBi's linear biases, as part of the scores."""

    def score(self, heads: int) -> Score:
        return alibi(heads)


def alibi_position() -> AlibiPosition:
    """ALiBi over all heads of the module: the score `polyhead.alibi(heads)` as its position encoding.

    Distances are counted in tokens of the sequence, so `positions=` of a call does not act on it.
    Paper: Train Short, Test Long, arXiv 2108.12409.
    """
    return AlibiPosition()
