"""How a league stands: every run, and a row for each contender."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyhead.description import to_json
from polyhead.errors import MissingExtra
from polyhead.league.budget import Counted, Fitted
from polyhead.league.interval import mean_and_half_width
from polyhead.league.plan import Rules
from polyhead.league.training import Outcome

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Row", "Standings"]


@dataclass(frozen=True)
class Row:
    """A contender over its seeds.

    Attributes:
        fitted: who, at which sizes, and what it costs.
        outcomes: by seed.
        rank: 1 for the best score, the same for equal ones; None where no run finished.
    """

    fitted: Fitted
    outcomes: Mapping[int, Outcome]
    rank: int | None = None

    @property
    def label(self) -> str:
        """What it is called."""
        return self.fitted.contender.label

    def count(self, status: str) -> int:
        """How many runs ended so."""
        return sum(one.status == status for one in self.outcomes.values())

    def scores(self, split: str) -> dict[int, float]:
        """Scores of finished runs, by seed."""
        return {seed: one.scores[split] for seed, one in self.outcomes.items() if one.status == "finished"}

    def score(self, split: str) -> tuple[float, float]:
        """Mean and half the width of its 95 % interval, over the seeds of finished runs."""
        return mean_and_half_width(list(self.scores(split).values()))

    @property
    def tokens_per_second(self) -> float:
        """Median over the runs."""
        found = [o.tokens_per_second for o in self.outcomes.values() if math.isfinite(o.tokens_per_second)]
        return statistics.median(found) if found else math.nan

    @property
    def peak_bytes(self) -> float:
        """The most of all runs; NaN where nothing is known."""
        found = [o.peak_bytes for o in self.outcomes.values() if o.peak_bytes is not None]
        return float(max(found)) if found else math.nan

    @property
    def positions(self) -> str:
        """How its tokens know where they stand."""
        return ", ".join(dict.fromkeys(layer.positions for layer in self.fitted.layers))


class Standings:
    """A league, finished or not. Made by `compare`.

    Args:
        fitted: the contenders in the order in which they were named, at sizes that meet the budget.
        outcomes: how runs ended, by number of the contender, from 0, and seed; runs that are not done are
            left out.

    Attributes:
        rules: what every run shares.
        target: what plain attention costs at the sizes of the rules: the budget.
        rows: one for each contender, in the order in which they were named.
        yardsticks: scores on "validation" that need no training.
        seeds: how many runs a contender has when all is done.
    """

    def __init__(
        self,
        rules: Rules,
        target: Counted,
        fitted: tuple[Fitted, ...],
        outcomes: Mapping[tuple[int, int], Outcome],
        seeds: int,
    ) -> None:
        self.rules, self.target, self.seeds = rules, target, seeds
        self.yardsticks = {name: float(score) for name, score in rules.task.yardsticks().items()}
        rows = [
            Row(one, {seed: outcomes[n, seed] for seed in range(seeds) if (n, seed) in outcomes})
            for n, one in enumerate(fitted)
        ]
        worth = {
            row.label: (
                -row.count("diverged") - row.count("failed"),
                rules.task.looks_good(row.score("validation")[0]),
            )
            for row in rows
            if row.scores("validation")
        }

        def rank(row: Row) -> int | None:
            own = worth.get(row.label)
            return None if own is None else 1 + sum(other > own for other in worth.values())

        self.rows = tuple(Row(row.fitted, row.outcomes, rank(row)) for row in rows)

    @property
    def ranked(self) -> tuple[Row, ...]:
        """The rows, the best first; one with a run that diverged stands behind all without."""
        return tuple(sorted(self.rows, key=lambda row: math.inf if row.rank is None else row.rank))

    @property
    def made_with(self) -> tuple[str, ...]:
        """What the runs were made with, as far as they say; more than one, and the last digits may differ."""
        said = {outcome.made_with for row in self.rows for outcome in row.outcomes.values()}
        return tuple(sorted(said - {""}))

    def difference(self, row: Row, split: str = "validation") -> tuple[float, float]:
        """Score minus that of the contender named first, paired by seed: mean, half of its 95 % interval."""
        own, other = row.scores(split), self.rows[0].scores(split)
        return mean_and_half_width([own[seed] - other[seed] for seed in own if seed in other])

    def _records(self) -> list[dict[str, Any]]:
        records = []
        for row in self.ranked:
            sizes, counted = row.fitted.sizes, row.fitted.counted
            record: dict[str, Any] = {"rank": row.rank, "contender": row.label}
            for split in self.rules.task.splits:
                record[split], record[f"{split} ±"] = row.score(split)
            record["difference"], record["difference ±"] = self.difference(row)
            record |= {
                "finished": row.count("finished"),
                "diverged": row.count("diverged"),
                "failed": row.count("failed"),
                "parameters": counted.params,
                "flops": counted.flops,
                "kv bytes per token": counted.kv,
                "tokens per second": row.tokens_per_second,
                "peak bytes": row.peak_bytes,
                "positions": row.positions,
                "dim": sizes.dim,
                "heads": sizes.heads,
                "layers": sizes.layers,
                "mlp": sizes.mlp,
            }
            records.append(record)
        return records

    def to_frame(self) -> pd.DataFrame:
        """A row for each contender, the best first."""
        try:
            import pandas as pd
        except ImportError:
            raise MissingExtra("pandas", "report", "to_frame") from None
        return pd.DataFrame(self._records())

    def to_csv(self) -> str:
        """The same as comma-separated values; empty where there is no number."""
        records, stream = self._records(), io.StringIO()
        writer = csv.DictWriter(stream, list(records[0]), lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow(
                {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}
            )
        return stream.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Rules, sizes and every run with its learning curve, as plain data."""
        return {
            "rules": to_json(self.rules),
            "budget": {"params": self.target.params, "flops": self.target.flops, "kv": self.target.kv},
            "yardsticks": {
                name: score if math.isfinite(score) else None for name, score in self.yardsticks.items()
            },
            "contenders": [
                {
                    "contender": to_json(row.fitted.contender),
                    "rank": row.rank,
                    "sizes": to_json(row.fitted.sizes),
                    "counted": vars(row.fitted.counted),
                    "positions": row.positions,
                    "runs": {str(seed): outcome.to_json() for seed, outcome in row.outcomes.items()},
                }
                for row in self.ranked
            ],
        }

    def table(self) -> Table:
        """The leaderboard for a terminal."""
        task = self.rules.task
        sign = "↑" if task.better == "higher" else "↓"
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        table.add_column("contender")
        for split in task.splits:
            head = f"{task.metric} {sign}" if split == "validation" else split
            table.add_column(Text(head), justify="right")
        for head in ("against the first", "parameters", "MFLOP", "KV bytes", "tokens/s", "peak MiB", "runs"):
            table.add_column(head, justify="right")
        for row in self.ranked:
            counted = row.fitted.counted
            against = "" if row.label == self.rows[0].label else spell(*self.difference(row), sign=True)
            table.add_row(
                "" if row.rank is None else str(row.rank),
                Text(row.label),
                *(spell(*row.score(split)) for split in task.splits),
                against,
                f"{counted.params:,}{self._off('params', counted)}",
                f"{counted.flops / 1e6:.4g}{self._off('flops', counted)}",
                f"{counted.kv:,}{self._off('kv', counted)}",
                "" if math.isnan(row.tokens_per_second) else f"{row.tokens_per_second:,.0f}",
                "" if math.isnan(row.peak_bytes) else f"{row.peak_bytes / 2**20:,.0f}",
                Text(
                    runs_of(row, self.seeds),
                    style="bold red" if row.count("diverged") + row.count("failed") else "",
                ),
            )
        return table

    def __str__(self) -> str:
        """The leaderboard as text, in whole rows."""
        stream = io.StringIO()
        Console(file=stream, width=10_000, color_system=None, force_jupyter=False).print(self.table())
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def _off(self, budget: str, counted: Counted) -> str:
        own = self.rules.budget
        if budget != own and not (own == "kv" and budget == "params"):  # those are as near as they could be
            return ""
        wanted = getattr(self.target, budget)
        off = (getattr(counted, budget) - wanted) / wanted
        return " (=)" if off == 0 else f" ({off:+.1%})"


def spell(mean: float, half: float = math.nan, sign: bool = False) -> str:
    """`0.9120 ±0.0340`, or `1.5e-09 ±6.4e-09` where four places would say nothing; empty without a mean."""
    if math.isnan(mean):
        return ""
    largest = max(abs(mean), 0 if math.isnan(half) else half)
    kind = ".4f" if largest == 0 or 1e-3 <= largest < 1e5 else ".4g"
    said = f"{mean:{'+' if sign else ''}{kind}}"
    return said if math.isnan(half) else f"{said} ±{half:{kind}}"


def known(score: float) -> str:
    """`0.912`, or a dash where there is no number."""
    return f"{score:.4g}" if math.isfinite(score) else "–"


def runs_of(row: Row, seeds: int) -> str:
    """`3`, or `2 of 3, 1 diverged`."""
    done = row.count("finished")
    said = [str(done) if done == seeds else f"{done} of {seeds}"]
    said += [f"{row.count(how)} {how}" for how in ("diverged", "failed") if row.count(how)]
    return ", ".join(said)
