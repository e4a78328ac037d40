"""Attention whose heads talk: a learned matrix mixes their logits, another their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polyhead.attend.across_heads import HeadMix, head_mix
from polyhead.attend.scores import Score, chain
from polyhead.attend.weight_maps import WeightMap, weight_chain
from polyhead.checks import flag
from polyhead.errors import ConfigError
from polyhead.nn.attention import MultiHeadAttention

__all__ = ["HeadMixing", "TalkingAttention"]


class HeadMixing(nn.Module):
    """A learned matrix `(H, H)` that mixes the heads of every pair; it starts as the identity.

    Args:
        heads: H.
        acts_on: "scores" or "weights", what it is meant for.
        device, dtype: of the matrix.
    """

    def __init__(self, heads: int, acts_on: str, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.acts_on = acts_on
        self.weight = nn.Parameter(torch.eye(heads, device=device, dtype=dtype))

    def forward(self) -> HeadMix:
        weight: Tensor = self.weight
        return head_mix(weight)


class TalkingAttention(MultiHeadAttention):
    """`MultiHeadAttention` with a `HeadMixing` of the logits, of the weights, or of both.

    Other maps of the logits come before its own, and so do other maps of the weights.

    Args:
        logits: mix the logits.
        weights: mix the weights.
        args, options: those of `MultiHeadAttention`.
    """

    def __init__(self, *args: Any, logits: bool = True, weights: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        flag("logits", logits)
        flag("weights", weights)
        if not logits and not weights:
            raise ConfigError("one of logits and weights must be True: heads that mix neither do not talk")
        weight = self.projection.query.weight
        kind = {"device": weight.device, "dtype": weight.dtype}
        self.logit_mixing = HeadMixing(self.heads, "scores", **kind) if logits else None
        self.weight_mixing = HeadMixing(self.heads, "weights", **kind) if weights else None

    def _score(self) -> Score | None:
        given = super()._score()
        if self.logit_mixing is None:
            return given
        mix = self.logit_mixing()
        return mix if given is None else chain((given, mix))

    def _weight_map(self) -> WeightMap | None:
        given = super()._weight_map()
        if self.weight_mixing is None:
            return given
        mix = self.weight_mixing()
        return mix if given is None else weight_chain((given, mix))
