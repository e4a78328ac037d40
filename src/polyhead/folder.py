"""Folders that jobs write to and go on with: their rules, what is finished, and nobody else at work."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from polyhead.checks import given
from polyhead.errors import ConfigError, PolyheadError

__all__ = ["JobFolder", "read", "write"]


class JobFolder:
    """A folder that holds what a job has finished, under the rules that it began with.

    Args:
        path: empty, not there yet, or holding a job under the same rules: it goes on.
        rules: plain data, as `to_json` gives it; kept in the folder.
        file: the name of the file that keeps the rules.
        what: the job, in a word: "league".

    Raises:
        ConfigError: the folder holds a job under other rules, or something else, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], rules: dict[str, Any], *, file: str, what: str) -> None:
        self.what = what
        try:
            self.path = Path(path).expanduser().absolute()
            self._open(rules, self.path / file)
        except OSError as error:
            raise ConfigError(
                f"out: cannot write to {self.path}: {error.strerror}; choose another folder"
            ) from None
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, PolyheadError):
                raise
            raise ConfigError(f"out must be the path of a folder; got {given(path)}: {error}") from None

    def _open(self, own: dict[str, Any], held: Path) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: {self.path} is a file; choose a folder")
        if held.is_file():
            self._same(own, held)
        # what a kill left of the very first file is ours
        elif self.path.is_dir() and any(not _unfinished(file) for file in self.path.iterdir()):
            raise ConfigError(
                f"out: {self.path} holds other files and no {self.what}; choose an empty or a new folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if held.is_file():
            with tempfile.TemporaryFile(dir=self.path):  # whether results can be kept
                pass
        else:
            _write(held, json.dumps(own, ensure_ascii=False, indent=1))

    def _same(self, own: dict[str, Any], file: Path) -> None:
        held = read(file)
        if held == own:
            return
        if not isinstance(held, dict) or held.get("part") != own["part"]:
            raise ConfigError(f"out: {file} is not that of a {self.what}; choose another folder")
        names = [name for name in own if held.get(name) != own[name]]
        said = "; ".join(f"{name} was {_brief(held.get(name))} and is {_brief(own[name])}" for name in names)
        raise ConfigError(
            f"out: {self.path} holds a {self.what} under other rules ({said}); choose another folder, or the "
            "same rules"
        )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other commands from working in this folder, as long as this goes on.

        Raises:
            PolyheadError: another one does.
        """
        file = self.path / ".lock"
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise PolyheadError(
                f"out: another command is at work in {self.path}; wait until it ends, or choose "
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


def read(file: Path) -> Any:
    """The JSON in a file.

    Raises:
        PolyheadError: it cannot be read, or is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolyheadError(
            f"{file} cannot be read ({error}); remove it, and what it held is made anew"
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


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={one}" for key, one in value.items())
    return str(value)
