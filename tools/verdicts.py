"""Verdicts on the claims of tools/claims.toml, from the results of leagues.

Every claim is held against every league of its task and its budget, so one that is run twice counts twice and
a null cannot hide behind a success.
"""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyhead.description import to_json
from polyhead.league import TASKS, contender
from polyhead.league.budget import BUDGETS
from polyhead.league.interval import mean_and_half_width
from polyhead.mechanisms import entry
from polyhead.papers import paper

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = ROOT / "tools" / "claims.toml"
LEAGUES = ROOT / "docs" / "results" / "league"

SHOWED = "showed"
OPPOSITE = "the opposite showed"
NULL = "not shown"
WAITING = "not run yet"
UNTESTABLE = "cannot be tested here"

Runs = Mapping[str, Mapping[str, Any]]

_NOTHING = 1e-9  # less than any difference of scores, more than their rounding

EXPECTATIONS = ("better", "not worse", "worse")

# What only claims that a league can speak to have, and what only the others have.
_TESTABLE = {"task", "contender", "comparator", "split", "budget", "expect", "margin", "reach"}
_OTHER = {"untestable", "instead"}


class Malformed(ValueError):
    """A claim, or the results of a league, that cannot be read; the message says where and why."""


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, as tools/claims.toml has it.

    Attributes:
        paper, mechanism: number of the paper, and what it is registered as.
        claim: in our words.
        task: of the leagues that can speak to it; empty where none can.
        contender, comparator: who is held against whom, as `polyhead compare` takes them.
        split: whose scores.
        budget: of the leagues.
        expect: "better", "not worse" or "worse", of the contender.
        margin: how much worse is still "not worse", in units of the score.
        reach: what the league leaves out of the claim.
        untestable: why no league can speak to it; empty where one can.
        instead: files that do.
    """

    paper: str
    mechanism: str
    claim: str
    task: str = ""
    contender: str = ""
    comparator: str = "mha"
    split: str = "validation"
    budget: str = "params"
    expect: str = ""
    margin: float = 0.0
    reach: str = ""
    untestable: str = ""
    instead: tuple[str, ...] = ()


@dataclass(frozen=True)
class League:
    """One results.json, as `Standings.to_json` made it.

    Attributes:
        name: of its folder.
        data: what it holds.
        folder: where it is.
    """

    name: str
    data: Mapping[str, Any]
    folder: Path

    @property
    def task(self) -> str:
        """The task's name; that of its class where Polyhead does not bring it."""
        kind = self.data["rules"]["task"]["part"]
        return next((name for name, task in TASKS.items() if task.kind == kind), kind)

    @property
    def lower(self) -> bool:
        """Whether a lower score is better."""
        return self.task in TASKS and TASKS[self.task].better == "lower"

    @property
    def budget(self) -> str:
        """Which cost is equal for all."""
        return str(self.data["rules"]["budget"])

    @property
    def seeds(self) -> int:
        """Most runs that a contender has."""
        return max((len(one["runs"]) for one in self.data["contenders"]), default=0)

    def runs(self, spec: str) -> Runs | None:
        """Runs by seed of the contender that `spec` describes, however it was spelled; None without it."""
        wanted = _identity(to_json(contender(spec)))
        for one in self.data["contenders"]:
            if _identity(one["contender"]) == wanted:
                found: Runs = one["runs"]
                return found
        return None


@dataclass(frozen=True)
class Verdict:
    """What a league says about a claim.

    Attributes:
        claim: which.
        verdict: "showed", "the opposite showed", "not shown", "not run yet" or "cannot be tested here".
        why: in words; empty where the numbers say all.
        league: which one it is about; None where there is none.
        own, other: mean scores of contender and comparator over the seeds that both finished.
        mean, half: of contender minus comparator, in units of the score, and half of the 95 % interval.
        pairs: seeds that both finished.
    """

    claim: Claim
    verdict: str
    why: str = ""
    league: League | None = None
    own: float = math.nan
    other: float = math.nan
    mean: float = math.nan
    half: float = math.nan
    pairs: int = 0


