"""Neighbourhood attention: every token sees the tokens nearest to it, on a line, an image or a video.

    p = ⌊i / δ⌋ within the tokens of equal i mod δ,   ρ(i) = the w such tokens around p, on every axis
    head_i = Σ_{j ∈ ρ(i)} softmax_j(q_i · k_j / √D + B_{p_j - p_i}) v_j,   y = concat_h(head_h) W_O

q: (B, H, L, D); k, v: (B, G, L, D), read by H/G heads each; L tokens are the places of `grid`, row by row. On
an axis the window has w // 2 keys before the query, and moves inwards at the borders: every query sees w
keys, those of several axes in all combinations. A causal axis ends the window at the query. With a dilation δ
only every δ-th token counts, so that w keys span w·δ; tokens of other remainder never meet within a layer.
With a stride, so many queries in a row share the window of their middle: stride = w gives separate blocks.
w = n is attention to everything.

Without a grid the tokens are a causal line of any length: each sees the w tokens up to itself, δ apart, and
decoding is the whole call; a cache of the last (w - 1)·δ + 1 tokens, `new_cache(window=...)`, is enough.
Other lines have an end, at which windows move: give their length, `grid=(n,)`.

Layers with dilation 1 and with the largest, n // w, in turn see all tokens after a few layers, where windows
of w alone grow by w - 1 a layer. `ph.build_stack` puts layers of different options in a row:

    ph.build_stack([("neighborhood_attention", {"grid": (56, 56), "dilation": d}) for d in (1, 8, 1, 8)],
                   dim=128, heads=4)

Cost: the parameters of grouped-query attention, and with `relative_bias` Π(2w - 1) numbers a head; Π w keys a
query are read. `cost` counts all pairs, as it does with masks. Without a bias a whole grid runs tile by tile
on a CPU (the backend `neighborhood`); a bias takes the general tiles, which are slower.

Papers 153, 163, 188: Faster Neighborhood Attention, arXiv 2403.04690; Dilated Neighborhood Attention
Transformer, arXiv 2209.15001; Generalized Neighborhood Attention, arXiv 2504.16922. Our readings: no bias by
default, as in the fused kernels of the papers, and where there is one, causal axes and strides may have it
too; a grid that is smaller than a window is refused, where the second pads it with zeros that take part as
keys; padding is not seen, but keeps its place in windows.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from polyhead.attend.masks import neighborhood
from polyhead.attend.masks.checks import per_axis
from polyhead.attend.scores import chain, neighborhood_bias
from polyhead.checks import flag, given, several, whole
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import GroupedConfig, without_context
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.registry import register
from polyhead.nn.neighborhood import NeighborAttention

__all__ = ["NeighborhoodAttention"]


@register(
    "neighborhood_attention",
    aliases=("dilated_neighborhood_attention", "generalized_neighborhood_attention"),
    paper="153",
    title=(
        "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level"
    ),
    family="sparse",
    summary="every token sees the tokens nearest to it on a line, an image or a video, or every δ-th of them",
    equation=(
        "head_i = Σ_j softmax_j(q_i·k_j / √D + B) v_j over the w tokens j around i on every axis, δ apart"
    ),
    supports=frozenset({"causal_self"}),
    facets=Facets(positions="local"),
)
class NeighborhoodAttention(GroupedConfig):
    """Attention to neighbours.

    Attributes:
        grid: lengths of one to three axes; None: a causal line of any length.
        window: w, keys on an axis; this and the next three are one value, or one for each axis.
        dilation: δ; window · dilation must fit the axis of a grid.
        stride: queries that share a window, at most `window`; a line without a length has none.
        causal: whether no key stands after the query; default no on a grid, and yes on a line without one.
        relative_bias: whether offsets have a learned bias.
    """

    grid: tuple[int, ...] | None = None
    window: int | tuple[int, ...] = 7
    dilation: int | tuple[int, ...] = 1
    stride: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] | None = None
    relative_bias: bool = False

    def __post_init__(self) -> None:
        without_context(self)
        flag("relative_bias", self.relative_bias)
        if self.grid is not None:
            grid = self.grid
            if not several(grid) or not 1 <= len(grid) <= 3:
                raise ConfigError(f"grid must be the lengths of 1 to 3 axes, or None; got {given(grid)}")
            object.__setattr__(self, "grid", tuple(whole("grid", n, 1) for n in grid))
        if self.causal is None:
            object.__setattr__(self, "causal", self.grid is None)
        for name, kind in (("window", int), ("dilation", int), ("stride", int), ("causal", bool)):
            value = per_axis("neighborhood_attention", name, getattr(self, name), self.axes, kind)
            object.__setattr__(self, name, value if len(set(value)) > 1 else value[0])
        if self.grid is not None:  # says what does not fit
            assert self.causal is not None
            neighborhood(self.grid, self.window, self.dilation, self.causal, self.stride)
        elif self.causal is not True or self.stride != 1:
            wrong = "causal=False" if self.causal is not True else f"stride={self.stride}"
            raise ConfigError(
                f"{wrong} moves windows at the end of a line, which has to be known: give its length in grid"
            )
        super().__post_init__()

    @property
    def axes(self) -> int:
        """Number of axes."""
        return 1 if self.grid is None else len(self.grid)

    def build(self, *, device: Any = None, dtype: Any = None) -> NeighborAttention:
        """The module."""
        rule = {
            name: value if isinstance(value := getattr(self, name), tuple) else (value,) * self.axes
            for name in ("window", "dilation", "stride", "causal")
        }
        options: dict[str, Any] = {}
        if self.relative_bias:
            drawn = torch.empty(self.heads, math.prod(2 * w - 1 for w in rule["window"]), device=device)
            table = nn.init.trunc_normal_(drawn, std=0.02, a=-0.04, b=0.04).requires_grad_()
            bias = neighborhood_bias(table, self.grid or (1,), rule["window"], rule["dilation"])
            options["score"] = bias if self.score is None else chain((bias, chain(self.score)))  # type: ignore[arg-type]
        module = partial(NeighborAttention, grid=self.grid, **rule)

        def assembled(*parts: Any, **given: Any) -> NeighborAttention:
            return module(*parts, **given | options)

        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=assembled
        )
