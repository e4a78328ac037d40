"""Measurements of where a head looks, relative to the token that looks."""

from __future__ import annotations

from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.heads.measurement import RowMean, register
from polyhead.heads.rows import Rows

__all__ = ["MeanDistance", "NextToken", "OwnToken", "PreviousToken", "WindowMass"]


@register
class PreviousToken(RowMean):
    """mean_i w_{i,i-1} over the counted rows."""

    name = "previous_token"
    title = "attention to the previous token"
    meaning = "mean attention of a token to the one before it"
    unit = "share"
    direction = "higher: looks one token back"
    paper = "Clark et al. 2019, What Does BERT Look At?, arXiv 1906.04341"

    def of(self, rows: Rows) -> Tensor:
        return rows.on(rows.i - 1)

    def where(self, rows: Rows) -> Tensor:
        return rows.counted & (rows.i > rows.first)


@register
class NextToken(RowMean):
    """mean_i w_{i,i+1} over the counted rows that have a next token; encoders only."""

    name = "next_token"
    title = "attention to the next token"
    meaning = "mean attention of a token to the one after it"
    unit = "share"
    direction = "higher: looks one token ahead"
    paper = "Clark et al. 2019, What Does BERT Look At?, arXiv 1906.04341"
    kinds = frozenset({"encoder"})

    def of(self, rows: Rows) -> Tensor:
        return rows.on(rows.i + 1)

    def where(self, rows: Rows) -> Tensor:
        return rows.counted & (rows.i < rows.view.keys - 1)


@register
class OwnToken(RowMean):
    """mean_i w_{ii} over the counted rows."""

    name = "own_token"
    title = "attention to the token itself"
    meaning = "mean attention of a token to itself"
    unit = "share"
    direction = "higher: looks at its own token"
    paper = "Clark et al. 2019, What Does BERT Look At?, arXiv 1906.04341"

    def of(self, rows: Rows) -> Tensor:
        return rows.on(rows.i)


@register
class WindowMass(RowMean):
    """mean_i sum_{j: |i-j| <= width} w_ij over the counted rows."""

    name = "window"
    title = "attention nearby"
    meaning = "mean attention to tokens at a distance of at most {width}"
    unit = "share"
    direction = "higher: stays nearby"
    paper = "Xiao et al. 2024, DuoAttention (streaming heads), arXiv 2410.10819"

    width: int = 64

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ConfigError(f"width must be at least 0, got {self.width}")

    def of(self, rows: Rows) -> Tensor:
        columns, difference = rows.band(-self.width, self.width)
        return rows.weighed(difference.abs() <= self.width, rows.weights[..., columns])


@register
class MeanDistance(RowMean):
    """mean_i (sum_j w_ij |i-j|) / (sum_j w_ij) over the counted rows."""

    name = "distance"
    title = "mean distance"
    meaning = "mean distance |i - j| to the tokens looked at, weighted by attention"
    unit = "tokens"
    direction = "higher: looks further away"
    paper = "Vig and Belinkov 2019, arXiv 1906.04284; the span of arXiv 2510.13554"

    def of(self, rows: Rows) -> Tensor:
        return rows.weighed(rows.difference.abs()) / rows.total

    def where(self, rows: Rows) -> Tensor:
        return rows.counted & (rows.total > 0)
