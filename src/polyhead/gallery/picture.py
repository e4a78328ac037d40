"""A data flow as plain text, and as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import zip_longest
from textwrap import wrap

from polyhead.mechanisms.flow import Flow, Step

__all__ = ["svg", "text"]

_LANE = 52  # characters of a lane of the text


def text(flow: Flow) -> str:
    """Two lanes, queries on the left, keys and values on the right, that join in one."""
    left, right = _lane(flow.queries, _LANE - 6), _lane(flow.keys, _LANE - 6)
    rows = [f"{a:<{_LANE}}{b}".rstrip() for a, b in zip_longest(left, right, fillvalue="│")]
    join = f"└{'─' * (_LANE // 2 - 1)}┬{'─' * (_LANE // 2 - 1)}┘"
    below = [" " * (_LANE // 2 - 8) + row for row in _lane(flow.joined, 90)]
    also = [f"also: {step}" for step in flow.others]
    return "\n".join([*rows, join, *below, *also])


def _lane(steps: Sequence[Step], width: int) -> list[str]:
    """One line a step, more where it is long; an arrow before every step but the first."""
    rows: list[str] = []
    for n, step in enumerate(steps):
        first, *more = [line for part in str(step).splitlines() for line in wrap(part, width)]
        rows.append(f"{'▼ ' if n else ''}{first}")
        rows += [f"│   {line}" for line in more]
    return rows


# ---- the drawing ----

_WIDTH, _GAP, _LINE, _PAD = 760, 22, 16, 9
_STYLE = """
text{font:12px "Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif;fill:#575b64}
text.name{font-weight:600;fill:#1d1f24}
rect.paper{fill:#ffffff}
rect.step{fill:#f1efe9;stroke:#dedbd2}
rect.q{stroke:#2c5f9b}rect.k{stroke:#b23c0d}
path{fill:none;stroke:#7b7f88;stroke-width:1.5}
path.tip{fill:#7b7f88;stroke:none}
@media (prefers-color-scheme:dark){
text{fill:#a7abb3}text.name{fill:#eceae4}rect.paper{fill:#1b1e24}rect.step{fill:#23272e;stroke:#353a43}
rect.q{stroke:#6ea6e8}rect.k{stroke:#f28b3c}path{stroke:#8d929b}path.tip{fill:#8d929b}}
"""


def svg(flow: Flow, title: str) -> str:
    """The same as a drawing, a file of its own, for light and dark surroundings."""
    half = (_WIDTH - 3 * _GAP) // 2
    drawn: list[str] = []
    ends = []
    for steps, x, kind in ((flow.queries, _GAP, "q"), (flow.keys, 2 * _GAP + half, "k")):
        bottom = _column(drawn, steps, x, _GAP, half, kind)
        ends.append((x + half // 2, bottom))
    middle, join = _WIDTH // 2, max(y for _, y in ends) + _GAP // 2
    drawn += [f'<path d="M{x} {y}V{join}H{middle}"/>' for x, y in ends]
    bottom = _column(drawn, flow.joined, _WIDTH // 6, join + _GAP, 2 * _WIDTH // 3, "", enters=join)
    for step in flow.others:
        for line in wrap(f"also: {step}", 115):
            bottom += _LINE
            drawn.append(f'<text x="{_GAP}" y="{bottom + 6}">{escape(line)}</text>')
    height = bottom + _GAP
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" role="img">\n<title>{escape(title)}</title>\n'
        f'<style>{_STYLE}</style>\n<rect class="paper" width="{_WIDTH}" height="{height}" rx="6"/>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def _column(
    drawn: list[str],
    steps: Sequence[Step],
    x: int,
    y: int,
    width: int,
    kind: str,
    *,
    enters: int | None = None,
) -> int:
    """Boxes from `y` down with arrows between them; gives where the last one ends."""
    for step in steps:
        lines = [line for part in step.what.splitlines() for line in wrap(part, (width - 2 * _PAD) // 6)]
        height = 2 * _PAD + _LINE * (1 + len(lines)) - 3
        if enters is not None:
            mid = x + width // 2
            drawn.append(f'<path d="M{mid} {enters}V{y - 5}"/>')
            drawn.append(f'<path class="tip" d="M{mid - 4} {y - 7}h8l-4 7z"/>')
        drawn.append(f'<rect class="step {kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>')
        drawn.append(f'<text class="name" x="{x + _PAD}" y="{y + _PAD + 11}">{escape(step.name)}</text>')
        for n, line in enumerate(lines, start=1):
            drawn.append(f'<text x="{x + _PAD}" y="{y + _PAD + 11 + n * _LINE}">{escape(line)}</text>')
        enters = y + height
        y = enters + _GAP
    return y - _GAP
