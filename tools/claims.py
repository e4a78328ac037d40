"""Which claims of papers showed in the leagues of docs/results/league/, by tools/claims.toml.

    python tools/claims.py            write docs/results/league/README.md
    python tools/claims.py --check    fail if it is not what would be written

Every claim is held against every league of its task and its budget, so one that is run twice counts twice and
a null cannot hide behind a success.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyhead.description import to_json
from polyhead.errors import PolyheadError
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


def page(claims: Iterable[Claim], found: Sequence[League]) -> str:
    """The page of docs/results/league/."""
    verdicts = [verdict for claim in claims for verdict in judge(claim, found)]
    grouped = {
        kind: [one for one in verdicts if one.verdict == kind]
        for kind in (SHOWED, OPPOSITE, NULL, WAITING, UNTESTABLE)
    }
    lines = [
        "# Claims of papers, and what leagues showed",
        "",
        "<!-- written by tools/claims.py from tools/claims.toml and the results beside this page -->",
        "",
        *_method(grouped),
        "",
        "| verdict | claims |",
        "| --- | ---: |",
        *(f"| {kind} | {len(ones)} |" for kind, ones in grouped.items()),
    ]
    titles = {SHOWED: "Showed", OPPOSITE: "The opposite showed", NULL: "Not shown"}
    for kind, title in titles.items():
        if grouped[kind]:
            lines += ["", f"## {title}", "", *_table(grouped[kind])]
    if grouped[WAITING]:
        lines += ["", "## Not run yet", "", *_waiting(grouped[WAITING])]
    if grouped[UNTESTABLE]:
        lines += ["", "## Cannot be tested here", "", *_untestable(grouped[UNTESTABLE])]
    lines += ["", "## Leagues", "", *_leagues(found)]
    return "\n".join(lines) + "\n"


# CHANCE is how many intervals miss
METHOD = """
A claim names a contender, a comparator, a task and a direction. Both are trained on the same questions with
the same seeds at the same budget; their scores are subtracted seed by seed, and the mean of the differences
has a 95 % interval by Student's t. A claim *showed* if the interval lies wholly on its side of zero, or,
for "not worse", of minus a margin, which is taken from the paper's own numbers where it has any; *the
opposite showed* if it lies wholly on the other side; else it is *not shown*: these runs cannot tell, which
does not say that there is nothing. A side with runs that diverged wins nothing by the others, and to be no
worse than a comparator that learned nothing counts for nothing. A claim that two leagues speak to stands
here twice. CHANCE Claims that share a contender or a comparator share its luck, so chance comes in
clusters, and nothing is corrected for how many claims there are. Intervals are about seeds and about
nothing else: the validation questions are the same for all, and there is one recipe, which was chosen so
that plain attention learns the task. These are models of a hundred thousand parameters or a million,
trained for minutes. What shows here is a hint of what happens at the size that the paper is about, and what
does not show here does not refute it.
"""


def _method(grouped: Mapping[str, Sequence[Verdict]]) -> Iterator[str]:
    tested = [one for kind in (SHOWED, OPPOSITE, NULL) for one in grouped[kind] if math.isfinite(one.half)]
    strict = sum(one.claim.expect != "not worse" for one in tested)
    chance = "Of every 20 intervals one misses the truth by chance."
    if tested:
        chance = (
            f"There {_are(len(tested), 'interval')} below; by chance {0.05 * len(tested):.2g} of them miss "
            "the truth. If no mechanism made any difference at all, of the "
            f"{_plural(strict, 'claim')} of better or worse {0.025 * strict:.2g} would show all the same, "
            f"and the opposite of another {0.025 * strict:.2g}."
        )
    yield " ".join(METHOD.replace("CHANCE", chance).split())


def _table(verdicts: Sequence[Verdict]) -> Iterator[str]:
    yield (
        "| paper | claim | league, split | contender against comparator | expected | scores "
        "| difference (95 %) | seeds | reach |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | ---: | --- |"
    for one in verdicts:
        assert one.league is not None
        claim, lower = one.claim, one.league.lower
        margin = f" by more than {claim.margin:g}" if claim.expect == "not worse" else ""
        half = "" if math.isnan(one.half) else f" ±{one.half:.4f}"
        numbers = "" if math.isnan(one.mean) else f"{one.own:.4f}, {one.other:.4f} {'↓' if lower else '↑'}"
        difference = "" if math.isnan(one.mean) else f"{one.mean:+.4f}{half}"
        why = f"{_first_upper(one.why)}. " if one.why else ""
        yield _row(
            _who(claim),
            claim.claim,
            f"[{one.league.name}](#leagues), {claim.split}",
            f"{_code(claim.contender)} against {_code(claim.comparator)}",
            claim.expect + margin,
            numbers,
            difference,
            f"{one.pairs} of {one.league.seeds}",
            why + claim.reach,
        )


def _waiting(verdicts: Sequence[Verdict]) -> Iterator[str]:
    yield "| paper | claim | task, budget, split | contender against comparator | expected | why |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for one in verdicts:
        claim = one.claim
        margin = f" by more than {claim.margin:g}" if claim.expect == "not worse" else ""
        yield _row(
            _who(claim),
            claim.claim,
            f"{claim.task}, {claim.budget}, {claim.split}",
            f"{_code(claim.contender)} against {_code(claim.comparator)}",
            claim.expect + margin,
            one.why,
        )


def _untestable(verdicts: Sequence[Verdict]) -> Iterator[str]:
    yield "| paper | claim | cannot be tested here: why | what speaks to it, or to a part of it |"
    yield "| --- | --- | --- | --- |"
    for one in verdicts:
        yield _row(_who(one.claim), one.claim.claim, one.why, ", ".join(map(_code, one.claim.instead)))


def _leagues(found: Sequence[League]) -> Iterator[str]:
    if not found:
        yield "None yet."
        return
    yield "| league | task | budget | model of `mha` | steps × batch | seeds | contenders | files |"
    yield "| --- | --- | --- | --- | --- | ---: | ---: | --- |"
    notes = []
    for one in found:
        rules = one.data["rules"]
        limit = "" if rules.get("limit") is None else f" = {rules['limit']:,}"
        files = (("results.csv", "numbers"), ("scores.svg", "scores"), ("leaderboard.html", "page"))
        links = [
            f"[{word}]({one.name}/{name})"
            for name, word in (("results.json", "runs"), *files)
            if (one.folder / name).is_file()
        ]
        sizes, recipe = rules["sizes"], rules["recipe"]
        yield _row(
            one.name,
            one.task,
            one.budget + limit,
            f"{_plural(sizes['layers'], 'layer')}, width {sizes['dim']}, {sizes['heads']} heads",
            f"{recipe['steps']:,} × {recipe['batch']}",
            one.seeds,
            len(one.data["contenders"]),
            ", ".join(links),
        )
        machine = one.folder / "machine.txt"
        if machine.is_file():
            said = machine.read_text(encoding="utf-8").splitlines()
            notes.append(f"- {one.name}: {said[0].strip() if said else ''}")
    if notes:
        yield ""
        yield "Machines:"
        yield ""
        yield from notes


def _who(claim: Claim) -> str:
    return f"{claim.paper} {_code(claim.mechanism)}"


def _code(text: str) -> str:
    return f"`{text}`"


def _row(*cells: object) -> str:
    # a bar would end the cell, in code too
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _plural(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _are(number: int, what: str) -> str:
    return f"{'is' if number == 1 else 'are'} {_plural(number, what)}"


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description="Which claims of papers showed in leagues.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it would differ")
    parser.add_argument("--claims", type=Path, default=CLAIMS, help="the claims")
    parser.add_argument("--leagues", type=Path, default=LEAGUES, help="where leagues and page are")
    options = parser.parse_args(arguments)
    try:
        text = page(load(options.claims), leagues(options.leagues))
    except (Malformed, PolyheadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = options.leagues / "README.md"
    if options.check:
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            return 0
        print(f"error: {file} is not what the results say; run python tools/claims.py", file=sys.stderr)
        return 1
    options.leagues.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="\n")
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
