"""Writing a report to a folder: complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from polyhead.errors import ConfigError
from polyhead.report import curves, maps
from polyhead.report.data import ReportData
from polyhead.report.page import build_page

__all__ = ["FILES", "Written", "check_folder", "write_report"]

# every file that a report may consist of; the page comes last, so that it never stands beside older data
FILES = ("roles.svg", "measurements.svg", "savings.svg", "report.json", "report.html")


@dataclass(frozen=True)
class Written:
    """Where a report lies."""

    folder: Path
    files: tuple[Path, ...]

    @property
    def page(self) -> Path:
        """The page to open."""
        return self.folder / "report.html"


def check_folder(out: str | os.PathLike[str]) -> Path:
    """`out` as a path that a report can be written to, tried before the minutes of measuring.

    Nothing is left behind. Raises `ConfigError` where `out` is a file or may not be written.
    """
    folder = Path(out).expanduser().absolute()
    ground = next(p for p in (folder, *folder.parents) if p.exists())
    if not ground.is_dir():
        raise ConfigError(f"out: {ground} is a file, not a folder; choose another folder")
    try:
        with tempfile.TemporaryFile(dir=ground):
            pass
    except OSError as error:
        raise ConfigError(f"out: cannot write to {ground}: {error.strerror}; choose another folder") from None
    for name in FILES:
        if (folder / name).is_dir():
            raise ConfigError(f"out: {folder / name} is a folder; a file of the report would replace it")
    return folder


def write_report(data: ReportData, out: str | os.PathLike[str]) -> Written:
    """Write `report.html`, `report.json` and the plots as SVG into the folder `out`, which is made if absent.

    All files are written completely elsewhere on the same disk and then moved into place one by one, so that
    no reader ever finds half a file and an interruption leaves the earlier report or the new one. Files of an
    earlier report that this one lacks are removed; other files in the folder are left alone.
    """
    folder = check_folder(out)
    contents = {
        "roles.svg": maps.roles_file(data),
        "measurements.svg": maps.distributions_file(data),
        "savings.svg": curves.savings_file(data),
        "report.json": data.to_json(),
        "report.html": build_page(data),
    }
    absent = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as staging:
            for name, text in contents.items():
                if text is not None:
                    (Path(staging) / name).write_text(text, encoding="utf-8", newline="\n")
            for name in FILES:
                if contents[name] is None:
                    (folder / name).unlink(missing_ok=True)
                else:
                    os.replace(Path(staging) / name, folder / name)
    except BaseException as error:
        _undo(absent)
        if not isinstance(error, OSError):
            raise
        raise ConfigError(f"out: cannot write to {folder}: {error.strerror}; choose another folder") from None
    return Written(folder, tuple(folder / name for name in FILES if contents[name] is not None))


def _undo(made: list[Path]) -> None:
    """Take back the folders that were made, the innermost first, with what was put there."""
    for path in made[:1]:
        for name in FILES:
            (path / name).unlink(missing_ok=True)
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir()
