"""Bi-level routing attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["bi_level_routing"]


@twin("bi_level_routing")
def bi_level_routing(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    grid: tuple[int, int] | None,
    region: int,
    top_k: int,
    kernel: int,
    scale_by: str,
    padding: Tensor | None = None,
) -> Tensor:
    """head_i = attend(q_i, tokens of the top_k regions with most q̄·k̄ for i's region) + the convolution of V.

    Means are those of real tokens, over all heads; a region without any is not chosen.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state; `local.weight` `(H·D, 1, K or 1, K)`, `local.bias` `(H·D,)`.
        heads, kv_heads: H and G, g = h // (H / G).
        grid: height and width; None: one row of L.
        region: side of a region, of a sequence its length.
        top_k: regions that are read; of equal ones the later.
        kernel: K; 0: no convolution.
        scale_by: "qk_dim" or "head_dim".
        padding: bool; see `reference`.
    """
    batch, length, _ = x.shape
    height, width = (1, length) if grid is None else grid
    kept = torch.ones(batch, length, dtype=torch.bool) if padding is None else padding
    source = real(x, padding)
    q = heads_of(source, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    group = heads // kv_heads
    regions: dict[tuple[int, int], list[int]] = {}
    for y in range(height):
        for z in range(width):
            regions.setdefault((y // region, z // region), []).append(y * width + z)
    members = [regions[name] for name in sorted(regions)]
    read = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        alive = [[t for t in tokens if kept[b, t]] for tokens in members]
        for tokens, own in zip(members, alive, strict=True):
            scored = []
            for n, others in enumerate(alive):
                if not others:
                    continue
                like = torch.zeros((), dtype=torch.float64)
                for h in range(heads):
                    if own:
                        like = like + q[b, h, own].mean(0) @ k[b, h // group, others].mean(0)
                scored.append((float(like), n))
            for _, n in sorted(scored, reverse=True)[:top_k]:
                for i in tokens:
                    read[b, 0, i, alive[n]] = True
    size = q.shape[-1] * (heads if scale_by == "qk_dim" else 1)
    out = attend(q, k, v, mask=read, scale=size**-0.5)
    if not kernel:
        return joined(out, parameters)
    weight, bias = parameters["local.weight"].double(), parameters["local.bias"].double()
    deep = v.shape[-1]
    tall, wide = weight.shape[2:]
    for h in range(heads):
        own_weight, own_bias = (p[h * deep : (h + 1) * deep] for p in (weight, bias))
        for i in range(length):
            y, z = divmod(i, width)
            total = own_bias.expand(batch, deep)
            for a in range(tall):
                for c in range(wide):
                    at_y, at_z = y + a - tall // 2, z + c - wide // 2
                    if 0 <= at_y < height and 0 <= at_z < width:
                        j = at_y * width + at_z
                        value = v[:, h // group, j] * kept[:, j, None]
                        total = total + value * own_weight[:, 0, a, c]
            out[:, h, i] = out[:, h, i] + total
    return joined(out, parameters)
