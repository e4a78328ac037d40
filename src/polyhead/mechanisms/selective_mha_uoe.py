"""Selective multi-head attention of Union of Experts: a head attends among the tokens that chose it.

    p_t = softmax(W_g x_t + b);   m_ti = 1 for the k most probable of N slices;   S_i = {t : m_ti = 1}
    y_t = Σ over i with m_ti = 1 of g_ti softmax(q_ti K_iᵀ / √D) V_i W_Oi,   K_i, V_i of the tokens in S_i

A slice is one head with its keys and values, or with `kv_heads` = N < H a key/value head and the H/N query
heads that read it. All slices of all tokens are multi-head attention, and each is computed, as a short
sequence, for the tokens that chose it: it is the multi-head attention in whose slice i row t may see column
s where m_ti = m_si = 1, and is zero where m_ti = 0.

Gates: g = N p with `gate="weigh"`, so that the task trains the router; 1 with `gate="select"`, as in the
published code, where the task does not reach the router. With k = N and "select" this is `grouped_query`.

q: (B, k·R, L, D) with R = H / N, k and v: (B, k, L, ·), those of each token's own slices. Cost: parameters of
grouped-query attention and (d + 1)·N; k/N of its projections; (k/N)² of its scores and values where the load
is even, which is the least; a cache of k·(D + Dv) numbers and N bits a token.

In training `auxiliary_losses` has "balance" where its weight is not zero: β N Σ_i f_i P_i / k, f_i the share
of tokens that chose i and P_i the mean of p_i, 1 when even. Padding chooses nothing and does not count.

Paper 192: Union of Experts, arXiv 2503.02495. Our reading: the causal form. A token's choice depends on that
token alone: the published code also divides by sums over the batch and fills short slices up with tokens
that did not choose them. Positions are those in the sequence, where the code counts within a slice. Of
equally probable slices the first are chosen. Half of the slices are chosen by default; without a loss for
balance, as there. Choosing slices per sequence from its flattened input, which fixes its length, and the
MLP in slices (UoME) are left out.
"""

from __future__ import annotations

from typing import Any

from polyhead.checks import number, whole
from polyhead.errors import unknown_name
from polyhead.mechanisms.config import AttentionConfig, key_value_heads, without_context
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.routed_output import RoutedOutput
from polyhead.nn.selected_heads import SelectedHeads
from polyhead.nn.slice_router import SliceRouter

__all__ = ["SelectiveMultiHead"]


@register(
    "selective_mha_uoe",
    aliases=("smha",),
    paper="192",
    title=("Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer"),
    family="routing",
    summary="a head attends among the tokens that chose it, as a short sequence, and keeps only theirs",
    equation=(
        "m_t = top-k of p_t = softmax(W_g x_t + b);  y_t = Σ_{i: m_ti=1} g_ti softmax(q_ti K_iᵀ / √D) V_i "
        "W_Oi, K_i and V_i of the tokens s with m_si = 1;  g = N p, or 1"
    ),
    supports=frozenset({"self", "causal_self"}),
    graph_breaks=1,
    facets=Facets(positions="hard"),
    promises=Promises(routed=True),
)
class SelectiveMultiHead(AttentionConfig):
    """Selective multi-head attention.

    Attributes:
        kv_heads: N, the slices, a divisor of `heads`; default `heads`.
        top_k: k, slices that a token chooses; default N/2, at least 1.
        gate: "weigh": a slice counts N times its probability; "select": 1.
        balance: β, weight of the load-balance loss.
    """

    kv_heads: int | None = None
    top_k: int | None = None
    gate: str = "weigh"
    balance: float = 0.0

    def __post_init__(self) -> None:
        slices = key_value_heads("SelectiveMultiHead", self.heads, self.kv_heads)
        without_context(self)
        if not isinstance(self.gate, str) or self.gate not in ("weigh", "select"):
            raise unknown_name("gate", self.gate, ("weigh", "select"))
        k = max(1, slices // 2) if self.top_k is None else self.top_k
        for name, value in (
            ("kv_heads", slices),
            ("top_k", whole(f"top_k (of {slices} slices)", k, 1, slices)),
            ("balance", number("balance", self.balance, least=0)),
        ):
            object.__setattr__(self, name, value)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> SelectedHeads:
        """The module."""
        assert self.kv_heads is not None
        assert self.top_k is not None
        router = SliceRouter(
            self.dim,
            self.kv_heads,
            self.top_k,
            heads=self.heads // self.kv_heads,
            weigh=self.gate == "weigh",
            balance=self.balance,
            device=device,
            dtype=dtype,
        )

        def module(*parts: Any, **options: Any) -> SelectedHeads:
            return SelectedHeads(*parts, router=router, **options)

        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            output=RoutedOutput,
            module=module,
        )
