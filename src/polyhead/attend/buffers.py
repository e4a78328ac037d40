"""Memory that is used again: fresh pages for every piece of a call cost more than the work on them."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["Buffers"]


class Buffers:
    """Named pieces of memory of the dtype and device of a tensor, which grow to what was asked for."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor, in the memory that was last given out under this name."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = self._like.new_empty(size)
        return held[:size].view(shape)
