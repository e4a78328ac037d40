"""Selectors: which blocks of keys every block of queries reads, decided from the content."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from polyhead.attend.masks import Chosen, Mask
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.lists import listed
from polyhead.checks import given
from polyhead.description import Part
from polyhead.errors import ConfigError

__all__ = ["Correcting", "Either", "Kept", "Listing", "Selector"]

Kept = Callable[[int, int, Tensor], Tensor]


class Selector(Part):
    """Which blocks of keys every block of queries of every head reads."""

    @property
    def rows(self) -> int:
        """Queries that choose together."""
        raise NotImplementedError

    @property
    def cols(self) -> int:
        """Keys that are chosen together."""
        raise NotImplementedError

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        """What does not depend on the block of queries, worked out once.

        Returns:
            A function of `start, stop, visible`: which blocks those of queries from start to stop - 1 read,
            bool `(B, H, stop - start, N)`, of the `visible` ones, bool of the same shape.
        """
        raise NotImplementedError

    def single(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor | None:
        """The blocks that a single query reads, distinct integers `(B, H, 1, K)`, as many in every head.

        For the step of decoding, where a table of all blocks, and the search in it, take longer than the
        choice itself. None: only `prepare` can tell.
        """
        return None

    def check(self, heads: int) -> None:
        """Raise a `ShapeError` if the selector holds numbers for another number of heads."""

    def flops(self, grid: Grid, width: int) -> int:
        """Operations of the matrix products of a choice, heads so wide; 0 where nothing is said."""
        return 0

    @property
    def remembers(self) -> bool:
        """Whether it goes by queries of the past, so that calls that go on need what `begin` gives."""
        return False

    def begin(self) -> Selector:
        """The selector of one layer for a text that is read call by call, from its start."""
        return self

    def see(self, q: Tensor, k: Tensor, mask: Mask | None, scale: float) -> None:
        """Take notice of a call that chooses nothing."""

    def __or__(self, other: Selector) -> Selector:
        return Either((self, other))


class Listing(Selector):
    """A selector that lists the blocks that are read, and needs no table of all blocks to find them."""

    def places(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        """The blocks that blocks of queries read, integers `(B, H, M, K)`, -1 where there are fewer than K.

        H may be 1: all heads read the same. A block may be listed once, and may be one that is not visible:
        the mask hides it.
        """
        raise NotImplementedError

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        places = self.places(q, k, mask, grid)

        def kept(start: int, stop: int, visible: Tensor) -> Tensor:
            return listed(places[:, :, start:stop], grid.col_blocks) & visible

        return kept


class Correcting(Selector):
    """A selector behind which the output is corrected for what was not read."""

    def correct(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, found: Chosen, scale: float
    ) -> Tensor:
        """The output `(B, H, L, Dv)`, corrected.

        Args:
            out: what plain softmax over the chosen keys gave.
            q, k, v, mask, scale: of the call.
            found: what was chosen in it.
        """
        raise NotImplementedError


class Either(Selector):
    """What any of several selectors reads. Made by `a | b`."""

    terms: tuple[Selector, ...]

    def __post_init__(self) -> None:
        if not all(isinstance(term, Selector) for term in self.terms) or not self.terms:
            raise ConfigError(f"|: both sides must be selectors; got {given(self.terms)}")
        if any(isinstance(term, Correcting) for term in self.terms):
            raise ConfigError(
                "|: a selector that corrects the output goes around the others, rectified(a | b); got "
                f"{given(self.terms)}"
            )
        flat = tuple(
            one for term in self.terms for one in (term.terms if isinstance(term, Either) else (term,))
        )
        object.__setattr__(self, "terms", flat)
        if len({(term.rows, term.cols) for term in flat}) > 1:
            said = ", ".join(f"{term.rows} × {term.cols}" for term in flat)
            raise ConfigError(f"|: selectors must have blocks of one size; they have {said}")

    @property
    def rows(self) -> int:
        return self.terms[0].rows

    @property
    def cols(self) -> int:
        return self.terms[0].cols

    def check(self, heads: int) -> None:
        for term in self.terms:
            term.check(heads)

    def flops(self, grid: Grid, width: int) -> int:
        return sum(term.flops(grid, width) for term in self.terms)

    @property
    def remembers(self) -> bool:
        return any(term.remembers for term in self.terms)

    def begin(self) -> Selector:
        return Either(tuple(term.begin() for term in self.terms))

    def see(self, q: Tensor, k: Tensor, mask: Mask | None, scale: float) -> None:
        for term in self.terms:
            term.see(q, k, mask, scale)

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        each = [term.prepare(q, k, mask, grid) for term in self.terms]

        def kept(start: int, stop: int, visible: Tensor) -> Tensor:
            found = each[0](start, stop, visible)
            for one in each[1:]:
                found = found | one(start, stop, visible)
            return found

        return kept
