"""What the last query alone sees, as runs of keys: what decoding asks of a mask, without a tensor."""

from __future__ import annotations

from polyhead.attend.masks.algebra import And, Mask, Or
from polyhead.attend.masks.positional import Prefix, Window

__all__ = ["runs_of_last"]

Runs = list[tuple[int, int]]


def runs_of_last(mask: Mask | None, keys: int) -> Runs | None:
    """Which of the `keys` the query at the last of them sees, runs start..stop-1, ascending.

    None: not known without asking pair by pair.
    """
    if mask is None:
        return _run(0, keys)
    if isinstance(mask, Window):
        last = keys - 1
        left = 0 if mask.left is None else max(last - mask.left, 0)
        return _run(left, keys)
    if isinstance(mask, Prefix):
        return _run(0, min(mask.n, keys)) if isinstance(mask.n, int) else None
    if not isinstance(mask, And | Or):
        return None
    found: Runs | None = None
    for term in mask.terms:
        own = runs_of_last(term, keys)
        if own is None:
            return None
        if found is None:
            found = own
        else:
            found = _either(found, own) if isinstance(mask, Or) else _both(found, own)
    return found


def _run(start: int, stop: int) -> Runs:
    return [(start, stop)] if start < stop else []


def _either(a: Runs, b: Runs) -> Runs:
    found: Runs = []
    for start, stop in sorted(a + b):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found


def _both(a: Runs, b: Runs) -> Runs:
    return [run for x in a for y in b for run in _run(max(x[0], y[0]), min(x[1], y[1]))]
