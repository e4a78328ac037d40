"""Talking heads: the heads mix their logits before the softmax, and their weights after it.

    a_hij = q_hi · k_gj / √D,  l_hij = Σ_m P_hm a_mij,  w_hi = softmax_j(l_hi),  u_hij = Σ_m R_hm w_mij
    head_hi = Σ_j u_hij v_gj,   y = concat_h(head_h) W_O

P, R: (H, H), both the identity at the start, so that training begins as multi-head attention. g = h // (H/G).

Cost: 2·H² parameters more than grouped-query attention with G heads; 4·L·S·H² more FLOPs, as much as H/D of
its scores and values; the same cache. Memory is O(L): all heads of some rows are worked on together.

Talking-Heads Attention, arXiv 2003.02436. There the matrices need not be square: keys, softmax and values may
have different numbers of heads. Here there are H of each, the paper's standard case. It leaves open how the
matrices start, and where biases of the logits go: here before P. Masked
pairs stay masked: R mixes zeros there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import flag
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.talking import TalkingAttention

__all__ = ["TalkingHeads"]


@register(
    "talking_heads",
    aliases=("talking",),
    title="Talking-Heads Attention",
    family="interaction",
    summary="heads mix their logits before the softmax and their weights after it, by learned matrices",
    equation="l_ij = P a_ij;  w_hi = softmax_j(l_hij);  u_ij = R w_ij;  head_hi = Σ_j u_hij v_gj",
)
class TalkingHeads(GroupedConfig):
    """Talking-heads attention.

    Attributes:
        logits: mix the logits, by P.
        weights: mix the weights, by R.
    """

    logits: bool = True
    weights: bool = True

    def __post_init__(self) -> None:
        flag("logits", self.logits)
        flag("weights", self.weights)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> TalkingAttention:
        """The module."""
        module = partial(TalkingAttention, logits=self.logits, weights=self.weights)
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
