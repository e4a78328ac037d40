"""A span for every head of a model, and how long it is.

Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression" (paper 107, arXiv
2406.14909).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from polyhead.attend.selectors import Selector, Spans
from polyhead.cache.per_head import cached_layers, per_head
from polyhead.checks import whole
from polyhead.description import Part
from polyhead.errors import ConfigError, ShapeError
from polyhead.head_scores import HeadScores
from polyhead.hf import attach

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

    def cache(self, model: nn.Module, length: int, *, prefill: Literal["masked", "dense"] = "masked") -> Any:
        """A KV cache in which every head keeps the first block and its span, and frees the rest.

        Spans are those at `length`, and stay so while the model decodes: head h keeps the last
        max(1, ⌊(alpha_h + beta_h · length) / block⌋) · block tokens. Every token sees so many, itself among
        them, where under `selectors` it sees whole blocks, up to `block - 1` tokens fewer. Of query heads
        that share keys and values the longest span is kept. Layers that stay dense keep everything.

        Args:
            model: the one that the plan is of, a transformers decoder.
            length: of the prompt.
            prefill: as for `polyhead.cache.per_head`.

        Returns:
            A `PerHeadCache`, see `polyhead.cache.per_head`.

        Raises:
            ConfigError: the plan does not fit the model.
        """
        whole("SpanPlan.cache: length", length, 1)
        with attach(model) as attachment:
            layers = cached_layers(attachment.layers, model)
        if [layer.index for layer in layers] != list(range(len(self.alpha))):
            raise ConfigError(
                f"SpanPlan.cache: the plan is of {len(self.alpha)} layers of causal self-attention, and "
                f"{type(model).__name__} has {len(layers)}"
            )
        full, windows = [], []
        for layer, a, b in zip(layers, self.alpha, self.beta, strict=True):
            full.append((a is None,) * layer.kv_heads)
            if a is None or b is None:
                windows.append((1,) * layer.kv_heads)
                continue
            if a.numel() != layer.heads:
                raise ConfigError(
                    f"SpanPlan.cache: the plan is of {a.numel()} heads in layer {layer.index}, and "
                    f"{layer.name!r} has {layer.heads}"
                )
            spans = span_blocks(a.double().numpy(), b.double().numpy(), length, self.block)
            of_kv = spans.reshape(layer.kv_heads, -1).max(1) * self.block
            windows.append(tuple(int(size) for size in of_kv))
        return per_head(model, full=full, sink=self.block, window=windows, prefill=prefill)

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
