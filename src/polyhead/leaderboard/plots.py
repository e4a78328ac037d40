"""The drawings of a leaderboard: scores with their intervals, learning curves, and scores against costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from polyhead.league import Row, Standings
from polyhead.league.standings import spell
from polyhead.report.drawing import LINES_CSS, Drawing, Group, colour, dot, pareto, short, span, title
from polyhead.report.svg import Scale, area, curve, document, element, line, nested, text

__all__ = ["costs", "learning", "plots", "scores"]

_ROW = 26.0


def _better(standings: Standings) -> str:
    return f"{standings.rules.task.better} is better"


def scores(standings: Standings) -> Drawing:
    """Every contender's mean and 95 % interval, a dot for each seed; yardsticks as lines."""
    rows, width, left, top = standings.ranked, 720.0, 210.0, 12.0
    bottom = top + _ROW * len(rows)
    values = [v for row in rows for v in row.scores("validation").values()]
    x = Scale(*span([*values, *standings.yardsticks.values()], 0.04), left, width - 16)
    parts = []
    for v in x.ticks(5):
        parts += [
            line(x(v), top, x(v), bottom, "grid"),
            text(x(v), bottom + 18, short(v), text_anchor="middle"),
        ]
    for name, v in standings.yardsticks.items():
        if not math.isfinite(v):
            continue
        parts.append(
            element("path", title(f"{name}: {v:.4g}"), d=f"M{x(v):.1f} {top}V{bottom}", class_="whole")
        )
    for place, row in enumerate(rows):
        y, style = top + _ROW * (place + 0.5), colour(_place(standings, row))
        name = row.label if len(row.label) <= 30 else row.label[:29] + "…"
        own = [text(left - 10, y + 4, name, text_anchor="end")]
        mean, half = row.score("validation")
        if math.isnan(mean):
            own.append(text(left + 8, y + 4, "no finished run"))
        else:
            said = f"{row.label}: {spell(mean, half).replace(' ', ', 95 % interval ')}"
            if not math.isnan(half):
                own.append(line(x(mean - half), y, x(mean + half), y, f"curve {style}"))
            for seed, v in row.scores("validation").items():
                own.append(dot(x(v), y, 2.5, style, f"{row.label}, seed {seed}: {spell(v)}"))
            own.append(dot(x(mean), y, 4.5, style, said))
        parts.append(_of(standings, row, own))
    return Drawing("Scores", _better(standings), width, bottom + 28, tuple(parts))


def learning(standings: Standings) -> Drawing:
    """Scores on the validation questions by steps: the mean over seeds, within the least and the greatest."""
    width, height, left, right, top, bottom = 720.0, 330.0, 56.0, 704.0, 12.0, 286.0
    x = Scale(0, standings.rules.recipe.steps, left, right)
    looks = [look.score for row in standings.rows for o in row.outcomes.values() for look in o.curve]
    y = Scale(*span(looks), bottom, top)
    parts = []
    for v in y.ticks(5):
        parts += [
            line(left, y(v), right, y(v), "grid"),
            text(left - 6, y(v) + 4, short(v), text_anchor="end"),
        ]
    for v in x.ticks(5):
        parts.append(text(x(v), bottom + 20, f"{v:,.0f}", text_anchor="middle"))
    parts += [
        line(left, bottom, right, bottom, "axis"),
        text((left + right) / 2, bottom + 38, "steps", text_anchor="middle"),
    ]
    for row in standings.rows:
        by_step: dict[int, list[float]] = {}
        for outcome in row.outcomes.values():
            for look in outcome.curve:
                if math.isfinite(look.score):
                    by_step.setdefault(look.step, []).append(look.score)
        series, style = sorted(by_step.items()), colour(_place(standings, row))
        band = style.split()[0]
        own = [
            area(
                [(x(n), y(min(v))) for n, v in series], [(x(n), y(max(v))) for n, v in series], f"band {band}"
            ),
            curve([(x(n), y(sum(v) / len(v))) for n, v in series], style),
        ]
        if series:
            own.append(title(row.label))
        parts.append(_of(standings, row, own))
    return Drawing("Learning curves", _better(standings), width, height, tuple(parts))


@dataclass(frozen=True)
class _Cost:
    title: str
    of: Callable[[Row], float]
    less: bool = True  # whether less of it is better
    budget: str = ""  # the budget under which it is equal for all


_COSTS = (
    _Cost("KV bytes a token", lambda row: float(row.fitted.counted.kv), budget="kv"),
    _Cost("Parameters", lambda row: float(row.fitted.counted.params), budget="params"),
    _Cost("Operations a sequence", lambda row: float(row.fitted.counted.flops), budget="flops"),
    _Cost("Training tokens per second", lambda row: row.tokens_per_second, less=False),
    _Cost("Peak memory, bytes", lambda row: row.peak_bytes),
)


def costs(standings: Standings) -> list[Drawing]:
    """The score against each cost but the budget, with the front of those that nobody beats in both."""
    return [_pareto(standings, cost) for cost in _COSTS if cost.budget != standings.rules.budget]


def _pareto(standings: Standings, cost: _Cost) -> Drawing:
    groups = []
    for row in standings.rows:
        paid, score = cost.of(row), row.score("validation")[0]
        said = f"{row.label}: {spell(score)} at {short(paid)}"
        groups.append(Group(_place(standings, row), [(paid, score, said)]))
    name = f"{cost.title[0].lower()}{cost.title[1:]}" if cost.title[1].islower() else cost.title
    return pareto(
        groups,
        title=f"Score against {name}",
        good=f"{'less' if cost.less else 'more'} is better",
        across=cost.title,
        gains=(lambda paid: -paid if cost.less else paid, standings.rules.task.looks_good),
    )


def _place(standings: Standings, row: Row) -> int:
    return standings.rows.index(row)


def _of(standings: Standings, row: Row, parts: Sequence[str]) -> str:
    """Shapes of one contender, which the page lights up together."""
    return element("g", *parts, class_=f"of of-{_place(standings, row)}")


def plots(standings: Standings) -> dict[str, str]:
    """The drawings as SVG files, by name."""
    drawn = costs(standings)
    columns = 2
    width, height = drawn[0].width, drawn[0].height
    placed = [
        nested(width * (n % columns), height * (n // columns), one.figure) for n, one in enumerate(drawn)
    ]
    tall = height * -(-len(drawn) // columns)
    return {
        "scores.svg": scores(standings).file,
        "learning.svg": learning(standings).file,
        "pareto.svg": document(
            width * columns, tall, *placed, title="Scores against costs", shapes=LINES_CSS
        ),
    }
