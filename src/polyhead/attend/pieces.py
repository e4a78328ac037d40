"""A call with chosen blocks, cut into pieces for a fused kernel: some queries by the keys that they all read.

The keys of a piece are either gathered, where many queries in a row read the same blocks, or where blocks are
small; or they are one block, and the queries that chose it are gathered, where every query, or every few,
chose large blocks for itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.attend import cpu_rows
from polyhead.attend.fused_cpu import HIDDEN
from polyhead.attend.masks import Chosen, Mask, all_of, terms_of
from polyhead.attend.precision import wide

__all__ = ["Piece", "Sizes", "pieces", "split", "whole"]

_BYTES = 1 << 22  # of gathered keys and values: more does not stay in the cache of a core,
_AT_ONCE = 1 << 23  # but products of whole rows take many groups in a call, and fewer calls are quicker
_ROWS = 16  # fewer queries that share their blocks are too few to gather keys for,
_COLS = 16  # unless a block has at most so many keys for each of them


@dataclass(frozen=True)
class Sizes:
    """A call: B, H, G, L, S, the width of its tensors in bytes, and where the first query stands."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    row_bytes: int

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.keys - self.queries

    @property
    def nobody(self) -> int:
        """The place of no query: the one behind the last."""
        return self.batch * self.heads * self.queries


@dataclass(frozen=True)
class Piece:
    """Some groups of queries, and the blocks of keys that each of them reads.

    Attributes:
        rows: `(m, r)`, queries as places in the flat `(B·H·L)`; `Sizes.nobody`: none.
        blocks: `(m, n)`, blocks of keys as places in the flat `(B·G·blocks)`. Groups that read fewer than n
            begin with one of their blocks again and again.
        added: `(m, 1, r, h)`, or `(1, 1, r, h)` for every group, what is added to the scores of the last h
            keys; None: nothing is hidden.
        skipped: `(m,)`, how many keys of each group do not count, its first ones; None: all count.
        first: whether no piece before had any of these queries.
    """

    rows: Tensor
    blocks: Tensor
    added: Tensor | None
    skipped: Tensor | None = None
    first: bool = False


def split(mask: Mask | None) -> tuple[Chosen, Mask | None] | None:
    """The one choice of blocks in a mask, and the rest of it; None if there is none, or more than one."""
    found = [term for term in terms_of(mask) if isinstance(term, Chosen)]
    if len(found) != 1:
        return None
    return found[0], all_of(term for term in terms_of(mask) if not isinstance(term, Chosen))


@dataclass(frozen=True)
class _Chosen:
    """Pairs of a block of queries and a block of keys that it reads: (B, H, blocks of queries, K) each."""

    index: Tensor  # the blocks, ascending
    every: Tensor  # that are seen whole
    some: Tensor  # of which something is seen


def _looked_at(choice: Chosen, rest: Mask | None, sizes: Sizes) -> _Chosen:
    index = choice.index.to(torch.int64).sort(-1).values
    index = index.expand(sizes.batch, sizes.heads, -1, -1)
    there = index >= 0
    j0 = index.clamp(min=0) * choice.cols
    j1 = j0 + choice.cols - 1
    within = j1 < sizes.keys
    if rest is None:
        return _Chosen(index, there & within, there)
    device = index.device
    i0 = (sizes.offset + torch.arange(index.shape[2], device=device) * choice.rows)[:, None]
    i1 = (i0 + choice.rows - 1).clamp(max=sizes.keys - 1)
    b = torch.arange(sizes.batch, device=device).view(-1, 1, 1, 1)
    h = torch.arange(sizes.heads, device=device).view(-1, 1, 1)
    some, every = rest.bounds(b, h, i0, i1, j0, j1.clamp(max=sizes.keys - 1))
    return _Chosen(index, there & within & every, there & some)


