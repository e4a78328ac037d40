"""`polyhead gallery`: a page for every mechanism."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyhead.cli.group import app

__all__ = ["gallery"]


@app.command()
def gallery(
    out: Annotated[Path, typer.Option(help="The folder that the pages go to.")] = Path("gallery"),
) -> None:
    """Write a page and a drawing for every mechanism, and an index by family."""
    from polyhead.gallery import write_pages

    changed, removed = write_pages(out)
    typer.echo(f"{len(changed)} files written and {len(removed)} removed; the gallery is {out / 'index.md'}")
