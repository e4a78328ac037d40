"""One query a head by the keys that were chosen for it: the step of decoding.

The blocks that any head of a group chose are gathered once for the group, and what a head did not choose is
hidden from it, so that a key is read once and not once a head. Where they are most of all blocks, keys are
read where they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.few_rows import few_rows
from polyhead.attend.fused_cpu import HIDDEN, unfit
from polyhead.attend.masks import Chosen, Mask, all_of, runs_of_last, terms_of
from polyhead.attend.pieces import split
from polyhead.attend.plan import Request
from polyhead.attend.precision import wide

__all__ = ["attend_row", "pays"]

_MOST = 0.4  # of the blocks: gathering more, a copy, takes longer than reading all of them
_BYTES = 1 << 24  # of keys and values that are gathered at a time: more does not stay near a core
_MANY = 512  # keys: fewer are read as quickly as some of them are found


def pays(request: Request) -> bool:
    """Whether the call is one query by chosen blocks of many keys: reading them all is slower then."""
    found = split(request.problem.mask)
    return (
        request.q.shape[2] == 1
        and request.k.shape[2] >= _MANY
        and found is not None
        and found[0].cols <= request.k.shape[2]
        and not request.needs_grad
        and not unfit(request)
    )


def attend_row(
    q: Tensor, k: Tensor, v: Tensor, choice: Chosen, rest: Mask | None, scale: float, want_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Output `(B, H, 1, D)`, and if it is wanted the log-sum-exp `(B, H, 1)`; without gradients.

    Args:
        q, k, v: `(B, H, 1, D)` and `(B, G, S, D)`, S at least the length of a block.
        choice: the blocks that each head reads.
        rest: what else hides keys.
        scale: factor of q·k.
    """
    read = _read(choice, q.shape[0], q.shape[1], k.shape[1], k.shape[2])
    rest = _hiding(rest, k.shape[2])
    added = torch.from_numpy(read.added).to(wide(q.dtype))
    if rest is not None:
        _hide(added, rest, read, q.shape[0], k.shape[2])
    all_see = rest is None and bool(read.own.any(2).all())
    queries = q.reshape(*read.own.shape[:2], q.shape[3])
    lse: Tensor | None
    if read.start is None:
        keys, values = ((x if x.stride(3) == 1 else x.contiguous()).flatten(0, 1) for x in (k, v))
        nothing_hidden = rest is None and bool(read.own.all())
        out, lse = few_rows(queries, keys, values, None if nothing_hidden else added, scale)
    else:
        out, lse = _by_groups(queries, k, v, added, read, scale, want_lse or not all_see)
    out = out.reshape(q.shape)
    if lse is None:
        return out, None
    lse = lse.reshape(q.shape[:3])
    if all_see:
        return out, lse
    nothing = lse < HIDDEN / 2
    return out.masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, -math.inf)


class _Read(NamedTuple):
    """What the m = B·G groups of heads read.

    Attributes:
        cols: C, keys of a block.
        own: which of the N blocks a head reads, bool `(m, H / G, N)`.
        counts: how many blocks any head of a group reads.
        start: the first key of each of them `(m, n)`, n the largest count; None: all keys are read.
        j: the keys `(m, n·C)`, or `(S,)`.
        added: what goes to their scores, 0 or `HIDDEN`, `(m, H / G, n·C)` or `(m, H / G, S)`.
    """

    cols: int
    own: np.ndarray
    counts: list[int]
    start: np.ndarray | None
    j: np.ndarray
    added: np.ndarray


