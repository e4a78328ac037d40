"""Biases that depend on the head and on the distance between query and key alone."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from polyhead.attend.scores.base import Score, heads_of
from polyhead.attend.tile import Tile
from polyhead.attend.toeplitz import by_distance
from polyhead.checks import flag, floating, given, is_integer_tensor, whole
from polyhead.errors import ConfigError, ShapeError

__all__ = [
    "ALiBi",
    "Positional",
    "RelativeBias",
    "T5Bias",
    "alibi",
    "alibi_slopes",
    "relative_bias",
    "t5_bias",
    "t5_bucket",
]


_MOST_HEADS = 1 << 16  # no model comes near; a typing error must not fill the memory


class Positional(Score):
    """A score that adds a bias which depends on the head and on the distance i - j alone."""

    positional: ClassVar[bool] = True

    def at(self, distance: Tensor) -> Tensor:
        """The bias `(H, n)` at the distances `(n,)`, int64: how far the key lies behind the query."""
        raise NotImplementedError

    def bias(self, tile: Tile, dtype: torch.dtype | None = None) -> Tensor:
        def of_heads(distance: Tensor) -> Tensor:
            return heads_of(self, self.at(distance), tile).to(dtype)

        return by_distance(of_heads, tile.rows, tile.cols, consecutive=tile.consecutive)


def alibi_slopes(heads: int) -> Tensor:
    """The slopes of ALiBi, `(heads,)` float32: 2^(-8h/H) for h = 1..H when H is a power of two.

    Otherwise those of the nearest power of two below, followed by every second one of the next power of
    two, as in the published code. Press et al., "Train Short, Test Long", arXiv 2108.12409.
    """
    heads = whole("heads", heads, 1, _MOST_HEADS)
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * h / power) for h in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


class ALiBi(Positional):
    """score - slope_h * |i - j|."""

    slopes: Tensor

    def __post_init__(self) -> None:
        floating("slopes", self.slopes, 1, "(H,)")

    def at(self, distance: Tensor) -> Tensor:
        slopes = self.slopes.to(distance.device)
        # bfloat16 cannot tell large distances apart
        slopes = slopes if slopes.dtype == torch.float64 else slopes.float()
        return slopes[:, None] * -distance.abs().to(slopes.dtype)


def alibi(heads: int | Tensor) -> ALiBi:
    """Attention with linear biases: subtracts `slope_h * |i - j|`.

    Args:
        heads: number of query heads H for the published slopes (`alibi_slopes`), or slopes `(H,)` of
            your own, also learned ones.
    """
    return ALiBi(heads if isinstance(heads, Tensor) else alibi_slopes(heads))


class RelativeBias(Positional):
    """score + table[h, R + clip(j - i, -R, R)]."""

    table: Tensor

    def __post_init__(self) -> None:
        shape = "(H, 2 R + 1), one column for each distance from -R to R"
        floating("table", self.table, 2, shape)
        if self.table.shape[1] % 2 == 0:
            raise ConfigError(f"table must be a floating-point tensor {shape}, got {given(self.table)}")

    def at(self, distance: Tensor) -> Tensor:
        reach = self.table.shape[1] // 2
        table = self.table.to(distance.device)
        return table.index_select(1, reach - distance.clamp(-reach, reach))


def relative_bias(table: Tensor) -> RelativeBias:
    """A learned bias for each head and relative position, clipped at the distance R.

    Args:
        table: `(H, 2 R + 1)`; column R + n belongs to keys n places ahead of the query, column R - n to
            those n behind. Shaw et al., "Self-Attention with Relative Position Representations",
            arXiv 1803.02155, clip so; as a bias on the logits it is the form of later models.
    """
    return RelativeBias(table)


class T5Bias(Positional):
    """score + weight[bucket(j - i), h]."""

    weight: Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def __post_init__(self) -> None:
        floating("weight", self.weight, 2, "(buckets, H)")
        flag("bidirectional", self.bidirectional)
        object.__setattr__(self, "max_distance", whole("max_distance", self.max_distance, 1))
        buckets, sides = self.weight.shape[0], 2 if self.bidirectional else 1
        if buckets % sides or buckets < 2 * sides:
            raise ConfigError(
                f"weight must have at least {2 * sides} rows (buckets), a multiple of {sides} when "
                f"bidirectional is {self.bidirectional}; got {buckets}"
            )
        if self.max_distance <= buckets // sides // 2:
            raise ConfigError(
                f"max_distance must be above {buckets // sides // 2}, the distances that have a bucket of "
                f"their own; got {self.max_distance}"
            )

    def at(self, distance: Tensor) -> Tensor:
        bucket = t5_bucket(-distance, self.weight.shape[0], self.bidirectional, self.max_distance)
        return self.weight.to(distance.device).index_select(0, bucket).T


def t5_bucket(ahead: Tensor, buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """The bucket of T5 for each relative position j - i, int64.

    Half of the buckets of a direction hold one distance each, the rest grow logarithmically up to
    `max_distance`, beyond which all share the last. With `bidirectional` the upper half of all buckets is
    for keys ahead of the query, else all such keys share bucket 0.
    """
    if not is_integer_tensor(ahead):
        raise ShapeError(f"ahead must be an integer tensor of distances j - i, got {given(ahead)}")
    flag("bidirectional", bidirectional)
    sides = 2 if bidirectional else 1
    own = whole("buckets", buckets, 2 * sides) // sides // 2
    whole("max_distance", max_distance, own + 1)
    if bidirectional:
        buckets //= 2
        first, distance = (ahead > 0) * buckets, ahead.abs()
    else:
        first, distance = torch.zeros_like(ahead), (-ahead).clamp(min=0)
    exact = buckets // 2
    # in float32 and in this order, as the published models do: the bucket at a border depends on rounding
    log = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    far = (exact + log.clamp(min=0).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)


def t5_bias(weight: Tensor, *, bidirectional: bool = True, max_distance: int = 128) -> T5Bias:
    """The learned relative bias of T5: one value for each head and bucket of distances.

    Args:
        weight: `(buckets, H)`, T5's `relative_attention_bias.weight`.
        bidirectional: True in encoders; False in decoders, where no key is ahead of its query.
        max_distance: distances from here on share the last bucket.

    Note that T5 does not scale its logits: pass `scale=1.0` to `attend`. Raffel et al., "Exploring the
    Limits of Transfer Learning with a Unified Text-to-Text Transformer", arXiv 1910.10683.
    """
    return T5Bias(weight, bidirectional, max_distance)
