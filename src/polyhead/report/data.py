"""Everything that a report says, as data.

`report.json` is a `ReportData`, and `report.html` is drawn from nothing else: whatever the page shows can be
read, checked and compared here. Values that belong to heads are nested tuples indexed `[layer][head]`; layers
may differ in their number of heads. A number that could not be measured is None, never NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Self

from polyhead.errors import ConfigError
from polyhead.heads.roles import ROLES as ALL_ROLES
from polyhead.report import codec

__all__ = [
    "FORMAT",
    "MAX_TOKENS",
    "ROLES",
    "Condition",
    "Lookups",
    "Measurement",
    "Model",
    "Phase",
    "Pictures",
    "Point",
    "Recommendation",
    "ReportData",
    "RoleRule",
    "Roles",
    "Run",
    "Savings",
    "Text",
]

FORMAT = "polyhead-report/1"
MAX_TOKENS = 65536  # positions are packed into 16 bits

# every role that a head can have, in the order in which the page lists them: first where heads rest
_RESTING = ("sink", "local")
ROLES = (*_RESTING, *(role for role in ALL_ROLES if role not in _RESTING))


def _check(allowed: bool, message: str) -> None:
    if not allowed:
        raise ConfigError(message)


def _number(value: float | None) -> float | None:
    """`value` to six significant digits; None for None, NaN and infinities."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.6g}")


@dataclass(frozen=True)
class Model:
    """The model that was looked at.

    Attributes:
        name: what the user called it (`smollm2`, a hub id, a folder).
        architecture: its class, such as `LlamaForCausalLM`.
        parameters: number of parameters.
        head_dim: width of a head.
        heads: query heads of each layer.
        kv_heads: key/value heads of each layer; each divides the query heads.
        is_encoder: True where every token sees every other (no cache, nothing to save).
        dtype: the dtype it was measured in.
    """

    name: str
    architecture: str
    parameters: int
    head_dim: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    is_encoder: bool
    dtype: str

    def __post_init__(self) -> None:
        _check(bool(self.heads), "heads must name at least one layer, got ()")
        _check(
            len(self.heads) == len(self.kv_heads),
            f"heads has {len(self.heads)} layers and kv_heads {len(self.kv_heads)}; they must agree",
        )
        for layer, (h, g) in enumerate(zip(self.heads, self.kv_heads, strict=True)):
            _check(
                g > 0 and h > 0 and h % g == 0,
                f"layer {layer} has {h} query heads and {g} KV heads; the first must be a multiple",
            )

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.heads)

    @property
    def total_heads(self) -> int:
        """Query heads of all layers."""
        return sum(self.heads)

    @property
    def total_kv_heads(self) -> int:
        """KV heads of all layers."""
        return sum(self.kv_heads)

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of each layer's first head among all heads."""
        return (0, *accumulate(self.heads[:-1]))


@dataclass(frozen=True)
class Text:
    """The text that the heads were watched on.

    Attributes:
        name: where it comes from.
        tokens: the string of each token, as the tokenizer decodes it on its own.
        sinks: positions found to draw attention whatever they say.
        received: the attention that each position receives, averaged over heads and over the queries that
            can see it; empty where it was not measured.
    """

    name: str
    tokens: tuple[str, ...]
    sinks: tuple[int, ...] = ()
    received: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.tokens)
        _check(0 < n <= MAX_TOKENS, f"tokens must hold 1 to {MAX_TOKENS} tokens, got {n}")
        _check(len(self.received) in (0, n), f"received holds {len(self.received)} values for {n} tokens")
        _check(all(0 <= s < n for s in self.sinks), f"sinks must lie in 0..{n - 1}, got {self.sinks}")
        object.__setattr__(self, "received", tuple(_number(v) or 0.0 for v in self.received))


