"""The folder of a league: its rules, every finished run, and the state of those under way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from polyhead.checks import given
from polyhead.description import to_json
from polyhead.errors import ConfigError, PolyheadError
from polyhead.league.contender import Contender
from polyhead.league.plan import Rules
from polyhead.league.training import Outcome

__all__ = ["Folder", "write"]

_RULES = "league.json"


class Folder:
    """A folder that holds the runs of one league.

    Args:
        path: empty, not there yet, or holding a league under the same rules: it goes on.
        rules: of the league.

    Raises:
        ConfigError: the folder holds another league, or something else, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], rules: Rules) -> None:
        try:
            self.path = Path(path).expanduser().absolute()
            self._open(to_json(rules))
        except OSError as error:
            raise ConfigError(
                f"out: cannot write to {self.path}: {error.strerror}; choose another folder"
            ) from None
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, PolyheadError):
                raise
            raise ConfigError(f"out must be the path of a folder; got {given(path)}: {error}") from None

    def _open(self, own: dict[str, Any]) -> None:
        held = self.path / _RULES
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: {self.path} is a file; choose a folder")
        if held.is_file():
            _same(self.path, own, _read(held))
        # what a kill left of the very first file is ours
        elif self.path.is_dir() and any(not _unfinished(file) for file in self.path.iterdir()):
            raise ConfigError(
                f"out: {self.path} holds other files and no league; choose an empty or a new folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if held.is_file():
            with tempfile.TemporaryFile(dir=self.path):  # whether runs can be kept
                pass
        else:
            _write(held, json.dumps(own, ensure_ascii=False, indent=1))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other commands from training in this folder, as long as this goes on.

        Raises:
            PolyheadError: another one does.
        """
        file = self.path / ".lock"
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise PolyheadError(
                f"out: another command is training in {self.path}; wait until it ends, or choose "
                "another folder"
            ) from None
        except NotImplementedError:  # a file system without locks: two would do the same work, no harm else
            yield
            return
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows keeps what is open
                file.unlink(missing_ok=True)
            lock.release()

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
        try:
            return Outcome.from_json(_read(file))
        except (KeyError, TypeError, AttributeError) as error:
            raise PolyheadError(
                f"{file} is not how a run ended ({error!r}); remove it, and the run is made anew"
            ) from None

    def keep(self, one: Contender, seed: int, outcome: Outcome) -> None:
        """Write down how a run ended; its state is no longer needed."""
        file = self._run(one, seed).with_suffix(".json")
        write(file, json.dumps(outcome.to_json(), indent=1, allow_nan=False))
        self.checkpoint(one, seed).unlink(missing_ok=True)
        for left in file.parent.glob(f"{file.stem}.*.part"):  # of a checkpoint that a kill cut short
            left.unlink(missing_ok=True)


def write(file: Path, text: str) -> None:
    """Write a file completely, or not at all.

    Raises:
        PolyheadError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, text)
    except OSError as error:
        raise PolyheadError(
            f"{file} cannot be written: {error.strerror}; what was finished before is kept, and the same "
            "command goes on with it"
        ) from None


def _unfinished(file: Path) -> bool:
    return re.fullmatch(r"\..+\.\d+\.part", file.name) is not None


def _write(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolyheadError(
            f"{file} cannot be read ({error}); remove it, and what it held is made anew"
        ) from None


def _same(path: Path, own: dict[str, Any], held: Any) -> None:
    if held == own:
        return
    if not isinstance(held, dict) or held.get("part") != own["part"]:
        raise ConfigError(f"out: {path / _RULES} is not that of a league; choose another folder")
    names = [f.name for f in fields(Rules) if held.get(f.name) != own[f.name]]
    said = "; ".join(f"{name} was {_brief(held.get(name))} and is {_brief(own[name])}" for name in names)
    raise ConfigError(
        f"out: {path} holds a league under other rules ({said}); choose another folder, or the same rules"
    )


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={one}" for key, one in value.items())
    return str(value)
