"""The configuration of mechanisms whose pairs of tokens have no scores and weights of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any, TypeVar

from polyhead.checks import flag
from polyhead.mechanisms.config import MechanismConfig, key_value_heads
from polyhead.nn.own_scores import OwnScoresAttention
from polyhead.nn.positions import NoPosition, Position
from polyhead.nn.projections import OutputProjection, Projection

__all__ = ["OwnScoresConfig"]

M = TypeVar("M", bound=OwnScoresAttention)


class OwnScoresConfig(MechanismConfig):
    """The options that mechanisms share whose pairs of tokens have no scores and weights of their own.

    What would change these is not among them: maps of scores and weights, other normalisers, dropout.

    Attributes:
        dim: width of the model d.
        heads: query heads H.
        kv_heads: key/value heads G, a divisor of `heads`; default `heads`.
        head_dim, value_dim: widths of a head; default dim / heads, and `head_dim`.
        bias: whether projections have a bias.
        qk_norm: RMS-normalise queries and keys.
        position: an encoding that is added to inputs or turns queries and keys.
    """

    _: KW_ONLY
    kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    bias: bool = False
    qk_norm: bool = False
    position: Position = NoPosition()

    def __post_init__(self) -> None:
        kv_heads = key_value_heads(type(self).__name__, self.heads, self.kv_heads)
        object.__setattr__(self, "kv_heads", kv_heads)
        flag("bias", self.bias)
        flag("qk_norm", self.qk_norm)
        super().__post_init__()

    def assemble(
        self,
        module: Callable[..., M],
        *,
        device: Any,
        dtype: Any,
        projection: Callable[..., Projection] = Projection,
    ) -> M:
        """The module made of the shared parts; `module` and `projection` are called as those they replace."""
        project = projection(
            self.dim,
            self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            bias=self.bias,
            qk_norm=self.qk_norm,
            device=device,
            dtype=dtype,
        )
        join = OutputProjection(
            self.dim, project.heads, project.value_dim, bias=self.bias, device=device, dtype=dtype
        )
        return module(project, join, position=self.position)
