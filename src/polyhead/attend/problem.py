"""What a call computes, apart from q, k and v."""

from __future__ import annotations

from polyhead.attend.masks import Mask
from polyhead.attend.normalizers import Normalizer
from polyhead.attend.scores import Score
from polyhead.description import Part

__all__ = ["Problem"]


class Problem(Part):
    """Mask, score maps, normaliser, scale and dropout: the five languages' share in one call."""

    mask: Mask | None
    score: Score | None
    normalizer: Normalizer
    scale: float
    dropout: float = 0.0
