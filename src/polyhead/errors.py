"""Every error that Polyhead raises on purpose.

A message names the argument, what was given, what is expected and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "BackendRefused",
    "ConfigError",
    "DenseFallback",
    "MissingExtra",
    "PolyheadError",
    "ShapeError",
    "UnknownName",
    "UnsupportedModel",
    "UnsupportedPattern",
]


class PolyheadError(Exception):
    """Base class of every error that Polyhead raises on purpose."""


class ConfigError(PolyheadError, ValueError):
    """A value handed to a constructor or a function is not allowed."""


class ShapeError(PolyheadError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit together."""


class BackendRefused(PolyheadError, ValueError):
    """A backend was asked for by name and cannot run the call; the message is its reason."""


class DenseFallback(PolyheadError, RuntimeError):
    """Under `polyhead.strict()`, a call that only the dense O(L·S) backend could run."""


class UnsupportedPattern(PolyheadError, ValueError):
    """A mechanism was asked for a pattern (causal, cross, ...) that it does not support."""


class UnsupportedModel(PolyheadError, TypeError):
    """A pretrained model whose architecture does not offer the seams that Polyhead works through."""


class UnknownName(PolyheadError, KeyError):
    """A name that no registry knows."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MissingExtra(PolyheadError, ImportError):
    """An optional dependency is needed and absent."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"install it with: pip install 'polyhead[{extra}]'"
        )


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownName:
    """An `UnknownName` that suggests the nearest names, ready to raise."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5) if isinstance(name, str) else []
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    return UnknownName(f"no {kind} is called {name!r}; {hint}")
