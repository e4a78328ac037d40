"""Multi-head mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.reference.choosing import largest
from polyhead.reference.projection import real
from polyhead.reference.registry import twin

__all__ = ["multi_head_moe"]


@twin("multi_head_moe")
def multi_head_moe(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    experts: int,
    top_k: int,
    renormalise: str | None,
    inner_residual: bool,
    padding: Tensor | None = None,
) -> Tensor:
    """o^s = Σ_j g_j f_j(x^s) with every expert computed, g zero but for k of them; y = merged + shared.

    Args:
        x, padding: as in `grouped_query`.
        parameters: `head.*`, `merge.*` and `shared.*` may be missing; with `experts.gate` an expert is gated.
        heads, experts, top_k, renormalise, inner_residual: h, N, k, and the options.
    """
    x = real(x, padding)
    p = {name: value.double() for name, value in parameters.items()}

    def linear(z: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in p:
            return z
        return z @ p[f"{name}.weight"].T + p.get(f"{name}.bias", torch.zeros(1)).double()

    def expert(z: Tensor, owner: str, j: int) -> Tensor:
        def part(z: Tensor, name: str) -> Tensor:
            bias = p.get(f"{owner}.{name}_bias")
            return z @ p[f"{owner}.{name}"][j].T + (0 if bias is None else bias[j])

        if f"{owner}.gate" in p:
            return part(F.silu(part(z, "gate")) * part(z, "up"), "down")
        return part(F.gelu(part(z, "up")), "down")

    outputs = []
    for s in linear(x, "head").chunk(heads, dim=-1):
        scores = (s @ p["router.gate.weight"].T).softmax(-1)
        g = scores * largest(scores, top_k)
        g = g if renormalise is None else g / g.sum(-1, keepdim=True)
        o = s if inner_residual else torch.zeros_like(s)
        for j in range(experts):
            o = o + g[..., j : j + 1] * expert(s, "experts", j)
        outputs.append(o)
    y = linear(torch.cat(outputs, dim=-1), "merge")
    return y + expert(x, "shared", 0) if "shared.up" in p else y
