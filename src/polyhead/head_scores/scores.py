"""`HeadScores`: one number per (layer, head)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as _replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from polyhead.checks import given, real, several
from polyhead.errors import ConfigError, ShapeError
from polyhead.head_scores.heads import Heads, Level, check_level, whole_numbers
from polyhead.head_scores.show import figure, frame

__all__ = ["HeadScores"]

Array = NDArray[np.float64]

_SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
}


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """One number per (layer, head) of a model. NaN: not defined for this head.

    Attributes:
        values: per layer, an array `(H,)` of its heads' values; layers may differ in width.
        name: short name, such as `"induction"`.
        meaning: one sentence that defines the number.
        unit: such as `"share"` (a fraction of one), `"nats"`, `"tokens"`; empty for plain numbers.
        direction: what a high value says, such as `"higher: looks further back"`.
        level: whether the values belong to query heads or to key/value heads.
        kv_groups: for query heads, how many of them share a key/value head, per layer; None: not known.
    """

    values: tuple[Array, ...]
    name: str = "score"
    meaning: str = ""
    unit: str = ""
    direction: str = ""
    level: Level = "query"
    kv_groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not several(self.values) or isinstance(self.values, Mapping):
            raise ConfigError(
                f"values must be a sequence with one array (H,) for each layer, got {given(self.values)}"
            )
        object.__setattr__(self, "values", tuple(_layer(k, v) for k, v in enumerate(self.values)))
        for name in ("name", "meaning", "unit", "direction"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a text, got {given(getattr(self, name))}")
        check_level(self.level)
        groups = self.kv_groups
        if groups is None:
            return
        if isinstance(groups, numbers.Integral):
            groups = (int(groups),) * len(self.values)
        groups = whole_numbers("kv_groups", groups)
        if len(groups) != len(self.values):
            raise ShapeError(
                f"kv_groups must have one number per layer, {len(self.values)}; got {len(groups)}"
            )
        for k, (value, group) in enumerate(zip(self.values, groups, strict=True)):
            if group < 1 or len(value) % group:
                raise ShapeError(
                    f"kv_groups must divide the number of heads: layer {k} has {len(value)}, got {group}"
                )
        object.__setattr__(self, "kv_groups", groups)

    # -- what is there ---------------------------------------------------------------------------------

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of heads of each layer."""
        return tuple(len(v) for v in self.values)

    @property
    def flat(self) -> Array:
        """All values in one array, layer by layer."""
        return np.concatenate(self.values) if self.values else np.empty(0)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The (layer, head) of each entry of `flat`."""
        return [(layer, head) for layer, width in enumerate(self.widths) for head in range(width)]

    def __len__(self) -> int:
        """Number of heads."""
        return sum(self.widths)

    def __getitem__(self, index: Any) -> Any:
        """`scores[layer, head]`: a number; `scores[layer]`: the array of a layer."""
        layer, head = index if isinstance(index, tuple) else (index, slice(None))
        try:
            found = self.values[layer][head]
        except (IndexError, TypeError) as error:
            raise ConfigError(
                f"{self.name} has {len(self.values)} layers of {_span(self.widths)} heads and takes "
                f"[layer, head] or [layer]; got [{index}]"
            ) from error
        return float(found) if np.ndim(found) == 0 else found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadScores):
            return NotImplemented
        return (
            self._words() == other._words()
            and self.widths == other.widths
            and bool(np.array_equal(self.flat, other.flat, equal_nan=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def _words(self) -> tuple[Any, ...]:
        return (self.name, self.meaning, self.unit, self.direction, self.level, self.kv_groups)

    def __repr__(self) -> str:
        kind = "heads" if self.level == "query" else "key/value heads"
        known = self.flat[~np.isnan(self.flat)]
        if not len(known):
            return f"HeadScores({self.name!r}, {len(self.values)} layers, {len(self)} {kind}, none defined)"
        best = ", ".join(
            f"{layer}.{head} {self[layer, head]:.3g}" for layer, head in self.top(min(3, len(known)))
        )
        missing = f", {len(self) - len(known)} undefined" if len(known) < len(self) else ""
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"HeadScores({self.name!r}, {len(self.values)} layers, {len(self)} {kind}{missing}, "
            f"{known.min():.3g} to {known.max():.3g}{unit}; top: {best})"
        )

    # -- choosing --------------------------------------------------------------------------------------

    def top(self, amount: int | float) -> Heads:
        """The heads with the highest values, highest first; equal values by layer, then head.

        Args:
            amount: an int is a number of heads, a float between 0 and 1 a share of all heads (rounded).

        Raises:
            ConfigError: `amount` is out of range, or more than there are heads with a value.
        """
        return self._first(amount, -self.flat)

    def bottom(self, amount: int | float) -> Heads:
        """The heads with the lowest values, lowest first; `amount` as in `top`."""
        return self._first(amount, self.flat)

    def above(self, limit: float) -> Heads:
        """The heads whose value is at least `limit`, highest first."""
        limit = _limit(limit)
        return self._first(int((self.flat >= limit).sum()), -self.flat)

    def below(self, limit: float) -> Heads:
        """The heads whose value is below `limit`, lowest first."""
        limit = _limit(limit)
        return self._first(int((self.flat < limit).sum()), self.flat)

    def _first(self, amount: int | float, keys: Array) -> Heads:
        known = int((~np.isnan(keys)).sum())
        if isinstance(amount, bool) or not isinstance(amount, numbers.Real):
            raise ConfigError(
                f"the number of heads must be an int, or a float as their share; got {amount!r}"
            )
        if isinstance(amount, numbers.Integral):
            count = int(amount)
        elif 0.0 <= amount <= 1.0:
            count = math.floor(float(amount) * len(self) + 0.5)
        else:
            raise ConfigError(
                f"a share of the heads must be between 0 and 1, got {amount}; for a number use an int"
            )
        if not 0 <= count <= known:
            raise ConfigError(
                f"{self.name} has a value for {known} of its {len(self)} heads; asked for {count}"
            )
        order = np.argsort(keys, kind="stable")[:count]  # NaN sorts last
        pairs = self.pairs
        return Heads(tuple(pairs[k] for k in order), self.level, self.kv_groups)

    # -- computing -------------------------------------------------------------------------------------

    def renamed(self, name: str, **words: Any) -> HeadScores:
        """The same values under another name; `meaning`, `unit` and `direction` may be given too."""
        return _replace(self, name=name, **words)

    def map(self, function: Callable[[Array], Any], name: str | None = None) -> HeadScores:
        """`function` applied to the array of each layer."""
        return _replace(self, values=tuple(function(v) for v in self.values), name=name or self.name)

    def _combine(self, other: Any, sign: str, swapped: bool = False) -> Any:
        if isinstance(other, HeadScores):
            self._match(other)
            right, unit = other.name, self.unit if self.unit == other.unit and sign in "+-" else ""
            operands: Iterable[Any] = zip(self.values, other.values, strict=True)
        elif isinstance(other, numbers.Real):
            right, unit = f"{float(other):g}", self.unit
            operands = ((v, float(other)) for v in self.values)
        else:
            return NotImplemented
        with np.errstate(divide="ignore", invalid="ignore"):
            values = tuple(_SIGNS[sign](b, a) if swapped else _SIGNS[sign](a, b) for a, b in operands)
        name = f"{right} {sign} {self.name}" if swapped else f"{self.name} {sign} {right}"
        return _replace(self, values=values, name=name, meaning=name, unit=unit, direction="")

    def _match(self, other: HeadScores) -> None:
        if not isinstance(other, HeadScores):
            raise ConfigError(f"the other scores must be HeadScores, got {given(other)}")
        if self.widths != other.widths or self.level != other.level:
            raise ShapeError(
                f"{self.name} and {other.name} are scores of different heads: {len(self.values)} layers of "
                f"{_span(self.widths)} {self.level} heads against {len(other.values)} layers of "
                f"{_span(other.widths)} {other.level} heads"
            )

    def __add__(self, other: Any) -> HeadScores:
        return self._combine(other, "+")

    def __radd__(self, other: Any) -> HeadScores:
        return self._combine(other, "+", swapped=True)

    def __sub__(self, other: Any) -> HeadScores:
        return self._combine(other, "-")

    def __rsub__(self, other: Any) -> HeadScores:
        return self._combine(other, "-", swapped=True)

    def __mul__(self, other: Any) -> HeadScores:
        return self._combine(other, "*")

    def __rmul__(self, other: Any) -> HeadScores:
        return self._combine(other, "*", swapped=True)

    def __truediv__(self, other: Any) -> HeadScores:
        return self._combine(other, "/")

    def __rtruediv__(self, other: Any) -> HeadScores:
        return self._combine(other, "/", swapped=True)

    def __neg__(self) -> HeadScores:
        return self * -1.0

    @staticmethod
    def mean(scores: Iterable[HeadScores], name: str | None = None) -> HeadScores:
        """The mean of several scores of the same heads, such as one measurement on several texts."""
        if isinstance(scores, HeadScores) or not several(scores):
            raise ConfigError(f"the mean is taken over a sequence of HeadScores, got {given(scores)}")
        these = list(scores)
        if not these:
            raise ConfigError("the mean of no scores is not defined; give at least one HeadScores")
        if not all(isinstance(s, HeadScores) for s in these):
            raise ConfigError(f"the mean is taken over HeadScores, got {given(these)}")
        first = these[0]
        for other in these[1:]:
            first._match(other)
        values = tuple(np.mean(layers, axis=0) for layers in zip(*(s.values for s in these), strict=True))
        return _replace(first, values=values, name=name or first.name)

    def rank(self) -> HeadScores:
        """1 for the head with the highest value, 2 for the next; equal values share their mean rank."""
        flat = self.flat
        known = ~np.isnan(flat)
        ranks = np.full(len(flat), np.nan)
        _, index, counts = np.unique(-flat[known], return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        ranks[known] = (last - (counts - 1) / 2)[index]
        meaning = f"rank among all heads by {self.name}, 1 = highest"
        return self._with(
            ranks, name=f"rank of {self.name}", meaning=meaning, unit="", direction="lower: better placed"
        )

    def _with(self, flat: Array, **words: Any) -> HeadScores:
        cuts = np.cumsum(self.widths)[:-1]
        return _replace(self, values=tuple(np.split(flat, cuts)), **words)

    def correlation(self, other: HeadScores, method: Literal["spearman", "pearson"] = "spearman") -> float:
        """Correlation over the heads that have both values; NaN where one of them does not vary.

        Args:
            other: scores of the same heads.
            method: "spearman" compares ranks, "pearson" values.
        """
        if method not in ("spearman", "pearson"):
            raise ConfigError(f"method must be 'spearman' or 'pearson', got {method!r}")
        self._match(other)
        both = ~np.isnan(self.flat + other.flat)
        a, b = (self._with(np.where(both, s.flat, np.nan)) for s in (self, other))
        if method == "spearman":
            a, b = a.rank(), b.rank()
        x, y = a.flat[both], b.flat[both]
        if len(x) < 2 or x.std() == 0 or y.std() == 0:
            return math.nan
        return float(np.corrcoef(x, y)[0, 1])

    def by_kv_head(self, reduce: Literal["max", "mean"] = "max") -> HeadScores:
        """Scores of key/value heads: maximum or mean over the query heads that share each, NaN passed over.

        Raises:
            ConfigError: `reduce` is neither, or it is not known which query heads share keys.
        """
        if self.level == "kv":
            return self
        if self.kv_groups is None:
            raise ConfigError(
                f"{self.name} does not know how many query heads share a key/value head; set kv_groups"
            )
        if reduce not in ("max", "mean"):
            raise ConfigError(f"reduce must be 'max' or 'mean', got {reduce!r}")
        values = []
        for layer, group in zip(self.values, self.kv_groups, strict=True):
            shared = layer.reshape(-1, group)
            known = ~np.isnan(shared)
            if reduce == "max":
                found = np.where(known, shared, -np.inf).max(1)
            else:
                found = np.where(known, shared, 0.0).sum(1) / known.sum(1).clip(1)
            values.append(np.where(known.any(1), found, np.nan))
        meaning = f"{reduce} over the query heads of a key/value head: {self.meaning}"
        return _replace(self, values=tuple(values), meaning=meaning, level="kv", kv_groups=None)

    # -- leaving ---------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; NaN becomes null."""
        return {
            "name": self.name,
            "meaning": self.meaning,
            "unit": self.unit,
            "direction": self.direction,
            "level": self.level,
            "kv_groups": None if self.kv_groups is None else list(self.kv_groups),
            "values": [
                [x if math.isfinite(x) else _spell(x) for x in layer.tolist()] for layer in self.values
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeadScores:
        """The inverse of `to_json`."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"not head scores: {given(data)}; expected what HeadScores.to_json gave")
        try:
            words = {k: data[k] for k in ("name", "meaning", "unit", "direction", "level")}
            groups, rows = data["kv_groups"], data["values"]
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"not head scores: {error} is missing; expected what HeadScores.to_json gave"
            ) from error
        try:
            values = tuple(np.array([math.nan if x is None else float(x) for x in row]) for row in rows)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"not head scores: values must be lists of numbers, null or 'inf', one a layer: {error}"
            ) from error
        return cls(values, **words, kv_groups=groups)

    def to_frame(self) -> Any:
        """A pandas DataFrame with the columns layer, head and the name of the score."""
        return frame(self)

    def plot(self) -> Any:
        """A plotly Figure: layers by heads, coloured by value."""
        return figure(self)


def _limit(limit: float) -> float:
    if not real(limit):
        raise ConfigError(f"limit must be a number, got {given(limit)}")
    return limit


def _layer(index: int, values: Any) -> Array:
    """The values of a layer as an array of its own that cannot be written to."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"the scores of layer {index} must be one number a head (H,), got {given(values)}: {error}"
        ) from error
    if array.ndim != 1:
        raise ShapeError(
            f"the scores of layer {index} must be one number a head (H,), got shape {array.shape}"
        )
    array.flags.writeable = False
    return array


def _spell(x: float) -> str | None:
    return None if math.isnan(x) else ("inf" if x > 0 else "-inf")


def _span(widths: Sequence[int]) -> str:
    if not widths:
        return "0"
    return str(widths[0]) if len(set(widths)) == 1 else f"{min(widths)} to {max(widths)}"
