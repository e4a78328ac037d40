"""The app that commands register with, and the one place where their errors become lines and exit codes.

An error that Polyhead raises on purpose ends the program with one line on standard error and exit code 2,
Ctrl-C with exit code 130. A sign that the output's encoding does not have is a question mark and no error.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from polyhead import __version__
from polyhead.console import wide_console
from polyhead.errors import PolyheadError

__all__ = ["app"]


class _Commands(TyperGroup):
    """The commands, and how they end when something is wrong."""

    def invoke(self, ctx: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):  # standard error does so by itself
            sys.stdout.reconfigure(errors="replace")
        try:
            return super().invoke(ctx)
        except PolyheadError as error:
            message = Text(f"error: {error}", style="bold red")
            wide_console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            wide_console(stderr=True).print("interrupted")
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
