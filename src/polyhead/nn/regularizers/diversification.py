"""Attention diversification: tokens pay for looking where the average token looks.

    Ā = mean of the heads' weights (L × S),   s = mean of the rows of Ā,   t = threshold / S
    loss = weight · mean_i cos(s ⊙ 1[s > t], Ā_i ⊙ 1[Ā_i > t])

The gates are constants to the gradient, and a vector without an entry above t has the cosine 0. It stands for
the mean cosine of all pairs of rows, in O(L·S) operations instead of O(L²·S). All weights are held for it, in
training only: O(H·L·S) memory.

With threshold ≥ 1, rows of uniform weights have no entry above t and cost nothing: the loss pushes away from
a few tokens that all look at, towards looking at everything.

Paper 126: Robustifying Token Attention for Vision Transformers, arXiv 2303.11126. It takes the mean over the
layers: give `weight=1 / layers`. Ours: with padding, S is the number of real keys and the means run over real
queries.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from polyhead.checks import number
from polyhead.nn.regularizers.base import Regularizer

__all__ = ["AttentionDiversification", "attention_diversification"]


class AttentionDiversification(Regularizer):
    """The loss "diversification" for `auxiliary_losses`: tokens pay for looking where the average one looks.

        loss = weight · mean_i cos(s ⊙ 1[s > t], Ā_i ⊙ 1[Ā_i > t]),   t = threshold / S

    with Ā the heads' mean weights `(L, S)` and s the mean of its rows: paper 126, arXiv 2303.11126.

    Attributes:
        threshold: weights up to `threshold` / S do not count, at least 0. Default 2.
        weight: factor of the loss, at least 0. Default 1.

    Raises:
        ConfigError: a value is not allowed.
    """

    threshold: float = 2.0
    weight: float = 1.0

    reads_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("threshold", "weight"):
            value = number(f"attention_diversification: {name}", getattr(self, name), least=0)
            object.__setattr__(self, name, value)

    def losses(
        self,
        weights: Float[Tensor, "B H L S"],
        *,
        queries: Bool[Tensor, "B L"] | None = None,
        keys: Bool[Tensor, "B S"] | None = None,
    ) -> dict[str, Tensor]:
        batch, _, length, count = weights.shape
        rows = weights.new_ones(batch, length) if queries is None else queries.to(weights.dtype)
        each = weights.mean(1)  # B L S
        average = (rows[:, None] @ each).squeeze(1) / rows.sum(1, keepdim=True).clamp(min=1)  # B S
        seen = weights.new_full((batch, 1), count) if keys is None else keys.sum(1, keepdim=True)
        least = self.threshold / seen.clamp(min=1)
        zero = torch.zeros((), dtype=weights.dtype, device=weights.device)
        each = torch.where(each > least[..., None], each, zero)
        average = torch.where(average > least, average, zero)
        alike = F.cosine_similarity(average[:, None], each, dim=-1)  # B L
        return {"diversification": self.weight * (alike * rows).sum() / rows.sum().clamp(min=1)}


def attention_diversification(threshold: float = 2.0, *, weight: float = 1.0) -> AttentionDiversification:
    """Penalise weights that look where the average token looks.

    Args:
        threshold: weights up to `threshold` / S do not count.
        weight: factor of the loss.
    """
    return AttentionDiversification(threshold, weight)
