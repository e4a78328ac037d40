"""Binary attention with low-rank estimates of what binarisation leaves out.

    q_b = α_q sign(q),  k_b = α_k sign(k),  v_b = α_v sign(v)
    E = u_qp (u_kp + u_km)ᵀ + u_qm u_kpᵀ,   u_* = x w_* + b_*, one number a token
    A = softmax((q_b k_bᵀ + E) / √D),   A_b = α_i clamp(round(A / α_i), 0, 1),   α_i = min(4 τ / n_i, 1)
    head = A_b v_b + A_b u_vp,   y = concat_h(head_h) W_O

With q = q_b + r_q and k = k_b + r_k, q kᵀ is q_b k_bᵀ + q_b r_kᵀ + r_q k_bᵀ + r_q r_kᵀ: the three terms of E
stand for the last three, in all heads alike. The projections to q, k, v and of the heads are binary too,
y = α mean|W| sign(x + shift) sign(W - mean W)ᵀ (`linear_bits=1`).

Training goes straight through: signs pass gradients on where |x| ≤ α, weights where 0 ≤ A ≤ α_i, and the
steps α and τ get theirs times 1 / √(numbers that they scale).

q: (B, H, L, D), k, v: (B, G, S, D). Cost: that of grouped-query attention, two more channels of queries and
keys, one of values, and 5 (d + 1) parameters for the estimates. A token takes 2 G ⌈D / 8⌉ bytes and three
numbers in the cache. The FLOPs named here are those of the dense form; signs are multiplied as floats.

Paper 177: BiPFT, Binary Pre-trained Foundation Transformer with Low-rank Estimation of Binarization Residual
Polynomials, arXiv 2312.08937. There, attention is bidirectional within a sequence. Ours are: causal and
cross-attention, u_qm and u_qp from the queries' inputs and the others from the keys'; a step of the weights
for every row, n_i the keys that it sees, which at τ = 1 is four times their mean weight, as the paper's first
step over all rows is, so that decoding is exact (and at most 1, the largest weight); steps that start at
those of standard normal inputs in place of a first batch; estimates that start at zero, by those of keys;
sign(0) = 1; dropout of the weights after they are made binary, not before.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import given
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.binary_projection import BinaryOutput, BinaryProjection
from polyhead.nn.binary_residual import BinaryResidualAttention
from polyhead.nn.projections import OutputProjection, Projection

__all__ = ["BinaryResidual"]


@register(
    "bipft_binary_residual",
    aliases=("bipft",),
    paper="177",
    title=(
        "BiPFT: Binary Pre-trained Foundation Transformer with Low-rank Estimation of Binarization "
        "Residual Polynomials"
    ),
    family="quantized",
    summary="queries, keys, weights, values and projections of one bit; rank-1 estimates of what that loses",
    equation="A = softmax((q_b k_bᵀ + u_qp (u_kp + u_km)ᵀ + u_qm u_kpᵀ) / √D);  head = A_b v_b + A_b u_vp",
    facets=Facets(distribution="other"),  # weights of softmax are made binary
    promises=Promises(straight_through=True, piecewise_constant=True),
)
class BinaryResidual(GroupedConfig):
    """Binary attention with estimates of its residuals.

    Attributes:
        bits: 1, or 32 for queries, keys, weights and values as they are.
        linear_bits: 1, or 32 for projections as they are.
    """

    bits: int = 1
    linear_bits: int = 1

    def __post_init__(self) -> None:
        for name in ("bits", "linear_bits"):
            value = getattr(self, name)
            if type(value) is not int or value not in (1, 32):
                raise ConfigError(f"{name} must be 1 or 32; got {given(value)}")
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        binary = self.linear_bits == 1
        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            projection=BinaryProjection if binary else Projection,
            output=BinaryOutput if binary else OutputProjection,
            module=partial(BinaryResidualAttention, binary=self.bits == 1),
        )
