"""What a run says in the terminal, and the Python lines that apply its recommendation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from polyhead.report.curves import wilson
from polyhead.report.data import Point, ReportData, Savings
from polyhead.report.words import compact, megabytes, percent, summary

if TYPE_CHECKING:
    from polyhead.report.effort import Effort

__all__ = ["markdown", "points_table", "python_lines", "reason"]


def python_lines(source: str, heads: Sequence[tuple[int, int]], total: int, sink: int, window: int) -> str:
    """Lines that make the recommended cache and use it; they run as they are."""
    glued = [f"({layer},\xa0{head})," for layer, head in heads]  # no line is broken inside a pair
    listed = textwrap.indent(textwrap.fill(" ".join(glued), 76), "    ").replace("\xa0", " ")
    return f"""import polyhead as ph

model, tokenizer = ph.hf.load({source!r})
full = [  # {len(heads)} of {total} KV heads keep the whole context: (layer, KV head)
{listed}
]
cache = ph.cache.per_head(model, full=full, sink={sink}, window={window}, prefill="dense")
inputs = tokenizer("The capital of France is", return_tensors="pt")
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(output[0]))
print(cache)
"""


def reason(effort: Effort, before: Sequence[bool], after: Sequence[bool], old: Point, new: Point) -> str:
    """Why a cache is recommended."""
    n = len(before)
    low, high = wilson(sum(after) / n, n)
    assert old.perplexity is not None
    assert new.perplexity is not None
    return (
        f"The smallest cache tried that loses at most {max(1, int(effort.losses * n))} of {n} hidden facts "
        f"on balance and raises perplexity by at most {percent(effort.tolerance)}. On fresh texts it finds "
        f"{sum(after)} of {n} (95 % interval {percent(low)} to {percent(high)}; whole cache {sum(before)}), "
        f"and perplexity goes from {compact(old.perplexity)} to {compact(new.perplexity)}."
    )


def points_table(savings: Savings) -> Table:
    """The curve as a table for the terminal; random choices of one size share a line."""
    heads, *rows = _cells(savings)
    table = Table(box=None, pad_edge=False)
    for k, head in enumerate(heads):
        table.add_column(head, justify="left" if k < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(data: ReportData) -> str:
    """A report's findings as Markdown, for results that are kept without the page."""
    parts = [
        f"# {data.model.name}: what its heads do, and what its KV cache can lose",
        summary(data),
        f"`{data.run.command}`, Polyhead {data.run.version}, {data.run.machine}, {data.run.date}",
    ]
    if data.savings is not None:
        heads, *rows = _cells(data.savings)
        lines = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2), *rows]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
        how = (data.savings.needle_how, data.savings.perplexity_how, data.savings.decode_how)
        parts += [text for text in how if text]
    parts += data.notes
    if data.recommendation is not None:
        parts.append(f"**Recommended.** {data.recommendation.why} {data.recommendation.how}")
        parts.append(f"```python\n{data.recommendation.python}```")
    return "\n\n".join(parts)


def _cells(savings: Savings) -> list[list[str]]:
    """The curve as rows of strings, the first one with the headings."""
    lengths = [n for n, _ in savings.baseline.cache_bytes]
    heads = ["KV heads in full", "chosen by", "facts found", "95 % interval", "perplexity"]
    heads += [f"cache at {n:,}" for n in lengths] + ["tokens/s"]
    return [heads, *(_row(group, lengths) for group in _groups(savings))]


def _groups(savings: Savings) -> list[list[Point]]:
    groups: dict[tuple[str, int], list[Point]] = {("full", savings.baseline.heads_kept): [savings.baseline]}
    for point in sorted(savings.points, key=lambda p: (-p.heads_kept, p.policy == "random")):
        groups.setdefault((point.policy, point.heads_kept), []).append(point)
    return list(groups.values())


def _row(group: list[Point], lengths: Sequence[int]) -> list[str]:
    first = group[0]
    n = sum(p.needles for p in group)
    shares = [p.needle_accuracy for p in group if p.needle_accuracy is not None]
    share = sum(shares) / len(shares) if shares else None
    low, high = (0.0, 1.0) if share is None else wilson(share, n)
    perplexities = [p.perplexity for p in group if p.perplexity is not None]
    held = dict(first.cache_bytes)
    how = "– (whole cache)" if first.policy == "full" else first.policy
    return [
        f"{first.heads_kept} ({percent(first.kv_fraction)})",
        how + (f", {len(group)} seeds" if len(group) > 1 else ""),
        "–" if share is None else f"{round(share * n)} of {n}",
        "–" if share is None else f"{100 * low:.0f} – {percent(high)}",
        compact(sum(perplexities) / len(perplexities)) if perplexities else "–",
        *(megabytes(held.get(n)) for n in lengths),
        compact(first.decode_tokens_per_second),
    ]
