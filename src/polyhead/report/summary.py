"""What a run says in the terminal, and the Python lines that apply its recommendation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from polyhead.report.data import Point, ReportData, Savings
from polyhead.report.interval import wilson
from polyhead.report.words import compact, kept, megabytes, percent, plural, summary

if TYPE_CHECKING:
    from polyhead.report.effort import Effort

__all__ = ["markdown", "points_table", "python_lines", "ranked_lines", "reason", "verdict"]


def python_lines(source: str, heads: Sequence[tuple[int, int]], total: int, sink: int, window: int) -> str:
    """Lines that make the recommended cache and use it; they run as they are."""
    named = f"full = [  # {len(heads)} of {total} KV heads keep the whole context: (layer, KV head)"
    return _lines(source, f"{named}\n{_listed(heads)}\n]", sink, window)


def ranked_lines(source: str, order: Sequence[tuple[int, int]], count: int, sink: int, window: int) -> str:
    """The same for a size of the user's own choice, with all heads in the order in which they are chosen."""
    named = "ranked = [  # all KV heads, (layer, KV head), by retrieval and gate gradient: the better rank"
    cut = (
        f"full = ranked[:{count}]  # how many keep the whole context: a row of the table, or any other number"
    )
    return _lines(source, f"{named}\n{_listed(order)}\n]\n{cut}", sink, window)


def _listed(heads: Sequence[tuple[int, int]]) -> str:
    glued = [f"({layer},\xa0{head})," for layer, head in heads]  # no line is broken inside a pair
    return textwrap.indent(textwrap.fill(" ".join(glued), 76), "    ").replace("\xa0", " ")


def _lines(source: str, full: str, sink: int, window: int) -> str:
    return f"""import polyhead as ph

model, tokenizer = ph.hf.load({source!r})
{full}
cache = ph.cache.per_head(model, full=full, sink={sink}, window={window}, prefill="dense")
inputs = tokenizer("The capital of France is", return_tensors="pt")
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(output[0]))
print(cache)
"""


def reason(effort: Effort, before: Point, after: Point) -> str:
    """Why a cache is recommended."""
    return (
        f"The smallest cache tried that keeps at least {percent(1 - effort.losses)} of the hidden facts that "
        f"the whole cache finds, and raises perplexity by at most {percent(effort.tolerance)}, as all larger "
        f"ones do. On facts that did not choose it, it keeps {kept(after)}. In all it finds "
        f"{_found(after)} of {after.needles}, the whole cache {_found(before)}; perplexity goes from "
        f"{compact(before.perplexity)} to {compact(after.perplexity)}."
    )


def verdict(effort: Effort, before: Point | None, after: Point | None, what: str) -> str:
    """Why no smaller cache is recommended: what came of `after`, which is described as `what`."""
    if before is None or after is None:
        return "No smaller cache is recommended: none that keeps any KV head in full was tried."
    heads = plural(after.heads_kept, "KV head")
    text = f"No smaller cache is recommended: {heads} in full, {what}, keep {kept(after)}"
    if before.perplexity is not None:
        text += f", and perplexity goes from {compact(before.perplexity)} to {compact(after.perplexity)}"
    return (
        f"{text}. Asked for are at least {percent(1 - effort.losses)} of the facts and a perplexity raised "
        f"by at most {percent(effort.tolerance)}. What each size costs stands in the table; which cost is "
        "worth its saving is for you to say."
    )


def _found(point: Point) -> int:
    return round((point.needle_accuracy or 0) * point.needles)


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
    elif data.savings is not None and data.savings.python:
        parts.append("**To use a row of the table**, give its number of KV heads in full:")
        parts.append(f"```python\n{data.savings.python}```")
    return "\n\n".join(parts)


def _cells(savings: Savings) -> list[list[str]]:
    """The curve as rows of strings, the first one with the headings."""
    lengths = [n for n, _ in savings.baseline.cache_bytes]
    heads = ["KV heads in full", "chosen by", "found", "kept", "interval", "perplexity"]
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
    found = None if not shares else round(sum(shares) / len(shares) * n)
    whole, kept = sum(p.needles_whole or 0 for p in group), sum(p.needles_kept or 0 for p in group)
    low, high = wilson(kept / whole, whole) if whole else (0.0, 1.0)
    perplexities = [p.perplexity for p in group if p.perplexity is not None]
    held = dict(first.cache_bytes)
    how = "– (whole cache)" if first.policy == "full" else first.policy
    return [
        f"{first.heads_kept} ({percent(first.kv_fraction)})",
        how + (f", {len(group)} seeds" if len(group) > 1 else ""),
        "–" if found is None else f"{found} of {n}",
        f"{kept} of {whole}" if whole and first.policy != "full" else "–",
        f"{100 * low:.0f} – {percent(high)}" if whole and first.policy != "full" else "–",
        compact(sum(perplexities) / len(perplexities)) if perplexities else "–",
        *(megabytes(held.get(n)) for n in lengths),
        compact(first.decode_tokens_per_second),
    ]
