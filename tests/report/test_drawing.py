"""Drawings that pages share."""

from __future__ import annotations

import math
import re

from polyhead.report.drawing import Group, pareto


def test_the_front_joins_what_nothing_beats_in_both() -> None:
    groups = [
        Group(0, [(1.0, 1.0, "cheap"), (3.0, 3.0, "good")], joined=True),
        Group(1, [(2.0, 0.5, "beaten"), (3.0, 3.0, "its equal"), (0.1, math.nan, "unknown")]),
    ]

    def drawn(sign: int) -> tuple[str, list[str]]:
        gains = (lambda cost: sign * cost, lambda score: score)
        made = pareto(groups, title="t", good="g", across="cost", gains=gains)
        return made.parts[-3], re.findall(r"<title>(.*?)</title>", "".join(made.parts))

    front, said = drawn(-1)
    assert "front" in front
    assert len(re.findall(r"[\d.]+[ ,][\d.]+", front)) == 2
    assert said == ["cheap", "good", "beaten", "its equal"]
    assert (
        drawn(1)[0] == ""
    )  # if more were better across too, one would beat all, and one point joins nothing
