"""Dynamic mask attention: every key says by its value how important it is, and the w most important are read.

    δ_j = A_g softplus(v_j W)_g;   S_i = the w largest δ_j among j <= i
    head_i = softmax over j in S_i of (q_i · k_j / √D + δ_j) v_j,   y = concat_h(head_h) W_O

v_j: the values of all G key/value heads side by side, (G·Dv); W: (G·Dv, G), A: (G,). The H/G query heads of a
key/value head read the same keys. The choice does not depend on the query, and the number by which is chosen
stands in the softmax: so W and A learn from the ordinary loss by the keys that are read. A key that is not
read gets no gradient. With w keys or fewer in the call it is `grouped_query` with a bias for every key, and
with A = 0 besides, plain attention; then, and wherever numbers are equal, the later key is taken.

A later key can only push others out, never bring one back. So every key is read from its own query to a last
one, which a mask `until` says; and a cache need not hold more than w rows a head, exactly:
`new_cache(forget=True)` holds no others.

q: (B, H, L, D); k: (B, G, L, D + 1), with δ as the last coordinate, v: (B, G, L, Dv). Cost: G²·Dv + G
parameters and G numbers a token of cache more than grouped-query attention; min(w, i) keys a query are read.
`cost` counts all pairs, as it does with masks. To find the choice takes O(L·w) comparisons of integers.

Paper 189: Trainable Dynamic Mask Sparse Attention, arXiv 2508.02124. There queries and keys are normalised
and turned: `qk_norm=True, position=rope()`. Our readings: the bias is A softplus(·), as in later code, with
`exponential` the exp(A softplus(·)) of the paper; every query has its own w keys, where some code takes the
largest of the whole sequence, later ones too; the choice is exact, without blocks; a query may not read its
own key. A starts normal with 0.02, W as linear maps do. In half precision numbers are equal
more often, and the choice then is another. Masks other than the causal one are refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import flag, whole
from polyhead.mechanisms.config import GroupedConfig, causal_alone, without_context
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.dynamic_mask import DynamicMask

__all__ = ["DynamicMaskAttention"]


@register(
    "dynamic_mask_attention",
    aliases=("dma",),
    paper="189",
    title="Trainable Dynamic Mask Sparse Attention",
    family="sparse",
    summary="every key says by its value how important it is, and queries read the most important ones",
    equation=(
        "δ_j = A softplus(v_j W);  head_i = Σ_j softmax_j(q_i·k_j / √D + δ_j) v_j over the w largest δ_j of "
        "j ≤ i"
    ),
    supports=frozenset({"causal_self"}),
    facets=Facets(positions="hard"),
    promises=Promises(any_mask=False),
)
class DynamicMaskAttention(GroupedConfig):
    """Dynamic mask attention.

    Attributes:
        keep: w, keys that a query reads.
        exponential: exp(A softplus(·)) in place of A softplus(·).
    """

    keep: int = 2048
    exponential: bool = False

    def __post_init__(self) -> None:
        without_context(self)
        causal_alone("dynamic_mask_attention", self, "what is read is what keep= says")
        object.__setattr__(self, "keep", whole("keep", self.keep, 1))
        flag("exponential", self.exponential)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> DynamicMask:
        """The module."""
        module = partial(DynamicMask, keep=self.keep, exponential=self.exponential)
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
