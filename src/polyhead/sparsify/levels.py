"""The level at which a method reads a given share of the keys that it may see."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyhead.hf import Call, attach
from polyhead.hf.handles import keys_of
from polyhead.hf.selecting import densely
from polyhead.sparsify.counting import keys_read
from polyhead.sparsify.methods import Method
from polyhead.sparsify.reading import Case
from polyhead.tasks.reading import evaluating

__all__ = ["HELD", "Heard", "listen", "solve"]

HELD = 2 << 30
"""Bytes of queries and keys that are kept: of all layers, or else of as many, evenly spaced, as fit."""

_NEAR = 0.02  # a share is met within so much of itself
_TRIES = 13


@dataclass(frozen=True)
class Heard:
    """What the layers of a model asked for when it read a text densely.

    Attributes:
        case: the model, and the number of tokens.
        calls: of the layers whose queries and keys were kept, in order.
        evenly: the layers that stand for all, evenly spaced.
        seen: for every layer, how many keys its queries saw.
    """

    case: Case
    calls: tuple[Call, ...]
    evenly: frozenset[int]
    seen: tuple[float, ...]


def listen(model: Any, ids: Tensor, *, followed: Collection[int] = (), held: int = HELD) -> Heard:
    """Let a model read a text densely, and keep what its layers ask for.

    Args:
        model: it is given back as it was.
        ids: of the text, `(S,)`.
        followed: layers that are kept in any case.
        held: bytes that are kept beyond those.
    """
    with evaluating(model), attach(model) as attachment:
        layers = tuple(attachment.layers)
        case = Case(model, layers, len(ids))
        width = next(model.parameters()).element_size()
        most = max((one.heads + one.kv_heads) * one.head_dim for one in layers) * len(ids) * width
        evenly = _spaced(len(layers), max(1, held // most))
        calls: dict[int, Call] = {}
        seen = [0.0] * len(layers)

        def note(call: Call) -> Tensor:
            index, own = call.layer.index, densely(call)
            seen[index] = keys_read(call)
            if index in evenly or index in followed:
                k = keys_of(call)
                calls[index] = call.replace(k=k, v=k, below=())  # values choose nothing
            return own.proceed()

        with attachment.handling(note):
            getattr(model, "base_model", model)(ids[None].to(model.device), use_cache=False)
    return Heard(case, tuple(calls[index] for index in sorted(calls)), evenly, tuple(seen))


def _spaced(layers: int, count: int) -> frozenset[int]:
    count = min(count, layers)
    return frozenset(round((n + 0.5) * layers / count - 0.5) for n in range(count))


def solve(
    method: Method, share: float, heard: Heard, told: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """The level at which a method reads `share` of the keys, and what it does read there.

    By bisection, which begins where a method would be whose level is a number of tokens for every query.
    Where a method reads more at its lowest level, or less at its highest, that one is given.
    """
    low, high, best = 0.0, 1.0, (1.0, 1.0)
    level = 1 - math.sqrt(1 - share)  # Σ min(i, n) of Σ i is 1 - (1 - n / L)², for long texts
    for _ in range(_TRIES):
        read = _read(method, level, heard)
        told()
        if abs(read - share) < abs(best[1] - share):
            best = level, read
        if abs(read - share) <= _NEAR * share:
            break
        low, high = (level, high) if read < share else (low, level)
        level = (low + high) / 2
    return best


@torch.no_grad()
def _read(method: Method, level: float, heard: Heard) -> float:
    """Of the visible keys of all layers, the share that is read.

    Layers that were not kept read as much as the mean of those evenly spaced, but for those of which it is
    known that they read everything.
    """
    reader = method.reader(level, heard.case)
    whole = {index for index in range(len(heard.seen)) if index in reader.whole}
    read = seen = 0.0
    for call in heard.calls:
        index = call.layer.index
        own = reader.read(call)
        if index in heard.evenly and index not in whole:
            read, seen = read + own.keys(), seen + heard.seen[index]
    full = sum(heard.seen[index] for index in whole)
    rest = sum(heard.seen) - full
    return (full + (rest * read / seen if seen else rest)) / sum(heard.seen)
