"""Checks that the mask constructors share."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError

__all__ = ["brief", "is_integer_tensor", "per_axis", "whole"]


def whole(owner: str, name: str, value: Any, least: int) -> int:
    """`value` as a plain int of at least `least`, or a `ConfigError` that names it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ConfigError(
            f"{owner}: {name} must be an integer, at least {least}; got {value!r} ({type(value).__name__})"
        ) from None
    if number < least:
        raise ConfigError(f"{owner}: {name} must be at least {least}; got {number}")
    return number


def per_axis(owner: str, name: str, value: Any, axes: int, kind: type) -> tuple[Any, ...]:
    """One setting for every axis: a single value is repeated, a sequence must have `axes` entries."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * axes
    if len(values) != axes:
        raise ConfigError(
            f"{owner}: {name} needs one value, or one for each of the {axes} axes; got {value!r}"
        )
    if kind is bool:
        for entry in values:
            if not isinstance(entry, bool):
                raise ConfigError(f"{owner}: {name} must be True or False on every axis; got {value!r}")
        return values
    return tuple(whole(owner, name if axes == 1 else f"{name}[{a}]", v, 1) for a, v in enumerate(values))


def is_integer_tensor(value: Any) -> bool:
    """Whether `value` is a tensor of whole numbers (bool does not count)."""
    return (
        isinstance(value, Tensor)
        and not value.is_floating_point()
        and not value.is_complex()
        and value.dtype != torch.bool
    )


def brief(value: Any) -> str:
    """A tensor by type and shape, anything else by its repr."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"<{str(value.dtype).removeprefix('torch.')} {'×'.join(map(str, value.shape))}>"
