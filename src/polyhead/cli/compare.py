"""`polyhead compare` and `polyhead tasks`: a league of mechanisms, and what it can train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from polyhead.cli.group import app
from polyhead.cli.printing import print_json, print_table, table
from polyhead.errors import PolyheadError

__all__ = ["compare", "tasks"]


@app.command()
def compare(
    contenders: Annotated[
        list[str],
        typer.Argument(
            help="Mechanisms with options: mha, moh:top_k=2, 'mha:mask=window(16)', mha+taylor2 in turn."
        ),
    ],
    task: Annotated[str, typer.Option(help="A task by name, or a Python file that defines one.")] = "recall",
    budget: Annotated[
        str,
        typer.Option(
            help="What is equal for all: params, flops or kv, as of plain attention; or params=200000."
        ),
    ] = "params",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of training; by default the task's.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every contender.")] = 3,
    out: Annotated[
        Path, typer.Option(help="The folder of the league; the same command goes on with it.")
    ] = Path("league"),
    scale: Annotated[float, typer.Option(help="How much larger the task is than by default.")] = 1.0,
    dim: Annotated[int | None, typer.Option(help="Width of the model with plain attention.")] = None,
    heads: Annotated[int | None, typer.Option(help="Its query heads.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of all models.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    rate: Annotated[float | None, typer.Option(help="The highest learning rate.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A UTF-8 text for the task text, with blank lines between paragraphs.")
    ] = None,
    jobs: Annotated[
        str | None, typer.Option(help="Runs at once, or ray for a Ray cluster; by default one a core.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a run; the last digits depend on it.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train mechanisms side by side at one budget, and write a leaderboard.

    Ends with exit code 1 where a run failed; one that diverged is a result.
    """
    from polyhead.leaderboard import job
    from polyhead.league import tasks

    found = tasks.with_data(task, data)
    name, limit = _budget(budget)
    standings = job.run(
        contenders,
        task=found,
        budget=name,
        limit=limit,
        steps=steps,
        seeds=seeds,
        scale=scale,
        sizes=tasks.changed(tasks.find(found).sizes, dim=dim, heads=heads, layers=layers),
        recipe=tasks.changed(tasks.find(found).recipe, batch=batch, rate=rate),
        out=out,
        jobs=int(jobs) if jobs is not None and jobs.isdecimal() else jobs,
        threads=threads,
        device=device,
    )
    if any(row.count("failed") for row in standings.rows):
        raise typer.Exit(1)


def _budget(text: str) -> tuple[str, int | None]:
    """`params`, or `params=200000`, as a name and a number."""
    name, equals, said = text.partition("=")
    try:
        return name, int(said.replace(",", "").replace("_", "")) if equals else None
    except ValueError:
        raise PolyheadError(f"--budget takes a name such as params, or params=200000; got {text!r}") from None


@app.command()
def tasks(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the tasks that `compare` trains on."""
    from polyhead.league import TASKS

    if as_json:
        print_json(
            [
                {"name": kind.name, "summary": kind.summary, "metric": kind.metric, "better": kind.better}
                for kind in TASKS.values()
            ]
        )
        return
    rows = table("name", "what is asked", "score", "better")
    for kind in TASKS.values():
        rows.add_row(kind.name, Text(kind.summary), kind.metric, kind.better)
    print_table(rows)
