"""The page of small checks: what papers say should be tried at a small scale, and what came out.

python tools/checks.py            write docs/results/checks/README.md
python tools/checks.py --check    fail if it is not what would be written, or a check points to nothing

tools/checks/*.toml holds one [[check]] for each part of the small check of a paper:

    paper, mechanism   number of the paper, and what is checked as it is called here
    check              what is to be tried, in our words
    where              what tries it: "tests/FILE.py::TEST", "benchmarks/FILE.py", "experiments/FILE.py", or
                       "league:NAME", whose verdicts on the claims of that paper are put in
    outcome            what came out; left out where a league says it, or an experiment has not run yet
    not_done           in place of these two: why it was not tried
"""

from __future__ import annotations

import argparse
import ast
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pages import code, row, settle
from polyhead.errors import PolyheadError
from polyhead.mechanisms import catalog, entry
from polyhead.papers import paper
from verdicts import ROOT, WAITING, Claim, League, Malformed, Verdict, judge, leagues, load

CHECKS = ROOT / "tools" / "checks"
PAGE = ROOT / "docs" / "results" / "checks" / "README.md"

DONE, PENDING, NOT_DONE = "done", "written, not run yet", "not done"


@dataclass(frozen=True)
class Check:
    """One part of the small check of a paper; see above."""

    paper: str
    mechanism: str
    check: str
    where: tuple[str, ...] = ()
    outcome: str = ""
    not_done: str = ""

    def of(self, kind: str) -> tuple[str, ...]:
        """What stands behind `kind` in `where`: names of leagues, of experiments."""
        return tuple(one.removeprefix(kind) for one in self.where if one.startswith(kind))


def read(folder: Path = CHECKS, root: Path = ROOT) -> tuple[Check, ...]:
    """Every check, by paper.

    Raises:
        Malformed: a check with an unknown key or a missing one, or that points to nothing.
    """
    found: list[Check] = []
    for file in sorted(folder.glob("*.toml")):
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        if set(data) != {"check"}:
            raise Malformed(f"{file.name} must hold [[check]] tables alone; it has {', '.join(sorted(data))}")
        found += [_check(f"{file.name}, check {n}", one, root) for n, one in enumerate(data["check"], 1)]
    return tuple(sorted(found, key=lambda one: one.paper))


def _check(where: str, data: dict[str, Any], root: Path) -> Check:
    fields = set(Check.__dataclass_fields__)
    where += f" ({data.get('paper', 'no paper')})"
    if unknown := sorted(set(data) - fields):
        raise Malformed(f"{where}: unknown {', '.join(unknown)}; it may have {', '.join(sorted(fields))}")
    for key, value in data.items():
        if not isinstance(value, list if key == "where" else str) or not value:
            raise Malformed(f"{where}: {key} cannot be {value!r}")
    if missing := sorted({"paper", "mechanism", "check"} - set(data)):
        raise Malformed(f"{where}: {', '.join(missing)} is missing")
    one = Check(**data | {"where": tuple(data.get("where", ()))})
    if bool(one.where) == bool(one.not_done) or (one.not_done and one.outcome):
        raise Malformed(f"{where}: it has either where, with an outcome, or not_done")
    told = one.outcome or one.of("league:") or not all(result_of(n).is_file() for n in one.of("experiments/"))
    if one.where and not told:
        raise Malformed(f"{where}: outcome is missing; leagues alone tell theirs by themselves")
    known = paper(one.paper)
    if known.number != one.paper:
        raise Malformed(f"{where}: its paper is written {known.number}")
    if one.mechanism not in (known.name, *known.aliases) and entry(one.mechanism).paper != one.paper:
        raise Malformed(f"{where}: {one.mechanism} is of paper {entry(one.mechanism).paper}")
    for target in one.where:
        if problem := _absent(target, root):
            raise Malformed(f"{where}: {target}: {problem}")
    return one


def _absent(target: str, root: Path) -> str:
    """Why `target` points to nothing; empty where it does not."""
    if target.startswith("league:"):
        known = tomllib.loads((root / "tools" / "leagues.toml").read_text(encoding="utf-8"))
        return "" if target.removeprefix("league:") in known else "tools/leagues.toml has no such league"
    name, _, test = target.partition("::")
    if name.split("/")[0] not in ("tests", "benchmarks", "experiments") or not name.endswith(".py"):
        return "it is neither a test, a benchmark, an experiment nor a league"
    if not (root / name).is_file():
        return "there is no such file"
    if name.startswith("tests/") != bool(test):
        return "a test has a name behind ::, and nothing else has"
    return "" if not test or test in _functions(root / name) else "the file has no such test"


