"""Causal self-attention in which earlier tokens are read by a choice of its own."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from torch import Tensor

from polyhead.attend.masks import Mask, causal
from polyhead.checks import given
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.kv_cache import ContextCache, KeyValueCache
from polyhead.nn.projections import check_inputs, check_real

__all__ = ["CausalOnly"]

_CAUSAL = causal()


class CausalOnly(MultiHeadAttention):
    """`MultiHeadAttention` that takes `causal()` for its mask and nothing else, and says why.

    Attributes:
        name: of the mechanism.
        chooses: what it does, to say after the name, that makes no sense with what comes later.
        because: why another mask is refused.
        forgets: why a cache of recent tokens is refused.
    """

    name: ClassVar[str]
    chooses: ClassVar[str]
    because: ClassVar[str]
    forgets: ClassVar[str]

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
        check_inputs("x", x, self.projection.dim)
        if context is not None or getattr(cache, "holds_context", False):
            self._refuse_context()
        if padding is not None:
            check_real("x", padding, x)
        if mask is None:
            raise UnsupportedPattern(
                f"{self.name} {self.chooses} and does not support attention to what comes later; "
                "pass mask=causal()"
            )
        if not isinstance(mask, Mask):
            raise ConfigError(f"mask must be causal(); got {given(mask)}")
        if mask != _CAUSAL:
            raise UnsupportedPattern(
                f"{self.name} does not support a mask other than causal(), because {self.because}; got "
                f"{given(mask)}; say in padding= which tokens are none"
            )
        return super().forward(x, mask=mask, padding=padding, cache=cache, **call)

    def new_cache(self, batch: int = 1, *, window: int | None = None, **options: Any) -> KeyValueCache:
        if window is not None:
            raise UnsupportedPattern(
                f"{self.name} does not support a cache of recent tokens: {self.forgets}; "
                f"leave window out; got {given(window)}"
            )
        return super().new_cache(batch, **options)

    def new_context_cache(self, context: Tensor, **options: Any) -> ContextCache:
        self._refuse_context()

    def _refuse_context(self) -> NoReturn:
        raise UnsupportedPattern(
            f"{self.name} attends within one causal sequence and does not support a context; leave context "
            "out, and take grouped_query for cross-attention"
        )
