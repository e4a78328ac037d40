"""How sure a share is that was seen in so many trials."""

from __future__ import annotations

import math

__all__ = ["wilson"]


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share seen in `count` trials."""
    if count <= 0:
        return share, share
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)
