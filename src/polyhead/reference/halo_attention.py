"""HaloNet's attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["halo_attention"]


@twin("halo_attention")
def halo_attention(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    grid: tuple[int, int] | None,
    block: int,
    halo: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_i = attend(q_i, the keys of i's block and h places around it), logits + Σ_axes q_i·r_a[Δ] / √D.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state; `offsets.a` is r_a, `(2(b + h) - 1, D)`, for each axis a.
        heads, kv_heads: H and G, g = h // (H / G).
        grid: height and width; None: a sequence.
        block, halo: b and h.
        mask, padding: bool; see `reference`.
    """
    source, length = real(x, padding), x.shape[1]
    q = heads_of(source, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    places = [(n,) if grid is None else divmod(n, grid[1]) for n in range(length)]
    read = torch.ones(length, length, dtype=torch.bool)
    bias = q.new_zeros(*q.shape[:3], length)
    for i in range(length):
        for j in range(length):
            for axis, (y, z) in enumerate(zip(places[i], places[j], strict=True)):
                start = y // block * block
                read[i, j] &= start - halo <= z < start + block + halo
                offset = z - y + block + halo - 1
                if 0 <= offset < 2 * (block + halo) - 1:
                    r = parameters[f"offsets.{axis}"][offset].double()
                    bias[:, :, i, j] += q[:, :, i] @ r / q.shape[-1] ** 0.5
    if padding is not None:
        read = read & padding[:, None, None]
    return joined(attend(q, k, v, mask=read if mask is None else read & mask, bias=bias), parameters)
