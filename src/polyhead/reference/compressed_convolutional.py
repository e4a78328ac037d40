"""Compressed convolutional attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import joined, real
from polyhead.reference.registry import twin

__all__ = ["compressed_convolutional"]


@twin("compressed_convolutional")
def compressed_convolutional(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    qk_mean: bool = True,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """q = unit(conv(conv(q0 | k0)) + m), k = unit(conv(conv(q0 | k0)) + mean m) exp(β), v of x_t and x_t-1.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state; all in `projection.` but the output.
        heads, kv_heads: H and G, g = h // (H / G).
        qk_mean: whether m, the means of queries and keys before the convolutions, is added.
        mask, padding: bool; see `reference`.
    """
    own = {n.removeprefix("projection."): t.double() for n, t in parameters.items()}
    outer, inner = own["channels.weight"], own["within.weight"]  # (C, 1, t0), (C, D, t1)
    (channels, width, t1), t0 = inner.shape, outer.shape[2]
    before = t0 + t1 - 1  # zeros that stand before the first token: enough for all
    x = real(x, padding)
    x = torch.cat([x.new_zeros(len(x), before, x.shape[2]), x], dim=1)
    maps = {n: x @ own[f"{n}.weight"].T + own.get(f"{n}.bias", 0.0) for n in ("query", "key", "value")}
    v = maps["value"]
    if "previous.weight" in own:
        late = x @ own["previous.weight"].T + own.get("previous.bias", 0.0)
        v = torch.cat([v, late.roll(1, 1)], dim=-1)
    z = torch.cat([maps["query"], maps["key"]], dim=-1)
    once, twice = torch.zeros_like(z), torch.zeros_like(z)
    for t in range(t0 - 1, z.shape[1]):
        for n in range(t0):
            once[:, t] += outer[:, 0, n] * z[:, t - (t0 - 1) + n]
        once[:, t] += own["channels.bias"]
    for t in range(before, z.shape[1]):
        for c in range(channels):
            head = slice(c // width * width, c // width * width + width)
            for n in range(t1):
                twice[:, t, c] += once[:, t - (t1 - 1) + n, head] @ inner[c, :, n]
        twice[:, t] += own["within.bias"]
    z, made, v = (
        part[:, before:].unflatten(-1, (-1, width)).transpose(1, 2) for part in (z, twice, v)
    )  # B heads L D
    group = heads // kv_heads
    found = []
    for h in range(heads + kv_heads):
        row, g = made[:, h], h // group if h < heads else h - heads
        if qk_mean:
            of = [h] if h < heads else range(g * group, g * group + group)
            row = row + sum((z[:, m] + z[:, heads + g]) / 2 for m in of) / len(of)
        if (beta := own.get("temperature")) is not None:
            row = width**0.5 * row / row.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            row = row if h < heads else row * beta[g].exp()
        found.append(row)
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    q, k = torch.stack(found[:heads], dim=1), torch.stack(found[heads:], dim=1)
    return joined(attend(q, k, v, mask=mask), parameters)
