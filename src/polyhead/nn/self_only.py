"""Self-attention alone: a context is refused, in calls and for caches."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from polyhead.errors import UnsupportedPattern
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.inputs import check_inputs, check_real
from polyhead.nn.kv_cache import ContextCache

__all__ = ["SelfOnlyAttention"]


class SelfOnlyAttention(MultiHeadAttention):
    """`MultiHeadAttention` within one sequence.

    Attributes:
        called: the mechanism's name; errors begin with it.
        within: what it does within a sequence, for the error that a context raises.
        instead: the mechanism to take for cross-attention.
    """

    called: str
    within: str = "attends within one sequence"
    instead: str = "grouped_query"

    def forward(self, x: Tensor, context: Tensor | None = None, **call: Any) -> Tensor:
        """Attend; see `MultiHeadAttention.forward`. There is no context."""
        self._check_self(x, context, call.get("cache"))
        return super().forward(x, **call)

    def new_context_cache(self, context: Tensor, **options: Any) -> ContextCache:
        """There is none.

        Raises:
            UnsupportedPattern: always.
        """
        self._refuse_context()

    def _check_self(
        self, x: Tensor, context: Tensor | None, cache: object, padding: Tensor | None = None
    ) -> None:
        """Look at the inputs of a call, for those that have more to look at before they attend."""
        check_inputs("x", x, self.projection.dim)
        if context is not None or getattr(cache, "holds_context", False):
            self._refuse_context()
        if padding is not None:
            check_real("x", padding, x)

    def _refuse_context(self) -> NoReturn:
        raise UnsupportedPattern(
            f"{self.called} {self.within} and does not support a context; leave context out, and take "
            f"{self.instead} for cross-attention"
        )
