"""A router among experts: top-k of a softmax over linear scores, with the losses of its papers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polyhead.nn.routing import Choice, Router, RouterLinear, load_balance, top_k

__all__ = ["ExpertRouter", "weights_of_chosen"]


def weights_of_chosen(scores: Tensor, chosen: Tensor, renormalise: str | None, training: bool) -> Tensor:
    """Weights of chosen experts, zero for the others: their scores, or these divided by their sum.

    Args:
        scores: probabilities `(..., E)`.
        chosen: bool `(..., E)`.
        renormalise: "full"; "detach": in training no gradient flows through the sum; None: no division.
        training: whether this is training.
    """
    weights = scores * chosen
    if renormalise is None:
        return weights
    total = weights.sum(-1, keepdim=True)
    return weights / (total.detach() if training and renormalise == "detach" else total)


class ExpertRouter(Router):
    """Every token chooses k of E attention experts.

        p = softmax(W_g x);   w_i = p_i / Σ_{j chosen} p_j for the k largest, else 0

    Expert i is the query heads i, E + i, 2E + i, ..., one for each key/value head. W_g starts at zero.

    Args:
        dim: width of the inputs d.
        experts: number of experts E.
        k: experts that a token chooses.
        heads: query heads of an expert.
        renormalise: see `weights_of_chosen`.
        balance: weight of E Σ_i f_i P_i with f the shares of all choices and P the mean of p; 1 when even.
        z: weight of the mean square of logsumexp(W_g x), which keeps scores small.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int,
        *,
        heads: int = 1,
        renormalise: str | None = "detach",
        balance: float = 0.01,
        z: float = 0.001,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.experts, self.k, self.heads, self.renormalise = experts, k, heads, renormalise
        self.balance, self.z = balance, z
        self.always = heads * experts if k == experts else 0
        self.per_token = heads * k
        self.gate = RouterLinear(dim, experts, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Choice:
        logits = self.gate(x)
        chosen = top_k(logits, self.k)
        weights = weights_of_chosen(logits.softmax(-1), chosen, self.renormalise, self.training)
        return Choice(weights.repeat(1, 1, self.heads), chosen.repeat(1, 1, self.heads), logits)

    def losses(self, choice: Choice, real: Tensor | None) -> dict[str, Tensor]:
        logits, chosen = choice.scores, choice.active[..., : self.experts]
        balance = load_balance(logits.softmax(-1), chosen, real) / self.k
        squares = logits.logsumexp(-1).square()
        counts = torch.ones_like(squares) if real is None else real.to(squares.dtype)
        z = (squares * counts).sum() / counts.sum().clamp(min=1.0)
        return {"balance": self.balance * balance, "z": self.z * z}

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.gate.in_features * self.experts

    def extra_repr(self) -> str:
        return f"experts={self.experts}, k={self.k}, heads={self.heads}, renormalise={self.renormalise!r}"
