"""One matrix that mixes the heads of every pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyhead.attend.across_heads.base import AcrossHeads
from polyhead.attend.tile import Tile
from polyhead.checks import floating, given
from polyhead.errors import ConfigError

__all__ = ["HeadMix", "head_mix"]


class HeadMix(AcrossHeads):
    """y_h = sum_g matrix[h, g] x_g."""

    matrix: Tensor

    def __post_init__(self) -> None:
        shape = "(H, H), one row for every new head"
        floating("matrix", self.matrix, 2, shape)
        if self.matrix.shape[0] != self.matrix.shape[1]:
            raise ConfigError(f"matrix must be a floating-point tensor {shape}, got {given(self.matrix)}")

    def _matrix(self, x: Tensor, tile: Tile) -> Tensor:
        self.check_heads(self.matrix.shape[0], tile)
        return self.matrix.to(x)

    def apply(self, x: Tensor, tile: Tile) -> Tensor:
        matrix = self._matrix(x, tile).expand(x.shape[0], -1, -1)
        return torch.bmm(matrix, x.flatten(2)).view(x.shape)

    def mapped(self, x: Tensor, tile: Tile, out: Tensor) -> Tensor:
        matrix = self._matrix(x, tile).expand(x.shape[0], -1, -1)
        torch.bmm(matrix, x.flatten(2), out=out.view(*x.shape[:2], -1))
        return out

    def vjp(
        self, x: Tensor, grad: Tensor, tile: Tile, out: Tensor, totals: Sequence[Tensor | None]
    ) -> Tensor:
        x, grad = x.flatten(2), grad.flatten(2)
        (total,) = totals
        if total is not None:
            for one, up in zip(x, grad, strict=True):
                total += up @ one.T
        matrix = self._matrix(x, tile).T.expand(x.shape[0], -1, -1)
        torch.bmm(matrix, grad, out=out.view(grad.shape))
        return out

    def flops(self, pairs: int) -> int:
        return 2 * pairs * self.matrix.numel()


def head_mix(matrix: Tensor) -> HeadMix:
    """Mix the heads of every pair by one matrix: `y_h = sum_g matrix[h, g] x_g`.

    As a score it mixes the logits of the query heads, as a weight map their weights. Both together are
    talking-heads attention: Shazeer et al., "Talking-Heads Attention", arXiv 2003.02436. Grouped key/value
    heads do not matter to it.

    Args:
        matrix: `(H, H)`, learned if it requires gradient; the identity changes nothing.
    """
    return HeadMix(matrix)
