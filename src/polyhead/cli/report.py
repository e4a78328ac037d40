"""`polyhead report`: what each head of a model does, and what its KV cache can lose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyhead.cli.group import app
from polyhead.errors import PolyheadError

__all__ = ["report"]


@app.command()
def report(
    model: Annotated[str, typer.Argument(help="smollm2, minilm, a model folder, a GGUF file, or a hub id.")],
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to look at the heads on; an English sample by default.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The folder that report.html, report.json and plots go to.")
    ] = Path("report"),
    length: Annotated[int | None, typer.Option(min=1, help="How many tokens of the text to read.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many random choices of heads to compare with.")] = 3,
    seed: Annotated[int, typer.Option(help="The first of these seeds.")] = 0,
    fractions: Annotated[
        str | None, typer.Option(help="Shares of KV heads to keep in full, such as 0.5,0.2,0.1.")
    ] = None,
    sink: Annotated[int, typer.Option(min=0, help="First tokens that all other heads keep.")] = 4,
    window: Annotated[int, typer.Option(min=1, help="Recent tokens that all other heads keep.")] = 256,
    losses: Annotated[
        float, typer.Option(help="Share of the hidden facts that a recommended cache may lose.")
    ] = 0.05,
    quick: Annotated[
        bool, typer.Option("--quick", help="A reduced run: works in the same way, says less.")
    ] = False,
    no_savings: Annotated[
        bool, typer.Option("--no-savings", help="Look at heads only, try no caches.")
    ] = False,
) -> None:
    """Find out what each head of a model does, and what its KV cache can lose without losing answers."""
    from polyhead.report import job

    job.run(
        model,
        text=text,
        out=out,
        length=length,
        seeds=seeds,
        seed=seed,
        fractions=None if fractions is None else _shares(fractions),
        sink=sink,
        window=window,
        losses=losses,
        quick=quick,
        savings=not no_savings,
    )


def _shares(text: str) -> list[float]:
    """`0.5,0.2` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PolyheadError(
            f"--fractions takes numbers between 0 and 1, such as 0.5,0.2,0.1; got {text!r}"
        ) from None
