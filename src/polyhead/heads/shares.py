"""Shares of a budget for heads, in proportion to a score."""

from __future__ import annotations

import numpy as np

from polyhead.checks import given, number
from polyhead.errors import ConfigError
from polyhead.head_scores import HeadScores

__all__ = ["shares"]


def shares(scores: HeadScores, mean: float, *, least: float = 0.0, most: float = 1.0) -> HeadScores:
    """Shares of a budget for all heads, in proportion to their scores and of a given mean.

        share_h = min(most, max(least, c · score_h)),  c such that the mean over all heads is `mean`

    What a layer's budget takes: `keep_share(torch.tensor(shares(scores, 0.1)[layer]))`.

    Args:
        scores: numbers from 0 on, such as the mass that a selector misses of every head.
        mean: of the shares of all heads of all layers, above 0, at most `most`.
        least: what every head gets, at most `mean`.
        most: what a head gets at most, above 0, at most 1.

    Raises:
        ConfigError: a score is below 0 or not defined, or too many are 0 to reach the mean.
    """
    if not isinstance(scores, HeadScores):
        raise ConfigError(f"scores must be HeadScores, such as profile['distance']; got {given(scores)}")
    most = number("most", most, above=0, most=1)
    mean = number("mean", mean, above=0, most=most)
    least = number("least", least, least=0, most=mean)
    values = scores.flat
    if not len(values) or not bool((np.isfinite(values) & (values >= 0)).all()):
        raise ConfigError(f"shares need a score of 0 or more for every head; got {scores}")
    largest = float(values.max())
    parts = values / largest if largest else values
    positive = parts[parts > 0]
    low, high = 0.0, most / float(positive.min()) if len(positive) else 0.0
    if float(np.clip(high * parts, least, most).mean()) < mean - 1e-12:
        raise ConfigError(
            f"{len(values) - len(positive)} of {len(values)} heads have score 0 and share {least:g}, so that "
            f"the mean cannot be {mean:g}; give a larger least or a smaller mean"
        )
    for _ in range(200):  # the mean grows with the factor: bisection to the last bit
        middle = (low + high) / 2
        if float(np.clip(middle * parts, least, most).mean()) < mean:
            low = middle
        else:
            high = middle
    return scores.map(
        lambda layer: np.clip(high * (layer / largest if largest else layer), least, most)
    ).renamed(
        "share",
        meaning=f"share of a budget in proportion to {scores.name}, {mean:g} in the mean",
        unit="share",
        direction="higher: a larger part of the budget",
    )
