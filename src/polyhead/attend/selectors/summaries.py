"""What selectors derive from keys, kept from one call to the next while earlier keys stay what they are.

A step of decoding adds one key to S others. What a scorer wants of them, the mean of every block of C keys,
the largest and smallest features, an indexer's keys, is for all ⌊S/C⌋ complete blocks what it was in the step
before: only the last, ragged block is worked out anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

__all__ = ["Same", "Summaries", "unchanged"]


def unchanged(tensor: Tensor) -> int | None:
    """A number that goes up with every write into a tensor or its views; None where nobody counts.

    Tensors of inference mode are not counted, nor are writes that go past torch.
    """
    return None if tensor.is_inference() else tensor._version


class Same:
    """A tensor as part of a name: equal only to the same tensor, not written to in between."""

    def __init__(self, tensor: Tensor) -> None:
        self._ref: ReferenceType[Tensor] = ref(tensor)
        self._state = unchanged(tensor)
        self._id = id(tensor)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Same) or self._state is None or self._state != other._state:
            return False
        own = self._ref()
        return own is not None and own is other._ref()

    def __hash__(self) -> int:
        return hash((self._id, self._state))


class _Rows:
    """A tensor `(B, X, n, ...)` that grows along n, with room for more."""

    def __init__(self, first: Tensor, whole: int) -> None:
        self._held = first.new_empty(0)
        self.done = 0  # of the rows those of complete blocks, which stay
        self.put(first, whole)

    def put(self, more: Tensor, whole: int) -> None:
        """`more` behind the rows that stay, of which there are `whole` from now on."""
        count = self.done + more.shape[2]
        held = self._held
        if not held.numel() or held.shape[2] < count:
            room = count + max(16, count // 4)
            with torch.inference_mode(False):  # or it could not be written to outside of it
                new = torch.empty(
                    (*more.shape[:2], room, *more.shape[3:]), dtype=more.dtype, device=more.device
                )
            if self.done:
                new[:, :, : self.done] = held[:, :, : self.done]
            self._held = new
        self._held[:, :, self.done : count] = more
        self.done = whole

    def first(self, count: int) -> Tensor:
        return self._held[:, :, :count]

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        self._held = change(self._held[:, :, : self.done])


class Summaries:
    """What selectors have worked out of the complete blocks of one layer's keys.

    Whoever holds the keys vouches for them: before every choice it says by `of` which tensor they are now,
    and before that by `crop`, `reorder` or `clear` what has become of the keys of the call before. Keys may
    be added at the end at any time. Of any other tensor nothing is taken from here, and nothing is kept.

    Which keys are padding is looked at in every call: where that has changed, everything is forgotten.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[Hashable, int], _Rows] = {}
        self._used: set[tuple[Hashable, int]] = set()
        self._real: Tensor | None = None
        self._layout: tuple[Any, ...] = ()
        self._covered = 0
        self._keys: ReferenceType[Tensor] | None = None

    def __reduce__(self) -> tuple[type[Summaries], tuple[()]]:
        return Summaries, ()  # a copy begins anew: nobody vouches for its keys

    def of(self, keys: Tensor) -> None:
        """`keys` `(B, G, S, D)` are those of the call before, and more behind them."""
        self._keys = ref(keys)

    def crop(self, keys: int) -> None:
        """Only the first so many keys are left."""
        for (_, size), rows in self._rows.items():
            rows.done = min(rows.done, keys // size)
        self._covered = min(self._covered, keys)

    def reorder(self, index: Tensor) -> None:
        """Sequence n goes on from what was sequence `index[n]`."""

        def change(x: Tensor) -> Tensor:
            with torch.inference_mode(False):
                return x.index_select(0, index.to(x.device))

        for rows in self._rows.values():
            rows.change(change)
        if self._real is not None and len(self._real) > 1:
            self._real = change(self._real)
        self._layout = (len(index), *self._layout[1:]) if self._layout else ()

    def clear(self) -> None:
        """Nothing is known of the keys any more."""
        self._rows.clear()
        self._used.clear()
        self._real, self._layout, self._covered = None, (), 0

    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(rows._held.numel() * rows._held.element_size() for rows in self._rows.values())

    def serve(self, keys: Tensor, real: Tensor | None) -> Summaries | None:
        """This, made ready for a choice among `keys`, of which `real` are no padding; None: not for them."""
        if self._keys is None or self._keys() is not keys:
            return None
        layout = (*keys.shape[:2], keys.shape[3], keys.dtype, keys.device)
        if layout != self._layout or not self._as_real(real):
            self.clear()
        for name in [name for name in self._rows if name not in self._used]:
            del self._rows[name]  # nobody asked for it in the choice before
        self._used.clear()
        self._layout, self._covered = layout, keys.shape[2]
        self._real = None if real is None else real.clone()
        return self

    def _as_real(self, real: Tensor | None) -> bool:
        """Whether the keys that were summarised are padding where they were."""
        before, covered = self._real, self._covered
        if before is None or real is None:
            told = before if real is None else real
            return told is None or bool(told[:, :covered].all())
        return before.shape[0] == real.shape[0] and torch.equal(before[:, :covered], real[:, :covered])

    def rows(self, name: Hashable, size: int, keys: int, make: Callable[[int], Tensor]) -> Tensor:
        """`(B, X, N, ...)`, a row for every block of `size` of the `keys`; the last one may be ragged.

        Args:
            name: what the rows are, equal only for what comes out the same.
            make: gives the rows of all blocks from a key on, the first of a block.
        """
        held = self._rows.get((name, size))
        blocks, whole = -(-keys // size), keys // size
        self._used.add((name, size))
        if held is None:
            held = self._rows[name, size] = _Rows(make(0), whole)
        elif held.done < blocks:
            held.put(make(held.done * size), whole)
        return held.first(blocks)
