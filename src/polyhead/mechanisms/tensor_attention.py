"""Tensor attention: a query attends to pairs of tokens, or to longer tuples, by a product of three.

    S_i(mn) = Σ_l q_il k¹_ml k²_nl / D,   A_i = softmax over all pairs (m, n)
    head_i = Σ_(m,n) A_i(mn) v¹_m ⊙ v²_n,   y = concat_h(head_h) W_O

One layer can so tell whether three tokens stand in a relation, such as three numbers that sum to zero, which
attention to single tokens cannot. `order` is 3 for pairs, n for tuples of n - 1; of order 2 it is multi-head
attention with a scale of 1/D. A pair is visible where both of its tokens are: m, n ≤ i under a causal mask.

Pairs never take memory: for each m this is attention from q_i ⊙ k¹_m to the second keys, and the m's are
merged exactly by their log-sum-exps (see `polyhead.attend.kronecker`). For small logits and narrow heads
`polyhead.attend.kronecker_taylor` gives nearly the same in linear time.

Cost: 2·H·L·S^(order-1)·(D + Dv) operations, cubic in the length for pairs, a third of them computed under a
causal mask; (2·order)·d² parameters and (order - 1)·2·G·D numbers of cache per token.

Paper 175: How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker
Computation, arXiv 2310.04064, which is theory: it shows when almost linear time can and cannot be had.
Heads, grouped keys, masks and the module around the operator are ours. Rotary encodings turn the query and
every key, and are then not relative; biases by distance are refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import number, whole
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.flow import Flow, Step
from polyhead.mechanisms.registry import register
from polyhead.nn.tensor_attention import TensorAttentionModule, TupleProjection

__all__ = ["TensorAttention"]

_PICTURE = Flow(
    (Step("x", "(L, d)"), Step("projection", "query: H heads"), Step("position")),
    (
        Step("c", "(S, d), the context, or x"),
        Step("projection", "key, value: G heads, for every place in a tuple"),
        Step("position"),
        Step("cache", "keys and values of every place"),
    ),
    (
        Step("rows", "q_i ⊙ k¹_m: L × S queries for the second keys"),
        Step("scores", "q · k¹ · k² / D: H maps of L × S × S, never held"),
        Step("mask", "that of the call, padding: both tokens of a pair must be visible"),
        Step("normaliser", "softmax over all pairs"),
        Step("values", "weights · (v¹ ⊙ v²): the second place first, merged over the first"),
        Step("output", "heads → d"),
        Step("y", "(L, d)"),
    ),
)


@register(
    "tensor_attention",
    aliases=("third_order",),
    paper="175",
    title=(
        "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker "
        "Computation"
    ),
    family="scores",
    summary="a query attends to pairs of tokens: three-way scores, products of values",
    equation="head_i = Σ_(m,n) A_i(mn) v¹_m ⊙ v²_n,  A_i = softmax_(m,n)(Σ_l q_il k¹_ml k²_nl / D)",
    facets=Facets(alignment="other"),
    picture=_PICTURE,
)
class TensorAttention(GroupedConfig):
    """Tensor attention.

    Attributes:
        order: 3 for pairs of tokens; n for tuples of n - 1.
        scale: factor of the product; default 1/D.
    """

    order: int = 3
    scale: float | None = None

    def __post_init__(self) -> None:
        whole("order", self.order, 2, 8)
        if self.scale is not None:
            number("scale", self.scale)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> TensorAttentionModule:
        """The module."""

        def module(projection: TupleProjection, *args: Any, **options: Any) -> TensorAttentionModule:
            scale = 1 / projection.head_dim if self.scale is None else self.scale
            return TensorAttentionModule(projection, *args, scale=scale, **options)

        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            projection=partial(TupleProjection, places=self.order - 1),
            module=module,
        )
