"""Self-attention along a pattern that is part of the mechanism."""

from __future__ import annotations

from typing import Any

from polyhead.attend.masks import Mask
from polyhead.nn.self_only import SelfOnlyAttention

__all__ = ["PatternedAttention"]


class PatternedAttention(SelfOnlyAttention):
    """`MultiHeadAttention` within one sequence, whose calls all keep to a pattern.

    Args:
        parts, options: those of `MultiHeadAttention`.
        pattern: who may look at whom, besides `mask` and the mask of a call.
        name: of the mechanism, for the error that a context raises.
    """

    within = "is a pattern within one sequence"

    def __init__(
        self, *parts: Any, pattern: Mask, name: str, mask: Mask | None = None, **options: Any
    ) -> None:
        super().__init__(*parts, mask=pattern if mask is None else pattern & mask, **options)
        self.called = name
