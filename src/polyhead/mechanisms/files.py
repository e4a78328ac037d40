"""The files in which a mechanism is written."""

from __future__ import annotations

from itertools import chain

from torch import nn

__all__ = ["COMMON", "MOST", "file_of", "files_of", "modules_of"]

MOST = 3  # files beside that of the configuration

# What so many mechanisms are made of that it tells none of them; a test counts them.
COMMON = frozenset(
    {
        "polyhead.nn.attention",
        "polyhead.nn.auxiliary",
        "polyhead.nn.contract",
        "polyhead.nn.one_sequence",
        "polyhead.nn.part_module",
        "polyhead.nn.positions.module",
        "polyhead.nn.projections",
        "polyhead.nn.routing",
        "polyhead.nn.self_only",
    }
)


def file_of(module: str) -> str:
    """The file of a module of the package, relative to the package."""
    return module.removeprefix("polyhead.").replace(".", "/") + ".py"


def modules_of(built: nn.Module) -> list[str]:
    """The modules of the package that define a mechanism: its class, those of its parts, and their bases."""
    kinds = [type(part) for part in built.modules()]  # its own class first
    every = chain(kinds, *(kind.__mro__ for kind in kinds))
    return list(dict.fromkeys(kind.__module__ for kind in every if kind.__module__.startswith("polyhead.")))


def files_of(config: type, built: nn.Module) -> tuple[str, ...]:
    """The file of a configuration, then those in which most of what it builds is new, at most `MOST`.

    Where nothing is, the one of the class that it builds.
    """
    every = modules_of(built)
    own = [name for name in every if name not in COMMON and name != config.__module__][:MOST] or every[:1]
    return tuple(dict.fromkeys(map(file_of, (config.__module__, *own))))
