"""Multi-query attention: all query heads read one key head and one value head.

    head_h = softmax(q_h kᵀ / √D) v,   y = concat_h(head_h) W_O

q: (B, H, L, D); k, v: (B, 1, S, D).

Cost: 2·d·D·(H + 1) parameters; score FLOPs as in multi-head attention; 2·D numbers of cache per token, H
times fewer, which is what makes decoding fast where reading the cache limits it.

Paper 059: Fast Transformer Decoding, One Write-Head is All You Need, arXiv 1911.02150. The paper's
pseudo-code has no 1/√D, which its initialisation takes up; here it is there, as in the field's libraries.
"""

from __future__ import annotations

from typing import Any

from polyhead.mechanisms.config import AttentionConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention

__all__ = ["MultiQuery"]


@register(
    "multi_query",
    aliases=("mqa",),
    paper="059",
    title="Fast Transformer Decoding: One Write-Head is All You Need",
    family="sharing",
    summary="all query heads share one key/value head",
    equation="head_h = softmax(q_h kᵀ / √D) v;  y = concat_h(head_h) W_O",
)
class MultiQuery(AttentionConfig):
    """Multi-query attention."""

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        return self.assemble(heads=self.heads, kv_heads=1, device=device, dtype=dtype)
