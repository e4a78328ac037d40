"""Measurements of how sharply a head looks."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.heads.measurement import EVERYWHERE, Gauge, Measurement, RowMean, register
from polyhead.heads.rows import Rows, View

__all__ = ["Entropy", "LargestLogit", "NormalizedEntropy"]


@register
class Entropy(RowMean):
    """mean_i H_i with H_i = -sum_j p_ij log p_ij, p_ij = w_ij / sum_k w_ik, in [0, log S] nats."""

    name = "entropy"
    title = "entropy"
    meaning = "mean entropy of a token's attention"
    unit = "nats"
    direction = "higher: spreads its attention"
    paper = "Clark et al. 2019, What Does BERT Look At?, arXiv 1906.04341"
    kinds = EVERYWHERE

    def of(self, rows: Rows) -> Tensor:
        return rows.entropy


@register
class NormalizedEntropy(RowMean):
    """mean_i H_i / log n_i with n_i the number of keys that row i may look at, in [0, 1]."""

    name = "normalized_entropy"
    title = "normalised entropy"
    meaning = "mean entropy of a token's attention, divided by that of looking at all it may see alike"
    unit = "share"
    direction = "higher: closer to looking at everything alike"
    paper = "Clark et al. 2019, What Does BERT Look At?, arXiv 1906.04341"
    kinds = EVERYWHERE

    def of(self, rows: Rows) -> Tensor:
        return rows.entropy / rows.keys.clamp(min=2).to(rows.entropy.dtype).log()


@register
class LargestLogit(Measurement):
    """max_ij s_ij over the counted rows and the keys they may look at, s after the score maps."""

    name = "largest_logit"
    title = "largest logit"
    meaning = "the largest attention logit, scale and score maps included"
    direction = "higher: closer to overflow in low precision"
    paper = "Dehghani et al. 2023, Scaling Vision Transformers to 22 Billion Parameters, arXiv 2302.05442"
    kinds = EVERYWHERE

    def gauge(self, heads: int) -> Gauge:
        return _Largest(heads)


class _Largest:
    needs_logits = True

    def __init__(self, heads: int) -> None:
        self.most = torch.full((heads,), float("-inf"), dtype=torch.float64)

    def begin(self, view: View) -> None:
        self.most = self.most.to(view.device)

    def take(self, rows: Rows) -> None:
        assert rows.logits is not None
        heads = rows.tile.head_slice
        most = torch.where(rows.counted, rows.logits.amax(-1), float("-inf")).amax((0, 2))
        self.most[heads] = torch.maximum(self.most[heads], most.double())

    def end(self, output: Tensor) -> None:
        pass

    def result(self) -> Tensor:
        return torch.where(self.most == float("-inf"), torch.nan, self.most)
