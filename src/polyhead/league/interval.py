"""How sure a mean over a few seeds is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = ["mean_and_half_width"]

# the 97.5 % points of Student's t, for 1, 2, ... degrees of freedom
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """The mean of values, and half the width of its 95 % interval by Student's t; NaN where there is none.

    Values that are not finite have no mean: leaving them out would flatter who has them.
    """
    if not values or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    freedom = len(values) - 1
    point = _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.4 / freedom
    return mean, point * statistics.stdev(values) / math.sqrt(len(values))