def whole(choice: Chosen, rest: Mask | None, sizes: Sizes) -> bool:
    """Whether all that `rest` lets be seen was chosen, so that the choice makes no difference."""
    blocks = -(-sizes.keys // choice.cols)
    if choice.index.shape[-1] < blocks:
        return False
    found = _looked_at(choice, rest, sizes)
    everything = torch.arange(blocks, device=found.index.device).expand(*found.index.shape[:3], -1)
    visible = _looked_at(Chosen(everything, choice.rows, choice.cols, choice.first), rest, sizes)
    return torch.equal(found.some.sum(-1), visible.some.sum(-1))


def pieces(choice: Chosen, rest: Mask | None, sizes: Sizes, own_dtype: torch.dtype) -> Iterator[Piece]:
    """Pieces that hold every pair which is chosen, and which `rest` allows, exactly once.

    `own_dtype` is that of the queries.
    """
    found, dtype = _looked_at(choice, rest, sizes), wide(own_dtype)
    repeat = sizes.heads // sizes.kv_heads
    own = found.index[:, ::repeat].repeat_interleave(repeat, 1)
    together = repeat if repeat > 1 and torch.equal(found.index, own) else 1
    some, wholly = found.some, found.every
    if together > 1:  # heads that read a block together see it whole only if each of them does
        some, wholly = _any_of_group(some, repeat), ~_any_of_group(~wholly, repeat)
    partly = some & ~wholly
    shared = choice.rows * together
    if sizes.queries == 1 or shared >= _ROWS or choice.cols <= _COLS * shared:
        # the fused kernel takes a table for all keys or none
        none = torch.zeros_like(wholly)
        apart = ((wholly, none), (none, partly))
        for n, seen in enumerate(((wholly, partly),) if cpu_rows.suits(shared, own_dtype) else apart):
            yield from _by_rows(choice, rest, found.index, *seen, sizes, together, own_dtype, first=n == 0)
    else:
        yield from _by_blocks(choice, None, found.index, wholly, sizes, dtype)
        yield from _by_blocks(choice, rest, found.index, partly, sizes, dtype)


def _any_of_group(seen: Tensor, repeat: int) -> Tensor:
    any_of = seen.unflatten(1, (-1, repeat)).any(2)
    return any_of.repeat_interleave(repeat, 1)


def _by_rows(
    choice: Chosen,
    rest: Mask | None,
    index: Tensor,
    wholly: Tensor,
    partly: Tensor,
    sizes: Sizes,
    together: int,
    own_dtype: torch.dtype,
    *,
    first: bool,
) -> Iterator[Piece]:
    """Blocks of queries that read about as many blocks of keys, some of them at a time."""
    index, wholly, partly = (x[:, ::together] for x in (index, wholly, partly))
    own_heads, width = index.shape[1], index.shape[3]
    device = index.device
    rows = _rows_of_blocks(choice.rows, sizes, together, device)
    # of what distances alone decide one table serves all groups that lie alike; those at the ends do not
    inside = torch.zeros(len(rows), dtype=torch.bool, device=device)
    if rest is None or (not rest.thresholds() and rest.distances({}) is not None):
        inside = (~partly | ((index + 1) * choice.cols <= sizes.keys)).all(-1).view(-1)
        inside = inside & (rows < sizes.nobody).all(-1)
    # blocks that are seen whole come first, then those of which something is seen
    rank = 3 - 2 * wholly.to(torch.int8) - partly.to(torch.int8)
    order = rank.sort(dim=-1, stable=True).indices
    index = index.gather(-1, order)
    base = torch.arange(sizes.batch * sizes.kv_heads, device=device) * -(-sizes.keys // choice.cols)
    places = base.repeat_interleave(own_heads // sizes.kv_heads)[:, None, None] + index.flatten(0, 1)
    flat, plain = places.flatten(0, 1), index.flatten(0, 2)
    within = torch.arange(choice.cols, device=device)
    dtype = wide(own_dtype)
    tables = _Tables(rest, sizes, dtype)
    held = _AT_ONCE if cpu_rows.suits(rows.shape[1], own_dtype) else _BYTES
    some, counts = partly.sum(-1).view(-1), (wholly | partly).sum(-1).view(-1)
    filled = [_filled(n, choice.cols, rows.shape[1], own_dtype) for n in range(width + 1)]
    kinds = counts.new_tensor(filled)[counts] * (width + 1) + some
    for kind in kinds[kinds > 0].unique().tolist():
        count, hidden = divmod(kind, width + 1)
        step = max(1, held // (count * choice.cols * sizes.row_bytes))
        if hidden:  # scores as large as the table are held besides
            step = max(1, min(step, held // (hidden * choice.cols * rows.shape[1] * dtype.itemsize)))
        for own in ((kinds == kind) & inside, (kinds == kind) & ~inside):
            groups = own.nonzero().view(-1)
            if not len(groups):
                continue
            alike = bool(inside[groups[0]])
            missing = count - counts[groups, None]
            place = (torch.arange(count, device=device) - missing).clamp(min=0)
            blocks = flat[groups].gather(1, place)
            partly_seen = plain[groups].gather(1, place[:, count - hidden :])
            skipped = missing[:, 0] * choice.cols if bool(missing.any()) else None
            for part in (slice(start, start + step) for start in range(0, len(groups), step)):
                queries, added = rows[groups[part]], None
                if hidden:
                    j = (partly_seen[part, :, None] * choice.cols + within).flatten(1)
                    added = tables.of(queries, j, inside=alike)
                yield Piece(queries, blocks[part], added, None if skipped is None else skipped[part], first)


def _filled(blocks: int, cols: int, rows: int, dtype: torch.dtype) -> int:
    """How many blocks are gathered for so many: groups with about as many then go together."""
    if not cpu_rows.pays(rows, blocks * cols, dtype):
        return blocks
    return max(blocks, cpu_rows.width(blocks * cols) // cols)


class _Tables:
    """What hides pairs of queries and keys, made once for groups that lie alike and follow each other."""

    def __init__(self, rest: Mask | None, sizes: Sizes, dtype: torch.dtype) -> None:
        self._rest, self._sizes, self._dtype = rest, sizes, dtype
        self._last: tuple[Tensor, Tensor] | None = None

    def of(self, rows: Tensor, j: Tensor, *, inside: bool) -> Tensor:
        """Of rows `(m, r)` and keys `(m, c)`; inside: distances alone decide."""
        if not inside:
            return _added(self._rest, rows, j, self._sizes, self._dtype)
        away = j - rows[:, :1] % self._sizes.queries
        if bool((away != away[0]).any()):
            return _added(self._rest, rows, j, self._sizes, self._dtype)
        if self._last is None or not torch.equal(self._last[0], away[0]):
            self._last = away[0], _added(self._rest, rows[:1], j[:1], self._sizes, self._dtype)
        return self._last[1]


def _rows_of_blocks(length: int, sizes: Sizes, together: int, device: torch.device) -> Tensor:
    """The queries of every block, `(B·H/t·blocks, t·length)` for t heads together."""
    blocks = -(-sizes.queries // length)
    row = torch.arange(blocks * length, device=device)
    row = row.view(1, blocks, length)
    head = torch.arange(sizes.batch * sizes.heads, device=device).view(-1, 1, 1) * sizes.queries
    rows = torch.where(row < sizes.queries, head + row, sizes.nobody)
    return rows.view(-1, together, blocks, length).transpose(1, 2).reshape(-1, together * length)


def _added(rest: Mask | None, rows: Tensor, j: Tensor, sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """What hides the pairs of rows `(m, r)` and keys `(m, c)` that may not be seen."""
    row = rows.clamp(max=sizes.nobody - 1)
    i = row % sizes.queries + sizes.offset
    there = (j < sizes.keys)[:, None, :]
    if rest is not None:
        h = row // sizes.queries % sizes.heads
        b = row // (sizes.queries * sizes.heads)
        j = j.clamp(max=sizes.keys - 1)
        there = there & rest.allowed(b[..., None], h[..., None], i[..., None], j[:, None, :])
    added = torch.zeros(rows.shape[0], 1, rows.shape[1], j.shape[1], dtype=dtype, device=rows.device)
    return added.masked_fill_(~there[:, None], HIDDEN)


def _by_blocks(
    choice: Chosen, rest: Mask | None, index: Tensor, which: Tensor, sizes: Sizes, dtype: torch.dtype
) -> Iterator[Piece]:
    """The queries that read a block, one block at a time."""
    masked = rest is not None or bool((which & ((index + 1) * choice.cols > sizes.keys)).any())
    blocks = -(-sizes.keys // choice.cols)
    b, h, m, n = which.nonzero(as_tuple=True)
    block = index[b, h, m, n]
    flat = (b * sizes.kv_heads + h // (sizes.heads // sizes.kv_heads)) * blocks + block
    flat, order = flat.sort(stable=True)
    names, counts = flat.unique_consecutive(return_counts=True)
    first = (b * sizes.heads + h) * sizes.queries
    start = 0
    within = torch.arange(choice.rows, device=index.device)
    most = max(1, _BYTES // (choice.cols * dtype.itemsize)) if masked else math.inf
    for name, count in zip(names.tolist(), counts.tolist(), strict=True):
        own = order[start : start + count]
        start += count
        row = m[own][:, None] * choice.rows + within
        rows = (first[own][:, None] + row)[row < sizes.queries]
        for some in rows.split(int(min(most, len(rows)))) if len(rows) else ():
            added = None
            if masked:
                j = (name % blocks) * choice.cols + torch.arange(choice.cols, device=index.device)
                added = _added(rest, some[None], j[None], sizes, dtype)
            yield Piece(some[None], flat.new_tensor([[name]]), added)
