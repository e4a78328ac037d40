"""The savings curves: what was measured, against the share of KV heads that keep the full context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from polyhead.report.data import Point, ReportData, Savings
from polyhead.report.interval import wilson
from polyhead.report.svg import Scale, area, curve, document, element, figure, line, nested, text
from polyhead.report.words import compact, megabytes, percent

__all__ = ["Chart", "savings_charts", "savings_file", "savings_key"]

WIDTH, HEIGHT = 330.0, 232.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 318.0, 12.0, 190.0


@dataclass(frozen=True)
class Chart:
    """One of the savings charts: its key, heading, what is good, and the drawing."""

    key: str
    title: str
    good: str
    drawing: str


@dataclass(frozen=True)
class _Quantity:
    """Something that was measured for every point, and how it is drawn."""

    key: str
    title: str
    good: str
    value: Callable[[Point], float | None]
    label: Callable[[float], str]
    from_zero: bool = True
    top: float | None = None  # where the scale ends; None: at the largest value
    share_of_needles: bool = False  # draw the interval that the number of needles leaves


def _held(p: Point, length: int) -> float | None:
    return next((float(count) for n, count in p.cache_bytes if n == length), None)


def _quantities(savings: Savings) -> list[_Quantity]:
    longest = max((n for p in savings.points for n, _ in p.cache_bytes), default=0)
    found = [
        _Quantity(
            "needle",
            "Hidden facts found",
            "higher is better",
            lambda p: p.needle_accuracy,
            percent,
            top=1.0,
            share_of_needles=True,
        ),
        _Quantity(
            "perplexity", "Perplexity", "lower is better", lambda p: p.perplexity, compact, from_zero=False
        ),
        _Quantity(
            "bytes",
            f"Cache at {longest:,} tokens",
            "lower is better",
            partial(_held, length=longest),
            lambda v: megabytes(int(v)),
        ),
        _Quantity(
            "speed",
            "Decoded tokens per second",
            "higher is better",
            lambda p: p.decode_tokens_per_second,
            compact,
        ),
    ]
    return [q for q in found if any(q.value(p) is not None for p in savings.points)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _vertical(savings: Savings, q: _Quantity) -> Scale:
    known = [v for p in (savings.baseline, *savings.points) if (v := q.value(p)) is not None]
    low, high = min(known), q.top or max(known)
    if q.from_zero:
        return Scale(0.0, q.top or 1.06 * high or 1.0, _BOTTOM, _TOP)
    if low > 0 and high / low > 6:  # a cache that breaks the model would flatten all the rest
        return Scale(low / 1.1, high * 1.1, _BOTTOM, _TOP, log=True)
    room = 0.05 * (high - low or 1.0)
    return Scale(low - room, high + room, _BOTTOM, _TOP)


def _frame(q: _Quantity, x: Scale, y: Scale, chosen: float | None) -> list[str]:
    parts = []
    for v in y.ticks(4):
        parts.append(line(_LEFT, y(v), _RIGHT, y(v), "grid"))
        parts.append(text(_LEFT - 6, y(v) + 4, q.label(v), text_anchor="end"))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(text(x(share), _BOTTOM + 21, percent(share), text_anchor="middle"))
        parts.append(line(x(share), _BOTTOM, x(share), _BOTTOM + 4, "axis"))
    parts.append(line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis"))
    parts.append(text((_LEFT + _RIGHT) / 2, _BOTTOM + 38, "KV heads with full context", text_anchor="middle"))
    if chosen is not None:
        at = x(chosen)
        triangle = f"M{at:.1f} {_BOTTOM + 1}l4.5 8h-9z"
        parts.append(line(at, _TOP, at, _BOTTOM, "chosen"))
        parts.append(element("path", element("title", "recommended"), d=triangle, class_="pointer"))
    return parts


def _style(place: int, policy: str) -> str:
    return "chance" if policy == "random" else f"s{min(place, 3)}"


def _policy(savings: Savings, policy: str, style: str, q: _Quantity, x: Scale, y: Scale) -> list[str]:
    """Curve, dots, and how sure they are: the range of the seeds, or the interval of the needles."""
    seeds: dict[float, list[float]] = {}
    trials: dict[float, int] = {}
    for p in savings.points:
        value = q.value(p)
        if p.policy == policy and value is not None:
            seeds.setdefault(p.kv_fraction, []).append(value)
            trials[p.kv_fraction] = trials.get(p.kv_fraction, 0) + p.needles
    series = sorted(seeds.items())
    parts = []
    if any(len(values) > 1 for _, values in series):
        low, high = [(x(f), y(min(v))) for f, v in series], [(x(f), y(max(v))) for f, v in series]
        parts.append(area(low, high, "band"))
    parts.append(curve([(x(f), y(_mean(v))) for f, v in series], style))
    for f, v in series:
        told = f"{policy}, {percent(f)} of KV heads: {q.label(_mean(v))}"
        told += f" ({q.label(min(v))} to {q.label(max(v))}, {len(v)} seeds)" if len(v) > 1 else ""
        if q.share_of_needles and policy != "random":
            low_end, high_end = wilson(_mean(v), trials[f])
            parts.append(line(x(f), y(low_end), x(f), y(high_end), f"whisker {style}"))
            told += f" (95 % interval {percent(low_end)} to {percent(high_end)})" if trials[f] else ""
        radius = 2.5 if style == "chance" else 3.75
        hint = element("title", told)
        parts.append(element("circle", hint, cx=x(f), cy=y(_mean(v)), r=radius, class_=f"dot {style}"))
    return parts


def _chart(savings: Savings, q: _Quantity, chosen: float | None) -> Chart:
    x, y = Scale(0, 1, _LEFT + 8, _RIGHT - 8), _vertical(savings, q)
    parts = _frame(q, x, y, chosen)
    whole = q.value(savings.baseline)
    if whole is not None:
        parts.append(line(_LEFT, y(whole), _RIGHT, y(whole), "whole"))
    for place, policy in reversed(list(enumerate(savings.policies()))):  # the first lies on top
        parts += _policy(savings, policy, _style(place, policy), q, x, y)
    place_on_page = {"data_x0": x(0), "data_x1": x(1), "data_top": _TOP, "data_base": _BOTTOM}
    title = f"{q.title} against the share of KV heads that keep the full context"
    return Chart(q.key, q.title, q.good, figure(WIDTH, HEIGHT, *parts, title=title, **place_on_page))


def savings_charts(savings: Savings, chosen: float | None = None) -> list[Chart]:
    """One chart for each thing that was measured; `chosen` marks the recommended share."""
    return [_chart(savings, q, chosen) for q in _quantities(savings)]


def savings_key(savings: Savings) -> list[tuple[str, str]]:
    """What the curves are: pairs (label, class)."""
    labels = {"random": "chosen at random (mean, range of seeds)"}
    return [
        (labels.get(policy, f"chosen by {policy}"), _style(place, policy))
        for place, policy in enumerate(savings.policies())
    ]


def savings_file(data: ReportData) -> str | None:
    """All savings charts in one SVG file, two by two; None where nothing was saved."""
    if data.savings is None:
        return None
    chosen = data.recommendation.after.kv_fraction if data.recommendation else None
    charts = savings_charts(data.savings, chosen)
    parts, x = [], 28.0
    for label, style in savings_key(data.savings):
        parts += [line(x, 22, x + 22, 22, f"curve {style}"), text(x + 28, 26, label)]
        x += 44 + 6 * len(label)
    parts += [line(x, 22, x + 22, 22, "whole"), text(x + 28, 26, "whole cache")]
    if chosen is not None:
        parts.append(element("path", d=f"M{x + 116:g} 16l5 9h-10z", class_="pointer"))
        parts.append(text(x + 126, 26, "recommended"))
    for i, chart in enumerate(charts):
        cx, cy = 20 + (i % 2) * (WIDTH + 20), 52 + (i // 2) * (HEIGHT + 34)
        parts.append(text(cx + 8, cy + 2, chart.title, class_="title"))
        parts.append(text(cx + _RIGHT, cy + 2, chart.good, text_anchor="end"))
        parts.append(nested(cx, cy + 8, chart.drawing))
    height = 52 + (len(charts) + 1) // 2 * (HEIGHT + 34)
    width = max(2 * WIDTH + 60, x + 220)
    return document(width, height, *parts, title=f"What a smaller cache costs: {data.model.name}")
