"""Train the leagues of tools/leagues.toml into docs/results/league/, what is not there yet, and their pages.

    python tools/leagues.py                     all of them: hours
    python tools/leagues.py digits recall       some
    python tools/leagues.py text --first 6      the first contenders of one

Every run that ends is kept at once; called again, it goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polyhead.folder import write
from polyhead.leaderboard import job
from polyhead.league import tasks
from polyhead.machine import processor

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results" / "league"


def leagues() -> dict[str, dict[str, Any]]:
    """Every league of tools/leagues.toml, by name."""
    return tomllib.loads((ROOT / "tools" / "leagues.toml").read_text(encoding="utf-8"))


def machine() -> str:
    """One line about where this runs."""
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    return f"{processor()}, {os.cpu_count()} cores; {versions}"


def play(name: str, league: dict[str, Any], first: int | None, jobs: int | None) -> None:
    """One league, or its first contenders."""
    task = replace(tasks.find(league["task"]), **league.get("options", {}))
    budget, _, limit = league.get("budget", "params").partition("=")
    folder = OUT / name
    job.run(
        league["contenders"][:first],
        task=task,
        budget=budget,
        limit=int(limit) if limit else None,
        steps=league.get("steps"),
        seeds=league["seeds"],
        sizes=tasks.changed(task.sizes, dim=league.get("dim"), layers=league.get("layers")),
        out=folder,
        jobs=jobs,
    )
    said, here = folder / "machine.txt", machine()
    earlier = said.read_text(encoding="utf-8").splitlines() if said.is_file() else []
    if here not in earlier:  # runs of one league may come from several machines
        write(said, "\n".join([*earlier, here]) + "\n")


def main() -> None:
    """Read the arguments, train, and write the pages of claims and checks."""
    known = leagues()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--first", type=int, help="so many contenders of each")
    parser.add_argument("--jobs", type=int, help="runs at once; one a core by default")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"no league is called {', '.join(unknown)}; there are {', '.join(known)}")
    for name in options.names or known:
        print(f"\n{name}", flush=True)
        play(name, known[name], options.first, options.jobs)
    for page in ("claims.py", "checks.py"):
        subprocess.run([sys.executable, str(ROOT / "tools" / page)], check=True)


if __name__ == "__main__":
    main()
