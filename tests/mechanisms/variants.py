"""The contract of the conformance suite for a mechanism with other options than its defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

import polyhead as ph
from conformance import contract
from conformance.contract import Case, failing

__all__ = ["broken_rules", "variant"]

# those that options can break; the suite itself runs the others on the defaults
_CHECKS = (
    contract.equals_twin,
    contract.equals_twin_masked,
    contract.padding,
    contract.decode,
    contract.decode_padded,
    contract.decode_cross,
    contract.cache_edits,
    contract.gradients,
    contract.round_trips,
    contract.cost,
)


@dataclasses.dataclass(frozen=True)
class _Variant(Case):
    options: tuple[tuple[str, Any], ...] = ()

    def build(self, **options: Any) -> nn.Module:
        return super().build(**dict(self.options) | options)


def variant(name: str, **options: Any) -> Case:
    """The mechanism with these options, for single checks."""
    return _Variant(ph.entry(name), options=tuple(options.items()))


def broken_rules(
    name: str, *, compiled: bool = False, whole: bool = False, without: str = "", **options: Any
) -> dict[str, str]:
    """The checks that the mechanism fails with these options, with why.

    Args:
        compiled: check `torch.compile` as well.
        whole: check all of the contract, as where options change what kind of thing a head receives.
        without: names of checks that do not fit the options.
    """
    every = contract.CHECKS if whole else _CHECKS
    checks = [check for check in every if check.__name__ not in without.split()]
    if compiled and not whole:
        checks.append(contract.compiles)
    return failing(variant(name, **options), checks)
