"""One run in a process of its own: `python -m polyhead.league.worker`, told what to do by a line of JSON.

The line comes by standard input, which stays open: where it ends, whoever asked is gone, and the worker goes
too. Answers are lines of JSON on standard output: looks on the way, and then the outcome.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polyhead.description import from_json, to_json
from polyhead.league import tasks
from polyhead.league.budget import fit, target_of
from polyhead.league.contender import Contender
from polyhead.league.plan import Rules
from polyhead.league.training import Look, Outcome, train

__all__ = ["order", "run"]


def order(
    rules: Rules, one: Contender, seed: int, checkpoint: Path | None, task_file: str | None
) -> dict[str, Any]:
    """What a worker must know, as plain data."""
    return {
        "rules": to_json(rules),
        "contender": to_json(one),
        "seed": seed,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "task_file": task_file,
    }


def run(what: dict[str, Any], progress: Callable[[Look], None] | None = None) -> Outcome:
    """Carry an order out."""
    if what["task_file"] is not None:
        tasks.find(what["task_file"])  # defines the part that the rules name
    rules, one = from_json(what["rules"]), from_json(what["contender"])
    target = target_of(rules.task, rules.sizes, rules.budget, rules.limit)
    fitted = fit(rules.task, one, rules.sizes, rules.budget, target)
    return train(
        rules.task,
        fitted,
        rules.recipe,
        what["seed"],
        device=rules.device,
        threads=rules.threads,
        checkpoint=None if what["checkpoint"] is None else Path(what["checkpoint"]),
        progress=progress,
    )


def _leave_with_the_asker() -> None:
    while os.read(0, 1024):  # not through sys.stdin: its lock, held here, would break the end of the process
        continue
    os._exit(1)


def _line() -> bytes:
    """The first line of standard input."""
    read = b""
    while not read.endswith(b"\n") and (more := os.read(0, 1)):
        read += more
    return read


def main() -> None:
    """Read an order, carry it out, answer."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anything else prints must not stand between the answers
    what = json.loads(_line())
    threading.Thread(target=_leave_with_the_asker, daemon=True).start()

    def answer(**said: Any) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    outcome = run(what, lambda look: answer(look=asdict(look)))
    answer(outcome=outcome.to_json())


if __name__ == "__main__":
    main()
