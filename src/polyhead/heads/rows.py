"""What a measurement gets to see: some whole rows of attention weights, and the call they are part of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from polyhead.attend.tile import Tile
from polyhead.errors import ConfigError
from polyhead.heads.visible import Visible

__all__ = ["Rows", "View"]


@dataclass(frozen=True, eq=False)
class View:
    """One attention call that is being watched.

    Attributes:
        kind: "decoder", "encoder" or "cross", as `polyhead.hf.LayerInfo` says it.
        batch, heads, queries, keys: the sizes B, H, L and S of the call.
        visible: which rows count, and how many keys each row may look at.
        ids: token ids `(B, S)` of the keys, where they are known.
        projection: the layer's output projection by heads, `(H, Dv, d)`, where it was found.
        start: which token of the sequence key position 0 is; above 0 where a cache has dropped some.
        marks: what the source says of the sequence, counted in tokens of the sequence, such as where a
            needle lies.
        buffers: memory for the rows under way, which the calls of a forward pass share.
    """

    kind: str
    batch: int
    heads: int
    queries: int
    keys: int
    visible: Visible
    ids: Tensor | None = None
    projection: Tensor | None = None
    start: int = 0
    marks: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the call is computed."""
        return self.visible.keys.device

    def zeros(self, *shape: int) -> Tensor:
        """A float64 accumulator."""
        return torch.zeros(shape, dtype=torch.float64, device=self.device)


class Rows:
    """Some whole rows of the weights of a call: batch items b, heads h, query rows r, key columns c.

    Attributes:
        view: the call.
        tile: which items, heads, query and key positions these are; pairs outside have weight 0.
        weights: `(b, h, r, c)`. A buffer that is used again: keep what is computed from it, never itself.
        logits: `(b, h, r, c)` after the score maps, -inf at forbidden pairs; None unless asked for.
    """

    def __init__(self, view: View, tile: Tile, logits: Tensor | None, weights: Tensor) -> None:
        self.view = view
        self.tile = tile
        self.logits = logits
        self.weights = weights

    @property
    def i(self) -> Tensor:
        """Query positions `(r,)`."""
        return self.tile.rows

    @property
    def j(self) -> Tensor:
        """Key positions `(c,)`, ascending."""
        return self.tile.cols

    def of_call(self, per_row: Tensor) -> Tensor:
        """The rows' share `(b|1, h|1, r)` of something of the whole call, `(B|1, H|1, L)`."""
        tile = self.tile
        found = per_row[..., tile.row_slice]
        if found.shape[0] > 1:
            found = found[tile.batch_slice]
        return found[:, tile.head_slice] if found.shape[1] > 1 else found

    @cached_property
    def counted(self) -> Tensor:
        """Which rows count, bool `(b|1, h|1, r)`: real tokens with two keys or more to look at."""
        return self.of_call(self.view.visible.counted)

    @cached_property
    def keys(self) -> Tensor:
        """How many keys each row may look at, `(b|1, h|1, r)`."""
        return self.of_call(self.view.visible.keys)

    @cached_property
    def first(self) -> Tensor:
        """Position of the first real token of each batch item, `(b|1, 1, 1)`."""
        first = self.view.visible.first
        return (first if len(first) == 1 else first[self.tile.batch_slice]).view(-1, 1, 1)

    def within(self, positions: Tensor, mark: str) -> Tensor:
        """Which of the (query or key) `positions` `(p,)` lie in a marked span `(B, 2)`, bool `(b, p)`."""
        if mark not in self.view.marks:
            raise ConfigError(
                f"a measurement asks where the {mark!r} is, which is not known; give it in marks"
            )
        spans = self.view.marks[mark][self.tile.batch_slice] - self.view.start
        return (positions >= spans[:, :1]) & (positions < spans[:, 1:])

    @property
    def ids(self) -> Tensor:
        """Token ids of all keys, `(b, S)`."""
        if self.view.ids is None:
            raise ConfigError("a measurement compares tokens, and their ids are not known; give ids (B, S)")
        return self.view.ids[self.tile.batch_slice]

    @cached_property
    def total(self) -> Tensor:
        """Sum of each row's weights, `(b, h, r)`: 1 for plain softmax."""
        return self.weights.sum(-1)

    @cached_property
    def difference(self) -> Tensor:
        """i - j for every pair, `(r, c)`."""
        return self.i[:, None] - self.j[None, :]

    def weighed(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """sum_j w_ij values_ij for every row, `(b, h, r)`, with `values` `(r, c)`."""
        weights = self.weights if weights is None else weights
        return torch.einsum("bhrc,rc->bhr", weights, values.to(weights.dtype))

    def on(self, position: Tensor) -> Tensor:
        """The weight of each row on one key, `(b, h, r)`; 0 where the key is not among the columns.

        Args:
            position: key positions, int64, broadcastable to `(b, h, r)`.
        """
        place = torch.searchsorted(self.j, position.contiguous()).clamp(max=len(self.j) - 1)
        there = self.j[place] == position
        shape = self.weights.shape[:3]
        found = self.weights.gather(-1, place.expand(shape).unsqueeze(-1)).squeeze(-1)
        return found * there

    def band(self, low: int, high: int) -> tuple[slice, Tensor]:
        """The columns in which low <= i - j <= high holds for some row, and i - j there, `(r, columns)`."""
        ends = torch.stack([self.i[0] - high, self.i[-1] - low + 1])
        start, stop = torch.searchsorted(self.j, ends).tolist()
        columns = slice(start, max(start, stop))
        return columns, self.i[:, None] - self.j[None, columns]

    @cached_property
    def received(self) -> Tensor:
        """Sum of the counted rows' weights on each column, `(b, h, c)`."""
        rows = self.counted.to(self.weights.dtype).unsqueeze(-2)
        return torch.matmul(rows.expand(*self.weights.shape[:2], -1, -1), self.weights).squeeze(-2)

    def add_to_keys(self, total: Tensor, amount: Tensor, columns: slice = slice(None)) -> None:
        """total[b, h, j] += amount for the rows' items, heads and (some) columns; `total` is `(B, H, S)`."""
        target = total[self.tile.batch_slice, self.tile.head_slice]
        j = self.j[columns]
        if self.tile.consecutive and len(j):
            start = int(j[0])
            target[..., start : start + len(j)] += amount
        else:
            target.index_add_(-1, j, amount.to(total.dtype))

    def buffer(self, name: str) -> Tensor:
        """Memory of the shape of the weights; the same for all rows of a call."""
        size = self.weights.numel()
        held = self.view.buffers.get(name)
        if held is None or held.numel() < size or held.dtype != self.weights.dtype:
            held = self.view.buffers[name] = self.weights.new_empty(size)
        return held[:size].view(self.weights.shape)

    @cached_property
    def entropy(self) -> Tensor:
        """-sum_j p_ij log p_ij of each row in nats, `(b, h, r)`, with p = w / sum_j w; 0 where that is 0."""
        w = self.weights
        logs = torch.clamp(w, min=torch.finfo(w.dtype).tiny, out=self.buffer("logs")).log_()
        inner = torch.linalg.vecdot(w, logs)
        total = self.total
        entropy = total.log() - inner / total
        return torch.where(total > 0, entropy, torch.zeros_like(entropy)).clamp_(min=0.0)
