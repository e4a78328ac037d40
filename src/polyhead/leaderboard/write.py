"""Writing the leaderboard: tables, data, plots and the page, each complete or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from polyhead.folder import write
from polyhead.league import Standings

__all__ = ["require", "write_leaderboard"]


def write_leaderboard(standings: Standings, folder: Path) -> Path:
    """Write `results.json`, `results.csv`, the plots and `leaderboard.html`; the page, which comes last."""
    from polyhead.leaderboard.page import build_page
    from polyhead.leaderboard.plots import plots

    write(
        folder / "results.json",
        json.dumps(standings.to_json(), ensure_ascii=False, indent=1, allow_nan=False),
    )
    write(folder / "results.csv", standings.to_csv())
    for name, drawing in plots(standings).items():
        write(folder / name, drawing)
    page = folder / "leaderboard.html"
    write(page, build_page(standings))
    return page


def require() -> None:
    """Raise `MissingExtra` now rather than after minutes of training, when the page could not be built."""
    from polyhead.report.page import require_jinja

    require_jinja()
