"""`best_stops` inside `torch.compile`: one step of the graph, whatever the lengths are."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.nn.best_so_far import stops

__all__ = ["best_stops_opaque"]


@torch.library.custom_op(
    "polyhead::best_stops",
    mutates_args=(),
    schema="(Tensor numbers, SymInt keep, SymInt first, Tensor? real) -> Tensor",
)
def _stops(numbers: Tensor, keep: int, first: int, real: Tensor | None) -> Tensor:
    return stops(numbers, keep, first, real)


@_stops.register_fake
def _(numbers: Tensor, keep: int, first: int, real: Tensor | None) -> Tensor:
    return numbers.new_empty(numbers.shape, dtype=torch.int64)


def best_stops_opaque(numbers: Tensor, keep: int, first: int, real: Tensor | None) -> Tensor:
    """`best_stops` as one step of the graph that is being compiled."""
    found: Tensor = _stops(numbers, keep, first, real)
    return found
