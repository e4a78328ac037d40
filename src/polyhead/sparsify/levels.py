"""The level at which a method reads a given share of the keys that it may see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyhead.attend.function import resolved
from polyhead.attend.masks import Mask
from polyhead.hf import Call, LayerInfo, attach
from polyhead.hf.selecting import by_layer, densely, keys_of
from polyhead.sparsify.methods import Method
from polyhead.sparsify.reading import keys_seen
from polyhead.tasks.reading import evaluating

__all__ = ["Asked", "listen", "solve"]

_NEAR = 0.02  # a share is met within so much of itself
_TRIES = 12
_HELD = 8  # layers whose queries and keys are kept


@dataclass(frozen=True)
class Asked:
    """What one layer asked for in a dense pass: queries, keys, and how many of them it may see."""

    layer: LayerInfo
    q: Tensor
    k: Tensor
    mask: Mask | None
    scale: float
    seen: float


def listen(model: Any, ids: Tensor) -> tuple[tuple[LayerInfo, ...], list[Asked]]:
    """The layers of a model, and what some of them, evenly spaced, ask for when it reads a text densely."""
    found: dict[int, Asked] = {}
    with evaluating(model), attach(model) as attachment:
        layers = tuple(attachment.layers)
        count = min(_HELD, len(layers))
        wanted = {round(n * (len(layers) - 1) / max(1, count - 1)) for n in range(count)}

        def note(call: Call) -> Tensor:
            if call.layer.index in wanted:
                q, k = call.q, keys_of(call)
                size = {"batch": q.shape[0], "heads": q.shape[1], "queries": q.shape[2], "keys": k.shape[2]}
                seen = float(keys_seen(call.mask, **size).double().sum())
                found[call.layer.index] = Asked(call.layer, q, k, call.mask, call.scale, seen)
            return densely(call).proceed()

        with attachment.handling(note):
            getattr(model, "base_model", model)(ids[None].to(model.device), use_cache=False)
    return layers, [found[index] for index in sorted(found)]


def solve(
    method: Method,
    share: float,
    layers: tuple[LayerInfo, ...],
    asked: list[Asked],
    told: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """The level at which a method reads `share` of the keys, and what it does read there.

    By bisection on the layers that were listened to. Where a method reads more at its lowest level, or less
    at its highest, that one is given.
    """
    tokens = asked[0].k.shape[2]
    low, high, best = 0.0, 1.0, (1.0, 1.0)
    for _ in range(_TRIES):
        level = (low + high) / 2
        read = _read(method, level, tokens, layers, asked)
        told()
        if abs(read - share) < abs(best[1] - share):
            best = level, read
        if abs(read - share) <= _NEAR * share:
            break
        low, high = (level, high) if read < share else (low, level)
    return best


@torch.no_grad()
def _read(
    method: Method, level: float, tokens: int, layers: tuple[LayerInfo, ...], asked: list[Asked]
) -> float:
    """Mean over layers of the share of visible keys that are read."""
    selectors = by_layer(method.make(level, tokens), layers)
    total = 0.0
    for one in asked:
        selector = selectors[one.layer.index]
        if selector is None:
            total += 1.0
            continue
        mask = resolved(one.q, one.k, one.mask, selector, one.scale)
        batch, heads, queries, _ = one.q.shape
        seen = keys_seen(mask, batch=batch, heads=heads, queries=queries, keys=one.k.shape[2])
        total += float(seen.double().sum()) / one.seen
    return total / len(asked)
