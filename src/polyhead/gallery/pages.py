"""The gallery: a Markdown page and a drawing for every mechanism, and an index by family.

    polyhead gallery --out docs/gallery

The pages are made of the registry alone. They are committed, so that they can be read where the code is
read; a test says when they no longer are what the registry gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from polyhead.errors import PolyheadError
from polyhead.gallery.facts import Facts, Size, facts_of
from polyhead.gallery.picture import svg
from polyhead.mechanisms.facets import FACETS
from polyhead.mechanisms.registry import Entry, catalog

__all__ = ["pages", "write_pages"]

_MADE = (
    "<!-- Made by `polyhead gallery` from the registry: change the mechanism, then run `make gallery`. -->\n"
)


def pages(entries: Iterable[Entry] | None = None) -> dict[str, str]:
    """The files of the gallery, by name; of all mechanisms unless `entries` says of which."""
    facts = [facts_of(entry) for entry in (catalog() if entries is None else entries)]
    files = {"index.md": _index(facts)}
    for one in facts:
        files[f"{one.entry.name}.md"] = _page(one)
        files[f"{one.entry.name}.svg"] = svg(one.flow, f"Data flow of {one.entry.name}")
    return files


def write_pages(folder: str | Path, files: dict[str, str] | None = None) -> tuple[list[str], list[str]]:
    """Bring a folder up to date.

    Files of mechanisms that are no more are removed; so a folder that does not look like an earlier gallery
    is left alone.

    Returns:
        names of the files that changed, and of those that were removed.

    Raises:
        PolyheadError: the folder holds something else.
    """
    folder, files = Path(folder), pages() if files is None else files
    if folder.exists() and not folder.is_dir():
        raise PolyheadError(f"{folder} is a file; name a folder for the gallery")
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(name for name in present if not _is_ours(folder / name))
    if foreign:
        raise PolyheadError(
            f"{folder} does not look like a gallery: it holds {', '.join(foreign[:5])}; "
            "name a folder that is empty or holds an earlier gallery"
        )
    folder.mkdir(parents=True, exist_ok=True)
    changed = []
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            beside = folder / f".{name}.part"
            beside.write_text(content, encoding="utf-8", newline="\n")
            beside.replace(path)
            changed.append(name)
    removed = sorted(present - files.keys())
    for name in removed:
        (folder / name).unlink()
    return changed, removed


def _is_ours(file: Path) -> bool:
    if not file.is_file() or file.suffix not in (".md", ".svg", ".part"):
        return False
    return file.suffix != ".md" or file.read_text(encoding="utf-8", errors="replace").startswith(_MADE)


def _index(facts: list[Facts]) -> str:
    size = facts[0].size if facts else Size()
    lines = [
        _MADE,
        "# Gallery\n",
        f"The {len(facts)} mechanisms of the catalogue, by family, as `ph.build(NAME, dim=..., heads=...)` "
        f"makes them: equation, data flow, cost, naive twin and paper of each. Numbers are those of "
        f"{size}, with all options at their defaults; FLOPs are those of the matrix products of a whole "
        "forward pass, over all pairs of tokens.\n",
        "`ph.catalog` and `polyhead catalog` choose among them: "
        '`polyhead catalog --supports causal_cross --kv-bytes "<512"`.\n',
    ]
    for family in sorted({one.entry.family for one in facts}):
        lines.append(f"## {family}\n")
        lines.append(
            "| mechanism | what it is | parameters | FLOPs | KV bytes per token | patterns | paper |"
        )
        lines.append("| --- | --- | ---: | ---: | ---: | --- | --- |")
        for one in facts:
            if one.entry.family == family:
                lines.append(_row(one))
        lines.append("")
    return "\n".join(lines)


def _row(one: Facts) -> str:
    entry, cost = one.entry, one.cost
    cells = (
        f"[{entry.name}]({entry.name}.md)",
        _prose(entry.summary),
        f"{cost.parameters:,}",
        f"{cost.flops / 1e9:.3g} G",
        f"{cost.kv_bytes_per_token:,}",
        "all" if len(entry.supports) == 4 else ", ".join(sorted(entry.supports)),
        _link(one, entry.paper or "-"),
    )
    return f"| {' | '.join(cells)} |"


def _page(one: Facts) -> str:
    entry, cost = one.entry, one.cost
    written = ", ".join(f"`src/polyhead/{file}`" for file in entry.files)
    aliases = f" (also {', '.join(f'`{alias}`' for alias in entry.aliases)})" if entry.aliases else ""
    lines = [
        _MADE,
        f"# {entry.name}\n",
        f"{_prose(_sentence(entry.summary))} Family: {entry.family}. `{one.build}`{aliases}\n",
        f"Paper: {_link(one, one.citation)}\n",
        f"```\n{entry.equation}\n```\n",
        "## Data flow\n",
        f"![Data flow of {entry.name}]({entry.name}.svg)\n",
        "## Cost\n",
        f"At {one.size}, with all options at their defaults:\n",
        "| parameters | FLOPs | of which projections | scores | values | KV bytes per token |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| {cost.parameters:,} | {_giga(cost.flops)} | {_giga(cost.projections)} | {_giga(cost.scores)} "
        f"| {_giga(cost.values)} | {cost.kv_bytes_per_token:,} |\n",
        "## What it can do\n",
        f"Patterns: {', '.join(sorted(entry.supports))}. Graph breaks under `torch.compile`: "
        f"{entry.graph_breaks}.\n",
        "| axis | value | which means |",
        "| --- | --- | --- |",
        *(
            f"| {axis} | {value} | {_prose(FACETS[axis][value])} |"
            for axis in FACETS
            for value in entry.facets.values(axis)
        ),
        "",
        "## Options\n",
        "| option | type | default |",
        "| --- | --- | --- |",
        *(
            f"| `{option.name}` | `{_cell(option.kind)}` | {_default(option.default)} |"
            for option in one.options
        ),
        "",
        "## Code\n",
        f"{written}; its naive twin, `{one.twin}`, is the equation as plain float64 code "
        f"(`src/polyhead/{one.twin_file}`):\n"
        if one.twin
        else f"{written}.\n",
    ]
    if one.twin_source:
        lines.append(f"```python\n{one.twin_source.rstrip()}\n```\n")
    return "\n".join(lines)


def _sentence(summary: str) -> str:
    return summary[:1].upper() + summary[1:].rstrip(".") + "."


def _giga(number: int) -> str:
    return f"{number / 1e9:.4g} G"


def _cell(content: str) -> str:
    return content.replace("|", "\\|")


def _prose(content: str) -> str:
    """Plain text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_<\[|])", r"\\\1", content)


def _default(default: str | None) -> str:
    return "to be given" if default is None else f"`{_cell(default)}`"


def _link(one: Facts, words: str) -> str:
    if one.paper is None or one.paper.url is None:
        return words
    words = words.replace(f" · {one.paper.url}", "")
    return f"[{words}]({one.paper.url})"
