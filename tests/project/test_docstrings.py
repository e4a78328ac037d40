"""Public docstrings name what a caller can give."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import polyhead as ph


def public() -> Iterator[tuple[str, Any]]:
    """What `ph.__all__` and the rooms in it show and can be called, by its path."""
    rooms = {f"ph.{name}": getattr(ph, name) for name in ph.__all__}
    rooms = {path: room for path, room in rooms.items() if isinstance(room, ModuleType)}
    for path, room in {"ph": ph, **rooms}.items():
        for name in room.__all__:
            found = getattr(room, name)
            if callable(found):
                yield f"{path}.{name}", found


def parameters(found: Any) -> list[str]:
    """What it is called with, but for what a class without a constructor of its own would hand on."""
    try:
        every = inspect.signature(found).parameters
    except (TypeError, ValueError):  # a union of types, for annotations
        return []
    return [name for name in every if not name.startswith("_") and name not in ("args", "kwargs")]


def named(docstring: str) -> set[str]:
    """The words in backticks, and those before the colon of a line, as in a section of arguments."""
    quoted = re.findall(r"`([^`]*)`", docstring)
    listed = re.findall(r"^\s*((?:\*{0,2}\w+(?:, )?)+):", docstring, re.MULTILINE)
    return {word for part in (*quoted, *listed) for word in re.findall(r"\w+", part)}


CALLABLE = dict(public())


def test_the_walk_finds_functions_and_classes_in_the_package_and_its_rooms() -> None:
    assert {"ph.attend", "ph.nn.Rope", "ph.league.plan", "ph.heads.retrieval_score"} <= CALLABLE.keys()
    assert len(CALLABLE) > 200
    assert "q" in parameters(ph.explain)
    assert parameters(ph.nn.Rope) == ["base", "fraction", "interleaved", "scaling"]
    assert parameters(ph.Consumer) == []


@pytest.mark.parametrize("path", CALLABLE)
def test_a_docstring_names_every_parameter(path: str) -> None:
    found = CALLABLE[path]
    docstring = inspect.cleandoc(found.__doc__ or "")
    if isinstance(found, type) and "__init__" in vars(found):
        docstring += f"\n{inspect.cleandoc(found.__init__.__doc__ or '')}"
    missing = [name for name in parameters(found) if name not in named(docstring)]
    assert not missing, f"{path} does not say what {', '.join(missing)} is"
