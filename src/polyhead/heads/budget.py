"""Budgets for heads by how sensitive a model is to them, of a given mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyhead.checks import given, number
from polyhead.errors import ConfigError
from polyhead.head_scores import HeadScores
from polyhead.heads.shares import shares

__all__ = ["ErrorCurve", "allocate_budget", "allocate_greedily", "error_curve"]


def allocate_budget(
    scores: HeadScores, mean: float, floor: float = 0.0, cap: float = 1.0, *, power: float = 0.5
) -> HeadScores:
    """Shares of the keys for all heads, in proportion to a power of their scores: water-filling.

        share_h = min(cap, max(floor, c · score_h^power)),     c such that the mean over all heads is `mean`

    Heads with score 0 get the floor; what is left when all others have the cap is shared by them alike.
    Where the error of a head falls as 1/share, shares that go by the square root of what it costs make the
    sum of errors smallest; for one that falls as share^-a it is the power 1/(a + 1).

    What a layer's budget takes is a row, `keep_share(torch.tensor(budget[layer]))`, and what a model takes a
    selector a layer:

        budget = allocate_budget(head_sensitivity(model, tokenizer, text, select=own(0.2)), 0.2, floor=0.05)
        with ph.sparse(model, [own(torch.tensor(row)) for row in budget.values]): ...

    "HeSS: Head Sensitivity Score for Sparsity Redistribution in VGGT" (paper 195, arXiv 2603.25336).

    Our readings: the paper's rule is not out. The mean is over heads; a selector rounds each share to blocks.

    Args:
        scores: numbers from 0 on, such as those of `head_sensitivity`.
        mean: of the shares of all heads of all layers; 1 reads everything.
        floor, cap: what every head gets at least and at most, 0 to 1.
        power: of the scores; 1 is `shares`, 0 gives all that have a score the same.

    Raises:
        ConfigError: a score is below 0 or not defined, or the mean is not between floor and cap.
    """
    values = _checked(scores, mean, floor, cap)
    power = number("power", power, least=0)
    largest = float(values.max()) or 1.0
    weights = np.where(values > 0, (values / largest) ** power, 0.0)
    positive = weights > 0
    most = np.where(positive, cap, floor)
    if mean >= float(most.mean()):
        left = len(values) * mean - cap * float(positive.sum())
        rest = left / max(1, int((~positive).sum()))
        found = np.where(positive, cap, min(cap, rest)) if not positive.all() else np.full(len(values), cap)
        return _budget(scores, found, mean)
    return _budget(scores, shares(_like(scores, weights), mean, least=floor, most=cap).flat, mean)


@dataclass(frozen=True)
class ErrorCurve:
    """How the error of a head falls with the share of the keys that it reads, straight between points.

    Attributes:
        shares: ascending, the last one 1.
        errors: never rising, convex, 0 at the end.
    """

    shares: tuple[float, ...]
    errors: tuple[float, ...]

    def at(self, share: NDArray[np.float64]) -> NDArray[np.float64]:
        """The errors at some shares; before the first point the curve goes on straight."""
        first = (self.errors[1] - self.errors[0]) / (self.shares[1] - self.shares[0])
        before = self.errors[0] + first * (share - self.shares[0])
        inside = np.interp(share, self.shares, self.errors)
        return np.where(share < self.shares[0], before, inside)


def error_curve(measured: Mapping[float, HeadScores]) -> ErrorCurve:
    """The mean over heads of scores measured at some shares, made convex.

    What `allocate_greedily` takes. Scores such as those of `head_sensitivities` with the selector at that
    share. At 1 everything is read, and the error is 0. Points above the line between two others are left out:
    only so is the greedy allocation the best one.

    Args:
        measured: scores by share, `{0.1: scores, 0.3: scores, ...}`; at least one.

    Raises:
        ConfigError: there is no point, a share is not between 0 and 1, or an error is below 0 or not defined.
    """
    if not isinstance(measured, Mapping) or not measured:
        raise ConfigError(f"error_curve: measured must be {{share: HeadScores}}; got {given(measured)}")
    points = [(1.0, 0.0)]
    for share, scores in measured.items():
        share = number("error_curve: share", share, above=0, below=1)
        values = scores.flat if isinstance(scores, HeadScores) else np.array([math.nan])
        if not bool((np.isfinite(values) & (values >= 0)).all()):
            raise ConfigError(f"error_curve needs an error of 0 or more for every head; got {given(scores)}")
        points.append((share, float(values.mean())))
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        while len(hull) > 1 and _above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return ErrorCurve(tuple(x for x, _ in hull), tuple(y for _, y in hull))


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def allocate_greedily(
    scores: HeadScores,
    mean: float,
    curve: ErrorCurve,
    floor: float = 0.0,
    cap: float = 1.0,
    *,
    step: float = 1 / 64,
) -> HeadScores:
    """Shares of the keys for all heads that make the sum of their errors smallest, in steps.

        smallest  Σ_h score_h · curve(share_h),        mean of share_h = `mean`,  floor <= share_h <= cap

    Each step goes to the head whose error it lowers most, score_h · (curve(s) - curve(s + step)); for a
    convex curve that is the best there is. Of equals each gets one before any gets two. The mean is met to
    one step of one head.

    A straight piece of the curve is taken by one head after the other, so that measured points that are few
    make budgets that are all or nothing.

    Args:
        scores, mean, floor, cap: as for `allocate_budget`.
        curve: of the error, such as `error_curve` measures.
        step: share that is given at a time.
    """
    values = _checked(scores, mean, floor, cap)
    if not isinstance(curve, ErrorCurve):
        raise ConfigError(f"allocate_greedily: curve must be one that error_curve makes; got {given(curve)}")
    step = number("allocate_greedily: step", step, above=0, most=1)
    levels = max(1, math.ceil((cap - floor) / step - 1e-9))
    step = (cap - floor) / levels
    if not step:
        return _budget(scores, np.full(len(values), floor), mean)
    at = np.linspace(floor, cap, levels + 1)
    gains = np.outer(values, -np.diff(curve.at(at)))
    head, level = np.indices(gains.shape)
    order = np.lexsort((head.ravel(), level.ravel(), -gains.ravel()))
    count = round((mean - floor) * len(values) / step)
    given_to = np.bincount(head.ravel()[order[:count]], minlength=len(values))
    return _budget(scores, np.minimum(floor + step * given_to, cap), mean)


def _checked(scores: HeadScores, mean: float, floor: float, cap: float) -> NDArray[np.float64]:
    if not isinstance(scores, HeadScores):
        raise ConfigError(f"scores must be HeadScores, such as head_sensitivity(...); got {given(scores)}")
    cap = number("cap", cap, above=0, most=1)
    floor = number("floor", floor, least=0, most=cap)
    mean = number("mean", mean, above=0, most=1)
    if not floor <= mean <= cap:
        raise ConfigError(f"mean must be between floor and cap, {floor:g} and {cap:g}; got {mean:g}")
    values = scores.flat
    if not len(values) or not bool((np.isfinite(values) & (values >= 0)).all()):
        raise ConfigError(f"a budget needs a score of 0 or more for every head; got {scores}")
    return values


def _like(scores: HeadScores, flat: NDArray[np.float64]) -> HeadScores:
    """Other numbers for the same heads."""
    layers = np.split(flat, np.cumsum(scores.widths)[:-1])
    return HeadScores(tuple(layers), name=scores.name, level=scores.level, kv_groups=scores.kv_groups)


def _budget(scores: HeadScores, flat: NDArray[np.float64], mean: float) -> HeadScores:
    return _like(scores, flat).renamed(
        "budget",
        meaning=f"share of the keys that the head reads, by {scores.name}, {mean:g} in the mean",
        unit="share",
        direction="higher: reads more",
    )
