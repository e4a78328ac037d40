"""One key and one value for every block of keys and values."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from polyhead.attend.precision import exact, wide
from polyhead.attend.scores import Score
from polyhead.attend.tile import Tile
from polyhead.checks import given
from polyhead.description import Part
from polyhead.errors import ConfigError

__all__ = ["BlockSummary", "GuidedByLast", "GuidedByPool", "LogSizes", "Pooled", "Summaries", "summarised"]


class Summaries(NamedTuple):
    """What stands for n blocks.

    Attributes:
        keys, values: `(B, H, n, D)` and `(B, H, n, Dv)`.
        counts: real tokens of every block `(B or 1, n)`, of the dtype of the arithmetic.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor


class BlockSummary(Part):
    """How the keys and values of a block become one key and one value.

    Attributes:
        products: of vectors as wide as a key, and of those as wide as a value, for every token of a head.
    """

    products: ClassVar[tuple[int, int]]

    def of(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        """Key and value `(..., G, r, D)` and `(..., G, r, Dv)` of the blocks.

        Args:
            q: queries of the block's tokens `(..., G, r, C, D)`.
            k, v: `(..., G, 1, C, D)` and `(..., G, 1, C, Dv)`.
            real: bool `(..., 1, 1, C)`, which of them are no padding; None: all.
            scale: factor of q·k.
        """
        raise NotImplementedError


class GuidedByLast(BlockSummary):
    """Averages of keys and of values, weighed by softmax of the block's last query against its keys."""

    products = (2, 1)

    def of(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        weights = _weights(q[..., -1:, :], k, real, scale)
        return (weights @ k)[..., 0, :], (weights @ v)[..., 0, :]


class _Pool(BlockSummary):
    pool: str = "max"

    def __post_init__(self) -> None:
        if self.pool not in ("max", "mean"):
            raise ConfigError(f'pool must be "max" or "mean"; got {given(self.pool)}')

    def _pooled(self, x: Tensor, real: Tensor | None) -> Tensor:
        if self.pool == "mean":
            if real is None:
                return x.mean(-2)
            return (x * real[..., None]).sum(-2) / real.sum(-1, keepdim=True).clamp(min=1)
        if real is None:
            return x.amax(-2)
        found = x.masked_fill(~real[..., None], -torch.inf).amax(-2)
        return found.masked_fill(~real.any(-1, keepdim=True), 0.0)


class Pooled(_Pool):
    """The mean or the largest features of keys and of values."""

    products = (0, 0)

    def of(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        found = [self._pooled(x, real) for x in (k, v)]
        return found[0].expand(*q.shape[:-2], -1), found[1].expand(*q.shape[:-2], -1)


class GuidedByPool(_Pool):
    """Keys pooled; an average of values, weighed by softmax of the pooled query against the block's keys."""

    products = (1, 1)

    def of(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        weights = _weights(self._pooled(q, real)[..., None, :], k, real, scale)
        return self._pooled(k, real).expand(*q.shape[:-2], -1), (weights @ v)[..., 0, :]


def _weights(guide: Tensor, k: Tensor, real: Tensor | None, scale: float) -> Tensor:
    scores = (guide * scale) @ k.transpose(-1, -2)
    if real is not None:
        scores = scores.masked_fill(~real[..., None, :], torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def summarised(
    how: BlockSummary, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, size: int, scale: float
) -> Summaries:
    """The summaries of blocks of `size` tokens, the last of which may be shorter.

    Args:
        how: what makes them.
        q, k, v: `(B, H, T, D)`, `(B, G, T, D)` and `(B, G, T, Dv)`.
        real: bool `(B, T)`, which tokens are no padding; None: all.
        size: C.
        scale: factor of q·k.
    """
    short = -k.shape[2] % size
    if short:
        real = k.new_ones(1, k.shape[2], dtype=torch.bool) if real is None else real
        real = torch.nn.functional.pad(real, (0, short))
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, short)) for x in (q, k, v))
    kind, dtype = wide(q.dtype), q.dtype
    with exact(q.device):

        def blocks(x: Tensor) -> Tensor:  # B n G r C D
            of = x.to(kind).unflatten(1, (k.shape[1], -1)).unflatten(3, (-1, size))
            return of.permute(0, 3, 1, 2, 4, 5)

        there = None if real is None else real.unflatten(-1, (-1, size))  # B n C
        keys, values = how.of(
            blocks(q), blocks(k), blocks(v), None if there is None else there[:, :, None, None], scale
        )
        if there is None:
            counts = keys.new_full((1, keys.shape[1]), float(size))
        else:
            counts = there.sum(-1).to(kind)
    return Summaries(
        keys.flatten(2, 3).transpose(1, 2).to(dtype), values.flatten(2, 3).transpose(1, 2).to(dtype), counts
    )


class LogSizes(Score):
    """Adds the logarithm of the tokens that a key stands for, `counts` `(B or 1, S)`."""

    counts: Tensor

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        counts = self.counts if len(self.counts) == 1 else self.counts[tile.batch_slice]
        return scores + counts[:, None, None, tile.key_index].clamp(min=1).log().to(scores.dtype)
