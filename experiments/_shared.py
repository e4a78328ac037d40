"""What the experiments share: seeds, intervals, and the file that keeps what came out."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from polyhead.league import Batch, Recipe, Task
from polyhead.league.interval import mean_and_half_width
from polyhead.league.seeds import seed_of
from polyhead.machine import processor

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "checks"

Numbers = Mapping[str, float]


def machine() -> str:
    """One line about where this runs."""
    return f"{processor()}, one thread; torch {torch.__version__}, python {platform.python_version()}"


def learn(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    seed: int,
    *,
    loss: Callable[[Batch], Tensor],
    around: Callable[[int, Batch], AbstractContextManager[object]] = lambda step, batch: nullcontext(),
) -> list[float]:
    """Train as a league does; every step is made within `around(step, batch)`.

    Returns:
        The norm of every step's gradient, before clipping.
    """
    learned = list(model.parameters())
    groups = [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": recipe.decay},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    steps = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)
    norms = []
    model.train()
    for number in range(recipe.steps):
        torch.manual_seed(seed_of("step", seed, number))
        batch = task.batch("train", number, recipe.batch, seed)
        with around(number, batch):
            steps.zero_grad(set_to_none=True)
            loss(batch).backward()
            norm = nn.utils.clip_grad_norm_([p for p in learned if p.grad is not None], recipe.clip)
            norms.append(float(norm))
            for group in steps.param_groups:
                group["lr"] = recipe.rate_at(number)
            steps.step()
    return norms


@torch.no_grad()
def score(forward: Callable[[Batch], Tensor], task: Task, size: int, batches: int) -> float:
    """The task's score on its first validation batches; the model stays in the mode that it is in."""
    points = weights = 0.0
    for number in range(batches):
        batch = task.batch("validation", number, size, 0)
        one, by = task.measure(forward(batch).float(), batch)
        points, weights = points + float(one.sum()), weights + float(by.sum())
    return points / weights


def differences(runs: Iterable[Numbers], pairs: Mapping[str, tuple[str, str]]) -> list[dict[str, float]]:
    """Runs, with differences of their numbers added, so that these get an interval of their own."""
    return [dict(run) | {name: run[a] - run[b] for name, (a, b) in pairs.items()} for run in runs]


def summary(runs: Iterable[Numbers]) -> dict[str, dict[str, float]]:
    """Mean of every number, and half of its 95 % interval over the seeds."""
    found = list(runs)
    means = {name: mean_and_half_width([run[name] for run in found]) for name in found[0]}
    return {name: {"mean": mean, "half": half} for name, (mean, half) in means.items()}


def main(
    doc: str | None, run: Callable[[int], Numbers], pairs: Mapping[str, tuple[str, str]], seeds: int = 3
) -> None:
    """Run an experiment with each seed, print what came out and keep it beside the page of checks.

    Args:
        doc: of the script; its first line says what it is about.
        run: makes the numbers of a seed.
        pairs: differences of numbers that are asked about: name to (which, less which).
        seeds: how many, unless the command line says otherwise.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(15)
    print(machine())
    start = time.process_time()
    runs = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        runs.append(run(seed))
        print(f"seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in runs[-1].items()), flush=True)
    runs = differences(runs, pairs)
    found = summary(runs)
    for name, one in found.items():
        print(f"{name:48s} {one['mean']:+.4f} ± {one['half']:.4f}")
    file = options.out / Path(sys.argv[0]).with_suffix(".json").name
    file.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "about": (doc or "").partition("\n")[0],
        "machine": machine(),
        "cpu_seconds": round(time.process_time() - start),
        "seeds": options.seeds,
        "summary": found,
        "runs": runs,
    }
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8", newline="\n")
    print(file)
