"""Relative convolutional attention: queries, keys and values are convolved over time, scores are relative.

    q_t = Σ_{s<K} w^q_s ⊙ (x_{t-s} W_Q) + b,  k and v likewise
    S_ij = ((q_i + u)·k_j + (q_i + w)·W_R R_{i-j}) / √D,   R_n = (sin nω, cos nω),  ω_m = 10000^(-2m/E)
    head_i = Σ_j softmax_j(S_ij) v_j,   g = h // (H/G)

Kernels: (H, K, D), the past only; u, w: (H, D); W_R: (H, D, E). It is Primer's convolution of projections,
K = 3, and the relative scores of Transformer-XL together; with identity kernels it is the latter.

sin and cos of i - j come apart into those of i and of j, so the scores are one dot product over D + E
coordinates: any backend serves it, and no relative shift or L × S memory is needed.

Cost: parameters of grouped-query attention and K·D·(H + 2G) + H·D·E + 2·H·D more; its FLOPs, 2·L·H·D·E, and
2·L·S·H·E for the relative scores; its cache and the latest K - 1 + 16 inputs of a sequence. A decoding step
projects K tokens. Of the tokens that a cache holds, the latest 16 can be taken back.

Paper 024: RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling,
arXiv 2308.03429. Our readings: the convolution is behind the projections and sees the past alone, in
every pattern and whatever the mask; kernels start as the identity, u and w at zero; the bias of a
projection is that of its convolution; W_R maps each head by itself, from E = D waves (rounded up to an
even number); a learned bias for every distance is `score=relative_bias(table)`. Distances are counted
in tokens of the sequence.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import whole
from polyhead.mechanisms.config import GroupedConfig, without_context
from polyhead.mechanisms.registry import register
from polyhead.nn.projections import at_least_one, head_width
from polyhead.nn.relative_conv import RelativeConvAttention

__all__ = ["RelativeConvMha"]


@register(
    "relative_conv_mha",
    aliases=("rcmha",),
    paper="024",
    title="RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
    family="inputs",
    summary="queries, keys and values are convolved over the latest tokens; scores see relative positions",
    equation=(
        "q_t = Σ_s w_s ⊙ (x_{t-s} W_Q), k, v likewise;  "
        "S_ij = ((q_i + u)·k_j + (q_i + w)·W_R R_{i-j}) / √D;  head_i = Σ_j softmax_j(S_ij) v_j"
    ),
    supports=frozenset({"self", "causal_self"}),
)
class RelativeConvMha(GroupedConfig):
    """Relative convolutional attention.

    Attributes:
        kernel: tokens K that a convolution reads; 1: relative attention whose channels are scaled.
        share_heads: one kernel for all heads.
        relative_dim: width E of the waves, even; default `head_dim`, or one more.
    """

    kernel: int = 3
    share_heads: bool = False
    relative_dim: int | None = None

    def __post_init__(self) -> None:
        at_least_one("RelativeConvMha", dim=self.dim, heads=self.heads)
        without_context(self)
        whole("kernel", self.kernel, 1)
        if self.relative_dim is None:
            width = head_width(self.dim, self.heads, self.head_dim)
            at_least_one("RelativeConvMha", head_dim=width)
            object.__setattr__(self, "relative_dim", width + width % 2)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> RelativeConvAttention:
        """The module."""
        assert self.relative_dim is not None
        module = partial(
            RelativeConvAttention,
            kernel=self.kernel,
            share_heads=self.share_heads,
            relative_dim=self.relative_dim,
        )
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
