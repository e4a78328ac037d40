"""Attention with one head more, of uniform weights, whose values are its inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.kv_cache.base import Streams
from polyhead.nn.visible_mean import visible_mean

__all__ = ["UniformHeadAttention"]


class _Beside(NamedTuple):
    """The outputs of the heads `(B, H, L, Dv)`, and the mean of what each query sees, `(B, L or 1, d)`."""

    heads: Tensor
    mean: Tensor


class UniformHeadAttention(MultiHeadAttention):
    """`MultiHeadAttention` that adds λ ⊙ the mean of the inputs that a query sees.

    Score maps, the normaliser and dropout do not act on it. A mask that differs between heads is refused.

    Args:
        args, options: those of `MultiHeadAttention`.
        amount: λ, a number; None: learned for every channel, zeros at the start.

    Attributes:
        channels: λ, `(d,)`, where it is learned.
    """

    def __init__(self, *args: Any, amount: float | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        dim, context_dim = self.projection.dim, self.projection.context_dim
        if dim != context_dim:
            raise ConfigError(
                f"context_dim must be dim={dim}, since the mean of the context is added as it is; got "
                f"{context_dim}"
            )
        weight = self.projection.query.weight
        self.amount = amount
        self.channels: Any = None
        if amount is None:
            self.channels = nn.Parameter(torch.zeros(dim, device=weight.device, dtype=weight.dtype))

    @property
    def streams(self) -> Streams:
        """Keys, values, and the inputs."""
        return (*super().streams, (1, self.projection.dim))

    def _rows(self, source: Tensor, places: int | Tensor) -> tuple[Tensor, ...]:
        k, v = super()._rows(source, places)
        return k, v, source[:, None].to(k.dtype)

    def _mix(self, q: Tensor, rows: tuple[Tensor, ...], **options: Any) -> _Beside:  # type: ignore[override]
        *rows_of_heads, inputs = rows
        mean = visible_mean(inputs, q.shape[2], options.get("mask"))
        return _Beside(super()._mix(q, tuple(rows_of_heads), **options), mean[:, 0])

    def _weights(self, q: Tensor, rows: tuple[Tensor, ...], **options: Any) -> Tensor:
        """Those of the other heads."""
        return super()._weights(q, rows[:2], **options)

    def _regularized(self, heads: _Beside) -> _Beside:  # type: ignore[override]
        return heads._replace(heads=super()._regularized(heads.heads))

    def _join(self, heads: _Beside) -> Tensor:  # type: ignore[override]
        y = super()._join(heads.heads)
        mean = heads.mean.to(y.dtype)
        return y + (self.amount * mean if self.amount is not None else self.channels.to(y.dtype) * mean)
