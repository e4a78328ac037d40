"""Top-k softmax: of every row the k largest logits keep a weight, all others get exactly 0.

    t_i = the k-th largest s_ij,   w_ij = exp(s_ij) [s_ij ≥ t_i] / Σ over j' with s_ij' ≥ t_i of exp(s_ij')

Logits equal to the k-th largest stay together, so that the order of the keys decides nothing; rows that see k
keys or fewer are plain softmax. Softmax's backward serves as it is: what was dropped has weight 0.

How t is found: columns in groups of four, strided. The k groups with the largest maxima hold all logits above
the k-th largest maximum, and k that are not below it, hence the k-th largest of all is the k-th largest of
theirs: two small selections in place of a large one.

Zhao et al., "Explicit Sparse Transformer", arXiv 1912.11637.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.attend.normalizers import Normalizer, softmax
from polyhead.attend.precision import wide
from polyhead.checks import whole

__all__ = ["TopK", "kth_largest", "top_k"]

_GROUP = 4
_MANY = 16  # rows of as many times k columns are selected from by groups: measured best
_SOFTMAX = softmax()


def kth_largest(rows: Tensor, k: int) -> Tensor:
    """The k-th largest of every row `(..., n)`, k ≤ n, as `(..., 1)`."""
    columns = rows.shape[-1]
    if columns >= _MANY * k:
        groups = columns // _GROUP
        inside, left = rows[..., : groups * _GROUP], rows[..., groups * _GROUP :]
        inside = inside.unflatten(-1, (_GROUP, groups))
        best = inside.amax(-2).topk(k, sorted=False).indices.unsqueeze(-2)
        found = inside.gather(-1, best.expand(*inside.shape[:-1], k)).flatten(-2)
        rows = torch.cat([found, left], dim=-1) if left.shape[-1] else found
    return rows.topk(k, sorted=False).values.amin(-1, keepdim=True)


class TopK(Normalizer):
    """Softmax over the `k` largest logits of a row. See `top_k`."""

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole("k", self.k, 1))

    def weights(self, scores: Tensor) -> Tensor:
        if scores.shape[-1] <= self.k or scores.numel() == 0:
            return _SOFTMAX.weights(scores)
        rows = scores.to(wide(scores.dtype))
        kind = torch.finfo(rows.dtype)
        # finite also where fewer than k are visible: so far below the largest every weight is 0 anyway
        least = rows.amax(-1, keepdim=True).add_(2 * math.log(kind.tiny))
        least = torch.maximum(kth_largest(rows, self.k), least)
        # the k-th largest itself is 0 now, and stays
        rows = torch.threshold_(rows.sub_(least), -kind.tiny, -math.inf)
        return _SOFTMAX.weights(rows).to(scores.dtype)

    def vjp(self, weights: Tensor, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _SOFTMAX.vjp(weights, grad)


def top_k(k: int) -> TopK:
    """Softmax over the k largest logits of a row, weights of exactly 0 for all others.

    Args:
        k: how many, at least 1; logits equal to the k-th largest are kept too. Rows of k keys or fewer are
            those of `softmax()`. Memory is O(L); of a key that is dropped the weight is not differentiated.
    """
    return TopK(k)
