"""Imports point down only: the storeys of the house, as docs/design.md draws them, enforced on the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import polyhead

PACKAGE = Path(polyhead.__file__).parent

# From the roof to the ground; within a storey there is no order.
STOREYS = (
    ("__init__", "__main__"),
    ("cli", "report", "gallery", "leaderboard", "sparsify"),
    ("benchmarks", "papers", "intensity", "cache", "heads", "tasks", "league"),
    ("hf",),
    ("mechanisms",),
    ("nn",),
    ("attend",),
    ("reference",),
    (
        *("head_scores", "description", "checks", "errors", "data", "shapes"),
        *("console", "machine", "memory", "folder", "own_file"),
    ),
)
LEVEL = {room: -depth for depth, storey in enumerate(STOREYS) for room in storey}

# What may point up all the same: `Profile.to_html` hands itself to the page, because users look for it there.
UPWARD = {("polyhead.heads.profile", "report")}

# The naive twins are the oracle of the tests: they share nothing with what they are held against.
REFERENCE_MAY_IMPORT = {"reference", "errors"}


def room(module: str) -> str:
    """The room of a module: `polyhead.attend.masks` lives in `attend`, `polyhead` itself is `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def is_type_checking(node: ast.If) -> bool:
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imported(source: str, module: str, is_package: bool, rooms: set[str]) -> Iterator[tuple[str, int]]:
    """Every room of polyhead that this source imports, also inside functions, with the line."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and is_type_checking(child):
                for other in child.orelse:
                    yield from walk(other)
                continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "polyhead":
                    yield room(alias.name), node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([base] if base else [])])
            if base == "polyhead":
                for alias in node.names:  # a room, or a public name that the package itself offers
                    yield alias.name if alias.name in rooms else "__init__", node.lineno
            elif base.startswith("polyhead."):
                yield room(base), node.lineno


def modules() -> Iterator[tuple[str, Path]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ["polyhead", *file.relative_to(PACKAGE).with_suffix("").parts]
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def rooms_on_disk() -> set[str]:
    found = {path.stem for path in PACKAGE.glob("*.py")}
    return found | {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    here = room(module)
    found = []
    for there, line in imported(source, module, is_package, set(LEVEL)):
        if there == "__init__" and here not in STOREYS[0]:
            # `from polyhead import __version__` is the exception: the package's own facts
            names = {"__version__"}
            statement = source.splitlines()[line - 1]
            if not any(name in statement for name in names):
                found.append(f"{module}:{line} imports the package itself; import from the room that has it")
        elif LEVEL[there] > LEVEL[here]:
            found.append(f"{module}:{line} ({here}) imports {there}, which stands above it")
        elif here == "reference" and there not in REFERENCE_MAY_IMPORT:
            found.append(f"{module}:{line}: reference may import only {sorted(REFERENCE_MAY_IMPORT)}")
    return found


def test_every_room_has_its_storey():
    unknown = rooms_on_disk() - set(LEVEL)
    assert not unknown, f"say in STOREYS (and docs/design.md) where {sorted(unknown)} stand"


def test_imports_point_down():
    found = [
        (module, line)
        for module, file in modules()
        for line in violations(file.read_text(encoding="utf-8"), module, file.name == "__init__.py")
    ]
    allowed = [(m, line) for m, line in found for up in UPWARD if m == up[0] and f"imports {up[1]}," in line]
    assert len(allowed) == len(UPWARD), "an exception of UPWARD is no longer needed"
    assert found == allowed, "\n".join(line for _, line in found)


@pytest.mark.parametrize(
    ("source", "module", "wrong"),
    [
        ("from polyhead.attend import attend", "polyhead.hf.attach", False),
        ("from polyhead.hf import attach", "polyhead.attend.function", True),
        ("def f():\n    import polyhead.report.job", "polyhead.heads.roles", True),
        ("from polyhead import cache", "polyhead.nn.module", True),
        ("from polyhead import attend", "polyhead.report.job", False),
        ("from ..heads import profile", "polyhead.hf.attach", True),
        ("from .tile import Tile", "polyhead.attend.tiles", False),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from polyhead.cli import app",
            "polyhead.nn.module",
            False,
        ),
        ("from polyhead.attend import softmax", "polyhead.reference.mha", True),
        ("from polyhead.description import Part", "polyhead.reference.mha", True),
        ("from polyhead.errors import ConfigError", "polyhead.reference.mha", False),
        ("from polyhead.description import Part", "polyhead.errors", False),
        ("from polyhead import build", "polyhead.heads.profile", True),
        ("from polyhead import __version__", "polyhead.report.job", False),
    ],
)
def test_the_test_sees_what_it_should(source, module, wrong):
    assert bool(violations(source, module)) == wrong
