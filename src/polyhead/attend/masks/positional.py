"""Masks of the two positions alone: windows, prefixes, strides, blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyhead.attend.masks.algebra import Bounds, Mask
from polyhead.attend.masks.checks import brief
from polyhead.attend.masks.intervals import EMPTY, FULL, Intervals, Threshold, key_of
from polyhead.checks import FARTHEST, given, is_integer_tensor, whole
from polyhead.errors import ConfigError, ShapeError

__all__ = [
    "Blocks",
    "Dilated",
    "Prefix",
    "Shard",
    "Sink",
    "Strided",
    "Window",
    "blocks",
    "causal",
    "dilated",
    "prefix",
    "shard",
    "sink",
    "strided",
    "window",
]


class Window(Mask):
    """Keys from `left` positions before the query to `right` positions after it; None is unbounded."""

    exact: ClassVar[tuple[bool, bool]] = (True, True)
    left: int | None
    right: int | None = 0

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is not None:
                unbounded = type(value) is int and value == -1
                hint = " (for an unbounded side pass None, not -1)" if unbounded else ""
                object.__setattr__(self, name, whole(f"window{hint}: {name}", value, 0))

    def __repr__(self) -> str:
        if (self.left, self.right) == (None, 0):
            return "causal()"
        return f"window({self.left})" if self.right == 0 else f"window({self.left}, {self.right})"

    def _span(self) -> Intervals:
        return Intervals.of(None if self.left is None else -self.left, self.right)

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if self.left is None and self.right is None:
            return torch.ones((), dtype=torch.bool, device=j.device)
        if self.left is None:
            return j <= (i + self.right if self.right else i)
        near = j >= i - self.left
        if self.right is None:
            return near
        return near & (j <= (i + self.right if self.right else i))

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        ((low, high),) = self._span().parts
        nearest, farthest = j0 - i1, j1 - i0
        return (farthest >= low) & (nearest <= high), (nearest >= low) & (farthest <= high)

    def distances(self, within: Mapping[object, bool]) -> Intervals | None:
        return self._span()


def causal() -> Mask:
    """Keys up to the query itself: j <= i. The same as `window(None, 0)`."""
    return Window(None, 0)


def is_causal(mask: object) -> bool:
    """Whether this is `causal()`, and not `causal()` with other masks; None is no mask."""
    return type(mask) is Window and mask.left is None and mask.right == 0


def window(left: int | None, right: int | None = 0) -> Mask:
    """Keys near the query: `i - left <= j <= i + right`; None leaves a side unbounded.

    `window(w)` sees w + 1 keys, the query's own among them (FlashAttention's convention). What
    transformers calls `sliding_window=W` is `window(W - 1)`.
    """
    return Window(left, right)


class Prefix(Mask):
    """The first `n` keys; `n` is a number, or an integer tensor `(B,)` with one number per batch item."""

    exact: ClassVar[tuple[bool, bool]] = (True, True)
    n: int | Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", _count("prefix: n", self.n))

    def __repr__(self) -> str:
        return f"prefix({brief(self.n)})"

    def _ends(self, b: Tensor, j: Tensor) -> Tensor | int:
        return self.n.to(j)[b] if isinstance(self.n, Tensor) else self.n

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < self._ends(b, j)

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        end = self._ends(b, j0)
        return j0 < end, j1 < end

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        _check_batch("prefix", "n", self.n, batch)

    def thresholds(self) -> tuple[Threshold, ...]:
        return (self.n,)

    def distances(self, within: Mapping[object, bool]) -> Intervals | None:
        return FULL if within[key_of(self.n)] else EMPTY


class Sink(Prefix):
    """The first `n` keys, kept because heads park their attention there."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole("sink: n", self.n, 0))

    def __repr__(self) -> str:
        return f"sink({self.n})"


def sink(n: int) -> Mask:
    """The first `n` keys: j < n. Where a query must not look ahead, add `causal() &`."""
    return Sink(n)


def prefix(n: int | Tensor) -> Mask:
    """The first `n` keys, seen by every query: the prefix part of a prefix language model.

    `n` is a number or an integer tensor `(B,)`. A prefix language model is `causal() | prefix(n)`.
    """
    return Prefix(n)


