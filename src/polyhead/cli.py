"""The command line: `polyhead report`, `catalog`, `show`, `papers`, `bench`, `fetch`.

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
    missing: Annotated[bool, typer.Option("--missing", help="Only papers that are not built yet.")] = False,
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


@app.command()
def catalog(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List every mechanism that can be built by name."""
    from polyhead.mechanisms import registry

    entries = registry.catalog()
    if as_json:
        rows = [_entry_facts(entry) for entry in entries]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    table = Table("name", "paper", "family", "supports", "what it is", box=None, pad_edge=False)
    for entry in entries:
        supports = ", ".join(sorted(entry.supports))
        table.add_row(entry.name, entry.paper or "-", entry.family, supports, Text(entry.summary))
    _console().print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A mechanism, as `polyhead catalog` lists it, or an alias.")],
    dim: Annotated[int, typer.Option(help="Model width for the cost.")] = 512,
    heads: Annotated[int, typer.Option(help="Query heads for the cost.")] = 8,
    length: Annotated[int, typer.Option(help="Sequence length for the cost.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show one mechanism: paper, equation, what it supports, options, cost and file."""
    from polyhead.mechanisms import registry

    entry = registry.entry(name)
    module: Any = registry.build(entry.name, dim=dim, heads=heads, device="meta")
    cost = module.cost(length=length)
    if as_json:
        typer.echo(
            json.dumps(_entry_facts(entry) | {"cost": dataclasses.asdict(cost)}, ensure_ascii=False, indent=1)
        )
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("name", ", ".join((entry.name, *entry.aliases)))
    table.add_row("what it is", Text(entry.summary))
    table.add_row("paper", Text(_citation(entry)))
    table.add_row("family", entry.family)
    table.add_row("equation", Text(entry.equation))
    table.add_row("supports", ", ".join(sorted(entry.supports)))
    table.add_row("options", Text("\n".join(_option_lines(entry.config))))
    table.add_row("cost", Text(f"at dim={dim}, heads={heads}, length={length}:\n{cost}"))
    table.add_row("file", entry.file)
    _console().print(table)


def _citation(entry: Any) -> str:
    """The paper of a catalogue entry, with number and address where `polyhead papers` has them."""
    from polyhead.papers import paper

    if entry.paper is None:
        return str(entry.title)
    source = paper(entry.paper)
    return " · ".join(part for part in (source.number, f"{source.title} ({source.year})", source.url) if part)


def _entry_facts(entry: Any) -> dict[str, Any]:
    """The facts of a catalogue entry as plain data."""
    facts = {
        key: getattr(entry, key)
        for key in ("name", "paper", "title", "family", "summary", "equation", "file")
    }
    return facts | {
        "aliases": list(entry.aliases),
        "supports": sorted(entry.supports),
        "options": _option_lines(entry.config),
    }


def _option_lines(config: type) -> list[str]:
    """The fields of a configuration as they would be written: `kv_heads: int = 2`."""
    lines = []
    for field in dataclasses.fields(config):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        lines.append(f"{field.name}: {kind}{default}")
    return lines


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
