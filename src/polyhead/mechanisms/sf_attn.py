"""SF-Attn: grouped-query attention that is trained within groups of tokens, shifted in some heads.

    in training    head_h = attend(q_i, the j ≤ i of i's group, and j < s)
    in evaluation  head_h = attend(q_i, all j ≤ i)

Groups have g tokens, and in a quarter of the heads they are shifted by g/2, so that what one layer cuts apart
another joins; all heads see the first s tokens. `polyhead.nn.shifted_groups` is the same as a part, for
any mechanism: it is tuned so and read as `grouped_query`, whose weights it takes over.

Cost: that of grouped-query attention in evaluation, which `cost` says; in training a head reads O(L·(g + s))
pairs.

Paper 179: SinkLoRA, Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models, arXiv
2406.05678. Its code of this pattern is not public: see `polyhead.nn.regularizers.shifted_groups` for our
readings. LoRA and the cache of its inference, H2O, are not part of the mechanism. Calls that are not causal
attend within the same groups and to the first tokens.
"""

from __future__ import annotations

from typing import Any

from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.regularizers import check_regularizers, shifted_groups

__all__ = ["SinkFixedGroups"]


@register(
    "sf_attn",
    aliases=("sink_fixed_attention",),
    paper="179",
    title="SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
    family="sparse",
    summary="trained within groups of tokens, shifted in some heads, and on the first tokens; then on all",
    equation=(
        "in training head_h = Σ_j softmax_j(q_i·k_j / √D) v_j over j ≤ i with ⌊(i - o_h)/g⌋ = ⌊(j - o_h)/g⌋ "
        "or j < s, o_h = 0 or g/2; else over j ≤ i"
    ),
)
class SinkFixedGroups(GroupedConfig):
    """Attention that is trained within shifted groups.

    Attributes:
        group: g, tokens of a group; None: a quarter of the call.
        returned: the share of the second half of the heads whose groups are not shifted.
        sinks: s, the first tokens, which all see.
    """

    group: int | None = None
    returned: float = 0.5
    sinks: int = 4

    def __post_init__(self) -> None:
        own = shifted_groups(self.group, returned=self.returned, sinks=self.sinks)
        object.__setattr__(self, "returned", own.returned)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        own = shifted_groups(self.group, returned=self.returned, sinks=self.sinks)

        def grouped(*parts: Any, **options: Any) -> MultiHeadAttention:
            others = check_regularizers(options.pop("regularizers"))
            return MultiHeadAttention(*parts, regularizers=(own, *others), **options)

        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=grouped
        )
