"""The command line: `polyhead report`, `compare`, `tasks`, `catalog`, `show`, `gallery`, `papers`, `bench`,
`fetch`, `sparsify`.

Each command is thin: it reads options, calls the part of the library that does the work, and prints. That
part is imported inside the command, so that no command pays for another's. A new command is a file here
that decorates a function with `@app.command()`, and its name in `_FILES`.
"""

from __future__ import annotations

import importlib

from polyhead.cli.group import app

__all__ = ["app"]

# In the order of `polyhead --help`; a file registers its commands with the app when it is imported.
_FILES = (
    "papers",
    "catalog",
    "gallery",
    "compare",
    "bench",
    "fetch",
    "report",
    "sparsify",
)

for _file in _FILES:
    importlib.import_module(f"polyhead.cli.{_file}")
