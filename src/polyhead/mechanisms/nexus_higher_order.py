"""Higher-order attention (Nexus): queries and keys first attend among themselves.

    q_h^(1) = x W_Qh,  k_g^(1) = x W_Kg,  v_g = x W_Vg,   g = h // (H/G)
    q^(n) = softmax(q^(n-1) q^(n-1)ᵀ / √D) q^(n-1),   k^(n) likewise, for n = 2..m, under the mask of the call
    head_h = softmax(q_h^(m) k_g^(m)ᵀ / √D) v_g,   y = concat_h(head_h) W_O

Order m = 1 is grouped-query attention, m = 2 the paper's model. With `gated`, an addition of ours for models
that are trained already, q^(n) = q^(n-1) + γ (softmax(...) q^(n-1) - q^(n-1)), γ = 0 at the start.

Cost: no parameters more (2·(m - 1) with gates); scores and values of m - 1 further attentions of H + G heads;
a cache of the queries and keys of every order, (m - 1)·H·D + m·G·D + G·Dv numbers a token. Memory is O(L).

Paper 089: Nexus, Higher-Order Attention Mechanisms in Transformers, arXiv 2512.03377. Our reading: the inner
attentions share the projections of the outer one ("QK-shared"); a position encoding turns q^(1) and k^(1)
once, so that all orders see relative positions; biases, maps and normaliser are those of the outer
attention, the inner ones are a plain softmax.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import flag, whole
from polyhead.mechanisms.config import GroupedConfig, without_context
from polyhead.mechanisms.registry import register
from polyhead.nn.higher_order import HigherOrderAttention

__all__ = ["NexusHigherOrder"]


@register(
    "nexus_higher_order",
    aliases=("nexus",),
    paper="089",
    title="Nexus: Higher-Order Attention Mechanisms in Transformers",
    family="interaction",
    summary="queries and keys are what attention among queries and among keys gives, to any order",
    equation="q' = softmax(q qᵀ / √D) q;  k' = softmax(k kᵀ / √D) k;  head = softmax(q' k'ᵀ / √D) v",
    supports=frozenset({"self", "causal_self"}),
)
class NexusHigherOrder(GroupedConfig):
    """Higher-order attention.

    Attributes:
        order: m.
        gated: scale what the inner attentions change, by numbers that start at 0.
    """

    order: int = 2
    gated: bool = False

    def __post_init__(self) -> None:
        without_context(self)
        object.__setattr__(self, "order", whole("order", self.order, 1, 64))
        flag("gated", self.gated)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> HigherOrderAttention:
        """The module."""
        module = partial(HigherOrderAttention, order=self.order, gated=self.gated)
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
