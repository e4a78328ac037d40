"""Selectors around another one: what it says of itself holds for them, but for what they change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.selector import Kept, Selector

__all__ = ["Around", "Recalling"]


class Around(Selector):
    """A selector with the blocks and the memory of another one; by itself it chooses as that one does."""

    selector: Selector

    @property
    def rows(self) -> int:
        return self.selector.rows

    @property
    def cols(self) -> int:
        return self.selector.cols

    def check(self, heads: int) -> None:
        self.selector.check(heads)

    def flops(self, grid: Grid, width: int) -> int:
        return self.selector.flops(grid, width)

    @property
    def remembers(self) -> bool:
        return self.selector.remembers

    def begin(self) -> Selector:
        return replace(self, selector=self.selector.begin()) if self.remembers else self

    def see(self, q: Tensor, k: Tensor, mask: Mask | None, scale: float) -> None:
        self.selector.see(q, k, mask, scale)

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        return self.selector.prepare(q, k, mask, grid)


class Recalling(Around):
    """Another selector, and the `Summaries` of the keys that it is about to be asked with.

    By this a module whose cache vouches for its keys hands them to the operator. It belongs to one cache, so
    it is not for JSON.
    """

    summaries: Any
