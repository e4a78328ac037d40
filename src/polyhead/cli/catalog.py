"""`polyhead catalog` and `polyhead show`: the mechanisms that can be built by name, and one of them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from polyhead.cli.group import app
from polyhead.cli.printing import print_json, print_table, table

__all__ = ["catalog", "show"]

_FACET = "Facet, or several with commas between them."


@app.command()
def catalog(
    family: Annotated[str | None, typer.Option(help="The kind of idea, such as sharing.")] = None,
    supports: Annotated[
        str | None,
        typer.Option(help="Patterns that it must support: self, causal_self, cross, causal_cross."),
    ] = None,
    kv_bytes: Annotated[
        str | None, typer.Option(help='Bytes that a token of the KV cache takes, such as "<512" or ">=128".')
    ] = None,
    paper: Annotated[str | None, typer.Option(help="Number or name of the paper: 074, GQA.")] = None,
    sequences: Annotated[str | None, typer.Option(help=_FACET)] = None,
    levels: Annotated[str | None, typer.Option(help=_FACET)] = None,
    positions: Annotated[str | None, typer.Option(help=_FACET)] = None,
    representations: Annotated[str | None, typer.Option(help=_FACET)] = None,
    alignment: Annotated[str | None, typer.Option(help=_FACET)] = None,
    distribution: Annotated[str | None, typer.Option(help=_FACET)] = None,
    complexity: Annotated[str | None, typer.Option(help=_FACET)] = None,
    cache: Annotated[str | None, typer.Option(help=_FACET)] = None,
    facets: Annotated[
        bool, typer.Option("--facets", help="List the facets and what their values mean instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the mechanisms that can be built by name: all, or those that fit the filters."""
    from polyhead import mechanisms
    from polyhead.gallery import Size, facts_of
    from polyhead.papers import paper as paper_called

    if facets:
        _print_facets(as_json)
        return

    def several(text: str | None) -> list[str] | None:
        return None if text is None else [part.strip() for part in text.split(",")]

    every = mechanisms.catalog()
    found = mechanisms.catalog(
        family=family,
        paper=None if paper is None else paper_called(paper).number,
        supports=several(supports),
        kv_bytes=kv_bytes,
        sequences=several(sequences),
        levels=several(levels),
        positions=several(positions),
        representations=several(representations),
        alignment=several(alignment),
        distribution=several(distribution),
        complexity=several(complexity),
        cache=several(cache),
    )
    if as_json:
        print_json([facts_of(entry).to_json() for entry in found])
        return
    rows = table("name", "paper", "family", "supports", "KV bytes", "what it is")
    rows.columns[4].justify = "right"
    for entry in found:
        patterns = "all" if entry.supports == mechanisms.PATTERNS else ", ".join(sorted(entry.supports))
        kept = f"{entry.cost.kv_bytes_per_token:,}"
        rows.add_row(entry.name, entry.paper or "-", entry.family, patterns, kept, Text(entry.summary))
    print_table(rows)
    typer.echo(f"{len(found)} of {len(every)} mechanisms; KV bytes are those of a token at {Size()}")


def _print_facets(as_json: bool) -> None:
    from polyhead.mechanisms import FACETS

    if as_json:
        print_json(FACETS)
        return
    rows = table("facet", "value", "means")
    for name, values in FACETS.items():
        for n, (value, meaning) in enumerate(values.items()):
            rows.add_row("" if n else name, value, Text(meaning))
    print_table(rows)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A mechanism, as `polyhead catalog` lists it, or an alias.")],
    dim: Annotated[int, typer.Option(help="Model width for the cost.")] = 512,
    heads: Annotated[int, typer.Option(help="Query heads for the cost.")] = 8,
    length: Annotated[int, typer.Option(help="Sequence length for the cost.")] = 4096,
    source: Annotated[bool, typer.Option("--source", help="Print the naive twin's source too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show one mechanism: equation, data flow, cost, patterns, options, code, naive twin and paper."""
    from polyhead.gallery import Size, facts_of, text
    from polyhead.mechanisms import registry

    facts = facts_of(registry.entry(name), Size(dim, heads, length))
    entry = facts.entry
    if as_json:
        shown = facts.to_json() | ({"twin_source": facts.twin_source} if source else {})
        print_json(shown)
        return
    facets = (f"{axis}: {', '.join(entry.facets.values(axis))}" for axis in entry.facets.items())
    twin = "none" if facts.twin is None else f"{facts.twin}, in {facts.twin_file}"
    rows = table()
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    for label, content in (
        ("name", ", ".join((entry.name, *entry.aliases))),
        ("what it is", entry.summary),
        ("family", entry.family),
        ("equation", entry.equation),
        ("data flow", text(facts.flow)),
        ("cost", f"at {facts.size}:\n{facts.cost}"),
        ("supports", ", ".join(sorted(entry.supports))),
        ("facets", "\n".join(facets)),
        ("options", "\n".join(map(str, facts.options))),
        ("code", f"{facts.build}, in {', '.join(entry.files)}"),
        ("naive twin", twin + ("" if source or facts.twin is None else " (--source prints it)")),
        ("paper", facts.citation),
    ):
        rows.add_row(label, Text(content))
    print_table(rows)
    if source and facts.twin_source is not None:
        typer.echo(f"\n{facts.twin_source.rstrip()}")
