"""A cache whose heads forget tokens one by one, when nobody will read them any more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.checks import whole
from polyhead.errors import ConfigError
from polyhead.nn.kv_cache.base import Kept, KeyValueCache, Streams, TokenRows, beams

__all__ = ["ForgettingCache", "ForgettingKept"]


@dataclass(frozen=True, eq=False)
class ForgettingKept(Kept):
    """What a `ForgettingCache` keeps, head by head, and the cache, to be told what it may forget.

    Attributes:
        places: int64 `(B, heads, S)`, where each row stands in the sequence; -1: there is no row. The
            newest tokens stand last in every head, and the rows of a head ascend.
    """

    places: Tensor | None = None
    cache: ForgettingCache | None = None


class ForgettingCache(KeyValueCache):
    """Keeps of every head the rows that later tokens may read; the module says which, call by call.

    Heads keep different tokens, and as many places as the head that keeps most. Room is given back when a
    quarter of it, and more than a few rows, is held by nobody.

    Args:
        batch: number of sequences B.
        streams: (heads, width) of each kind of row, with one number of heads.
        device, dtype: of the rows.
    """

    def __init__(
        self,
        batch: int,
        streams: Streams,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._tokens = TokenRows("ForgettingCache", batch, streams, 0, device, dtype)
        if len({stream[0] for stream in streams}) > 1 or any(len(stream) > 2 for stream in streams):
            raise ConfigError(
                "ForgettingCache: streams must have one number of heads and be held as they are; got "
                f"{streams}"
            )
        self.length = 0
        self._places = torch.empty(batch, streams[0][0], 0, dtype=torch.int64, device=self._tokens.device)
        self._forgot = False

    @property
    def device(self) -> torch.device:
        return self._tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self._tokens.dtype

    def append(self, *rows: Tensor, padding: Tensor | None = None, positions: Tensor | None = None) -> Kept:
        tokens = self._tokens
        tokens.accept(rows, None, positions)
        if positions is not None:
            raise ConfigError("ForgettingCache counts tokens as they come; leave positions out")
        self._close_up()
        count = rows[0].shape[2]
        new = torch.arange(self.length, self.length + count, device=self.device)
        new = new.expand(*self._places.shape[:2], -1)
        if padding is not None:
            new = new.masked_fill(~padding[:, None], -1)
        tokens.streams = [
            torch.cat([held, row], dim=2) for held, row in zip(tokens.streams, rows, strict=True)
        ]
        self._places = torch.cat([self._places, new], dim=2)
        self.length += count
        return ForgettingKept(tuple(tokens.streams), self.length, places=self._places, cache=self)

    def forget(self, done: Tensor) -> None:
        """Give up the rows where bool `done` `(B, heads, S)` is True, of those that `append` gave last."""
        self._forgot = self._forgot or bool((done & (self._places >= 0)).any())
        self._places = self._places.masked_fill(done, -1)

    def _close_up(self) -> None:
        """Let the rows that are held stand side by side, if enough room is given back by that."""
        held = self._places >= 0
        width = held.shape[2]
        most = int(held.sum(-1).amax()) if held.numel() else 0
        if width - most <= max(16, width // 4):
            return
        order = (~held).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :most]
        self._places = self._places.gather(2, order)

        def moved(row: Tensor) -> Tensor:
            return row.gather(2, order[..., None].expand(-1, -1, -1, row.shape[3]))

        self._tokens.streams = [moved(row) for row in self._tokens.streams]

    @property
    def held(self) -> Tensor:
        """Rows that every head holds, int64 `(B, heads)`."""
        return (self._places >= 0).sum(-1)

    def nbytes(self) -> int:
        return self._tokens.nbytes() + self._places.numel() * self._places.element_size()

    def reorder(self, beam_index: Tensor) -> None:
        index = beams(beam_index, self._tokens.batch).to(self.device)
        self._tokens.change(lambda held: held.index_select(0, index))
        self._places = self._places.index_select(0, index)

    def crop(self, length: int) -> None:
        if not 0 <= whole("crop: length", length, 0) <= self.length:
            raise ConfigError(f"crop: length must lie in 0..{self.length}, the tokens seen; got {length}")
        if length < self.length and self._forgot:
            raise ConfigError(
                "crop: rows were forgotten that fewer tokens would still read; use a growing cache where "
                "tokens are taken back"
            )
        self._places = self._places.masked_fill(self._places >= length, -1)
        self.length = length

    def reset(self) -> None:
        self._tokens.change(lambda held: held.detach()[:, :, :0])
        self._places = self._places[:, :, :0]
        self.length, self._forgot = 0, False
