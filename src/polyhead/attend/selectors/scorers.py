"""Block scorers: what reading a block of keys may be worth to a block of queries.

A scorer is asked once for a call (`prepare`), and then for one band of blocks of queries after another, so
that no more than a band of scores is ever held. Its scores are like logits: larger is better, and where a
budget speaks of mass, their softmax over the visible blocks is the share of the mass that each is taken for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.selectors.grid import Grid, by_blocks
from polyhead.checks import given, number, whole
from polyhead.description import Part
from polyhead.errors import ConfigError, unknown_name

__all__ = [
    "KeyBounds",
    "MeanKeys",
    "SampledMass",
    "Scorer",
    "Shared",
    "key_bounds",
    "mean_keys",
    "sampled_mass",
    "shared",
]

Scores = Callable[[int, int], Tensor]

_HELD = 1 << 24  # products that are held at a time
_STRIP = 32  # sampled queries that are taken together, with the keys up to the last of them


class Scorer(Part):
    """How much every block of queries of every head should like to read every block of keys."""

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        """What does not depend on the block of queries, worked out once.

        Args:
            q, k: `(B, H, L, D)` and `(B, G, S, D)`.
            grid: their blocks, and which keys are real: what stands at padding must not count.

        Returns:
            A function of `start, stop` that gives the scores `(B, H, stop - start, N)` of the blocks of
            queries from start to stop - 1, in float32 or float64. Blocks that the call's mask hides are
            scored like all others.
        """
        raise NotImplementedError

    def flops(self, grid: Grid, width: int) -> int:
        """Operations of the matrix products that score a call with heads so wide; 0 where nothing is said."""
        return 0


class MeanKeys(Scorer):
    """scale · mean(q of the block) · mean(k of the block)."""

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        keys = mean_of_blocks(k, grid)

        def scores(start: int, stop: int) -> Tensor:
            return grid.products(grid.mean_queries(q, start, stop).to(keys.dtype), keys) * grid.scale

        return scores

    def flops(self, grid: Grid, width: int) -> int:
        return 2 * grid.batch * grid.heads * grid.row_blocks * grid.col_blocks * width


def mean_of_blocks(k: Tensor, grid: Grid) -> Tensor:
    """`grid.mean_keys`, kept where somebody keeps it."""
    return grid.summarised("means", lambda keys, part: part.mean_keys(keys), k)


def mean_keys() -> Scorer:
    """A block of keys is worth the product of its mean key and the mean query: scale · q̄·k̄.

    Means are over real keys: padding does not count. With blocks of one query it is the gate of MoBA (paper
    063, arXiv 2502.13189), up to the scale, which changes no ranking. O(N·D) a block of queries.
    """
    return MeanKeys()


class KeyBounds(Scorer):
    """The largest product that a key within the bounds of the block could have with the mean query."""

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        # most and least side by side: each feature takes the bound of its query's sign
        bounds = grid.summarised("bounds", _bounds, k)

        def scores(start: int, stop: int) -> Tensor:
            queries = grid.mean_queries(q, start, stop).to(bounds.dtype)
            signs = torch.cat([queries.clamp(min=0), queries.clamp(max=0)], -1)
            return grid.products(signs, bounds) * grid.scale

        return scores

    def flops(self, grid: Grid, width: int) -> int:
        return 4 * grid.batch * grid.heads * grid.row_blocks * grid.col_blocks * width


def _bounds(k: Tensor, grid: Grid) -> Tensor:
    """Largest and smallest features of every block, `(B, G, N, 2·D)`; 0 where there is no real key."""
    if grid.real is None:
        bounds = by_blocks(k, grid.cols, lambda part: torch.cat([part.amax(3), part.amin(3)], -1))
        return bounds.to(torch.promote_types(k.dtype, torch.float32))
    wide = k.float() if k.dtype in (torch.float16, torch.bfloat16) else k
    most = grid.blocks_of_keys(wide, -math.inf).amax(3)
    least = grid.blocks_of_keys(wide, math.inf).amin(3)
    return torch.cat([most, least], -1).masked_fill((most < least).repeat(1, 1, 1, 2), 0.0)


def key_bounds() -> Scorer:
    """A block is worth the most that a key between its smallest and largest features could score.

        scale · Σ_d max(q̄_d · min_j k_jd, q̄_d · max_j k_jd)

    For one query (decoding) it bounds the scores of the block from above: no key of the block scores more.
    Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774.
    """
    return KeyBounds()


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
        for name, each, block in (("stride", self.stride, grid.rows), ("keys", step, grid.cols)):
            if each > block:
                raise ConfigError(
                    f"sampled_mass: {name} must be at most the length of a block, {block}; "
                    f"got {each}: it would pass over whole blocks"
                )
        wide = torch.promote_types(k.dtype, torch.float32)
        taken = torch.arange(0, grid.keys, step, device=k.device)
        keys = grid.summarised("first", lambda keys, _: keys[:, :, ::step].to(wide), k, step)
        hidden = None if grid.real is None else ~grid.real[:, None, None, ::step]

        def scores(start: int, stop: int) -> Tensor:
            total = keys.new_zeros(grid.batch, grid.heads, stop - start, grid.col_blocks)
            sampled = self._sampled(grid, start, stop, q.device)
            strip = min(_STRIP, max(1, _HELD // (grid.batch * grid.heads * len(taken))))
            whole_block = max(1, grid.cols // step)
            for at in sampled.split(strip) if len(sampled) else ():
                # a sampled query weighs its own past alone, or the whole future would share in its mass
                past = max(0, (int(at[-1]) + grid.offset) // step + 1)
                past = min(-(-past // whole_block) * whole_block, len(taken))
                asked = q[:, :, at].to(wide) * grid.scale
                logits = grid.products(asked, keys[:, :, :past])
                first = (int(at[0]) + grid.offset) // step + 1  # key that the first of them does not see
                ends = min(max(first, 0), past)
                later = taken[ends:past] > (at + grid.offset)[:, None]
                logits[..., ends:].masked_fill_(later, -math.inf)
                if hidden is not None:
                    logits.masked_fill_(hidden[..., :past], -math.inf)
                weights = logits.softmax(-1)
                if hidden is not None or int(at[0]) + grid.offset < 0:  # some may see nothing
                    weights.nan_to_num_(0.0)
                mass = _by_block(weights, taken[:past], step, grid.cols)
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


class Shared(Scorer):
    """The scores of another scorer, joined over heads."""

    scorer: Scorer
    over: Literal["group", "all"] = "group"
    by: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scorer):
            raise ConfigError(f"shared: scorer must be one such as mean_keys(); got {given(self.scorer)}")
        for name, allowed in (("over", ("group", "all")), ("by", ("mean", "max"))):
            if getattr(self, name) not in allowed:
                raise unknown_name(f"shared: {name}", getattr(self, name), allowed)

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        each = self.scorer.prepare(q, k, grid)
        size = grid.repeat if self.over == "group" else grid.heads

        def scores(start: int, stop: int) -> Tensor:
            own = each(start, stop).unflatten(1, (-1, size))
            joined = own.mean(2, keepdim=True) if self.by == "mean" else own.amax(2, keepdim=True)
            return joined.expand_as(own).flatten(1, 2)

        return scores

    def flops(self, grid: Grid, width: int) -> int:
        return self.scorer.flops(grid, width)


def shared(
    scorer: Scorer, over: Literal["group", "all"] = "group", by: Literal["mean", "max"] = "mean"
) -> Scorer:
    """Heads score together: the query heads of a key/value head, or all heads of a layer, get one ranking.

    A group that reads the same blocks gathers them once.

    Args:
        scorer: whose scores are joined, such as `mean_keys()`.
        over: "group": the query heads of a key/value head, the default; "all": all heads.
        by: the "mean" of their scores, the default, or the "max".

    Raises:
        ConfigError: `scorer` is none.
        UnknownName: another `over` or `by`.
    """
    return Shared(scorer, over, by)
