"""What a call computes, apart from q, k and v."""

from __future__ import annotations

from polyhead.attend.masks import Mask
from polyhead.attend.normalizers import Normalizer
from polyhead.attend.scores import Score
from polyhead.attend.weight_maps import WeightMap
from polyhead.description import Part

__all__ = ["Problem"]


class Problem(Part):
    """Mask, score maps, normaliser, scale, dropout, weight maps: the five languages' share in one call."""

    mask: Mask | None
    score: Score | None
    normalizer: Normalizer
    scale: float
    dropout: float = 0.0
    weight_map: WeightMap | None = None

    @property
    def whole_heads(self) -> bool:
        """Whether a map needs all heads of a batch item at once."""
        return any(part is not None and part.whole_heads for part in (self.score, self.weight_map))

    @property
    def rows_back(self) -> int:
        """Queries before a query whose pairs its weights depend on."""
        return sum(0 if part is None else part.rows_back for part in (self.score, self.weight_map))