def load(file: Path = CLAIMS) -> tuple[Claim, ...]:
    """The claims of a file, checked.

    Raises:
        Malformed: a claim with an unknown key, a missing one, or a value that means nothing.
    """
    data = tomllib.loads(file.read_text(encoding="utf-8"))
    if set(data) != {"claim"}:
        raise Malformed(f"{file.name} must hold [[claim]] tables alone; it has {', '.join(sorted(data))}")
    return tuple(_claim(n, one) for n, one in enumerate(data["claim"], 1))


def _claim(number: int, data: Mapping[str, Any]) -> Claim:
    where = f"claim {number} ({data.get('mechanism', 'no mechanism')})"
    common = {"paper", "mechanism", "claim"}
    testable = "untestable" not in data
    allowed = common | (_TESTABLE if testable else _OTHER)
    needed = common | ({"task", "contender", "expect", "reach"} if testable else {"untestable"})
    if unknown := sorted(set(data) - allowed):
        raise Malformed(f"{where}: unknown {', '.join(unknown)}; it may have {', '.join(sorted(allowed))}")
    if missing := sorted(key for key in needed if not data.get(key)):
        raise Malformed(f"{where}: {', '.join(missing)} is missing")
    kinds: dict[str, Any] = {"margin": (int, float), "instead": list}
    for key, value in data.items():
        if not isinstance(value, kinds.get(key, str)) or isinstance(value, bool):
            raise Malformed(f"{where}: {key} cannot be {value!r}")
    given: dict[str, Any] = {key: tuple(value) if key == "instead" else value for key, value in data.items()}
    one = Claim(**given)
    if entry(one.mechanism).name != one.mechanism:
        raise Malformed(f"{where}: it is registered as {entry(one.mechanism).name}")
    if paper(one.paper).number != one.paper or entry(one.mechanism).paper != one.paper:
        raise Malformed(f"{where}: its paper is {entry(one.mechanism).paper}, not {one.paper}")
    if not testable:
        return one
    for key, known in (("task", TASKS), ("expect", EXPECTATIONS), ("budget", BUDGETS)):
        if getattr(one, key) not in known:
            raise Malformed(f"{where}: {key} must be one of {', '.join(known)}; got {getattr(one, key)}")
    if (one.expect == "not worse") != ("margin" in data) or one.margin < 0:
        raise Malformed(f'{where}: a margin, above 0, belongs to "not worse" and to nothing else')
    if one.expect == "not worse" and one.margin == 0:
        raise Malformed(f'{where}: "not worse" by 0 cannot be shown; say by how much')
    if _identity(to_json(contender(one.contender))) == _identity(to_json(contender(one.comparator))):
        raise Malformed(f"{where}: {one.contender} is held against itself")
    return one


