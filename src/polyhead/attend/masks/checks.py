"""Checks that the mask constructors share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from polyhead.checks import given, whole
from polyhead.errors import ConfigError

__all__ = ["brief", "per_axis"]


def per_axis(owner: str, name: str, value: Any, axes: int, kind: type) -> tuple[Any, ...]:
    """One setting for every axis: a single value is repeated, a sequence must have `axes` entries."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * axes
    if len(values) != axes:
        raise ConfigError(
            f"{owner}: {name} needs one value, or one for each of the {axes} axes; got {given(value)}"
        )
    if kind is bool:
        for entry in values:
            if not isinstance(entry, bool):
                raise ConfigError(f"{owner}: {name} must be True or False on every axis; got {given(value)}")
        return values
    at = [""] if axes == 1 else [f"[{axis}]" for axis in range(axes)]
    return tuple(whole(f"{owner}: {name}{axis}", v, 1) for axis, v in zip(at, values, strict=True))


def brief(value: Any) -> str:
    """A tensor by type and shape, anything else by its repr."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"<{str(value.dtype).removeprefix('torch.')} {'×'.join(map(str, value.shape))}>"
