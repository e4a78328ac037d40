"""Masks that come with data: packed documents, padding, a mask per head, a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyhead.attend.masks.algebra import Bounds, Mask
from polyhead.attend.masks.checks import brief
from polyhead.attend.masks.ranges import range_max
from polyhead.checks import given, is_integer_tensor, takes
from polyhead.errors import ConfigError, ShapeError
from polyhead.shapes import broadcast_shape

__all__ = ["Documents", "Padding", "PerHead", "Where", "documents", "padding", "per_head", "where"]


_NONE = torch.iinfo(torch.int64).min // 2  # below any id, also when negated


class Documents(Mask):
    """Keys of the query's own document; positions with a negative id see nothing and are not seen."""

    exact: ClassVar[tuple[bool, bool]] = (False, True)  # a range of mixed ids may leave one out
    ids: Tensor

    def __post_init__(self) -> None:
        if not is_integer_tensor(self.ids) or self.ids.ndim not in (1, 2):
            raise ConfigError(
                f"documents: ids must be an integer tensor (S,) or (B, S); got {given(self.ids)}"
            )

    def __repr__(self) -> str:
        return f"documents({brief(self.ids)})"

    def _rows(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """The ids as `(B, S)`, and the index into its rows."""
        ids = self.ids.to(b.device, torch.int64)
        ids = ids if ids.ndim == 2 else ids[None]
        return ids, b if len(ids) != 1 else torch.zeros((), dtype=torch.int64, device=b.device)

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ids, row = self._rows(b)
        length = ids.shape[1]
        if length == 0:
            return torch.zeros((), dtype=torch.bool, device=j.device)
        own = ids[row, i.clamp(0, length - 1)]
        known = (own >= 0) & (i >= 0) & (i < length)
        return known & (own == ids[row, j.clamp(max=length - 1)]) & (j < length)

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        ids, row = self._rows(b)
        length = ids.shape[1]
        if length == 0:
            no = torch.zeros((), dtype=torch.bool, device=j0.device)
            return no, no
        nobody = ids < 0
        # negated, the smallest id of a range is a maximum too; positions of no document never win
        signed = ids.masked_fill(nobody, _NONE), (-ids).masked_fill(nobody, _NONE)
        holes = torch.cat([ids.new_zeros(len(ids), 1), nobody.long().cumsum(1)], dim=1)

        def documents_in(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Largest and smallest id, and whether each position has one."""
            largest, smallest = range_max(signed, row, start, stop, nothing=_NONE)
            missing = holes[row, stop.clamp(-1, length - 1) + 1] - holes[row, start.clamp(0, length)]
            return largest, -smallest, (missing == 0) & (start >= 0) & (stop < length)

        q_last, q_first, q_full = documents_in(i0, i1)
        k_last, k_first, k_full = documents_in(j0, j1)
        some = (q_last > _NONE) & (k_last > _NONE) & (q_first <= k_last) & (k_first <= q_last)
        one = (q_first == k_last) & (k_first == q_last)
        return some, some & one & q_full & k_full

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        _fits("documents", "ids", self.ids, batch)
        length = self.ids.shape[-1]
        if keys > length:
            raise ShapeError(f"documents: ids has {length} positions but there are {keys} keys")


def documents(ids: Tensor | Sequence[Any]) -> Mask:
    """Keys of the query's own document, for sequences packed into one row.

    Args:
        ids: integer tensor `(S,)` or `(B, S)`: the document of every position, in any order. A negative id
            is no document (padding). Ids longer than the call are allowed: positions are absolute, so the
            same mask serves while a sequence grows.
    """
    if not isinstance(ids, Tensor):
        try:
            ids = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(
                "documents: ids must be an integer tensor (S,) or (B, S), or lists that make one; "
                f"got {given(ids)}"
            ) from None
    return Documents(ids)


class Padding(Mask):
    """Real keys only: j is seen where `mask[b, j]` is True."""

    exact: ClassVar[tuple[bool, bool]] = (True, True)
    mask: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool or self.mask.ndim != 2:
            raise ConfigError(
                f"padding: mask must be a bool tensor (B, S), True at real tokens; got {given(self.mask)}"
                " (a mask of zeros and ones becomes one by .bool())"
            )

    def __repr__(self) -> str:
        return f"padding({brief(self.mask)})"

    def _row(self, b: Tensor) -> Tensor:
        return b if len(self.mask) != 1 else torch.zeros((), dtype=torch.int64, device=b.device)

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.mask.to(j.device)[self._row(b), j]

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        real = self.mask.to(j0.device).long().cumsum(1)
        real = torch.cat([real.new_zeros(len(real), 1), real], dim=1)
        row = self._row(b)
        seen = real[row, j1 + 1] - real[row, j0]
        return seen > 0, seen == j1 - j0 + 1

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        _fits("padding", "mask", self.mask, batch)
        length = self.mask.shape[1]
        if keys != length:
            raise ShapeError(f"padding: mask has {length} positions but there are {keys} keys")


def padding(mask: Tensor) -> Mask:
    """Real keys only: `mask` is a bool tensor `(B, S)`, True at real tokens. Queries are not touched."""
    return Padding(mask)


class PerHead(Mask):
    """A mask of its own for every query head."""

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        if (
            not isinstance(self.masks, tuple | list)
            or not self.masks
            or not all(isinstance(m, Mask) for m in self.masks)
        ):
            raise ConfigError(
                f"per_head: masks must be a list of masks, one for each head; got {given(self.masks)}"
            )
        object.__setattr__(self, "masks", tuple(self.masks))

    def __repr__(self) -> str:
        return f"per_head([{', '.join(map(repr, self.masks))}])"

    @property
    def exact(self) -> tuple[bool, bool]:  # type: ignore[override]
        some, every = zip(*(mask.exact for mask in self.masks), strict=True)
        return all(some), all(every)

    def _groups(self, h: Tensor) -> list[tuple[Mask, Tensor]]:
        """Each different mask, with the heads among `h` that have it."""
        number: dict[Mask, int] = {}
        which = torch.tensor([number.setdefault(m, len(number)) for m in self.masks], device=h.device)[h]
        return [(mask, which == n) for mask, n in number.items()]

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        (first, _), *others = self._groups(h)
        found = first.allowed(b, h, i, j)
        for mask, here in others:
            found = torch.where(here, mask.allowed(b, h, i, j), found)
        return found

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        (first, _), *others = self._groups(h)
        some, every = first.bounds(b, h, i0, i1, j0, j1)
        for mask, here in others:
            any_here, all_here = mask.bounds(b, h, i0, i1, j0, j1)
            some, every = torch.where(here, any_here, some), torch.where(here, all_here, every)
        return some, every

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        if len(self.masks) != heads:
            raise ShapeError(
                f"per_head: {len(self.masks)} masks for {heads} heads; give one mask for each query head"
            )
        for mask in dict.fromkeys(self.masks):
            mask.check(batch=batch, heads=heads, queries=queries, keys=keys, offset=offset)


def per_head(masks: Sequence[Mask]) -> Mask:
    """A mask of its own for every query head: `masks[h]` for head h."""
    return PerHead(masks)  # type: ignore[arg-type]


class Where(Mask):
    """Whatever `function(b, h, i, j)` allows."""

    function: Callable[..., Tensor]

    def __post_init__(self) -> None:
        takes("where: function", self.function, "b", "h", "i", "j")

    def __repr__(self) -> str:
        return f"where({getattr(self.function, '__qualname__', repr(self.function))})"

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found = self.function(b, h, i, j)
        if not isinstance(found, Tensor) or found.dtype != torch.bool:
            got = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"where: {self!r} must return a bool tensor; got {got}")
        pairs = broadcast_shape(b.shape, h.shape, i.shape, j.shape)
        extra = len(pairs) - found.ndim
        if extra < 0 or any(n not in (1, m) for n, m in zip(found.shape, pairs[extra:], strict=True)):
            raise ShapeError(
                f"where: {self!r} returned shape {tuple(found.shape)} for indices that broadcast to "
                f"{tuple(pairs)}; it must return one truth for each (b, h, i, j), or a shape that "
                "broadcasts to that"
            )
        return found

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        no = torch.zeros((), dtype=torch.bool, device=j0.device)
        return ~no, no  # nothing is known in advance


def where(function: Callable[..., Tensor]) -> Mask:
    """Any rule: `function(b, h, i, j)` takes index tensors that broadcast, and returns a bool tensor.

    Nothing is known about its tiles in advance, so each one is asked. Join it with masks that leave tiles
    out: `causal() & window(255) & where(f)`.
    """
    return Where(function)


def _fits(owner: str, name: str, tensor: Tensor, batch: int) -> None:
    if tensor.ndim == 2 and len(tensor) not in (1, batch):
        raise ShapeError(f"{owner}: {name} has {len(tensor)} rows but the batch has {batch} items")
