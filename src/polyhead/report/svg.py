"""A small writer of SVG: elements, scales and axes as strings.

Shapes carry classes and no colours. On the page they are coloured by its style sheet; `document` gives a file
of its own the same colours, for light and dark surroundings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from polyhead.report.palette import DARK, LIGHT

__all__ = [
    "SHAPES_CSS",
    "Scale",
    "area",
    "curve",
    "document",
    "element",
    "figure",
    "line",
    "nested",
    "printable",
    "text",
]

_ROLE_FILLS = "".join(
    f"\n.plot .{name.removeprefix('--')}{{fill:var({name});stroke:none}}"
    for name in LIGHT
    if name.startswith("--role-")
)

# how the shapes of plots look, wherever they stand; colours by variable
SHAPES_CSS = (
    """
.plot text{font:11.5px "Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif;fill:var(--soft)}
.plot .title{font-size:13px;font-weight:600;fill:var(--ink)}
.plot .grid{stroke:var(--line);stroke-width:1}
.plot .axis{stroke:var(--chance);stroke-width:1}
.plot .curve{fill:none;stroke-width:2.25;stroke-linejoin:round;stroke-linecap:round}
.plot .dot{stroke:var(--panel);stroke-width:1.25}
.plot .whisker{stroke-width:1.25;opacity:.7}
.plot .s0{stroke:var(--accent)}.plot .dot.s0,.plot .fill.s0{fill:var(--accent);stroke:none}
.plot .s1{stroke:var(--other)}.plot .dot.s1,.plot .fill.s1{fill:var(--other);stroke:none}
.plot .s2{stroke:var(--role-broad)}.plot .dot.s2,.plot .fill.s2{fill:var(--role-broad);stroke:none}
.plot .s3{stroke:var(--role-induction)}.plot .dot.s3,.plot .fill.s3{fill:var(--role-induction);stroke:none}
.plot .chance{stroke:var(--chance)}
.plot .dot.chance,.plot .fill.chance{fill:var(--chance);stroke:none}
.plot .curve.chance{stroke-width:1.5;stroke-dasharray:4 3}
.plot .band{fill:var(--chance);opacity:.2;stroke:none}
.plot .whole{stroke:var(--ink);stroke-width:1;stroke-dasharray:1.5 3.5;stroke-linecap:round}
.plot .chosen{stroke:var(--accent);stroke-width:1;opacity:.55}
.plot .pointer{fill:var(--accent)}
.plot .pill{fill:var(--sunk)}
""".strip()
    + _ROLE_FILLS
)


def element(tag: str, *children: str, **attributes: object) -> str:
    """One element. `class_` becomes `class`, `stroke_width` becomes `stroke-width`; None leaves it out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{written}>{''.join(children)}</{tag}>" if children else f"<{tag}{written}/>"


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return printable(str(value))


_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]")


def printable(string: str) -> str:
    """`string` without what XML forbids: control characters and lone surrogates become U+FFFD."""
    return _FORBIDDEN.sub("\ufffd", string)


def text(x: float, y: float, string: str, **attributes: object) -> str:
    """A line of text."""
    return element("text", escape(printable(string)), x=x, y=y, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def curve(points: Sequence[tuple[float, float]], class_: str) -> str:
    """Straight segments through points."""
    return element("path", d=_path(points), class_=f"curve {class_}") if len(points) > 1 else ""


def area(low: Sequence[tuple[float, float]], high: Sequence[tuple[float, float]], class_: str) -> str:
    """The area between two curves."""
    return element("path", d=_path([*low, *reversed(high)]) + "Z", class_=class_) if len(low) > 1 else ""


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from data to a length on the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(v, 1e-12)) for v in (value, low, high))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(1.02, max(-0.02, share)) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the scale."""
        if not self.log:
            return ticks(self.low, self.high, count)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        return [v for v in found if self.low <= v <= self.high * 1.001]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values between `low` and `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, int(high / step + 1e-9) + 1)]


def figure(width: float, height: float, /, *children: str, title: str, **attributes: object) -> str:
    """A drawing that stands in a page and grows with it; `title` is what a screen reader says."""
    return element(
        "svg",
        element("title", escape(printable(title))),
        *children,
        class_="plot",
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        xmlns="http://www.w3.org/2000/svg",
        **attributes,
    )


def nested(x: float, y: float, drawing: str) -> str:
    """A figure's content at a place within another."""
    inner = drawing[drawing.index(">") + 1 : drawing.rindex("</svg>")]
    inner = inner[inner.index("</title>") + len("</title>") :] if inner.startswith("<title>") else inner
    return element("g", inner, transform=f"translate({x:g} {y:g})")


def document(width: float, height: float, *children: str, title: str, shapes: str = "") -> str:
    """A drawing as a file of its own, with its colours and a ground; `shapes` is further style."""

    def colours(table: dict[str, str]) -> str:
        css = SHAPES_CSS + shapes + "\n.plot .paper{fill:var(--panel)}"
        for name in sorted(table, key=len, reverse=True):  # written out: few viewers know CSS variables
            css = css.replace(f"var({name})", table[name])
        return css

    style = f"{colours(LIGHT)}\n@media (prefers-color-scheme:dark){{{colours(DARK)}}}"
    ground = element("rect", width=float(width), height=float(height), class_="paper")
    body = figure(
        width, height, element("style", style), ground, *children, title=title, width=width, height=height
    )
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}\n'
