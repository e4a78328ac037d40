"""The page of small checks: it is up to date, points to what exists, and leaves no paper out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from polyhead.description import to_json
from polyhead.league import TASKS, contender

ROOT = Path(__file__).resolve().parents[2]


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("polyhead_tool_checks", ROOT / "tools" / "checks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    sys.path.insert(0, str(ROOT / "tools"))  # where it finds what it shares, as when it is run
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


checks = _tool()
GOOD = {
    "paper": "002",
    "mechanism": "moh",
    "check": "It is so.",
    "where": ["tests/project/test_checks.py::test_the_page_is_up_to_date"],
    "outcome": "It is.",
}


def read(folder: Path, **change: Any) -> Any:
    """One check that is written down with a change; None leaves a key out."""
    data = {key: value for key, value in (GOOD | change).items() if value is not None}
    lines = [f"{key} = {value!r}".replace("'", '"') for key, value in data.items()]
    (folder / "x.toml").write_text("[[check]]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return checks.read(folder)


def test_the_page_is_up_to_date() -> None:
    assert checks.main(["--check"]) == 0


def test_no_paper_of_the_catalogue_is_left_out() -> None:
    assert checks.without(checks.read()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"why": "so"}, "unknown why"),
        ({"check": None}, "check is missing"),
        ({"outcome": None}, "outcome is missing"),
        ({"where": None}, "either where, with an outcome, or not_done"),
        ({"not_done": "no time"}, "either where, with an outcome, or not_done"),
        ({"paper": "2"}, "its paper is written 002"),
        ({"mechanism": "emma"}, "emma is of paper 133"),
        ({"where": ["tests/nowhere.py::test_it"]}, "no such file"),
        ({"where": ["tests/project/test_checks.py::test_that"]}, "no such test"),
        ({"where": ["tests/project/test_checks.py"]}, "a test has a name behind ::"),
        ({"where": ["docs/design.md"]}, "neither a test, a benchmark, an experiment nor a league"),
        ({"where": ["league:chess"]}, "no such league"),
    ],
)
def test_what_points_to_nothing_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    assert len(read(tmp_path)) == 1
    with pytest.raises(checks.Malformed, match=message):
        read(tmp_path, **change)


def played(name: str, better: str, worse: str) -> Any:
    """A league of two contenders, of which one is better with every seed."""
    scores = {better: (0.8, 0.83, 0.8), worse: (0.5, 0.52, 0.51)}
    found = [
        {
            "contender": to_json(contender(spec)),
            "runs": {
                str(n): {"status": "finished", "scores": dict.fromkeys(TASKS[name]().splits, score)}
                for n, score in enumerate(own)
            },
        }
        for spec, own in scores.items()
    ]
    rules = {"task": {"part": TASKS[name].kind}, "budget": "params"}
    data = {"rules": rules, "yardsticks": {"a guess": 0.5}, "contenders": found}
    return checks.League(name, data, Path("nowhere"))


def test_statuses_are_counted_and_verdicts_put_in(tmp_path: Path) -> None:
    league = {"paper": "049", "mechanism": "dual_attention", "where": ["league:relational"], "outcome": None}
    texts = {
        "done": read(tmp_path),
        "not done": read(tmp_path, where=None, outcome=None, not_done="No data."),
        "of a league": read(tmp_path, **league),
        "no claim": read(tmp_path, **league | {"paper": "002", "mechanism": "moh"}),
    }
    found = [played("relational", "dual_attention", "mha")]
    pages = {key: checks.page(one, checks.load(), found) for key, one in texts.items()}
    assert "| done | 1 |" in pages["done"]
    assert "| not done | 1 |" in pages["not done"]
    assert "| not done | It is so. |  | No data. |" in pages["not done"]
    assert "| done | 1 |" in pages["of a league"]
    assert pages["of a league"].count("*showed* (+0.3") == 2  # both of its claims
    assert "| written, not run yet | 1 |" in pages["no claim"]
    waiting = checks.page(texts["of a league"], checks.load(), [])
    assert "Not run yet: relational." in waiting
