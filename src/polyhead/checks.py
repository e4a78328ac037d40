"""Checks of what a caller hands in: a value that is not allowed raises an error that says what came.

Descriptions are also made inside functions that `torch.compile` traces, where numbers may be symbolic: Dynamo
can follow what is asked of a number here.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyhead.errors import ConfigError

__all__ = [
    "FARTHEST",
    "finite",
    "flag",
    "floating",
    "given",
    "is_integer_tensor",
    "number",
    "number_or_heads",
    "place",
    "real",
    "several",
    "takes",
    "whole",
]

FARTHEST = 1 << 60  # sums of two still fit in int64

_SHOWN = 80
_TOO_LARGE = 1 << 1023
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def given(value: object) -> str:
    """What somebody handed in, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if callable(value) and str(getattr(value, "__module__", "")).startswith("polyhead."):
        name = getattr(value, "__name__", None)
        if name is not None:
            return f"the function {name}; call it: {name}(...)"
    text = repr(value)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return text if value is None else f"{text} ({type(value).__name__})"


def real(value: object) -> bool:
    """Whether something is a real number that a float can hold; a bool is none, and neither is a tensor."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        return isinstance(value, np.integer | np.floating)
    if torch.compiler.is_compiling() or not isinstance(value, int):  # it may be symbolic, its size unknown
        return True
    return -_TOO_LARGE < value < _TOO_LARGE


def finite(value: object) -> bool:
    """Whether something is a finite real number."""
    return real(value) and (torch.compiler.is_compiling() or math.isfinite(value))  # type: ignore[arg-type]


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """`value` as a float, or a `ConfigError` unless it is a finite number within the limits."""
    if (
        not finite(value)
        or (above is not None and not value > above)
        or (least is not None and not value >= least)
        or (below is not None and not value < below)
        or (most is not None and not value <= most)
    ):
        limits = (("above", above), ("at least", least), ("below", below), ("at most", most))
        said = " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
        raise ConfigError(f"{name} must be a finite number{' ' + said if said else ''}, got {given(value)}")
    return float(value)


def whole(name: str, value: Any, least: int, most: int = FARTHEST) -> int:
    """`value` as a plain int from `least` to `most`, or a `ConfigError`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        # an int stays as it is: under a compiler it may be a symbol, which index() would fix to one value
        found = value if isinstance(value, int) else operator.index(value)
    except (TypeError, RuntimeError):  # a tensor of many values raises either, by the version of torch
        raise ConfigError(f"{name} must be an integer, at least {least}; got {given(value)}") from None
    if found < least:
        raise ConfigError(f"{name} must be at least {least}; got {found}")
    if found > most:
        raise ConfigError(f"{name} must be at most {most}; got {given(found)}")
    return found


def flag(name: str, value: Any) -> None:
    """Raise a `ConfigError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False; got {given(value)}")


def floating(name: str, value: Any, ndim: int, shape: str) -> None:
    """Raise a `ConfigError` unless `value` is a floating-point tensor with `ndim` dimensions."""
    if not isinstance(value, Tensor) or value.ndim != ndim or not value.is_floating_point():
        raise ConfigError(f"{name} must be a floating-point tensor {shape}, got {given(value)}")


def number_or_heads(name: str, value: Any, *, above: float | None = None) -> float | Tensor:
    """A number, as a float, or a floating-point tensor `(H,)` as it is; anything else is a `ConfigError`."""
    if isinstance(value, Tensor) and value.ndim == 1 and value.is_floating_point():
        return value
    if not real(value):
        raise ConfigError(f"{name} must be a number or a floating-point tensor (H,), got {given(value)}")
    return number(name, value, above=above)


def several(value: Any) -> bool:
    """Whether `value` holds several things in a row: a text does not, and neither does a scalar tensor."""
    return (
        isinstance(value, Iterable) and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) > 0
    )


def is_integer_tensor(value: Any) -> bool:
    """Whether `value` is a tensor of whole numbers (bool does not count)."""
    return (
        isinstance(value, Tensor)
        and not value.is_floating_point()
        and not value.is_complex()
        and value.dtype != torch.bool
    )


def takes(name: str, function: Any, *arguments: str) -> None:
    """Raise a `ConfigError` unless `function` can be called with so many positional arguments."""
    said = f"({', '.join(arguments)})"
    if not callable(function):
        raise ConfigError(f"{name} must be callable as f{said}, got {given(function)}")
    if torch.compiler.is_compiling():
        return
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins need not say what they take
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        called = getattr(function, "__name__", type(function).__name__)
        raise ConfigError(f"{name} must be callable as f{said}, but {called}{signature}: {error}") from None


def place(owner: str, device: Any, dtype: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """A device and a floating-point dtype, each None where it is not given, or a `ConfigError`."""
    if device is not None and not isinstance(device, torch.device):
        try:
            if isinstance(device, bool):
                raise TypeError("a bool is no device")
            device = torch.device(device)
        except (TypeError, ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise ConfigError(
                f"{owner}: device must be one such as 'cpu' or 'cuda:0', got {given(device)}: {why}"
            ) from None
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(
            f"{owner}: dtype must be a floating-point torch.dtype such as torch.float32, got {given(dtype)}"
        )
    return device, dtype
