"""Landmark attention: later tokens read a block through its last token, the landmark.

    s_ij = q_i·k_j / √D,   B(i) = ⌊i / b⌋,   landmark of block p: m_p = p·b + b - 1
    a_ij = softmax over {ordinary j <= i of block B(i)} ∪ {m_p: p < B(i)} of s_ij
    c_ij = softmax over the ordinary tokens j of block p of s_ij
    o_i = Σ_{j in block B(i)} a_ij v_j + Σ_{p < B(i)} a_{i,m_p} Σ_{j in block p} c_ij v_j

q: (B, H, L, D); k, v: (B, G, L, D), read by H/G heads each; positions are turned before. The weights of a row
sum to 1, and landmarks have none: their values are never read. Up to the first landmark it is `mha`. With
`top_k=n` every query of every head reads only the n past blocks whose landmarks score highest, and others are
not in its softmax. No gradient flows through that choice. Models are trained with all blocks, and read few.

Landmarks are tokens like others, with a row of the model's embedding: `ph.nn.insert_landmarks(ids, b, mark)`
puts one after every b - 1 ids, and with -100 for the mark after labels, so that nobody has to predict one.
Token j is taken for a landmark where b divides j + 1, counted from the first token of a row, padding or not:
pad on the left by whole blocks. Ordinary tokens in such places lose their values for all later blocks.

`reach=n` reads blocks farther back than n as if they all stood n + 1 back, so that rotary positions in a long
text are no larger than in training, which needs (n + 2)·b tokens. It costs every score twice.

Cost: the parameters and the cache of grouped-query attention; scores of all pairs in strips, in O(L) memory,
made again in the backward pass. A step with `top_k` scores the L/b landmarks and reads n + 1 blocks.

Paper 148: Landmark Attention: Random-Access Infinite Context Length for Transformers, arXiv 2305.16300. Our
readings: a landmark, as a query, reads its own block as the other tokens of the block do; every query chooses
for itself, also in prompts; `reach` is the mapping that the official code has for retrieved blocks, by
distance in blocks. Of equal scores the later block is taken. A block whose landmark is
padding, or whose tokens all are, is not read. Left out: fused
kernels, a cache on another device, and the segments with memories that the official code trains with.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import whole
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.own_scores import OwnScoresConfig
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.landmarks import LandmarkedAttention

__all__ = ["LandmarkAttention"]


@register(
    "landmark_attention",
    aliases=("landmark",),
    paper="148",
    title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
    family="sparse",
    summary="past blocks are read through the landmark token at their end, all of them or the best few",
    equation=(
        "o_i = Σ_{own} a_ij v_j + Σ_{p past} a_{i,m_p} Σ_{j in p} c_ij v_j;  a = softmax over own tokens and "
        "landmarks,  c = softmax within block p"
    ),
    supports=frozenset({"causal_self"}),
    facets=Facets(levels="multi"),
    promises=Promises(any_mask=False),
)
class LandmarkAttention(OwnScoresConfig):
    """Landmark attention; further options are those of `OwnScoresConfig`.

    Attributes:
        block_size: b, tokens of a block, the last of which is its landmark; at least 2.
        top_k: past blocks that a query reads; None: all.
        reach: blocks farther back than this are read as if they stood `reach + 1` back; None: where they are.
    """

    block_size: int = 64
    top_k: int | None = None
    reach: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", whole("block_size", self.block_size, 2))
        for name, least in (("top_k", 1), ("reach", 0)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name), least))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> LandmarkedAttention:
        """The module."""
        module = partial(LandmarkedAttention, block_size=self.block_size, top_k=self.top_k, reach=self.reach)
        return self.assemble(module, device=device, dtype=dtype)
