"""Masks and biases that a model has written out pair by pair."""

from __future__ import annotations

from typing import ClassVar
from weakref import ref

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.scores import Score
from polyhead.attend.tile import Tile
from polyhead.errors import ShapeError

__all__ = ["Allowed", "Bias", "WrittenMasks"]


class Bias(Score):
    """score + bias[b, h, r, j]: a bias that a model has written out pair by pair, `(1|B, 1|H, 1|L, S)`."""

    table: Tensor

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        return scores + _cut(self.table, tile).to(scores.dtype)


class Allowed(Mask):
    """A mask that a model has written out pair by pair, bool `(1|B, 1|H, 1|L, S)`; query 0 is at `offset`."""

    exact: ClassVar[tuple[bool, bool]] = (True, True)
    table: Tensor
    offset: int

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        batch, heads, rows, _ = self.table.shape
        zero = torch.zeros_like(j[..., :1])
        return self.table[
            b if batch > 1 else zero, h if heads > 1 else zero, i - self.offset if rows > 1 else zero, j
        ]

    def bounds(
        self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Exact: how many pairs of a tile are allowed is read off sums taken once over the table."""
        batch, heads, rows, keys = self.table.shape
        sums = self._sums
        zero = torch.zeros_like(i0)
        top, bottom = (i0 - self.offset, i1 - self.offset + 1) if rows > 1 else (zero, zero + 1)
        b, h = b if batch > 1 else zero, h if heads > 1 else zero
        top, bottom = top.clamp(0, rows), bottom.clamp(0, rows)
        left, right = j0.clamp(0, keys), (j1 + 1).clamp(0, keys)
        count = (
            sums[b, h, bottom, right]
            - sums[b, h, top, right]
            - sums[b, h, bottom, left]
            + sums[b, h, top, left]
        )
        return count > 0, count == (bottom - top) * (right - left)

    @property
    def _sums(self) -> Tensor:
        found = self.__dict__.get("_kept")
        if found is None:
            found = torch.nn.functional.pad(self.table.long().cumsum(-1).cumsum(-2), (1, 0, 1, 0))
            object.__setattr__(self, "_kept", found)
        return found


def _cut(table: Tensor, tile: Tile) -> Tensor:
    """The part of a written-out table that belongs to a tile."""
    if table.shape[0] > 1:
        table = table[tile.batch_slice]
    if table.shape[1] > 1:
        table = table[:, tile.head_slice]
    if table.shape[2] > 1:
        table = table[:, :, tile.row_slice]
    if tile.consecutive and tile.cols.numel() == table.shape[3]:
        return table
    return table.index_select(3, tile.cols)


class WrittenMasks:
    """Remembers what the last written-out mask and bias came to: the layers of a forward pass share them."""

    def __init__(self) -> None:
        self._last: tuple[ref[Tensor], tuple[int, int, int], tuple[Mask | None, Score | None]] | None = None
        self._zero: tuple[ref[Tensor], int] | None = None

    def matters(self, bias: Tensor) -> bool:
        """Whether a bias is more than the zeros that some layers (T5's cross-attention) pass."""
        zero = self._zero
        if zero is not None and zero[0]() is bias and zero[1] == bias._version:
            return False
        if bias.requires_grad or bool(bias.any()):
            return True
        self._zero = (ref(bias), bias._version)
        return False

    def read(self, tensor: Tensor, queries: int, keys: int) -> tuple[Mask | None, Score | None]:
        """A mask tensor, bool (True: allowed) or added to the logits, as a mask and what must be added."""
        last, state = self._last, (tensor._version, queries, keys)
        if last is not None and last[0]() is tensor and last[1] == state:
            return last[2]
        made = _read(tensor, queries, keys)
        self._last = (ref(tensor), state, made)
        return made


def _read(tensor: Tensor, queries: int, keys: int) -> tuple[Mask | None, Score | None]:
    if tensor.ndim != 4 or tensor.shape[2] not in (1, queries) or tensor.shape[3] < keys:
        raise ShapeError(
            f"the model passes an attention mask of shape {tuple(tensor.shape)} for {queries} queries and "
            f"{keys} keys; expected (B, 1 or H, L, S)"
        )
    tensor = tensor[..., :keys]
    if tensor.dtype == torch.bool:
        return Allowed(tensor, keys - queries), None
    # transformers writes "forbidden" as the lowest number of the dtype, or as -inf
    allowed = tensor > torch.finfo(tensor.dtype).min / 2
    mask = None if bool(allowed.all()) else Allowed(allowed, keys - queries)
    bias = torch.where(allowed, tensor, 0)
    return mask, Bias(bias) if bias.requires_grad or bool(bias.any()) else None
