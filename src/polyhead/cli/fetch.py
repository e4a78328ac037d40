"""`polyhead fetch`: the small real models."""

from __future__ import annotations

from typing import Annotated

import typer

from polyhead.cli.group import app

__all__ = ["fetch"]


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="smollm2, minilm; both by default.")] = None,
) -> None:
    """Fetch the small real models that the report, the tests and the examples use, and say where they are."""
    from polyhead.hf.fetch import DEMO_MODELS, demo_model

    for name in names or DEMO_MODELS:
        typer.echo(f"{name}: {demo_model(name, announce=typer.echo)}")
