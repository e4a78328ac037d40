"""A span for every head of a model, and how long it is.

Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression" (paper 107, arXiv
2406.14909).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from polyhead.attend.selectors import Selector, Spans
from polyhead.checks import whole
from polyhead.description import Part
from polyhead.errors import ShapeError
from polyhead.head_scores import HeadScores

__all__ = ["Array", "Rule", "SpanPlan", "span_blocks"]

Rule = tuple[float, float]
Array = NDArray[np.float64]


class SpanPlan(Part):
    """A span for every head of a model. Goes through JSON: `ph.to_json(plan)`, `ph.from_json(data)`.

    Attributes:
        alpha, beta: by layer `(H,)` of its query heads, None for layers that stay dense.
        block: keys of a block; the first one is always read.
        lengths: those that were looked at.
        losses: at each of them, the influence of what is not read, in absolute value, summed over heads (of
            those that share a rule, the one that loses most counts).
        densities: at each of them, the share of the keys that heads keep, in the mean.
        gap: how far from the best the solver may have stopped, as a share of the objective; 0: nothing left.
    """

    alpha: tuple[Tensor | None, ...]
    beta: tuple[Tensor | None, ...]
    block: int = 64
    lengths: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    gap: float = 0.0

    def __post_init__(self) -> None:
        whole("SpanPlan: block", self.block, 1)
        if len(self.alpha) != len(self.beta) or any(
            (a is None) != (b is None) or (a is not None and b is not None and a.shape != b.shape)
            for a, b in zip(self.alpha, self.beta, strict=False)
        ):
            raise ShapeError("SpanPlan: alpha and beta must be of the same layers and heads")

    def selectors(self, *, rows: int | None = None, length: int | None = None) -> list[Selector | None]:
        """One selector a layer, as `ph.sparse` takes them.

        Args:
            rows: queries that are taken together; default: as many as keys.
            length: of the prompt, by which spans are fixed while the model decodes; None: they grow.
        """
        rows = self.block if rows is None else rows
        return [
            None if a is None or b is None else Spans(a, b, self.block, rows, self.block, length)
            for a, b in zip(self.alpha, self.beta, strict=True)
        ]

    def kept(self, length: int) -> HeadScores:
        """How many tokens every head can see from the end of a sequence of `length`; NaN: a dense layer."""
        found = []
        for a, b in zip(self.alpha, self.beta, strict=True):
            if a is None or b is None:
                found.append(np.full(1, math.nan))
                continue
            spans = span_blocks(a.double().numpy(), b.double().numpy(), length, self.block)
            found.append(np.minimum((spans + 1) * self.block, length))
        return HeadScores(
            tuple(found),
            name="span",
            meaning=f"tokens that the head can see at length {length}, first block included",
            unit="tokens",
            direction="higher: sees more",
        )


def span_blocks(alpha: Array, beta: Array, length: int, block: int) -> Array:
    """Blocks of a span, as the selector counts them."""
    most = max(1, -(-length // block))
    return np.clip(np.floor((alpha + beta * length) / block), 1, most)
