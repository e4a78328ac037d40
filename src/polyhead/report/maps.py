"""Plots of all heads at once: the map of roles, and how measurements spread."""

from __future__ import annotations

from polyhead.report.data import ROLES, Measurement, ReportData, Roles
from polyhead.report.palette import role_variable
from polyhead.report.svg import document, element, figure, line, nested, text
from polyhead.report.words import measured

__all__ = ["distribution", "distributions_file", "roles_file"]

_BINS = 32


def _fill(role: str) -> str:
    return role_variable(role).removeprefix("--")


def _legend(roles: Roles, x: float) -> tuple[list[str], float]:
    """The roles that occur, in a row from `x` on, and where the row ends."""
    parts, counts = [], roles.counts()
    for role in (r for r in ROLES if counts[r]):
        label = f"{role} {counts[role]}"
        parts.append(element("rect", x=x, y=12, width=12, height=12, rx=2, class_=_fill(role)))
        parts.append(text(x + 17, 22, label))
        x += 30 + 6.6 * len(label)
    return parts, x


def roles_file(data: ReportData) -> str:
    """The map of roles, layers from left to right, as an SVG file."""
    m, roles = data.model, data.roles
    cell = 22.0 if max(m.heads) <= 16 else 12.0
    pitch, left, top = cell + 6, 52.0, 56.0
    parts = []
    for layer, (count, groups) in enumerate(zip(m.heads, m.kv_heads, strict=True)):
        size, x = count // groups, left + layer * pitch
        for head, role in enumerate(roles.heads[layer]):
            y = top + head * (cell + 1) + head // size * 6
            if head % size == 0:
                box = {"x": x - 2, "y": y - 2, "width": cell + 4, "height": size * (cell + 1) + 3}
                parts.append(element("rect", **box, rx=4, class_="pill"))
            told = element("title", f"layer {layer}, head {head}: {role}")
            parts.append(element("rect", told, x=x, y=y, width=cell, height=cell, rx=2.5, class_=_fill(role)))
    for layer in range(0, m.layers, 1 if m.layers <= 40 else 5):
        parts.append(text(left + layer * pitch + cell / 2, top - 10, str(layer), text_anchor="middle"))
    parts.append(text(left - 8, top - 10, "layer", text_anchor="end"))
    legend, x = _legend(roles, left)
    parts += legend
    height = top + max(h * (cell + 1) + g * 6 for h, g in zip(m.heads, m.kv_heads, strict=True)) + 12
    width = max(x, left + m.layers * pitch) + 12
    return document(round(width), round(height), *parts, title=f"Roles of the attention heads of {m.name}")


def distribution(m: Measurement, roles: Roles, *, width: float = 190.0, height: float = 46.0) -> str:
    """How the heads spread over a measurement: a histogram stacked by role."""
    named = zip(m.flat(), (role for row in roles.heads for role in row), strict=True)
    known = [(v, role) for v, role in named if v is not None]
    if not known:
        return figure(width, height, text(0, height / 2, "not measured"), title=f"{m.title}: not measured")
    low, high = min(v for v, _ in known), max(v for v, _ in known)
    counts = [dict.fromkeys(ROLES, 0) for _ in range(_BINS)]
    for v, role in known:
        place = int((v - low) / (high - low) * _BINS) if high > low else 0
        counts[min(_BINS - 1, place)][role] += 1
    base, tallest, step = height - 14, max(sum(c.values()) for c in counts), width / _BINS
    parts = []
    for i, stack in enumerate(counts):
        y = base
        for role in (r for r in ROLES if stack[r]):
            tall = stack[role] / tallest * (base - 2)
            y -= tall
            box = {"x": i * step, "y": y, "width": step - 0.8, "height": tall}
            parts.append(element("rect", **box, class_=_fill(role)))
    ends = measured(low, m.unit), measured(high, m.unit)
    parts.append(line(0, base, width, base, "axis"))
    parts.append(text(0, height - 2, ends[0]))
    parts.append(text(width, height - 2, ends[1], text_anchor="end"))
    told = f"{m.title}: {len(known)} heads between {ends[0]} and {ends[1]}"
    return figure(width, height, *parts, title=told)


def distributions_file(data: ReportData) -> str:
    """The distributions of all measurements in one SVG file."""
    columns, w, h = 3, 240.0, 110.0
    parts, end = _legend(data.roles, 20)
    for i, m in enumerate(data.measurements):
        x, y = 20 + (i % columns) * (w + 24), 46 + (i // columns) * (h + 26)
        parts.append(text(x, y + 8, m.title, class_="title"))
        parts.append(nested(x, y + 12, distribution(m, data.roles, width=w, height=h)))
    rows = (len(data.measurements) + columns - 1) // columns
    title = f"Measurements of the attention heads of {data.model.name}"
    width = max(end + 12, 40 + columns * w + (columns - 1) * 24)
    return document(round(width), round(54 + rows * (h + 26)), *parts, title=title)
