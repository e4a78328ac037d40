"""Some heads of a model: what is chosen from head scores."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any, Literal

from polyhead.checks import given, several, whole
from polyhead.errors import ConfigError

__all__ = ["Heads", "Level"]

Level = Literal["query", "kv"]


def check_level(level: object) -> None:
    """Raise a `ConfigError` unless `level` is one."""
    if not isinstance(level, str) or level not in ("query", "kv"):
        raise ConfigError(f"level must be 'query' or 'kv', got {given(level)}")


def whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """A sequence of integers of at least 1, or a `ConfigError`."""
    if not several(values):
        raise ConfigError(f"{name} must be integers, one per layer, got {given(values)}")
    return tuple(whole(f"{name}[{layer}]", value, 1) for layer, value in enumerate(values))


@dataclass(frozen=True, eq=False, repr=False)
class Heads(Set[tuple[int, int]]):
    """A frozen set of (layer, head), in the order in which they were chosen (best first after `top`).

    `&`, `|`, `-`, `^` and the comparisons are those of sets; order does not count for equality.

    Attributes:
        pairs: the (layer, head) pairs, each once.
        level: whether they count query heads or key/value heads.
        kv_groups: for query heads, how many share a key/value head, per layer; None: not known.
    """

    pairs: tuple[tuple[int, int], ...] = ()
    level: Level = "query"
    kv_groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        try:
            unique = dict.fromkeys(
                (operator.index(layer), operator.index(head)) for layer, head in self.pairs
            )
        except (TypeError, ValueError, RuntimeError):
            unique = {(-1, -1): None}
        if any(layer < 0 or head < 0 for layer, head in unique):
            raise ConfigError(
                f"pairs must be pairs (layer, head) of integers counted from 0, got {given(self.pairs)}"
            )
        object.__setattr__(self, "pairs", tuple(unique))
        check_level(self.level)
        if self.kv_groups is not None:
            object.__setattr__(self, "kv_groups", whole_numbers("kv_groups", self.kv_groups))

    def _from_iterable(self, pairs: Iterable[tuple[int, int]]) -> Heads:  # type: ignore[override]
        return Heads(tuple(pairs), self.level, self.kv_groups)

    def __contains__(self, pair: object) -> bool:
        return pair in self.pairs

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __hash__(self) -> int:
        return hash(frozenset(self.pairs))

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.pairs[index]

    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Layer -> its chosen heads, both ascending; layers without any are left out."""
        found: dict[int, list[int]] = {}
        for layer, head in sorted(self.pairs):
            found.setdefault(layer, []).append(head)
        return {layer: tuple(heads) for layer, heads in found.items()}

    def kv_heads(self) -> Heads:
        """The key/value heads that these heads read; key/value heads are returned as they are.

        Raises:
            ConfigError: these are query heads and it is not known which of them share keys.
        """
        if self.level == "kv":
            return self
        if self.kv_groups is None:
            raise ConfigError(
                "these heads do not know how many query heads share a key/value head; "
                "give kv_groups, one number per layer"
            )
        groups = self.kv_groups
        return Heads(tuple((layer, head // groups[layer]) for layer, head in self.pairs), "kv")

    def __repr__(self) -> str:
        kind = "heads" if self.level == "query" else "key/value heads"
        shown = ", ".join(f"{layer}.{head}" for layer, head in self.pairs[:12])
        return f"Heads({len(self)} {kind}: {shown}{', ...' if len(self) > 12 else ''})"
