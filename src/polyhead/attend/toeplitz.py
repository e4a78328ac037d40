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

__all__ = ["by_distance", "diagonal_sums", "expand_diagonals", "toeplitz"]


_BLOCK = 32  # rows whose diagonals are summed together: more would pad a square tile to twice its size


def expand_diagonals(values: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
    """`toeplitz` without autograd: `(..., rows, cols)`, a view of `out` `(..., rows, rows + cols - 1)`."""
    *lead, width = values.shape
    out = values.new_empty(*lead, rows, width) if out is None else out
    flat = out.copy_(values.unsqueeze(-2)).view(*lead, rows * width)
    # rows that are one entry shorter than the copies start one place further left in each copy
    cols = width - rows + 1
    return flat[..., rows - 1 :].as_strided((*lead, rows, cols), (*flat.stride()[:-1], width - 1, 1))


def diagonal_sums(
    grad: Tensor, shift: int = 1, room: Callable[[tuple[int, ...]], Tensor] | None = None
) -> Tensor:
    """Sums of `(..., r, c)` along the diagonals that go `shift` columns a row: `(..., c + (r - 1) shift)`."""
    *lead, rows, cols = grad.shape
    if rows > _BLOCK:
        whole = rows // _BLOCK * _BLOCK
        blocks = grad[..., :whole, :].unflatten(-2, (-1, _BLOCK))
        sums = diagonal_sums(diagonal_sums(blocks, shift, room), shift * _BLOCK, room)
        if whole == rows:
            return sums
        rest = diagonal_sums(grad[..., whole:, :], shift, room)
        sums = torch.nn.functional.pad(sums, ((rows - whole) * shift, 0))
        sums[..., : rest.shape[-1]] += rest
        return sums
    if rows == 1:
        return grad.squeeze(-2)
    # the inverse of _expand: written into rows that are `shift` shorter, diagonals stand below each other
    width, start = cols + (rows - 1) * shift, (rows - 1) * shift
    flat = (grad.new_empty if room is None else room)((*lead, rows * width))
    flat[..., :start] = 0
    skewed = flat[..., start : start + rows * (width - shift)].unflatten(-1, (rows, width - shift))
    skewed[..., :cols] = grad
    skewed[..., cols:] = 0
    flat[..., start + rows * (width - shift) :] = 0
    return flat.unflatten(-1, (rows, width)).sum(-2)


class _Toeplitz(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: int) -> Tensor:
        return expand_diagonals(values, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return diagonal_sums(grad), None


def toeplitz(values: Tensor, rows: int) -> Tensor:
    """The tile `(..., rows, cols)` with `tile[a, b] = values[rows - 1 - a + b]`.

    Args:
        values: `(..., rows + cols - 1)`, from the bottom left corner of the tile to its top right one.
    """
    return _Toeplitz.apply(values, rows)


def by_distance(
    at: Callable[[Tensor], Tensor], rows: Tensor, cols: Tensor, *, consecutive: bool = False
) -> Tensor:
    """The tile `(H, r, c)` of a function of the distance `rows[a] - cols[b]`.

    Args:
        at: gives `(H, n)` for int64 distances `(n,)`.
        rows, cols: absolute positions, ascending.
        consecutive: whether it is known that neither has a gap (else that is looked up).
    """
    r, c = len(rows), len(cols)
    if r == 0 or c == 0:
        return at(rows.new_zeros(1))[:, :, None].expand(-1, r, c)
    if consecutive or (int(cols[-1] - cols[0]) == c - 1 and int(rows[-1] - rows[0]) == r - 1):
        return toeplitz(at(rows[0] - cols[0] + torch.arange(r - 1, -c, -1, device=rows.device)), r)
    nearest = rows[0] - cols[-1]
    values = at(nearest + torch.arange(int(rows[-1] - cols[0] - nearest) + 1, device=rows.device))
    return values[:, rows[:, None] - cols - nearest]
