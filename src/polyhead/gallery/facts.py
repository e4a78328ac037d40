"""Everything that the catalogue can say of one mechanism at one size."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyhead.errors import UnknownName
from polyhead.mechanisms.flow import Flow, flow_of
from polyhead.mechanisms.registry import CATALOGUE_SIZE, Entry
from polyhead.nn.cost import Cost
from polyhead.papers import Paper, paper
from polyhead.reference import reference

__all__ = ["Facts", "Option", "Size", "facts_of"]


@dataclass(frozen=True)
class Size:
    """The size that costs are stated at; that of the catalogue by default.

    Attributes:
        dim, heads: of the mechanism.
        length: tokens of the call, queries and keys.
        dtype: of what a cache holds.
    """

    dim: int = CATALOGUE_SIZE["dim"]
    heads: int = CATALOGUE_SIZE["heads"]
    length: int = CATALOGUE_SIZE["length"]
    dtype: torch.dtype = CATALOGUE_SIZE["dtype"]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"dim={self.dim}, heads={self.heads}, length={self.length}, {dtype}"


@dataclass(frozen=True)
class Option:
    """An option: its name, its type as the source writes it, and its default as Python writes it."""

    name: str
    kind: str
    default: str | None

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}" + ("" if self.default is None else f" = {self.default}")


@dataclass(frozen=True)
class Facts:
    """What is known of a mechanism.

    Attributes:
        entry: what the registry knows.
        size: where cost and flow are stated.
        cost: of a call of self-attention.
        flow: its data flow.
        options: with their defaults, in the order of the configuration.
        build: the line that builds it.
        twin: the naive twin, "module.function"; None where it has none.
        twin_file: its file, relative to the package.
        twin_source: its source.
        paper: its paper in the list of papers; None where it is older than they are.
    """

    entry: Entry
    size: Size
    cost: Cost
    flow: Flow
    options: tuple[Option, ...]
    build: str
    twin: str | None
    twin_file: str | None
    twin_source: str | None
    paper: Paper | None

    @property
    def citation(self) -> str:
        """Number, title, year and address of the paper, as far as it has them."""
        if self.paper is None:
            return self.entry.title
        said = (self.paper.number, f"{self.paper.title} ({self.paper.year})", self.paper.url)
        return " · ".join(part for part in said if part)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        entry = self.entry
        plain = ("name", "paper", "title", "family", "summary", "equation", "file", "graph_breaks")
        return {name: getattr(entry, name) for name in plain} | {
            "aliases": list(entry.aliases),
            "files": list(entry.files),
            "supports": sorted(entry.supports),
            "facets": {name: list(entry.facets.values(name)) for name in entry.facets.items()},
            "options": [str(option) for option in self.options],
            "build": self.build,
            "twin": self.twin,
            "twin_file": self.twin_file,
            "size": str(self.size),
            "cost": dataclasses.asdict(self.cost),
            "flow": dataclasses.asdict(self.flow),
        }


def facts_of(entry: Entry, size: Size | None = None) -> Facts:
    """Look everything up, for one mechanism at one size; nothing takes memory.

    Raises:
        ConfigError: the mechanism cannot have this size.
    """
    size = Size() if size is None else size
    module = entry.example(dim=size.dim, heads=size.heads, dtype=size.dtype)
    twin = _twin(entry.name)
    return Facts(
        entry=entry,
        size=size,
        cost=module.cost(size.length),
        flow=flow_of(module) if entry.picture is None else entry.picture,
        options=tuple(_options(entry.config)),
        build=f'ph.build("{entry.name}", dim={size.dim}, heads={size.heads})',
        twin=None if twin is None else f"{twin.__module__}.{twin.__name__}",
        twin_file=None if twin is None else _file(twin),
        twin_source=None if twin is None else inspect.getsource(twin),
        paper=None if entry.paper is None else paper(entry.paper),
    )


def _twin(name: str) -> Any:
    try:
        return reference(name)
    except UnknownName:
        return None


def _file(function: Any) -> str:
    package = Path(__file__).resolve().parents[1]
    file = Path(inspect.getsourcefile(function) or "").resolve()
    return file.relative_to(package).as_posix() if file.is_relative_to(package) else str(file)


def _options(config: type) -> list[Option]:
    found = []
    for field in dataclasses.fields(config):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        default: str | None = None
        if field.default is not dataclasses.MISSING:
            default = repr(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = repr(field.default_factory())
        found.append(Option(field.name, kind, default))
    return found
