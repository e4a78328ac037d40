"""Mixture of sparse attention: every head chooses the tokens that it attends among.

    s = sigmoid(W_r x);   I_e = the k tokens with the largest s_e,   k = max(2, ⌊T / ρ⌋)
    y_t = Σ_dense head_h(t) W_Oh + Σ_{e: t in I_e} s_te softmax(q_te K_eᵀ / √D) V_e W_Oe

K_e, V_e: of the tokens of I_e up to t. Tokens that a head did not choose are not projected for it, are not
seen and get nothing from it; the factor s trains the router. The first `dense_heads` heads are plain ones,
without which training is not stable there. Positions are those in the sequence.

q: (B, H, L, D). Cost: the parameters of attention with H heads and d·E; a head that chooses takes 1/ρ of the
projections and 1/ρ² of the scores and values of a dense one, so that many of them cost what one does. The
cache holds E numbers a token besides keys and values, and room for those of tokens that were not chosen.

What the choice does to causality. With `choice="sequence"`, as in the paper, the k best of the whole sequence
are taken: what an output reads is past, but whether its token was chosen depends on what comes after it. A
model that is trained so has seen a little of the future, its likelihoods are not those of a text that is
written token by token, and a cache is refused. With `choice="prefix"`, the default, a token is chosen if it
is among the k best of those up to itself, T counting these, and stays chosen: no output depends on later
tokens, decoding is the whole call, and about T/ρ tokens are chosen where the scores have no trend.

Paper 094: Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice Routing,
arXiv 2505.00315, which leaves generation open: "prefix" is our reading. There half of the width is turned:
`position=rope(fraction=0.5)`. `include_first` keeps the first token as one of the k. Of equal scores the
earlier token is taken: of tokens that are all alike, "prefix" takes two. A quarter of the heads are dense by
default. Weights start as linear maps do here.
Scores, other normalisers, weight maps and biases by position are refused.
"""

from __future__ import annotations

from typing import Any

from polyhead.checks import flag, number, whole
from polyhead.errors import unknown_name
from polyhead.mechanisms.config import AttentionConfig, causal_alone, without_context
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.choosing_heads import ChoosingHeads
from polyhead.nn.expert_choice import ExpertChoice
from polyhead.nn.projections import at_least_one
from polyhead.nn.routed_output import RoutedOutput

__all__ = ["MixtureOfSparseAttention"]


@register(
    "mosa",
    aliases=("mixture_of_sparse_attention",),
    paper="094",
    title=("Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice Routing"),
    family="routing",
    summary="every head chooses the few tokens that it attends among; a few heads see all",
    equation=(
        "I_e = top-k of s_e = sigmoid(W_r x)_e;  y_t = Σ_dense head_h W_Oh + "
        "Σ_{e: t in I_e} s_te softmax(q_te K_eᵀ / √D) V_e W_Oe, K_e and V_e of I_e"
    ),
    supports=frozenset({"causal_self"}),
    graph_breaks=1,
    facets=Facets(positions="hard"),
    promises=Promises(routed=True, any_mask=False),
)
class MixtureOfSparseAttention(AttentionConfig):
    """Mixture of sparse attention.

    Attributes:
        dense_heads: heads among `heads` that read all tokens; default a quarter of them.
        sparsity: ρ, at least 1: a head chooses one of so many tokens.
        choice: "prefix": among the tokens so far; "sequence": among all, those to come too.
        include_first: whether the first token is one of the chosen in any case.
    """

    dense_heads: int | None = None
    sparsity: float = 8.0
    choice: str = "prefix"
    include_first: bool = False

    def __post_init__(self) -> None:
        at_least_one("MixtureOfSparseAttention", dim=self.dim, heads=self.heads)
        without_context(self)
        causal_alone("mosa", self, "what is read is what sparsity= says")
        if not isinstance(self.choice, str) or self.choice not in ("prefix", "sequence"):
            raise unknown_name("choice", self.choice, ("prefix", "sequence"))
        flag("include_first", self.include_first)
        dense = self.heads // 4 if self.dense_heads is None else self.dense_heads
        name = f"dense_heads (of {self.heads} heads, one of which has to choose)"
        object.__setattr__(self, "dense_heads", whole(name, dense, 0, self.heads - 1))
        object.__setattr__(self, "sparsity", number("sparsity", self.sparsity, least=1))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> ChoosingHeads:
        """The module."""
        assert self.dense_heads is not None
        choice = ExpertChoice(
            self.dim,
            self.heads - self.dense_heads,
            self.sparsity,
            prefix=self.choice == "prefix",
            include_first=self.include_first,
            device=device,
            dtype=dtype,
        )

        def module(*parts: Any, **options: Any) -> ChoosingHeads:
            return ChoosingHeads(*parts, choice=choice, **options)

        return self.assemble(
            heads=self.heads,
            kv_heads=self.heads,
            device=device,
            dtype=dtype,
            output=RoutedOutput,
            module=module,
        )
