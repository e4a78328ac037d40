"""The contract of the conformance suite for a mechanism with other options than its defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

import polyhead as ph
from conformance import contract
from conformance.contract import Case, failing

__all__ = ["broken_rules"]

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


def broken_rules(
    name: str, *, compiled: bool = False, every: bool = False, without: str = "", **options: Any
) -> dict[str, str]:
    """The checks that the mechanism fails with these options, with why.

    Args:
        compiled: check `torch.compile` as well.
        every: make all checks of the suite, `torch.compile` among them.
        without: names of checks that do not fit the options.
    """
    known = contract.CHECKS if every else _CHECKS
    checks = [check for check in known if check.__name__ not in without.split()]
    if compiled and not every:
        checks.append(contract.compiles)
    return failing(_Variant(ph.entry(name), options=tuple(options.items())), checks)
