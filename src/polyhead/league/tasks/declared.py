"""What a task says of itself, held against what a league can work with, before anything is made of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields

from polyhead.checks import flag, given, real
from polyhead.errors import ConfigError, PolyheadError
from polyhead.league.tasks.base import Recipe, Sizes, Task

__all__ = ["BESIDE_SCORES", "check", "working"]

_WORDS = {
    "answer": ("symbols", "label", "numbers"),
    "better": ("higher", "lower"),
    "positions": ("rotary", "alibi", "learned", "none"),
    "read_from": ("token", "mean"),
}
# what a row of the standings has besides the scores of the splits
BESIDE_SCORES = (
    *("rank", "contender", "difference", "difference ±", "finished", "diverged", "failed", "parameters"),
    *("flops", "kv bytes per token", "tokens per second", "peak bytes", "positions"),
    *("dim", "heads", "layers", "mlp"),
)


def check(task: Task) -> None:
    """Hold the attributes of a task against what they may be.

    Raises:
        ConfigError: one of them is absent, or not what it must be.
    """
    with working(task):
        for attribute in ("name", "summary", "metric"):
            value = getattr(task, attribute)
            if not isinstance(value, str):
                raise ConfigError(f"task {task.name}: {attribute} must be a text; got {given(value)}")
        for attribute, allowed in _WORDS.items():
            value = getattr(task, attribute)
            if value not in allowed:
                raise ConfigError(
                    f"task {task.name}: {attribute} must be one of {', '.join(allowed)}; got {given(value)}"
                )
        flag(f"task {task.name}: causal", task.causal)
        for attribute, kind in (("sizes", Sizes), ("recipe", Recipe)):
            value = getattr(task, attribute)
            if not isinstance(value, kind):
                raise ConfigError(
                    f"task {task.name}: {attribute} must be a {kind.__name__}; got {given(value)}"
                )
        _check_growth(task)
        _check_splits(task)


def _check_growth(task: Task) -> None:
    if not _texts(task.grows):
        raise ConfigError(f"task {task.name}: grows must be a tuple of fields; got {given(task.grows)}")
    own = {field.name: getattr(task, field.name) for field in fields(task)}
    for name in task.grows:
        if not real(own.get(name)):
            said = (
                f"it is {given(own[name])}" if name in own else f"its fields are {', '.join(own) or 'none'}"
            )
            raise ConfigError(
                f"task {task.name}: grows names {name!r}, which must be a field, a number; {said}"
            )


def _check_splits(task: Task) -> None:
    if not _texts(task.splits) or "validation" not in task.splits:
        raise ConfigError(
            f"task {task.name}: splits must be a tuple of texts with 'validation' among them; got "
            f"{given(task.splits)}"
        )
    columns = [*BESIDE_SCORES, *task.splits, *(f"{split} ±" for split in task.splits)]
    twice = [split for split in task.splits if columns.count(split) > 1]
    if twice:
        raise ConfigError(
            f"task {task.name}: the split {twice[0]!r} would be a second column of this name in the table; "
            "call it something else"
        )


def _texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(one, str) for one in value)


@contextlib.contextmanager
def working(task: Task) -> Iterator[None]:
    """Where code of a task runs: what it raises is a line that names the task."""
    try:
        yield
    except PolyheadError:
        raise
    except Exception as error:
        why = str(error).partition("\n")[0]
        name = getattr(task, "name", type(task).__name__)
        raise ConfigError(f"task {name}: it does not work: {type(error).__name__}: {why}") from error
