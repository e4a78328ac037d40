"""Fixed head size: heads as wide as asked, however many there are and however narrow the model is.

    head_h = softmax(x W_Qh (c W_Kh)ᵀ / √D) c W_Vh,   y = concat_h(head_h) W_O

with W_Qh, W_Kh, W_Vh: (d, D) and W_O: (H·D, d), where D no longer is d/H. The L × S logits of a head have
rank at most D: a head narrower than the sequence is long cannot express every pattern of attention, one that
is as wide can (`realise`); `head_ranks` says what ranks the heads of a module use.

Cost: 4·d·H·D parameters, or 2·d·D·(H + G) with G key/value heads; 2·L·S·H·D FLOPs for the scores and as many
for the values; 2·G·D numbers of cache per token.

Paper 053: Low-Rank Bottleneck in Multi-head Attention Models, arXiv 2002.07028. It takes 128 or the length of
the sequences for D; the default of 64 here, the width of most models' heads, and `kv_heads` are ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polyhead.checks import floating, given
from polyhead.errors import ConfigError, ShapeError
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.inputs import check_inputs
from polyhead.nn.projections import at_least_one

__all__ = ["FixedHeadSize", "head_ranks", "realise"]


@register(
    "fixed_head_size",
    paper="053",
    title="Low-Rank Bottleneck in Multi-head Attention Models",
    family="sharing",
    summary="the width of a head does not shrink with the number of heads",
    equation="head_h = softmax(q_h k_hᵀ / √D) v_h,  D fixed and not d/H;  y = concat_h(head_h) W_O",
)
class FixedHeadSize(GroupedConfig):
    """Attention with heads of width `head_dim`, whatever `dim` and `heads` are.

    Attributes:
        head_dim: width D; default 64.
    """

    head_dim: int | None = 64

    def __post_init__(self) -> None:
        if self.head_dim is None:
            raise ConfigError("FixedHeadSize: head_dim must be an integer, at least 1; got None")
        at_least_one("FixedHeadSize", dim=self.dim, heads=self.heads, head_dim=self.head_dim)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        return self.assemble(heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype)


def realise(
    weights: Float[Tensor, "n n"], inputs: Float[Tensor, "n d"], head_dim: int | None = None
) -> tuple[Float[Tensor, "D d"], Float[Tensor, "D d"]]:
    """Query and key weights with which one head attends from n inputs to themselves by given weights.

    With X⁺ a right inverse of the inputs' transpose, W_K Xᵀ = [I; 0] and W_Q Xᵀ = √D [log P; 0], P's row i on
    column i: the logits are log P. Theorem 1 of the paper.

    Args:
        weights: P, positive, every row summing to 1.
        inputs: X, rows linearly independent.
        head_dim: D, at least n. Default n.

    Returns:
        W_Q and W_K as a `Linear` has them, `(D, d)`.

    Raises:
        ConfigError: the weights are not positive or do not sum to 1, or D < n: then there are weights that no
            head can give.
        ShapeError: shapes that do not fit, or inputs that are linearly dependent.
    """
    floating("weights", weights, 2, "(n, n)")
    floating("inputs", inputs, 2, "(n, d)")
    n, dim = inputs.shape
    if weights.shape != (n, n):
        raise ShapeError(
            f"weights must have shape ({n}, {n}), one row for each input; got {tuple(weights.shape)}"
        )
    head_dim = n if head_dim is None else head_dim
    at_least_one("realise", head_dim=head_dim)
    if head_dim < n:
        raise ConfigError(
            f"head_dim must be at least {n}, the inputs; got {head_dim}, too narrow for every pattern"
        )
    sums = weights.sum(-1)
    if not bool((weights > 0).all()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ConfigError(
            "weights must be positive with rows that sum to 1; got the least "
            f"{weights.min().item():.3g} and sums from {sums.min().item():.3g} to {sums.max().item():.3g}"
        )
    if int(torch.linalg.matrix_rank(inputs)) < n:
        raise ShapeError(f"inputs must be linearly independent; the {n} rows of width {dim} are not")
    inverse = torch.linalg.pinv(inputs.T)  # (n, d), inverse @ inputs.T = I
    query, key = inputs.new_zeros(head_dim, dim), inputs.new_zeros(head_dim, dim)
    key[:n] = inverse
    query[:n] = math.sqrt(head_dim) * weights.log().T.to(inverse.dtype) @ inverse
    return query, key


def head_ranks(
    attention: MultiHeadAttention, x: Float[Tensor, "B L d"], context: Float[Tensor, "B S dc"] | None = None
) -> Int[Tensor, "B H"]:
    """The rank of each head's logits q kᵀ on these inputs, at most min(D, d, L, S); no L × S tensor is made.

    Singular values below D · eps of the largest count as zero. Positions and biases are left out.

    Args:
        attention: a module with a projection, such as this mechanism's.
        x: inputs.
        context: inputs of the keys; default `x`.
    """
    if not isinstance(attention, MultiHeadAttention):
        raise ConfigError(f"attention must be a MultiHeadAttention; got {given(attention)}")
    check_inputs("x", x, attention.projection.dim)
    if context is not None:
        check_inputs("context", context, attention.projection.context_dim)
    with torch.no_grad():
        q = attention.projection.spread(attention.projection.queries(x))
        k, _ = attention.projection.keys_values(x if context is None else context)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        # q kᵀ has the rank of R_q R_kᵀ, the triangles of their QR decompositions
        upper = [torch.linalg.qr(z.double(), mode="r").R for z in (q, k)]
        values = torch.linalg.svdvals(upper[0] @ upper[1].transpose(-1, -2))
        eps = torch.finfo(q.dtype).eps * max(q.shape[-1], 8)
        return (values > eps * values.amax(-1, keepdim=True)).sum(-1)
