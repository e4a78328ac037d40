"""The module that applies a position encoding, with tables that are worked out once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polyhead.checks import given
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn.positions.base import Position

__all__ = ["PositionModule"]


class PositionModule(nn.Module):
    """Applies `position` to inputs `(B, L, d)` and to queries and keys `(B, H, L, D)`.

    `where` is an int, the position of the first token of a run, or a tensor `(L,)` or `(B, L)` of positions.
    Tables for runs from zero are kept and grow by doubling; they are no part of the state. Under
    `torch.compile` tables are worked out in the graph.

    Args:
        position: the encoding.
        dim: width of the inputs.
        head_dim: width of a query or key head.
        heads: number of query heads.

    Attributes:
        adds, turns: whether the encoding adds to the inputs, or turns queries and keys.
        score: what the encoding does to the scores, None for nothing.
    """

    def __init__(self, position: Position, *, dim: int, head_dim: int, heads: int) -> None:
        super().__init__()
        if not isinstance(position, Position):
            raise ConfigError(f"position must be a position encoding such as rope(); got {given(position)}")
        position.check(dim=dim, heads=heads, head_dim=head_dim)
        self.position = position
        self.dim, self.head_dim = dim, head_dim
        self.adds = type(position).added is not Position.added
        self.turns = type(position).turned is not Position.turned
        self.score = position.score(heads)
        self._tables: dict[Any, tuple[object, Tensor]] = {}

    def add(self, x: Tensor, where: int | Tensor) -> Tensor:
        """The inputs with their encoding added."""
        if not self.adds:
            return x
        return x + self._table("added", where, x, x.shape[1], length=0).to(x.dtype)

    def turn(self, x: Tensor, where: int | Tensor, length: int | None = None) -> Tensor:
        """Queries or keys turned to their positions; `length` counts the tokens of the sequence so far."""
        if not self.turns:
            return x
        if not self.position.stretching:
            length = 0
        elif length is None:
            length = where + x.shape[2] if isinstance(where, int) else int(where.max()) + 1
        table = self._table("turned", where, x, x.shape[2], length)
        return self.position.turn(
            x, table[:, None] if isinstance(where, Tensor) and where.ndim == 2 else table
        )

    def turn_chosen(
        self, x: Tensor, where: int | Tensor, item: Tensor, token: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        """Queries `(n, D)` of chosen tokens, turned to their positions.

        Args:
            x: the queries.
            where: as for `turn`, of all tokens of the call.
            item, token: int64 `(n,)`, whose token each query is.
            shape: batch items and tokens of the call.
        """
        if not self.turns:
            return x
        batch, count = shape
        length = 0
        if self.position.stretching:
            length = where + count if isinstance(where, int) else int(where.max()) + 1
        table = self._table("turned", where, x.new_empty(batch, 0), count, length)
        if not isinstance(where, Tensor) or where.ndim == 1:
            table = table[token]
        else:
            table = table[item if len(table) > 1 else torch.zeros_like(item), token]
        return self.position.turn(x[None, None], table)[0, 0]

    def _make(self, place: str, positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        if place == "added":
            table = self.position.added(positions, self.dim)
        else:
            table = self.position.turned(positions, self.head_dim, length)
        assert table is not None
        return table.to(dtype)

    def _table(self, place: str, where: int | Tensor, x: Tensor, count: int, length: int) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if isinstance(where, Tensor):
            if (
                where.shape[-1] != count
                or where.ndim > 2
                or (where.ndim == 2 and len(where) not in (1, len(x)))
            ):
                raise ShapeError(
                    f"positions must have shape ({count},) or ({len(x)}, {count}), one for each token; "
                    f"got {tuple(where.shape)}"
                )
            return self._make(place, where.to(x.device), length, dtype)
        if where < 0 or torch.compiler.is_compiling() or type(x) is not Tensor:
            return self._make(place, torch.arange(where, where + count, device=x.device), length, dtype)
        key = (place, x.device, dtype)
        stretch = self.position.stretches(length)
        known, table = self._tables.get(key, (None, None))
        if table is None or known != stretch or len(table) < where + count:
            # a table made in inference mode could not serve training later
            with torch.inference_mode(False), torch.no_grad():
                if known != stretch and where > 0:  # decoding with frequencies that change at every step
                    return self._make(
                        place, torch.arange(where, where + count, device=x.device), length, dtype
                    )
                rows = max(where + count, 2 * len(table) if table is not None and known == stretch else 0)
                table = self._make(place, torch.arange(rows, device=x.device), length, dtype)
            self._tables[key] = (stretch, table)
        return table[where : where + count]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": {}}

    def extra_repr(self) -> str:
        return repr(self.position)
