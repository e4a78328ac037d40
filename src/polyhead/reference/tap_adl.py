"""Attention over tokens that are blended with their neighbours, and the loss of weights that are alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.grouped_query import grouped_query
from polyhead.reference.projection import real
from polyhead.reference.registry import twin

__all__ = ["attention_diversification", "tap_adl"]


@twin("tap_adl")
def tap_adl(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    scales: int,
    layout: str | tuple[int, int],
    temperature: float,
    class_token: bool = False,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """x'_t = Σ_i m_i(t) avg_i(x)_t, place by place of a grid of a row or more; then grouped-query attention.

    Args:
        x, parameters, heads, kv_heads, mask, padding: as in `grouped_query`.
        scales, temperature: K and T.
        layout: "past", "around" or the (height, width) of the grid.
        class_token: whether the first token is none of the grid, and stays as it is.
    """
    whole = real(x, padding)
    x = whole[:, int(class_token) :]
    length = x.shape[1]
    height, width = (1, length) if isinstance(layout, str) else layout
    steps = (-2, -1, 0) if layout == "past" else (-1, 0, 1)
    taps = [(dy, dx) for dy in ((0,) if isinstance(layout, str) else steps) for dx in steps]
    p = {name.removeprefix("pooling."): t.double() for name, t in parameters.items()}

    def at(z: Tensor, t: int, dy: int, dx: int) -> Tensor:
        row, column = t // width + dy, t % width + dx
        inside = 0 <= row < height and 0 <= column < width
        return z[:, row * width + column] if inside else torch.zeros_like(z[:, 0])

    def convolved(z: Tensor, weight: Tensor) -> Tensor:
        terms = [[at(z, t, *tap) @ weight[n].T for n, tap in enumerate(taps)] for t in range(length)]
        return torch.stack([torch.stack(one).sum(0) for one in terms], dim=1)

    if scales > 1:
        hidden = convolved(x, p["first"])
        if "norm.running_mean" in p:
            hidden = (hidden - p["norm.running_mean"]) / (p["norm.running_var"] + 1e-5).sqrt()
        else:
            hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        hidden = hidden * p["norm.weight"] + p.get("norm.bias", 0.0)
        hidden = real(hidden, padding[:, int(class_token) :] if padding is not None else None)
        m = (convolved(hidden, p["second"]) / temperature).softmax(-1)
        blended = []
        for t in range(length):
            total = m[:, t, :1] * x[:, t]
            for i in range(1, scales):
                near = [at(x, t, i * dy, i * dx) for dy, dx in taps]
                total = total + m[:, t, i : i + 1] * torch.stack(near).mean(0)
            blended.append(total)
        x = torch.stack(blended, dim=1)
    x = torch.cat([whole[:, : int(class_token)], x], dim=1)
    return grouped_query(x, parameters=parameters, heads=heads, kv_heads=kv_heads, mask=mask, padding=padding)


@twin("attention_diversification")
def attention_diversification(weights: Tensor, threshold: float = 2.0) -> Tensor:
    """The mean over items b and rows i of cos(s_b, Ā_bi), where only entries above threshold / S are left.

    Args:
        weights: `(B, H, L, S)`; Ā is their mean over the heads, s the mean of Ā over its rows.
    """
    cosines = []
    for item in weights.double():
        each = item.mean(0)
        average = each.mean(0)
        t = threshold / each.shape[1]
        s = torch.where(average > t, average, 0.0)
        for row in each:
            a = torch.where(row > t, row, 0.0)
            size = s.norm() * a.norm()
            cosines.append((s @ a) / size if size > 0 else (s * a).sum())
    return torch.stack(cosines).mean()
