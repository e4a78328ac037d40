"""Self-attention over one whole sequence: no mask but padding, no context, no cache."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.checks import given
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.kv_cache import ContextCache, KeyValueCache
from polyhead.nn.projections import check_inputs, check_real

__all__ = ["WholeSequenceAttention"]


class WholeSequenceAttention(MultiHeadAttention):
    """`MultiHeadAttention` within one sequence that is there from its first token to its last.

    Attributes:
        called: the mechanism's name; errors begin with it.
        needs_all: why it needs all tokens at once.
    """

    called: ClassVar[str]
    needs_all: ClassVar[str]

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
        """Attend; see `MultiHeadAttention.forward`. There is no mask, no context and no cache."""
        check_inputs("x", x, self.projection.dim)
        if context is not None:
            self._refuse_context()
        if cache is not None:
            self._refuse_cache()
        if padding is not None:
            check_real("x", padding, x)
        if mask is not None:
            if not isinstance(mask, Mask):
                raise ConfigError(f"mask must be None; got {given(mask)}")
            raise UnsupportedPattern(
                f"{self.called} does not support a mask other than padding, because {self.needs_all}; got "
                f"{given(mask)}; say in padding= which tokens are none, and take grouped_query for calls "
                "with a mask"
            )
        return self._whole(x, padding=padding, **call)

    def _whole(self, x: Tensor, *, padding: Tensor | None, **call: Any) -> Tensor:
        """What `forward` gives for inputs that were looked at."""
        return self._call(x, padding=padding, **call)

    def _call(self, x: Tensor, **call: Any) -> Tensor:
        """`MultiHeadAttention.forward`."""
        return super().forward(x, **call)

    def new_cache(self, batch: int = 1, **options: Any) -> KeyValueCache:
        self._refuse_cache()

    def new_context_cache(self, context: Tensor, **options: Any) -> ContextCache:
        self._refuse_context()

    def _refuse_cache(self) -> NoReturn:
        raise UnsupportedPattern(
            f"{self.called} does not support decoding with a cache, because {self.needs_all}; call it "
            "with the whole sequence, and take grouped_query to decode"
        )

    def _refuse_context(self) -> NoReturn:
        raise UnsupportedPattern(
            f"{self.called} attends within one sequence and does not support a context; leave context out, "
            "and take grouped_query for cross-attention"
        )
