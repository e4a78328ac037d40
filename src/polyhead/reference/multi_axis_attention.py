"""Multi-axis attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["multi_axis_attention"]


@twin("multi_axis_attention")
def multi_axis_attention(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    grid: tuple[int, int] | None,
    window: int,
    spread: int,
    axis: str,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_i = attend(q_i, the keys in i's block of P × P, or on i's lattice of G × G) with a bias by offset.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state; `score.tensor0` holds head after head (2P-1)² or (2G-1)² numbers.
        heads, kv_heads: H and G, g = h // (H / G).
        grid: height and width; None: a sequence, whose lattices have every P-th token.
        window, spread: P and G.
        axis: "block", "grid", or "both": the first ⌊H/2⌋ heads take blocks.
        mask, padding: bool; see `reference`.
    """
    source, length = real(x, padding), x.shape[1]
    q = heads_of(source, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    steps = [window] if grid is None else [math.ceil(n / spread) for n in grid]
    places = [(n,) if grid is None else divmod(n, grid[1]) for n in range(length)]
    read = torch.ones(heads, length, length, dtype=torch.bool)
    bias = torch.zeros(heads, length, length, dtype=torch.float64)
    first = 0
    for h in range(heads):
        in_blocks = axis == "block" or (axis == "both" and h < heads // 2)
        size = window if in_blocks else spread
        for i in range(length):
            for j in range(length):
                index = 0
                for y, z, step in zip(places[i], places[j], steps, strict=True):
                    if in_blocks:
                        seen, offset = y // window == z // window, z - y
                    else:
                        seen, offset = (z - y) % step == 0, (z - y) // step
                    read[h, i, j] &= seen
                    index = index * (2 * size - 1) + min(max(offset, 1 - size), size - 1) + size - 1
                bias[h, i, j] = parameters["score.tensor0"][first + index]
        first += (2 * size - 1) ** len(steps)
    if padding is not None:
        read = read & padding[:, None, None]
    return joined(attend(q, k, v, mask=read if mask is None else read & mask, bias=bias), parameters)
