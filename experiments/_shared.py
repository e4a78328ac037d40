"""What the experiments share: seeds, intervals, and the file that keeps what came out."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from polyhead.league.interval import mean_and_half_width
from polyhead.report.assemble import processor

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "checks"

Numbers = Mapping[str, float]


def machine() -> str:
    """One line about where this runs."""
    return f"{processor()}, one thread; torch {torch.__version__}, python {platform.python_version()}"


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
    file = OUT / Path(sys.argv[0]).with_suffix(".json").name
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
