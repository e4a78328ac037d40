"""A description taken apart into a text, numbers and tensors: what an operator of a compiled graph can carry.

The numbers stand beside the text because the compiler may hold symbols in their places.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from polyhead.description import Part, part_named

__all__ = ["Spelling", "function_name", "read", "spell"]

# Functions that cannot be imported by name, such as lambdas, by the name in their text.
_LOCAL: dict[str, Any] = {}


@dataclasses.dataclass
class Spelling:
    """The tensors and numbers that were met while a text was written; the text names them by their places."""

    tensors: list[Tensor] = dataclasses.field(default_factory=list)
    ints: list[int] = dataclasses.field(default_factory=list)
    floats: list[float] = dataclasses.field(default_factory=list)


def spell(value: Any, found: Spelling, name_of: Any = None) -> str:
    """The text of a part or of what may stand inside one; what has no constant text goes into `found`.

    Written in operations that the compiler sees through.

    Args:
        name_of: `function_name`, or that as a constant of the compiled graph.
    """
    name_of = name_of or function_name
    if isinstance(value, Tensor):
        found.tensors.append(value)
        return f"('tensor',{len(found.tensors) - 1})"
    if isinstance(value, Part):
        inner = [spell(v, found, name_of) for v in value._values()]
        return f"('part','{value.kind}',{','.join(inner)})"
    if isinstance(value, tuple):
        inner = [spell(v, found, name_of) for v in value]
        return f"('tuple',{','.join(inner)})"
    if value is None or isinstance(value, bool):
        return f"('value',{value})"
    if isinstance(value, str):
        return f"('value',{value!r})"
    if isinstance(value, int):
        found.ints.append(value)
        return f"('int',{len(found.ints) - 1})"
    if isinstance(value, float):
        found.floats.append(value)
        return f"('float',{len(found.floats) - 1})"
    return f"('name',{name_of(value)!r})"


def function_name(function: Any) -> str:
    """A name under which `read` finds a function or a dtype again, in this process at least."""
    if isinstance(function, torch.dtype):
        return f"torch:{str(function).removeprefix('torch.')}"
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    try:
        if _named(name) is function:
            return name
    except (ImportError, AttributeError, ValueError):
        pass  # a lambda, a closure, a partial
    name = f"#{id(function)}"
    _LOCAL[name] = function  # held, so that the id stays its own
    return name


def _named(name: str) -> Any:
    if name.startswith("#"):
        return _LOCAL[name]
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for step in path.split("."):
        found = getattr(found, step)
    return found


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Any:
    return ast.literal_eval(text)


def read(text: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> Any:
    """What `spell` took apart."""
    return _read(_parsed(text), tensors, ints, floats)


def _read(spelled: Any, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> Any:
    what, *rest = spelled
    if what == "tensor":
        return tensors[rest[0]]
    if what == "int":
        return ints[rest[0]]
    if what == "float":
        return floats[rest[0]]
    if what == "value":
        return rest[0]
    if what == "name":
        return _named(rest[0])
    if what == "tuple":
        return tuple(_read(v, tensors, ints, floats) for v in rest)
    kind = part_named(rest[0])
    part = object.__new__(kind)
    for field, value in zip(dataclasses.fields(kind), rest[1:], strict=True):  # type: ignore[arg-type]
        object.__setattr__(part, field.name, _read(value, tensors, ints, floats))
    return part
