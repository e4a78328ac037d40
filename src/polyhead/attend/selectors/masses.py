"""Block scorers that go by mass: what some queries, taken for their block, give to the keys of each block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.scorers import Scorer, Scores, mean_of_blocks
from polyhead.checks import number, whole
from polyhead.errors import ConfigError

__all__ = ["MeanMass", "SampledMass", "mean_mass", "sampled_mass"]

_HELD = 1 << 22  # products that are held at a time: they stay in the caches of a processor
_STRIP = 32  # queries that are asked together, with the keys up to the last of them

Masses = Callable[[Tensor, Tensor], Tensor]


def _masses(keys: Tensor, step: int, there: Tensor | None, grid: Grid) -> Masses:
    """What asked queries give to blocks, by softmax over keys of their past.

    Args:
        keys: one for every `step` keys of the call, of which it stands at the first, `(B, G, n, D)`, in the
            dtype of the result.
        there: which of them are no padding, bool `(B or 1, n)`; None: all.

    Returns:
        A function of queries `(B, H, m, D)`, in the dtype of the keys, and of the last key that each of them
        sees, ascending, `(m,)`. It gives their masses `(B, H, m, b)` for the first b blocks of keys; of those
        behind they see nothing.
    """
    taken = torch.arange(0, grid.keys, step, device=keys.device)
    hidden = None if there is None else ~there[:, None, None]
    whole_block = max(1, grid.cols // step)

    def masses(asked: Tensor, last: Tensor) -> Tensor:
        past = max(0, int(last[-1]) // step + 1)
        past = min(-(-past // whole_block) * whole_block, len(taken))
        logits = grid.products(asked * grid.scale, keys[:, :, :past])
        first = int(last[0]) // step + 1  # key that the first of them does not see
        ends = min(max(first, 0), past)
        later = taken[ends:past] > last[:, None]
        logits[..., ends:].masked_fill_(later, -math.inf)
        if hidden is not None:
            logits.masked_fill_(hidden[..., :past], -math.inf)
        weights = logits.softmax(-1)
        if hidden is not None or int(last[0]) < 0:  # some may see nothing
            weights.nan_to_num_(0.0)
        return _by_block(weights, taken[:past], step, grid.cols)

    return masses


def _by_block(weights: Tensor, taken: Tensor, step: int, cols: int) -> Tensor:
    """Weights `(..., n)` of the keys `taken`, every step-th, summed by the blocks up to the last of these."""
    if cols % step == 0:  # as many of every block
        each = cols // step
        missing = -weights.shape[-1] % each
        weights = F.pad(weights, (0, missing)) if missing else weights
        return weights.unflatten(-1, (-1, each)).sum(-1)
    own = taken // cols
    blocks = int(own[-1]) + 1 if len(own) else 0
    return weights.new_zeros(*weights.shape[:-1], blocks).index_add_(-1, own, weights)


def _within_blocks(scorer: str, sizes: tuple[tuple[str, int, int], ...]) -> None:
    """Raise a `ConfigError` for a (name, number, length of a block) whose number is the larger one."""
    for name, each, block in sizes:
        if each > block:
            raise ConfigError(
                f"{scorer}: {name} must be at most the length of a block, {block}; "
                f"got {each}: it would pass over whole blocks"
            )


def _any(real: Tensor, length: int) -> Tensor:
    """Whether any of so many neighbours is real, `(B, ⌈S/length⌉)`."""
    return F.pad(real, (0, -real.shape[1] % length)).unflatten(1, (-1, length)).any(-1)


def _strip(grid: Grid, keys: int) -> int:
    """How many queries are asked together of so many keys."""
    return min(_STRIP, max(1, _HELD // (grid.batch * grid.heads * keys)))


class MeanMass(Scorer):
    """The log of the mass that means of neighbouring queries give to means of neighbouring keys."""

    queries: int = 16
    keys: int = 16

    def __post_init__(self) -> None:
        for name in ("queries", "keys"):
            whole(f"mean_mass: {name}", getattr(self, name), 1)

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        _within_blocks("mean_mass", (("queries", self.queries, grid.rows), ("keys", self.keys, grid.cols)))
        fine = replace(grid, cols=self.keys)
        keys = mean_of_blocks(k, fine)
        there = None if grid.real is None else _any(grid.real, self.keys)
        masses, strip = _masses(keys, self.keys, there, grid), _strip(grid, keys.shape[2])
        parts = -(-grid.rows // self.queries)

        def scores(start: int, stop: int) -> Tensor:
            total = keys.new_zeros(grid.batch, grid.heads, stop - start, grid.col_blocks)
            for first in range(start, stop, max(1, strip // parts)):
                end = min(first + max(1, strip // parts), stop)
                asked = self._means(q, grid, first, end).to(keys.dtype)
                part = torch.arange(asked.shape[2], device=q.device)
                block = first + part // parts
                behind = block * grid.rows + ((part % parts + 1) * self.queries).clamp(max=grid.rows)
                mass = masses(asked, behind.clamp(max=grid.queries) - 1 + grid.offset)
                total[..., : mass.shape[-1]].index_add_(2, block - start, mass)
            return total.log_()

        return scores

    def _means(self, q: Tensor, grid: Grid, start: int, stop: int) -> Tensor:
        """Mean queries of the parts of some blocks; the last part of a block may be shorter."""
        parts = -(-grid.rows // self.queries)
        if grid.rows % self.queries == 0:
            return replace(grid, rows=self.queries).mean_queries(q, start * parts, stop * parts)
        each = [
            replace(grid, rows=self.queries).mean_queries(rows, 0, parts)
            for rows in q[:, :, start * grid.rows : stop * grid.rows].split(grid.rows, 2)
        ]
        return torch.cat(each, 2)

    def flops(self, grid: Grid, width: int) -> int:
        whole_blocks, left = divmod(grid.queries, grid.rows)
        parts = whole_blocks * -(-grid.rows // self.queries) + -(-left // self.queries)
        return 2 * grid.batch * grid.heads * parts * -(-grid.keys // self.keys) * width


def mean_mass(queries: int = 16, keys: int = 16) -> Scorer:
    """A block is worth the log of its mass by means of neighbours: of few queries, and of few keys.

        Σ_i Σ_j softmax_j(scale · q̄_i·k̄_j)        i, j: parts of the block of queries and of that of keys

    over the parts that begin in the causal past of the last query of i. It takes 1 / (queries · keys) of the
    products of dense attention. With parts as long as the blocks it ranks as `mean_keys` does; with parts of
    one it is the mass under a causal mask. A row of scores is what all queries of the block give to blocks,
    so that one of them that looks elsewhere than the others is seen if its part is short. Means of keys
    flatten the mass: with `keys=1` and long parts of queries the first tokens are given nearly all of it,
    and a budget of mass then leaves out what single queries look up, although little mass is missed.

    Args:
        queries: neighbouring queries that are asked as one, at most the rows of a block.
        keys: neighbouring keys that are taken as one, at most the columns of a block; a part that is in two
            blocks counts for the first.
    """
    return MeanMass(queries, keys)


class SampledMass(Scorer):
    """The log of the mass of a block, from one query of `stride` and every `keys`-th key."""

    stride: int = 4
    keys: int | None = None
    power: float = 1.0

    def __post_init__(self) -> None:
        whole("sampled_mass: stride", self.stride, 1)
        object.__setattr__(self, "power", number("sampled_mass: power", self.power, least=1))
        if self.keys is not None:
            whole("sampled_mass: keys", self.keys, 1)

    @property
    def key_stride(self) -> int:
        """Keys of which one is taken."""
        return self.stride if self.keys is None else self.keys

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        step = self.key_stride
        _within_blocks("sampled_mass", (("stride", self.stride, grid.rows), ("keys", step, grid.cols)))
        wide = torch.promote_types(k.dtype, torch.float32)
        keys = grid.summarised("first", lambda keys, _: keys[:, :, ::step].to(wide), k, step)
        there = None if grid.real is None else grid.real[:, ::step]
        masses, strip = _masses(keys, step, there, grid), _strip(grid, keys.shape[2])

        def scores(start: int, stop: int) -> Tensor:
            total = keys.new_zeros(grid.batch, grid.heads, stop - start, grid.col_blocks)
            sampled = self._sampled(grid, start, stop, q.device)
            for at in sampled.split(strip) if len(sampled) else ():
                mass = masses(q[:, :, at].to(wide), at + grid.offset)
                if self.power != 1:
                    mass = mass.pow_(self.power)
                total[..., : mass.shape[-1]].index_add_(2, at // grid.rows - start, mass)
            return total.log() / self.power

        return scores

    def _sampled(self, grid: Grid, start: int, stop: int, device: torch.device) -> Tensor:
        """Equally many queries of every block, those in the middle of its parts."""
        each = -(-grid.rows // self.stride)
        full = min(stop, grid.queries // grid.rows)
        middle = 2 * torch.arange(each, device=device) + 1
        blocks = torch.arange(start, full, device=device)[:, None]
        sampled = (blocks * grid.rows + middle * grid.rows // (2 * each)).view(-1)
        left = grid.queries - full * grid.rows
        if full < stop and left:  # the last block, with fewer queries
            each = min(each, left)
            sampled = torch.cat([sampled, full * grid.rows + middle[:each] * left // (2 * each)])
        return sampled

    def flops(self, grid: Grid, width: int) -> int:
        queries = len(self._sampled(grid, 0, grid.row_blocks, torch.device("cpu")))
        keys = -(-grid.keys // self.key_stride)
        return 2 * grid.batch * grid.heads * queries * keys * width


def sampled_mass(stride: int = 4, keys: int | None = None, power: float = 1.0) -> Scorer:
    """A block is worth the log of its mass over sampled queries and keys, softmax over the causal past.

        (Σ_i m_ij^p)^(1/p)        m_ij: mass of the block j of keys for the sampled query i

    Of a block of R queries ⌈R / stride⌉ are sampled, one from the middle of each part: 1 / (stride · keys) of
    the products of dense attention. Of a shorter block, such as a question behind a long text that is in the
    cache, as many are if there are so many. Where every query and key is taken, and p = 1, the mass is exact
    under a causal mask. Papers that score blocks by their mass differ in which pairs they sample.

    Args:
        stride: one of so many queries is taken.
        keys: every so many-th key; default `stride`. A key that is passed over is not seen, however much of
            the attention it draws, while queries that stand side by side tend to look at the same keys: it
            is better to take many keys for few queries than as many of both.
        power: p, at least 1. With 1 a block counts by what all queries look at it together; the larger, the
            more by those that look at it most.
    """
    return SampledMass(stride, keys, power)
