"""Measurements of heads: what they promise, and the registry of those that there are.

A measurement is a small description (its parameters, its definition in words). For each layer it makes a
`Gauge`, which sees the attention weights row by row, never all at once, and in the end has one number a
head. Most measurements are the mean of something over rows: they say what, in one method (`RowMean`).

    class OwnToken(RowMean):
        name = "own_token"
        title = "attention to itself"
        meaning = "mean weight of a token on itself"
        unit = "share"

        def of(self, rows):
            return rows.on(rows.i)

    profile(model, tokenizer, text, measurements=[OwnToken(), "entropy"])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from polyhead.description import Part
from polyhead.errors import ConfigError, ShapeError, unknown_name
from polyhead.heads.rows import Rows, View

if TYPE_CHECKING:
    from polyhead.heads.inputs import Source

__all__ = ["MEASUREMENTS", "Gauge", "Measurement", "RowMean", "chosen", "register"]

SELF = frozenset({"decoder", "encoder"})
EVERYWHERE = frozenset({"decoder", "encoder", "cross"})


class Gauge(Protocol):
    """Measures one layer: `begin`, `take` rows until all are seen, `end`; over and over for further calls.

    Attributes:
        needs_logits: whether the rows have to come with their logits.
    """

    needs_logits: bool

    def begin(self, view: View) -> None:
        """A call starts."""

    def take(self, rows: Rows) -> None:
        """Some whole rows of it."""

    def end(self, output: Tensor) -> None:
        """The call is over; `output` is what attention gave, `(B, H, L, Dv)`."""

    def result(self) -> Tensor:
        """One number a head over all calls so far, `(H,)`; NaN where there is none."""


class Measurement(Part):
    """One number for every head, and how it is found.

    Attributes:
        name: what `profile` calls it.
        title: what people call it.
        meaning: one sentence that defines it; names of fields in braces are filled in.
        unit: `"share"` for fractions of one, else a unit such as `"nats"`, or `""`.
        direction: what a high value says.
        paper: where it comes from.
        kinds: the kinds of attention layers that it makes sense for.
        source: what the model is to read for it; None: the text that is profiled.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    meaning: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    direction: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    kinds: ClassVar[frozenset[str]] = SELF

    @property
    def source(self) -> Source | None:
        return None

    def gauge(self, heads: int) -> Gauge:
        """A fresh gauge for a layer with this many query heads."""
        raise NotImplementedError

    def describe(self, gauges: Sequence[Gauge] = ()) -> str:
        """The meaning in words, with the parameters, once the gauges of all layers are done."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return self.meaning.format(**fields)


class RowMean(Measurement):
    """The mean over rows of one number a row."""

    def of(self, rows: Rows) -> Tensor:
        """The number of each row, `(b, h, r)`."""
        raise NotImplementedError

    def where(self, rows: Rows) -> Tensor:
        """Which rows enter the mean, bool `(b|1, h|1, r)`. Default: all that count."""
        return rows.counted

    def gauge(self, heads: int) -> Gauge:
        return _Mean(self, heads)


class _Mean:
    """Sums of a `RowMean`, over rows, batch items and calls."""

    needs_logits = False

    def __init__(self, measurement: RowMean, heads: int) -> None:
        self.measurement = measurement
        self.sum = torch.zeros(heads, dtype=torch.float64)
        self.count = torch.zeros(heads, dtype=torch.float64)

    def begin(self, view: View) -> None:
        self.sum, self.count = self.sum.to(view.device), self.count.to(view.device)

    def take(self, rows: Rows) -> None:
        heads = rows.tile.head_slice
        value, where = self.measurement.of(rows), self.measurement.where(rows)
        shape = rows.weights.shape[:3]
        for method, found in (("of", value), ("where", where)):
            if not _fits(found.shape, shape):
                raise ShapeError(
                    f"{type(self.measurement).__name__}.{method} must give one value a row, (b, h, r) = "
                    f"{tuple(shape)}; got {tuple(found.shape)}"
                )
        value, where = value.expand(shape), where.expand(shape)
        self.sum[heads] += torch.where(where, value, 0.0).sum((0, 2), dtype=torch.float64)
        self.count[heads] += where.sum((0, 2))

    def end(self, output: Tensor) -> None:
        pass

    def result(self) -> Tensor:
        return self.sum / self.count  # 0/0 is NaN: no row ever counted


def _fits(shape: torch.Size, wanted: torch.Size) -> bool:
    """Whether a tensor of `shape` can be expanded to `wanted`."""
    return len(shape) <= len(wanted) and all(
        n in (1, w) for n, w in zip(shape[::-1], wanted[::-1], strict=False)
    )


MEASUREMENTS: dict[str, type[Measurement]] = {}
"""Every measurement by name, in the order in which reports list them."""

M = TypeVar("M", bound=type[Measurement])


def register(measurement: M) -> M:
    """Class decorator: make a measurement known by its name.

    Args:
        measurement: a class whose `name` no other has.

    Raises:
        ConfigError: it has no name, or that of another.
    """
    if not measurement.name or measurement.name in MEASUREMENTS:
        raise ConfigError(f"a measurement needs a name of its own, got {measurement.name!r}")
    MEASUREMENTS[measurement.name] = measurement
    return measurement


def chosen(measurements: str | Measurement | Iterable[str | Measurement] | None) -> list[Measurement]:
    """Measurements by name or as they are, one or several; None: one of every kind.

    Raises:
        UnknownName: no measurement has this name.
        ConfigError: a name is missing or given twice, or something is no measurement.
    """
    if isinstance(measurements, str | Measurement):
        measurements = [measurements]
    found: list[Measurement] = []
    for item in MEASUREMENTS if measurements is None else measurements:
        if isinstance(item, str):
            if item not in MEASUREMENTS:
                raise unknown_name("measurement", item, MEASUREMENTS)
            item = MEASUREMENTS[item]()
        if isinstance(item, type) and issubclass(item, Measurement):
            raise ConfigError(f"measurements has the class {item.__name__}; write {item.__name__}()")
        if not isinstance(item, Measurement):
            raise ConfigError(f"measurements must be names or Measurement objects, got {item!r}")
        if not item.name:
            raise ConfigError(
                f"a measurement needs a name, by which the profile calls it; give {type(item).__name__} one: "
                "name = ..."
            )
        if any(item.name == other.name for other in found):
            raise ConfigError(
                f"measurements has {item.name!r} twice; give each name once, or a name of its own to a "
                "subclass"
            )
        found.append(item)
    return found


Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total)."""
