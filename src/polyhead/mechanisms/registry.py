"""Names for mechanisms: registering, building, listing them."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from polyhead.checks import given, place
from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import MechanismConfig
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.files import file_of, files_of
from polyhead.mechanisms.filtering import filtered
from polyhead.mechanisms.flow import Flow, flow_of
from polyhead.mechanisms.promises import Promises
from polyhead.nn.contract import AttentionModule
from polyhead.nn.cost import Cost

__all__ = [
    "CATALOGUE_SIZE",
    "PATTERNS",
    "Catalog",
    "Entry",
    "Registry",
    "build",
    "catalog",
    "entry",
    "register",
]

PATTERNS = frozenset({"self", "causal_self", "cross", "causal_cross"})

# The size at which the catalogue compares: of the mechanism, of the call, and what a cache holds.
CATALOGUE_SIZE: dict[str, Any] = {"dim": 512, "heads": 8, "length": 4096, "dtype": torch.float16}

_SHOWN = Facets()  # whatever the module shows by itself
_WHOLE = Promises()  # the whole contract

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
        declared: what its file says of its facets.
        picture: its data flow, where its file draws it; None where its parts say it.
        promises: what it promises otherwise than most.
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
    declared: Facets = _SHOWN
    picture: Flow | None = None
    promises: Promises = _WHOLE

    def example(self, **size: Any) -> AttentionModule:
        """The module at `CATALOGUE_SIZE` or another `dim`, `heads` and `dtype`, on the meta device."""
        size = {name: CATALOGUE_SIZE[name] for name in ("dim", "heads", "dtype")} | size
        dtype = size.pop("dtype")
        return self.config(**size).build(device="meta", dtype=dtype)

    @cached_property
    def _looked_at(self) -> AttentionModule:
        """What all that is told of it is read from; never called."""
        return self.example()

    @cached_property
    def cost(self) -> Cost:
        """What a call costs at the size of `CATALOGUE_SIZE`, with the options left as they are."""
        return self._looked_at.cost(CATALOGUE_SIZE["length"])

    @cached_property
    def facets(self) -> Facets:
        """What kind of attention it is: what its file declares, and what the module itself shows."""
        return self.declared.settled(self._looked_at, self.supports)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Where it is written: `file`, then those of what it is made of that few others are made of."""
        return files_of(self.config, self._looked_at)

    @cached_property
    def flow(self) -> Flow:
        """What becomes of the inputs, step by step, at the size of `CATALOGUE_SIZE`."""
        return flow_of(self._looked_at) if self.picture is None else self.picture

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
        facets: Facets = _SHOWN,
        picture: Flow | None = None,
        promises: Promises = _WHOLE,
    ) -> Callable[[C], C]:
        """A decorator for the configuration class of a mechanism; the arguments are those of `Entry`.

        Declare in `facets` only what the module does not show by itself: see `Facets`. Give a `picture` only
        where the one that `flow_of` makes of the module's parts says too little.
        """
        if not isinstance(supports, frozenset | set) or not supports <= PATTERNS or not supports:
            raise ConfigError(
                f"{name}: supports must be a set of some of {sorted(PATTERNS)}; got {given(supports)}"
            )
        if not isinstance(facets, Facets):
            raise ConfigError(f"{name}: facets must be Facets(...); got {given(facets)}")
        if not isinstance(picture, Flow | None):
            raise ConfigError(f"{name}: picture must be a Flow; got {given(picture)}")
        if not isinstance(promises, Promises):
            raise ConfigError(f"{name}: promises must be Promises(...); got {given(promises)}")

        def add(config: C) -> C:
            for known in (name, *aliases):
                if known in self._names:
                    raise ConfigError(
                        f"two mechanisms are called {known!r}; the other is {self._names[known]!r}"
                    )
            self._entries[name] = Entry(
                name=name,
                aliases=aliases,
                paper=paper,
                title=title,
                family=family,
                summary=summary,
                equation=equation,
                supports=frozenset(supports),
                graph_breaks=graph_breaks,
                config=config,
                file=file_of(config.__module__),
                declared=facets,
                picture=picture,
                promises=promises,
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


def configure(name: str, **config: Any) -> MechanismConfig:
    """The configuration that `build` would build from the same arguments."""
    return _load().configure(name, **config)


def catalog(
    *,
    family: str | None = None,
    paper: str | None = None,
    supports: str | Iterable[str] | None = None,
    kv_bytes: str | None = None,
    sequences: str | Iterable[str] | None = None,
    levels: str | Iterable[str] | None = None,
    positions: str | Iterable[str] | None = None,
    representations: str | Iterable[str] | None = None,
    alignment: str | Iterable[str] | None = None,
    distribution: str | Iterable[str] | None = None,
    complexity: str | Iterable[str] | None = None,
    cache: str | Iterable[str] | None = None,
) -> Catalog:
    """The mechanisms that can be built by name, by name: `catalog(family="sharing", kv_bytes="<=512")`.

    Args:
        family: the kind of idea, such as "sharing".
        paper: number of the paper, "074".
        supports: patterns, out of `PATTERNS`; a mechanism must support all of them.
        kv_bytes: what a token of a cache may take, such as "<512" or ">=128", in bytes at the size of
            `CATALOGUE_SIZE`: dim=512, heads=8, float16, all options at their defaults.
        sequences, levels, positions, representations, alignment, distribution, complexity, cache: facets, of
            which `FACETS` says what the values mean; one of the given values must be the mechanism's.

    Returns:
        The entries, which print one a line; none if no mechanism is like that.

    Raises:
        ConfigError: a value that there is not; the message lists those that there are.
    """
    facets = {
        "sequences": sequences,
        "levels": levels,
        "positions": positions,
        "representations": representations,
        "alignment": alignment,
        "distribution": distribution,
        "complexity": complexity,
        "cache": cache,
    }
    entries = _load().catalog()
    found = filtered(
        entries,
        patterns=PATTERNS,
        family=family,
        paper=paper,
        supports=supports,
        kv_bytes=kv_bytes,
        facets={name: value for name, value in facets.items() if value is not None},
    )
    return Catalog(found)


def entry(name: str) -> Entry:
    """What the catalogue knows of the mechanism called `name`, which may be an alias."""
    return _load().entry(name)