def _read(choice: Chosen, batch: int, heads: int, kv_heads: int, keys: int) -> _Read:
    # in NumPy: of tables so small torch spends its time on calls
    groups, repeat, cols = batch * kv_heads, heads // kv_heads, choice.cols
    blocks = -(-keys // cols)
    own = _table(choice.index, batch, heads, blocks).reshape(groups, repeat, blocks)
    either = own.any(1)
    counts = either.sum(1).tolist()
    most = max(1, *counts)
    if most > _MOST * blocks:
        return _Read(cols, own, counts, None, np.arange(keys), _for_keys(own, cols)[..., :keys])
    # the chosen blocks come first, others behind them where groups chose unequally many
    index = np.argsort(~either, axis=1, kind="stable")[:, :most]
    start = np.minimum(index * cols, keys - cols)  # the last block reaches back for a whole one,
    added = _for_keys(own[np.arange(groups)[:, None], :, index].swapaxes(1, 2), cols)
    if keys % cols:  # whose first keys are not its own
        for group, place in np.argwhere(index == blocks - 1):
            added[group, :, place * cols : (place + 1) * cols - keys % cols] = HIDDEN
    return _Read(cols, own, counts, start, (start[..., None] + np.arange(cols)).reshape(groups, -1), added)


def _hide(added: Tensor, rest: Mask, read: _Read, batch: int, keys: int) -> None:
    """Write into `added` which of the keys that are read a mask hides."""
    groups, repeat = added.shape[:2]
    kv_heads = groups // batch
    b = torch.arange(batch).view(-1, 1, 1, 1)
    h = torch.arange(kv_heads * repeat).view(kv_heads, repeat, 1)
    i = torch.full((1, 1), keys - 1)
    j = torch.from_numpy(read.j)
    seen = rest.allowed(b, h, i, j if read.start is None else j.view(batch, kv_heads, 1, -1))
    added.view(batch, kv_heads, repeat, -1).masked_fill_(~seen, HIDDEN)


def _by_groups(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor, read: _Read, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output `(m, H / G, D)` and log-sum-exp `(m, H / G)`, some groups at a time."""
    assert read.start is not None
    keys, values = _Table(k, read.cols), _Table(v, read.cols)
    size = read.cols * q.shape[2] * q.element_size()
    step = max(1, _BYTES // (2 * read.start.shape[1] * size))
    found: list[tuple[Tensor, Tensor | None]] = []
    for first in range(0, len(q), step):
        here = slice(first, first + step)
        n = max(1, *read.counts[here])
        own, start = added[here, :, : n * read.cols], read.start[here, :n]
        gathered = keys.blocks(start, first)
        if q.dtype == torch.float32:
            rows = values.rows(read.j[here, : n * read.cols], first)
            found.append(_weigh(q[here], own, gathered, values.all_rows, rows, scale, want_lse))
        else:
            found.append(few_rows(q[here], gathered, values.blocks(start, first), own, scale))
    if len(found) == 1:
        return found[0]
    out, lse = torch.cat([one for one, _ in found]), [one for _, one in found if one is not None]
    return out, torch.cat(lse) if lse else None


def _weigh(
    q: Tensor, added: Tensor, k: Tensor, table: Tensor, rows: Tensor, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """As `few_rows`, for values that are the `rows` `(m, n)` of a table: summed there, without a copy."""
    logits = torch.baddbmm(added, q, k.mT, alpha=scale)
    index = rows[:, None].expand(logits.shape).flatten(0, 1)
    out = F.embedding_bag(index, table, mode="sum", per_sample_weights=logits.softmax(-1).flatten(0, 1))
    return out, logits.logsumexp(-1) if want_lse else None


def _hiding(mask: Mask | None, keys: int) -> Mask | None:
    """What of a mask hides anything from the last query, which may look at all that lies before."""
    return all_of(term for term in terms_of(mask) if runs_of_last(term, keys) != [(0, keys)])


def _table(index: Tensor, batch: int, heads: int, blocks: int) -> np.ndarray:
    """Which blocks are listed in `(B or 1, H or 1, 1, K)`, bool `(B, H, blocks)`."""
    listed = index[:, :, 0].numpy()
    items, own = listed.shape[:2]
    table = np.zeros((items, own, blocks + 1), dtype=bool)
    table[np.arange(items)[:, None, None], np.arange(own)[:, None], listed] = True  # -1, none: the last one
    table = table[..., :blocks]
    return table if (items, own) == (batch, heads) else np.broadcast_to(table, (batch, heads, blocks))


def _for_keys(read: np.ndarray, cols: int) -> np.ndarray:
    """What goes to the scores of the keys of blocks, of which `(..., n)` are read: `(..., n·C)`."""
    return np.where(read, np.float32(0), np.float32(HIDDEN)).repeat(cols, -1)


class _Table:
    """`(B, G, S, D)` as one table of rows, and as all its runs of `cols` rows, wherever they start."""

    def __init__(self, x: Tensor, cols: int) -> None:
        self.width, self.cols = x.shape[3], cols
        apart = any(x.stride(n) % self.width for n in (0, 1) if x.shape[n] > 1)
        if x.stride(3) != 1 or x.stride(2) != self.width or apart:
            x = x.contiguous()
        last = sum((size - 1) * step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True))
        self.all_rows = x.as_strided((last // self.width + 1, self.width), (self.width, 1))
        own = np.arange(x.shape[0])[:, None] * (x.stride(0) // self.width)
        self.base = (own + np.arange(x.shape[1]) * (x.stride(1) // self.width)).reshape(-1, 1)
        self.held: Tensor | None = None

    def rows(self, j: np.ndarray, first: int) -> Tensor:
        """Which rows the keys j `(m, n)` of the groups from the `first` of B·G on are."""
        return torch.from_numpy(j + self.base[first : first + len(j)])

    def blocks(self, start: np.ndarray, first: int) -> Tensor:
        """Runs of `cols` rows that begin at the keys `start` `(m, n)` of groups: `(m, n·cols, D)`.

        What was given before is written over, so that memory stays in the cache of a core.
        """
        place = self.rows(start, first)
        runs = self.all_rows.unfold(0, self.cols, 1).mT
        if self.held is None or len(self.held) < place.numel():
            self.held = self.all_rows.new_empty(place.numel(), self.cols, self.width)
        into = self.held[: place.numel()]
        torch.index_select(runs, 0, place.view(-1), out=into)
        return into.view(len(place), -1, self.width)
