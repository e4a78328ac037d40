"""Measurements of what is looked at: sinks, and how attention gathers on few tokens.

With R_j the attention that key j receives, the mean of w_ij over the counted rows i that may look at j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.heads.measurement import Gauge, Measurement, RowMean, register
from polyhead.heads.rows import Rows, View

__all__ = [
    "Concentration",
    "FirstToken",
    "FoundSinks",
    "FutureInfluence",
    "ReceivedGauge",
    "SinkGauge",
    "gini",
]


@register
class FirstToken(RowMean):
    """mean_i w_{i,f} over the counted rows i > f, with f the first real token of the sequence."""

    name = "sink"
    title = "attention to the first token"
    meaning = "mean attention of a token to the first token"
    unit = "share"
    direction = "higher: rests on the first token"
    paper = "Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453"

    def of(self, rows: Rows) -> Tensor:
        return rows.on(rows.first)

    def where(self, rows: Rows) -> Tensor:
        return rows.counted & (rows.i > rows.first)


class ReceivedGauge:
    """Adds up the attention that every key receives, `(B, H, S)`, and reduces it when a call ends."""

    needs_logits = False

    def __init__(self, heads: int) -> None:
        self.sum = torch.zeros(heads, dtype=torch.float64)
        self.count = torch.zeros(heads, dtype=torch.float64)
        self.received: Tensor | None = None  # R in the first call, (B, H, S), NaN where nobody may look

    def begin(self, view: View) -> None:
        self.view = view
        self.sum, self.count = self.sum.to(view.device), self.count.to(view.device)
        self.total = view.zeros(view.batch, view.heads, view.keys)

    def take(self, rows: Rows) -> None:
        rows.add_to_keys(self.total, rows.received)

    def end(self, output: Tensor) -> None:
        visible = self.view.visible
        received = self.total / visible.watchers.double()
        value, weight = self.reduce(self.total, received, visible.watchers)
        self.received = received if self.received is None else self.received
        known = torch.isfinite(value)
        self.sum += torch.where(known, value * weight, 0.0).sum(0)
        self.count += torch.where(known, weight, 0.0).sum(0)
        self.total = self.total[..., :0]

    def reduce(self, total: Tensor, received: Tensor, watchers: Tensor) -> tuple[Tensor, Tensor]:
        """A value for each batch item and head, `(B, H)`, and its weight in the mean over items and calls."""
        raise NotImplementedError

    def result(self) -> Tensor:
        return self.sum / self.count


def _enough(watchers: Tensor, view: View, rows: int) -> Tensor:
    """Which keys so many rows may look at that their mean says something: `rows` of them, or half of all."""
    half = view.visible.counted.sum(-1, keepdim=True) // 2
    return watchers >= half.clamp(min=1, max=rows)


@register
class FoundSinks(Measurement):
    """mean_i sum_{j in sinks} w_ij over the counted rows.

    A key is a sink of the layer when at least `rows` counted rows (or half of all, if that is fewer) may
    look at it and, in some head of the layer, R_j >= `threshold`. Sinks are thus found from the attention
    itself, in the same walk, in each batch item.
    """

    name = "found_sinks"
    title = "attention to sink tokens"
    meaning = (
        "mean attention of a token to the layer's sinks: the tokens that receive at least {threshold} on "
        "average in some head of the layer"
    )
    unit = "share"
    direction = "higher: rests on tokens that draw attention whatever they say"
    paper = "Gu et al. 2024, When Attention Sink Emerges in Language Models, arXiv 2410.10781 (threshold 0.3)"

    threshold: float = 0.3
    rows: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold must be above 0 and at most 1, got {self.threshold}")
        if self.rows < 1:
            raise ConfigError(f"rows must be at least 1, got {self.rows}")

    def gauge(self, heads: int) -> Gauge:
        return SinkGauge(self, heads)


class SinkGauge(ReceivedGauge):
    """Finds the sinks of a layer when a call ends, and the attention that goes to them."""

    def __init__(self, measurement: FoundSinks, heads: int) -> None:
        super().__init__(heads)
        self.measurement = measurement
        self.sinks: list[list[int]] | None = None  # of each batch item in the first call

    def reduce(self, total: Tensor, received: Tensor, watchers: Tensor) -> tuple[Tensor, Tensor]:
        enough = _enough(watchers, self.view, self.measurement.rows)
        sink = (enough & (received >= self.measurement.threshold)).any(1)
        if self.sinks is None:
            self.sinks = [item.nonzero().flatten().tolist() for item in sink]
        rows = self.view.visible.counted.sum(-1).double().expand(received.shape[:2])
        return (total * sink[:, None]).sum(-1) / rows, rows


@register
class Concentration(Measurement):
    """Gini coefficient of R over the keys that at least `rows` counted rows (or half of all) may look at.

    With R sorted upwards, G = sum_k (2k - n - 1) R_(k) / (n sum_k R_k), k = 1..n: 0 when all keys receive
    alike, 1 - 1/n when one receives everything. The mean over texts, not weighted.
    """

    name = "concentration"
    title = "concentration of what is looked at"
    meaning = "Gini coefficient of the mean attention that tokens receive"
    direction = "higher: all tokens look at the same few"
    paper = "receiver heads as in arXiv 2510.13554, with the Gini coefficient for their kurtosis"

    rows: int = 64

    def gauge(self, heads: int) -> Gauge:
        return _Concentration(self, heads)


class _Concentration(ReceivedGauge):
    def __init__(self, measurement: Concentration, heads: int) -> None:
        super().__init__(heads)
        self.measurement = measurement

    def reduce(self, total: Tensor, received: Tensor, watchers: Tensor) -> tuple[Tensor, Tensor]:
        enough = _enough(watchers, self.view, self.measurement.rows).expand(received.shape)
        value = gini(received, enough)
        return value, torch.ones_like(value)


def gini(values: Tensor, where: Tensor) -> Tensor:
    """Gini coefficient over the last dimension of the `values` (none negative) that `where` takes."""
    n = where.sum(-1, keepdim=True).to(values.dtype)
    ordered = torch.where(where, values, torch.inf).sort(-1).values
    place = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=values.dtype)
    held = place <= n
    ordered = torch.where(held, ordered, 0.0)
    weighted = ((2 * place - n - 1) * ordered).sum(-1)
    return weighted / (n.squeeze(-1) * ordered.sum(-1))


@register
class FutureInfluence(Measurement):
    """mean over keys s of FAI_s = mean of w_ts over T(s), the counted rows t with s + low <= t <= s + high.

    FAI_s says how much the tokens some way after s still look at it; it is not defined where T(s) is empty.
    The per-token signal itself is `Profile.future_influence`; the paper averages it over its global heads:
    `Profile.anchors`.
    """

    name = "future_influence"
    title = "future influence"
    meaning = "mean attention that a token receives from each of the tokens {low} to {high} places after it"
    unit = "share"
    direction = "higher: looks back some way, past the nearest tokens"
    paper = "Attention Illuminates LLM Reasoning (FAI), arXiv 2510.13554"

    low: int = 10
    high: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ConfigError(f"low and high must satisfy 0 <= low <= high, got {self.low} and {self.high}")

    def gauge(self, heads: int) -> Gauge:
        return _Future(self, heads)


class _Future(ReceivedGauge):
    def __init__(self, measurement: FutureInfluence, heads: int) -> None:
        super().__init__(heads)
        self.low, self.high = measurement.low, measurement.high

    def take(self, rows: Rows) -> None:
        columns, difference = rows.band(self.low, self.high)
        inside = (difference >= self.low) & (difference <= self.high)
        weight = (inside & rows.counted.unsqueeze(-1)).to(rows.weights.dtype)
        found = (rows.weights[..., columns] * weight).sum(-2)
        rows.add_to_keys(self.total, found, columns)

    def end(self, output: Tensor) -> None:
        view = self.view
        counted = view.visible.counted.long()
        before = torch.nn.functional.pad(counted.cumsum(-1), (1, 0))  # counted rows before row r
        row = torch.arange(view.keys, device=view.device) - (view.keys - view.queries)  # the row of key s
        first, last = (row + self.low).clamp(0, view.queries), (row + self.high + 1).clamp(0, view.queries)
        watchers = before[..., last] - before[..., first]
        received = self.total / watchers.double()  # 0/0 is NaN: not defined
        known = watchers.expand(received.shape) > 0
        self.sum += torch.where(known, received, 0.0).sum((0, 2))
        self.count += known.sum((0, 2))
        self.received = received if self.received is None else self.received
        self.total = self.total[..., :0]
