"""Optimised, efficient and super attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, normed, real
from polyhead.reference.registry import twin

__all__ = ["super_attention"]


@twin("super_attention", "efficient_attention", "optimised_attention")
def super_attention(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    causal: bool = False,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_h = attend(x W_Qh, k_h, v_h), k_h = c W_Kh, or slice c_h without W_K, v_h = (W_A c + b)_h.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; without W_A the values are slices of the context itself.
        heads: H.
        causal: whether W_A has no entry (j, i) with i > j.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    slices = torch.stack(source.chunk(heads, dim=-1), dim=1)
    q = heads_of(x, parameters, "query", heads)
    if "projection.key.weight" in parameters:
        k = heads_of(source, parameters, "key", heads)
    else:
        k = normed(slices, parameters, "key")
    v = slices
    if "kernel" in parameters:
        kernel, length = parameters["kernel"].double(), source.shape[1]
        bias = parameters.get("kernel_bias", torch.zeros(len(kernel))).double()
        mixed = [
            sum(kernel[j, i] * source[:, i] for i in range(j + 1 if causal else length)) + bias[j]
            for j in range(length)
        ]
        v = torch.stack(torch.stack(mixed, dim=1).chunk(heads, dim=-1), dim=1)
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    return joined(attend(q, k, v, mask=mask), parameters)
