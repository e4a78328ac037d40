"""Budget rules: how many of the blocks that a scorer has ranked are read.

Every rule keeps the blocks that are always read first, and of a row that sees anything at least the best
block: no block of queries reads nothing where one of them may read something. A single query of the block may
see nothing of what the block chose, unless its own key is always read: `always=window(0)`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.selectors.grid import Grid
from polyhead.checks import given, number
from polyhead.description import Part
from polyhead.errors import ConfigError, ShapeError

__all__ = [
    "Budget",
    "KeepAbove",
    "KeepAtLeast",
    "KeepBlocks",
    "KeepMass",
    "KeepShare",
    "KeepSimilarity",
    "KeepTotal",
    "keep_above",
    "keep_at_least",
    "keep_blocks",
    "keep_mass",
    "keep_share",
    "keep_similarity",
    "keep_total",
]


class Budget(Part):
    """A rule that keeps some of the scored blocks.

    Attributes:
        row_by_row: whether a row's blocks are kept whatever the scores of other rows of its head are; a rule
            of which that does not hold is shown all rows of a call at once.
    """

    row_by_row: ClassVar[bool] = True

    def kept(self, scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        """Which blocks are read, bool `(B, H, m, N)`; only visible ones.

        Args:
            scores: `(B, H, m, N)`, any number at blocks that are not visible.
            visible: bool of the same shape, blocks of which something may be seen.
            forced: bool of the same shape, visible blocks that are always read.
        """
        raise NotImplementedError

    def check(self, heads: int) -> None:
        """Raise a `ShapeError` if the rule holds numbers for another number of heads."""

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Budget:
        """The rule for this call: itself, unless how much is read depends on the content."""
        return self

    @property
    def by_head(self) -> bool:
        """Whether heads have numbers of their own."""
        return any(tensor.numel() > 1 for tensor in self.tensors())

    def best(self, visible: int) -> int | None:
        """How many of so many visible blocks every row reads, the best; None: that depends on more."""
        return None


def ranks(scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
    """The place of every block in its row, 0 for the best: forced ones first, hidden ones last.

    Of blocks with equal scores the later one is better: it is the nearer one.
    """
    order = ordered(scores, visible, forced)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def ordered(scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
    """The blocks of every row, best first: forced ones, visible ones, the rest; of equal ones the later."""
    infinite = torch.tensor(float("inf"), dtype=scores.dtype, device=scores.device)
    return _descending(torch.where(forced, infinite, torch.where(visible, _finite(scores), -infinite)))


def ordered_all(scores: Tensor, forced: list[tuple[int, int]]) -> Tensor:
    """`ordered` where all blocks are visible, and in all rows the same runs of blocks are forced."""
    held = _finite(scores)
    for start, stop in forced:
        held[..., start:stop].fill_(torch.inf)
    return _descending(held)


def _finite(scores: Tensor) -> Tensor:
    return scores.nan_to_num(nan=-3e38, neginf=-3e38)


def _descending(held: Tensor) -> Tensor:
    last = held.shape[-1] - 1
    return last - held.flip(-1).sort(dim=-1, descending=True, stable=True).indices


def per_head(
    name: str, value: float | Tensor, least: float | None, most: float | None, whole: bool
) -> float | Tensor:
    """A finite number, or a tensor `(H,)` of such within the limits, or a `ConfigError`."""
    if isinstance(value, Tensor):
        if value.ndim != 1 or value.dtype == torch.bool or value.is_complex():
            raise ConfigError(f"{name} must be a number or a tensor (H,) of numbers; got {given(value)}")
        numbers = value.detach().double()
        if not bool(numbers.isfinite().all()):
            raise ConfigError(f"{name} must be finite for every head; got {numbers.tolist()}")
        if whole and not bool((numbers == numbers.round()).all()):
            raise ConfigError(f"{name} must be an integer for every head; got {numbers.tolist()}")
        if least is None:
            return value
        if not bool(((numbers >= least) & (numbers <= (most if most is not None else float("inf")))).all()):
            raise ConfigError(
                f"{name} must be at least {least:g}"
                + (f" and at most {most:g}" if most is not None else "")
                + f" for every head; got {float(numbers.min()):g} to {float(numbers.max()):g}"
            )
        return value
    found = number(name, value, least=least, most=most)
    if whole and found != int(found):
        raise ConfigError(f"{name} must be an integer; got {given(value)}")
    return int(found) if whole else found


def heads_fit(name: str, value: float | Tensor, heads: int) -> None:
    """Raise a `ShapeError` if a tensor `(H,)` is of another number of heads."""
    if isinstance(value, Tensor) and len(value) not in (1, heads):
        raise ShapeError(f"{name} holds {len(value)} numbers, but the call has {heads} heads")


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(value, device=like.device, dtype=torch.float64).view(-1, 1, 1)


class KeepBlocks(Budget):
    """The n best blocks of every row."""

    blocks: int | Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", per_head("keep_blocks: blocks", self.blocks, 1, None, True))

    def check(self, heads: int) -> None:
        heads_fit("keep_blocks", self.blocks, heads)

    def kept(self, scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        return (ranks(scores, visible, forced) < _column(self.blocks, scores)) & visible | forced

    def best(self, visible: int) -> int | None:
        return None if isinstance(self.blocks, Tensor) else min(self.blocks, visible)


def keep_blocks(blocks: int | Tensor) -> Budget:
    """The `blocks` best blocks of every row, those that are always read among them.

    Args:
        blocks: at least 1; or a tensor `(H,)`, one number a head.
    """
    return KeepBlocks(blocks)


class KeepShare(Budget):
    """A share of the visible blocks of every row."""

    share: float | Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", per_head("keep_share: share", self.share, 0.0, 1.0, False))

    def check(self, heads: int) -> None:
        heads_fit("keep_share", self.share, heads)

    def kept(self, scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        count = (_column(self.share, scores) * visible.sum(-1, keepdim=True)).round().clamp(min=1)
        return (ranks(scores, visible, forced) < count) & visible | forced

    def best(self, visible: int) -> int | None:
        return None if isinstance(self.share, Tensor) else max(1, round(self.share * visible))


def keep_share(share: float | Tensor) -> Budget:
    """The best of every row's visible blocks, so large a share of them, rounded; at least one.

    Args:
        share: 0 to 1; or a tensor `(H,)`, one number a head, such as a row of `HeadScores` made into shares.
    """
    return KeepShare(share)


class KeepAtLeast(Budget):
    """The fewest blocks that are such a share of the visible ones."""

    share: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", number("keep_at_least: share", self.share, least=0, most=1))

    def kept(self, scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        # a share of a third of three blocks is one block, however it is rounded
        count = (self.share * visible.sum(-1, keepdim=True).double() - 1e-9).ceil().clamp(min=1)
        return (ranks(scores, visible, forced) < count) & visible | forced

    def best(self, visible: int) -> int | None:
        return max(1, math.ceil(self.share * visible - 1e-9))


def keep_at_least(share: float) -> Budget:
    """The best of every row's visible blocks, such a share of them, rounded up; at least one.

    Args:
        share: 0 to 1.
    """
    return KeepAtLeast(share)


class KeepMass(Budget):
    """The fewest blocks that are taken to hold a share of the mass."""

    mass: float | Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "mass", per_head("keep_mass: mass", self.mass, 0.0, 1.0, False))

    def check(self, heads: int) -> None:
        heads_fit("keep_mass", self.mass, heads)

    def kept(self, scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        own = scores.masked_fill(~visible, -torch.inf).double().softmax(-1).nan_to_num(0.0)
        order = ordered(scores, visible, forced)
        taken = own.gather(-1, order)
        before = taken.cumsum(-1) - taken
        mass = _column(self.mass, scores)
        # rounding must not leave out anything where all is asked for
        enough = (before < mass) | (mass >= 1)
        enough[..., 0] = True
        return torch.empty_like(enough).scatter_(-1, order, enough) & visible | forced


def keep_mass(mass: float | Tensor) -> Budget:
    """The best blocks of every row until they are taken to hold so much of its mass (top-p).

    The mass is the softmax of the scores over the visible blocks: an estimate as good as its scorer, see
    `missed_mass` for the truth.

    Args:
        mass: 0 to 1; 1 keeps everything. Or a tensor `(H,)`.
    """
    return KeepMass(mass)


class KeepSimilarity(Budget):
    """Blocks until their scores, between 0 and 1, sum up to a share. See `keep_similarity`."""

    share: float | Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", per_head("keep_similarity: share", self.share, 0.0, None, False))

    def check(self, heads: int) -> None:
        heads_fit("keep_similarity", self.share, heads)

    def kept(self, scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        known = visible & scores.isfinite()
        wide = scores.double()
        low = wide.masked_fill(~known, torch.inf).amin(-1, keepdim=True)
        span = wide.masked_fill(~known, -torch.inf).amax(-1, keepdim=True) - low
        like = ((wide - low) / torch.where(span < 1e-6, 1.0, span)).masked_fill(~known, 0.0)
        order = ordered(scores, visible, forced)
        taken = like.gather(-1, order)
        before = taken.cumsum(-1) - taken
        share = _column(self.share, scores)
        # rounding must not leave out anything where all is asked for
        enough = (before < share * like.sum(-1, keepdim=True)) | (share >= 1)
        first = torch.arange(enough.shape[-1], device=enough.device) == forced.sum(-1, keepdim=True)
        return torch.empty_like(enough).scatter_(-1, order, enough | first) & visible | forced


def keep_similarity(share: float | Tensor) -> Budget:
    """The best blocks of every row until their scores, as parts of the row's range, make up a share of all.

        n_j = (s_j - min s) / (max s - min s) over the visible blocks;   Σ_kept n_j >= share · Σ n_j

    with as few kept as it takes, those that are always read first, and of the others at least the best. No
    softmax: a row whose scores lie close together reads more than with `keep_mass`. The threshold of VMoBA
    (paper 190, arXiv 2506.23858), which holds over all queries of a head: `together(keep_similarity(0.25))`.

    Args:
        share: at least 0; from 1 on everything is read. Or a tensor `(H,)`.
    """
    return KeepSimilarity(share)


class KeepAbove(Budget):
    """Blocks whose score is above a threshold."""

    threshold: float | Tensor

    def __post_init__(self) -> None:
        own = per_head("keep_above: threshold", self.threshold, None, None, False)
        object.__setattr__(self, "threshold", own)

    def check(self, heads: int) -> None:
        heads_fit("keep_above", self.threshold, heads)

    def kept(self, scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        best = ranks(scores, visible, forced) == 0
        return ((scores > _column(self.threshold, scores)) | best) & visible | forced


def keep_above(threshold: float | Tensor) -> Budget:
    """The blocks that score above `threshold`, and the best one of every row in any case."""
    return KeepAbove(threshold)


class KeepTotal(Budget):
    """A share of the visible blocks, over all heads together."""

    share: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", number("keep_total: share", self.share, least=0, most=1))

    def kept(self, scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        own = scores.masked_fill(~visible, -torch.inf).double().softmax(-1).nan_to_num(0.0)
        best = ranks(scores, visible, forced) == 0
        first = (forced | best) & visible
        together = (own, visible, first)
        flat = [x.transpose(1, 2).flatten(2) for x in together]  # (B, m, H·N): heads compete
        count = (self.share * flat[1].sum(-1, keepdim=True)).round()
        found = (ranks(*flat) < count) & flat[1] | flat[2]
        return found.unflatten(2, own.shape[1::2]).transpose(1, 2)


def keep_total(share: float) -> Budget:
    """So large a share of all heads' visible blocks, to the heads that are taken to gain most by them.

    Heads compete by the mass that they are taken to find in a block (the softmax of their scores), so that
    a head which looks everywhere gets more blocks than one which looks at a few places.

    Args:
        share: 0 to 1.
    """
    return KeepTotal(share)
