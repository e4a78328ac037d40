"""Reasons to refuse a call that several backends share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import polyhead as ph
from polyhead.attend.normalizers import softmax
from polyhead.attend.refusals import beyond_softmax, inside_transform
from polyhead.attend.request import request_of

PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "score": ({"score": ph.alibi(2)}, "it has no score maps, and the call has ALiBi"),
    "weight_map": ({"weight_map": ph.head_mix(torch.eye(2))}, "it has no maps of the weights"),
    "normalizer": ({"normalizer": softmax(sink=0.0)}, "it normalises by plain softmax, not by"),
    "dropout": ({"dropout": 0.5}, "it has no dropout"),
    "lse": ({"return_lse": True}, "it does not return the log-sum-exp"),
}


def request(**call: Any) -> Any:
    x = torch.zeros(1, 2, 4, 8)
    given = {
        "mask": None,
        "select": None,
        "score": None,
        "normalizer": softmax(),
        "weight_map": None,
        "scale": None,
        "dropout": 0.0,
        "return_lse": False,
    }
    return request_of(x, x, x, **(given | call))


def test_nothing_is_beyond_softmax_in_a_plain_call() -> None:
    assert beyond_softmax(request()) == ""


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_refused_unless_the_backend_has_it(part: str) -> None:
    call, reason = PARTS[part]
    assert beyond_softmax(request(**call)).startswith(reason)
    assert beyond_softmax(request(**call), **{part: True}) == ""
    others = {name: True for name in PARTS if name != part}
    assert beyond_softmax(request(**call), **others).startswith(reason)


def test_a_transform_is_seen_from_within_alone() -> None:
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(inside_transform())
        return x

    look(torch.zeros(2))
    torch.func.vmap(look)(torch.zeros(2))
    assert seen == [False, True]
