"""The tokens that each slice of an attention block was chosen by, as blocks for a few calls of attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from polyhead.nn.chosen_rows import ChosenRows, Group, Lane

__all__ = ["ranks", "selected_groups"]

_FILLING = 16
_CALL = 1 << 16  # pairs of query and key that cost as much as a call


def ranks(chosen: Tensor) -> Tensor:
    """int64 `(B, S, N)`: the how-manyth of its token's slices each one is, where bool `chosen` says it is."""
    return chosen.cumsum(-1) - 1


def selected_groups(
    queries: ChosenRows, keys: ChosenRows, *, alone: bool = False
) -> Iterator[tuple[Group, Group]]:
    """The lanes that have queries, in groups of nearly equal size: their rows, and their keys.

    A lane is what one slice has of one sequence. What is only there to fill a block up is at most a
    sixteenth of the pairs of a group, or costs less than another call.

    Args:
        queries, keys: who was chosen among the queries of a call, and among its keys. Where there is a
            query there is a key: its own.
        alone: whether every lane is a group of its own.
    """
    of = {(lane.head, lane.item): lane for lane in keys.lanes}
    pairs = [(lane, of[lane.head, lane.item]) for lane in queries.lanes]
    pairs.sort(key=lambda pair: (-pair[1].count, -pair[0].count))
    groups: list[list[tuple[Lane, Lane]]] = []
    area = rows = most = 0
    for row, key in pairs:
        grown = max(rows, row.count)
        full = (len(groups[-1]) + 1) * grown * most if groups else 0
        filling = full - area - row.count * key.count
        if groups and not alone and (filling <= _CALL or filling * _FILLING <= full):
            groups[-1].append((row, key))
            area, rows = area + row.count * key.count, grown
        else:
            groups.append([(row, key)])
            area, rows, most = row.count * key.count, row.count, key.count
    for group in groups:
        yield tuple(_block([pair[n] for pair in group], queries.place.device) for n in (0, 1))  # type: ignore[misc]


def _block(lanes: list[Lane], device: torch.device) -> Group:
    """Lanes as they come; short ones repeat their last row."""
    rows = max(lane.count for lane in lanes)
    starts = torch.tensor([lane.start for lane in lanes], device=device)[:, None]
    last = torch.tensor([lane.count - 1 for lane in lanes], device=device)[:, None]
    return Group(tuple(lanes), rows, starts + torch.arange(rows, device=device).minimum(last))
