"""Which strips the tile engine walks: whole rows of a few queries by all the keys that they may see.

A strip is small enough for the cache and holds whole rows, so that every normaliser is exact in one pass.
Heads that share keys stay together, and keys that no row of the strip may see are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from polyhead.attend.masks import Mask, tile_map

__all__ = ["Frame", "Run", "Strip", "strips"]

# Scores of one strip: 4 MiB of float32 stay in the cache of a CPU, a GPU wants larger pieces of work.
_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
_ROWS = 128
_COLS = 64
_TILES = 1 << 18  # tiles of a mask that are looked at together
_SET_UP = 1 << 14  # scores that take a CPU about as long as a strip more to set up; not tried on CUDA


@dataclass(frozen=True)
class Frame:
    """The sizes of a call: B, H, G, L, S and where the first query stands among the keys."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    device: torch.device

    @property
    def offset(self) -> int:
        """Absolute position of the first query: queries are aligned to the end of the keys."""
        return self.keys - self.queries


@dataclass(frozen=True)
class Run:
    """Neighbouring key columns start..stop-1."""

    start: int
    stop: int


@dataclass(frozen=True)
class Strip:
    """Some batch items and KV heads, query rows r0..r1-1, and the runs of keys that they may see.

    `masked` is the part of the strip's columns (indices into the joined runs) in which the mask
    forbids something, None when everything in the runs is allowed; `alive` says that every row is
    known to see some key. Of the rows, the first `lead` are there only for those behind them to read.
    """

    b0: int
    b1: int
    g0: int
    g1: int
    r0: int
    r1: int
    runs: tuple[Run, ...]
    masked: tuple[int, int] | None
    alive: bool
    lead: int = 0

    @property
    def columns(self) -> int:
        """Number of key columns in the strip."""
        return sum(run.stop - run.start for run in self.runs)


def _runs(some: list[bool], keys: int) -> list[Run]:
    """Runs of visible columns from the visible column tiles; a gap of one tile is not worth a copy."""
    runs: list[Run] = []
    for t, visible in enumerate(some):
        if not visible:
            continue
        start, stop = t * _COLS, min((t + 1) * _COLS, keys)
        if runs and start - runs[-1].stop <= _COLS:
            runs[-1] = Run(runs[-1].start, stop)
        else:
            runs.append(Run(start, stop))
    return runs


