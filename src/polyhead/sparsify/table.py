"""What came out, a row for each method and share, and for the model as it is."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from polyhead.description import to_json
from polyhead.report.interval import wilson
from polyhead.sparsify.methods import Method
from polyhead.sparsify.settings import Settings
from polyhead.sparsify.timing import Round, Taken
from polyhead.sparsify.trials import Found, Outcome

__all__ = ["KEPT", "RISE", "Comparison", "Row"]

KEPT = 1.0  # share of the facts that the dense model finds, which a recommended row finds too
RISE = 0.02  # by which perplexity may rise in it


@dataclass(frozen=True)
class Row:
    """One method at one share, or the model as it is.

    Attributes:
        method: its name, with a digest where it is a file's; "" for the model as it is.
        share: of the keys, as it was asked for; 1 for the model as it is.
        outcome: of the trials.
        rounds: of timing.
    """

    method: str
    share: float
    outcome: Outcome
    rounds: tuple[Round, ...] = ()

    @property
    def label(self) -> str:
        """`prism 10 %`."""
        return f"{self.method} {self.share:.3g}" if self.method else "dense"

    def median(self, of: Callable[[Taken], float | None]) -> float:
        """The median over the rounds, NaN without."""
        return _median([of(one.own) for one in self.rounds])

    def faster(self, of: Callable[[Taken], float]) -> float:
        """How many times less the row takes than the dense model beside it; NaN without rounds."""
        return _median([of(one.dense) / of(one.own) for one in self.rounds])


@dataclass(frozen=True)
class Comparison:
    """All rows, the model as it is first.

    Attributes:
        settings: what they were made under.
        methods: by the names that rows call them by.
        rows: of methods and shares.
        machine: where, in a line.
    """

    settings: Settings
    methods: Mapping[str, Method]
    rows: tuple[Row, ...]
    machine: str

    @property
    def dense(self) -> Row:
        """The model as it is."""
        return self.rows[0]

    def read(self, row: Row, length: int) -> float:
        """The share of the visible keys that a row reads, mean over queries, heads and layers."""
        return row.outcome.read[length] / self.dense.outcome.read[length]

    def kept(self, row: Row, *, throughout: bool = False) -> tuple[int, int]:
        """Facts that the row finds of those which the dense model finds, and how many these are.

        Args:
            throughout: whether questions are put and answered under the method too.
        """
        known = [
            own.throughout if throughout else own.right
            for own, one in zip(row.outcome.found, self.dense.outcome.found, strict=True)
            if one.right
        ]
        return sum(known), len(known)

    def rise(self, row: Row) -> float:
        """By which share perplexity is above that of the dense model; below 0: it is less."""
        return math.expm1(row.outcome.nats - self.dense.outcome.nats)

    def holds(self, row: Row) -> bool:
        """Whether a row finds all the facts that the dense model finds, and perplexity rises little."""
        kept, of = self.kept(row)
        return kept >= KEPT * of and self.rise(row) <= RISE

    def matches(self, row: Row) -> bool:
        """Whether a row finds as many facts as dense, be they others, and perplexity rises little."""
        return _right(row.outcome.found) >= _right(self.dense.outcome.found) and self.rise(row) <= RISE

    @property
    def best(self) -> Row | None:
        """Of the rows that hold, the fastest in prefill; None if none holds and is faster than dense."""
        return self._fastest(self.holds)

    def _fastest(self, fits: Callable[[Row], bool]) -> Row | None:
        known = [row for row in self.rows[1:] if fits(row) and _prefill(row) > 1]
        return max(known, key=_prefill, default=None)

    @property
    def shares(self) -> list[float]:
        """Those of all rows."""
        return sorted({row.share for row in self.rows[1:]})

    @property
    def rounds(self) -> str:
        """How many rounds the times of methods are medians of: `3 rounds`, or `2 to 4 rounds`."""
        counts = sorted({len(row.rounds) for row in self.rows[1:] if row.rounds}) or [0]
        said = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"{said} round{'s' * (counts[-1] != 1)}"

    def records(self) -> list[dict[str, Any]]:
        """A flat record for each row."""
        found = []
        for row in self.rows:
            out = row.outcome
            record: dict[str, Any] = {"method": row.method or "dense", "share": row.share, "level": out.level}
            record |= {f"read at {length}": self.read(row, length) for length in self.settings.lengths}
            record["facts"], record["facts of"] = _right(out.found)
            record["kept"], record["kept of"] = self.kept(row)
            record["kept throughout"] = self.kept(row, throughout=True)[0]
            for length in self.settings.lengths:
                for alike, name in ((False, "facts"), (True, "alike")):
                    own = [f for f in out.found if f.length == length and f.alike == alike]
                    record[f"{name} at {length}"] = _right(own)[0]
            record |= {"nats": out.nats, "perplexity rise": self.rise(row)}
            record |= {"missed": out.missed, "missed by the worst head": out.missed_head}
            record |= {
                "prefill seconds": row.median(lambda t: t.prefill),
                "prefill faster": row.faster(lambda t: t.prefill),
                "step seconds": row.median(lambda t: t.step),
                "step faster": row.faster(lambda t: t.step),
                "peak bytes": row.median(lambda t: t.peak),
            }
            found.append(record)
        return found

    def to_csv(self) -> str:
        """The records as comma-separated values; empty where there is no number."""
        records, stream = self.records(), io.StringIO()
        writer = csv.DictWriter(stream, list(records[0]), lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow({k: "" if _nothing(v) else v for k, v in record.items()})
        return stream.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "settings": to_json(self.settings),
            "machine": self.machine,
            "rows": [
                {
                    "method": row.method,
                    "share": row.share,
                    "outcome": row.outcome.to_json(),
                    "rounds": [one.to_json() for one in row.rounds],
                }
                for row in self.rows
            ],
        }

    def cells(self, row: Row) -> list[str]:
        """A row of the table, as text."""
        out = row.outcome
        right, of = _right([f for f in out.found if not f.alike])
        alike, of_alike = _right([f for f in out.found if f.alike])
        kept, known = self.kept(row)
        throughout, _ = self.kept(row, throughout=True)
        peak = row.median(lambda t: t.peak)
        return [
            row.label,
            f"{self.read(row, self.settings.longest):.1%}",
            f"{right} of {of}",
            f"{alike} of {of_alike}",
            f"{kept} of {known}",
            f"{throughout} of {known}",
            f"{math.exp(out.nats):.2f}",
            "" if row is self.dense else f"{self.rise(row):+.1%}",
            "" if row is self.dense or out.missed is None else f"{out.missed:.1%}",
            _times(row.median(lambda t: t.prefill), row.faster(lambda t: t.prefill)),
            _times(row.median(lambda t: t.step), row.faster(lambda t: t.step)),
            "" if math.isnan(peak) else f"{peak / 2**20:,.0f}",
        ]

    @property
    def heads(self) -> list[str]:
        """The heads of the table."""
        longest = f"{self.settings.longest:,}"
        return [
            "method, share",
            f"keys read at {longest}",
            "facts",
            "facts alike",
            "of dense's",
            "throughout",
            "perplexity",
            "against dense",
            "missed mass",
            f"prefill {longest}",
            "step",
            "peak MiB",
        ]

    def table(self) -> Table:
        """For a terminal."""
        table = Table(box=None, pad_edge=False)
        for n, head in enumerate(self.heads):
            table.add_column(head, justify="right" if n else "left")
        for row in self.rows:
            style = "bold" if row is self.best else ""
            table.add_row(*(Text(cell, style=style) for cell in self.cells(row)))
        return table

    def to_markdown(self) -> str:
        """What came out, as a page of text."""
        s = self.settings
        timed = ""
        if any(row.rounds for row in self.rows[1:]):
            timed = (
                f" Times are medians of {self.rounds}, with the dense model at most two measurements before; "
                "each in a process of its own."
            )
        rows = ["| " + " | ".join(self.heads) + " |", "| --- |" + " ---: |" * (len(self.heads) - 1)]
        rows += ["| " + " | ".join(self.cells(row)) + " |" for row in self.rows]
        return "\n".join(
            [
                f"# {s.model}, read sparsely",
                "",
                self.verdict(),
                "",
                *rows,
                "",
                f"Texts of {', '.join(f'{n:,}' for n in s.lengths)} tokens with {s.facts} facts each, "
                f"{2 * s.texts} of every length. Shares are those of keys at the longest length. "
                '"Of dense\'s": of the facts that the model finds reading everything, those that are found '
                "when the text is read under the method and questions are answered densely; "
                f'"throughout": answered under it too.{timed} '
                f"{self.machine}.",
                "",
                "![What is kept, and what it takes](pareto.svg)",
                "",
            ]
        )

    def verdict(self) -> str:
        """What a user may take from it, in a sentence or two."""
        rule = f"all facts that the dense model finds, perplexity at most {RISE:.0%} above it"
        if not any(row.rounds for row in self.rows[1:]):
            held = [row.label for row in self.rows[1:] if self.holds(row)]
            return f"Not timed. These keep {rule}: {', '.join(held) or 'none'}."
        said = f"No method keeps {rule}, and is faster."
        if self.best is not None:
            said = (
                f"Fastest of those that keep {rule}: {self.best.label}, prefill of {self.settings.longest:,} "
                f"tokens {_prefill(self.best):.2f} times as fast as dense."
            )
            said += self._unsaid(self.best)
        other = self._fastest(self.matches)
        if other is None or other is self.best:
            return said
        return (
            f"{said} Of those that find as many facts as dense, be they others: {other.label}, "
            f"{_prefill(other):.2f} x."
        )

    def _unsaid(self, row: Row) -> str:
        """How much so many facts leave open."""
        kept, of = self.kept(row)
        if not of:
            return " The dense model finds no fact, so that none could be lost."
        low, _ = wilson(kept / of, of)
        return f" {of} facts leave open that up to {1 - low:.0%} of others are lost (95% interval)."


def _median(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else math.nan


def _prefill(row: Row) -> float:
    """How many times less its prefill takes, NaN without rounds."""
    return row.faster(lambda t: t.prefill)


def _right(found: Sequence[Found]) -> tuple[int, int]:
    return sum(one.right for one in found), len(found)


def _nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _times(seconds: float, faster: float) -> str:
    if math.isnan(seconds):
        return ""
    said = f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
    return f"{said} ({faster:.2f} x)"
