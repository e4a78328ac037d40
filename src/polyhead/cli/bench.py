"""`polyhead bench`: the benchmarks of a source checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from polyhead.cli.group import app
from polyhead.cli.printing import print_table, table

__all__ = ["bench"]


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Which benchmarks; all by default.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="Say what there is, and run nothing.")] = False,
    save: Annotated[Path | None, typer.Option(help="Keep what each one prints in this folder.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu or cuda.")] = "cpu",
) -> None:
    """Run benchmarks of a source checkout; each prints its ratio to a yardstick of the same run."""
    from polyhead import benchmarks

    if listing:
        rows = table("name", "what it measures")
        for one in benchmarks.find():
            rows.add_row(one.name, Text(one.summary))
        print_table(rows)
        return
    for one in benchmarks.select(names or ()):
        benchmarks.run(one, device=device, save=save)
