"""Attention weights of trained models, and how heads differ by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from polyhead.nn.attention import MultiHeadAttention

Maps = list[Tensor]  # (B, H, L, S) of every layer


@torch.no_grad()
def maps_of(model: nn.Module, call: Callable[[], object]) -> Maps:
    """The weights that every attention layer of a model uses in a call, in the order of the call."""
    calls: list[Callable[[], Tensor]] = []
    layers = [one for one in model.modules() if isinstance(one, MultiHeadAttention)]

    def watched(layer: MultiHeadAttention) -> Callable[..., Tensor]:
        mix = layer._mix

        def seen(q: Tensor, rows: tuple[Tensor, ...], **options: object) -> Tensor:
            calls.append(partial(layer._weights, q, rows, **options))
            return mix(q, rows, **options)

        return seen

    for layer in layers:
        layer._mix = watched(layer)  # type: ignore[method-assign]
    try:
        call()
    finally:
        for layer in layers:
            del layer._mix
    return [weights() for weights in calls]


def _pairs(heads: int) -> Iterable[tuple[int, int]]:
    return ((a, b) for a in range(heads) for b in range(a + 1, heads))


def divergence(maps: Tensor) -> float:
    """Mean Jensen-Shannon divergence of the heads of a layer, in bits: of the rows of every two heads."""
    p = maps.double().clamp(min=0)

    def bits(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(one > 0, one * (one / other).log2(), 0.0).sum(-1)

    found = []
    for a, b in _pairs(p.shape[1]):
        middle = (p[:, a] + p[:, b]) / 2
        found.append(float((bits(p[:, a], middle) + bits(p[:, b], middle)).mean() / 2))
    return sum(found) / len(found)


def distance(maps: Tensor) -> float:
    """Mean Euclidean distance of the rows of every two heads of a layer."""
    found = [float((maps[:, a] - maps[:, b]).norm(dim=-1).mean()) for a, b in _pairs(maps.shape[1])]
    return sum(found) / len(found)
