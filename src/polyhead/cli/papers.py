"""`polyhead papers`: the papers of the field, and where they are built."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.text import Text

from polyhead.cli.group import app
from polyhead.cli.printing import print_json, print_table, table
from polyhead.errors import PolyheadError

__all__ = ["papers"]


@app.command()
def papers(
    built: Annotated[bool, typer.Option("--built", help="Only papers that are built.")] = False,
    missing: Annotated[
        bool, typer.Option("--not-built", "--missing", help="Only papers that are not built yet.")
    ] = False,
    theme: Annotated[str, typer.Option(help="Only papers whose theme contains this text.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the papers of the field: number, names, year, title, and where they are built."""
    from polyhead.papers import papers as all_papers

    known = all_papers()
    themes = sorted({paper.theme for paper in known})
    if theme and not any(theme.lower() in name.lower() for name in themes):
        raise PolyheadError(f"--theme: no theme contains {theme!r}; the themes are: {'; '.join(themes)}")
    chosen = [
        (paper, paper.built_in)
        for paper in known
        if theme.lower() in paper.theme.lower() and (built == missing or paper.built == built)
    ]
    if as_json:
        print_json([dataclasses.asdict(paper) | {"built_in": list(files)} for paper, files in chosen])
        return
    rows = table("paper", "name", "known as", "year", "title", "built in")
    for paper, files in chosen:
        where = Text("\n".join(files) or "-", style="green" if files else "dim")
        rows.add_row(
            paper.number, Text(paper.name), Text(paper.short), str(paper.year), Text(paper.title), where
        )
    print_table(rows)
    typer.echo(f"{len(chosen)} papers, {sum(bool(files) for _, files in chosen)} built")
