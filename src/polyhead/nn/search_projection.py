"""Projections with a second query, which searches where the first one reads."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from polyhead.nn.projections import FanInLinear, HeadNorm, Projection, split_heads

__all__ = ["SearchProjection"]


class SearchProjection(Projection):
    """`Projection` with a search query of every query head, as wide as its query.

    Args:
        dim, heads, options: those of `Projection`.

    Attributes:
        search: `(H·D, d)`.
        search_norm: of search queries, where queries are normalised.
    """

    def __init__(self, dim: int, heads: int, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        kind: dict[str, Any] = {"device": self.query.weight.device, "dtype": self.query.weight.dtype}
        self.search = FanInLinear(
            dim, self.query_heads * self.head_dim, bias=self.query.bias is not None, **kind
        )
        self.search.acts_on = "queries"  # type: ignore[assignment]
        self.search_norm = None if self.query_norm is None else HeadNorm(self.head_dim, eps=1e-6, **kind)

    def searches(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B H L D"]:
        """Search queries of every head."""
        q = split_heads(self.search(x), self.query_heads, self.head_dim)
        return (q if self.search_norm is None else self.search_norm(q)).transpose(1, 2)

    def flops(self, queries: int, keys: int) -> int:
        return super().flops(queries, keys) + 2 * queries * self.search.weight.numel()
