"""Budgets for heads by their scores."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["allocate_budget", "allocate_greedily"]


@twin("allocate_budget")
def allocate_budget(scores: Tensor, mean: float, floor: float, cap: float, power: float) -> Tensor:
    """min(cap, max(floor, c · score^power)) of the given mean, for scores above 0 `(n,)`.

    The heads in order of their scores: the first a have the floor, the last z the cap, and those between them
    c = (n · mean - a · floor - z · cap) / Σ score^power. Of all a and z those that fit.
    """
    weights = scores.double() ** power
    order = weights.argsort()
    n = len(scores)
    for a in range(n + 1):
        for z in range(n + 1 - a):
            between = order[a : n - z]
            found = torch.full((n,), floor, dtype=torch.float64)
            found[order[n - z :]] = cap
            if len(between):
                c = (n * mean - a * floor - z * cap) / weights[between].sum()
                found[between] = c * weights[between]
                low, high = c * weights[order[:a]], c * weights[order[n - z :]]
                fits = bool((low <= floor + 1e-12).all()) and bool((high >= cap - 1e-12).all())
                fits = fits and floor - 1e-12 <= float(found.min()) <= float(found.max()) <= cap + 1e-12
            else:
                fits = abs(float(found.mean()) - mean) < 1e-12
            if fits:
                return found
    raise AssertionError("there is always one")


@twin("allocate_greedily")
def allocate_greedily(scores: Tensor, errors: Tensor, steps: int) -> Tensor:
    """How many steps each head gets `(n,)`: one after another to the head whose error falls most by it.

    Args:
        scores: `(n,)`.
        errors: what a head with 0, 1, ... steps errs by, times its score; convex. It gets no more steps.
        steps: that are given.
    """
    count = torch.zeros(len(scores), dtype=torch.int64)
    for _ in range(steps):
        best, most = -1, -1.0
        for h, score in enumerate(scores.tolist()):
            n = int(count[h])
            if n + 1 < len(errors):
                gain = score * float(errors[n] - errors[n + 1])
                if gain > most or (gain == most and n < int(count[best])):
                    best, most = h, gain
        count[best] += 1
    return count
