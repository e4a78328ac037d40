"""Keys and values that are not tensors: what a cache may return from `update`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError, UnsupportedModel

if TYPE_CHECKING:
    from polyhead.hf.call import Call

__all__ = ["KVHandle", "keys_of"]


class KVHandle:
    """Stands for cached keys or values `(B, G, S, D)` that no tensor holds.

    A cache whose heads keep different numbers of tokens returns two of these from `update`, one as keys
    and one as values. A model hands them on to the attention function, which opens them by `attend`.
    Model code that touches them on the way finds their `shape`, `dtype` and `device`; anything else is
    refused by name. Subclass it, hold what is needed, and define `attend`.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        """`shape` counts all tokens seen, also those that are no longer held."""
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = device

    def attend(self, call: Call) -> Tensor:
        """The output `(B, H, L, Dv)` for `call`, whose `k` and `v` are the handles that `update` returned."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._touched(f"asks its cached keys or values for {name!r}")

    def __getitem__(self, index: Any) -> Any:
        raise self._touched("slices its cached keys or values")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        raise cls._touched(f"calls {name}() on its cached keys or values")

    @classmethod
    def _touched(cls, how: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"the model's own code {how}, but {cls.__name__} is no tensor; such a cache is for the model it "
            "was made with, until it is detached: make a new one for this model, or use a cache that returns "
            "tensors (DynamicCache)"
        )


def keys_of(call: Call) -> Tensor:
    """The keys of a call that chooses among them.

    Raises:
        ConfigError: they are in a cache that only knows how to attend.
    """
    if isinstance(call.k, KVHandle):
        raise ConfigError(
            f"layer {call.layer.name!r} attends to keys in a {type(call.k).__name__}, which cannot be chosen "
            "from; use a cache that holds tensors, such as DynamicCache, or no selector for this layer"
        )
    return call.k