@cache
def _functions(file: Path) -> frozenset[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return frozenset(one.name for one in tree.body if isinstance(one, ast.FunctionDef))


def without(found: Iterable[Check]) -> list[str]:
    """Numbers of the papers of the catalogue that no check is of."""
    have = {one.paper for one in found}
    return sorted({one.paper for one in catalog() if one.paper is not None} - have)


METHOD = """
For every paper there is something that can be tried on two cores: an identity, a construction by hand, a
count, an effect on a small pretrained model, a short training. Here is each part of it, what tries it, and
what came out, nulls and opposites too. What leagues say, and how sure that is, stands on [their
page](../league/README.md); experiments keep their numbers beside this page. A number with ± is a mean over
seeds with its 95 % interval by Student's t.
"""


def page(found: Sequence[Check], claims: Sequence[Claim], played: Sequence[League]) -> str:
    """The page of docs/results/checks/."""
    rows: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for one in found:
        status, cells = _cells(one, claims, played)
        counts[status] += 1
        rows.setdefault(one.paper, []).append(row(status, one.check, *cells))
    lines = [
        "# Small checks of the papers",
        "",
        "<!-- written by tools/checks.py from tools/checks/ and the results that it points to -->",
        "",
        " ".join(METHOD.split()),
        "",
        "| | parts |",
        "| --- | ---: |",
        *(f"| {status} | {counts[status]} |" for status in (DONE, PENDING, NOT_DONE)),
    ]
    if missing := without(found):
        lines += ["", f"Not looked at yet: {', '.join(missing)}."]
    for number, parts in rows.items():
        known = paper(number)
        title = f"[{known.title}]({known.url})" if known.url else known.title
        lines += ["", f"## {number} {known.short}", "", title, ""]
        lines += ["| | check | by | what came out |", "| --- | --- | --- | --- |", *parts]
    return "\n".join(lines) + "\n"


def _cells(one: Check, claims: Sequence[Claim], played: Sequence[League]) -> tuple[str, tuple[str, str]]:
    """Whether a check is done, what tries it, and what came out."""
    if one.not_done:
        return NOT_DONE, ("", one.not_done)
    said = [one.outcome] if one.outcome else []
    waits = [name for name in one.of("experiments/") if not result_of(name).is_file()]
    for name in one.of("league:"):
        verdicts = list(_verdicts(one.paper, name, claims, played))
        said += map(_said, verdicts)
        if not verdicts:
            waits.append(name)
    done = bool(one.outcome) or not waits
    if waits:
        said.append(f"Not run yet: {', '.join(waits)}.")
    return DONE if done else PENDING, ("; ".join(_links(one.where)), " ".join(said))


def result_of(experiment: str) -> Path:
    """Where an experiment keeps its numbers."""
    return PAGE.parent / Path(experiment).with_suffix(".json").name


def _verdicts(number: str, name: str, claims: Sequence[Claim], played: Sequence[League]) -> Iterator[Verdict]:
    league = [one for one in played if one.name == name]
    for claim in claims:
        if claim.paper == number and league:
            yield from (one for one in judge(claim, league) if one.league and one.verdict != WAITING)


def _said(one: Verdict) -> str:
    """A verdict as a sentence."""
    assert one.league is not None
    words = one.claim.claim.rstrip(".")
    sure = f" ({one.mean:+.4f} ± {one.half:.4f})" if one.half == one.half else ""
    return (
        f"{one.claim.split.capitalize()}, {code(one.claim.contender)} against {code(one.claim.comparator)}: "
        f"{words}: *{one.verdict}*{sure}."
    )


def _links(where: Iterable[str]) -> Iterator[str]:
    """What tries a check: links where the documentation has a page of it, tests by file."""
    tests: dict[str, list[str]] = {}
    for target in where:
        file, _, test = target.partition("::")
        if target.startswith("league:"):
            yield f"[league {target.removeprefix('league:')}](../league/README.md)"
        elif target.startswith("experiments/") and (result := result_of(target)).is_file():
            yield f"{code(target)} ([numbers]({result.name}))"
        elif test:
            tests.setdefault(file, []).append(code(test))
        else:
            yield code(target)
    for file, names in tests.items():
        yield f"{code(file)}: {', '.join(names)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description="What came out of the small checks of papers.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it would differ")
    options = parser.parse_args(arguments)
    try:
        text = page(read(), load(), leagues())
    except (Malformed, PolyheadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return settle(PAGE, text, check=options.check, tool="tools/checks.py")


if __name__ == "__main__":
    sys.exit(main())