@dataclass(frozen=True)
class Phase:
    """A part of the run and the seconds it took."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Run:
    """How the report came to be: version of Polyhead, command, ISO date, machine, seeds, time by phase."""

    version: str
    command: str
    date: str
    machine: str
    seeds: tuple[int, ...] = ()
    phases: tuple[Phase, ...] = ()


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
        object.__setattr__(self, "values", tuple(tuple(_number(v) for v in row) for row in self.values))

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
        _check(self.relation in (">=", "<="), f"relation must be '>=' or '<=', got {self.relation!r}")
        object.__setattr__(self, "threshold", _number(self.threshold) or 0.0)


@dataclass(frozen=True)
class RoleRule:
    """When a head has a role: all conditions hold, and no earlier rule took it."""

    role: str
    text: str
    conditions: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        _check(self.role in ROLES, f"role must be one of {', '.join(ROLES)}; got {self.role!r}")


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


@dataclass(frozen=True)
class Point:
    """One way to choose KV heads, one size, and what came of it.

    Attributes:
        policy: `full` (the untouched model), `random`, or the name of another way to choose, such as `both
            scores`.
        kv_fraction: share of KV heads that keep the full context, 0 to 1.
        heads_kept: their number.
        seed: for policies that draw; None otherwise.
        needle_accuracy: share of hidden facts that the model finds again, 0 to 1.
        needles: how many were hidden.
        perplexity: of held-out text.
        cache_bytes: pairs (context length, bytes held by the KV cache).
        decode_tokens_per_second: at the context length that `Savings.decode_how` names.
        heads: the KV heads kept, pairs (layer, KV head); may be empty where they are not told.
        needles_whole: how many of the hidden facts the model finds with its whole cache.
        needles_kept: how many of these it finds with this cache too.
    """

    policy: str
    kv_fraction: float
    heads_kept: int
    seed: int | None = None
    needle_accuracy: float | None = None
    needles: int = 0
    perplexity: float | None = None
    cache_bytes: tuple[tuple[int, int], ...] = ()
    decode_tokens_per_second: float | None = None
    heads: tuple[tuple[int, int], ...] = ()
    needles_whole: int | None = None
    needles_kept: int | None = None

    def __post_init__(self) -> None:
        _check(0 <= self.kv_fraction <= 1, f"kv_fraction must lie in 0..1, got {self.kv_fraction}")
        for name in ("kv_fraction", "needle_accuracy", "perplexity", "decode_tokens_per_second"):
            object.__setattr__(self, name, _number(getattr(self, name)))

    @property
    def share_kept(self) -> float | None:
        """Of the facts that the model finds with its whole cache, the share found with this one too."""
        if self.needles_kept is None or not self.needles_whole:
            return None
        return self.needles_kept / self.needles_whole


@dataclass(frozen=True)
class Savings:
    """What a smaller cache costs: the untouched model, and points for every choice and size that was tried.

    The three `..._how` say in a sentence each on what the numbers were measured. `verdict` says why no
    smaller cache is recommended, where none is, and `python` are lines that make the cache of any point.
    """

    baseline: Point
    points: tuple[Point, ...]
    needle_how: str = ""
    perplexity_how: str = ""
    decode_how: str = ""
    verdict: str = ""
    python: str = ""

    def policies(self) -> list[str]:
        """The policies among the points, in order of appearance, `random` last."""
        names = dict.fromkeys(p.policy for p in self.points)
        return [n for n in names if n != "random"] + ["random"] * ("random" in names)


@dataclass(frozen=True)
class Recommendation:
    """The smallest cache whose answers hold.

    Attributes:
        before: the untouched model, measured as `after` was.
        after: the recommended choice; preferably on texts, needles and seeds not used to choose it.
        why: one or two sentences.
        python: the lines that apply it.
        how: on what `before` and `after` were measured.
        chance: as many heads chosen at random, on some of the same facts.
    """

    before: Point
    after: Point
    why: str
    python: str
    how: str = ""
    chance: tuple[Point, ...] = ()


@dataclass(frozen=True)
class ReportData:
    """A whole report. `savings` and `recommendation` are None for encoders, which have no cache."""

    model: Model
    text: Text
    run: Run
    measurements: tuple[Measurement, ...]
    roles: Roles
    pictures: Pictures | None = None
    lookups: Lookups | None = None
    savings: Savings | None = None
    recommendation: Recommendation | None = None
    notes: tuple[str, ...] = ()
    format: str = field(default=FORMAT)

    def __post_init__(self) -> None:
        _check(self.format == FORMAT, f"format must be {FORMAT!r}, got {self.format!r}")
        names = [m.name for m in self.measurements]
        _check(len(set(names)) == len(names), f"measurements must have different names, got {names}")
        for m in self.measurements:
            self._fits(f"measurement {m.name!r}", m.values)
        self._fits("roles.heads", self.roles.heads)
        found = {role for row in self.roles.heads for role in row}
        _check(found <= set(ROLES), f"roles must be of {', '.join(ROLES)}; got {sorted(found - set(ROLES))}")
        for rule in self.roles.rules:
            for c in rule.conditions:
                _check(
                    c.measurement in names,
                    f"rule {rule.role!r} asks for {c.measurement!r}, not among {names}",
                )
        if self.pictures:
            self._fits("pictures.packed", self.pictures.packed)
        if self.lookups:
            self._fits("lookups.packed", self.lookups.packed)
            q, n = self.lookups.queries, len(self.text.tokens)
            inside = not q or (q[0] >= 0 and q[-1] < n and all(a < b for a, b in pairwise(q)))
            _check(inside, f"lookups.queries must ascend within 0..{n - 1}")

    def _fits(self, what: str, rows: Iterable[Any]) -> None:
        widths = tuple(len(row) for row in rows)
        _check(
            widths == self.model.heads, f"{what} has heads by layer {widths}, the model {self.model.heads}"
        )

    def measurement(self, name: str) -> Measurement | None:
        """The measurement called `name`, or None."""
        return next((m for m in self.measurements if m.name == name), None)

    def to_json(self) -> str:
        """The text of `report.json`."""
        return codec.dumps(codec.plain(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report that `to_json` wrote; `ConfigError` names the first field that does not fit."""
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"not a report: {error}") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            given = value.get("format") if isinstance(value, dict) else type(value).__name__
            raise ConfigError(f"not a report in the format {FORMAT!r}: got {given!r}")
        return codec.build(cls, value, "report")
