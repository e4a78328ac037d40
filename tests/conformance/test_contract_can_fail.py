"""The contract catches what it is there for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

import polyhead as ph
from conformance.broken import BROKEN, BreaksAsDeclared, Centred, SelfOnly, Sound, TaughtAside, case
from conformance.contract import CHECKS, Case, causal, failing
from polyhead.mechanisms import AttentionConfig, Promises, Registry
from polyhead.nn import MultiHeadAttention


@pytest.mark.parametrize(
    "kind", [Sound, SelfOnly, BreaksAsDeclared, TaughtAside], ids=lambda kind: kind.__name__
)
def test_a_sound_mechanism_passes_everything(kind: type[MultiHeadAttention]) -> None:
    assert failing(case(kind)) == {}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_mechanism_is_caught(kind: type[MultiHeadAttention]) -> None:
    expected = BROKEN[kind]
    checks: list[Callable[[Case], None]] = [check for check in CHECKS if check.__name__ in expected]
    assert set(failing(case(kind), checks)) == expected


def test_only_what_moves_in_steps_may_stand_still_at_a_change() -> None:
    stepping = case(Centred)
    assert failing(stepping, [causal]) == {}
    plain = Case(dataclasses.replace(stepping.entry, promises=Promises()), twin_name="mha")
    assert "does not move its own output" in failing(plain, [causal])["causal"]


def test_every_check_catches_something() -> None:
    caught = set().union(*BROKEN.values())
    assert {check.__name__ for check in CHECKS} - caught == {"facts"}


def test_facts_catches_a_mechanism_without_a_summary_and_one_without_a_default() -> None:
    class ScratchNeedsMore(AttentionConfig):
        """Needs a field that has no default."""

        groups: int

    registry = Registry()
    registry.register("needs_more", title="-", family="-", summary="-", equation="-")(ScratchNeedsMore)
    assert "facts" in failing(Case(registry.entry("needs_more")))
    silent = Registry()
    silent.register("silent", title="-", family="-", summary="", equation="-")(
        type(case(Sound).entry.config(8, 1))
    )
    assert "facts" in failing(Case(silent.entry("silent")))


def test_scratch_mechanisms_stay_out_of_the_catalogue() -> None:
    assert not {entry.name for entry in ph.catalog()} & {kind.__name__.lower() for kind in BROKEN}
