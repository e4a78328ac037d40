"""Verdicts on claims of papers: from made-up results, and from the claims as they are written down."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyhead.description import to_json
from polyhead.league import TASKS, contender, plan, tasks
from polyhead.league.tasks import with_data
from polyhead.mechanisms import catalog

ROOT = Path(__file__).resolve().parents[2]


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("polyhead_tool_claims", ROOT / "tools" / "claims.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "tools"))  # where it finds its other half, as when it is run
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


claims = _tool()


def run(score: float | None, status: str = "finished") -> dict[str, Any]:
    return {"status": status, "scores": {"validation": score, "longer": score}}


def runs(*scores: float | None) -> dict[str, Any]:
    """None for a run that diverged."""
    return {str(n): run(s, "diverged" if s is None else "finished") for n, s in enumerate(scores)}


def results(by: dict[str, Any], name: str = "recall", /, **rules: Any) -> dict[str, Any]:
    return {
        "rules": {
            "task": {"part": TASKS[name].kind},
            "sizes": {"dim": 64, "heads": 4, "layers": 2},
            "recipe": {"steps": 1000, "batch": 64},
            "budget": "params",
            "limit": None,
        }
        | rules,
        "yardsticks": {"a guess": 3.0 if TASKS[name].better == "lower" else 0.03},
        "contenders": [{"contender": to_json(contender(spec)), "runs": found} for spec, found in by.items()],
    }


def league(by: dict[str, Any], name: str = "recall", **rules: Any) -> Any:
    return claims.League(f"{name}-1", results(by, name, **rules), Path("nowhere"))


def claim(expect: str = "better", **further: Any) -> Any:
    options = {"paper": "002", "mechanism": "moh", "claim": "It is so.", "task": "recall", "contender": "moh"}
    return claims.Claim(**options | {"expect": expect, "reach": "Far."} | further)


def verdict(one: Any, *found: Any) -> tuple[str, str]:
    (only,) = claims.judge(one, found)
    return only.verdict, only.why


LOW, HIGH = runs(0.50, 0.52, 0.51), runs(0.80, 0.83, 0.80)


@pytest.mark.parametrize(
    ("expect", "own", "other", "said"),
    [
        ("better", HIGH, LOW, "showed"),
        ("better", LOW, HIGH, "the opposite showed"),
        ("better", runs(0.5, 0.6, 0.7), runs(0.6, 0.5, 0.7), "not shown"),
        ("worse", LOW, HIGH, "showed"),
        ("worse", HIGH, LOW, "the opposite showed"),
        ("worse", LOW, LOW, "not shown"),
    ],
)
def test_better_and_worse(expect: str, own: Any, other: Any, said: str) -> None:
    assert verdict(claim(expect), league({"mha": other, "moh": own})) == (said, "")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (runs(0.79, 0.82, 0.7901), "showed"),  # a little less, by less than the margin
        (runs(0.80, 0.83, 0.80), "showed"),  # the same
        (HIGH | runs(0.9, 0.94, 0.91), "showed"),
        (runs(0.80, 0.75, 0.84), "not shown"),
        (runs(0.70, 0.74, 0.71), "the opposite showed"),
    ],
)
def test_not_worse(own: Any, said: str) -> None:
    one = claim("not worse", margin=0.03)
    assert verdict(one, league({"moh": own, "mha": HIGH}))[0] == said


def test_where_lower_is_better() -> None:
    by = {"moh": LOW, "mha": HIGH}
    assert verdict(claim("better", task="text"), league(by, "text"))[0] == "showed"
    assert verdict(claim("worse", task="text"), league(by, "text"))[0] == "the opposite showed"
    assert verdict(claim("not worse", task="text", margin=0.01), league(by, "text"))[0] == "showed"
    worse = {"moh": HIGH, "mha": LOW}
    assert (
        verdict(claim("not worse", task="text", margin=0.01), league(worse, "text"))[0]
        == "the opposite showed"
    )
    assert verdict(claim("not worse", task="text", margin=0.4), league(worse, "text"))[0] == "showed"
    (one,) = claims.judge(claim(task="text"), [league(by, "text")])
    assert one.mean == pytest.approx(-0.3)


def test_to_be_no_worse_than_who_learned_nothing_says_nothing() -> None:
    by = {"moh": runs(0.031, 0.032, 0.031), "mha": runs(0.031, 0.030, 0.030)}
    said, why = verdict(claim("not worse", margin=0.02), league(by))
    assert said == "not shown"
    assert "without training" in why
    by = {"moh": runs(2.99, 3.0, 2.99), "mha": runs(3.0, 2.99, 3.0)}
    assert verdict(claim("not worse", margin=0.02, task="text"), league(by, "text"))[0] == "not shown"


def test_pairs_are_those_seeds_that_both_finished() -> None:
    own = {"0": run(0.9), "2": run(0.8), "3": run(0.5, "failed"), "10": run(0.7)}
    other = {"0": run(0.5), "1": run(0.99), "2": run(0.41), "3": run(0.1), "10": run(0.3)}
    (one,) = claims.judge(claim(), [league({"moh": own, "mha": other})])
    assert one.pairs == 3
    assert one.own == pytest.approx(0.8)
    assert one.mean == pytest.approx((0.4 + 0.39 + 0.4) / 3)
    assert one.verdict == "showed"


def test_one_pair_gives_no_interval() -> None:
    said, why = verdict(claim(), league({"moh": runs(0.9), "mha": runs(0.1, 0.1)}))
    assert said == "not shown"
    assert "one seed" in why


def test_seeds_that_differ_by_the_same_amount_give_no_interval() -> None:
    steps = [n / 360 for n in (341, 343, 340)]
    by = {"moh": runs(*(s + 1 / 360 for s in steps)), "mha": runs(*steps)}
    for one in (claim(), claim("worse"), claim("not worse", margin=0.01)):
        said, why = verdict(one, league(by))
        assert said == "not shown"
        assert "same amount" in why


def test_who_diverged_wins_nothing() -> None:
    high, low = runs(0.80, 0.83, 0.80, None), runs(0.50, 0.52, 0.51, 0.50)
    said, why = verdict(claim(), league({"moh": high, "mha": low}))
    assert said == "not shown"
    assert why == "1 of 4 runs of moh diverged"
    # its opponent wins all the same
    by = {"moh": runs(0.50, 0.52, 0.51, None), "mha": runs(0.80, 0.83, 0.80, 0.8)}
    assert verdict(claim(), league(by)) == ("the opposite showed", "1 of 4 runs of moh diverged")
    assert verdict(claim("worse"), league(by))[0] == "showed"
    # and so it is with the comparator
    by = {"moh": runs(0.50, 0.52, 0.51), "mha": runs(0.80, 0.83, None)}
    assert verdict(claim("worse"), league({"moh": low, "mha": high}))[0] == "not shown"
    assert verdict(claim(), league(by))[0] == "not shown"


def test_a_finished_run_without_a_score_is_not_left_out() -> None:
    by = {"moh": runs(0.9, 0.91, 0.92) | {"3": run(None)}, "mha": runs(0.5, 0.51, 0.53, 0.5)}
    assert verdict(claim(), league(by)) == ("not shown", "1 of 4 runs of moh diverged")


def test_all_runs_diverged() -> None:
    said, why = verdict(claim("worse"), league({"moh": runs(None, None), "mha": runs(0.5, 0.6)}))
    assert said == "not shown"
    assert "2 of 2 runs of moh" in why


def test_not_run_yet() -> None:
    assert verdict(claim())[0] == "not run yet"
    assert verdict(claim(), league({"moh": HIGH, "mha": LOW}, "needle"))[0] == "not run yet"
    assert verdict(claim(), league({"moh": HIGH, "mha": LOW}, budget="flops"))[0] == "not run yet"
    said, why = verdict(claim(), league({"mha": LOW}))
    assert (said, why) == ("not run yet", "moh not in the league recall-1")
    assert verdict(claim(), league({"mha": LOW, "moh": {}}))[0] == "not run yet"
    own = {"task": {"part": "Text", "file": "my.txt"}}
    assert verdict(claim(task="text"), league({"moh": HIGH, "mha": LOW}, "text", **own))[0] == "not run yet"
    failed = {"0": run(None, "failed")}
    assert verdict(claim(), league({"moh": failed, "mha": LOW}))[0] == "not run yet"


def test_cannot_be_tested() -> None:
    one = claims.Claim("002", "moh", "It is fast.", untestable="about speed")
    assert verdict(one, league({"moh": HIGH, "mha": LOW})) == ("cannot be tested here", "about speed")


def test_another_spelling_is_the_same_contender() -> None:
    found = league({"moh:top_k=1, shared_heads=2": HIGH, "mha": LOW})
    assert verdict(claim(contender="moh:shared_heads=2,top_k=1"), found)[0] == "showed"
    assert verdict(claim(contender="moh:shared_heads=1,top_k=2"), found)[0] == "not run yet"


def test_every_league_has_a_verdict_of_its_own() -> None:
    found = [league({"moh": HIGH, "mha": LOW}), league({"moh": LOW, "mha": LOW}), league({"mha": LOW})]
    assert [one.verdict for one in claims.judge(claim(), found)] == ["showed", "not shown"]


def test_a_split_that_a_league_has_not_is_an_error() -> None:
    with pytest.raises(claims.Malformed, match="deeper"):
        claims.judge(claim(split="deeper"), [league({"moh": HIGH, "mha": LOW})])


def _write(folder: Path, data: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def test_the_page(tmp_path: Path) -> None:
    folder = _write(tmp_path / "recall", results({"mha": LOW, "moh": HIGH, "moh:top_k=1": LOW}))
    for name in ("results.csv", "scores.svg"):
        (folder / name).touch()
    (folder / "machine.txt").write_text("Some CPU, 2 cores\nmore\n", encoding="utf-8")
    _write(tmp_path / "copy", results({"mha": LOW}, "copy", limit=200_000))
    page = claims.page(
        [
            claim(),
            claim("worse", claim="It is bad."),
            claim(contender="moh:top_k=1", claim="This is a null."),
            claim(task="copy", claim="This waits."),
            claims.Claim(
                "059", "multi_query", "It is fast.", untestable="about speed", instead=("tests/a.py",)
            ),
        ],
        claims.leagues(tmp_path),
    )
    for title in ("## Showed", "## The opposite showed", "## Not shown", "## Not run yet", "## Leagues"):
        assert page.count(title + "\n") == 1
    heads = [line for line in page.splitlines() if line.startswith("## ")]
    assert page.index("This is a null.") > page.index("## Not shown")
    assert heads[-2] == "## Cannot be tested here"
    assert "There are 3 intervals below; by chance 0.15 of them miss" in page
    assert "of the 3 claims of better or worse 0.075 would show" in page
    assert "+0.3000 ±0.0248" in page
    assert "[numbers](recall/results.csv), [scores](recall/scores.svg)" in page
    assert "- recall: Some CPU, 2 cores\n" in page
    assert "params = 200,000" in page
    assert "nan" not in page
    assert all(
        line.count(" | ") == 8 for line in page.splitlines() if "`moh` against `mha` | better | 0" in line
    )


def test_check_and_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "text", results({"mha": LOW, "moh": HIGH}, "text"))
    where = ["--leagues", str(tmp_path)]
    assert claims.main(["--check", *where]) == 1
    assert not (tmp_path / "README.md").exists()
    assert claims.main(where) == 0
    first = (tmp_path / "README.md").read_bytes()
    assert claims.main(["--check", *where]) == 0
    assert claims.main(where) == 0
    assert (tmp_path / "README.md").read_bytes() == first
    (tmp_path / "README.md").write_text("something else", encoding="utf-8")
    assert claims.main(["--check", *where]) == 1
    (tmp_path / "text" / "results.json").write_text("{}", encoding="utf-8")
    assert claims.main(where) == 2
    assert "not the results of a league" in capsys.readouterr().err


GOOD = 'paper = "002"\nmechanism = "moh"\nclaim = "So."\n'
TESTED = GOOD + 'task = "text"\ncontender = "moh"\nreach = "Far."\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD, "contender, expect, reach, task is missing"),
        (TESTED + 'expect = "better"\nmargn = 0.1\n', "unknown margn"),
        (TESTED + 'expect = "better"\nmargin = 0.1\n', "a margin"),
        (TESTED + 'expect = "not worse"\n', "a margin"),
        (TESTED + 'expect = "not worse"\nmargin = 0\n', "by 0"),
        (TESTED + 'expect = "good"\n', "expect must be one of"),
        (TESTED + 'expect = "better"\ncomparator = "moh"\n', "against itself"),
        (TESTED + 'expect = "better"\nuntestable = "speed"\n', "unknown contender, expect, reach, task"),
        (TESTED.replace("text", "txt") + 'expect = "better"\n', "task must be one of"),
        (GOOD.replace("002", "003") + 'untestable = "speed"\n', "its paper is 002, not 003"),
        (GOOD + "untestable = 3\n", "untestable cannot be 3"),
    ],
)
def test_malformed_claims(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "claims.toml"
    file.write_text("[[claim]]\n" + text, encoding="utf-8")
    with pytest.raises(claims.Malformed, match=said):
        claims.load(file)


WRITTEN = claims.load()


def test_claims_as_written() -> None:
    """`load` checks papers, tasks, keys and that contenders can be read; here is what it leaves open."""
    assert len({(one.mechanism, one.claim) for one in WRITTEN}) == len(WRITTEN)
    tests = [(one.task, one.budget, one.contender, one.comparator, one.split) for one in WRITTEN if one.task]
    assert len(set(tests)) == len(tests)
    for one in WRITTEN:
        assert one.claim.endswith("."), one.claim
        for file in one.instead:
            assert (ROOT / file).is_file(), file
        if one.task:
            # no task is made: that of text would train its tokenizer
            assert one.split in object.__new__(TASKS[one.task]).splits, one
            assert one.reach.endswith("."), one.reach
            assert math.isfinite(one.margin)


def test_every_mechanism_with_a_paper_has_a_claim() -> None:
    missing = {one.name for one in catalog() if one.paper} - {one.mechanism for one in WRITTEN}
    assert not missing, f"tools/claims.toml says nothing of {', '.join(sorted(missing))}"


@pytest.mark.parametrize("task", sorted({one.task for one in WRITTEN} - {"", "text"}))
def test_contenders_can_do_their_task(task: str) -> None:
    leagues = tomllib.loads((ROOT / "tools" / "leagues.toml").read_text(encoding="utf-8")).values()
    wanted: dict[tuple[str, str], set[str]] = {}
    for one in (one for one in WRITTEN if one.task == task):
        pair = {one.contender, one.comparator}
        # a league may have the task with options of its own, which its contenders need
        held = (
            league
            for league in leagues
            if (league["task"], league.get("budget", "params")) == (task, one.budget)
            and pair <= set(league["contenders"])
        )
        options = next((league.get("options", {}) for league in held), {})
        wanted.setdefault((one.budget, json.dumps(options)), set()).update(pair)
    for (budget, options), specs in wanted.items():
        plan(sorted(specs), replace(tasks.find(task), **json.loads(options)), budget=budget)


def test_contenders_can_do_text(tmp_path: Path) -> None:
    """Sizes do not depend on what the text says, so a small one does."""
    file = tmp_path / "small.txt"
    file.write_text("\n\n".join(f"Paragraph {n} says {n * n} and no more." for n in range(3000)))
    task = with_data("text", file)
    for budget, limit in (("params", None), ("flops", None), ("kv", 1024)):
        meant = [one for one in WRITTEN if (one.task, one.budget) == ("text", budget)]
        specs = sorted({spec for one in meant for spec in (one.contender, one.comparator)})
        plan(specs, task, budget=budget, limit=limit)
