"""The page of claims: which of tools/claims.toml showed in the leagues of docs/results/league/.

python tools/claims.py            write docs/results/league/README.md
python tools/claims.py --check    fail if it is not what would be written
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pages import code, plural, row, settle
from polyhead.errors import PolyheadError
from verdicts import (
    CLAIMS,
    LEAGUES,
    NULL,
    OPPOSITE,
    SHOWED,
    UNTESTABLE,
    WAITING,
    Claim,
    League,
    Malformed,
    Verdict,
    judge,
    leagues,
    load,
)


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
            f"{plural(strict, 'claim')} of better or worse {0.025 * strict:.2g} would show all the same, "
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
        yield row(
            _who(claim),
            claim.claim,
            f"[{one.league.name}](#leagues), {claim.split}",
            f"{code(claim.contender)} against {code(claim.comparator)}",
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
        yield row(
            _who(claim),
            claim.claim,
            f"{claim.task}, {claim.budget}, {claim.split}",
            f"{code(claim.contender)} against {code(claim.comparator)}",
            claim.expect + margin,
            one.why,
        )


def _untestable(verdicts: Sequence[Verdict]) -> Iterator[str]:
    yield "| paper | claim | cannot be tested here: why | what speaks to it, or to a part of it |"
    yield "| --- | --- | --- | --- |"
    for one in verdicts:
        yield row(_who(one.claim), one.claim.claim, one.why, ", ".join(map(code, one.claim.instead)))


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
        yield row(
            one.name,
            one.task,
            one.budget + limit,
            f"{plural(sizes['layers'], 'layer')}, width {sizes['dim']}, {sizes['heads']} heads",
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
    return f"{claim.paper} {code(claim.mechanism)}"


def _are(number: int, what: str) -> str:
    return f"{'is' if number == 1 else 'are'} {plural(number, what)}"


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
    return settle(options.leagues / "README.md", text, check=options.check, tool="tools/claims.py")


if __name__ == "__main__":
    sys.exit(main())
