"""Maps across the heads of a pair, of its logits (`score=`) or of its weights (`weight_map=`)."""

from polyhead.attend.across_heads.base import AcrossHeads, mixing_flops
from polyhead.attend.across_heads.dynamic import DynamicHeadMix, TokenMix, dynamic_head_mix
from polyhead.attend.across_heads.mix import HeadMix, head_mix
from polyhead.attend.across_heads.pairs import HeadPairs, head_pairs

__all__ = [
    "AcrossHeads",
    "DynamicHeadMix",
    "HeadMix",
    "HeadPairs",
    "TokenMix",
    "dynamic_head_mix",
    "head_mix",
    "head_pairs",
    "mixing_flops",
]
