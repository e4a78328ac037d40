"""What a description is.

A part may hold tensors (the ids of packed documents, a learned bias); they count by content when parts are
compared, and `flatten` takes them out, so that what remains is a cheap hashable key and what was taken out
can meet autograd.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar, Self, dataclass_transform

import torch
from torch import Tensor

from polyhead.errors import ConfigError, unknown_name

__all__ = ["Part", "Slot", "find_parts_with", "part_named"]

_KINDS: dict[str, type[Part]] = {}
_FINDERS: list[Callable[[], object]] = []
_RESERVED = ("kind", "part")  # an attribute of every part, and how JSON says that something is one


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of a tensor that `Part.flatten` took out."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def _key(value: Any) -> Any:
    """A hashable stand-in under which equal values are equal, tensors by shape and dtype only."""
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, tuple):
        return tuple(map(_key, value))
    if isinstance(value, Mapping):
        return tuple(sorted((k, _key(v)) for k, v in value.items()))
    return value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.shape == b.shape
            and a.dtype == b.dtype
            and (a is b or torch.equal(a, b.to(a.device)))
        )
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _map_tensors(value: Any, visit: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor | Slot):
        return visit(value)
    if isinstance(value, Part):
        return value._map(visit)
    if isinstance(value, tuple):
        return tuple(_map_tensors(v, visit) for v in value)
    return value


def _brief(value: Any) -> str:
    """The repr of a field; a tensor with more than a few numbers by its shape."""
    if isinstance(value, Tensor) and value.numel() > 4:
        return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"
    if isinstance(value, tuple):
        return f"({', '.join(map(_brief, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, Part):
        for inner in value._values():
            _collect(inner, found)
    elif isinstance(value, tuple):
        for inner in value:
            _collect(inner, found)


@dataclass_transform(frozen_default=True, eq_default=False)
class Part:
    """A frozen dataclass that compares by content and round-trips through JSON.

    Subclassing is enough: the subclass becomes a frozen dataclass and is known to `from_json` by its `kind`,
    the class name, and before it "module:" where it is defined outside of Polyhead. Fields may hold numbers,
    strings, booleans, None, dtypes, tensors, functions that can be imported, other parts, and tuples of
    these.
    """

    kind: ClassVar[str]
    __match_args__: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        for name in _RESERVED:
            if name in cls.__dataclass_fields__:  # type: ignore[attr-defined]
                raise ConfigError(
                    f"{cls.__name__}: a field of a part cannot be called {name!r}; choose another name"
                )
        module, ours = cls.__module__, __name__.partition(".")[0]
        # a part from elsewhere may be called as one of ours that is not imported yet
        cls.kind = cls.__name__ if module.partition(".")[0] == ours else f"{module}:{cls.__name__}"
        known = _KINDS.get(cls.kind)
        if known is not None and known.__module__ != cls.__module__:
            raise ConfigError(
                f"there is a part called {cls.kind} in {known.__module__} already, and JSON knows the parts "
                "of Polyhead by their class names; choose another name"
            )
        _KINDS[cls.kind] = cls

    def _values(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in self.__match_args__])

    def __repr__(self) -> str:
        fields = zip(self.__match_args__, self._values(), strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}={_brief(value)}' for name, value in fields)})"

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return type(self) is type(other) and _equal(self._values(), other._values())

    @cached_property
    def _hash(self) -> int:
        return hash((self.kind, *map(_key, self._values())))

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # hashes of strings differ between processes: what is cached stays behind
        names = {f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in self.__dict__.items() if name in names}

    def _map(self, visit: Callable[[Any], Any]) -> Self:
        values = self._values()
        mapped = tuple(_map_tensors(v, visit) for v in values)
        if all(a is b for a, b in zip(values, mapped, strict=True)):
            return self
        clone = object.__new__(type(self))  # not replace(): a Slot would fail the checks of __post_init__
        for field, value in zip(dataclasses.fields(self), mapped, strict=True):  # type: ignore[arg-type]
            object.__setattr__(clone, field.name, value)
        return clone

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """This part with every tensor replaced by what `change` makes of it."""
        return self._map(change)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors held by this part and the parts inside it, in a fixed order."""
        found: list[Tensor] = []
        _collect(self, found)
        return tuple(found)

    def flatten(self) -> tuple[Self, tuple[Tensor, ...]]:
        """This part with a `Slot` in place of every tensor, and the tensors."""
        found: list[Tensor] = []

        def take(tensor: Tensor) -> Slot:
            found.append(tensor)
            return Slot(len(found) - 1, tuple(tensor.shape), tensor.dtype)

        spec = self._map(take)
        return spec, tuple(found)

    def unflatten(self, tensors: tuple[Tensor, ...]) -> Self:
        """The inverse of `flatten`: this part with `tensors` put back into its slots."""
        return self._map(lambda slot: tensors[slot.index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """This part with its tensors on `device`, the floating-point ones in `dtype`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return self._map(move)


def part_named(kind: str) -> type[Part]:
    """The class of the parts of this kind; an unknown one is an `UnknownName`."""
    if not isinstance(kind, str) or kind not in _KINDS:
        for find in _FINDERS:
            find()
    if not isinstance(kind, str) or kind not in _KINDS:
        raise unknown_name("part", kind, _KINDS)
    return _KINDS[kind]


def find_parts_with(find: Callable[[], object]) -> None:
    """Let `find` import modules that define further parts, once somebody asks for a part not known yet."""
    _FINDERS.append(find)
