"""The entries of the catalogue that fit what is asked for."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from polyhead.checks import given, several
from polyhead.errors import ConfigError
from polyhead.mechanisms.facets import FACETS, one_of

if TYPE_CHECKING:
    from polyhead.mechanisms.registry import Entry

__all__ = ["filtered"]

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
}
_BOUND = re.compile(r"\s*(<=|>=|<|>|=)\s*(\d+(?:\.\d+)?)\s*")


def filtered(
    entries: Iterable[Entry],
    *,
    patterns: Iterable[str],
    family: str | None,
    paper: str | None,
    supports: str | Iterable[str] | None,
    kv_bytes: str | None,
    facets: Mapping[str, str | Iterable[str]],
) -> list[Entry]:
    """The entries that fit; see `catalog`. `patterns` are those that there are."""
    found = list(entries)
    if family is not None:
        (family,) = _values("family", family, {entry.family for entry in found}, most=1)
        found = [entry for entry in found if entry.family == family]
    if paper is not None:
        if not isinstance(paper, str) or not re.fullmatch(r"\d{1,3}", paper):
            raise ConfigError(f"paper must be the number of a paper, such as '074'; got {given(paper)}")
        found = [entry for entry in found if entry.paper == paper.zfill(3)]
    if supports is not None:
        wanted = set(_values("supports", supports, patterns))
        found = [entry for entry in found if wanted <= entry.supports]
    for name, value in facets.items():
        allowed = _values(name, value, FACETS[name])
        found = [entry for entry in found if not set(allowed).isdisjoint(entry.facets.values(name))]
    if kv_bytes is not None:
        fits = _bound("kv_bytes", kv_bytes)
        found = [entry for entry in found if fits(entry.cost.kv_bytes_per_token)]
    return found


def _values(name: str, value: Any, allowed: Iterable[str], most: int | None = None) -> list[str]:
    """What was asked for, one value or several, or a `ConfigError` that lists what may be."""
    known = sorted(allowed)
    values = [one_of(name, one, known) for one in (value if several(value) else [value])]
    if not values or (most is not None and len(values) > most):
        raise ConfigError(f"{name} must be one of {', '.join(known)}; got {given(value)}")
    return values


def _bound(name: str, value: Any) -> Callable[[float], bool]:
    """A test of numbers out of text such as "<128"."""
    parsed = _BOUND.fullmatch(value) if isinstance(value, str) else None
    if parsed is None:
        raise ConfigError(
            f"{name} must be one of {', '.join(_COMPARE)} and a number of bytes, such as '<512'; "
            f"got {given(value)}"
        )
    compare, limit = _COMPARE[parsed[1]], float(parsed[2])
    return lambda number: compare(number, limit)
