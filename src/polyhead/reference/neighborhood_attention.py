"""Neighbourhood attention."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["neighborhood_attention"]


@twin("neighborhood_attention")
def neighborhood_attention(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    grid: tuple[int, ...] | None = None,
    window: int | tuple[int, ...] = 7,
    dilation: int | tuple[int, ...] = 1,
    stride: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = True,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Every token sees its neighbours: on each axis those that `_near` gives, in all combinations.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state.
        heads, kv_heads: H and G.
        grid: lengths of the axes; None: a line of L tokens.
        window, dilation, stride, causal: one value, or one for each axis.
        mask, padding: bool; see `reference`.
    """
    length = x.shape[1]
    source = real(x, padding)
    grid = (length,) if grid is None else tuple(grid)
    w, d, s, c = (
        value if isinstance(value, tuple) else (value,) * len(grid)
        for value in (window, dilation, stride, causal)
    )
    seen = torch.zeros(length, length, dtype=torch.bool)
    bias = torch.zeros(heads, length, length, dtype=torch.float64)
    values = parameters.get("score.tensor0")
    places = list(product(*map(range, grid)))
    for i, at in enumerate(places):
        for j, key in enumerate(places):
            axes = range(len(grid))
            seen[i, j] = all(key[a] in _near(at[a], grid[a], w[a], d[a], s[a], c[a]) for a in axes)
            if values is not None and seen[i, j]:
                column = 0
                for a in axes:
                    column = column * (2 * w[a] - 1) + (key[a] - at[a]) // d[a] + w[a] - 1
                bias[:, i, j] = values[:, column].double()
    allowed = seen if mask is None else seen & mask
    if padding is not None:
        allowed = allowed & padding[:, None, None, :]
    q = heads_of(source, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    return joined(attend(q, k, v, mask=allowed, bias=bias), parameters)


def _near(i: int, n: int, w: int, d: int, s: int, causal: int) -> range:
    """The keys of place i on an axis of n, in the group of its remainder by d."""
    p, r = divmod(i, d)
    count = len(range(r, n, d))
    if causal:
        leader = min(p // s * s + s - 1, count - 1)
        keys = range(max(leader - w + 1, 0), p + 1)
    else:
        leader = min(p // s * s + s // 2, count - 1)
        start = min(max(leader - w // 2, 0), count - w)
        keys = range(start, start + w)
    return range(r + d * keys.start, r + d * (keys.stop - 1) + 1, d)
