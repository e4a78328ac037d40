"""Choosing for every token: top-k of a router's scores, and the losses that keep the choice balanced."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.attend.precision import exact, wide
from polyhead.nn.projections import FanInLinear

__all__ = ["Choice", "Router", "RouterLinear", "load_balance", "top_k"]


class Choice(NamedTuple):
    """What a router says of every token.

    Attributes:
        gates: factor of every head's output `(B, L, H)`, in float32 or better; 0 where it is not active.
        active: bool `(B, L, H)`.
        scores: the scores `(B, L, n)` by which was chosen, for losses; a part of the heads, or all.
    """

    gates: Tensor
    active: Tensor
    scores: Tensor


class Router(nn.Module):
    """Chooses heads for every token, from that token alone.

    Attributes:
        always: so many heads, the first ones, are active for every token.
        per_token: number of heads that are active for a token.
        reads_queries: whether it reads the queries of all heads, which then have to be made.
    """

    acts_on = "heads"
    always: int
    per_token: int
    reads_queries: bool = False

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Choice:
        """Choose for inputs `(B, L, d)`, with `reads_queries` from queries `(B, H, L, D)` not yet turned."""
        raise NotImplementedError

    def losses(self, choice: Choice, real: Tensor | None) -> dict[str, Tensor]:
        """Auxiliary losses over the tokens that are `real` `(B, L)`, weighted, by name."""
        return {}

    def flops(self, tokens: int) -> int:
        """Operations for so many tokens."""
        return 0


class RouterLinear(FanInLinear):
    """A linear map that works in float32 or better, also under autocast.

    Two scores that are nearly equal keep their order in half precision, whatever the rest is computed in.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        with exact(x.device):
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Bool like `scores`, True at the k largest of the last axis; of equal ones at the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


def load_balance(scores: Tensor, chosen: Tensor, real: Tensor | None = None) -> Tensor:
    """n Σ_i f_i P_i, with f_i the share of tokens that chose i and P_i the mean of its probability.

    k where all n are chosen equally often by top-k, more where probable ones are chosen more often. Only P
    carries a gradient. Switch Transformers, arXiv 2101.03961.

    Args:
        scores: probabilities `(..., n)`.
        chosen: bool `(..., n)`.
        real: bool `(...)`, the tokens that count; None: all.
    """
    weight = torch.ones_like(scores[..., 0]) if real is None else real.to(scores.dtype)
    total = weight.sum().clamp(min=1.0)
    axes = tuple(range(scores.ndim - 1))
    share = (chosen * weight[..., None]).sum(axes) / total
    mean = (scores * weight[..., None]).sum(axes) / total
    return scores.shape[-1] * (share * mean).sum()
