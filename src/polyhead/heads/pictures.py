"""Small pictures of attention maps, and the places that single tokens look at; streamed like measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.heads.rows import Rows, View

__all__ = ["LookupGauge", "Lookups", "PictureGauge", "Pictures"]

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Attention maps of all heads, made small. Queries and keys are cut into `side` equal stretches.

    Attributes:
        side: number of stretches; stretch a holds the positions p with p * side // length == a.
        mass: per layer `(H, side, side)`: mean over the queries of stretch a of the attention that they give
            to stretch b in sum; each row sums to 1 (softmax).
        peak: per layer `(H, side, side)`: the largest single weight between stretches a and b.
    """

    side: int
    mass: tuple[Array, ...]
    peak: tuple[Array, ...]

    def __getitem__(self, head: tuple[int, int]) -> Array:
        """`mass` of (layer, head)."""
        layer, index = head
        return self.mass[layer][index]


@dataclass(frozen=True, eq=False)
class Lookups:
    """Where every head looks from chosen tokens.

    Attributes:
        queries: the positions of these tokens.
        positions: per layer int64 `(H, queries, k)`: the most attended positions, most attended first, -1
            where a token may look at fewer.
        weights: per layer `(H, queries, k)`: their weights, 0 where there is none.
    """

    queries: tuple[int, ...]
    positions: tuple[NDArray[np.int64], ...]
    weights: tuple[Array, ...]

    def of(self, layer: int, head: int, query: int) -> list[tuple[int, float]]:
        """The (position, weight) pairs that a head looks at from token `query`."""
        if query not in self.queries:
            raise ConfigError(
                f"query {query} was not asked for; the lookups have {len(self.queries)} queries"
            )
        at = self.queries.index(query)
        pairs = zip(
            self.positions[layer][head, at].tolist(), self.weights[layer][head, at].tolist(), strict=True
        )
        return [(p, w) for p, w in pairs if p >= 0]


class PictureGauge:
    """Makes the pictures of one layer, of the first item of the first call."""

    needs_logits = False

    def __init__(self, side: int) -> None:
        if side < 1:
            raise ConfigError(f"the side of a picture must be at least 1, got {side}")
        self.side = side
        self.mass: Tensor | None = None
        self.peak: Tensor | None = None
        self._busy = False

    def begin(self, view: View) -> None:
        self._busy = self.mass is None
        if self._busy:
            self.view = view
            self.side = min(self.side, view.queries, view.keys)
            self.mass = view.zeros(view.heads, self.side, self.side)
            self.peak = self.mass.float()
            self.row_cell = torch.arange(view.queries, device=view.device) * self.side // view.queries
            self.key_cell = torch.arange(view.keys, device=view.device) * self.side // view.keys

    def take(self, rows: Rows) -> None:
        if not self._busy or rows.tile.batch_start > 0:
            return
        assert self.mass is not None
        assert self.peak is not None
        weights = rows.weights[0]
        heads = rows.tile.head_slice
        cell = self.row_cell[rows.tile.row_slice]
        first, last = int(cell[0]), int(cell[-1]) + 1
        keys = self.key_cell[rows.j]
        # rows first, by one small product; the columns of what remains are few
        member = (cell == torch.arange(first, last, device=cell.device)[:, None]).to(weights.dtype)
        mass = torch.matmul(member, weights)  # (h, cells, c)
        part = mass.new_zeros(*mass.shape[:2], self.side).index_add_(-1, keys, mass)
        self.mass[heads, first:last] += part
        for a in range(first, last):
            start, stop = torch.searchsorted(cell, torch.tensor([a, a + 1], device=cell.device)).tolist()
            top = weights[:, start:stop].amax(1)
            found = top.new_zeros(top.shape[0], self.side)
            found.scatter_reduce_(-1, keys.expand(top.shape), top, "amax")
            self.peak[heads, a] = torch.maximum(self.peak[heads, a], found.float())

    def end(self, output: Tensor) -> None:
        if self._busy and self.mass is not None:
            visible = self.view.visible.keys[0]  # (H|1, L): rows that see nothing are no part of a mean
            live = (visible > 0).double()
            rows = live.new_zeros(live.shape[0], self.side).index_add_(-1, self.row_cell, live)
            self.mass = self.mass / rows.clamp(min=1).unsqueeze(-1)
        self._busy = False

    def result(self) -> Tensor:
        """The masses."""
        assert self.mass is not None
        return self.mass


class LookupGauge:
    """Finds the most attended positions in one layer, of the first item of the first call."""

    needs_logits = False

    def __init__(self, queries: Sequence[int], k: int) -> None:
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        self.queries = torch.tensor(queries, dtype=torch.int64)
        self.k = k
        self.positions: Tensor | None = None
        self.weights: Tensor | None = None
        self._busy = False

    def begin(self, view: View) -> None:
        self._busy = self.positions is None
        if self._busy:
            self.queries = self.queries.to(view.device)
            shape = (view.heads, len(self.queries), self.k)
            self.positions = torch.full(shape, -1, dtype=torch.int64, device=view.device)
            self.weights = torch.zeros(shape, dtype=torch.float32, device=view.device)

    def take(self, rows: Rows) -> None:
        if not self._busy or rows.tile.batch_start > 0:
            return
        assert self.positions is not None
        assert self.weights is not None
        at = ((self.queries >= rows.i[0]) & (self.queries <= rows.i[-1])).nonzero().flatten()
        if not len(at):
            return
        k = min(self.k, len(rows.j))
        found, place = rows.weights[0][:, self.queries[at] - rows.i[0]].topk(k, dim=-1)
        heads = rows.tile.head_slice
        self.positions[heads, at, :k] = torch.where(found > 0, rows.j[place], -1)
        self.weights[heads, at, :k] = found.float()

    def end(self, output: Tensor) -> None:
        self._busy = False

    def result(self) -> Tensor:
        """The positions."""
        assert self.positions is not None
        return self.positions
