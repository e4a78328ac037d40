"""The console that tables are printed on."""

from __future__ import annotations

import sys

from rich.console import Console

__all__ = ["wide_console"]


def wide_console(*, stderr: bool = False, width: int = 160) -> Console:
    """A console as wide as the terminal, or wide enough for whole rows when the output goes elsewhere.

    Args:
        stderr: whether it prints to standard error. Default: standard output.
        width: columns where there is no terminal. Default: 160.
    """
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else width, highlight=False)
