"""A whole report: the model, the text and the run that it tells of, and all that it says of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Self

from polyhead.errors import ConfigError
from polyhead.report import codec
from polyhead.report.data.fields import check, number
from polyhead.report.data.heads import ROLES, Lookups, Measurement, Pictures, Roles
from polyhead.report.data.savings import Recommendation, Savings

__all__ = ["FORMAT", "MAX_TOKENS", "Model", "Phase", "ReportData", "Run", "Text"]

FORMAT = "polyhead-report/1"
MAX_TOKENS = 65536  # positions are packed into 16 bits


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
        check(bool(self.heads), "heads must name at least one layer, got ()")
        check(
            len(self.heads) == len(self.kv_heads),
            f"heads has {len(self.heads)} layers and kv_heads {len(self.kv_heads)}; they must agree",
        )
        for layer, (h, g) in enumerate(zip(self.heads, self.kv_heads, strict=True)):
            check(
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
        check(0 < n <= MAX_TOKENS, f"tokens must hold 1 to {MAX_TOKENS} tokens, got {n}")
        check(len(self.received) in (0, n), f"received holds {len(self.received)} values for {n} tokens")
        check(all(0 <= s < n for s in self.sinks), f"sinks must lie in 0..{n - 1}, got {self.sinks}")
        object.__setattr__(self, "received", tuple(number(v) or 0.0 for v in self.received))


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
        check(self.format == FORMAT, f"format must be {FORMAT!r}, got {self.format!r}")
        names = [m.name for m in self.measurements]
        check(len(set(names)) == len(names), f"measurements must have different names, got {names}")
        for m in self.measurements:
            self._fits(f"measurement {m.name!r}", m.values)
        self._fits("roles.heads", self.roles.heads)
        found = {role for row in self.roles.heads for role in row}
        check(found <= set(ROLES), f"roles must be of {', '.join(ROLES)}; got {sorted(found - set(ROLES))}")
        for rule in self.roles.rules:
            for c in rule.conditions:
                check(
                    c.measurement in names,
                    f"rule {rule.role!r} asks for {c.measurement!r}, not among {names}",
                )
        if self.pictures:
            self._fits("pictures.packed", self.pictures.packed)
        if self.lookups:
            self._fits("lookups.packed", self.lookups.packed)
            q, n = self.lookups.queries, len(self.text.tokens)
            inside = not q or (q[0] >= 0 and q[-1] < n and all(a < b for a, b in pairwise(q)))
            check(inside, f"lookups.queries must ascend within 0..{n - 1}")

    def _fits(self, what: str, rows: Iterable[Any]) -> None:
        widths = tuple(len(row) for row in rows)
        check(widths == self.model.heads, f"{what} has heads by layer {widths}, the model {self.model.heads}")

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
