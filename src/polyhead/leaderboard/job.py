"""The job behind `polyhead compare`: settle, train with progress bars, write the leaderboard.

Everything that can be wrong with the call is found before anything is trained. Every run that ends is kept at
once, so that the same command goes on where it was cut off.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from polyhead.console import wide_console
from polyhead.leaderboard.write import require, write_leaderboard
from polyhead.league import Look, Outcome, Plan, Recipe, Sizes, Standings, plan
from polyhead.league.compare import play
from polyhead.league.folder import Folder
from polyhead.league.running import check_jobs
from polyhead.league.standings import known
from polyhead.league.tasks.base import Task

__all__ = ["run"]


def run(
    contenders: Sequence[str],
    *,
    task: str | Task = "recall",
    budget: str = "params",
    limit: int | None = None,
    steps: int | None = None,
    seeds: int = 3,
    scale: float = 1,
    sizes: Sizes | None = None,
    recipe: Recipe | None = None,
    out: str | os.PathLike[str] = "league",
    jobs: int | str | None = None,
    threads: int = 1,
    device: str = "cpu",
    console: Console | None = None,
) -> Standings:
    """Train the contenders side by side, print the leaderboard and write it into a folder.

    Args:
        contenders, task, budget, limit, steps, seeds, scale, sizes, recipe, threads, device: see
            `polyhead.compare`.
        out: the folder of the league.
        jobs: runs at once, or "ray". Default: as many as there are cores for, one on CUDA.
        console: where it is printed; progress goes to standard error. Default: standard output.

    Raises:
        PolyheadError: something is wrong with the call; nothing was trained.
    """
    console = wide_console() if console is None else console
    require()
    if jobs is None:
        jobs = max(1, (os.cpu_count() or 1) // threads) if type(threads) is int and threads > 0 else 1
        jobs = 1 if device.startswith("cuda") else jobs
    check_jobs(jobs, task)
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
    folder = Folder(out, settled.rules)
    start = time.perf_counter()
    with _Bars(settled) as bars:
        standings = play(settled, folder, jobs=jobs, progress=bars.told)
    page = write_leaderboard(standings, folder.path)
    console.print(standings.table())
    for name, score in standings.yardsticks.items():
        console.print(f"{name}: {known(score)}", markup=False)
    if len(standings.made_with) > 1:
        console.print(
            "runs come from different places, so their last digits may differ: "
            + "; ".join(standings.made_with),
            markup=False,
        )
    why = Counter(
        one.note for row in standings.rows for one in row.outcomes.values() if one.status == "failed"
    )
    for note, count in why.items():
        said = f"{count} run{'' if count == 1 else 's'} failed: {note}"
        console.print(said, style="bold red", markup=False, soft_wrap=True)
    took = time.perf_counter() - start
    console.print(f"{took:.0f} s; the leaderboard is {_shown(page)}", markup=False, soft_wrap=True)
    return standings


def _shown(page: Path) -> Path:
    try:
        return page.relative_to(Path.cwd())
    except ValueError:
        return page


class _Bars:
    """A bar for each contender, over the steps of all of its runs."""

    def __init__(self, settled: Plan) -> None:
        self._steps = settled.rules.recipe.steps
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),  # a label may hold [brackets]
            BarColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._done: dict[tuple[str, int], int] = {}
        self._bars = {
            one.contender.label: self._progress.add_task(
                one.contender.label, total=self._steps * settled.seeds, detail=""
            )
            for one in settled.contenders
        }

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def told(self, label: str, seed: int, what: Look | Outcome) -> None:
        """A look at a run, or how it ended."""
        if isinstance(what, Look):
            steps, detail = what.step, f"seed {seed}: {what.score:.4f}"
        else:
            steps, score = self._steps, what.scores.get("validation", math.nan)
            detail = (
                f"seed {seed}: {score:.4f}" if what.status == "finished" else f"seed {seed} {what.status}"
            )
        self._done[label, seed] = steps
        done = sum(count for (name, _), count in self._done.items() if name == label)
        self._progress.update(self._bars[label], completed=done, detail=detail)
