"""S2-Attention: every head reads the blocks near the query and, of all others, a shard of its own.

    head h of query i reads key j where  |⌊i/C⌋ - ⌊j/C⌋| < l  or  (⌊j/C⌋ + g·step + o) mod s = 0
    g = h // (H/G),   step = max(1, ⌊s/G⌋),   j ≤ i besides where the call is causal
    head_h = softmax over these of (q_i · k_j / √D) v_j,   y = concat_h(head_h) W_O

The shards of successive key/value heads are `step` blocks apart: with s of them or more, all heads together
read everything; with fewer, G residues of s are covered, and the local blocks. Which far block a head reads
depends on the block alone: one that a query no longer reads is read by no later query, so a cache may drop
it. The last `dense_heads` key/value heads read all. With s = 1, or l blocks that hold the call, it is
`grouped_query`, whose weights it takes over.

Cost: the parameters of grouped-query attention, and its cache where nothing is dropped; a head reads about
l·C + L/s keys a query, and needs as many in a cache. `cost` counts all pairs, as it does with masks.

Paper 123: Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads,
arXiv 2407.17678. It is about causal attention and keeps some of the first layers dense, for which a stack
takes layers of `grouped_query`. Our readings: in calls that are not causal blocks are near on both sides;
blocks are counted from the first token, padding or not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.attend.masks import Mask, halo, per_head, shard, window
from polyhead.checks import whole
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import AttentionConfig, key_value_heads, without_context
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.registry import register
from polyhead.nn.patterned import PatternedAttention

__all__ = ["ShardedAttention"]


@register(
    "s2_attention",
    aliases=("sharded_attention",),
    paper="123",
    title="Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
    family="sparse",
    summary="every head reads the blocks near the query and every s-th of the others, each head other ones",
    equation=(
        "head_h = Σ_j softmax_j(q_i·k_j / √D) v_j over j with |⌊i/C⌋ - ⌊j/C⌋| < l or "
        "(⌊j/C⌋ + g·step + o) mod s = 0"
    ),
    supports=frozenset({"self", "causal_self"}),
    facets=Facets(positions="local"),
)
class ShardedAttention(AttentionConfig):
    """Attention whose heads share the context out among them.

    Attributes:
        kv_heads: key/value heads G, a divisor of `heads`; default `heads`. Query heads of one read the same.
        block_size: C, keys of a block.
        local_blocks: l, blocks that all read: the query's own and those before it.
        stride: s, of how many blocks a head reads one.
        offset: o, by how many blocks all shards are moved.
        dense_heads: how many key/value heads, the last ones, read everything.
    """

    kv_heads: int | None = None
    block_size: int = 64
    local_blocks: int = 4
    stride: int = 4
    offset: int = 0
    dense_heads: int = 0

    def __post_init__(self) -> None:
        kv_heads = key_value_heads("ShardedAttention", self.heads, self.kv_heads)
        object.__setattr__(self, "kv_heads", kv_heads)
        without_context(self)
        for name, least in (("block_size", 1), ("local_blocks", 1), ("stride", 1), ("offset", 0)):
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        whole("dense_heads", self.dense_heads, 0)
        if self.dense_heads > kv_heads:
            raise ConfigError(f"dense_heads must be at most kv_heads={kv_heads}; got {self.dense_heads}")
        super().__post_init__()

    def pattern(self) -> Mask:
        """Who looks at whom, head by head."""
        assert self.kv_heads is not None
        near = halo(None, self.block_size, (self.local_blocks - 1) * self.block_size)
        step = max(1, self.stride // self.kv_heads)
        masks: list[Mask] = []
        for g in range(self.kv_heads):
            own = near | shard(self.block_size, self.stride, -(g * step + self.offset) % self.stride)
            dense = g >= self.kv_heads - self.dense_heads or self.stride == 1
            masks += [window(None, None) if dense else own] * (self.heads // self.kv_heads)
        return per_head(masks)

    def build(self, *, device: Any = None, dtype: Any = None) -> PatternedAttention:
        """The module."""
        module = partial(PatternedAttention, pattern=self.pattern(), name="s2_attention")
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
