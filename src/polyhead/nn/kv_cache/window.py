"""A cache of constant size: the first tokens and the most recent ones."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.masks import Mask, causal, sink, window
from polyhead.checks import whole
from polyhead.errors import ConfigError
from polyhead.nn.kv_cache.base import Kept, KeyValueCache, Streams, TokenRows, beams

__all__ = ["WindowCache"]


class WindowCache(KeyValueCache):
    """Keeps the first `sinks` tokens and the `size` most recent ones; what falls out is overwritten.

    Rows keep their positions in the sequence, so masks and biases stay right, and a query sees what
    `causal() & (window(size - 1) | sink(sinks))` lets it see, however the tokens come in chunks: decoding
    equals the full forward pass under that mask. The rows stand in order in one piece of memory: as the
    window slides on, the sinks are copied to just before it, and a little slack makes moving it back rare.

    Sinks are the first places of the sequence; in a batch that is padded on the left they are padding.

    Args:
        batch: number of sequences B.
        streams: (heads, width) of each kind of row.
        size: recent tokens to keep, the newest among them.
        sinks: first tokens to keep.
        device, dtype: of the rows.

    Paper: Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.
    """

    def __init__(
        self,
        batch: int,
        streams: Streams,
        size: int,
        sinks: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size, sinks = whole("WindowCache: size", size, 1), whole("WindowCache: sinks", sinks, 0)
        self.size, self.sinks = size, sinks
        self.length = 0
        self._start = self._stop = 0  # the places of the rows that are held
        self._room = sinks + size + max(16, size // 4)
        self._tokens = TokenRows("WindowCache", batch, streams, self._room, device, dtype)
        self._mask: Mask = causal() & (window(size - 1) | sink(sinks)) if sinks else window(size - 1)

    def _needed(self) -> list[slice]:
        """The places of the rows that the next token may still see: the sinks and size - 1 others."""
        sinks = min(self.sinks, self.length)
        recent = max(self._start + sinks, self._stop - (self.size - 1))
        return [slice(self._start, self._start + sinks), slice(recent, self._stop)]

    @property
    def device(self) -> torch.device:
        return self._tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self._tokens.dtype

    def append(self, *rows: Tensor, padding: Tensor | None = None, positions: Tensor | None = None) -> Kept:
        tokens = self._tokens
        differentiate = tokens.accept(rows, padding, positions)
        count = rows[0].shape[2]
        first, recent = needed = self._needed()
        held = first.stop - first.start + recent.stop - recent.start
        self.length += count
        if differentiate or held + count > self._room:
            return self._append_anew(needed, rows, padding, positions, differentiate)
        # rows are dropped only now: what an earlier call returned were views of them
        sinks = first.stop - first.start
        if first.stop != recent.start:
            start = recent.start - sinks
            for tensor in tokens.tensors():
                tensor[:, :, start : recent.start] = tensor[:, :, first].clone()
            self._start = start
        if self._stop + count > tokens.room:
            tokens.resize(self._room, self._start, self._stop)
            self._start, self._stop = 0, held
        tokens.write(rows, padding, positions, self._stop)
        self._stop += count
        return self._kept(count)

    def _append_anew(
        self,
        needed: list[slice],
        rows: tuple[Tensor, ...],
        padding: Tensor | None,
        positions: Tensor | None,
        differentiate: bool,
    ) -> Kept:
        """An append that makes new tensors: for more tokens than there is room, or with gradients."""
        tokens = self._tokens
        tokens.join(needed, rows, padding, positions)
        self._start, self._stop = 0, tokens.room
        kept = self._kept(rows[0].shape[2])
        if not differentiate:
            # what is too long to keep lives only as long as the call that reads it
            needed = self._needed()
            tokens.change(lambda held: torch.cat([held[:, :, s] for s in needed], dim=2))
            self._start, self._stop = 0, tokens.room
            tokens.resize(self._room, 0, self._stop)
        return kept

    def _kept(self, count: int) -> Kept:
        rows, padding = self._tokens.seen(self._start, self._stop)
        held = self._stop - self._start
        places = None
        if held < self.length:
            device = rows[0].device
            first = torch.arange(self.sinks, device=device)
            last = torch.arange(self.length - (held - self.sinks), self.length, device=device)
            places = torch.cat([first, last])
        # a single query is the newest token, and all that is held is within its view
        return Kept(rows, self.length, padding, places, self._mask if count > 1 else None)

    def next_positions(self, count: int) -> Tensor | None:
        return self._tokens.following(self._stop - 1, count) if self.length else None

    def nbytes(self) -> int:
        return self._tokens.nbytes()

    def reorder(self, beam_index: Tensor) -> None:
        index = beams(beam_index, self._tokens.batch)
        self._tokens.change(lambda held: held.index_select(0, index.to(held.device)))

    def crop(self, length: int) -> None:
        if not 0 <= whole("crop: length", length, 0) <= self.length:
            raise ConfigError(f"crop: length must lie in 0..{self.length}, the tokens seen; got {length}")
        if length < self.length and self._stop - self._start < self.length:
            raise ConfigError(
                f"crop: the window has moved on and tokens that {length} tokens' window would show are gone; "
                "use a growing cache where tokens are taken back"
            )
        self._stop -= self.length - length
        self.length = length

    def reset(self) -> None:
        self.length = self._start = self._stop = 0
        self._tokens.change(Tensor.detach)
        self._tokens.padding = self._tokens.positions = None
