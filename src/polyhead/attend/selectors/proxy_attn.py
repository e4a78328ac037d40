"""Blocks ranked by a few heads that stand for all; how many are read, each head says for itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.attend.masks import Mask, sink, window
from polyhead.attend.selectors.budgets import Budget, ranks
from polyhead.attend.selectors.fixed import fixed
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.probes import last_probes
from polyhead.attend.selectors.ranked import select
from polyhead.attend.selectors.scorers import Scorer, Scores
from polyhead.attend.selectors.selector import Selector
from polyhead.checks import number, whole
from polyhead.errors import ConfigError

__all__ = ["KeepLastMass", "ProxyHeads", "keep_last_mass", "proxy_attn", "proxy_heads"]

_HELD = 1 << 24  # products that are held at a time


class ProxyHeads(Scorer):
    """The log of the largest weight in a block, of mean queries and keys of groups of heads."""

    groups: int = 1
    stride: int = 4

    def __post_init__(self) -> None:
        whole("proxy_heads: groups", self.groups, 1)
        whole("proxy_heads: stride", self.stride, 1)

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        if grid.heads % self.groups:
            raise ConfigError(f"proxy_heads: groups must divide the {grid.heads} heads; got {self.groups}")
        wide = torch.promote_types(k.dtype, torch.float32)
        at, taken = (
            _first_of_every(length, block, self.stride, q.device)
            for length, block in ((grid.queries, grid.rows), (grid.keys, grid.cols))
        )
        keys = self._keys(k, grid)[:, :, : len(taken)].mT
        queries = q[:, :, at].to(wide).unflatten(1, (self.groups, -1)).mean(2)
        hidden = None if grid.real is None else ~grid.real[:, None, None, taken]
        of_row, of_col = at // grid.rows, taken // grid.cols

        def scores(start: int, stop: int) -> Tensor:
            found = queries.new_full((grid.batch, self.groups, stop - start, grid.col_blocks), -math.inf)
            here = ((of_row >= start) & (of_row < stop)).nonzero().view(-1)
            for some in here.split(max(1, _HELD // max(1, grid.batch * self.groups * len(taken)))):
                logits = queries[:, :, some] @ keys * grid.scale
                logits = logits.masked_fill(taken > (at[some] + grid.offset)[:, None], -math.inf)
                if hidden is not None:
                    logits = logits.masked_fill(hidden, -math.inf)
                weights = logits.log_softmax(-1).nan_to_num(nan=-math.inf, neginf=-math.inf)
                best = weights.new_full((*weights.shape[:3], grid.col_blocks), -math.inf)
                best.scatter_reduce_(3, of_col.expand_as(weights), weights, "amax")
                row = (of_row[some] - start)[:, None].expand_as(best)
                found.scatter_reduce_(2, row, best, "amax")
            return found.repeat_interleave(grid.heads // self.groups, 1)

        return scores

    def _keys(self, k: Tensor, grid: Grid) -> Tensor:
        """The mean keys of every group, `(B, groups, n, D)`, of the keys that are taken, and zeros behind."""
        wide = torch.promote_types(k.dtype, torch.float32)
        most = -(-grid.cols // self.stride)

        def of_blocks(keys: Tensor, part: Grid) -> Tensor:
            taken = _first_of_every(part.keys, part.cols, self.stride, keys.device)
            mean = part.spread(keys[:, :, taken].to(wide)).unflatten(1, (self.groups, -1)).mean(2)
            missing = -len(taken) % most
            mean = torch.nn.functional.pad(mean, (0, 0, 0, missing)) if missing else mean
            return mean.unflatten(2, (-1, most))

        name = ("proxy heads", self.groups, self.stride, grid.repeat)
        return grid.summarised(name, of_blocks, k).flatten(2, 3)


def proxy_heads(groups: int = 1, stride: int = 4) -> Scorer:
    """A block is worth the log of the largest weight in it, by the mean queries and keys of a group of heads.

        max over i in the queries' block, j in the keys' of  softmax_j(scale · (mean_h q_h,i)·(mean_h k_h,j))

    over the causal past of i; of every `stride` queries and keys of a block the first is taken. All heads of
    a group rank blocks alike, for 1/stride² of the products of one head. With a group for every head and
    stride 1 it is the log of the head's own largest weight.

    Args:
        groups: of neighbouring heads; a divisor of their number.
        stride: at least 1.
    """
    return ProxyHeads(groups, stride)


class KeepLastMass(Budget):
    """As many of the best blocks as hold a share of what the last queries attend to. See `keep_last_mass`."""

    mass: float
    least: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "mass", number("keep_last_mass: mass", self.mass, least=0, most=1))
        whole("keep_last_mass: least", self.least, 1)

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Budget:
        last = last_probes(grid, grid.rows, q.device)
        logits = last.logits(q, k).masked_fill(~last.seen(mask), -torch.inf)
        weights = logits.softmax(-1).nan_to_num(0.0).sum(2).double()
        blocks = torch.nn.functional.pad(weights, (0, -grid.keys % grid.cols)).unflatten(2, (-1, grid.cols))
        taken = blocks.sum(-1).sort(-1, descending=True).values
        before = taken.cumsum(-1) - taken
        # rounding must not leave out anything where all is asked for
        enough = (before < self.mass * taken.sum(-1, keepdim=True)) | (self.mass >= 1)
        return _KeepCounted(enough.sum(-1).clamp(min=-(-self.least // grid.cols)))

    def kept(self, scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        raise RuntimeError("keep_last_mass keeps blocks of a call only: see prepare")


class _KeepCounted(Budget):
    """The best blocks of every row, a number for each head of each sequence: `(B, H)`."""

    blocks: Tensor

    def kept(self, scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        return (ranks(scores, visible, forced) < self.blocks[..., None, None]) & visible | forced


def keep_last_mass(mass: float, least: int = 1) -> Budget:
    """As many blocks as hold so much of the attention of the last `rows` real queries, head by head.

        a[n] = Σ over the last queries i and the keys j of block n of  softmax_j(scale · q_i·k_j)
        number of blocks = the smallest k with  (the k largest a) >= mass · Σ a

    Every row of the head reads that many of the blocks that score best, or all that it sees. It costs `rows`
    rows of dense scores.

    Args:
        mass: 0 to 1; 1 keeps everything.
        least: tokens that are read at least, rounded up to blocks.
    """
    return KeepLastMass(mass, least)


def proxy_attn(
    mass: float = 0.95,
    *,
    groups: int = 1,
    stride: int = 4,
    least: int = 2048,
    rows: int = 128,
    cols: int = 128,
) -> Selector:
    """ProxyAttn: a few mean heads rank the blocks for all; every head reads as many as its last queries need.

        select(proxy_heads(groups, stride), keep_last_mass(mass, least)) | fixed(sink(1) | window(0))

    The first block, be it padding, and the query's own are always read besides. "ProxyAttn: Guided Sparse
    Attention via Representative Heads" (paper 117, arXiv 2509.24745). The paper speaks of a share of the
    blocks: here short rows, too, may read as many as that share is of the whole; and its decoding is dense,
    here that is `ph.sparse(..., decode=False)`.

    Args:
        mass: 0 to 1 of the last queries' attention; 1 reads everything. The paper takes 0.95 and 0.9.
        groups: of heads that rank together; the paper takes 1 or 4, by model.
        stride: see `proxy_heads`.
        least: tokens that are read at least.
        rows, cols: length of a block of queries and of keys.
    """
    own = select(proxy_heads(groups, stride), keep_last_mass(mass, least), rows=rows, cols=cols)
    return own | fixed(sink(1) | window(0), rows=rows, cols=cols)


def _first_of_every(length: int, block: int, stride: int, device: torch.device) -> Tensor:
    """Of every `stride` tokens of a block the first, so that every block has one."""
    at = torch.arange(length, device=device)
    return at[at % block % stride == 0]
