"""Every registered mechanism keeps the contract; nobody adds a line here for a new one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import polyhead as ph
from conformance.contract import CHECKS, Case


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", [entry.name for entry in ph.catalog()])
def test_contract(name: str, check: Callable[[Case], None]) -> None:
    check(Case(ph.entry(name)))
