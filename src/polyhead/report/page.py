"""The page: one HTML file that holds a report, its pictures, its plots and the script that shows them.

The file opens from a disk and asks the network for nothing; its content policy forbids that outright and lets
only the page's own script run, so that no string of a model or a text can become one.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from importlib import resources

from polyhead.errors import ConfigError, MissingExtra
from polyhead.report import curves, maps, words
from polyhead.report.data import ROLES, Condition, Point, ReportData
from polyhead.report.packing import limit_lookups
from polyhead.report.palette import css_variables, role_variable
from polyhead.report.svg import SHAPES_CSS

__all__ = ["PAGE_BYTES", "build_page", "require_jinja"]

PAGE_BYTES = 10_000_000

# order matters: they share one scope
_SCRIPTS = ("base", "colour", "unpack", "map", "picture", "card", "text", "savings", "main")


def build_page(data: ReportData) -> str:
    """The text of `report.html`: self-contained, ASCII where the data is, below `PAGE_BYTES`.

    Where a page would grow too large, passages are left out of the lookups.

    Raises:
        MissingExtra: without jinja2.
        ConfigError: when the page stays too large even without lookups.
    """
    page = _render(data)
    excess = len(page.encode()) - PAGE_BYTES
    if excess <= 0:
        return page
    if data.lookups is not None:
        size = sum(len(head) for layer in data.lookups.packed for head in layer)
        lookups = limit_lookups(data.lookups, max(0, size - excess - 50_000))
        page = _render(dataclasses.replace(data, lookups=lookups if lookups.queries else None))
    if len(page.encode()) > PAGE_BYTES:
        raise ConfigError(
            f"the page would take {len(page.encode()) / 1e6:.1f} MB, more than {PAGE_BYTES / 1e6:.0f} MB; "
            "record smaller pictures (picture_side) or fewer tokens"
        )
    return page


def require_jinja() -> None:
    """Raise `MissingExtra` now rather than after minutes of measuring, when the page could not be built."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise MissingExtra("jinja2", "report", "writing a report page") from None


def _asset(name: str) -> str:
    return (resources.files("polyhead.report") / "assets" / name).read_text(encoding="utf-8")


def embed_json(text: str) -> str:
    """JSON as it may stand in a script element: no `<`, `>` or `&`, whatever the strings hold."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _render(data: ReportData) -> str:
    require_jinja()
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    roles = f"const ROLE_NAMES = {json.dumps(ROLES)};"
    script = "\n".join(("", roles, *(_asset(f"script/{name}.js") for name in _SCRIPTS)))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.from_string(_asset("template.html")).render(
        data=data,
        summary=words.summary(data),
        headline=words.headline(data),
        grouped=data.model.kv_heads != data.model.heads,
        facts=list(_facts(data)),
        run_facts=list(_run_facts(data)),
        partial=data.lookups is not None and len(data.lookups.queries) < len(data.text.tokens),
        role_rows=list(_role_rows(data)),
        measure_rows=[(m, maps.distribution(m, data.roles)) for m in data.measurements],
        css=f"{css_variables()}\n{_asset('style.css')}\n{SHAPES_CSS}",
        json=embed_json(data.to_json()),
        script=script,
        script_hash=f"sha256-{digest}",
        **_savings_parts(data),
    )
    # a lone surrogate in a name cannot be encoded; in the data it is escaped already
    return page.encode("utf-8", "replace").decode()


def _facts(data: ReportData) -> Iterator[tuple[str, str]]:
    m = data.model
    yield "Architecture", m.architecture
    yield "Parameters", words.parameters(m.parameters)
    yield "Layers", str(m.layers)
    yield "Heads", _per_layer(m.heads)
    if m.kv_heads != m.heads:
        yield "KV heads", _per_layer(m.kv_heads)
    yield "Head width", str(m.head_dim)
    yield "Measured in", m.dtype
    yield "Text", f"{data.text.name}, {words.plural(len(data.text.tokens), 'token')}"


def _per_layer(counts: tuple[int, ...]) -> str:
    low, high = min(counts), max(counts)
    return f"{sum(counts):,} ({low} a layer)" if low == high else f"{sum(counts):,} ({low} to {high} a layer)"


def _run_facts(data: ReportData) -> Iterator[tuple[str, str]]:
    run = data.run
    yield "Command", run.command
    yield "Polyhead", run.version
    yield "Date", run.date
    yield "Machine", run.machine
    if run.seeds:
        yield "Seeds", ", ".join(map(str, run.seeds))
    for phase in run.phases:
        yield f"{phase.name[:1].upper()}{phase.name[1:]}", f"{phase.seconds:.1f} s"
    if run.phases:
        yield "In all", f"{sum(p.seconds for p in run.phases):.0f} s"


def _role_rows(data: ReportData) -> Iterator[dict[str, object]]:
    counts, total = data.roles.counts(), data.model.total_heads
    rules = {rule.role: rule for rule in data.roles.rules}
    order = [*rules, *(role for role in ROLES if role not in rules and counts[role])]
    most = max(counts.values())
    for role in order:
        rule = rules.get(role)
        yield {
            "role": role,
            "variable": role_variable(role),
            "count": counts[role],
            "share": words.percent(counts[role] / total),
            "width": round(70 * counts[role] / most, 1),
            "text": rule.text if rule else "",
            "conditions": " and ".join(_condition(data, c) for c in rule.conditions) if rule else "",
        }


def _condition(data: ReportData, c: Condition) -> str:
    m = data.measurement(c.measurement)
    assert m is not None  # ReportData checks it
    sign = "≥" if c.relation == ">=" else "≤"
    return f"{m.title.lower()} {sign} {words.measured(c.threshold, m.unit)}"


def _savings_parts(data: ReportData) -> dict[str, object]:
    savings, advice = data.savings, data.recommendation
    parts: dict[str, object] = {
        "advice_rows": words.table(advice.before, advice.after) if advice else [],
        "charts": [],
        "curves": [],
        "hows": [],
        "lengths": [],
        "point_rows": [],
    }
    if savings is None:
        return parts
    lengths = sorted({n for p in (savings.baseline, *savings.points) for n, _ in p.cache_bytes})
    place = savings.policies().index
    ordered = sorted(savings.points, key=lambda p: (place(p.policy), -p.kv_fraction, p.seed or 0))
    return parts | {
        "charts": curves.savings_charts(savings, advice.after.kv_fraction if advice else None),
        "curves": curves.savings_key(savings),
        "hows": [how for how in (savings.needle_how, savings.perplexity_how, savings.decode_how) if how],
        "lengths": lengths,
        "point_rows": [_point_row(p, lengths) for p in (savings.baseline, *ordered)],
    }


def _point_row(p: Point, lengths: list[int]) -> list[str]:
    held = dict(p.cache_bytes)
    return [
        p.policy,
        "" if p.seed is None else str(p.seed),
        words.percent(p.kv_fraction),
        str(p.heads_kept),
        words.percent(p.needle_accuracy),
        "–" if p.needles_kept is None else f"{p.needles_kept} of {p.needles_whole}",
        words.compact(p.perplexity),
        *(words.megabytes(held.get(n)) for n in lengths),
        words.compact(p.decode_tokens_per_second),
    ]
