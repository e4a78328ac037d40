"""An attention bottleneck: the first token takes in less than one, down to nothing, and can be edited.

    A = softmax(q_h k_gᵀ / √D),  Ã_0 = (1 - A_00) A_0,  Ã_i = A_i for i > 0
    y = concat_h(Ã v_g) W_O,   g = h // (H/G)

A_00 is the weight of the first token on the first key. The mass that Ã_0 puts on the other keys is
(1 - A_00)², in [0, 1]. A first token that looks at itself alone gives zeros, or the bias of W_O, whatever
else there is: so nothing may be added to y, such as the residual of a block. `first_row` gives A_0, Ã_0 and
the mass; `edited` gives the output under other weights, such as zeros.

Only one row differs: it is attended to by itself, with one more column of values that picks A_00; all others
take the fastest way that there is. Cost: 2·S·H FLOPs more than grouped-query attention. The first token looks
at those that come later: no causal masks, and no cache but that of a context.

Paper 067: TAB: Transformer Attention Bottlenecks enable User Intervention and Debugging in Vision-Language
Models, arXiv 2412.18675. There it is the last layer of an image encoder, with one head (`heads=1`), behind a
norm and before an MLP; several heads, each with a gate of its own, are ours, and so is how to edit. What the
first token keeps of itself is A_00 (1 - A_00), as in the published code. In training with dropout, the
gate is of weights behind it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import flag
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.bottleneck import BottleneckAttention

__all__ = ["AttentionBottleneck"]


@register(
    "attention_bottleneck",
    aliases=("tab",),
    paper="067",
    title=(
        "TAB: Transformer Attention Bottlenecks enable User Intervention and Debugging in "
        "Vision-Language Models"
    ),
    family="intervention",
    summary="what the first token takes from the others sums to less than one, and can be read and edited",
    equation="Ã_0 = (1 - A_00) A_0,  Ã_i = A_i (i > 0),  A = softmax(q_h k_gᵀ / √D);  head_h = Ã v_g",
    supports=frozenset({"self", "cross"}),
)
class AttentionBottleneck(GroupedConfig):
    """An attention bottleneck.

    Attributes:
        gate: whether the first row is multiplied by 1 - A_00.
    """

    gate: bool = True

    def __post_init__(self) -> None:
        flag("gate", self.gate)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> BottleneckAttention:
        """The module."""
        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            module=partial(BottleneckAttention, gate=self.gate),
        )
