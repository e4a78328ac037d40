"""Maps across the heads of a pair, of its logits (`score=`) or of its weights (`weight_map=`)."""

from polyhead.attend.across_heads.base import AcrossHeads, mixing_flops
from polyhead.attend.across_heads.dynamic import DynamicHeadMix, TokenMix, dynamic_head_mix
from polyhead.attend.across_heads.mix import HeadMix, head_mix

__all__ = [
    "AcrossHeads",
    "DynamicHeadMix",
    "HeadMix",
    "TokenMix",
    "dynamic_head_mix",
    "head_mix",
    "mixing_flops",
]
