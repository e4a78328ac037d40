"""The (head, token) pairs that were chosen, packed: no row for a pair that was not.

Rows are sorted by head, batch item and token, so that a head's rows lie together for its projections, and
a head's rows of one item lie together, in the order of time, for attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ChosenRows", "Group", "Lane"]

_FILLING = 16
_CALL = 1 << 16  # pairs of query and key that cost as much as a call


@dataclass(frozen=True)
class Lane:
    """The rows of one head and one batch item: `count` rows from `start` on."""

    head: int
    item: int
    start: int
    count: int


@dataclass(frozen=True)
class Group:
    """Lanes of nearly equal length, as a block `(len(lanes), rows)`.

    Attributes:
        lanes: the lanes, by batch item and head.
        rows: length of the longest.
        index: int64 `(lanes, rows)`, the packed row of each place; short lanes repeat their last row.
    """

    lanes: tuple[Lane, ...]
    rows: int
    index: Tensor

    def at(self, name: str) -> Tensor:
        """`head` or `item` of every lane, int64 `(lanes,)`."""
        return torch.tensor([getattr(lane, name) for lane in self.lanes], device=self.index.device)


class ChosenRows:
    """The rows of a choice.

    Args:
        chosen: bool `(B, L, R)`.

    Attributes:
        head, item, token: int64 `(P,)`, whose row each one is.
        place: int64 `(P,)`, the token's index in `(B · L)`.
        lanes: the lanes that have rows.
    """

    def __init__(self, chosen: Tensor) -> None:
        length = chosen.shape[1]
        self.head, self.item, self.token = chosen.permute(2, 0, 1).nonzero().unbind(1)
        self.place = self.item * length + self.token
        self.lanes: list[Lane] = []
        start = 0
        for head, counts in enumerate(chosen.sum(1).T.tolist()):
            for item, count in enumerate(counts):
                if count:
                    self.lanes.append(Lane(head, item, start, count))
                start += count

    def of_heads(self) -> Iterator[tuple[int, slice]]:
        """Each head that has rows, with them."""
        ends: dict[int, tuple[int, int]] = {}
        for lane in self.lanes:
            first = ends.get(lane.head, (lane.start, 0))[0]
            ends[lane.head] = (first, lane.start + lane.count)
        for head, (start, stop) in ends.items():
            yield head, slice(start, stop)

    def groups(self, keys: int, *, alone: bool = False) -> list[Group]:
        """The lanes in groups of nearly equal length; with `alone`, each is a group of its own.

        In a group, rows that are only there to fill it up are at most a sixteenth, or so few that with `keys`
        keys each they cost less than another call.
        """
        found: list[list[Lane]] = []
        own = filled = 0
        for lane in sorted(self.lanes, key=lambda lane: -lane.count):
            filling = filled + (found[-1][0].count - lane.count if found else 0)
            if found and not alone and (filling * keys <= _CALL or filling * _FILLING <= own):
                found[-1].append(lane)
                own, filled = own + lane.count, filling
            else:
                found.append([lane])
                own, filled = lane.count, 0
        return [self._group(lanes) for lanes in found]

    def _group(self, lanes: list[Lane]) -> Group:
        device = self.place.device
        lanes = sorted(lanes, key=lambda lane: (lane.item, lane.head))
        rows = max(lane.count for lane in lanes)
        starts = torch.tensor([lane.start for lane in lanes], device=device)[:, None]
        last = torch.tensor([lane.count - 1 for lane in lanes], device=device)[:, None]
        index = starts + torch.arange(rows, device=device).minimum(last)
        return Group(tuple(lanes), rows, index)

    def packed(self, groups: list[Group], blocks: list[Tensor]) -> Tensor:
        """Blocks `(lanes, rows, width)` of the groups as packed rows `(P, width)`."""
        base, shift = 0, {}
        for group in groups:
            for n, lane in enumerate(group.lanes):
                shift[lane.start] = base + n * group.rows - lane.start
            base += group.index.numel()
        device = self.place.device
        moved = torch.tensor([shift[lane.start] for lane in self.lanes], device=device)
        counts = torch.tensor([lane.count for lane in self.lanes], device=device)
        own = torch.arange(len(self.place), device=device)
        index = own + moved.repeat_interleave(counts, output_size=len(own))
        return torch.cat([block.flatten(0, 1) for block in blocks]).index_select(0, index)
