"""Frozen dataclasses to plain JSON and back, checked field by field against their annotations."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from functools import cache
from typing import Any

from polyhead.errors import ConfigError

__all__ = ["build", "dumps", "plain"]


def plain(value: Any) -> Any:
    """Plain JSON data for a dataclass of numbers, strings, None, tuples and further dataclasses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value  # a NumPy scalar


def dumps(value: Any) -> str:
    """JSON text that is pure ASCII and strict: lone surrogates survive, NaN and infinity are refused."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def build(kind: Any, value: Any, where: str) -> Any:
    """What `plain` made of an instance of `kind`, made again; `where` names the place in error messages."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # the only unions used here are "... or None"
        if value is None:
            return None
        return build(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, got {type(value).__name__}")
        if arguments[-1] is Ellipsis:
            return tuple(build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise ConfigError(f"{where} must hold {len(arguments)} items, got {len(value)}")
        pairs = zip(arguments, value, strict=True)
        return tuple(build(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(pairs))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(
            f"{where} must be of type {kind.__name__}, got {type(value).__name__} {value!r:.60}"
        )
    return value


def _build_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be an object, got {type(value).__name__}")
    fields = dataclasses.fields(kind)
    unknown = sorted(value.keys() - {f.name for f in fields})
    if unknown:
        raise ConfigError(f"{where} has the unknown fields {unknown}; was it written by a later version?")
    absent = sorted(
        f.name
        for f in fields
        if f.name not in value and f.default is f.default_factory is dataclasses.MISSING
    )
    if absent:
        raise ConfigError(f"{where} lacks the fields {absent}; was it written by an earlier version?")
    return kind(**{name: build(_hints(kind)[name], item, f"{where}.{name}") for name, item in value.items()})
