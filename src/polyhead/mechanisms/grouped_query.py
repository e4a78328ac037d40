"""Grouped-query attention: G key/value heads, each read by H/G consecutive query heads.

    head_h = softmax(q_h k_gᵀ / √D) v_g  with g = h // (H/G),   y = concat_h(head_h) W_O

q: (B, H, L, D); k, v: (B, G, S, D). G = H is multi-head attention, G = 1 multi-query attention.

Cost: 2·d·D·(H + G) parameters; score FLOPs as with G = H; 2·G·D numbers of cache per token.

Paper 074: GQA, Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints,
arXiv 2305.13245. Its recipe for converting checkpoints is not part of the mechanism. The paper has no
default for G; here it is the largest divisor of H that is at most H/4.
"""

from __future__ import annotations

from typing import Any

from polyhead.mechanisms.config import AttentionConfig, key_value_heads, largest_divisor
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.projections import at_least_one

__all__ = ["GroupedQuery"]


@register(
    "grouped_query",
    aliases=("gqa",),
    paper="074",
    title="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
    family="sharing",
    summary="groups of query heads share one key/value head",
    equation="head_h = softmax(q_h k_gᵀ / √D) v_g,  g = h // (H/G);  y = concat_h(head_h) W_O",
)
class GroupedQuery(AttentionConfig):
    """Grouped-query attention with `kv_heads` key/value heads, a divisor of `heads`."""

    kv_heads: int | None = None

    def __post_init__(self) -> None:
        at_least_one("GroupedQuery", dim=self.dim, heads=self.heads)
        kv_heads = largest_divisor(self.heads, self.heads // 4) if self.kv_heads is None else self.kv_heads
        object.__setattr__(self, "kv_heads", key_value_heads("GroupedQuery", self.heads, kv_heads))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        return self.assemble(heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype)
