"""The folder that a league leaves: a page that opens from a disk, tables, data and plots."""

from __future__ import annotations

import csv
import json
import re
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

from polyhead.cli import app
from polyhead.leaderboard import job
from polyhead.leaderboard.page import build_page
from polyhead.leaderboard.plots import plots
from polyhead.league import Contender, Recipe, Sizes, plan, tasks
from polyhead.league.folder import Folder
from polyhead.report import drawing

LABELS = ["mha", "moh:top_k=1", "mha:mask=window(3)"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("league") / "out"
    job.run(
        LABELS,
        task="recall",
        sizes=Sizes(16, 2, 1, 16),
        recipe=Recipe(steps=6, batch=4, looks=3),
        seeds=2,
        out=out,
        jobs=2,
        console=Console(quiet=True),
    )
    return out


def test_the_folder_is_complete(folder: Path) -> None:
    names = {file.name for file in folder.iterdir() if file.is_file()}
    assert names == {
        *("league.json", "results.json", "results.csv"),
        *("scores.svg", "learning.svg", "pareto.svg", "leaderboard.html"),
    }
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert {row["contender"] for row in rows} == set(LABELS)
    data = json.loads((folder / "results.json").read_text())
    assert len(data["contenders"]) == 3
    assert all(len(one["runs"]["0"]["curve"]) == 3 for one in data["contenders"])
    for name in ("scores.svg", "learning.svg", "pareto.svg"):
        ElementTree.parse(folder / name)


def test_the_page_stands_alone(folder: Path) -> None:
    page = (folder / "leaderboard.html").read_text()
    assert all(label.replace("&", "&amp;") in page for label in LABELS)
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert page.count("<section") == 6
    assert len(page) < 500_000


def test_drawings_name_every_contender(folder: Path) -> None:
    text = (folder / "scores.svg").read_text()
    assert all(label in text for label in LABELS)
    assert (folder / "learning.svg").read_text().count('class="curve') == 3


def test_a_league_of_one_seed_and_one_contender_can_be_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    standings = job.run(
        ["mha"],
        task="regression",
        sizes=Sizes(16, 2, 1, 16),
        recipe=Recipe(steps=1, batch=4),
        seeds=1,
        out=tmp_path,
        jobs=1,
    )
    # without a terminal, rows are whole
    header = next(line for line in capsys.readouterr().out.splitlines() if "contender" in line)
    assert len(header.rstrip()) > 80
    drawn = plots(standings)
    assert set(drawn) == {"scores.svg", "learning.svg", "pareto.svg"}
    page = build_page(standings)
    assert "mha" in page
    assert not re.search(r"\bnan\b", page + "".join(drawn.values()))  # there is no interval


MARKED = """
import math
from polyhead.league.tasks.recall import RecallTask

class Marked(RecallTask):
    name = "marked"
    metric = "share [/of] <b>"

    def yardsticks(self):
        return {"a [/wild] <guess> & more": 0.1, "unknown": math.nan, "endless": -math.inf}
"""


def test_signs_of_markup_are_signs(tmp_path: Path) -> None:
    label, out = "<img> & [/red] \x00", tmp_path / "a [/b] c"
    file = tmp_path / "marked.py"
    file.write_text(MARKED)
    console = Console(record=True, width=300, file=StringIO())
    job.run(
        [Contender(label, ("mha",), ((),)), "mha:mask=causal() & window(3)"],  # type: ignore[list-item]
        task=str(file),
        sizes=Sizes(16, 2, 1, 16),
        recipe=Recipe(steps=2, batch=4, looks=2),
        seeds=2,
        out=out,
        console=console,
        jobs=2,
    )
    said = console.export_text()
    assert "[/red]" in said
    assert "a [/wild] <guess> & more: 0.1" in said
    assert "unknown: –" in said
    assert str(out) in said
    assert "<img>" not in (out / "leaderboard.html").read_text()
    for name in ("scores.svg", "learning.svg", "pareto.svg", "leaderboard.html"):
        assert not re.search(r"\b(nan|inf)\b", (out / name).read_text())
    for name in ("scores.svg", "learning.svg", "pareto.svg"):
        ElementTree.parse(out / name)
    assert json.loads((out / "results.json").read_text())["yardsticks"]["unknown"] is None


def test_the_command_and_its_errors(tmp_path: Path) -> None:
    out = tmp_path / "league"
    options = ["--dim", "16", "--heads", "2", "--layers", "1", "--batch", "4", "--steps", "3", "--seeds", "1"]
    found = CliRunner().invoke(app, ["compare", "mha", "--out", str(out), "--jobs", "1", *options])
    assert found.exit_code == 0, found.output
    assert "mha" in found.stdout
    assert "leaderboard.html" in found.stdout
    for arguments, said in (
        (["mho"], "no mechanism is called 'mho'"),
        (["mha", "--task", "recal"], "did you mean 'recall'"),
        (["mha", "--budget", "params=10"], "no size has 10 parameters"),
        (["mha", "--budget", "params=many"], "--budget takes a name"),
        (["mha", "--jobs", "none"], "jobs must be a positive integer"),
        (["mha", "--jobs", "²"], "jobs must be a positive integer"),
        (["mha", "--jobs=--5"], "jobs must be a positive integer"),
        (["mha", "--data", "x.txt"], "makes its own questions"),
        (["mha", "--out", str(out), "--steps", "4"], "under other rules"),
    ):
        result = CliRunner().invoke(app, ["compare", *arguments])
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.stderr.split())
        assert "Traceback" not in result.output


