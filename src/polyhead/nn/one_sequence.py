"""Self-attention within one sequence, to whose past no mask but the causal one does justice."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from polyhead.attend.masks import Mask, causal
from polyhead.checks import given
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.nn.kv_cache import KeyValueCache
from polyhead.nn.self_only import SelfOnlyAttention

__all__ = ["OneSequenceAttention"]

_CAUSAL = causal()


class OneSequenceAttention(SelfOnlyAttention):
    """`MultiHeadAttention` within one sequence, with `causal()` for its mask or, where it can, with none.

    Attributes:
        past_only: what it does, for the error of a call without a mask; empty where that is supported.
        cut_by_masks: why no other mask fits.
        needs_all: why a cache of recent tokens does not.
    """

    past_only: ClassVar[str] = ""
    cut_by_masks: ClassVar[str]
    needs_all: ClassVar[str] = "it reads all that are past"

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Mask | None = None,
        padding: Tensor | None = None,
        cache: KeyValueCache | None = None,
        **call: Any,
    ) -> Tensor:
        """Attend; see `MultiHeadAttention.forward`. The mask is `causal()`; there is no context."""
        self._check_self(x, context, cache, padding)
        if mask is not None and not isinstance(mask, Mask):
            raise ConfigError(f"mask must be causal(){' or None' * (not self.past_only)}; got {given(mask)}")
        if mask is None and self.past_only:
            raise UnsupportedPattern(
                f"{self.called} {self.past_only} and does not support attention to what comes later; pass "
                "mask=causal()"
            )
        if mask is None and cache is not None:
            raise UnsupportedPattern(
                f"{self.called} does not support a cache without a mask: tokens would see later ones, which "
                "have not come yet; pass mask=causal()"
            )
        if mask is not None and mask != _CAUSAL:
            raise UnsupportedPattern(
                f"{self.called} does not support a mask other than causal(), because {self.cut_by_masks}; "
                f"got {given(mask)}; say in padding= which tokens are none"
            )
        return super().forward(x, mask=mask, padding=padding, cache=cache, **call)

    def new_cache(self, batch: int = 1, *, window: int | None = None, **options: Any) -> KeyValueCache:
        if window is not None:
            raise UnsupportedPattern(
                f"{self.called} does not support a cache of recent tokens: {self.needs_all}; leave window "
                f"out; got {given(window)}"
            )
        return super().new_cache(batch, **options)
