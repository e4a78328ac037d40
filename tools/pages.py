"""What the tools that write pages of results share: rows of tables, and a page that is kept or checked."""

from __future__ import annotations

import sys
from pathlib import Path


def code(text: str) -> str:
    """As Markdown sets code."""
    return f"`{text}`"


def row(*cells: object) -> str:
    """A row of a table."""
    # a bar would end the cell, in code too
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def plural(number: int, what: str) -> str:
    """A number of things."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def settle(file: Path, text: str, *, check: bool, tool: str) -> int:
    """Write a page, or say whether it is what would be written; the exit status."""
    if check:
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            return 0
        print(f"error: {file} is not what the results say; run python {tool}", file=sys.stderr)
        return 1
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="\n")
    print(file)
    return 0
