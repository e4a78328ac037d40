"""Find and run the benchmarks of a source checkout.

A benchmark is a script in `benchmarks/` whose docstring begins with one line that says what it measures.
It takes `--device cpu|cuda`, checks that the answers are right before it times anything, and prints ratios
against a yardstick measured in the same run. Names that begin with an underscore are shared helpers.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from polyhead.errors import PolyheadError, unknown_name

__all__ = ["Benchmark", "find", "run", "select"]


@dataclass(frozen=True)
class Benchmark:
    """One script: its name, what it measures, and the file."""

    name: str
    summary: str
    file: Path


def _folder() -> Path:
    """The checkout's `benchmarks/`, beside the package's `src/` or in the current folder."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "benchmarks").is_dir() and (root / "pyproject.toml").is_file():
            return root / "benchmarks"
    raise PolyheadError(
        "the benchmarks are part of the source checkout, not of the installed package; "
        "run `polyhead bench` from a checkout of Polyhead"
    )


def find() -> tuple[Benchmark, ...]:
    """Every benchmark, by name."""
    found = []
    for file in sorted(_folder().glob("[!_]*.py")):
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found.append(Benchmark(file.stem, doc.partition("\n")[0], file))
    return tuple(found)


def select(names: Iterable[str]) -> tuple[Benchmark, ...]:
    """The benchmarks with these names, all if there are none; an unknown name is an `UnknownName`."""
    known = {one.name: one for one in find()}
    for name in names:
        if name not in known:
            raise unknown_name("benchmark", name, known)
    return tuple(known[name] for name in names) or tuple(known.values())


def run(benchmark: Benchmark, *, device: str = "cpu", save: Path | None = None) -> None:
    """Run one benchmark in a process of its own, and keep what it prints in `save` if that is given.

    Raises:
        PolyheadError: the script failed; what it had printed so far has been shown, and nothing is kept.
    """
    print(f"== {benchmark.name}: {benchmark.summary}", flush=True)
    command = [sys.executable, "-u", str(benchmark.file), "--device", device]
    printed = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            printed.append(line)
    if process.returncode:
        raise PolyheadError(f"benchmark {benchmark.name!r} failed with exit code {process.returncode}")
    if save is not None:
        _keep("".join(printed), save / f"{benchmark.name}.txt")


def _keep(text: str, file: Path) -> None:
    """Write beside the file and move into place, so that there is never half of it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise PolyheadError(f"{file} cannot be written: {error}; give --save another folder") from error
