"""Numbers and findings in words: what the page and the terminal say about a report."""

from __future__ import annotations

from polyhead.report.data import Point, ReportData
from polyhead.report.interval import wilson

__all__ = [
    "compact",
    "headline",
    "kept",
    "measured",
    "megabytes",
    "percent",
    "plural",
    "ratio",
    "summary",
    "table",
]


NARROW = "\u00a0"  # keeps a unit with its number


def percent(share: float | None, digits: int = 0) -> str:
    """`0.204` as "20 %"."""
    return "–" if share is None else f"{100 * share:.{digits}f}{NARROW}%"


def compact(number: float | None) -> str:
    """Three significant digits, thousands marked: "0.0312", "14.8", "2,048"."""
    if number is None:
        return "–"
    if number == 0 or abs(number) >= 1000:
        return f"{number:,.0f}"
    if abs(number) < 0.001:
        return f"{number:.1e}"
    return f"{number:.3g}"


def measured(number: float | None, unit: str) -> str:
    """A measurement with its unit; shares in percent."""
    if number is None:
        return "–"
    if unit == "share":
        if 0 < number < 0.0005:
            return f"< 0.1{NARROW}%"
        return percent(number, 1 if 0 < abs(number) < 0.1 else 0)
    return f"{compact(number)}{NARROW}{unit}" if unit else compact(number)


def megabytes(count: int | None) -> str:
    """Bytes as MB or GB of the decimal kind."""
    if count is None:
        return "–"
    return f"{count / 1e9:.3g}{NARROW}GB" if count >= 1e9 else f"{count / 1e6:.3g}{NARROW}MB"


def ratio(after: float | None, before: float | None) -> str:
    """How `after` stands to `before`, as "0.23 ×"."""
    return "–" if after is None or not before else f"{after / before:.2f}{NARROW}×"


def parameters(count: int) -> str:
    """A parameter count as "135 M"."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{NARROW}{letter}"
    return str(count)


def plural(count: int, noun: str) -> str:
    """ "1 head", "2 heads"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def kept(point: Point) -> str:
    """ "41 of the 42 that the whole cache finds (98 %, 95 % interval 88 % to 100 %)"."""
    if not point.needles_whole or point.needles_kept is None:
        return "nothing that can be told, for the whole cache finds no fact"
    low, high = wilson(point.needles_kept / point.needles_whole, point.needles_whole)
    return (
        f"{point.needles_kept} of the {point.needles_whole} that the whole cache finds "
        f"({percent(point.share_kept)}, 95{NARROW}% interval {percent(low)} to {percent(high)})"
    )


_ROLE_PHRASES = {
    "sink": "rest on sink tokens",
    "local": "read the neighbourhood",
    "previous token": "copy the token before",
    "induction": "continue repeated passages",
    "retrieval": "retrieve facts from anywhere",
    "broad": "spread widely",
}


def _roles_sentence(data: ReportData) -> str:
    counts = data.roles.counts()
    rest = counts.pop("mixed")
    phrases = [
        f"{counts[role]:,} {_ROLE_PHRASES[role]}"
        for role in sorted(counts, key=lambda role: -counts[role])
        if counts[role]
    ]
    if not phrases:
        return "No head keeps to one role by the rules below."
    if rest:
        phrases.append(f"{rest:,} do several of these or none")
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"Of these heads, {listed}."


def _saving_sentence(data: ReportData) -> str:
    r = data.recommendation
    if data.model.is_encoder:
        return "It is an encoder: it keeps no cache, so there is nothing to save."
    if r is None:
        if data.savings is None:
            return ""
        return data.savings.verdict or "No smaller cache is recommended."
    if r.after.kv_fraction >= 1:
        return "No smaller cache that was tried keeps its answers, so the advice is to keep the whole cache."
    heads = plural(data.model.total_kv_heads, "KV head")
    text = (
        f"Keeping the full context for {r.after.heads_kept} of {heads} ({percent(r.after.kv_fraction)}), "
        "and only sinks and recent tokens for the rest, "
    )
    if r.after.share_kept is not None:
        text += f"keeps, of the hidden facts, {kept(r.after)}"
    else:
        text += (
            f"finds {percent(r.after.needle_accuracy)} of hidden facts "
            f"(whole cache: {percent(r.before.needle_accuracy)})"
        )
    chance = _random_accuracy(data, r.after.kv_fraction)
    if chance is not None:
        text += f" (as many heads chosen at random find {percent(chance)} of all)"
    before, after = dict(r.before.cache_bytes), dict(r.after.cache_bytes)
    lengths = sorted(before.keys() & after.keys())
    if lengths:
        n = lengths[-1]
        text += (
            f" and shrinks the cache at {n:,} tokens from {megabytes(before[n])} to {megabytes(after[n])}"
            f" (−{percent(1 - after[n] / before[n])})"
        )
    speeds = r.after.decode_tokens_per_second, r.before.decode_tokens_per_second
    if speeds[0] and speeds[1]:
        text += f"; decoding runs {speeds[0] / speeds[1]:.1f}{NARROW}× as fast"
    return text + "."


