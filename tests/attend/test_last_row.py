"""What the last query sees, as runs: the last row of the mask written out."""

from __future__ import annotations

import itertools

import pytest
import torch

import polyhead as ph
from polyhead.attend.masks import Mask, densify, runs_of_last

KNOWN = {
    "causal": ph.causal(),
    "near": ph.window(3),
    "both sides": ph.window(3, 2),
    "ahead": ph.window(None, None),
    "first": ph.sink(2),
    "prefix": ph.prefix(5),
    "a shape": ph.causal() & (ph.sink(2) | ph.window(4)),
    "three": ph.sink(1) | ph.window(2) | ph.prefix(3),
    "nothing": ph.sink(2) & ph.window(1),
    "none": ph.sink(0),
    "nested": (ph.sink(8) | ph.window(0)) & (ph.sink(3) | ph.window(6)),
}


@pytest.mark.parametrize("keys", [1, 4, 7, 20])
@pytest.mark.parametrize("name", KNOWN)
def test_runs_are_the_last_row(name: str, keys: int) -> None:
    runs = runs_of_last(KNOWN[name], keys)
    assert runs is not None
    assert all(start < stop for start, stop in runs)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs))
    row = torch.zeros(keys, dtype=torch.bool)
    for start, stop in runs:
        row[start:stop] = True
    assert torch.equal(row, densify(KNOWN[name], queries=1, keys=keys).flatten())


@pytest.mark.parametrize(
    "mask",
    [ph.padding(torch.ones(1, 9, dtype=torch.bool)), ~ph.sink(2), ph.causal() & ph.strided(2)],
    ids=str,
)
def test_others_are_not_known(mask: Mask) -> None:
    assert runs_of_last(mask, 9) is None


def test_no_mask() -> None:
    assert runs_of_last(None, 4) == [(0, 4)]
