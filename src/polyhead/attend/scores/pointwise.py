"""Maps of each logit by itself: soft cap, temperature, and any function of a pair."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from polyhead.attend.scores.base import Score, heads_of
from polyhead.attend.tile import Tile
from polyhead.checks import number, number_or_heads, takes
from polyhead.errors import ShapeError

__all__ = ["ScoreFunction", "SoftCap", "Temperature", "score_function", "soft_cap", "temperature"]


class SoftCap(Score):
    """cap * tanh(score / cap)."""

    cap: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "cap", number("cap", self.cap, above=0))

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        # in place on the quotient, which nothing else holds: autograd keeps only the tanh
        return scores.div(self.cap).tanh_().mul(self.cap)


def soft_cap(cap: float) -> SoftCap:
    """Squash the logits smoothly into (-cap, cap): `cap * tanh(score / cap)`, as in Gemma 2 (cap 50)."""
    return SoftCap(cap)


class Temperature(Score):
    """score / t, with one t for all heads or one a head."""

    t: float | Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "t", number_or_heads("t", self.t, above=0))

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        if not isinstance(self.t, Tensor):
            return scores / self.t
        return scores / heads_of(self, self.t, tile).to(scores).view(-1, 1, 1)


def temperature(t: float | Tensor) -> Temperature:
    """Divide the logits by `t`: a number, or `(H,)` for one a head (learned if it requires gradient)."""
    return Temperature(t)


class ScoreFunction(Score):
    """f(score, b, h, i, j)."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        takes("function", self.function, "score", "b", "h", "i", "j")

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
        if not made.is_floating_point():
            raise ShapeError(
                f"the score function returned {made.dtype}; it must return floating-point scores, "
                "-inf where a pair is to be left out"
            )
        # what follows writes into the scores, and the function may have returned a tensor of its own
        return made if made is scores else made.to(scores.dtype, copy=True)


def score_function(function: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]) -> ScoreFunction:
    """Any map `f(score, b, h, i, j)` of plain torch operations.

    `score` is a whole tile `(B, H, r, c)`; b, h, i, j are int64 tensors that broadcast against it, i and j
    absolute positions. `function` must not change `score` in place and must keep its shape. It goes
    through JSON when it can be imported by name. Tensors that it closes over get no gradient from the
    tile engine: hold them in a `Score` subclass of your own.
    """
    return ScoreFunction(function)
