"""Self-attention over one whole sequence: no mask but padding, no context, no cache."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.checks import given
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.nn.kv_cache import KeyValueCache
from polyhead.nn.self_only import SelfOnlyAttention

__all__ = ["WholeSequenceAttention"]


class WholeSequenceAttention(SelfOnlyAttention):
    """`MultiHeadAttention` within one sequence that is there from its first token to its last.

    Attributes:
        needs_all: why it needs all tokens at once.
    """

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
        self._check_self(x, context, cache, padding)
        if cache is not None:
            self._refuse_cache()
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

    def _refuse_cache(self) -> NoReturn:
        raise UnsupportedPattern(
            f"{self.called} does not support decoding with a cache, because {self.needs_all}; call it "
            "with the whole sequence, and take grouped_query to decode"
        )
