"""The latest rows of a sequence, in one piece of memory of one size."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.nn.kv_cache.base import Streams, TokenRows

__all__ = ["RecentRows"]


class RecentRows:
    """Rows from some place of the sequence on; what stands before is dropped when room is needed.

    Args:
        name: the cache that they belong to, for messages.
        batch: B.
        streams: (heads, width) of every kind of row.
        room: tokens that there is room for; more, for one call, where a call brings more.
        device, dtype: of the rows.

    Attributes:
        start, stop: places in the sequence of the first row that is held and of the next.
    """

    def __init__(
        self,
        name: str,
        batch: int,
        streams: Streams,
        room: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.start = self.stop = 0
        self.room = room
        self.tokens = TokenRows(name, batch, streams, room, device, dtype)

    def append(
        self,
        rows: tuple[Tensor, ...],
        padding: Tensor | None,
        positions: Tensor | None,
        *,
        needed: int,
        keep: int,
        keep_after: int,
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Take the rows of new tokens; give those from `needed` on, and which are real.

        Args:
            rows, padding, positions: as for a cache's `append`.
            needed: the place from which this call reads.
            keep: the place from which rows have to stay before the call, at most `needed`.
            keep_after: the same of what stays after it.
        """
        tokens = self.tokens
        differentiate = tokens.accept(rows, padding, positions)
        count, held = rows[0].shape[2], self.stop - self.start
        keep = max(keep, self.start)
        fits = held + count <= tokens.room
        if not differentiate and not fits and self.stop - keep + count <= self.room:
            tokens.resize(self.room, keep - self.start, held)
            self.start, held, fits = keep, self.stop - keep, True
        if fits and not differentiate:
            tokens.write(rows, padding, positions, held)
            self.stop += count
            return tokens.seen(needed - self.start, self.stop - self.start)
        # new tensors: for more tokens than there is room, or with gradients
        tokens.join([slice(keep - self.start, held)], rows, padding, positions)
        self.start, self.stop = keep, self.stop + count
        found = tokens.seen(needed - self.start, self.stop - self.start)
        if not differentiate:  # what is too long to keep lives only as long as the call that reads it
            keep = max(keep_after, self.start)
            tokens.resize(max(self.room, self.stop - keep), keep - self.start, self.stop - self.start)
            self.start = keep
        return found

    def following(self, count: int) -> Tensor | None:
        """The positions after that of the last token, if positions were ever given."""
        return self.tokens.following(self.stop - self.start - 1, count) if self.stop > self.start else None

    def reset(self) -> None:
        """Forget every token."""
        self.start = self.stop = 0
        self.tokens.change(Tensor.detach)
        self.tokens.padding = self.tokens.positions = None
