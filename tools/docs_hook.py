"""A hook of mkdocs: one API page for each room of the package that exists, and two pages from the root.

The pages follow the source, so a new room is documented without anybody adding a line here or in mkdocs.yml.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "polyhead"

# From what a newcomer calls first down to the ground floor; what is missing here comes last.
ORDER = (
    "attend", "nn", "mechanisms", "reference", "hf", "heads", "head_scores", "cache", "tasks", "report",
    "gallery", "papers", "description", "errors",
)  # fmt: skip
# Not for reading as an API: the command line has its own page, the others are for the package's own use.
SKIPPED = {"__init__", "__main__", "cli", "benchmarks", "checks"}
COPIED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def rooms() -> list[str]:
    """The public rooms of the package, in the order of the pages."""
    found = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    public = {name for name in found - SKIPPED if not name.startswith("_")}
    return sorted(public, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def sections(room: str) -> Iterator[tuple[str, list[str] | None]]:
    """The modules of a room, each with the members to show: None for all of them.

    What a package re-exports is shown once, where it is defined.
    """
    folder = PACKAGE / room
    if not folder.is_dir():
        yield f"polyhead.{room}", None
        return
    files = sorted(
        folder.rglob("*.py"), key=lambda file: (file.parent, file.name != "__init__.py", file.name)
    )
    for file in files:
        parts = ["polyhead", *file.relative_to(PACKAGE).with_suffix("").parts]
        if parts[-1] == "__init__":
            body = ast.parse(file.read_text(encoding="utf-8")).body
            own = [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
            own = [name for name in own if not name.startswith("_")]
            if own or file.parent == folder:
                yield ".".join(parts[:-1]), own
        elif not any(part.startswith("_") for part in parts):
            yield ".".join(parts), None


def page(room: str) -> str:
    """The Markdown of a room's page."""
    parts = [f"# polyhead.{room}\n"]
    for module, members in sections(room):
        top = module == f"polyhead.{room}"
        if not top:
            parts.append(f"\n## {module.removeprefix('polyhead.')}\n")
        parts.append(f"\n::: {module}\n    options:\n      heading_level: {2 if top else 3}\n")
        if members is not None:
            parts.append(f"      members: {members}\n")
    return "".join(parts)


def on_config(config: Any) -> Any:
    """Add the API pages to the navigation."""
    config.nav.append({"API": [{f"polyhead.{room}": f"api/{room}.md"} for room in rooms()]})
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files of the root, as they are in a checkout, lead to the pages made of these."""
    for source, target in COPIED.items():
        markdown = markdown.replace(f"(../../{source})", f"(../{target})")
    return markdown


def on_files(files: Files, config: Any) -> Files:
    """Add the pages themselves."""
    for room in rooms():
        files.append(File.generated(config, f"api/{room}.md", content=page(room)))
    for source, target in COPIED.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    return files
