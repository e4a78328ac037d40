"""Drawings that stand in pages and as files of their own: colours of several series, dots, short numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from polyhead.report.svg import document, element, figure, printable

__all__ = ["LINES_CSS", "Drawing", "colour", "dot", "short", "span", "title"]

# colours of series in turn; from the second round on their lines are dashed
_COLOURS = (
    *("--accent", "--other", "--role-broad", "--role-induction"),
    *("--look", "--role-sink", "--role-local", "--chance"),
)
LINES_CSS = (
    "".join(
        f"\n.plot .c{n}{{stroke:var({name})}}.plot .dot.c{n},.plot .mark.c{n}{{fill:var({name});stroke:none}}"
        f".plot .band.c{n}{{fill:var({name});opacity:.13;stroke:none}}"
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
