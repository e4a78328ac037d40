"""Dynamically composable heads: tokens choose how the heads mix at a pair, before the softmax and after it.

    a_ij = (q_hi · k_gj / √D)_h,  w_hi = softmax_j(C(a_ij)_h),  u_ij = C'(w_ij),  head_hi = Σ_j u_hij v_gj
    C(a)_ij = a + B a + Σ_r (a · p_ir) s_ir + Σ_r (a · p_jr) s_jr + f_i ⊙ a + f_j ⊙ a
    hidden = GELU(x W_1),  p = rms(hidden W_p),  s = hidden W_s,  f = tanh(x W_f),  y = concat_h(head_h) W_O

with weights of its own for C and C', for i (the query's token) and for j (the key's); B: (H, H), r = 1..R,
p, s, f: vectors over the H query heads; W_1: (d, K), W_p, W_s: (K, R·H), W_f: (d, H). K = 4·H and R = 2 as
in the paper's models. rms divides by the root mean square over the heads.

Cost: 4·(d·K + 2·K·R·H + d·H) + 2·H² parameters more than grouped-query attention with G heads; 4·L·S·H² more
FLOPs in matrix products and about 8·L·S·H·R others; H·(4·R + 2) more numbers of cache per token, none with
`key_wise=False`. Memory is O(L): all heads of some rows are worked on together.

Paper 130: Improving Transformers with Dynamically Composable Multi-Head Attention, arXiv 2405.08553. W_s, W_f
and B start at zero, so that training begins as multi-head attention; the paper does not say how they start.
Its released code leaves B out, `static=False`, and caches an H × H matrix for each key; here it is the
vectors that the key's token chose.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import flag
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.composable import ComposableAttention
from polyhead.nn.projections import at_least_one

__all__ = ["DynamicallyComposable"]


@register(
    "dynamically_composable",
    aliases=("dcmha",),
    paper="130",
    title="Improving Transformers with Dynamically Composable Multi-Head Attention",
    family="interaction",
    summary="the tokens of a pair choose how the heads mix there, before and after the softmax",
    equation=(
        "w_hi = softmax_j(C(a_ij)_h);  u_ij = C'(w_ij);  "
        "C(a)_ij = a + B a + Σ_r (a · p_ir) s_ir + Σ_r (a · p_jr) s_jr + f_i ⊙ a + f_j ⊙ a"
    ),
)
class DynamicallyComposable(GroupedConfig):
    """Dynamically composable attention.

    Attributes:
        rank: vectors R that a token reads and writes.
        hidden: width K; default 4·H.
        static: whether B is there.
        key_wise: whether the tokens of the keys choose too.
    """

    rank: int = 2
    hidden: int | None = None
    static: bool = True
    key_wise: bool = True

    def __post_init__(self) -> None:
        at_least_one("DynamicallyComposable", dim=self.dim, heads=self.heads)
        hidden = 4 * self.heads if self.hidden is None else self.hidden
        at_least_one("DynamicallyComposable", rank=self.rank, hidden=hidden)
        flag("static", self.static)
        flag("key_wise", self.key_wise)
        object.__setattr__(self, "hidden", hidden)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> ComposableAttention:
        """The module."""
        assert self.hidden is not None
        module = partial(
            ComposableAttention,
            rank=self.rank,
            hidden=self.hidden,
            static=self.static,
            key_wise=self.key_wise,
        )
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