def _masked(runs: tuple[Run, ...], every: list[bool]) -> tuple[tuple[int, int] | None, bool]:
    """The joined columns in which some pair is forbidden, and whether some column tile is all allowed."""
    first, last, base, full = None, 0, 0, False
    for run in runs:
        for start in range(run.start, run.stop, _COLS):
            stop = min(start + _COLS, run.stop)
            if every[start // _COLS]:
                full = True
            else:
                first = base + start - run.start if first is None else first
                last = base + stop - run.start
        base += run.stop - run.start
    return (None if first is None else (first, last)), full


def strips(
    frame: Frame, mask: Mask | None, *, whole_heads: bool = False, rows_back: int = 0
) -> Iterator[Strip]:
    """The strips of a call, which together hold every pair that the mask allows, each once.

    Args:
        frame: sizes of the call.
        mask: who may look at whom; None allows all.
        whole_heads: whether every strip has to hold all heads: of fewer rows, where they do not fit.
        rows_back: how many rows before its own a strip holds besides.
    """
    if 0 in (frame.batch, frame.heads, frame.queries, frame.keys):
        return
    budget = _ELEMENTS.get(frame.device.type, 1 << 20)
    if whole_heads:
        budget *= 2  # fewer rows a head make narrow products: measured best
    together = frame.heads if whole_heads else frame.heads // frame.kv_heads  # query heads kept together
    pieces = frame.heads // together
    for r0, (lo, hi), runs, masked, alive in _visible(frame, mask, rows_back):
        if not runs:
            continue
        columns = sum(run.stop - run.start for run in runs)
        end = min(r0 + _ROWS, frame.queries)
        # rows that are held besides must not be most of the work
        rows = min(end - r0, max(1, 4 * rows_back, budget // (together * columns)))
        fit = max(
            1, budget // (together * (rows + rows_back) * columns)
        )  # KV heads, or batch items, that fit into a strip
        for start in range(r0, end, rows):
            stop = min(start + rows, end)
            lead = min(rows_back, start)
            first = start - lead
            if fit >= pieces:
                step = max(1, fit // pieces)
                for b0 in range(lo, hi, step):
                    b1 = min(b0 + step, hi)
                    yield Strip(b0, b1, 0, frame.kv_heads, first, stop, runs, masked, alive, lead)
            else:
                for b0 in range(lo, hi):
                    for g0 in range(0, frame.kv_heads, fit):
                        g1 = min(g0 + fit, frame.kv_heads)
                        yield Strip(b0, b0 + 1, g0, g1, first, stop, runs, masked, alive, lead)


_Items = tuple[int, int]
_Seen = tuple[int, _Items, tuple[Run, ...], tuple[int, int] | None, bool]


def _alike(
    some: list[list[bool]], every: list[list[bool]], column: int
) -> Iterator[tuple[_Items, list[bool], list[bool]]]:
    """Neighbouring batch items as one, where that costs less than a strip for each.

    Yields the items from first to last + 1, the tiles that any of them sees and those that all see wholly.
    `column`: scores of a tile of columns.
    """
    first, seen, full = 0, some[0], every[0]
    for item in range(1, len(some)):
        both = [a or b for a, b in zip(seen, some[item], strict=True)]
        count = item - first
        more = (count + 1) * sum(both) - count * sum(seen) - sum(some[item])
        if more * column > _SET_UP:
            yield (first, item), seen, full
            first, seen, full = item, some[item], every[item]
        else:
            seen, full = both, [a and b for a, b in zip(full, every[item], strict=True)]
    yield (first, len(some)), seen, full


def _visible(frame: Frame, mask: Mask | None, rows_back: int) -> Iterator[_Seen]:
    """For each tile of rows: its first row, batch items that are alike, the runs, what is masked, alive.

    What is said of a tile holds for the rows before that are held besides, too.
    """
    if mask is None:
        for r0 in range(0, frame.queries, _ROWS):
            yield r0, (0, frame.batch), (Run(0, frame.keys),), None, True
        return
    # the map of tiles is quadratic in the lengths, if 8192 times smaller: a band of it at a time
    across = -(-frame.keys // _COLS) * frame.batch * frame.heads
    band = max(1, _TILES // across) * _ROWS
    back = -(-rows_back // _ROWS)
    for q0 in range(0, frame.queries, band):
        early = min(q0 // _ROWS, back)
        first = q0 - early * _ROWS
        tiles = tile_map(
            mask,
            batch=frame.batch,
            heads=frame.heads,
            queries=min(q0 + band, frame.queries) - first,
            keys=frame.keys,
            offset=frame.offset + first,
            rows=_ROWS,
            cols=_COLS,
            device=frame.device,
        )
        # united over heads: a strip reads what any of its heads may see
        some, every = tiles.some.any(1).cpu(), tiles.every.all(1).cpu()
        if back:
            before = [(some[:, :-n], every[:, :-n]) for n in range(1, min(back, some.shape[1] - 1) + 1)]
            some, every = some.clone(), every.clone()
            for n, (seen, full) in enumerate(before, 1):
                some[:, n:] |= seen
                every[:, n:] &= full
        column = min(_ROWS, frame.queries) * min(_COLS, frame.keys) * frame.heads
        for t in range(early, some.shape[1]):
            for items, reached, whole in _alike(some[:, t].tolist(), every[:, t].tolist(), column):
                runs = tuple(_runs(reached, frame.keys))
                masked, alive = _masked(runs, whole)
                items = items if some.shape[0] > 1 else (0, frame.batch)
                yield first + t * _ROWS, items, runs, masked, alive
