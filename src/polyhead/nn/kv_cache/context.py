"""The keys and values of a context, projected once for every decoding step that reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.checks import FARTHEST, given, whole
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn.kv_cache.base import Kept, KeyValueCache, Streams, beams
from polyhead.nn.kv_cache.codec import RowCodec

__all__ = ["ContextCache"]


class ContextCache(KeyValueCache):
    """Holds a projected context; calls bring queries only.

    Made by a module's `new_context_cache`.

    Args:
        rows: the streams of the context, each `(B, heads, S, width)`.
        padding: bool `(B, S)`, True at real tokens of the context.
        streams: (heads, width) of every row; one with a codec is held packed, unless autograd follows it.
            Default: all are held as they are.
        start: position of the first query. The full call puts L queries at the end of S keys, at S - L.

    Attributes:
        length: position of the next query.
    """

    holds_context = True

    def __init__(
        self,
        rows: tuple[Tensor, ...],
        padding: Tensor | None = None,
        *,
        streams: Streams | None = None,
        start: int = 0,
    ) -> None:
        if (
            not isinstance(rows, tuple | list)
            or not rows
            or any(not isinstance(row, Tensor) or row.ndim != 4 for row in rows)
        ):
            raise ConfigError(
                f"ContextCache: rows must be tensors (B, heads, S, width), at least one; got {given(rows)}"
            )
        shape = (rows[0].shape[0], rows[0].shape[2])
        if padding is not None and (
            not isinstance(padding, Tensor) or padding.dtype != torch.bool or tuple(padding.shape) != shape
        ):
            raise ShapeError(
                f"ContextCache: padding must be a bool tensor {shape}, True at real tokens; got "
                f"{given(padding)}"
            )
        if streams is not None:
            rows = tuple(_held(row, *codec) for row, (_, _, *codec) in zip(rows, streams, strict=True))
        self._kept = Kept(tuple(rows), shape[1], padding)
        self._first = self.length = whole("ContextCache: start", start, -FARTHEST)

    def read(self, queries: int) -> Kept:
        """The context, for the next `queries` queries."""
        self.length += queries
        return self._kept

    def append(self, *rows: Tensor, padding: Tensor | None = None, positions: Tensor | None = None) -> Kept:
        raise ConfigError(
            "a cache that holds a context takes no further keys and values; make one with new_cache for "
            "self-attention, or a new one with new_context_cache for another context"
        )

    def nbytes(self) -> int:
        tensors = [*self._kept.rows, self._kept.padding]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def reorder(self, beam_index: Tensor) -> None:
        kept = self._kept
        index = beams(beam_index, kept.rows[0].shape[0])

        def moved(held: Tensor) -> Tensor:
            return held.index_select(0, index.to(held.device))

        padding = None if kept.padding is None else moved(kept.padding)
        self._kept = Kept(tuple(map(moved, kept.rows)), kept.length, padding)

    def crop(self, length: int) -> None:
        if not self._first <= whole("crop: length", length, -FARTHEST) <= self.length:
            raise ConfigError(f"crop: length must lie in {self._first}..{self.length}; got {length}")
        self.length = length

    def reset(self) -> None:
        self.length = self._first


def _held(row: Tensor, codec: RowCodec | None = None) -> Tensor:
    # no gradient would flow through what is packed
    return row if codec is None or (torch.is_grad_enabled() and row.requires_grad) else codec.pack(row)
