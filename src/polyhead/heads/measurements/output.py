"""A measurement of how much a head adds to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyhead.heads.measurement import EVERYWHERE, Gauge, Measurement, register
from polyhead.heads.rows import Rows, View

__all__ = ["OutputShare"]


@register
class OutputShare(Measurement):
    """mean_i ||W_h o_ih|| / sum_g ||W_g o_ig||: o_ih the head's output, W_h its part of W_O.

    Where a layer's output projection W_O is not found, with ||o_ih|| in place of ||W_h o_ih||.
    """

    name = "output_share"
    title = "share of the layer's output"
    meaning = "norm of what the head adds to the residual stream, over the sum for its layer"
    unit = "share"
    direction = "higher: weighs more in its layer"
    paper = "Kobayashi et al. 2020, Attention is Not Only a Weight, arXiv 2004.10102"
    kinds = EVERYWHERE

    def gauge(self, heads: int) -> Gauge:
        return _Output(heads)

    def describe(self, gauges: Sequence[Gauge] = ()) -> str:
        without = sum(isinstance(g, _Output) and g.projected is False for g in gauges)
        if not without:
            return self.meaning
        some = "no" if without == len(gauges) else "for some layers no"
        return f"{self.meaning} ({some} output projection was found: norms of the outputs before it)"


class _Output:
    needs_logits = False

    def __init__(self, heads: int) -> None:
        self.sum = torch.zeros(heads, dtype=torch.float64)
        self.count = torch.zeros(heads, dtype=torch.float64)
        self.projected: bool | None = None

    def begin(self, view: View) -> None:
        self.view = view
        self.sum, self.count = self.sum.to(view.device), self.count.to(view.device)
        self.projected = view.projection is not None

    def take(self, rows: Rows) -> None:
        pass

    def end(self, output: Tensor) -> None:
        projection = self.view.projection
        wide = torch.float64 if output.dtype == torch.float64 else torch.float32
        output = output.to(wide)
        if projection is None:
            norms = output.norm(dim=-1)
        else:
            # |W o|^2 = o G o with G = W'W, which is as small as the head
            gram = torch.stack([w.to(wide) @ w.to(wide).T for w in projection])
            norms = torch.einsum("bhld,hde,bhle->bhl", output, gram, output).clamp_(min=0).sqrt_()
        total = norms.sum(1, keepdim=True)
        where = self.view.visible.counted & (total > 0)
        share = torch.where(where, norms / total, 0.0)
        self.sum += share.sum((0, 2), dtype=torch.float64)
        self.count += where.expand(share.shape).sum((0, 2))

    def result(self) -> Tensor:
        return self.sum / self.count
