"""What every part of a report does to its fields: they are checked, and numbers are cut to what is told."""

from __future__ import annotations

import math

from polyhead.errors import ConfigError

__all__ = ["check", "number"]


def check(allowed: bool, message: str) -> None:
    """Raise a `ConfigError` with the message unless `allowed`."""
    if not allowed:
        raise ConfigError(message)


def number(value: float | None) -> float | None:
    """`value` to six significant digits; None for None, NaN and infinities."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.6g}")
