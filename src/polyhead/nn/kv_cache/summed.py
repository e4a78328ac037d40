"""A cache of recent keys and values, and of one key and one value for each block before them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.checks import whole
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn.block_masks import blocks_behind
from polyhead.nn.kv_cache.base import Kept, KeyValueCache, Streams, beams
from polyhead.nn.kv_cache.growing import FixedCache, GrowingCache
from polyhead.nn.kv_cache.recent_rows import RecentRows

__all__ = ["SummedCache", "SummedKept"]

_SLACK = 16  # tokens that may be taken back, by `crop`, in any case

# queries, keys, values of whole blocks, and which are real -> keys, values of blocks, and real tokens of each
Summarise = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class SummedKept(Kept):
    """What a call may read: `rows` are those of recent tokens, which end with the sequence.

    Attributes:
        sums: keys, values and numbers of real tokens `(B, 1, n, 1)` of the blocks 0..n-1.
    """

    sums: tuple[Tensor, ...] = ()


class SummedCache(KeyValueCache):
    """Keys and values of recent tokens, and the summaries of all blocks that are complete.

    A block is summed up once, in the call that completes it. The rows of its tokens are dropped when they lie
    `near` tokens back, and 16 more, which may be taken back in any case.

    Args:
        batch: number of sequences B.
        heads, kv_heads, head_dim, value_dim: H, G, D and Dv.
        size: C, tokens of a block.
        near: tokens that a query reads one by one at least, the query's own among them.
        summarise: what makes summaries of queries, keys and values; counts come as `(B or 1, n)`.
        max_length: tokens that it takes at most; None: grow.
        device, dtype: of everything.
    """

    sums_up = True

    def __init__(
        self,
        batch: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        size: int,
        near: int,
        summarise: Summarise,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.size, self.near, self.summarise = size, near, summarise
        self.max_length = None if max_length is None else whole("SummedCache: max_length", max_length, 1)
        self.length = 0
        most = self.rooms(size, near, max_length)
        kind = (device, dtype)
        rows: Streams = ((kv_heads, head_dim), (kv_heads, value_dim))
        self._rows = RecentRows("SummedCache", batch, rows, most[0], *kind)
        # of a block that is not complete; what it is summed up by may be made of all its queries
        self._queries = RecentRows("SummedCache", batch, ((heads, head_dim),), most[1], *kind)
        sums: Streams = ((heads, head_dim), (heads, value_dim), (1, 1))
        self._sums = (
            FixedCache(batch, sums, most[2], device=device, dtype=dtype)
            if most[2]
            else GrowingCache(batch, sums, device=device, dtype=dtype)
        )

    @staticmethod
    def rooms(size: int, near: int, max_length: int | None) -> tuple[int, int, int]:
        """Tokens whose rows there is room for, those whose queries, and blocks; 0 blocks: as they come."""
        rows = near + size + _SLACK + max(16, near // 4)
        queries = size + _SLACK + 16
        if max_length is None:
            return rows, queries, 0
        return min(rows, max_length), min(queries, max_length), max_length // size

    def first_read(self, place: int) -> int:
        """The first token that a query at this place reads by itself."""
        return max(0, blocks_behind(place, self.size, self.near)) * self.size

    @property
    def device(self) -> torch.device:
        return self._rows.tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self._rows.tokens.dtype

    def append(self, *rows: Tensor, padding: Tensor | None = None, positions: Tensor | None = None) -> Kept:
        """Take queries, keys and values of new tokens."""
        if len(rows) != 3:
            raise ShapeError(f"SummedCache takes queries, keys and values, but append got {len(rows)} rows")
        first, last = self.length, self.length + rows[0].shape[2]
        if self.max_length is not None and last > self.max_length:
            raise ShapeError(
                f"SummedCache: {last - first} more tokens do not fit, it holds {first} of "
                f"max_length={self.max_length}; make it longer, or leave max_length out"
            )
        size, back = self.size, max(0, first - _SLACK)
        open_, kept_open, after = first // size * size, back // size * size, max(0, last - _SLACK)
        needed = self.first_read(first)
        (q,), real = self._queries.append(
            rows[:1], padding, None, needed=open_, keep=kept_open, keep_after=after // size * size
        )
        (k, v), known = self._rows.append(
            rows[1:],
            padding,
            positions,
            needed=needed,
            keep=self.first_read(back),
            keep_after=self.first_read(after),
        )
        self.length = last
        done = last // size * size
        if done > open_:
            whole_blocks = slice(open_ - needed, done - needed)
            one, other, counts = self.summarise(
                q[:, :, : done - open_],
                k[:, :, whole_blocks],
                v[:, :, whole_blocks],
                None if real is None else real[:, : done - open_],
            )
            counts = counts[:, None, :, None].expand(q.shape[0], -1, -1, -1).to(one.dtype)
            sums = self._sums.append(one, other, counts).rows
        else:
            sums = self._sums.append(
                *(q.new_empty(q.shape[0], *shape) for shape in self._no_blocks(q, v))
            ).rows
        return SummedKept((k, v), last, known, sums=sums)

    def _no_blocks(self, q: Tensor, v: Tensor) -> tuple[tuple[int, int, int], ...]:
        return (q.shape[1], 0, q.shape[3]), (q.shape[1], 0, v.shape[3]), (1, 0, 1)

    def next_positions(self, count: int) -> Tensor | None:
        return self._rows.following(count)

    def nbytes(self) -> int:
        return self._rows.tokens.nbytes() + self._queries.tokens.nbytes() + self._sums.nbytes()

    def reorder(self, beam_index: Tensor) -> None:
        index = beams(beam_index, self._rows.tokens.batch)
        for held in (self._rows, self._queries):
            held.tokens.change(lambda tensor: tensor.index_select(0, index.to(tensor.device)))
        self._sums.reorder(beam_index)

    def crop(self, length: int) -> None:
        if not 0 <= whole("crop: length", length, 0) <= self.length:
            raise ConfigError(f"crop: length must lie in 0..{self.length}, the tokens seen; got {length}")
        if (
            self._rows.start > self.first_read(length)
            or self._queries.start > length // self.size * self.size
        ):
            raise ConfigError(
                f"crop: the rows that {length} tokens' next query reads were dropped, since their blocks are "
                f"summed up; the last {_SLACK} tokens can be taken back in any case; reset() begins anew"
            )
        self.length = self._rows.stop = self._queries.stop = length
        self._sums.crop(length // self.size)

    def reset(self) -> None:
        self.length = 0
        self._rows.reset()
        self._queries.reset()
        self._sums.reset()
