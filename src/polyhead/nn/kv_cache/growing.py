"""Caches that keep every token: one that grows, one of a fixed size."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.selectors import Summaries, unchanged
from polyhead.checks import whole
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn.kv_cache.base import Kept, KeyValueCache, Streams, TokenRows, beams

__all__ = ["FixedCache", "GrowingCache"]


class GrowingCache(KeyValueCache):
    """Keeps everything; its memory doubles when it is full.

    A step copies only the new rows (amortised), and what it returns are views: decoding never copies the
    cache as a whole.

    Args:
        batch: number of sequences B.
        streams: (heads, width) of each kind of row; keys and values of plain attention are
            `((kv_heads, head_dim), (kv_heads, value_dim))`.
        capacity: tokens to make room for at the start.
        device, dtype: of the rows.

    Attributes:
        summaries: what a selector keeps of the first stream from call to call, `summaries.nbytes()` besides
            the rows that `nbytes()` counts; None: nothing is kept.
    """

    def __init__(
        self,
        batch: int,
        streams: Streams,
        *,
        capacity: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.length = 0
        self._tokens = TokenRows(type(self).__name__, batch, streams, capacity, device, dtype)
        self.summaries: Summaries | None = None
        self._left: tuple[Tensor, int | None, int] | None = None

    @property
    def device(self) -> torch.device:
        return self._tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self._tokens.dtype

    def _enlarge(self, length: int) -> int:
        """The room to make so that `length` tokens fit."""
        return max(length, 2 * self._tokens.room)

    def append(self, *rows: Tensor, padding: Tensor | None = None, positions: Tensor | None = None) -> Kept:
        tokens, summaries = self._tokens, self._vouched()
        differentiate = tokens.accept(rows, padding, positions)
        start, stop = self.length, self.length + rows[0].shape[2]
        room = self._enlarge(stop) if stop > tokens.room or differentiate else tokens.room
        if differentiate:
            # writing into a buffer that an earlier step's graph holds would spoil its gradients
            tokens.join([slice(0, start)], rows, padding, positions)
        else:
            if room > tokens.room:
                tokens.resize(room, 0, start)
            tokens.write(rows, padding, positions, start)
        self.length = stop
        seen, known = tokens.seen(0, stop)
        if summaries is not None:
            summaries.of(seen[0])
            self._leave()
        return Kept(seen, stop, known, summaries=summaries)

    def _vouched(self) -> Summaries | None:
        """The summaries, emptied if the rows are not as the cache itself left them."""
        if self.summaries is None or torch.compiler.is_compiling():
            return None
        held = self._tokens.streams[0]
        state = unchanged(held)
        left = self._left
        if left is None or left[0] is not held or state is None or left[1:] != (state, self.length):
            self.summaries.clear()
        return self.summaries

    def _leave(self) -> None:
        held = self._tokens.streams[0]
        self._left = held, unchanged(held), self.length

    def next_positions(self, count: int) -> Tensor | None:
        return self._tokens.following(self.length - 1, count) if self.length else None

    def nbytes(self) -> int:
        return self._tokens.nbytes()

    def reorder(self, beam_index: Tensor) -> None:
        index = beams(beam_index, self._tokens.batch)
        summaries = self._vouched()
        self._tokens.change(lambda held: held.index_select(0, index.to(held.device)))
        if summaries is not None:
            summaries.reorder(index)
            self._leave()

    def crop(self, length: int) -> None:
        if not 0 <= whole("crop: length", length, 0) <= self.length:
            raise ConfigError(f"crop: length must lie in 0..{self.length}, the tokens seen; got {length}")
        summaries = self._vouched()
        self.length = length
        if summaries is not None:
            summaries.crop(length)
            self._leave()

    def reset(self) -> None:
        self.length, self._left = 0, None
        self._tokens.change(Tensor.detach)
        self._tokens.padding = self._tokens.positions = None


class FixedCache(GrowingCache):
    """Keeps everything up to `max_length` tokens, in memory that is taken once.

    Args:
        batch, streams, device, dtype: as of `GrowingCache`.
        max_length: tokens that there is room for, at least 1.

    Raises:
        ConfigError: `max_length` is no whole number of at least 1.
        ShapeError: at an append for which there is no room.
    """

    def __init__(
        self,
        batch: int,
        streams: Streams,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        max_length = whole("FixedCache: max_length", max_length, 1)
        super().__init__(batch, streams, capacity=max_length, device=device, dtype=dtype)
        self.max_length = max_length

    def _enlarge(self, length: int) -> int:
        if length > self.max_length:
            raise ShapeError(
                f"FixedCache: {length - self.length} more tokens do not fit, it holds {self.length} of "
                f"max_length={self.max_length}; make it longer, or use a growing cache or one with a window"
            )
        return self.max_length
