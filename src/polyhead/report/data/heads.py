"""What a report says of heads: measurements, roles, pictures, and where they look.

Values that belong to heads are nested tuples indexed `[layer][head]`; layers may differ in their number of
heads. A number that could not be measured is None, never NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyhead.heads.roles import ROLES as ALL_ROLES
from polyhead.report.data.fields import check, number

__all__ = ["ROLES", "Condition", "Lookups", "Measurement", "Pictures", "RoleRule", "Roles"]

# every role that a head can have, in the order in which the page lists them: first where heads rest
_RESTING = ("sink", "local")
ROLES = (*_RESTING, *(role for role in ALL_ROLES if role not in _RESTING))


@dataclass(frozen=True)
class Measurement:
    """One number for every head.

    Attributes:
        name: short and unique, as in `profile["sink"]`.
        title: what the page calls it.
        meaning: one sentence that defines it.
        unit: `share` for fractions of one (shown in percent), else a unit such as `bits` or `tokens`, or "".
        direction: what a high value says, such as "higher: looks further back"; may be "".
        values: `[layer][head]`, None where it could not be measured; kept to six significant digits.
    """

    name: str
    title: str
    meaning: str
    unit: str
    direction: str
    values: tuple[tuple[float | None, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(tuple(number(v) for v in row) for row in self.values))

    def flat(self) -> list[float | None]:
        """The values of all heads, layer after layer."""
        return [v for row in self.values for v in row]


@dataclass(frozen=True)
class Condition:
    """A measurement compared with a threshold; `relation` is ">=" or "<="."""

    measurement: str
    relation: str
    threshold: float

    def __post_init__(self) -> None:
        check(self.relation in (">=", "<="), f"relation must be '>=' or '<=', got {self.relation!r}")
        object.__setattr__(self, "threshold", number(self.threshold) or 0.0)


@dataclass(frozen=True)
class RoleRule:
    """When a head has a role: all conditions hold, and no earlier rule took it."""

    role: str
    text: str
    conditions: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        check(self.role in ROLES, f"role must be one of {', '.join(ROLES)}; got {self.role!r}")


@dataclass(frozen=True)
class Roles:
    """The rules in the order in which they are tried, and the role of each head, `[layer][head]`."""

    rules: tuple[RoleRule, ...]
    heads: tuple[tuple[str, ...], ...]

    def counts(self) -> dict[str, int]:
        """Heads by role, for every role of `ROLES`."""
        return {role: sum(row.count(role) for row in self.heads) for role in ROLES}


@dataclass(frozen=True)
class Pictures:
    """A small picture of every head's attention, made by `polyhead.report.packing.pack_pictures`.

    Cell (r, c) is the attention that the queries of the r-th of `side` equal stretches of the text give to
    the keys of the c-th, averaged over these queries: rows sum to one. `packed[layer][head]` is base64 of
    zlib of one byte a cell on a log scale, row by row, for a causal model only the cells with c <= r.
    """

    side: int
    causal: bool
    packed: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Lookups:
    """Where every head looks from chosen tokens, made by `polyhead.report.packing.pack_lookups`.

    `queries` are the positions of these tokens, ascending; `packed[layer][head]` holds for each of them the
    `k` most attended positions with their weights (layout: see `packing`).
    """

    k: int
    queries: tuple[int, ...]
    packed: tuple[tuple[str, ...], ...]
