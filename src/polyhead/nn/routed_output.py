"""The output projection where some heads serve every token, and others the tokens that chose them."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from polyhead.nn.projections import OutputProjection

__all__ = ["Mixed", "RoutedOutput"]


class Mixed(NamedTuple):
    """What heads of all tokens give `(B, n, L, Dv)`, and what the others add to the output `(B, L, d)`."""

    always: Tensor | None
    chosen: Tensor | None


class RoutedOutput(OutputProjection):
    """The output projection over the heads that every token has; what the others contribute is added."""

    def forward(self, heads: Mixed) -> Tensor:  # type: ignore[override]
        always, chosen = heads
        if always is None:
            assert chosen is not None
            return chosen if self.bias is None else chosen + self.bias.to(chosen.dtype)
        flat = always.transpose(1, 2).flatten(2)
        y = F.linear(flat, self.weight[:, : flat.shape[-1]], self.bias)
        return y if chosen is None else y + chosen
