"""The heads of one layer that keep the same."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.cache.policy import Keep
from polyhead.cache.rows import Growing, Ring
from polyhead.hf import LayerInfo

__all__ = ["Group"]


class Group:
    """Key/value heads of one layer that keep the same, and where their rows lie.

    Attributes:
        keep: what the heads keep.
        kv_heads: the key/value heads, ascending.
        all: whether these are all the heads of the layer.
        queries: selects the query heads that read them.
        rows: what is held.
    """

    def __init__(self, keep: Keep, kv_heads: tuple[int, ...], info: LayerInfo, compensate: bool) -> None:
        repeat = info.heads // info.kv_heads
        self.keep = keep
        self.kv_heads = kv_heads
        self.all = len(kv_heads) == info.kv_heads
        self.rows: Growing | Ring = Growing() if keep.window is None else Ring(keep, compensate)
        self._heads = tuple(h * repeat + r for h in kv_heads for r in range(repeat))
        self._kv = _selection(kv_heads)
        self.queries = _selection(self._heads)
        self._index: Tensor | None = None

    def of_kv(self, x: Tensor) -> Tensor:
        """The group's part of keys or values `(B, G, L, ·)`."""
        return x if self.all else x[:, self._kv]

    def of_queries(self, x: Tensor) -> Tensor:
        """The group's part of queries `(B, H, L, ·)`."""
        return x if self.all else x[:, self.queries]

    def index(self, device: torch.device) -> Tensor | None:
        """The group's query heads `(h,)`; None: all."""
        if self.all:
            return None
        if self._index is None or self._index.device != device:
            self._index = torch.tensor(self._heads, device=device)
        return self._index

    def sees_all(self, dense: bool, tokens: int) -> bool:
        """Whether the group sees all of a first chunk of so many tokens, up to the model's own mask."""
        keep = self.keep
        return dense or keep.size is None or tokens <= keep.size or keep.window == keep.horizon


def _selection(heads: tuple[int, ...]) -> slice | list[int]:
    """Heads as a slice where they are neighbours, which selects without a copy."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return list(heads)
