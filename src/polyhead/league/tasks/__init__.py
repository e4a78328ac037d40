"""The tasks of the league, and how one is found by name or read from a file of one's own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from polyhead.checks import given, whole
from polyhead.description import Part
from polyhead.errors import ConfigError, PolyheadError, unknown_name
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task
from polyhead.league.tasks.copying import CopyTask
from polyhead.league.tasks.cpm3 import CountMatch3Task
from polyhead.league.tasks.declared import check
from polyhead.league.tasks.digits import DigitsTask
from polyhead.league.tasks.induction import InductionTask
from polyhead.league.tasks.listops import ListOpsTask
from polyhead.league.tasks.nearest import NearestTask
from polyhead.league.tasks.needle import NeedleTask
from polyhead.league.tasks.polynomial import PolynomialTask
from polyhead.league.tasks.recall import RecallTask
from polyhead.league.tasks.regression import RegressionTask
from polyhead.league.tasks.relational import RelationalTask
from polyhead.league.tasks.text import TextTask
from polyhead.own_file import run

__all__ = ["TASKS", "Batch", "Recipe", "Sizes", "Task", "changed", "find", "with_data"]

P = TypeVar("P", bound=Part)

TASKS: dict[str, type[Task]] = {
    kind.name: kind
    for kind in (
        *(RecallTask, NeedleTask, CopyTask, InductionTask),
        *(PolynomialTask, CountMatch3Task, NearestTask, RegressionTask, RelationalTask),
        *(TextTask, DigitsTask, ListOpsTask),
    )
}


def find(task: str | os.PathLike[str] | Task) -> Task:
    """A task by name, one that a Python file defines, or the task itself.

    Raises:
        UnknownName: no task is called so.
        ConfigError: a file that cannot be run, or that does not define one task; a task that says of itself
            what cannot be.
    """
    found = _found(task)
    check(found)
    return found


def _found(task: str | os.PathLike[str] | Task) -> Task:
    if isinstance(task, Task):
        return task
    if isinstance(task, type) or not isinstance(task, str | os.PathLike):
        raise ConfigError(f"task must be a name, a Python file or a Task; got {given(task)}")
    if isinstance(task, os.PathLike) or task.endswith(".py"):
        return _from_file(Path(task).expanduser())
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    return TASKS[task]()


def with_data(task: str, data: str | os.PathLike[str] | None) -> str | Task:
    """A task that reads a text of one's own.

    Raises:
        ConfigError: the task has no text to replace, or the text cannot be read or is too short.
    """
    if data is None:
        return task
    if task != TextTask.name:
        raise ConfigError(f"data: the task {task} makes its own questions; only {TextTask.name} reads a text")
    return TextTask(file=str(Path(data).expanduser().absolute()))  # workers may stand elsewhere


def changed(part: P, **values: Any) -> P:
    """The same but for the values that are not None; the MLPs of `Sizes` follow the width."""
    own = {name: value for name, value in values.items() if value is not None}
    if isinstance(part, Sizes) and "dim" in own and part.mlp is not None:
        own["mlp"] = max(1, round(part.mlp * whole("dim", own["dim"], 1) / part.dim))
    return replace(part, **own) if own else part  # type: ignore[type-var]


def _from_file(file: Path) -> Task:
    module = run(file, kind="task", what="task")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ConfigError(
            f"task: {file} must define one subclass of polyhead.league.Task; it defines {len(found)}"
        )
    try:
        return found[0]()
    except TypeError as error:
        raise ConfigError(f"task: {file}: every field needs a default: {error}") from None
    except PolyheadError:
        raise
    except Exception as error:
        raise ConfigError(f"task: {file}: it cannot be made: {type(error).__name__}: {error}") from error
