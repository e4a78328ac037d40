"""Weighted grouped-query attention: each shared key/value head is a learned weighted sum of heads.

    head_h = softmax(q_h k_gᵀ / √D) v_g,   k_g = c W_Kg,  W_Kg = Σ_{h in g} a_h ⊙ W_Kh,   v_g likewise

with g the groups of H/G heads in a row; W_Kh, W_Vh: (d, D) are all kept and trained, a_h and b_h are numbers
or vectors over one side of the weight. At the start a_h = b_h = G/H: grouped-query attention of mean heads.
`merged` gives the grouped-query attention with the sums written out, for inference; `weighted` begins from a
trained module.

Cost: 4·d·D·H parameters and 2·H weights (2·H·D or 2·H·d of them as vectors); pooling is 2·H·D·d elementwise
multiplications and additions a call, whatever its length. Everything else, and everything once merged, is as
in grouped-query attention: 2·d·D·(H + G) parameters, 2·G·D numbers of cache per token.

Paper 120: Weighted Grouped Query Attention in Transformers, arXiv 2407.10855. Its row and column variants are
`granularity="output"` and `"input"` here, after the axis of the weight that the vector lies on; which of them
it calls row is not clear to us. In the "input" one, biases are pooled by their mean.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

from polyhead.checks import given
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import AttentionConfig
from polyhead.mechanisms.grouped_query import GroupedQuery
from polyhead.mechanisms.multi_head import MultiHead
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.pooled_projection import PooledProjection
from polyhead.nn.projections import Projection

__all__ = ["WeightedGroupedQuery", "merged", "weighted"]


@register(
    "weighted_grouped_query",
    aliases=("wgqa",),
    paper="120",
    title="Weighted Grouped Query Attention in Transformers",
    family="sharing",
    summary="shared key/value heads are learned weighted sums of heads, merged after training",
    equation=(
        "head_h = softmax(q_h k_gᵀ / √D) v_g;  k_g = c Σ_{h in g} a_h ⊙ W_Kh, v_g = c Σ_{h in g} b_h ⊙ W_Vh"
    ),
)
class WeightedGroupedQuery(GroupedQuery):
    """Weighted grouped-query attention with `kv_heads` key/value heads, a divisor of `heads`.

    Attributes:
        granularity: what the weights of a head are: "head", a number; "output", a vector over its width;
            "input", a vector over the width of its inputs.
        start: "mean", all weights G/H; "random", normally distributed.
    """

    granularity: str = "head"
    start: str = "mean"

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            projection=partial(PooledProjection, granularity=self.granularity, start=self.start),
        )


def _shared(attention: MultiHeadAttention) -> dict[str, Any] | None:
    """The options that all mechanisms made of parts have; None for a module put together by hand."""
    if not isinstance(attention.config, AttentionConfig):
        return None
    return {f.name: getattr(attention.config, f.name) for f in dataclasses.fields(AttentionConfig) if f.init}


def weighted(
    attention: MultiHeadAttention, kv_heads: int, *, granularity: str = "head", start: str = "mean"
) -> MultiHeadAttention:
    """A copy of a module with its key/value heads pooled to `kv_heads`, by weights that can be trained.

    Args:
        attention: multi-head or grouped-query attention.
        kv_heads: G, a divisor of the module's heads and key/value heads.
        granularity, start: see `WeightedGroupedQuery`.
    """
    old = getattr(attention, "projection", None)
    if type(old) is not Projection or old.heads != old.query_heads:
        raise ConfigError(
            f"attention must be a module with a plain Projection, such as mha or gqa; got {given(attention)}"
        )
    new = PooledProjection(
        old.dim,
        old.heads,
        kv_heads=kv_heads,
        pooled_heads=old.kv_heads,
        granularity=granularity,
        start=start,
        head_dim=old.head_dim,
        value_dim=old.value_dim,
        context_dim=old.context_dim,
        bias=old.key.bias is not None,
        qk_norm=old.key_norm is not None,
        device=old.key.weight.device,
        dtype=old.key.weight.dtype,
    )
    new.load_state_dict(new.state_dict() | old.state_dict())
    found = copy.deepcopy(attention)
    found.projection, found.kv_heads = new.train(attention.training), kv_heads
    shared = _shared(attention) if old.kv_heads == old.heads else None
    found.config = (
        None
        if shared is None or not isinstance(attention.config, MultiHead | GroupedQuery)
        else WeightedGroupedQuery(**shared, kv_heads=kv_heads, granularity=granularity, start=start)
    )
    return found


def merged(attention: MultiHeadAttention) -> MultiHeadAttention:
    """A copy of weighted grouped-query attention with the weighted sums written out: plain grouped-query."""
    pooled = getattr(attention, "projection", None)
    if not isinstance(pooled, PooledProjection):
        raise ConfigError(f"attention must be weighted grouped-query attention; got {given(attention)}")
    found = copy.deepcopy(attention)
    found.projection = pooled.merged()
    shared = _shared(attention)
    found.config = None if shared is None else GroupedQuery(**shared, kv_heads=pooled.kv_heads)
    return found
