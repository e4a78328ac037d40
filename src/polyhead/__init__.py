"""Polyhead: multi-head attention, described once, run fast, looked into, changed and costed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> where it lives. Everything is imported at first use, so that `import polyhead` stays light.
_HOMES = {
    "polyhead.attend": ("attend", "explain", "observe", "strict", "Plan", "Tile"),
    "polyhead.attend.masks": (
        "blocks",
        "causal",
        "dilated",
        "documents",
        "neighborhood",
        "padding",
        "per_head",
        "prefix",
        "sink",
        "strided",
        "where",
        "window",
    ),
    "polyhead.attend.scores": (
        "alibi",
        "relative_bias",
        "score_function",
        "soft_cap",
        "t5_bias",
        "temperature",
    ),
    "polyhead.attend.normalizers": ("entmax", "sigmoid", "softmax", "sparsemax"),
    "polyhead.description": ("from_json", "to_json"),
    "polyhead.errors": ("PolyheadError",),
    "polyhead.head_scores": ("HeadScores",),
    "polyhead.mechanisms": ("build", "catalog", "entry"),
    "polyhead.nn": ("auxiliary_losses",),
    "polyhead.reference": ("reference",),
    "polyhead.hf": ("attach",),
    "polyhead.heads": ("profile",),
    "polyhead.papers": ("papers",),
}
_ROOMS = ("cache", "hf", "nn", "tasks")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted({*_HOME_OF, *_ROOMS})]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"polyhead.{name}")
    else:
        raise AttributeError(f"module 'polyhead' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from polyhead.attend import Plan as Plan
    from polyhead.attend import Tile as Tile
    from polyhead.attend import attend as attend
    from polyhead.attend import explain as explain
    from polyhead.attend import observe as observe
    from polyhead.attend import strict as strict
