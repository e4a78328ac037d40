"""Hierarchical self-attention: pairs of tokens in sibling subtrees share one weight.

Tokens are the leaves of a tree; |A| leaves in node A, with means q̄_A, k̄_A, v̄_A; sib(B): the siblings of B.

    s_BC = q̄_B·k̄_C / √D
    D_B = exp(-φ(B)) + Σ_{C in sib(B)} |C| exp(s_BC)
    φ(leaf i) = -q_i·k_i / √D,    φ(A) = -Σ_{B in A} |B|/|A| log D_B                      from the leaves up
    M_root = 1,  M_B = M_A exp(-φ(B)) / D_B,  δ_BC = M_A exp(s_BC) / D_B  for B in A      from the root down
    o_i = M_i v_i + Σ_{B above or at i} Σ_{C in sib(B)} |C| δ_BC v̄_C

Of all matrices of weights that have one weight for all pairs of B × C, it is the one nearest to softmax
attention, by the sum of the KL divergences of its rows. With all tokens siblings it is softmax attention.

The tree is one of windows: nodes of b tokens, of b such nodes, and so on, until one node has at most b
children; or, with `levels`, the root has all nodes of the last level as children. Windows are counted from
the first token of the batch, padding among them, which then weighs nothing.

q: (B, H, L, D), k, v: (B, G, L, D). Cost: parameters of grouped-query attention; scores and values of
L·b·b/(b-1) pairs in place of L². With `levels=m`, (L/bᵐ)² of the root's children come in addition.

Causal, and this is ours: the paper has encoders only, and a mean over the queries of a node would know later
tokens. Row i is that of the last token of a tree that ends with it, in which a node has those siblings that
stand before it: L·b·log_b L pairs. A cache holds queries, keys and values, H·D + 2·G·D numbers a token; a
step sums them up once more, about the work of a step of attention. Other masks are refused, because subtrees
share weights as a whole, and so are a context and a cache of recent tokens. The output of a padded query is
that of heads of zeros.

Paper 009: Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale Problems, arXiv
2509.15448. It has -|q - k|²/(2√D) of normalised queries and keys as energy, which is q·k / √D up to a
constant; for others the product is what the derivation needs. Left out: its optional term of the places of
siblings, trees that are given with a text, and leaves that do not see themselves.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import whole
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.own_scores import OwnScoresConfig
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.hierarchical import HierarchicalAttention

__all__ = ["HierarchicalSelfAttention"]


@register(
    "hierarchical_self_attention",
    aliases=("hsa",),
    paper="009",
    title="Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale Problems",
    family="hierarchical",
    summary="on a tree of tokens, sibling subtrees share a weight, as near to softmax as that allows",
    equation=(
        "o_i = M_i v_i + Σ_{B ∋ i} Σ_{C in sib(B)} |C| δ_BC v̄_C;  "
        "δ_BC = M_A exp(q̄_B·k̄_C / √D) / D_B,  M_B = M_A exp(-φ(B)) / D_B,  B in A"
    ),
    supports=frozenset({"self", "causal_self"}),
    facets=Facets(levels="multi"),
    promises=Promises(any_mask=False),
)
class HierarchicalSelfAttention(OwnScoresConfig):
    """Hierarchical self-attention; further options are those of `OwnScoresConfig`.

    Attributes:
        branch: b, children of a node; at least 2.
        levels: levels of nodes between the leaves and the root, 0: softmax attention; None: as many as it
            takes until the root has at most b children.

    Positions are encoded before means are taken.
    """

    branch: int = 4
    levels: int | None = None

    def __post_init__(self) -> None:
        whole("branch", self.branch, 2)
        if self.levels is not None:
            whole("levels", self.levels, 0)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> HierarchicalAttention:
        """The module."""
        module = partial(HierarchicalAttention, branch=self.branch, levels=self.levels)
        return self.assemble(module, device=device, dtype=dtype)
