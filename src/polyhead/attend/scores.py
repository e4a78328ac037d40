"""Scores: what happens to the logit of a pair (i, j) before the normaliser.

A `Score` maps the logits of one tile, `scale * q·k` of shape `(B, H, r, c)`, to new logits of the same
shape. Several are applied in the order in which they are written: `score=(alibi(8), soft_cap(30.0))`.
Every one is differentiable, also with respect to the tensors that it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor

from polyhead.attend.tile import Tile
from polyhead.attend.toeplitz import by_distance
from polyhead.description import Part
from polyhead.errors import ConfigError, ShapeError

__all__ = [
    "Chain",
    "Score",
    "alibi",
    "alibi_slopes",
    "chain",
    "relative_bias",
    "score_function",
    "soft_cap",
    "t5_bias",
    "temperature",
]


class Score(Part):
    """A map of the logits of a tile.

    Attributes:
        positional: True when the map only adds `bias(tile)`, which does not look at the logits: its
            gradient for the logits is then the gradient that comes in.
    """

    positional: ClassVar[bool] = False

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        """The new logits of `tile`, `(B, H, r, c)`; `scores` itself is left as it was."""
        bias = self.bias(tile, scores.dtype)
        if bias is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither apply() nor bias()")
        return scores + bias

    def bias(self, tile: Tile, dtype: torch.dtype | None = None) -> Tensor | None:
        """What a positional score adds, broadcastable to `(H, r, c)`; None for any other score."""
        return None


class Positional(Score):
    """A score that adds a bias which depends on the head and on the distance i - j alone."""

    positional: ClassVar[bool] = True

    def at(self, distance: Tensor) -> Tensor:
        """The bias `(H, n)` at the distances `(n,)`, int64: how far the key lies behind the query."""
        raise NotImplementedError

    def bias(self, tile: Tile, dtype: torch.dtype | None = None) -> Tensor:
        def of_heads(distance: Tensor) -> Tensor:
            return _of_heads(self, self.at(distance), tile).to(dtype)

        return by_distance(of_heads, tile.rows, tile.cols, consecutive=tile.consecutive)


def _of_heads(part: Part, values: Tensor, tile: Tile) -> Tensor:
    """The tile's share of values (H, ...) of all heads, or of one for all."""
    have, heads = values.shape[0], tile.total_heads or tile.heads
    if have == heads:
        return values[tile.head_slice]
    if have != 1:
        raise ShapeError(
            f"{type(part).__name__.lower()} holds values for {have} heads, but the call has {heads} query "
            "heads; give one value a head, or one for all"
        )
    return values


def alibi_slopes(heads: int) -> Tensor:
    """The slopes of ALiBi, `(heads,)` float32: 2^(-8h/H) for h = 1..H when H is a power of two.

    Otherwise those of the nearest power of two below, followed by every second one of the next power of
    two, as in the published code. Press et al., "Train Short, Test Long", arXiv 2108.12409.
    """
    if heads < 1:
        raise ConfigError(f"heads must be at least 1, got {heads}")
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * h / power) for h in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


class ALiBi(Positional):
    """score - slope_h * |i - j|."""

    slopes: Tensor

    def __post_init__(self) -> None:
        if self.slopes.ndim != 1 or not self.slopes.is_floating_point():
            raise ConfigError(
                "slopes must be a floating-point tensor (H,), "
                f"got {self.slopes.dtype} {tuple(self.slopes.shape)}"
            )

    def at(self, distance: Tensor) -> Tensor:
        slopes = self.slopes.to(distance.device)
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
        if self.table.ndim != 2 or self.table.shape[1] % 2 == 0 or not self.table.is_floating_point():
            raise ConfigError(
                "table must be a floating-point tensor (H, 2 R + 1), one column for each distance from "
                f"-R to R, got {self.table.dtype} {tuple(self.table.shape)}"
            )

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
        if self.weight.ndim != 2 or not self.weight.is_floating_point():
            raise ConfigError(
                "weight must be a floating-point tensor (buckets, H), "
                f"got {self.weight.dtype} {tuple(self.weight.shape)}"
            )
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


