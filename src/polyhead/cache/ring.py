"""Memory of heads that keep sinks and a window: a ring, in which nothing is ever moved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyhead.cache.dropped import Dropped
from polyhead.cache.policy import Keep
from polyhead.cache.rows import Rows
from polyhead.errors import ConfigError

__all__ = ["Ring"]


class Ring(Rows):
    """Heads that keep the first `sink` tokens and the last `window`: the newest overwrites the oldest.

    Token t lies in row t while there is room, then in row sink + (t - sink) % window. Softmax does not ask
    for an order, and keys carry their position, so nothing is ever moved. With padding, t counts the real
    tokens of each batch item, and `index` `(B, sink + window)` says which token of the sequence a row
    holds, -1 for none.
    """

    def __init__(self, keep: Keep, compensate: bool = False) -> None:
        super().__init__()
        assert keep.window is not None
        self.sink, self.window, self.size = keep.sink, keep.window, keep.sink + keep.window
        self.index: Tensor | None = None
        self.counts: Tensor | None = None  # (B,) real tokens seen, with padding
        self.least = 0  # of `counts`
        self.most = 0  # at least of `counts`
        self.dropped = Dropped() if compensate else None

    def used(self) -> int:
        return min(self.seen if self.counts is None else self.most, self.size)

    def tensors(self) -> list[Tensor]:
        more = [] if self.dropped is None else self.dropped.tensors()
        return super().tensors() + [t for t in (self.index, self.counts) if t is not None] + more

    def nbytes_used(self) -> int:
        unused = self.room - self.used() - (self.dropped is not None and self.any_dropped())
        return self.nbytes() - sum(t[:, :, :unused].numel() * t.element_size() for t in super().tensors())

    def _make_room(self, tokens: int, k: Tensor, v: Tensor) -> None:
        needed = min(tokens, self.size)
        # the row after the last stands for what was dropped
        whole = self.size + (self.dropped is not None)
        if needed == self.size:
            needed = whole
        if self.room < needed or self.keys is None:
            self._resize(min(max(needed, 2 * self.room, 16), whole), k, v)

    # -- without padding -------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        if real is not None and self.counts is None:
            self._mark(real)
        if self.counts is not None:
            return self._append_padded(k, v, real)
        start, stop = self.seen, self.seen + k.shape[2]
        self._make_room(stop, k, v)
        if self.dropped is not None and stop > self.size:
            self._drop(self.dropped, start, stop, k, v)
        keys, values = self.both
        if stop - start == 1:
            row = start if start < self.size else self.sink + (start - self.sink) % self.window
            keys[:, :, row : row + 1] = k
            values[:, :, row : row + 1] = v
        else:
            for rows, tokens in self._places(start, stop):
                keys[:, :, rows] = k[:, :, tokens]
                values[:, :, rows] = v[:, :, tokens]
        self.seen = stop
        self._write_mean()

    def _places(self, start: int, stop: int) -> list[tuple[slice, slice]]:
        """Which rows take which of the new tokens start..stop-1, in runs."""
        runs = []
        if start < self.sink:
            last = min(self.sink, stop)
            runs.append((slice(start, last), slice(0, last - start)))
        token = max(start, self.sink, stop - self.window)
        while token < stop:
            row = self.sink + (token - self.sink) % self.window
            count = min(stop - token, self.sink + self.window - row)
            runs.append((slice(row, row + count), slice(token - start, token - start + count)))
            token += count
        return runs

    def oldest(self) -> int:
        """The first token after the sinks that is held."""
        return max(min(self.sink, self.seen), self.seen - self.window)

    def view(self, first: int = 0, *, mean: bool = False) -> tuple[Tensor, Tensor]:
        """The rows from `first` on that hold something, in no order and without a copy.

        With `mean`, the last one is the mean of what was dropped.
        """
        keys, values = self.both
        stop = self.used() + mean
        return keys[:, :, first:stop], values[:, :, first:stop]

    def ordered(self) -> tuple[Tensor, Tensor]:
        """A copy of the rows in the order of their tokens: the sinks, then those from `oldest` on."""
        if self.seen <= self.size:
            parts = [slice(0, self.seen)]
        else:
            row = self.sink + (self.oldest() - self.sink) % self.window
            parts = [slice(0, self.sink), slice(row, self.size), slice(self.sink, row)]
        keys, values = (torch.cat([t[:, :, p] for p in parts], dim=2) for t in self.both)
        return keys, values

    def tokens(self, device: torch.device) -> Tensor:
        """Which token each row holds, `(B or 1, rows)`, -1 for none."""
        if self.index is not None:
            return self.index[:, : self.used()]
        row = torch.arange(self.used(), device=device)
        turns = (self.seen - 1 - row).div(self.window, rounding_mode="floor").clamp(min=0)
        return torch.where(row < self.sink, row, row + turns * self.window)[None]

    # -- with padding ----------------------------------------------------------------------------------

    def _mark(self, real: Tensor) -> None:
        """From here on, count each batch item's real tokens by itself; all tokens so far were real."""
        batch, device = real.shape[0], real.device
        index = torch.full((batch, self.size), -1, dtype=torch.int64, device=device)
        held = self.tokens(device)
        index[:, : held.shape[1]] = held
        self.index = index
        self.counts = torch.full((batch,), self.seen, dtype=torch.int64, device=device)
        self.least = self.most = self.seen

    def _append_padded(self, k: Tensor, v: Tensor, real: Tensor | None) -> None:
        assert self.index is not None
        assert self.counts is not None
        count, start = k.shape[2], self.seen
        self.most += count
        self._make_room(self.most, k, v)
        keys, values = self.both
        if real is None:
            rank, total = self.counts[:, None] + torch.arange(count, device=k.device), self.counts + count
            self.least += count
        else:
            rank = self.counts[:, None] + real.long().cumsum(1) - 1
            total = self.counts + real.sum(1)
            self.least = int(total.min()) if len(total) else 0
        kept = (rank < self.sink) | (rank >= total[:, None] - self.window)
        if real is not None:
            kept &= real
        if self.dropped is not None:
            new = ~kept if real is None else real & ~kept
            self.dropped.add(k, v, new)
            held = slice(0, self.size)
            self.dropped.add(keys[:, :, held], values[:, :, held], self._leaving(self.counts, total))
        row = torch.where(rank < self.sink, rank, self.sink + (rank - self.sink) % self.window)
        item, token = kept.nonzero(as_tuple=True)
        place = row[item, token]
        keys[item, :, place] = k[item, :, token]
        values[item, :, place] = v[item, :, token]
        self.index[item, place] = token + start
        self.counts = total
        self.seen = start + count
        self._write_mean()

    def _leaving(self, counts: Tensor, total: Tensor) -> Tensor:
        """The rows `(B, size)` that are overwritten when real tokens go from `counts` to `total`."""
        row = torch.arange(min(self.size, self.room), device=total.device) - self.sink
        counts = counts[:, None]
        turns = (counts - 1 - self.sink - row).div(self.window, rounding_mode="floor")
        rank = self.sink + row + turns * self.window
        return (row >= 0) & (counts - self.sink > row) & (rank < total[:, None] - self.window)

    # -- what was dropped ------------------------------------------------------------------------------

    def any_dropped(self) -> bool:
        """Whether some token is no longer held."""
        return (self.seen if self.counts is None else self.most) > self.size

    def _drop(self, dropped: Dropped, start: int, stop: int, k: Tensor, v: Tensor) -> None:
        """Count the tokens that leave when tokens start..stop-1 come."""
        first, last = max(self.sink, start - self.window), stop - self.window  # tokens first..last-1 leave
        if stop - start == 1:
            row = self.sink + (first - self.sink) % self.window
            keys, values = self.both
            dropped.add(keys[:, :, row : row + 1], values[:, :, row : row + 1])
            return
        if first < start:
            keys, values = self.ordered()
            behind = keys.shape[2] - (start - self.oldest())
            part = slice(behind + first - self.oldest(), behind + min(last, start) - self.oldest())
            dropped.add(keys[:, :, part], values[:, :, part])
        if last > start:
            part = slice(max(first, start) - start, last - start)
            dropped.add(k[:, :, part], v[:, :, part])

    def _write_mean(self) -> None:
        if self.dropped is not None and self.any_dropped():
            for memory, mean in zip(self.both, self.dropped.means(), strict=True):
                memory[:, :, self.size] = mean

    # -- the whole batch -------------------------------------------------------------------------------

    def change(self, select: Callable[[Tensor], Tensor]) -> None:
        super().change(select)
        if self.index is not None and self.counts is not None:
            self.index, self.counts = select(self.index), select(self.counts)
            self.least = int(self.counts.min()) if len(self.counts) else 0
        if self.dropped is not None:
            self.dropped.change(select)

    def check_crop(self, length: int) -> None:
        if length < self.seen and length > 0 and self.any_dropped():
            raise ConfigError(
                f"crop to {length} of {self.seen} tokens: heads that keep {self.sink} sink and "
                f"{self.window} recent tokens have dropped some that would be seen again; only a cache with "
                "full='all' can always go back"
            )

    def crop(self, length: int) -> None:
        if length == self.seen:
            return
        if length == 0:
            return self.reset()
        if self.index is not None and self.counts is not None:
            self.index = torch.where(self.index < length, self.index, -1)
            self.counts = (self.index >= 0).sum(1)
            self.least, self.most = int(self.counts.min()), length
        self.seen = length

    def reset(self) -> None:
        super().reset()
        self.index = self.counts = None
        self.least = self.most = 0
        if self.dropped is not None:
            self.dropped = Dropped()
