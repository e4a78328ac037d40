"""Affine-scaled attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["affine_scaled"]


@twin("affine_scaled")
def affine_scaled(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    shift: bool,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """A_ij = α_i softmax_j(q_i·k_j / √D) + (average - α_i) / N_i, α_i = σ(x_i W + b); y = sum_h A_h v_g W_Oh.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; W and b are `row_scale`, the average is `average`.
        heads, kv_heads: H and G, g = h // (H / G).
        shift: whether there is a second term.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    shape = (len(x), 1, x.shape[1], source.shape[1])
    seen = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    if padding is not None:
        seen = seen & padding[:, None, None, :]
    eye = torch.eye(source.shape[1], dtype=torch.float64).expand(len(x), 1, -1, -1)
    outputs = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        logit = x @ parameters["row_scale.weight"][h].double() + parameters["row_scale.bias"][h].double()
        alpha = 1 / (1 + (-logit).exp())
        weights = attend(q[:, h : h + 1], k[:, g : g + 1], eye, mask=seen)[:, 0] * alpha[..., None]
        if shift:
            visible = seen[:, 0].double()
            lacking = parameters["average"][h].double() - alpha
            weights = weights + visible * (lacking / visible.sum(-1).clamp(min=1))[..., None]
        outputs.append(weights @ v[:, g])
    return joined(torch.stack(outputs, dim=1), parameters)
