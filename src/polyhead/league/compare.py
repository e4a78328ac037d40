"""`compare`: which attention, at a budget, for a kind of task."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext

from polyhead.checks import takes
from polyhead.league.budget import target_of
from polyhead.league.contender import Contender
from polyhead.league.folder import Folder
from polyhead.league.plan import Plan, plan
from polyhead.league.running import Run, check_jobs, run_all
from polyhead.league.standings import Standings
from polyhead.league.tasks.base import Recipe, Sizes, Task
from polyhead.league.training import Look, Outcome
from polyhead.league.worker import order

__all__ = ["compare", "play"]

Told = Callable[[str, int, Look | Outcome], None]


def compare(
    contenders: Sequence[str | Contender],
    task: str | os.PathLike[str] | Task = "recall",
    *,
    budget: str = "params",
    limit: int | None = None,
    steps: int | None = None,
    seeds: int = 3,
    scale: float = 1,
    sizes: Sizes | None = None,
    recipe: Recipe | None = None,
    out: str | os.PathLike[str] | None = None,
    jobs: int | str | None = None,
    threads: int = 1,
    device: str = "cpu",
    progress: Told | None = None,
) -> Standings:
    """Train the same small transformer with each mechanism, at one budget and with one recipe.

        standings = ph.compare(["mha", "grouped_query", "moh:top_k=2"], "recall", out="league")
        print(standings)

    The budget is what plain attention costs at the task's sizes, or `limit`. Every contender sees the same
    questions in the same order, and begins with parameters drawn from the same seeds. Runs are the same to
    the last digit however many are made at once, and whether or not they were cut off on the way.

    Args:
        contenders: mechanisms with options, such as "mha", "moh:top_k=2,qk_norm=True",
            "mha:mask=window(16)", or "mha+static" for layers that take turns.
        task: a name (`polyhead.league.TASKS`), a Python file with a `Task` of your own, or a `Task`.
        budget: "params", "flops" (both within 1 %) or "kv", bytes of the KV cache (exactly; parameters as
            near as they can be, and the table says how far off).
        limit: of the budget; default what plain attention costs.
        steps: optimiser steps; default those of the recipe.
        seeds: runs of every contender.
        scale: how much larger the task is than by default.
        sizes: of the transformer with plain attention; default the task's.
        recipe: how everybody is trained; default the task's.
        out: a folder that keeps every finished run and the state of those under way: the same call goes on
            with it, more contenders and seeds join it. Default: nothing is kept.
        jobs: runs at once in processes of their own, or "ray" for a Ray cluster. Default: in this process,
            one after the other, which alone knows tasks and mechanisms that this process defined, and on a
            CPU does not know the peak memory of a run.
        threads: of torch in a run, on a CPU; the last digits depend on it.
        device: "cpu" or "cuda".
        progress: is told every look at a run and how it ended: label, seed, `Look` or `Outcome`.

    Returns:
        The standings; print them, or ask for `to_frame()`, `to_json()`, `to_csv()`.

    Raises:
        UnknownName: no such task, mechanism or budget; the message names the nearest.
        UnsupportedPattern: a mechanism cannot do the task.
        ConfigError: a value that is not allowed, a budget that no size meets, a folder of another league.
    """
    check_jobs(jobs, task)
    if progress is not None:
        takes("progress", progress, "label", "seed", "what")
    settled = plan(
        contenders,
        task,
        budget=budget,
        limit=limit,
        steps=steps,
        seeds=seeds,
        scale=scale,
        sizes=sizes,
        recipe=recipe,
        threads=threads,
        device=device,
    )
    return play(settled, None if out is None else Folder(out, settled.rules), jobs=jobs, progress=progress)


def play(
    settled: Plan,
    folder: Folder | None = None,
    *,
    jobs: int | str | None = None,
    progress: Told | None = None,
) -> Standings:
    """Do the runs of a plan that a folder does not hold yet, and say how the league stands."""
    rules = settled.rules
    outcomes: dict[tuple[int, int], Outcome] = {}
    runs = []
    for seed in range(settled.seeds):  # seed by seed, so that a league cut short has all contenders in it
        for n, one in enumerate(settled.contenders):
            held = None if folder is None else folder.outcome(one.contender, seed)
            if held is not None:
                outcomes[n, seed] = held
                continue
            checkpoint = None if folder is None else folder.checkpoint(one.contender, seed)
            runs.append(Run((n, seed), order(rules, one.contender, seed, checkpoint, settled.task_file)))

    def told(key: tuple[int, int], what: Look | Outcome) -> None:
        if progress is not None:
            progress(settled.contenders[key[0]].contender.label, key[1], what)

    for key, outcome in outcomes.items():
        told(key, outcome)
    alone = folder.held() if folder is not None and runs else nullcontext()
    # whatever is raised here, no worker stays behind
    with alone, closing(run_all(runs, jobs, told)) as ended:
        for key, outcome in ended:
            outcomes[key] = outcome
            if folder is not None and outcome.status != "failed":
                folder.keep(settled.contenders[key[0]].contender, key[1], outcome)
            told(key, outcome)
    target = target_of(rules.task, rules.sizes, rules.budget, rules.limit)
    return Standings(rules, target, settled.contenders, outcomes, settled.seeds)