class SoftCap(Score):
    """cap * tanh(score / cap)."""

    cap: float

    def __post_init__(self) -> None:
        if not self.cap > 0 or math.isinf(self.cap):
            raise ConfigError(f"cap must be a finite number above 0, got {self.cap}")

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        # in place on the quotient, which nothing else holds: autograd keeps only the tanh
        return scores.div(self.cap).tanh_().mul(self.cap)


def soft_cap(cap: float) -> SoftCap:
    """Squash the logits smoothly into (-cap, cap): `cap * tanh(score / cap)`, as in Gemma 2 (cap 50)."""
    return SoftCap(float(cap))


class Temperature(Score):
    """score / t, with one t for all heads or one a head."""

    t: float | Tensor

    def __post_init__(self) -> None:
        if isinstance(self.t, Tensor):
            if self.t.ndim != 1 or not self.t.is_floating_point():
                raise ConfigError(
                    f"t must be a number or a floating-point tensor (H,), got {tuple(self.t.shape)}"
                )
        elif not self.t > 0 or math.isinf(self.t):
            raise ConfigError(f"t must be a finite number above 0, got {self.t}")

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        if not isinstance(self.t, Tensor):
            return scores / self.t
        return scores / _of_heads(self, self.t, tile).to(scores).view(-1, 1, 1)


def temperature(t: float | Tensor) -> Temperature:
    """Divide the logits by `t`: a number, or `(H,)` for one a head (learned if it requires gradient)."""
    return Temperature(t if isinstance(t, Tensor) else float(t))


class Chain(Score):
    """Several scores, applied from left to right."""

    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        for score in self.scores:
            if not isinstance(score, Score):
                raise ConfigError(f"score must be a Score or a sequence of them, got {score!r} inside")

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return all(score.positional for score in self.scores)

    def bias(self, tile: Tile, dtype: torch.dtype | None = None) -> Tensor | None:
        if not self.positional or not self.scores:
            return None
        biases = [score.bias(tile, dtype) for score in self.scores]
        total = biases[0]
        for bias in biases[1:]:
            total = total + bias  # type: ignore[operator]
        return total

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        for score in self.scores:
            scores = score.apply(scores, tile)
        return scores


def chain(score: Score | Iterable[Score] | None) -> Score | None:
    """What a caller passed as `score=`, as one `Score` (or None): nested chains become flat."""
    if score is None or (isinstance(score, Score) and not isinstance(score, Chain)):
        return score
    if not isinstance(score, Chain):
        if not isinstance(score, Iterable):
            raise ConfigError(f"score must be a Score or a sequence of them, got {type(score).__name__}")
        score = Chain(tuple(score))
    flat: list[Score] = []
    for part in score.scores:
        inner = chain(part)
        flat += inner.scores if isinstance(inner, Chain) else [] if inner is None else [inner]
    return flat[0] if len(flat) == 1 else Chain(tuple(flat)) if flat else None


class ScoreFunction(Score):
    """f(score, b, h, i, j)."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConfigError(f"function must be callable as f(score, b, h, i, j), got {self.function!r}")

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        made = self.function(scores, tile.b, tile.h, tile.i, tile.j)
        if made.shape != scores.shape:
            raise ShapeError(
                f"the score function returned shape {tuple(made.shape)} for scores of shape "
                f"{tuple(scores.shape)}; it must keep the shape"
            )
        return made


def score_function(function: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]) -> ScoreFunction:
    """Any map `f(score, b, h, i, j)` of plain torch operations.

    `score` is a whole tile `(B, H, r, c)`; b, h, i, j are int64 tensors that broadcast against it, i and j
    absolute positions. The function must not change `score` in place and must keep its shape. It goes
    through JSON when it can be imported by name. Tensors that it closes over get no gradient from the
    tile engine: hold them in a `Score` subclass of your own.
    """
    return ScoreFunction(function)
