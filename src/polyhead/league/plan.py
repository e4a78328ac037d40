"""What a league is about, settled before anything is trained: everything that its numbers depend on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polyhead.checks import given, several, whole
from polyhead.description import Part, to_json
from polyhead.errors import ConfigError, unknown_name
from polyhead.league import tasks
from polyhead.league.budget import BUDGETS, Fitted, fit, target_of
from polyhead.league.contender import Contender, contender
from polyhead.league.tasks.base import Recipe, Sizes, Task
from polyhead.league.trial import try_contender, try_out
from polyhead.mechanisms import configure

__all__ = ["Plan", "Rules", "plan"]

_MOST_THREADS = 1024


class Rules(Part):
    """What every run of a league shares; runs under other rules do not compare.

    Attributes:
        task: what is learned.
        sizes: of the transformer with plain attention whose cost is the budget.
        recipe: how everybody is trained.
        budget: "params", "flops" or "kv".
        limit: a number that takes the place of what plain attention costs; None for that.
        threads: of torch in every run, on which the last digits depend.
        device: where.
    """

    task: Task
    sizes: Sizes
    recipe: Recipe
    budget: str = "params"
    limit: int | None = None
    threads: int = 1
    device: str = "cpu"


class Plan:
    """Rules, the contenders at their sizes, and how many seeds each is trained with.

    Attributes:
        rules: see `Rules`.
        contenders: in the order in which they were named, at sizes that meet the budget.
        seeds: S; runs are made with the seeds 0..S-1.
        task_file: the Python file that defines the task; None for one that Polyhead brings.
    """

    def __init__(
        self, rules: Rules, contenders: tuple[Fitted, ...], seeds: int, task_file: str | None = None
    ) -> None:
        self.rules, self.contenders, self.seeds, self.task_file = rules, contenders, seeds, task_file


def plan(
    contenders: Sequence[str | Contender],
    task: str | os.PathLike[str] | Task,
    *,
    budget: str = "params",
    limit: int | None = None,
    steps: int | None = None,
    seeds: int = 3,
    scale: float = 1,
    sizes: Sizes | None = None,
    recipe: Recipe | None = None,
    threads: int = 1,
    device: str = "cpu",
) -> Plan:
    """Settle a league: find the task, read the contenders, solve their sizes. Nothing is trained.

    Args:
        contenders: mechanisms with options, as `contender` reads them, or `Contender`s; differences are to
            the first.
        task: a name (`polyhead.league.TASKS`), a Python file with a `Task` of your own, or a `Task`.
        budget: "params", the default, "flops" or "kv": what every contender may cost.
        limit: of the budget, a whole number from 1; default what plain attention costs.
        steps: optimiser steps, from 1; default those of the recipe.
        seeds: runs of every contender, from 1. Default 3.
        scale: how much larger the task is than by default, above 0. Default 1.
        sizes: of the transformer with plain attention; default the task's.
        recipe: how everybody is trained; default the task's.
        threads: of torch in a run, on a CPU. Default 1.
        device: "cpu", the default, or "cuda".

    Returns:
        The rules, and the contenders at sizes that meet the budget.

    Raises:
        UnknownName: no such task, mechanism or budget; the message names the nearest.
        UnsupportedPattern: a mechanism cannot do the task.
        ConfigError: any other value that is not allowed; nothing was trained.
    """
    if torch.get_default_dtype() != torch.float32:
        raise ConfigError(
            f"torch's default dtype is {torch.get_default_dtype()}, and leagues are of torch.float32: call "
            "torch.set_default_dtype(torch.float32) first"
        )
    found = tasks.find(task).scaled(scale)
    if budget not in BUDGETS:
        raise unknown_name("budget", budget, BUDGETS)
    if limit is not None:
        limit = whole(f"budget: {budget}", limit, 1)
    for name, value, kind in (("sizes", sizes, Sizes), ("recipe", recipe, Recipe)):
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name} must be a {kind.__name__}; got {given(value)}")
    if not several(contenders) or isinstance(contenders, Set | Mapping):  # the first is held against all
        raise ConfigError(f"contenders must be names of mechanisms, in an order; got {given(contenders)}")
    read = [one if isinstance(one, Contender) else contender(one) for one in contenders]
    if not read:
        raise ConfigError("contenders must be names of mechanisms, at least one; got none")
    whole("seeds", seeds, 1)
    whole("threads", threads, 1, _MOST_THREADS)
    if steps is not None:
        whole("steps", steps, 1)
    how = found.recipe if recipe is None else recipe
    how = how if steps is None else replace(how, steps=steps)
    base = found.sizes if sizes is None else sizes
    rules = Rules(found, base, how, budget, limit, threads, _device(device))
    twice = {one.label for one in read if sum(one.label == other.label for other in read) > 1}
    if twice:
        raise ConfigError(f"contenders: {', '.join(sorted(twice))} is named more than once")
    for one in read:
        if len(one.names) > base.layers:
            raise ConfigError(
                f"{one.label}: {len(one.names)} mechanisms take turns in {base.layers} layer(s), so the last "
                "would have none; name fewer, or give the model more layers"
            )
    questions = try_out(found, base, how)
    target = target_of(found, base, budget, limit)
    fitted = tuple(fit(found, one, base, budget, target) for one in read)
    _differ(fitted)
    for ready in fitted:
        try_contender(found, ready, questions)
    # absolute: a worker on another machine stands in another folder
    file = None if isinstance(task, Task) or task in tasks.TASKS else str(Path(task).expanduser().absolute())
    return Plan(rules, fitted, seeds, file)


def _differ(fitted: Sequence[Fitted]) -> None:
    """A `ConfigError` where two contenders are the same model under two names."""
    models: list[object] = []
    for one in fitted:
        taken = [one.layers[n % len(one.layers)] for n in range(one.sizes.layers)]
        built = [configure(layer.name, dim=one.sizes.dim, **layer.options) for layer in taken]
        model = one.sizes, [to_json(config) for config in built], [layer.positions for layer in taken]
        if model in models:
            other = fitted[models.index(model)].contender.label
            raise ConfigError(
                f"contenders: {other} and {one.contender.label} are one mechanism with the same options; "
                "leave one out"
            )
        models.append(model)


def _device(name: Any) -> str:
    try:
        found = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device must be cpu or cuda; got {given(name)}") from None
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda; got {given(name)}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: this torch sees {torch.cuda.device_count() or 'no'} CUDA device(s); got {name!r}"
        )
    return str(found)
