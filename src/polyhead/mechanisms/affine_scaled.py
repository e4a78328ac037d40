"""Affine-scaled attention: a query scales its row of weights, and what is then missing is spread evenly.

    P_hi = softmax_j(q_hi · k_gj / √D),   α_hi = σ(x_i W_h + b_h)
    A_hij = α_hi P_hij + (ᾱ_h - α_hi) / N_i   over the N_i keys that i sees,   head_hi = Σ_j A_hij v_gj

ᾱ_h, a moving average of the mean α over batches, is what every row sums to. Weights stretch away from the
uniform ones or shrink towards them, may be negative where α > ᾱ, and no token has to serve as a sink.

The second term is (ᾱ - α) times the mean of the values that i sees: running sums without a mask, under a
causal one and with padding, so that P is left to the fastest backend; other masks take the mean by attention
with equal logits, which costs as much as the values again.

Cost: parameters of grouped-query attention and d·H + H more, H numbers of state; 2·L·d·H more FLOPs; its
cache. A decoding step sums the values that it holds.

Paper 159: Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention, arXiv 2602.23057. Our
readings: α is a sigmoid of a linear map that starts at zero; ᾱ starts at 1/2, where α does, is updated before
it is used and over the queries that are no padding, and stays as it is in evaluation; N is the number of
visible keys, so that no masked pair gets a weight; `shift=False` is scaling alone, A = α P.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.affine_attention import AffineAttention

__all__ = ["AffineScaled"]


@register(
    "affine_scaled",
    paper="159",
    title="Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention",
    family="weights",
    summary="every query scales its row of weights, and what the row then lacks is spread evenly",
    equation="A_ij = α_i softmax_j(q_i·k_j / √D) + (ᾱ - α_i) / N_i,  α_i = σ(x_i W + b);  head_i = A_i v",
)
class AffineScaled(GroupedConfig):
    """Affine-scaled attention.

    Attributes:
        shift: add (ᾱ - α) / N; without it a row sums to α.
        momentum: ρ of the moving average ᾱ.
    """

    shift: bool = True
    momentum: float = 0.9

    def build(self, *, device: Any = None, dtype: Any = None) -> AffineAttention:
        """The module."""
        module = partial(AffineAttention, shift=self.shift, momentum=self.momentum)
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