def test_runs_that_fail_say_why_and_end_the_command_with_1(tmp_path: Path) -> None:
    out = tmp_path / "league"
    recall = tasks.find("recall")
    settled = plan(
        ["mha", "moh"],
        "recall",
        steps=3,
        sizes=tasks.changed(recall.sizes, dim=16, heads=2, layers=1),
        recipe=tasks.changed(recall.recipe, batch=4),
    )
    folder = Folder(out, settled.rules)
    for seed in (0, 1):
        broken = folder.checkpoint(settled.contenders[0].contender, seed)
        broken.parent.mkdir(parents=True, exist_ok=True)
        broken.write_bytes(b"nonsense")
    options = ["--dim", "16", "--heads", "2", "--layers", "1", "--batch", "4", "--steps", "3", "--seeds", "2"]
    found = CliRunner().invoke(app, ["compare", "mha", "moh", "--out", str(out), *options])
    assert found.exit_code == 1
    assert found.stdout.count("1 run failed: ") == 2  # each names its file
    assert "this checkpoint cannot be read" in found.stdout
    assert "leaderboard.html" in found.stdout


def test_runs_that_diverge_are_a_result(tmp_path: Path) -> None:
    options = ["--dim", "16", "--heads", "2", "--layers", "1", "--batch", "4", "--steps", "9", "--seeds", "1"]
    label = "mha:normalizer=sigmoid()"
    found = CliRunner().invoke(
        app, ["compare", label, "--rate", "1e30", "--out", str(tmp_path / "league"), *options]
    )
    assert found.exit_code == 0
    assert "1 diverged" in found.stdout


def test_the_tasks_are_listed() -> None:
    found = CliRunner().invoke(app, ["tasks"])
    assert found.exit_code == 0
    assert "recall" in found.stdout
    assert {row["name"] for row in json.loads(CliRunner().invoke(app, ["tasks", "--json"]).stdout)} >= {
        "text",
        "digits",
    }


def test_sixteen_contenders_can_be_told_apart() -> None:
    looks = [drawing.colour(place) for place in range(16)]
    assert len(set(looks)) == 16
    for look in looks[8:]:  # a colour for the second time: rings in place of dots
        assert f".plot .mark.{look.replace(' ', '.')}{{fill:var(--paper)" in drawing.LINES_CSS
