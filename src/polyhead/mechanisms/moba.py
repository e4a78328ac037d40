"""Mixture of block attention: every query of every head reads its own block of keys, and the few before it
whose mean key it likes best.

    k̄_i = mean of k_j over block i,   s_ti = q_t · k̄_i,   b(t) = ⌊t / C⌋
    S_t = b(t) and the k - 1 blocks i < b(t) with the largest s_ti, all of them where there are no more
    head_t = softmax over the j <= t in blocks of S_t of (q_t · k_j / √D) v_j,   y = concat_h(head_h) W_O

q: (B, H, L, D); k, v: (B, G, L, D), read by H/G heads each, and every head chooses for itself; positions are
turned before. A block may be chosen only when all of it is past, and the own block is never scored: no later
key has a part in a choice, and decoding chooses as the whole call does. No gradient flows through the choice;
queries and keys learn by what is read. With k blocks or fewer in the call it is `mha`, whose weights it takes
over, and which takes over its own.

Cost: the parameters and the cache of grouped-query attention, and the means of past blocks, D/C numbers a
token and KV head (`cache.summaries.nbytes()`); min(k·C, t) keys a query are read, and L/C means are scored.
`cost` counts all pairs, as it does with masks, and the products with the means; no bytes of means.

Paper 063: MoBA, Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189. Defaults are those of its
runs of 8,192 tokens. Our readings: k counts the own block; k = 1 is attention within blocks, where the
official code is dense; decoding chooses too, where that is dense. Of equal scores the later block is taken.
Blocks are counted from the first token of a row, padding or not; padding has no part in means, and a block of
nothing else is not chosen. Masks other than the causal one are refused: a document that shares a block with
another would choose by its keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.attend.masks import window
from polyhead.attend.selectors import keep_blocks, mean_keys, select
from polyhead.checks import whole
from polyhead.mechanisms.config import GroupedConfig, causal_alone, without_context
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.one_sequence import OneSequenceAttention

__all__ = ["Moba"]


class BlockMixture(OneSequenceAttention):
    """Causal self-attention whose queries choose blocks of keys by their means.

    Args:
        parts, options: those of `MultiHeadAttention`, without `select`.
        block_size: C.
        top_k: blocks that a query reads, its own among them.
    """

    called = "moba"
    past_only = "chooses among blocks that are past"
    cut_by_masks = "blocks are chosen by the mean of all their keys"
    needs_all = "it chooses among all that are past"

    def __init__(self, *parts: Any, block_size: int, top_k: int, **options: Any) -> None:
        own = window(0)  # the block of the query itself
        chosen = select(mean_keys(), keep_blocks(top_k), rows=1, cols=block_size, always=own)
        super().__init__(*parts, **options | {"select": chosen})


@register(
    "moba",
    aliases=("mixture_of_block_attention",),
    paper="063",
    title="MoBA: Mixture of Block Attention for Long-Context LLMs",
    family="sparse",
    summary="every query reads its own block of keys and the few earlier ones whose mean key it likes best",
    equation=(
        "S_t = {b(t)} ∪ top_(k-1) over i < b(t) of q_t·k̄_i;  head_t = Σ_j softmax_j(q_t·k_j / √D) v_j over "
        "j ≤ t in blocks of S_t"
    ),
    supports=frozenset({"causal_self"}),
    facets=Facets(positions="hard"),
    promises=Promises(any_mask=False),
)
class Moba(GroupedConfig):
    """Mixture of block attention.

    Attributes:
        block_size: C, keys that are chosen together.
        top_k: k, blocks that a query reads, its own among them.
    """

    block_size: int = 512
    top_k: int = 3

    def __post_init__(self) -> None:
        without_context(self)
        for name in ("block_size", "top_k"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        causal_alone("moba", self, "what is read is what block_size= and top_k= say")
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> BlockMixture:
        """The module."""
        module = partial(BlockMixture, block_size=self.block_size, top_k=self.top_k)
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
