"""Drawings that stand in pages and as files of their own: colours of several series, dots, short numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from polyhead.report.svg import Scale, curve, document, element, figure, line, printable, text

__all__ = ["LINES_CSS", "Drawing", "Group", "colour", "dot", "pareto", "short", "span", "title"]

# colours of series in turn; from the second round on their lines are dashed and their dots are rings
_COLOURS = (
    *("--accent", "--other", "--role-broad", "--role-induction"),
    *("--look", "--role-sink", "--role-local", "--chance"),
)
LINES_CSS = (
    "".join(
        f"\n.plot .c{n}{{stroke:var({name})}}.plot .dot.c{n},.plot .mark.c{n}{{fill:var({name});stroke:none}}"
        f".plot .band.c{n}{{fill:var({name});opacity:.13;stroke:none}}"
        f".plot .dot.c{n}.again,.plot .mark.c{n}.again"
        f"{{fill:var(--paper);stroke:var({name});stroke-width:2;stroke-dasharray:none}}"
        for n, name in enumerate(_COLOURS)
    )
    + "\n.plot .again{stroke-dasharray:6 3}.plot .front{stroke-dasharray:2 4;stroke-width:1.5}"
)


@dataclass(frozen=True)
class Drawing:
    """A drawing with its heading and what is good on it."""

    title: str
    good: str
    width: float
    height: float
    parts: tuple[str, ...]

    @property
    def figure(self) -> str:
        """As it stands in a page."""
        return figure(self.width, self.height, *self.parts, title=self.title)

    @property
    def file(self) -> str:
        """As a file of its own."""
        return document(self.width, self.height, *self.parts, title=self.title, shapes=LINES_CSS)


def colour(place: int) -> str:
    """The classes of the series at a place, in the order in which they were named."""
    return f"c{place % len(_COLOURS)}" + (" again" if place >= len(_COLOURS) else "")


def short(number: float) -> str:
    """A number in few characters: 1,234, 12.3k, 4.56M."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    if abs(number) >= 1e9:
        return f"{number / 1e9:.3g}G"
    if abs(number) >= 1e6:
        return f"{number / 1e6:.3g}M"
    if abs(number) >= 1e4:
        return f"{number / 1e3:.3g}k"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def span(values: Sequence[float], room: float = 0.06) -> tuple[float, float]:
    """The least and the greatest of the values that are known, with some room on both sides."""
    known = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(known), max(known)
    rest = room * (high - low) or 0.05 * abs(high) or 0.5
    return low - rest, high + rest


def dot(x: float, y: float, radius: float, style: str, said: str) -> str:
    """A dot that says something when it is pointed at."""
    return element("circle", title(said), cx=x, cy=y, r=radius, class_=f"dot {style}")


def title(said: str) -> str:
    """What a shape says when it is pointed at."""
    return element("title", escape(printable(said)))


@dataclass(frozen=True)
class Group:
    """Points that belong together.

    Attributes:
        place: among the series, which the colour goes by, and by which a page lights shapes up together.
        points: across and up, and what is said where one points at it; NaN where it is not known.
        joined: whether a line joins them.
    """

    place: int
    points: Sequence[tuple[float, float, str]]
    joined: bool = False


def pareto(
    groups: Sequence[Group],
    *,
    title: str,
    good: str,
    across: str,
    gains: tuple[Callable[[float], float], Callable[[float], float]],
) -> Drawing:
    """Points of two axes, and the front of those that no other beats in both.

    Args:
        groups: of points.
        title, good: of the drawing.
        across: what stands below it.
        gains: how good a value across, and one up, is: the more, the better.
    """
    width, height, left, right, top, bottom = 340.0, 250.0, 50.0, 326.0, 12.0, 206.0
    known = [
        Group(one.place, [p for p in one.points if math.isfinite(p[0]) and math.isfinite(p[1])], one.joined)
        for one in groups
    ]
    points = [(a, b) for one in known for a, b, _ in one.points]
    x = Scale(*span([a for a, _ in points], 0.1), left, right)
    y = Scale(*span([b for _, b in points], 0.1), bottom, top)
    parts = []
    for v in y.ticks(4):
        parts += [
            line(left, y(v), right, y(v), "grid"),
            text(left - 6, y(v) + 4, short(v), text_anchor="end"),
        ]
    for v in x.ticks(3):
        parts.append(text(x(v), bottom + 18, short(v), text_anchor="middle"))
    parts += [line(left, bottom, right, bottom, "axis")]
    parts.append(text((left + right) / 2, bottom + 36, across, text_anchor="middle"))
    parts.append(curve([(x(a), y(b)) for a, b in _front(points, gains)], "front chance"))
    for one in known:
        style = colour(one.place)
        shapes = [curve([(x(a), y(b)) for a, b, _ in sorted(one.points)], style)] if one.joined else []
        shapes += [dot(x(a), y(b), 4.5, style, said) for a, b, said in one.points]
        parts.append(element("g", *shapes, class_=f"of of-{one.place}"))
    return Drawing(title, good, width, height, tuple(parts))


def _front(
    points: Sequence[tuple[float, float]], gains: tuple[Callable[[float], float], Callable[[float], float]]
) -> list[tuple[float, float]]:
    """The points that no other equals or beats in both, and beats in one."""
    good = {point: tuple(gain(v) for gain, v in zip(gains, point, strict=True)) for point in points}

    def beaten(point: tuple[float, float]) -> bool:
        own = good[point]
        return any(o[0] >= own[0] and o[1] >= own[1] and o != own for o in good.values())

    return sorted(point for point in good if not beaten(point))
