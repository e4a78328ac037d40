"""The heads of one layer that keep the same."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.cache.policy import Keep
from polyhead.cache.ring import Ring
from polyhead.cache.rows import Growing
from polyhead.hf import LayerInfo

__all__ = ["Group"]


class Group:
    """Key/value heads of one layer that keep the same, and where their rows lie.

    Attributes:
        keep: what the heads keep.
        kv_heads: the key/value heads, ascending.
        all: whether these are all the heads of the layer.
        rows: what is held.
    """

    def __init__(self, keep: Keep, kv_heads: tuple[int, ...], info: LayerInfo, compensate: bool) -> None:
        repeat = info.heads // info.kv_heads
        self.keep = keep
        self.kv_heads = kv_heads
        self.all = len(kv_heads) == info.kv_heads
        self.rows: Growing | Ring = Growing() if keep.window is None else Ring(keep, compensate)
        self._kv = Selection(kv_heads)
        self._queries = Selection(tuple(h * repeat + r for h in kv_heads for r in range(repeat)))

    def of_kv(self, x: Tensor) -> Tensor:
        """The group's part of keys or values `(B, G, L, ·)`."""
        return x if self.all else self._kv.take(x)

    def of_queries(self, x: Tensor) -> Tensor:
        """The group's part of queries `(B, H, L, ·)`."""
        return x if self.all else self._queries.take(x)

    def put(self, out: Tensor, answer: Tensor) -> None:
        """Write the group's answer to its place among all heads, `(B, H, L, Dv)`."""
        self._queries.put(out, answer)

    def index(self, device: torch.device) -> Tensor | None:
        """The group's query heads `(h,)`; None: all."""
        return None if self.all else self._queries.on(device)

    def sees_all(self, dense: bool, tokens: int) -> bool:
        """Whether the group sees all of a first chunk of so many tokens, up to the model's own mask."""
        keep = self.keep
        return dense or keep.size is None or tokens <= keep.size or keep.window == keep.horizon


class Selection:
    """Some heads of a tensor `(B, heads, ...)`; a slice where they are neighbours, which copies nothing."""

    def __init__(self, heads: tuple[int, ...]) -> None:
        self.heads = heads
        neighbours = heads == tuple(range(heads[0], heads[-1] + 1))
        self._slice = slice(heads[0], heads[-1] + 1) if neighbours else None
        self._index: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """The heads as a tensor, kept for the next time."""
        if self._index is None or self._index.device != device:
            self._index = torch.tensor(self.heads, device=device)
        return self._index

    def take(self, x: Tensor) -> Tensor:
        """The heads of `x`."""
        return x.index_select(1, self.on(x.device)) if self._slice is None else x[:, self._slice]

    def put(self, out: Tensor, part: Tensor) -> None:
        """Write the heads of `out`."""
        if self._slice is None:
            out.index_copy_(1, self.on(out.device), part)
        else:
            out[:, self._slice] = part
