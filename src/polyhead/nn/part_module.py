"""A description inside a module: its tensors become parameters and buffers."""

from __future__ import annotations

from typing import Any, Generic, Self, TypeVar

from torch import Tensor, nn

from polyhead.checks import given, place
from polyhead.description import Part
from polyhead.errors import ConfigError

__all__ = ["PartModule"]

P = TypeVar("P", bound=Part)


class PartModule(nn.Module, Generic[P]):
    """Holds a `Part` so that its tensors are trained, moved and saved with the model.

    A tensor that requires grad (the logits of learned sinks, the table of a relative bias) becomes a
    parameter `tensor0`, `tensor1`, ... in the order of `Part.flatten`; any other becomes a buffer. Calling
    the module gives the part back with the present tensors in it.

    Args:
        part: the description.
        device: where its tensors shall live.
        dtype: of the parameters. Buffers keep their own, also when the module is cast.
    """

    acts_on: str  # where a picture of the module shows it, if that is not by its name

    def __init__(self, part: P, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if not isinstance(part, Part):
            raise ConfigError(f"part must be a description such as a mask or a score; got {given(part)}")
        device, dtype = place("PartModule", device, dtype)
        self.spec, tensors = part.flatten()
        self.names = tuple(f"tensor{i}" for i in range(len(tensors)))
        for name, tensor in zip(self.names, tensors, strict=True):
            if tensor.requires_grad:
                own = tensor.detach().to(device, dtype, copy=True)
                self.register_parameter(name, nn.Parameter(own))
            else:
                self.register_buffer(name, tensor.detach().to(device, copy=True))

    def forward(self) -> P:
        if not self.names:
            return self.spec
        tensors: tuple[Tensor, ...] = tuple(getattr(self, name) for name in self.names)
        return self.spec.unflatten(tensors)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # what is not trained is a given number, not a weight: it moves, but keeps its precision
        given = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in given.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        return repr(self.spec)
