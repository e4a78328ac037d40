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

from typing import Any

from polyhead.checks import flag, whole
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import MechanismConfig, key_value_heads
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.registry import register
from polyhead.nn.hierarchical import HierarchicalAttention
from polyhead.nn.positions import NoPosition, Position
from polyhead.nn.projections import OutputProjection, Projection

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
    any_mask=False,
)
class HierarchicalSelfAttention(MechanismConfig):
    """Hierarchical self-attention.

    Attributes:
        kv_heads: key/value heads G, a divisor of `heads`; default `heads`.
        branch: b, children of a node; at least 2.
        levels: levels of nodes between the leaves and the root, 0: softmax attention; None: as many as it
            takes until the root has at most b children.
        head_dim, value_dim: widths of a head; default dim / heads, and `head_dim`.
        bias: whether projections have a bias.
        qk_norm: RMS-normalise queries and keys.
        position: an encoding that is added to inputs or turns queries and keys, before means are taken.
    """

    kv_heads: int | None = None
    branch: int = 4
    levels: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    bias: bool = False
    qk_norm: bool = False
    position: Position = NoPosition()

    def __post_init__(self) -> None:
        kv_heads = key_value_heads("HierarchicalSelfAttention", self.heads, self.kv_heads)
        object.__setattr__(self, "kv_heads", kv_heads)
        whole("branch", self.branch, 2)
        if self.levels is not None:
            whole("levels", self.levels, 0)
        flag("bias", self.bias)
        flag("qk_norm", self.qk_norm)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> HierarchicalAttention:
        """The module."""
        projection = Projection(
            self.dim,
            self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            bias=self.bias,
            qk_norm=self.qk_norm,
            device=device,
            dtype=dtype,
        )
        output = OutputProjection(
            self.dim, projection.heads, projection.value_dim, bias=self.bias, device=device, dtype=dtype
        )
        module = HierarchicalAttention(
            projection, output, position=self.position, branch=self.branch, levels=self.levels
        )
        if module.position.score is not None:
            raise ConfigError(
                "position must not be a bias of scores, since subtrees share them; "
                f"got {self.position!r}; take one that turns queries and keys, such as rope()"
            )
        return module
