"""Progress bars, and how long each part of the work takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from polyhead.report import data as d

__all__ = ["Stages"]


class Stages:
    """Progress bars, and the seconds that each part of the work takes."""

    def __init__(self, console: Console) -> None:
        self.phases: list[d.Phase] = []
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
        )

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """A part of the work; what it gives is called as advance(detail) or advance(detail, done, total)."""
        start = time.perf_counter()
        task = self._progress.add_task(name, total=total, detail="")

        def advance(detail: str, done: int | None = None, of: int | None = None) -> None:
            if done is None:
                self._progress.update(task, detail=detail, advance=1)
            else:
                self._progress.update(task, detail=detail, completed=done, total=of)

        yield advance
        self._progress.update(task, detail="", total=1, completed=1)
        self.phases.append(d.Phase(name, round(time.perf_counter() - start, 1)))
