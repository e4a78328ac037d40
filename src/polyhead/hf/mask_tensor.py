"""A mask on its way through a model's code: a tensor that stays a description unless it is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from polyhead.attend.masks import Mask

__all__ = ["MaskTensor"]


class MaskTensor(Tensor):
    """Looks like the tensor `(B, 1, L, S)` that models pass to their layers, but holds no L×S numbers.

    A model whose own code slices it, joins it or adds it to something gets the real tensor, made at that
    moment: right, at the price of L×S memory. That is what the model would have been given without
    Polyhead: bool (True: allowed), or numbers to add to the logits if its code knows no other attention
    than its own.

    Attributes:
        mask: who may look at whom, None where all may; query r at position r + (visible - L).
        visible: how many of the S keys count; the rest of a static cache is not filled yet.
        start: how many earlier tokens the cache has dropped.
    """

    mask: Mask | None
    visible: int
    start: int
    _make: Callable[[], Tensor]
    _made: list[Tensor]  # empty or one, shared by all that stand for the same mask

    @staticmethod
    def __new__(
        cls,
        mask: Mask | None,
        shape: tuple[int, int, int, int],
        *,
        visible: int,
        start: int,
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[], Tensor],
    ) -> MaskTensor:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.mask, self.visible, self.start = mask, visible, start
        self._make, self._made = make, []
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def touched(self) -> Tensor | None:
        """The real tensor if model code has asked for it (and may have written into it), else None."""
        return self._made[0] if self._made else None

    def dense(self) -> Tensor:
        """The real tensor, the same one every time."""
        if not self._made:
            self._made.append(self._make())
        return self._made[0]

    def _again(self) -> MaskTensor:
        twin = MaskTensor(
            self.mask,
            tuple(self.shape),
            visible=self.visible,
            start=self.start,
            dtype=self.dtype,
            device=self.device,
            make=self._make,
        )
        twin._made = self._made
        return twin

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        shape = tuple(self.shape)
        return f"MaskTensor({self.mask!r}, shape={shape}, visible={self.visible}, start={self.start})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _VIEWS or (function is torch.ops.aten.slice.Tensor and _whole(*args)):
            return args[0]._again()
        args, kwargs = tree_map_only(MaskTensor, MaskTensor.dense, (args, kwargs or {}))
        return function(*args, **kwargs)


_VIEWS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def _whole(x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    """Whether a slice takes everything."""
    return not start and step == 1 and (end is None or end >= x.shape[dim])