def leagues(folder: Path = LEAGUES) -> tuple[League, ...]:
    """The leagues below a folder, by name.

    Raises:
        Malformed: a results.json that is not that of a league.
    """
    found = []
    for file in sorted(folder.glob("*/results.json")):
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            league = League(file.parent.name, data, file.parent)
            _ = league.task, league.budget, league.seeds, data["yardsticks"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Malformed(f"{file} is not the results of a league: {error!r}") from None
        found.append(league)
    return tuple(found)


def judge(claim: Claim, found: Sequence[League]) -> tuple[Verdict, ...]:
    """What the leagues say about a claim: one verdict for each that speaks to it, or one that none does."""
    if claim.untestable:
        return (Verdict(claim, UNTESTABLE, claim.untestable),)
    verdicts = [
        _verdict(claim, league)
        for league in found
        if (league.task, league.budget) == (claim.task, claim.budget)
        # a text of one's own is another task: numbers on it do not compare
        and league.data["rules"]["task"].get("file") is None
    ]
    ran = tuple(one for one in verdicts if one.verdict != WAITING)
    if ran:
        return ran
    return (verdicts[0] if verdicts else Verdict(claim, WAITING, "there is no such league"),)


def _verdict(claim: Claim, league: League) -> Verdict:
    own, other = league.runs(claim.contender), league.runs(claim.comparator)
    sides = {claim.contender: own, claim.comparator: other}
    if not own or not other:
        absent = " and ".join(spec for spec, runs in sides.items() if not runs)
        return Verdict(claim, WAITING, f"{absent} not in the league {league.name}", league)
    scores, against = _scores(own, claim.split, league), _scores(other, claim.split, league)
    both = sorted(set(scores) & set(against), key=int)
    mean, half = mean_and_half_width([scores[seed] - against[seed] for seed in both])
    verdict, why = _decide(claim, league, mean, half, own, other)
    return Verdict(
        claim,
        verdict,
        why,
        league,
        own=statistics.fmean(scores[seed] for seed in both) if both else math.nan,
        other=statistics.fmean(against[seed] for seed in both) if both else math.nan,
        mean=mean,
        half=half,
        pairs=len(both),
    )


def _decide(
    claim: Claim, league: League, mean: float, half: float, own: Runs, other: Runs
) -> tuple[str, str]:
    """A verdict and its reason, from the interval, runs that diverged, and whether anything was learned."""
    lost = {
        spec: _diverged(runs, claim.split)
        for spec, runs in ((claim.contender, own), (claim.comparator, other))
    }
    of = {claim.contender: len(own), claim.comparator: len(other)}
    said = "; ".join(f"{n} of {of[spec]} runs of {spec} diverged" for spec, n in lost.items() if n)
    if math.isnan(half):
        if said:
            return NULL, said
        return (
            (WAITING, "no seed has finished with both")
            if math.isnan(mean)
            else (NULL, "one seed gives no interval")
        )
    if half < _NOTHING < abs(mean):
        # scores are shares of a number of questions, so that a few seeds may agree by chance
        return NULL, "all seeds differ by the same amount, which gives no interval"
    sign = -1 if league.lower else 1
    low, high = sign * mean - half, sign * mean + half  # of how much better the contender is
    least = -claim.margin if claim.expect == "not worse" else 0.0
    contender_won, comparator_won = low > least, high < least
    # the seeds that are left of a side that diverged are its lucky ones: it wins nothing by them
    if (contender_won and lost[claim.contender]) or (comparator_won and lost[claim.comparator]):
        return NULL, said
    if contender_won and claim.expect == "not worse" and not _learned(claim, league, other):
        return NULL, "the comparator is hardly better than without training, and to be no worse says nothing"
    if not contender_won and not comparator_won:
        return NULL, said
    return (SHOWED if comparator_won == (claim.expect == "worse") else OPPOSITE), said


def _learned(claim: Claim, league: League, comparator: Runs) -> bool:
    """Whether the comparator learned the task: it beats the worst yardstick by more than the margin.

    Yardsticks are of "validation", so that is what is looked at whatever the split of the claim.
    """
    yardsticks = [score for score in league.data["yardsticks"].values() if score is not None]
    scores = _scores(comparator, "validation", league)
    if not yardsticks or not scores:
        return True
    sign = -1 if league.lower else 1
    worst = min(sign * float(score) for score in yardsticks)
    return sign * statistics.fmean(scores.values()) > worst + claim.margin


def _diverged(runs: Runs, split: str) -> int:
    """Runs that diverged, or whose answers have no finite score."""
    return sum(
        run["status"] == "diverged" or (run["status"] == "finished" and run["scores"].get(split) is None)
        for run in runs.values()
    )


def _scores(runs: Runs, split: str, league: League) -> dict[str, float]:
    """Scores of finished runs by seed."""
    done = {seed: run["scores"] for seed, run in runs.items() if run["status"] == "finished"}
    if any(split not in scores for scores in done.values()):
        raise Malformed(f"{league.name}: its runs have no scores of {split!r}")
    return {seed: float(scores[split]) for seed, scores in done.items() if scores[split] is not None}


def _identity(data: Mapping[str, Any]) -> tuple[Any, ...]:
    """Who a contender is, whatever it is called and in whichever order its options stand."""
    options = [sorted(json.dumps(pair, sort_keys=True) for pair in layer) for layer in data["options"]]
    return tuple(data["names"]), json.dumps(options)
