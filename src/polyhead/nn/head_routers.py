"""Routers among the heads of an attention module: by learned scores, or by the lengths of the queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyhead.attend.precision import wide
from polyhead.nn.routing import Choice, Router, RouterLinear, load_balance, top_k

__all__ = ["LearnedRouter", "QueryNormRouter"]


class _HeadRouter(Router):
    """The first `shared` heads are active for every token, and `k` of the others.

    Args:
        heads: number of heads H.
        shared: heads that are always active.
        k: active heads among the others.
        balance: weight of the loss that keeps the load of the others even.
    """

    def __init__(self, heads: int, shared: int, k: int, balance: float) -> None:
        super().__init__()
        self.shared_heads, self.routed_heads, self.k, self.balance = shared, heads - shared, k, balance
        self.always = heads if k == self.routed_heads else shared
        self.per_token = shared + k

    def losses(self, choice: Choice, real: Tensor | None) -> dict[str, Tensor]:
        if not self.routed_heads:
            return {}
        chosen = choice.active[..., self.shared_heads :]
        return {"balance": self.balance * load_balance(choice.scores, chosen, real)}

    def extra_repr(self) -> str:
        return f"shared_heads={self.shared_heads}, routed_heads={self.routed_heads}, k={self.k}"


class LearnedRouter(_HeadRouter):
    """Gates from linear scores of the token, Hs shared heads and R routed ones of which k are active.

        s = softmax(W_s x);   r = softmax(W_r x),  r' = r on its k largest, divided by their sum
        α = softmax(W_h x) ∈ R²
        g_shared = 2 α_1 · Hs · s;   g_routed = 2 α_2 · k · r'

    The mean gate of an active head is 1 where routers are uniform. Where there are no shared heads or no
    routed ones, 2 α is 1; a single shared head has s = 1.

    Args:
        dim: width of the inputs d.
        heads, shared, k, balance: see `_HeadRouter`.
        rescale: whether there are the factors 2, Hs and k.
        renormalise: whether r is divided by the sum over the k chosen.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shared: int,
        k: int,
        *,
        balance: float,
        rescale: bool = True,
        renormalise: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(heads, shared, k, balance)
        self.rescale, self.renormalise = rescale, renormalise

        def scores(outputs: int, needed: bool) -> RouterLinear | None:
            return RouterLinear(dim, outputs, bias=False, device=device, dtype=dtype) if needed else None

        self.shared = scores(shared, shared > 1)
        self.routed = scores(self.routed_heads, self.routed_heads > 0)
        self.split = scores(2, shared > 0 and self.routed_heads > 0)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Choice:
        ones = torch.ones(*x.shape[:2], self.shared_heads, dtype=wide(x.dtype), device=x.device)
        shared = ones if self.shared is None else self.shared(x).softmax(-1)
        gates, active = shared * self.shared_heads if self.rescale else shared, ones.bool()
        scores = ones[..., :0]
        if self.routed is not None:
            logits = self.routed(x)
            scores, chosen = logits.softmax(-1), top_k(logits, self.k)
            routed = scores * chosen
            if self.renormalise:
                routed = routed / routed.sum(-1, keepdim=True)
            if self.rescale:
                routed = routed * self.k
            if self.split is not None:
                parts = self.split(x).softmax(-1) * (2 if self.rescale else 1)
                gates, routed = gates * parts[..., :1], routed * parts[..., 1:]
            gates, active = torch.cat([gates, routed], -1), torch.cat([active, chosen], -1)
        return Choice(gates, active, scores)

    def flops(self, tokens: int) -> int:
        maps = (self.shared, self.routed, self.split)
        return sum(2 * tokens * m.in_features * m.out_features for m in maps if m is not None)


class QueryNormRouter(_HeadRouter):
    """The routed heads whose queries are longest are active; no parameters, and every gate is 0 or 1.

        r = softmax(n / std(n)) with n_h = ||q_h||, before any rotation;   active: the k largest

    In training the gates of active heads pass their gradient on to r as if they were r (a straight-through
    estimator). Heads that are not active are not computed and pass none on.

    Args:
        heads, shared, k, balance: see `_HeadRouter`.
    """

    reads_queries = True

    def __init__(self, heads: int, shared: int, k: int, *, balance: float) -> None:
        super().__init__(heads, shared, k, balance)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Choice:
        assert queries is not None
        lengths = queries[:, self.shared_heads :].to(wide(queries.dtype)).norm(dim=-1).transpose(1, 2)
        ones = torch.ones(*x.shape[:2], self.shared_heads, dtype=lengths.dtype, device=x.device)
        if not self.routed_heads:
            return Choice(ones, ones.bool(), ones[..., :0])
        spread = (lengths - lengths.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
        scores = (lengths * (spread + 1e-12).rsqrt()).softmax(-1)
        chosen = top_k(lengths, self.k)
        gates = chosen.to(scores.dtype)
        if self.training:
            gates = gates + (scores - scores.detach()) * chosen
        return Choice(torch.cat([ones, gates], -1), torch.cat([ones.bool(), chosen], -1), scores)
