"""Attention whose weights are the second Taylor polynomial of the exponential.

    s_ij = q_i·k_j / √D,   w_ij = (1 + s_ij + s_ij²/2) / Σ_j (1 + s_ij + s_ij²/2),   head = Σ_j w_ij v_j

One of the paper's probes of what attention needs: the form of the softmax goes, all else stays. For small
logits it is softmax, to |s|³/6; no weight is zero, and none dominates as an exponential can.

Cost: as grouped-query attention, with the keys and values as cache. The polynomial is φ(q)·φ(k) with
φ(x) = [1, x, x⊗x/√2], so that a recurrence over a state of (1 + D + D²)·Dv numbers a head would give the same
under a causal mask; here every mask is allowed, and pairs are scored.

Paper 010: Deconstructing Attention, Investigating Design Principles for Effective Language Modeling, arXiv
2510.11602, the approximate variant. Grouped key/value heads are ours; the default has none.
"""

from __future__ import annotations

from typing import Any

from polyhead.attend.scores import chain
from polyhead.attend.scores.taylor import log_taylor
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention

__all__ = ["Taylor2"]


@register(
    "taylor2",
    paper="010",
    title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    family="ablation",
    summary="weights by the second Taylor polynomial of the exponential",
    equation="w_ij = (1 + s + s²/2) / Σ_j (1 + s + s²/2),  s = q_i·k_j / √D;  y = concat_h(Σ_j w_ij v_j) W_O",
    facets=Facets(alignment="kernel", distribution="other"),
)
class Taylor2(GroupedConfig):
    """Taylor attention. Maps of `score` come before the polynomial."""

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""

        def module(*parts: Any, score: Any, **options: Any) -> MultiHeadAttention:
            own = chain(score)
            maps = (log_taylor(),) if own is None else (own, log_taylor())
            return MultiHeadAttention(*parts, score=maps, **options)

        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
