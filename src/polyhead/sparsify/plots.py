"""The drawings of a comparison: what is kept, against what is read and what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from polyhead.report.drawing import LINES_CSS, Drawing, Group, colour, dot, pareto
from polyhead.report.svg import document, nested, text
from polyhead.sparsify.table import Comparison, Row

__all__ = ["drawings", "place", "plots"]


@dataclass(frozen=True)
class _Axis:
    title: str
    of: Callable[[Comparison, Row], float]
    less: bool  # whether less of it is better

    def gain(self, value: float) -> float:
        return -value if self.less else value


_READ = _Axis("share of keys read", lambda c, row: c.read(row, c.settings.longest), True)
_PREFILL = _Axis("prefill, times as fast as dense", lambda c, row: row.faster(lambda t: t.prefill), False)
_STEP = _Axis("decoding step, times as fast", lambda c, row: row.faster(lambda t: t.step), False)
_KEPT = _Axis("Facts kept of those dense finds", lambda c, row: _share(*c.kept(row)), False)
_THROUGHOUT = _Axis(
    "Facts kept, answered under the method", lambda c, row: _share(*c.kept(row, throughout=True)), False
)
_RISE = _Axis("Perplexity above dense", lambda c, row: c.rise(row), True)
_MISSED = _Axis("Missed mass", lambda c, row: _number(row.outcome.missed), True)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def place(comparison: Comparison, row: Row) -> int:
    """The place of a row's method among all, which its colour goes by; the model as it is: 0."""
    return [*comparison.methods].index(row.method) + 1 if row.method else 0


def drawings(comparison: Comparison) -> list[Drawing]:
    """Facts, perplexity and missed mass by the keys that are read; facts and perplexity by speed."""
    pairs = [(_READ, _KEPT), (_READ, _THROUGHOUT), (_READ, _RISE), (_READ, _MISSED)]
    if any(row.rounds for row in comparison.rows):
        pairs += [(_PREFILL, _KEPT), (_PREFILL, _RISE), (_STEP, _THROUGHOUT)]
    return [_pareto(comparison, x, y) for x, y in pairs]


def _pareto(comparison: Comparison, across: _Axis, up: _Axis) -> Drawing:
    groups = []
    for number in range(len(comparison.methods) + 1):
        points = []
        for row in comparison.rows:
            if place(comparison, row) == number:
                a, b = across.of(comparison, row), up.of(comparison, row)
                points.append((a, b, f"{row.label}: {b:.4g} at {a:.4g}"))
        groups.append(Group(number, points, joined=True))
    return pareto(
        groups,
        title=f"{up.title}, by {across.title}",
        good=f"{'less' if up.less else 'more'} is better",
        across=across.title,
        gains=(across.gain, up.gain),
    )


def plots(comparison: Comparison) -> dict[str, str]:
    """The drawings as one SVG file, with a legend."""
    drawn, columns = drawings(comparison), 3
    width, height = drawn[0].width, drawn[0].height + 26
    parts = []
    for n, one in enumerate(drawn):
        left, top = width * (n % columns), height * (n // columns)
        parts.append(text(left + 50, top + 16, one.title, class_="strong"))
        parts.append(nested(left, top + 26, one.figure))
    tall = height * -(-len(drawn) // columns)
    names = ("dense", *comparison.methods)
    for n, name in enumerate(names):
        left, top = 50 + 190 * (n % 5), tall + 14 + 20 * (n // 5)
        parts += [dot(left, top, 4, colour(n), name), text(left + 10, top + 4, name)]
    whole = tall + 20 * -(-len(names) // 5) + 10
    return {
        "pareto.svg": document(
            width * columns, whole, *parts, title="What is kept and what it takes", shapes=LINES_CSS
        )
    }
