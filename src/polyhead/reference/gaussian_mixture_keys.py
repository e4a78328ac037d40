"""Gaussian mixture keys."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, normed, real
from polyhead.reference.registry import twin

__all__ = ["gaussian_mixture_keys"]


@twin("gaussian_mixture_keys")
def gaussian_mixture_keys(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    components: int,
    keys: str,
    variances: tuple[float, ...] | None,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """A_ij = sum_r π_r exp(-|q_i - k^r_j|² / (2 σ_r²)) over its sum over visible j; head_i = sum_j A_ij v_j.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; π is `prior`, μ is `shift`.
        heads, kv_heads: H and G, g = h // (H / G).
        components, keys, variances: M; "shifted", k^r = k - μ_r, or "separate"; σ².
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
    outputs = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        terms = []
        for r in range(components):
            variance = q.shape[-1] ** 0.5 / (3 if r else 1) if variances is None else variances[r]
            center = k[:, g]
            if keys == "shifted" and components > 1:
                center = center - parameters["shift"][r, h].double()
            elif r:
                maps = {f"projection.key.{n}": parameters.get(f"projection.keys.{r - 1}.{n}") for n in _BOTH}
                own = {name: value for name, value in maps.items() if value is not None}
                center = normed(heads_of(source, own, "key", kv_heads)[:, g], parameters, "key")
            distance = (q[:, h, :, None] - center[:, None]).square().sum(-1)
            prior = parameters["prior"][h, r].double().clamp(1e-9, 1) if components > 1 else torch.ones(())
            terms.append(prior.log() - distance / (2 * variance))
        density = torch.stack(terms).logsumexp(0).masked_fill(~seen[:, 0], -torch.inf)
        outputs.append(torch.nan_to_num(density.softmax(-1)) @ v[:, g])
    return joined(torch.stack(outputs, dim=1), parameters)


_BOTH = ("weight", "bias")
