"""A mask of keys that are seen for a while: every key of every head up to a query of its own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from polyhead.attend.masks.algebra import Bounds, Mask
from polyhead.attend.masks.checks import brief
from polyhead.attend.masks.ranges import range_max
from polyhead.checks import given, is_integer_tensor
from polyhead.errors import ConfigError, ShapeError

__all__ = ["Until", "until"]


class Until(Mask):
    """Keys before their end: j is seen by i < `stop[b, h, j]`. See `until`."""

    exact: ClassVar[tuple[bool, bool]] = (True, True)
    stop: Tensor

    def __post_init__(self) -> None:
        if not is_integer_tensor(self.stop) or self.stop.ndim != 3:
            raise ConfigError(f"until: stop must be an integer tensor (B, H, S); got {given(self.stop)}")

    def __repr__(self) -> str:
        return f"until({brief(self.stop)})"

    def _place(self, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Item and head in `stop`, of which one may stand for all."""
        item = b if self.stop.shape[0] != 1 else torch.zeros_like(b)
        return item, h if self.stop.shape[1] != 1 else torch.zeros_like(h)

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        item, head = self._place(b, h)
        return i < self.stop.to(j.device)[item, head, j]

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        item, head = self._place(b, h)
        stop = self.stop.to(j0.device, torch.int64).flatten(0, 1)
        never = torch.iinfo(torch.int64).min // 2
        row, first, last = torch.broadcast_tensors(item * self.stop.shape[1] + head, j0, j1)
        latest, earliest = range_max((stop, -stop), row, first, last, nothing=never)
        return i0 < latest, i1 < -earliest

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        own = self.stop.shape
        if own[0] not in (1, batch) or own[1] not in (1, heads) or own[2] != keys:
            raise ShapeError(
                f"until: stop has shape {tuple(own)}, but the call has {batch} batch items, {heads} heads "
                f"and {keys} keys"
            )


def until(stop: Tensor) -> Mask:
    """Keys that are seen for a while: key j of head h by the queries i < `stop[b, h, j]`, by no later one.

    Joined with `causal()`, what a cache knows that forgets every token in its time; a key whose end is not
    after itself is seen by nobody.

    Args:
        stop: integer `(B or 1, H or 1, S)`, the first query that does not see the key any more.
    """
    return Until(stop)
