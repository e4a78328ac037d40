"""Multi-token attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["convolved", "multi_token_attention"]


@twin("pair_convolution")
def convolved(numbers: Tensor, kernel: Tensor, side: str = "both") -> Tensor:
    """y_ij = sum_a sum_b kernel[a, b] x_i-a,j+b-back for x `(L, S)`; beyond its borders stands 0."""
    queries, keys = numbers.shape
    c_q, c_k = kernel.shape
    back = {"both": (c_k - 1) // 2, "left": c_k - 1, "right": 0}[side]
    found = torch.zeros_like(numbers)
    for a in range(min(c_q, queries)):
        for b in range(c_k):
            first, last = max(0, back - b), min(keys, keys + back - b)  # the j with a key at j + b - back
            if first < last:
                share = numbers[: queries - a, first + b - back : last + b - back]
                shift = torch.zeros_like(numbers)
                shift[a:, first:last] = kernel[a, b] * share
                found = found + shift
    return found


@twin("multi_token_attention")
def multi_token_attention(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    side: str = "both",
    depth: int | None = None,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """The equations of the mechanism, head by head; forbidden pairs, and those of padded queries, are 0.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; a kernel, a mixture, a norm or a gate that it lacks is left out.
        heads, kv_heads: H and G, g = h // (H / G).
        side: where the keys of a kernel stand.
        depth: of the layer, None for no scaling.
        mask, padding: bool; see `reference`.
    """
    own = {name: value.double() for name, value in parameters.items()}
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q, group = heads_of(x, parameters, "query", heads), heads // kv_heads
    k, v = (heads_of(source, parameters, name, kv_heads) for name in ("key", "value"))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    batch, queries, keys = len(x), q.shape[2], k.shape[2]
    allowed = torch.ones((), dtype=torch.bool) if mask is None else mask
    if padding is not None:
        allowed = allowed & padding[:, None, None, :]
        allowed = allowed & padding[:, None, :, None] if context is None else allowed
    allowed = allowed.expand(batch, heads, queries, keys)

    def around(numbers: Tensor, name: str) -> Tensor:
        numbers = torch.where(allowed, numbers, 0.0)
        if name in own:
            maps = [[convolved(one[h], own[name][h], side) for h in range(heads)] for one in numbers]
            numbers = torch.stack([torch.stack(one) for one in maps])
        return numbers

    logits = around(q @ k.mT / math.sqrt(q.shape[-1]), "logit_kernel.weight")
    if "logit_mixing.weight" in own:
        logits = torch.einsum("hm,bmij->bhij", own["logit_mixing.weight"], logits)
    weights = logits.masked_fill(~allowed, -math.inf).softmax(-1)
    weights = torch.where(allowed, around(weights, "weight_kernel.weight"), 0.0)
    if "weight_mixing.weight" in own:
        grouped = weights.unflatten(1, own["weight_mixing.weight"].shape[:2])
        weights = torch.einsum("bgnij,gnm->bgmij", grouped, own["weight_mixing.weight"]).flatten(1, 2)
    o = torch.where(allowed, weights, 0.0) @ v
    if "gated_norm.gain" in own:
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * own["gated_norm.gain"]
    if "gated_norm.gate" in own:
        o = o * torch.sigmoid(o @ own["gated_norm.gate"] + own["gated_norm.bias"])[..., None]
    return joined(o if depth is None else o * (0.2 + 0.6 * math.exp(-0.3 * depth)), parameters)
