"""Self-attention along a pattern that is part of the mechanism."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.errors import UnsupportedPattern
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.kv_cache import ContextCache

__all__ = ["PatternedAttention"]


class PatternedAttention(MultiHeadAttention):
    """`MultiHeadAttention` within one sequence, whose calls all keep to a pattern.

    Args:
        parts, options: those of `MultiHeadAttention`.
        pattern: who may look at whom, besides `mask` and the mask of a call.
        name: of the mechanism, for the error that a context raises.
    """

    def __init__(
        self, *parts: Any, pattern: Mask, name: str, mask: Mask | None = None, **options: Any
    ) -> None:
        super().__init__(*parts, mask=pattern if mask is None else pattern & mask, **options)
        self._name = name

    def _alone(self) -> UnsupportedPattern:
        return UnsupportedPattern(
            f"{self._name} is a pattern within one sequence and does not support a context; leave context "
            "out, and take grouped_query for cross-attention"
        )

    def forward(self, x: Tensor, context: Tensor | None = None, **call: Any) -> Tensor:
        """Attend; see `MultiHeadAttention.forward`. There is no context."""
        if context is not None or getattr(call.get("cache"), "holds_context", False):
            raise self._alone()
        return super().forward(x, **call)

    def new_context_cache(self, context: Tensor, **options: Any) -> ContextCache:
        raise self._alone()
