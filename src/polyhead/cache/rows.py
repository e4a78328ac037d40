"""Memory for keys and values; that of heads that keep everything, which grows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Growing", "Rows"]

_SPARE = 64  # rows that growing memory is ahead of what it needs, at least


class Rows:
    """Keys `(B, G, room, D)` and values `(B, G, room, Dv)` of some key/value heads of one layer.

    Attributes:
        seen: how many tokens of the sequence have passed, also those that are no longer held.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.seen = 0

    def append(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        """Take the rows of L new tokens, `(B, G, L, ·)`; `real` `(B, L)` is False at padding."""
        raise NotImplementedError

    def crop(self, length: int) -> None:
        """Go back to the first `length` tokens; see `check_crop`."""
        raise NotImplementedError

    def check_crop(self, length: int) -> None:
        """Raise a `ConfigError` if tokens among the first `length` are missing."""

    def used(self) -> int:
        """Rows of the memory that hold something."""
        raise NotImplementedError

    def change(self, select: Callable[[Tensor], Tensor]) -> None:
        """Put `select(tensor)` in the place of every tensor, all of which start with the batch."""
        if self.keys is not None:
            self.keys, self.values = (select(t) for t in self.both)

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """The memory of the keys and that of the values, when some tokens have come."""
        assert self.keys is not None, "no token has come"
        return self.keys, self.values  # type: ignore[return-value]

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.keys = self.values = None
        self.seen = 0

    def tensors(self) -> list[Tensor]:
        """Everything that is allocated."""
        return [] if self.keys is None else list(self.both)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def nbytes_used(self) -> int:
        """Bytes of the rows that hold something."""
        return self.nbytes() // self.room * self.used() if self.room else 0

    @property
    def room(self) -> int:
        """Rows that fit into the memory."""
        return 0 if self.keys is None else self.keys.shape[2]

    def _resize(self, room: int, k: Tensor, v: Tensor) -> None:
        """Memory for `room` rows like `k` and `v`, with the rows that are held."""
        held = min(self.used(), self.room)

        def moved(old: Tensor | None, like: Tensor) -> Tensor:
            with torch.inference_mode(False):  # so that it can be written to in and out of inference mode
                # zeros, since a padded batch has rows that are read with weight 0 before they are written
                new = like.new_zeros(like.shape[0], like.shape[1], room, like.shape[3])
            if old is not None:
                new[:, :, :held] = old[:, :, :held]
            return new

        self.keys, self.values = moved(self.keys, k), moved(self.values, v)


class Growing(Rows):
    """Heads that keep everything: a step writes its own row, and the memory grows by a thirty-second."""

    def used(self) -> int:
        return self.seen

    def append(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        start, stop = self.seen, self.seen + k.shape[2]
        if self.keys is None or stop > self.keys.shape[2]:
            self._resize(stop + max(_SPARE, stop // 32), k, v)
        keys, values = self.both
        keys[:, :, start:stop] = k
        values[:, :, start:stop] = v
        self.seen = stop

    def view(self) -> tuple[Tensor, Tensor]:
        """All keys and values, without a copy."""
        keys, values = self.both
        return keys[:, :, : self.seen], values[:, :, : self.seen]

    def crop(self, length: int) -> None:
        self.seen = length
