"""How commands print: tables without lines, and JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer
from rich.table import Table

from polyhead.console import wide_console

__all__ = ["print_json", "print_table", "table"]


def table(*headings: str) -> Table:
    """A table without lines, with these columns; without headings, columns are added to it."""
    return Table(*headings, box=None, pad_edge=False, show_header=bool(headings))


def print_table(rows: Table) -> None:
    """Whole rows on standard output."""
    wide_console().print(rows)


def print_json(data: Any) -> None:
    """Plain data on standard output, as JSON."""
    # where the output lacks a sign, an escape loses nothing
    escaped = "utf" not in (sys.stdout.encoding or "").lower()
    typer.echo(json.dumps(data, ensure_ascii=escaped, indent=1))
