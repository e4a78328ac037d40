"""Video mixture of block attention: queries of a head share out which blocks of a video they read.

    k̄_c = mean of k_j over block c,   g_tc = q_t · k̄_c,   n_tc = (g_tc - min g) / (max g - min g)
    S = the pairs (t, own block of t), and of all others those with the largest n, in the order of n, until
        Σ_S n >= τ · Σ n; at least one
    head_t = softmax over the tokens j of the blocks c with (t, c) in S of (q_t · k_j / √D) v_j
    y = concat_h(head_h) W_O

q: (B, H, L, D); k, v: (B, G, L, D), read by H/G heads each. Minimum, maximum and sums are over all queries
and blocks of a head (`over="head"`), of a single query, of a block with all queries and heads, or of all: by
the first some queries read their own block alone, and others many. Positions are turned before. No gradient
flows through the choice; queries and keys learn by what is read. With τ = 1, or one block, it is `mha`, whose
weights it takes over.

L tokens are the places of `grid`, row by row, and blocks are boxes of it. The paper lets them change from
layer to layer, whole frames, columns through all frames, cubes, and again:

    ph.build_stack([("vmoba", {"grid": (8, 16, 16), "block": block})
                    for block in [(2, 16, 16), (8, 4, 4), (2, 4, 4)] * 2], dim=128, heads=4)

Without a grid blocks are runs of a sequence. Every query decides what is left for others, so there is no
causal form, no cache, and no mask but padding, which has no part in means, and whose queries do not compete.

Cost: the parameters of grouped-query attention; L²/C products for the means of blocks of C tokens. `cost`
counts all pairs, as it does with masks. All L²/C scores of a head are held while it chooses.

Paper 190: VMoBA: Mixture-of-Block Attention for Video Diffusion Models, arXiv 2506.23858; the selector
`ph.vmoba` is for models that are trained already. Our readings: items of a batch never compete; of equal
pairs the later is taken; blocks at the far border may be smaller where they are still runs of tokens. Where
nothing but own blocks is chosen, the official code reads everything; with a threshold that never happens.
Its budgets of so many blocks are `grid_blocks` with `keep_blocks` or `together(keep_share(...))`. Which steps
of a diffusion stay dense is for the caller to say.
"""

from __future__ import annotations

from typing import Any

from polyhead.attend.selectors import GridBlocks, vmoba
from polyhead.checks import given
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import GroupedConfig, without_context
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.whole_sequence import WholeSequenceAttention

__all__ = ["Vmoba"]


class SharedBlockAttention(WholeSequenceAttention):
    """Self-attention to blocks that the queries of a whole sequence are given."""

    called = "vmoba"
    needs_all = "what a query reads depends on what the others would like to"


@register(
    "vmoba",
    aliases=("video_mixture_of_block_attention",),
    paper="190",
    title="VMoBA: Mixture-of-Block Attention for Video Diffusion Models",
    family="sparse",
    summary="queries read their own block of a video, and share out which others they read up to a threshold",
    equation=(
        "S = {own} ∪ the largest q_t·k̄_c of a head until their share is τ;  head_t = Σ_j softmax_j(q_t·k_j "
        "/ √D) v_j over the tokens of blocks c with (t, c) in S"
    ),
    supports=frozenset({"self"}),
    facets=Facets(positions="hard"),
    promises=Promises(any_mask=False),
)
class Vmoba(GroupedConfig):
    """Video mixture of block attention.

    Attributes:
        grid: lengths of one to three axes, row by row; None: a sequence.
        block: lengths of a block, for all axes or for each.
        share: τ, at least 0; from 1 on everything is read.
        over: who competes: "head", "query", "block" or "call".
    """

    grid: tuple[int, ...] | None = None
    block: int | tuple[int, ...] = 64
    share: float = 0.25
    over: str = "head"

    def __post_init__(self) -> None:
        without_context(self)
        chosen = self._chosen()
        object.__setattr__(self, "grid", chosen.grid)
        object.__setattr__(self, "block", chosen.block if len(set(chosen.block)) > 1 else chosen.block[0])
        if self.select is not None:
            raise ConfigError(
                "select must be None in vmoba: what is read is what block= and share= say; got "
                f"select={given(self.select)}; take grouped_query with a selector of your own"
            )
        if self.mask is not None:
            raise ConfigError(
                f"vmoba: mask must be None: {SharedBlockAttention.needs_all}; got {given(self.mask)}"
            )
        super().__post_init__()

    def _chosen(self) -> GridBlocks:
        return vmoba(self.block, self.grid, share=self.share, over=self.over)  # type: ignore[arg-type]

    def build(self, *, device: Any = None, dtype: Any = None) -> SharedBlockAttention:
        """The module."""

        def module(*parts: Any, **options: Any) -> SharedBlockAttention:
            return SharedBlockAttention(*parts, **options | {"select": self._chosen()})

        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
