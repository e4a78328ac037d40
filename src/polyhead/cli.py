"""The command line: `polyhead report`, `compare`, `tasks`, `catalog`, `show`, `gallery`, `papers`, `bench`,
`fetch`.

Each command is thin: it reads options, calls the part of the library that does the work, and prints. That
part is imported inside the command, so that no command pays for another's. An error that Polyhead raises on
purpose ends the program with one line on standard error and exit code 2, Ctrl-C with exit code 130.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from polyhead import __version__
from polyhead.errors import PolyheadError

__all__ = ["app"]


def _console(stderr: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough for whole rows when the output goes elsewhere."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 160, highlight=False)


class _Commands(TyperGroup):
    """The commands, with the one place where errors become lines and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PolyheadError as error:
            message = Text(f"error: {error}", style="bold red")
            _console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _console(stderr=True).print("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="polyhead",
    cls=_Commands,
    help="Multi-head attention: look inside every head, and prove what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"polyhead {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Multi-head attention: look inside every head, and prove what it costs."""


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
        rows = [dataclasses.asdict(paper) | {"built_in": list(files)} for paper, files in chosen]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    table = Table("paper", "name", "known as", "year", "title", "built in", box=None, pad_edge=False)
    for paper, files in chosen:
        where = Text("\n".join(files) or "-", style="green" if files else "dim")
        table.add_row(
            paper.number, Text(paper.name), Text(paper.short), str(paper.year), Text(paper.title), where
        )
    _console().print(table)
    typer.echo(f"{len(chosen)} papers, {sum(bool(files) for _, files in chosen)} built")


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
        typer.echo(json.dumps([facts_of(entry).to_json() for entry in found], ensure_ascii=False, indent=1))
        return
    table = Table("name", "paper", "family", "supports", "KV bytes", "what it is", box=None, pad_edge=False)
    table.columns[4].justify = "right"
    for entry in found:
        patterns = "all" if entry.supports == mechanisms.PATTERNS else ", ".join(sorted(entry.supports))
        kept = f"{entry.cost.kv_bytes_per_token:,}"
        table.add_row(entry.name, entry.paper or "-", entry.family, patterns, kept, Text(entry.summary))
    _console().print(table)
    typer.echo(f"{len(found)} of {len(every)} mechanisms; KV bytes are those of a token at {Size()}")


def _print_facets(as_json: bool) -> None:
    from polyhead.mechanisms import FACETS

    if as_json:
        typer.echo(json.dumps(FACETS, ensure_ascii=False, indent=1))
        return
    table = Table("facet", "value", "means", box=None, pad_edge=False)
    for name, values in FACETS.items():
        for n, (value, meaning) in enumerate(values.items()):
            table.add_row("" if n else name, value, Text(meaning))
    _console().print(table)


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
        typer.echo(json.dumps(shown, ensure_ascii=False, indent=1))
        return
    facets = (f"{axis}: {', '.join(entry.facets.values(axis))}" for axis in entry.facets.items())
    twin = "none" if facts.twin is None else f"{facts.twin}, in {facts.twin_file}"
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
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
        ("code", f"{facts.build}, in {entry.file}"),
        ("naive twin", twin + ("" if source or facts.twin is None else " (--source prints it)")),
        ("paper", facts.citation),
    ):
        table.add_row(label, Text(content))
    _console().print(table)
    if source and facts.twin_source is not None:
        typer.echo(f"\n{facts.twin_source.rstrip()}")


@app.command()
def gallery(
    out: Annotated[Path, typer.Option(help="The folder that the pages go to.")] = Path("gallery"),
) -> None:
    """Write a page and a drawing for every mechanism, and an index by family."""
    from polyhead.gallery import write_pages

    changed, removed = write_pages(out)
    typer.echo(f"{len(changed)} files written and {len(removed)} removed; the gallery is {out / 'index.md'}")


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
    """Train mechanisms side by side at one budget, and write a leaderboard."""
    from polyhead.leaderboard import job
    from polyhead.league import tasks

    found = tasks.with_data(task, data)
    name, limit = _budget(budget)
    job.run(
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
        console=_console(),
    )


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
        rows = [
            {"name": kind.name, "summary": kind.summary, "metric": kind.metric, "better": kind.better}
            for kind in TASKS.values()
        ]
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("name", "what is asked", "score", "better", box=None, pad_edge=False)
    for kind in TASKS.values():
        table.add_row(kind.name, Text(kind.summary), kind.metric, kind.better)
    _console().print(table)


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
        table = Table("name", "what it measures", box=None, pad_edge=False)
        for one in benchmarks.find():
            table.add_row(one.name, Text(one.summary))
        _console().print(table)
        return
    for one in benchmarks.select(names or ()):
        benchmarks.run(one, device=device, save=save)


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="smollm2, minilm; both by default.")] = None,
) -> None:
    """Fetch the small real models that the report, the tests and the examples use, and say where they are."""
    from polyhead.hf.fetch import DEMO_MODELS, demo_model

    for name in names or DEMO_MODELS:
        typer.echo(f"{name}: {demo_model(name, announce=typer.echo)}")


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
