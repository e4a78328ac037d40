"""The leaderboard as a page: one HTML file that opens from a disk and asks the network for nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator

from polyhead.leaderboard.plots import costs, learning, scores
from polyhead.league import Standings
from polyhead.league.standings import known, runs_of, spell
from polyhead.report.drawing import colour
from polyhead.report.standalone import asset, standalone

__all__ = ["build_page"]


def build_page(standings: Standings) -> str:
    """The text of `leaderboard.html`.

    Raises:
        MissingExtra: without jinja2.
    """
    return standalone(
        asset("polyhead.leaderboard", "template.html"),
        css=asset("polyhead.report", "light.css"),
        script=asset("polyhead.report", "light.js"),
        task=standings.rules.task,
        rules=standings.rules,
        heads=_heads(standings),
        rows=list(_rows(standings)),
        facts=list(_facts(standings)),
        made_with=standings.made_with,
        yardsticks=[(name, known(score)) for name, score in standings.yardsticks.items()],
        scores=scores(standings),
        learning=learning(standings),
        costs=costs(standings),
        sizes=list(_sizes(standings)),
        runs=list(_runs(standings)),
    )


def _facts(standings: Standings) -> Iterator[tuple[str, str]]:
    rules, target = standings.rules, standings.target
    words = {"params": "parameters", "flops": "operations a sequence", "kv": "bytes of KV cache a token"}
    yield "Task", rules.task.name
    yield "Equal for all", f"{getattr(target, rules.budget):,} {words[rules.budget]}"
    yield "Steps", f"{rules.recipe.steps:,} of {rules.recipe.batch} sequences"
    yield "Seeds", str(standings.seeds)
    yield "Length", f"{rules.task.length:,} tokens"


def _heads(standings: Standings) -> list[str]:
    task = standings.rules.task
    return [
        f"{task.metric} ({task.better} is better)" if split == "validation" else split
        for split in task.splits
    ]


def _rows(standings: Standings) -> Iterator[dict[str, object]]:
    for row in standings.ranked:
        place = standings.rows.index(row)
        counted = row.fitted.counted
        yield {
            "place": place,
            "colour": colour(place),
            "rank": "–" if row.rank is None else str(row.rank),
            "label": row.label,
            "scores": [spell(*row.score(split)) or "–" for split in standings.rules.task.splits],
            "difference": "" if place == 0 else spell(*standings.difference(row), sign=True) or "–",
            "costs": [
                f"{counted.params:,}",
                f"{counted.flops / 1e6:,.2f}",
                f"{counted.kv:,}",
                "–" if math.isnan(row.tokens_per_second) else f"{row.tokens_per_second:,.0f}",
                "–" if math.isnan(row.peak_bytes) else f"{row.peak_bytes / 2**20:,.0f}",
            ],
            "runs": runs_of(row, standings.seeds),
            "bad": row.count("diverged") + row.count("failed") > 0,
        }


def _sizes(standings: Standings) -> Iterator[list[str]]:
    for row in standings.ranked:
        sizes = row.fitted.sizes
        options = "; ".join(
            ", ".join(f"{name}={value}" for name, value in layer.options.items())
            for layer in row.fitted.layers
        )
        numbers = (sizes.dim, sizes.heads, sizes.layers, sizes.mlp)
        yield [row.label, *map(str, numbers), row.positions, options]


def _runs(standings: Standings) -> Iterator[list[str]]:
    for row in standings.ranked:
        for seed, outcome in sorted(row.outcomes.items()):
            found = [outcome.scores.get(split, math.nan) for split in standings.rules.task.splits]
            ended = outcome.status + (f" at step {outcome.steps:,}" if outcome.status == "diverged" else "")
            yield [
                row.label,
                str(seed),
                ended + (f": {outcome.note}" if outcome.note else ""),
                *(spell(score) or "–" for score in found),
                f"{outcome.seconds:,.0f} s",
            ]
