"""Finding a naive twin by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from polyhead.errors import unknown_name

__all__ = ["reference", "references", "twin"]

F = TypeVar("F", bound=Callable[..., Any])

_TWINS: dict[str, Callable[..., Any]] = {}


def twin(*names: str) -> Callable[[F], F]:
    """Register a function as the naive twin of everything in `names`."""

    def register(function: F) -> F:
        for name in names:
            known = _TWINS.setdefault(name, function)
            if known is not function:
                raise ValueError(f"{name!r} has two twins: {known.__module__} and {function.__module__}")
        return function

    return register


@cache
def _load() -> None:
    folder = Path(__file__).parent
    for module in pkgutil.iter_modules([str(folder)]):
        importlib.import_module(f"polyhead.reference.{module.name}")


def reference(name: str) -> Callable[..., Any]:
    """The naive twin called `name`: a plain float64 function whose source is the equation.

    A mechanism's twin is called as `twin(x, context=None, *, parameters, heads, ..., mask, padding)`: the
    module's `state_dict()`, the fields of its configuration that it needs, `mask` a bool tensor that
    broadcasts to `(B, H, L, S)`, `padding` bool `(B, S)`. Its signature has what it reads: `context` is not
    there where tokens attend among themselves alone, nor `mask` where none is taken or changes anything.

    Raises:
        UnknownName: there is none; the message names the nearest.
    """
    _load()
    if not isinstance(name, str) or name not in _TWINS:
        raise unknown_name("naive twin", name, _TWINS)
    return _TWINS[name]


def references() -> tuple[str, ...]:
    """The names of all naive twins."""
    _load()
    return tuple(sorted(_TWINS))
