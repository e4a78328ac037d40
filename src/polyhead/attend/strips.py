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
    known to see some key.
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


def _masked(runs: list[Run], every: list[bool]) -> tuple[tuple[int, int] | None, bool]:
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


def _rows(frame: Frame, budget: int) -> int:
    """Rows of a strip: as many as keep one KV head's share within the budget."""
    repeat = frame.heads // frame.kv_heads
    rows = min(_ROWS, max(frame.queries, 1))
    while rows > 1 and repeat * rows * frame.keys > budget:
        rows = (rows + 1) // 2
    return rows


def strips(frame: Frame, mask: Mask | None) -> Iterator[Strip]:
    """The strips of a call, which together hold every pair that the mask allows, each once.

    Args:
        frame: sizes of the call.
        mask: who may look at whom; None allows all.
    """
    if 0 in (frame.batch, frame.heads, frame.queries, frame.keys):
        return
    budget = _ELEMENTS.get(frame.device.type, 1 << 20)
    repeat = frame.heads // frame.kv_heads
    rows = _rows(frame, budget)
    per_batch = False
    some = every = None
    if mask is not None:
        tiles = tile_map(
            mask,
            batch=frame.batch,
            heads=frame.heads,
            queries=frame.queries,
            keys=frame.keys,
            rows=rows,
            cols=_COLS,
            device=frame.device,
        )
        # united over heads: a strip reads what any of its heads may see
        some, every = tiles.some.any(1).cpu(), tiles.every.all(1).cpu()
        per_batch = some.shape[0] > 1
    for r0 in range(0, frame.queries, rows):
        r1 = min(r0 + rows, frame.queries)
        for lo, hi in _batches(frame, per_batch):
            if some is None or every is None:
                runs, masked, alive = [Run(0, frame.keys)], None, True
            else:
                item = lo if per_batch else 0
                runs = _runs(some[item, r0 // rows].tolist(), frame.keys)
                masked, alive = _masked(runs, every[item, r0 // rows].tolist())
            if not runs:
                continue
            columns = sum(run.stop - run.start for run in runs)
            fit = max(1, budget // (repeat * (r1 - r0) * columns))  # KV heads that fit into a strip
            if fit >= frame.kv_heads:
                step = max(1, fit // frame.kv_heads)
                for b0 in range(lo, hi, step):
                    b1 = min(b0 + step, hi)
                    yield Strip(b0, b1, 0, frame.kv_heads, r0, r1, tuple(runs), masked, alive)
            else:
                for b0 in range(lo, hi):
                    for g0 in range(0, frame.kv_heads, fit):
                        g1 = min(g0 + fit, frame.kv_heads)
                        yield Strip(b0, b0 + 1, g0, g1, r0, r1, tuple(runs), masked, alive)


def _batches(frame: Frame, per_batch: bool) -> list[tuple[int, int]]:
    """Ranges of batch items that may share a strip: those whose mask is the same."""
    return [(b, b + 1) for b in range(frame.batch)] if per_batch else [(0, frame.batch)]
