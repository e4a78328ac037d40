"""Which tokens a query reads one by one, and which blocks by their summaries; no token in both ways."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from polyhead.attend.masks.algebra import Bounds, Mask
from polyhead.checks import whole

__all__ = ["BlocksBehind", "OtherBlocks", "SinceBlock", "blocks_behind"]


N = TypeVar("N", int, Tensor)


def blocks_behind(place: N, size: int, near: int) -> N:
    """How many blocks lie `near` and more tokens behind the query at a place, itself counted as one.

    Below 0 where the query stands less than `near` tokens from the start.
    """
    return (place + 1 - near) // size


class _Sized(Mask):
    size: int
    near: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole(f"{type(self).__name__}: size", self.size, 1))
        object.__setattr__(self, "near", whole(f"{type(self).__name__}: near", self.near, 1))


class SinceBlock(_Sized):
    """Keys up to the query, from the end of the last block of `size` that lies `near` behind it.

    The first key stands at the start of a block.
    """

    def _first(self, i: Tensor) -> Tensor:
        return blocks_behind(i, self.size, self.near) * self.size

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= self._first(i))

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        some = (j0 <= i1) & (j1 >= self._first(i0))
        return some, (j1 <= i0) & (j0 >= self._first(i1))


class BlocksBehind(_Sized):
    """Column j stands for the tokens j·size and on: seen where all of them lie `near` behind the query."""

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < blocks_behind(i, self.size, self.near)

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        return self.allowed(b, h, i1, j0), self.allowed(b, h, i0, j1)


class OtherBlocks(_Sized):
    """Column j stands for the tokens j·size and on: seen by queries of every other block."""

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i // self.size != j

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        first, last = i0 // self.size, i1 // self.size
        return (first != last) | (j0 != j1) | (first != j0), (last < j0) | (j1 < first)
