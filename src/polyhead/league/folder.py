"""The folder of a league: its rules, every finished run, and the state of those under way."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from polyhead.description import to_json
from polyhead.errors import PolyheadError
from polyhead.folder import JobFolder, read, write
from polyhead.league.contender import Contender
from polyhead.league.plan import Rules
from polyhead.league.training import Outcome

__all__ = ["Folder"]


class Folder(JobFolder):
    """A folder that holds the runs of one league.

    Args:
        path: empty, not there yet, or holding a league under the same rules: it goes on.
        rules: of the league.

    Raises:
        ConfigError: the folder holds another league, or something else, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], rules: Rules) -> None:
        super().__init__(path, to_json(rules), file="league.json", what="league")
        self.splits = rules.task.splits

    def _run(self, one: Contender, seed: int) -> Path:
        text = json.dumps(to_json(one), sort_keys=True)
        short = re.sub(r"[^A-Za-z0-9_.+-]+", "-", one.label).strip("-")[:60]
        return (
            self.path
            / "runs"
            / f"{short}.{hashlib.blake2b(text.encode(), digest_size=3).hexdigest()}"
            / f"seed-{seed}"
        )

    def checkpoint(self, one: Contender, seed: int) -> Path:
        """Where a run keeps its state."""
        return self._run(one, seed).with_suffix(".pt")

    def outcome(self, one: Contender, seed: int) -> Outcome | None:
        """How a run ended, None if it has not."""
        file = self._run(one, seed).with_suffix(".json")
        if not file.is_file():
            return None
        held = read(file)
        try:
            found = Outcome.from_json(held)
            if found.status not in ("finished", "diverged"):
                raise ValueError(f"its status is {found.status!r}")
            if missing := set(self.splits) - found.scores.keys():
                raise ValueError(f"there is no score of {', '.join(sorted(missing))}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PolyheadError(
                f"{file} is not how a run ended ({error!r}); remove it, and the run is made anew"
            ) from None
        return found

    def keep(self, one: Contender, seed: int, outcome: Outcome) -> None:
        """Write down how a run ended; its state is no longer needed."""
        file = self._run(one, seed).with_suffix(".json")
        write(file, json.dumps(outcome.to_json(), indent=1, allow_nan=False))
        self.checkpoint(one, seed).unlink(missing_ok=True)
        for left in file.parent.glob(f"{file.stem}.*.part"):  # of a checkpoint that a kill cut short
            left.unlink(missing_ok=True)