class Dilated(Mask):
    """Every `dilation`-th key: `window` of them before the query, itself, and `right` after it."""

    exact: ClassVar[tuple[bool, bool]] = (True, True)
    window: int
    dilation: int
    right: int = 0

    def __post_init__(self) -> None:
        for name, least in (("window", 0), ("dilation", 1), ("right", 0)):
            object.__setattr__(self, name, whole(f"dilated: {name}", getattr(self, name), least))
        if max(self.window, self.right) * self.dilation > FARTHEST:
            raise ConfigError(
                f"dilated: window * dilation and right * dilation may be at most {FARTHEST}; "
                f"got {self.window}, {self.right} and {self.dilation}"
            )

    def __repr__(self) -> str:
        right = f", {self.right}" if self.right else ""
        return f"dilated({self.window}, {self.dilation}{right})"

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        back = i - j
        reach = (back <= self.window * self.dilation) & (back >= -self.right * self.dilation)
        return reach & (back % self.dilation == 0)

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        low, high = i0 - j1, i1 - j0
        least, most = -self.right * self.dilation, self.window * self.dilation
        some = _has_multiple(low.clamp(min=least), high.clamp(max=most), self.dilation)
        inside = (low >= least) & (high <= most)
        return some, inside & _only_multiples(low, high, self.dilation)


def dilated(window: int, dilation: int, right: int = 0) -> Mask:
    """Keys at `j = i - m * dilation` for m from 0 to `window`, and for m from -`right` on."""
    return Dilated(window, dilation, right)


class Strided(Mask):
    """Keys whose distance from the query is a multiple of `stride`."""

    exact: ClassVar[tuple[bool, bool]] = (True, True)
    stride: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", whole("strided: stride", self.stride, 1))

    def __repr__(self) -> str:
        return f"strided({self.stride})"

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j) % self.stride == 0

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        low, high = i0 - j1, i1 - j0
        return _has_multiple(low, high, self.stride), _only_multiples(low, high, self.stride)


def strided(stride: int) -> Mask:
    """Keys with `(i - j) % stride == 0`, before and after the query."""
    return Strided(stride)


class Blocks(Mask):
    """Keys in the same block of `size` positions as the query; blocks are counted from `start`."""

    exact: ClassVar[tuple[bool, bool]] = (True, True)
    size: int
    start: int | Tensor = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole("blocks: size", self.size, 1))
        object.__setattr__(self, "start", _count("blocks: start", self.start))

    def __repr__(self) -> str:
        start = f", {brief(self.start)}" if isinstance(self.start, Tensor) or self.start else ""
        return f"blocks({self.size}{start})"

    def _block(self, b: Tensor, position: Tensor) -> Tensor:
        start = self.start.to(position)[b] if isinstance(self.start, Tensor) else self.start
        return (position - start) // self.size

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._block(b, i) == self._block(b, j)

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        first, last, left, right = (self._block(b, edge) for edge in (i0, i1, j0, j1))
        return (first <= right) & (left <= last), (first == right) & (left == last)

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        _check_batch("blocks", "start", self.start, batch)


def blocks(size: int, start: int | Tensor = 0) -> Mask:
    """Diagonal blocks: `(i - start) // size == (j - start) // size`.

    `start` is a number or an integer tensor `(B,)`, such as the lengths of the padding on the left.
    """
    return Blocks(size, start)


class Shard(Mask):
    """Keys of every `stride`-th block of `size` positions. See `shard`."""

    exact: ClassVar[tuple[bool, bool]] = (True, True)
    size: int
    stride: int
    first: int = 0

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("stride", 1), ("first", 0)):
            object.__setattr__(self, name, whole(f"shard: {name}", getattr(self, name), least))
        object.__setattr__(self, "first", self.first % self.stride)

    def __repr__(self) -> str:
        first = f", {self.first}" if self.first else ""
        return f"shard({self.size}, {self.stride}{first})"

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j // self.size - self.first) % self.stride == 0

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        low, high = j0 // self.size - self.first, j1 // self.size - self.first
        return _has_multiple(low, high, self.stride), _only_multiples(low, high, self.stride)


def shard(size: int, stride: int, first: int = 0) -> Mask:
    """Keys of every `stride`-th block: `j // size` is `first`, `first + stride`, ..., whatever the query.

    Blocks are counted from the first key; `first` counts modulo `stride`.
    """
    return Shard(size, stride, first)


def _count(name: str, value: Any) -> int | Tensor:
    """A number from 0 on, or an integer tensor `(B,)`."""
    if not isinstance(value, Tensor) or (value.ndim == 0 and is_integer_tensor(value)):
        return whole(name, value, 0)
    if not is_integer_tensor(value) or value.ndim != 1:
        raise ConfigError(f"{name} must be an integer or an integer tensor (B,); got {given(value)}")
    return value


def _check_batch(owner: str, name: str, value: int | Tensor, batch: int) -> None:
    if isinstance(value, Tensor) and len(value) != batch:
        raise ShapeError(f"{owner}: {name} has {len(value)} entries but the batch has {batch} items")


def _has_multiple(low: Tensor, high: Tensor, step: int) -> Tensor:
    return high // step * step >= low  # also False where high < low


def _only_multiples(low: Tensor, high: Tensor, step: int) -> Tensor:
    if step == 1:
        return low <= high
    return (low == high) & (low % step == 0)
