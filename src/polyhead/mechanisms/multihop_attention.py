"""Multihop attention: a query reads what it looks at, and what that looks at in turn.

    head_h = A_h V_h1 + A_h² V_h2 + ... + A_hⁿ V_hn = A_h (V_h1 + A_h (V_h2 + ... + A_h V_hn))
    A_h = softmax(x W_Qh (x W_Kg)ᵀ / √D),  V_hm = x W_Vgm,  g = h // (H/G);   y = concat_h(head_h) W_O

Attention is the expectation of a value at the end of an unknown edge, p(φ_i = j) = A_ij. Here a value has n
tokens in it, v = W_1 x_φi + W_2 x_φφi + ...: the one that i looks at, the one that this one looks at, and so
on, with value maps of their own. n = 1 is grouped-query attention, and multi-head attention with G = H.

It is evaluated from the inside, U = V_n, then U = V_m + A U for m = n - 1 .. 1, and A U: n calls of `attend`
with the same queries and keys, in O(L) memory, so that masks, biases, normalisers and backends are as ever;
what acts on weights acts on those of every hop, and dropout draws anew for each. Queries and keys must be of
the same tokens: a context, which has no second hop, and a selector are for hops=1 alone.

Cost: n times the scores and values of grouped-query attention; (n - 1)·d·G·Dv parameters more. What a token
has summed is its own once it was read, so that a cache keeps keys, the values of the last hop and the sums of
the others, G·D + G·Dv + (n - 1)·H·Dv numbers a token. Sums are those of H query heads also where G < H, since
heads that share keys and values look at different tokens; a call repeats the keys for them. They are made of
what the token sees in the call that brings it: with a causal mask decoding is the full pass, and without one
later chunks change no earlier sum.

Paper 112: Attention: Marginal Probability is All You Need?, arXiv 2304.04556, as its extension Attention as
Implicit Structural Inference has it (NeurIPS 2023). Our readings: every hop draws an edge of its own, which
gives A² V_2. One edge a token for all hops is the same where no walk comes back to a token that it has left
before, as when tokens see earlier ones alone; else a token that looks at itself would stay there. Heads hop
each by itself; more than two hops, and a value map for each, are ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import whole
from polyhead.mechanisms.config import GroupedConfig, without_context
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.multihop import MultihopAttention, MultihopProjection

__all__ = ["Multihop"]


@register(
    "multihop_attention",
    aliases=("multihop",),
    paper="112",
    title="Attention: Marginal Probability is All You Need?",
    family="interaction",
    summary="a query reads what it looks at, and what that looks at in turn, each by values of its own",
    equation="head = A V_1 + A² V_2 + ... + Aⁿ V_n,  A = softmax(q kᵀ / √D);  y = concat_h(head_h) W_O",
    supports=frozenset({"self", "causal_self"}),
)
class Multihop(GroupedConfig):
    """Multihop attention.

    Attributes:
        hops: n; 1 is grouped-query attention, with all that it takes.
    """

    hops: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "hops", whole("hops", self.hops, 1, 64))
        if self.hops > 1:
            without_context(self)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        sizes: dict[str, Any] = {"heads": self.heads, "kv_heads": self.kv_heads}
        sizes |= {"device": device, "dtype": dtype}
        if self.hops == 1:
            return self.assemble(**sizes)
        projection = partial(MultihopProjection, hops=self.hops)
        return self.assemble(**sizes, projection=projection, module=MultihopAttention)