def _random_accuracy(data: ReportData, fraction: float) -> float | None:
    points = (data.recommendation.chance if data.recommendation else ()) or (
        data.savings.points if data.savings else ()
    )
    found = [
        p.needle_accuracy
        for p in points
        if p.policy == "random" and abs(p.kv_fraction - fraction) < 1e-6 and p.needle_accuracy is not None
    ]
    return sum(found) / len(found) if found else None


def summary(data: ReportData) -> str:
    """The report in a paragraph of plain words."""
    m = data.model
    shared = "" if m.kv_heads == m.heads else f", {m.total_kv_heads:,} KV heads between them"
    first = (
        f"{m.name} has {plural(m.total_heads, 'attention head')} in {plural(m.layers, 'layer')}{shared}. "
        f"Each was watched on {plural(len(data.text.tokens), 'token')} of {data.text.name}."
    )
    return " ".join(part for part in (first, _roles_sentence(data), _saving_sentence(data)) if part)


def headline(data: ReportData) -> list[tuple[str, str]]:
    """The few figures that a recommendation comes to: pairs (figure, what it is)."""
    r = data.recommendation
    if r is None or r.after.kv_fraction >= 1:
        return []
    figures = [
        (
            f"{r.after.heads_kept} of {data.model.total_kv_heads}",
            f"KV heads keep the full context ({percent(r.after.kv_fraction)})",
        )
    ]
    if r.after.needle_accuracy is not None:
        chance = _random_accuracy(data, r.after.kv_fraction)
        beside = "" if chance is None else f", random choice {percent(chance)}"
        told = f"of hidden facts found (whole cache {percent(r.before.needle_accuracy)}{beside})"
        share = r.after.needle_accuracy
        if r.after.share_kept is not None:
            share = r.after.share_kept
            told = (
                f"of the hidden facts that the whole cache finds are kept ({r.after.needles_kept} of "
                f"{r.after.needles_whole}{beside})"
            )
        figures.append((percent(share), told))
    before, after = dict(r.before.cache_bytes), dict(r.after.cache_bytes)
    for n in sorted(before.keys() & after.keys())[-1:]:
        told = f"cache at {n:,} tokens: {megabytes(before[n])} down to {megabytes(after[n])}"
        figures.append((f"−{percent(1 - after[n] / before[n])}", told))
    if r.after.decode_tokens_per_second and r.before.decode_tokens_per_second:
        new, old = r.after.decode_tokens_per_second, r.before.decode_tokens_per_second
        figures.append(
            (f"{new / old:.1f}{NARROW}×", f"decoding speed: {compact(old)} to {compact(new)} tokens/s")
        )
    return figures


def table(before: Point, after: Point) -> list[tuple[str, str, str, str]]:
    """Rows (what, whole cache, recommended, ratio) that set a recommendation beside the untouched model."""
    rows = [("KV heads with full context", str(before.heads_kept), str(after.heads_kept), "")]
    if after.needle_accuracy is not None:
        n = f" (of {after.needles})" if after.needles else ""
        found = percent(before.needle_accuracy), percent(after.needle_accuracy)
        rows.append((f"Hidden facts found{n}", *found, ""))
    if after.share_kept is not None:
        told = f"{after.needles_kept} of {after.needles_whole}"
        rows.append(
            ("Kept of those the whole cache finds", str(after.needles_whole), told, percent(after.share_kept))
        )
    if after.perplexity is not None:
        values = after.perplexity, before.perplexity
        rows.append(("Perplexity", compact(before.perplexity), compact(after.perplexity), ratio(*values)))
    wholes = dict(before.cache_bytes)
    for length, count in after.cache_bytes:
        whole = wholes.get(length)
        rows.append((f"Cache at {length:,} tokens", megabytes(whole), megabytes(count), ratio(count, whole)))
    if after.decode_tokens_per_second is not None:
        old, new = before.decode_tokens_per_second, after.decode_tokens_per_second
        rows.append(("Decoded tokens per second", compact(old), compact(new), ratio(new, old)))
    return rows
