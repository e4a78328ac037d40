"""Multi-head latent attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.positions import rope
from polyhead.reference.projection import joined, real
from polyhead.reference.registry import twin

__all__ = ["multi_head_latent"]


@twin("multi_head_latent")
def multi_head_latent(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    latent_dim: int,
    rope_dim: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """k_h = [c W_UK^h | RoPE(x W_KR)], v_h = c W_UV^h with c = RMSNorm(x W_DKV), head by head.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x. Queries stand at S - L..S-1.
        parameters: the module's state; with a query latent where it has `query_down`.
        heads, kv_heads: H and G; query head h reads head h // (H/G).
        latent_dim, rope_dim: widths of c and of the rotary part.
        mask, padding: bool; see `reference`.
    """
    weight = {name.removeprefix("projection."): w.double() for name, w in parameters.items()}

    def norm(z: Tensor, name: str) -> Tensor:
        return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight[f"{name}.weight"]

    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    keys, queries = source.shape[1], x.shape[1]
    both = source @ weight["latent.weight"].T
    latent = norm(both[..., :latent_dim], "latent_norm")
    shared = rope(both[:, None, :, latent_dim:], torch.arange(keys))[:, 0]
    if "query_down.weight" in weight:
        x = norm(x @ weight["query_down.weight"].T, "query_norm")
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    outputs = []
    for h, w in enumerate(weight["query.weight"].chunk(heads)):
        q = (x @ w.T)[:, None]
        plain = q.shape[-1] - rope_dim
        q = torch.cat([q[..., :plain], rope(q[..., plain:], torch.arange(keys - queries, keys))], dim=-1)
        up, down = (
            weight[f"{name}.weight"].chunk(kv_heads)[h * kv_heads // heads] for name in ("key", "value")
        )
        k = torch.cat([latent @ up.T, shared], dim=-1)[:, None]
        outputs.append(attend(q, k, (latent @ down.T)[:, None], mask=mask))
    return joined(torch.cat(outputs, dim=1), parameters)
