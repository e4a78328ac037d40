"""What a score is, and several in a row."""

from __future__ import annotations

from collections.abc import Iterable
from types import FunctionType
from typing import ClassVar

import torch
from torch import Tensor

from polyhead.attend.tile import Tile
from polyhead.checks import given, several
from polyhead.description import Part
from polyhead.errors import ConfigError, ShapeError

__all__ = ["Chain", "Score", "chain", "heads_of"]


class Score(Part):
    """A map of the logits of a tile.

    Attributes:
        positional: True when the map only adds `bias(tile)`, which does not look at the logits: its
            gradient for the logits is then the gradient that comes in.
        whole_heads: True when the map needs all heads of the call in one tile, not some of them.
        rows_back: queries before a query whose pairs the map reads.
    """

    positional: ClassVar[bool] = False
    whole_heads: ClassVar[bool] = False
    rows_back: ClassVar[int] = 0

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        """The new logits of `tile`, `(B, H, r, c)`; `scores` itself is left as it was."""
        bias = self.bias(tile, scores.dtype)
        if bias is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither apply() nor bias()")
        return scores + bias

    def bias(self, tile: Tile, dtype: torch.dtype | None = None) -> Tensor | None:
        """What a positional score adds, broadcastable to `(H, r, c)`; None for any other score."""
        return None


def heads_of(part: Part, values: Tensor, tile: Tile) -> Tensor:
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


class Chain(Score):
    """Several scores, applied from left to right."""

    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.scores, tuple | list):
            raise ConfigError(f"score must be a Score or a sequence of them, got {given(self.scores)}")
        for score in self.scores:
            if not isinstance(score, Score):
                raise ConfigError(
                    f"score must be a Score or a sequence of them, got {given(score)} inside{_hint(score)}"
                )
        object.__setattr__(self, "scores", tuple(self.scores))

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return all(score.positional for score in self.scores)

    @property
    def whole_heads(self) -> bool:  # type: ignore[override]
        return any(score.whole_heads for score in self.scores)

    @property
    def rows_back(self) -> int:  # type: ignore[override]
        return sum(score.rows_back for score in self.scores)

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


def _hint(score: object) -> str:
    is_function = isinstance(score, FunctionType) and not score.__module__.startswith("polyhead.")
    return "; wrap a function f(score, b, h, i, j) in score_function(f)" if is_function else ""


def chain(score: Score | Iterable[Score] | None) -> Score | None:
    """What a caller passed as `score=`, as one `Score` (or None): nested chains become flat."""
    if score is None or (isinstance(score, Score) and not isinstance(score, Chain)):
        return score
    if not isinstance(score, Chain):
        if not several(score) or isinstance(score, Tensor):
            raise ConfigError(
                f"score must be a Score or a sequence of them, got {given(score)}{_hint(score)}"
            )
        score = Chain(tuple(score))
    flat: list[Score] = []
    for part in score.scores:
        inner = chain(part)
        flat += inner.scores if isinstance(inner, Chain) else [] if inner is None else [inner]
    return flat[0] if len(flat) == 1 else Chain(tuple(flat)) if flat else None
