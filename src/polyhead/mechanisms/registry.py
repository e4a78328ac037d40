"""Names for mechanisms: registering, building, listing them."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from polyhead.checks import given, place
from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import MechanismConfig
from polyhead.nn.contract import AttentionModule

__all__ = ["PATTERNS", "Catalog", "Entry", "Registry", "build", "catalog", "entry", "register"]

PATTERNS = frozenset({"self", "causal_self", "cross", "causal_cross"})

C = TypeVar("C", bound=type[MechanismConfig])


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the catalogue knows of a mechanism.

    Attributes:
        name: what `build` calls it.
        aliases: other names.
        paper: number of its paper in `polyhead papers`, three digits; None where it is older than they are.
        title: title of the paper.
        family: the kind of idea that it is: "sharing", ...
        summary: what it is, in a line.
        equation: its equation in plain text.
        supports: the patterns that it can be called in, out of `PATTERNS`.
        graph_breaks: places where `torch.compile` leaves the graph in a causal call, the more the slower.
        config: the class of its configuration.
        file: its file, relative to the package.
    """

    name: str
    aliases: tuple[str, ...]
    paper: str | None
    title: str
    family: str
    summary: str
    equation: str
    supports: frozenset[str]
    graph_breaks: int
    config: type[MechanismConfig]
    file: str

    def __str__(self) -> str:
        paper = f"paper {self.paper}" if self.paper else "-"
        return f"{self.name} ({paper}, {self.family}; {', '.join(sorted(self.supports))}): {self.summary}"


class Catalog(tuple[Entry, ...]):
    """Entries, by name; prints one a line."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self))


class Registry:
    """Mechanisms by name."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._names: dict[str, str] = {}

    def register(
        self,
        name: str,
        *,
        title: str,
        family: str,
        summary: str,
        equation: str,
        paper: str | None = None,
        aliases: tuple[str, ...] = (),
        supports: frozenset[str] = PATTERNS,
        graph_breaks: int = 0,
    ) -> Callable[[C], C]:
        """A decorator for the configuration class of a mechanism; the arguments are those of `Entry`."""
        if not isinstance(supports, frozenset | set) or not supports <= PATTERNS or not supports:
            raise ConfigError(
                f"{name}: supports must be a set of some of {sorted(PATTERNS)}; got {given(supports)}"
            )

        def add(config: C) -> C:
            for known in (name, *aliases):
                if known in self._names:
                    raise ConfigError(
                        f"two mechanisms are called {known!r}; the other is {self._names[known]!r}"
                    )
            file = config.__module__.removeprefix("polyhead.").replace(".", "/") + ".py"
            self._entries[name] = Entry(
                name, aliases, paper, title, family, summary, equation, supports, graph_breaks, config, file
            )
            self._names |= dict.fromkeys((name, *aliases), name)
            return config

        return add

    def entry(self, name: str) -> Entry:
        """What is known of the mechanism called `name`, which may be an alias.

        Raises:
            UnknownName: nothing is called so; the message names the nearest.
        """
        if not isinstance(name, str) or name not in self._names:
            raise unknown_name("mechanism", name, self._names)
        return self._entries[self._names[name]]

    def catalog(self) -> Catalog:
        """Every mechanism, by name."""
        return Catalog(self._entries[name] for name in sorted(self._entries))

    def configure(self, name: str, **config: Any) -> MechanismConfig:
        """The configuration of a mechanism, checked.

        Raises:
            UnknownName: no such mechanism.
            ConfigError: an option that it does not have, one that is missing, or a value not allowed.
        """
        found = self.entry(name)
        fields = {f.name: f for f in dataclasses.fields(found.config) if f.init}
        options = ", ".join(fields)
        for option in config:
            if option not in fields:
                near = get_close_matches(option, fields, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(f"{found.name} has no option {option!r}; {hint}its options are {options}")
        missing = [
            field.name
            for field in fields.values()
            if field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and field.name not in config
        ]
        if missing:
            raise ConfigError(f"{found.name} needs {' and '.join(missing)}; its options are {options}")
        return found.config(**config)

    def build(self, name: str, *, device: Any = None, dtype: Any = None, **config: Any) -> AttentionModule:
        """The module of a mechanism; its configuration is kept as `module.config`.

        Args:
            name: of the mechanism, or an alias.
            device, dtype: of its parameters.
            config: its options; `dim` and `heads` always.
        """
        configuration = self.configure(name, **config)
        device, dtype = place(name, device, dtype)
        module = configuration.build(device=device, dtype=dtype)
        module.config = configuration
        return module


_ALL = Registry()
register = _ALL.register


@cache
def _load() -> Registry:
    """The registry with every file of this package in it."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"polyhead.mechanisms.{module.name}")
    return _ALL


def build(name: str, *, device: Any = None, dtype: Any = None, **config: Any) -> AttentionModule:
    """An attention module by name: `build("grouped_query", dim=512, heads=8, kv_heads=2)`.

    Args:
        name: of the mechanism, or an alias; `catalog()` lists them.
        device, dtype: of its parameters.
        config: its options; `dim` and `heads` always, the others have defaults.

    Returns:
        A module to call as `module(x, context=None, *, mask, padding, positions, cache)`, with `new_cache`,
        `new_context_cache` and `cost`. Its configuration is `module.config`.

    Raises:
        UnknownName: no such mechanism; the message names the nearest.
        ConfigError: an option that it does not have, or a value that is not allowed.
    """
    return _load().build(name, device=device, dtype=dtype, **config)


def catalog() -> Catalog:
    """Every mechanism that can be built by name: paper, family, summary, what it supports."""
    return _load().catalog()


def entry(name: str) -> Entry:
    """What the catalogue knows of the mechanism called `name`, which may be an alias."""
    return _load().entry(name)
