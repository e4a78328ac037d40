"""`polyhead sparsify`: selectors on a pretrained model, side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from polyhead.cli.group import app
from polyhead.errors import PolyheadError

__all__ = ["sparsify"]


@app.command()
def sparsify(
    model: Annotated[str, typer.Argument(help="smollm2, a model folder, a GGUF file, or a hub id.")],
    methods: Annotated[
        str | None,
        typer.Option(help="Such as prism,proxy_attn, or a file with a METHOD; by default all but oracles."),
    ] = None,
    shares: Annotated[
        str | None, typer.Option(help="Shares of the keys that are read, such as 0.1,0.25.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of the texts that facts are hidden in, such as 1024,8192.")
    ] = None,
    facts: Annotated[int | None, typer.Option(help="Facts in a text, at most 8; by default 8.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts of a length and kind.")] = 1,
    rounds: Annotated[
        int | None, typer.Option(min=0, help="How often each method is timed; 0: never. By default 3.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws facts and depths.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder; the command goes on with it.")] = Path("sparsify"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A reduced run: works in the same way, says less.")
    ] = False,
) -> None:
    """Read less of the context: which selector keeps the answers, and what it saves."""
    from polyhead.sparsify import job

    job.run(
        model,
        methods=None if methods is None else methods.split(","),
        shares=None if shares is None else _numbers("--shares", shares, float, "0.1,0.25"),
        lengths=None if lengths is None else _numbers("--lengths", lengths, int, "1024,8192"),
        facts=facts,
        texts=texts,
        rounds=rounds,
        seed=seed,
        out=out,
        quick=quick,
    )


def _numbers(option: str, text: str, kind: Callable[[str], Any], such: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise PolyheadError(f"{option} takes numbers, such as {such}; got {text!r}") from None
