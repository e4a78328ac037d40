"""A mask for queries that were picked out of a larger call: row r of head m is somebody else's query."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.masks.algebra import Bounds, Mask
from polyhead.attend.masks.checks import brief
from polyhead.attend.masks.ranges import range_max
from polyhead.checks import FARTHEST, given, is_integer_tensor, whole
from polyhead.errors import ConfigError, ShapeError

__all__ = ["Gathered", "gathered"]

_AXES = {"positions": "HL", "items": "H", "heads": "H", "batch": "B"}


class Gathered(Mask):
    """`mask` for the rows that were picked out of the call that it describes. See `gathered`."""

    mask: Mask
    positions: Tensor | None = None
    items: Tensor | None = None
    heads: Tensor | None = None
    first: int = 0
    batch: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            raise ConfigError(f"gathered: mask must be a mask such as causal(); got {given(self.mask)}")
        for name, axes in _AXES.items():
            value = getattr(self, name)
            if value is not None and not (is_integer_tensor(value) and value.ndim == len(axes)):
                shape = f"({', '.join(axes)})" if len(axes) > 1 else f"({axes},)"
                raise ConfigError(f"gathered: {name} must be an integer tensor {shape}; got {given(value)}")
        if self.items is not None and self.batch is not None:
            raise ConfigError("gathered: items say already where every head comes from; leave batch out")
        object.__setattr__(self, "first", whole("gathered: first", self.first, -FARTHEST))

    def __repr__(self) -> str:
        parts = [repr(self.mask), *(f"{n}={brief(v)}" for n, v in self._maps().items() if v is not None)]
        return f"gathered({', '.join(parts)})"

    def _maps(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in _AXES}

    def _origin(self, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Batch item and head that the rows of head h come from."""
        if self.items is not None:
            item = self.items.to(h.device)[h]
        else:
            item = b if self.batch is None else self.batch.to(b.device)[b]
        return item, h if self.heads is None else self.heads.to(h.device)[h]

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if self.positions is not None:
            i = self.positions.to(i.device, torch.int64)[h, i - self.first]
        return self.mask.allowed(*self._origin(b, h), i, j)

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        if self.positions is not None:
            # the mask is asked about all that lies between the first and the last position of the rows:
            # what holds for more rows holds for these
            where = self.positions.to(i0.device, torch.int64)
            lowest = torch.iinfo(torch.int64).min // 2
            last, first = range_max((where, -where), h, i0 - self.first, i1 - self.first, nothing=lowest)
            i0, i1 = -first, last
        return self.mask.bounds(*self._origin(b, h), i0, i1, j0, j1)

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        sizes = {"B": batch, "H": heads, "L": queries}
        for name, value in self._maps().items():
            shape = tuple(sizes[letter] for letter in _AXES[name])
            if value is not None and tuple(value.shape) != shape:
                raise ShapeError(f"gathered: {name} must have shape {shape}; got {tuple(value.shape)}")
        if self.positions is not None and self.first != offset:
            raise ShapeError(
                f"gathered: first must be the position that the call gives its first row, {offset}; "
                f"got {self.first}"
            )


def gathered(
    mask: Mask,
    positions: Tensor | None = None,
    *,
    items: Tensor | None = None,
    heads: Tensor | None = None,
    first: int = 0,
    batch: Tensor | None = None,
) -> Mask:
    """`mask` where row r of head m is the query at `positions[m, r]` of head `heads[m]` of item `items[m]`.

    For calls whose queries were picked out of a larger one. Rows should ascend: a tile is known by the
    first and the last position in it, and rows far apart make tiles of which little is known.

    Args:
        mask: the mask of the larger call, which fits it: its own checks are not repeated.
        positions: integer `(H, L)`; None: rows stand where the call puts them.
        items: integer `(H,)`, the batch item of every head; None: that of the call.
        heads: integer `(H,)`, the head of the larger call; None: that of the call.
        first: the position that the call gives to its first row, S - L for S keys and L rows.
        batch: integer `(B,)`, the item of the larger call for every item of this one, where `items` are not
            given; None: the same.
    """
    return Gathered(mask, positions, items, heads, first, batch)
