"""A call as a grid of blocks of queries by blocks of keys."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.normalizers import Normalizer
from polyhead.attend.scores import Score
from polyhead.attend.selectors.summaries import Summaries

__all__ = ["Grid", "by_blocks"]


@dataclass(frozen=True)
class Grid:
    """The sizes of a call whose queries and keys are taken in blocks.

    Attributes:
        batch, heads, kv_heads, queries, keys: B, H, G, L and S.
        rows, cols: length of a block of queries and of keys; the last ones may be shorter.
        scale: factor of q·k.
        real: bool `(B or 1, S)`, which keys are no padding, as far as the mask says so; None: all are.
            Scorers leave the others out, whatever stands there.
        summaries: what is known of the keys from the call before, if somebody keeps it.
        score, normalizer: of the call, for those who measure its weights: scorers go by q·k alone. None: no
            maps, softmax.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    rows: int
    cols: int
    scale: float
    real: Tensor | None = None
    summaries: Summaries | None = None
    score: Score | None = None
    normalizer: Normalizer | None = None

    @property
    def row_blocks(self) -> int:
        """M, blocks of queries."""
        return -(-self.queries // self.rows)

    @property
    def col_blocks(self) -> int:
        """N, blocks of keys."""
        return -(-self.keys // self.cols)

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.keys - self.queries

    @property
    def repeat(self) -> int:
        """Query heads of a key/value head."""
        return self.heads // self.kv_heads

    @property
    def real_queries(self) -> Tensor | None:
        """Which queries are no padding, bool `(B or 1, L)`; None: all are.

        They are the last tokens of the keys. Those that stand before the first key count as real.
        """
        if self.real is None or self.offset >= 0:
            return self.real if self.real is None else self.real[:, self.offset :]
        return torch.cat([self.real.new_ones(len(self.real), -self.offset), self.real], 1)

    def spread(self, x: Tensor) -> Tensor:
        """Something of the key/value heads `(B, G, ...)`, for every query head `(B, H, ...)`."""
        return x if self.repeat == 1 else x.repeat_interleave(self.repeat, 1)

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        """q·k of `(B, H, m, D)` and `(B, G, n, D)`, each head by those of its group: `(B, H, m, n)`."""
        if self.repeat == 1:
            return q @ k.mT
        # the queries of a group become rows, so that nothing is copied for every head
        return (q.unflatten(1, (self.kv_heads, -1)).flatten(2, 3) @ k.mT).view(*q.shape[:3], k.shape[2])

    def summarised(
        self, name: Hashable, make: Callable[[Tensor, Grid], Tensor], k: Tensor, size: int | None = None
    ) -> Tensor:
        """`make(k, grid)`, `(B, X, N, ...)`, whose rows come each from its own block of `size` keys alone.

        In a step of decoding, where somebody keeps what complete blocks came to, only the rows of later ones
        are made: `make` gets the keys from there on, and a grid of them, of which it may ask `cols`, `keys`
        and `real`.

        Args:
            name: what the rows are, equal only for what comes out the same.
            make: makes them.
            k: keys `(B, G, S, D)` of the call.
            size: keys of a block; default `cols`.
        """
        if self.summaries is None:
            return make(k, self)

        def rest(start: int) -> Tensor:
            real = None if self.real is None else self.real[:, start:]
            part = replace(self, keys=self.keys - start, real=real, summaries=None)
            return make(k[:, :, start:] if start else k, part)

        return self.summaries.rows(name, size or self.cols, self.keys, rest)

    def blocks_of_keys(self, k: Tensor, fill: float = 0.0) -> Tensor:
        """Keys `(B, G, S, D)` in blocks `(B, G, N, C, D)`; `fill` for padding and behind the end."""
        k = k if self.real is None else torch.where(self.real[:, None, :, None], k, fill)
        return F.pad(k, (0, 0, 0, -k.shape[2] % self.cols), value=fill).unflatten(2, (-1, self.cols))

    def mean_keys(self, k: Tensor) -> Tensor:
        """Mean key of every block, over its real keys, 0 where it has none: `(B, G, N, D)`."""
        if self.real is None:
            return _means(k, self.cols)
        sums = self.blocks_of_keys(_wide(k)).sum(3)
        counts = F.pad(self.real, (0, -self.keys % self.cols)).unflatten(1, (-1, self.cols)).sum(2)
        return sums / counts.clamp(min=1)[:, None, :, None].to(sums.dtype)

    def mean_queries(self, q: Tensor, start: int, stop: int) -> Tensor:
        """Mean query of the blocks start..stop-1, those at padding too: `(B, H, m, D)`."""
        part = q[:, :, start * self.rows : stop * self.rows]
        return part if self.rows == 1 else _means(part, self.rows)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _means(x: Tensor, length: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return by_blocks(x, length, lambda part: part.mean(3, dtype=dtype))


def by_blocks(x: Tensor, length: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """What `reduce` makes of blocks of rows, `(B, X, n, C, D)` to `(B, X, n, ...)`; nothing is copied.

    It is called for the whole blocks, and for the last one where that is shorter.
    """
    whole = x.shape[2] // length
    parts = [x[:, :, : whole * length].unflatten(2, (whole, length))] if whole else []
    if whole * length < x.shape[2]:
        parts.append(x[:, :, None, whole * length :])
    found = [reduce(part) for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found, 2)
