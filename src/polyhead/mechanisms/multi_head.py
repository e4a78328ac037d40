"""Multi-head attention, the mechanism that all others change.

    head_h = softmax(x W_Qh (c W_Kh)ᵀ / √D) c W_Vh,   y = concat_h(head_h) W_O

with c the context, or x itself; W_Qh, W_Kh, W_Vh: (d, D), W_O: (H·D, d), D = d/H by default.

Cost for L queries and S keys: 4·d² parameters; 2·L·S·d FLOPs for the scores and as many for the values;
2·H·D numbers of cache per token.

Paper: Attention Is All You Need, arXiv 1706.03762.
"""

from __future__ import annotations

from typing import Any

from polyhead.mechanisms.config import AttentionConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention

__all__ = ["MultiHead"]


@register(
    "mha",
    aliases=("multi_head",),
    title="Attention Is All You Need",
    family="plain",
    summary="every head has queries, keys and values of its own",
    equation="head_h = softmax(q_h k_hᵀ / √D) v_h;  y = concat_h(head_h) W_O",
)
class MultiHead(AttentionConfig):
    """Multi-head attention: `heads` heads of width `head_dim`, each with its own keys and values."""

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        return self.assemble(heads=self.heads, kv_heads=self.heads, device=device, dtype=dtype)
