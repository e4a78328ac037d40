"""Select and pack."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["select_and_pack"]


@twin("select_and_pack")
def select_and_pack(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    threshold: float,
    container: int | None,
    grid: tuple[int, int] | None,
    shift: int,
    padding: Tensor | None = None,
) -> Tensor:
    """y_i = attention of σ(s_i) x_i over the selected tokens of its sequence in its row; 0 if not selected.

    As evaluation does: without noise.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state; `gate.weight` `(1, d)`, `gate.bias` `(1,)`.
        heads, kv_heads: H and G, g = h // (H / G).
        threshold: tokens with s above it are selected.
        container: tokens of a row; None: all.
        grid, shift: places are packed from (shift, shift) on, and at last those before; see the mechanism.
        padding: bool; see `reference`.
    """
    batch, length, dim = x.shape
    source = real(x, padding)
    scores = source @ parameters["gate.weight"].double()[0] + parameters["gate.bias"].double()
    height, width = (1, length) if grid is None else grid
    packed = []
    for b in range(batch):
        for n in range(length):
            y, z = divmod(n, width)
            i = (y + (shift if height > 1 else 0)) % height * width + (z + shift) % width
            if scores[b, i] > threshold and (padding is None or padding[b, i]):
                packed.append((b, i))
    out = torch.zeros(batch, length, dim, dtype=torch.float64)
    size = max(len(packed), 1) if container is None else container
    for row in range(math.ceil(len(packed) / size)):
        members = packed[row * size : (row + 1) * size]
        for b in range(batch):
            own = [i for item, i in members if item == b]
            if not own:
                continue
            r = (source[b, own] / (1 + (-scores[b, own]).exp())[:, None])[None]
            q = heads_of(r, parameters, "query", heads)
            k = heads_of(r, parameters, "key", kv_heads)
            v = heads_of(r, parameters, "value", kv_heads)
            out[b, own] = joined(attend(q, k, v), parameters)[0]
    return out
