"""Several caches of the same tokens, each of rows that are made of those of the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from polyhead.nn.kv_cache.base import Kept, KeyValueCache

__all__ = ["LevelCache", "LevelKept"]


@dataclass(frozen=True, eq=False)
class LevelKept(Kept):
    """What the first level keeps, and the cache that takes the rows of the others."""

    cache: LevelCache | None = None


class LevelCache(KeyValueCache):
    """Caches of one sequence: `append` is of the first, and `append_to` of each of the others after it.

    Args:
        levels: the caches.
    """

    def __init__(self, levels: Sequence[KeyValueCache]) -> None:
        self.levels = tuple(levels)
        self._said: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.levels[0].length

    def append(self, *rows: Tensor, padding: Tensor | None = None, positions: Tensor | None = None) -> Kept:
        self._said = (padding, positions)
        kept = self.levels[0].append(*rows, padding=padding, positions=positions)
        return LevelKept(**{field.name: getattr(kept, field.name) for field in fields(kept)}, cache=self)

    def append_to(self, level: int, *rows: Tensor) -> Kept:
        """Take rows of the tokens that were appended last."""
        padding, positions = self._said
        return self.levels[level].append(*rows, padding=padding, positions=positions)

    def next_positions(self, count: int) -> Tensor | None:
        return self.levels[0].next_positions(count)

    def nbytes(self) -> int:
        return sum(level.nbytes() for level in self.levels)

    def reorder(self, beam_index: torch.Tensor) -> None:
        for level in self.levels:
            level.reorder(beam_index)

    def crop(self, length: int) -> None:
        for level in self.levels:
            level.crop(length)

    def reset(self) -> None:
        for level in self.levels:
            level.reset()
