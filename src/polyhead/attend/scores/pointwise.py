"""Maps of each logit by itself: soft cap, temperature, and any function of a pair."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from polyhead.attend.scores.base import Score, heads_of
from polyhead.attend.tile import Tile
from polyhead.errors import ConfigError, ShapeError

__all__ = ["ScoreFunction", "SoftCap", "Temperature", "score_function", "soft_cap", "temperature"]


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
        return scores / heads_of(self, self.t, tile).to(scores).view(-1, 1, 1)


def temperature(t: float | Tensor) -> Temperature:
    """Divide the logits by `t`: a number, or `(H,)` for one a head (learned if it requires gradient)."""
    return Temperature(t if isinstance(t, Tensor) else float(t))


class ScoreFunction(Score):
    """f(score, b, h, i, j)."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConfigError(f"function must be callable as f(score, b, h, i, j), got {self.function!r}")

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        made = self.function(scores, tile.b, tile.h, tile.i, tile.j)
        if not isinstance(made, Tensor):
            raise ShapeError(
                f"the score function returned {type(made).__name__}; it must return the new scores"
            )
        if made.shape != scores.shape:
            raise ShapeError(
                f"the score function returned shape {tuple(made.shape)} for scores of shape "
                f"{tuple(scores.shape)}; it must keep the shape"
            )
        # what follows writes into the scores, and the function may have returned a tensor of its own
        return made if made is scores else made.to(scores.dtype, copy=True)


def score_function(function: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]) -> ScoreFunction:
    """Any map `f(score, b, h, i, j)` of plain torch operations.

    `score` is a whole tile `(B, H, r, c)`; b, h, i, j are int64 tensors that broadcast against it, i and j
    absolute positions. The function must not change `score` in place and must keep its shape. It goes
    through JSON when it can be imported by name. Tensors that it closes over get no gradient from the
    tile engine: hold them in a `Score` subclass of your own.
    """
    return ScoreFunction(function)
