"""Tiles whose entries depend only on the distance between row and column.

Such a tile is constant along its diagonals (a Toeplitz matrix): r + c - 1 values make all r * c entries.
Nothing here gathers r * c elements, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["by_distance", "toeplitz"]


def _expand(values: Tensor, rows: int, cols: int) -> Tensor:
    # unfold shows the windows of c values; the first row takes the last window
    return values.unfold(-1, cols, 1).flip(-2)


def _sum_diagonals(grad: Tensor) -> Tensor:
    *lead, rows, cols = grad.shape
    width = rows + cols - 1
    skewed = grad.new_zeros(*lead, rows * width)
    # one row further down is one place further left: diagonals become columns
    strides = (*skewed.stride()[:-1], width - 1, 1)
    skewed.as_strided(grad.shape, strides, rows - 1).copy_(grad)
    return skewed.view(*lead, rows, width).sum(-2)


class _Toeplitz(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: int, cols: int) -> Tensor:
        return _expand(values, rows, cols)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _sum_diagonals(grad), None, None


def toeplitz(values: Tensor, rows: int, cols: int) -> Tensor:
    """The tile `(..., rows, cols)` with `tile[a, b] = values[rows - 1 - a + b]`.

    Args:
        values: `(..., rows + cols - 1)`, from the bottom left corner of the tile to its top right one.
    """
    return _Toeplitz.apply(values, rows, cols)


def by_distance(
    at: Callable[[Tensor], Tensor], rows: Tensor, cols: Tensor, *, consecutive: bool = False
) -> Tensor:
    """The tile `(H, r, c)` of a function of the distance `rows[a] - cols[b]`.

    Args:
        at: gives `(H, n)` for int64 distances `(n,)`.
        rows: absolute positions, consecutive.
        cols: absolute positions, ascending.
        consecutive: whether it is known that `cols` has no gap (else that is looked up).
    """
    r, c = len(rows), len(cols)
    if r == 0 or c == 0:
        return at(rows.new_zeros(1))[:, :, None].expand(-1, r, c)
    if consecutive or int(cols[-1] - cols[0]) == c - 1:
        return toeplitz(at(rows[0] - cols[0] + torch.arange(r - 1, -c, -1, device=rows.device)), r, c)
    nearest = rows[0] - cols[-1]
    values = at(nearest + torch.arange(int(rows[-1] - cols[0] - nearest) + 1, device=rows.device))
    return values[:, rows[:, None] - cols - nearest]
