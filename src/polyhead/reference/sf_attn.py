"""SF-Attn."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["sf_attn"]


@twin("sf_attn")
def sf_attn(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    group: int | None = None,
    returned: float = 0.5,
    sinks: int = 4,
    training: bool = False,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_i = attend(q_i, the tokens of i's group and the first s); in evaluation, or with a context, all.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        heads, kv_heads: H and G, g = h // (H / G).
        group: tokens of a group; None: ⌈L/4⌉. Shifted groups begin at g/2, before which there is one of g/2.
        returned: of the last ⌊H/2⌋ heads this share is not shifted, the first of them.
        sinks: s.
        training: whether there are groups.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    length = x.shape[1]
    read = torch.ones(heads, length, k.shape[2], dtype=torch.bool)
    if training and context is None:
        size = math.ceil(length / 4) if group is None else group
        half = heads // 2
        shifted = sum(n * 1.0 < half * (1 - returned) - 1e-9 for n in range(half))
        starts = {0: range(0, length, size), 1: [0, *range(size // 2, length, size)]}
        for h in range(heads):
            own = starts[int(h >= heads - shifted)]
            name = [sum(i >= start for start in own) for i in range(length)]
            for i in range(length):
                for j in range(length):
                    read[h, i, j] = name[i] == name[j] or j < sinks
    if padding is not None:
        read = read & padding[:, None, None]
    return joined(attend(q, k, v, mask=read if mask is None else read & mask), parameters)
