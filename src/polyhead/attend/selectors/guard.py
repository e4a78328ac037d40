"""A guard: heads of which a selector misses too much read everything; how often that happens is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyhead.attend.across_pairs import check_single_pairs
from polyhead.attend.masks import Chosen, Mask
from polyhead.attend.normalizers import Softmax
from polyhead.attend.selectors.around import Around
from polyhead.attend.selectors.choice import chosen_blocks
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.lists import listed
from polyhead.attend.selectors.probes import Probes, even_probes
from polyhead.attend.selectors.selector import Correcting, Kept, Selector
from polyhead.checks import given, number, whole
from polyhead.errors import ConfigError

__all__ = ["Guarded", "Selections", "guarded", "selections"]

_SEEN: ContextVar[Selections | None] = ContextVar("polyhead_selections", default=None)


@dataclass
class Selections:
    """What guarded selectors did while `selections()` was open.

    Attributes:
        calls: of guarded selectors.
        heads: heads of sequences that chose, over all calls.
        fell_back: those of them that read everything in the end.
        missed: of every call the missed mass `(B, H)`, mean over the probes.
    """

    calls: int = 0
    heads: int = 0
    fell_back: int = 0
    missed: list[Tensor] = field(default_factory=list)


@contextmanager
def selections() -> Iterator[Selections]:
    """Count what guarded selectors do within this context."""
    seen = Selections()
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


class Guarded(Around):
    """Another selector, but heads of which it misses too much read everything. See `guarded`."""

    most: float
    probes: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.selector, Selector):
            raise ConfigError(
                f"guarded: selector must be one such as select(mean_keys(), keep_share(0.1)); "
                f"got {given(self.selector)}"
            )
        if isinstance(self.selector, Correcting):
            raise ConfigError(
                "guarded: a selector that corrects the output goes around the guarded one, "
                f"rectified(guarded(a)); got {given(self.selector)}"
            )
        object.__setattr__(self, "most", number("guarded: most", self.most, least=0, most=1))
        whole("guarded: probes", self.probes, 1)

    def flops(self, grid: Grid, width: int) -> int:
        probed = 2 * grid.batch * grid.heads * min(self.probes, grid.queries) * grid.keys * width
        return self.selector.flops(grid, width) + probed

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        check_single_pairs("guarded", grid.score)
        found = chosen_blocks(self.selector, q, k, mask, grid)
        missed = _missed(q, k, mask, found, even_probes(grid, self.probes, q.device))
        dense = missed > self.most
        seen = _SEEN.get()
        if seen is not None:
            seen.calls += 1
            seen.heads += dense.numel()
            seen.fell_back += int(dense.sum())
            seen.missed.append(missed.cpu())

        def kept(start: int, stop: int, visible: Tensor) -> Tensor:
            return listed(found.index[:, :, start:stop], visible.shape[3]) | dense[..., None, None]

        return kept


def guarded(selector: Selector, most: float = 0.02, probes: int = 64) -> Selector:
    """`selector`, but a head of which it misses more than `most` of the mass reads everything.

    The missed mass is that of `missed_mass`, measured at `probes` queries of every head, evenly over those
    of the sequence that are no padding, and taken in the mean over those that see anything: an estimate for
    the other queries, exact where there are no more than `probes`. It is that of the call's own logits, score
    maps included, and of softmax whatever the normaliser; a sink is a key that is always read. It costs
    `probes` rows of dense scores. `selections()` counts how often heads fell back.

    Args:
        selector: what is guarded.
        most: missed mass that is let pass, 0 to 1.
        probes: queries that are looked at.
    """
    return Guarded(selector, most, probes)


def _missed(q: Tensor, k: Tensor, mask: Mask | None, found: Chosen, probes: Probes) -> Tensor:
    """Mean missed mass `(B, H)` of some queries, of those that see anything."""
    seen, normalizer = probes.seen(mask), probes.grid.normalizer
    softmax = normalizer if isinstance(normalizer, Softmax) else Softmax()
    # a sink takes its part of the weights, and is always read
    weights = softmax(probes.scored(probes.logits(q, k)).masked_fill(~seen, -torch.inf))
    missed = weights.masked_fill(probes.seen(found), 0.0).sum(-1)
    return missed.sum(-1) / seen.any(-1).sum(-1).clamp(min=1)
