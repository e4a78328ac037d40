"""Keys and values that are the inputs themselves, cut into heads."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.nn.projections import Projection, at_least_one, divisors

__all__ = ["SlicedProjection"]


class SlicedProjection(Projection):
    """Values are slices of the context, context_dim / heads wide, one a head; so are keys, if not projected.

    Args:
        dim, heads, context_dim, options: as of `Projection`.
        project_keys: whether keys have a projection of their own.
        head_dim: width of queries and keys; that of the slices where keys are slices.

    Attributes:
        key: None where keys are slices. There is no `value`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        project_keys: bool,
        head_dim: int | None = None,
        value_dim: int | None = None,
        context_dim: int | None = None,
        kv_heads: int | None = None,
        **options: Any,
    ) -> None:
        at_least_one("SlicedProjection", dim=dim, heads=heads)
        context_dim = dim if context_dim is None else context_dim
        at_least_one("SlicedProjection", context_dim=context_dim)
        if context_dim % heads:
            raise ConfigError(
                f"heads must divide the width {context_dim} of what is cut into values; got heads={heads}; "
                f"allowed are {divisors(context_dim)}"
            )
        width = context_dim // heads
        for name, given in (("value_dim", value_dim), ("head_dim", None if project_keys else head_dim)):
            if given not in (None, width):
                raise ConfigError(
                    f"{name} must be {width}, the width of a slice of the inputs, or left out; got {given}"
                )
        if not project_keys:
            head_dim = width
        super().__init__(
            dim, heads, kv_heads=1, head_dim=head_dim, value_dim=width, context_dim=context_dim, **options
        )
        self.kv_heads = heads
        del self.key, self.value
        self.key = None  # type: ignore[assignment]
        if project_keys:
            self.key = type(self.query)(
                context_dim,
                heads * self.head_dim,
                bias=self.query.bias is not None,
                device=self.query.weight.device,
                dtype=self.query.weight.dtype,
            )

    def slices(self, context: Float[Tensor, "B S dc"]) -> Float[Tensor, "B H S Dv"]:
        """The inputs, cut into heads; not copied, but under autocast."""
        if torch.is_autocast_enabled(context.device.type):
            context = context.to(torch.get_autocast_dtype(context.device.type))
        return context.unflatten(-1, (self.kv_heads, self.value_dim)).transpose(1, 2)

    def keys_values(
        self, context: Float[Tensor, "B S dc"]
    ) -> tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S Dv"]]:
        v = self.slices(context)
        if self.key is None:
            k = v
        else:
            k = self.key(context).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        return (k if self.key_norm is None else self.key_norm(k)), v

    def flops(self, queries: int, keys: int) -> int:
        made = 0 if self.key is None else keys * self.context_dim
        return 2 * (queries * self.dim + made) * self.heads * self.head_dim
