"""Knocking heads: behind the projections, the vectors of all heads pass through one small map.

    head_h = softmax(q_h k_gᵀ / √D) ṽ_g,  ṽ_g = 2 · ((v_g U) ⊙ sigmoid(v_g G)) W,   g = h // (H / kv_heads)
    or, with knock="linear":  q̃_h = q_h T_Q,  k̃_g = k_g T_K,  ṽ_g = v_g T_V,   whichever `on` names

U, G, W, T: (D, D), without biases. U, W and T start as the identity and G as zero: training begins as
grouped-query attention. Nothing is added up over heads; they meet in the weights that they train together.
`folded` writes linear maps into the projections, for inference.

Cost: 3·D² parameters with "mlp", D² for each linear map, however many heads there are; 2·D² FLOPs for each
D × D matrix, head and token. Mapped keys and values are cached: as many bytes as without.

Paper 047: Knocking-Heads Attention, arXiv 2510.23052. The default is its best variant. Our reading: the map
stands before the normalisation of queries and keys and before positions turn them.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

from polyhead.checks import given
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import AttentionConfig, GroupedConfig
from polyhead.mechanisms.grouped_query import GroupedQuery
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.knocking_projection import KnockingProjection

__all__ = ["KnockingHeads", "folded"]


@register(
    "knocking_heads",
    aliases=("kha",),
    paper="047",
    title="Knocking-Heads Attention",
    family="interaction",
    summary="all heads pass through one small map behind the projections, and train it together",
    equation="head_h = softmax(q_h k_gᵀ / √D) ṽ_g;  ṽ_g = 2 · ((v_g U) ⊙ sigmoid(v_g G)) W",
)
class KnockingHeads(GroupedConfig):
    """Knocking-heads attention.

    Attributes:
        knock: "mlp", or "linear".
        on: what is mapped, some of "q", "k", "v"; with "mlp" values alone.
    """

    knock: str = "mlp"
    on: tuple[str, ...] = ("v",)

    def __post_init__(self) -> None:
        if isinstance(self.on, list):
            object.__setattr__(self, "on", tuple(self.on))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            projection=partial(KnockingProjection, knock=self.knock, on=self.on),
        )


def folded(attention: MultiHeadAttention) -> MultiHeadAttention:
    """A copy of knocking-heads attention with its linear maps in the projections: plain grouped-query."""
    projection = getattr(attention, "projection", None)
    if not isinstance(projection, KnockingProjection):
        raise ConfigError(f"attention must be knocking-heads attention; got {given(attention)}")
    found = copy.deepcopy(attention)
    found.projection, found.config = projection.folded(), None
    if isinstance(attention.config, KnockingHeads):
        fields = (f.name for f in dataclasses.fields(AttentionConfig) if f.init)
        shared = {name: getattr(attention.config, name) for name in fields}
        found.config = GroupedQuery(**shared, kv_heads=projection.kv_heads)
    return found
