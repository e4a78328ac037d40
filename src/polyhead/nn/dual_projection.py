"""Projections of self-attention heads and of relational heads side by side, and the way back."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polyhead.checks import flag
from polyhead.errors import ConfigError
from polyhead.nn.projections import FanInLinear, OutputProjection, Projection, at_least_one, divisors

__all__ = ["DualOutput", "DualProjection"]


class DualProjection(Projection):
    """Queries and keys of all heads, values of the first ones, relations and symbols of the last ones.

    Args:
        dim, heads, options: those of `Projection`.
        kv_heads: key heads G; the heads of one are all relational or none.
        relational_heads: how many heads are relational.
        relations: R.
        relation_dim: width P of the vectors whose products are the relations. Default so that R·P is the
            width of all relational heads.
        symmetric: whether receiver and sender have one map.

    Attributes:
        value: that of the heads that are not relational; None without any.
        relation_query, relation_key: `(R·P, d)`, the same module where symmetric.
        symbol: from symbols, of width d, to what relational heads take for values.
    """

    value: Any
    relation_query: FanInLinear
    relation_key: FanInLinear
    symbol: FanInLinear

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int,
        relational_heads: int,
        relations: int,
        relation_dim: int | None = None,
        symmetric: bool = False,
        **options: Any,
    ) -> None:
        flag("symmetric", symmetric)
        super().__init__(dim, heads, kv_heads=kv_heads, **options)
        at_least_one("DualProjection", relations=relations)
        group, own = heads // kv_heads, heads - relational_heads
        if kv_heads > heads or own % group:
            raise ConfigError(
                f"kv_heads={kv_heads} gives {group} heads the same keys, which must divide the {own} heads "
                f"that are not relational; relational_heads is {relational_heads}"
            )
        if relation_dim is None:
            width = relational_heads * self.head_dim
            if width % relations:
                raise ConfigError(
                    f"relations must divide {width}, the width of all relational heads, when relation_dim is "
                    f"not given; got {relations}; allowed are {divisors(width)}"
                )
            relation_dim = max(1, width // relations)
        at_least_one("DualProjection", relation_dim=relation_dim)
        self.relational_heads, self.own_heads = relational_heads, own
        self.own_kv_heads, self.symbol_heads = own // group, relational_heads // group
        self.relations, self.relation_dim = relations, relation_dim
        kind: dict[str, Any] = {"device": self.query.weight.device, "dtype": self.query.weight.dtype}
        kind["bias"] = self.key.bias is not None
        self.value = None
        if own:
            self.value = FanInLinear(self.context_dim, self.own_kv_heads * self.value_dim, **kind)
        if not relational_heads:
            return
        if symmetric and self.context_dim != dim:
            raise ConfigError(
                f"symmetric relations need context_dim to be dim={dim}; got context_dim={self.context_dim}"
            )
        self.relation_query = FanInLinear(dim, relations * relation_dim, **kind)
        self.relation_key = (
            self.relation_query
            if symmetric
            else FanInLinear(self.context_dim, relations * relation_dim, **kind)
        )
        self.symbol = FanInLinear(dim, self.symbol_heads * self.value_dim, **kind)
        for part, lane in (
            (self.relation_query, "queries"),
            (self.relation_key, "keys"),
            (self.symbol, "keys"),
        ):
            part.acts_on = lane  # type: ignore[assignment]

    @property
    def streams(self) -> tuple[tuple[int, int], ...]:
        """Keys of all heads, then values, then what relations are made of and symbols."""
        found = [(self.kv_heads, self.head_dim)]
        if self.own_heads:
            found.append((self.own_kv_heads, self.value_dim))
        if self.relational_heads:
            found += [(1, self.relations * self.relation_dim), (self.symbol_heads, self.value_dim)]
        return tuple(found)

    def keys(self, context: Float[Tensor, "B S dc"]) -> Float[Tensor, "B G S D"]:
        """Keys of all heads."""
        k = self.key(context).unflatten(-1, (self.kv_heads, self.head_dim))
        return (k if self.key_norm is None else self.key_norm(k)).transpose(1, 2)

    def values(self, context: Float[Tensor, "B S dc"]) -> Float[Tensor, "B Gs S Dv"]:
        """Values of the heads that are not relational."""
        v: Tensor = self.value(context)
        return v.unflatten(-1, (self.own_kv_heads, self.value_dim)).transpose(1, 2)

    def symbol_values(self, symbols: Float[Tensor, "B S d"]) -> Float[Tensor, "B Gr S Dv"]:
        """What relational heads take from symbols."""
        return self.symbol(symbols).unflatten(-1, (self.symbol_heads, self.value_dim)).transpose(1, 2)

    def flops(self, queries: int, keys: int) -> int:
        """Operations for so many tokens, but those of `symbol`, which knows of no number of symbols."""
        found = queries * self.query.weight.numel() + keys * self.key.weight.numel()
        if self.own_heads:
            found += keys * self.value.weight.numel()
        if self.relational_heads:
            found += queries * self.relation_query.weight.numel()
            found += keys * self.relation_key.weight.numel()
        return 2 * found


class DualOutput(nn.Module):
    """An output projection for the first heads and one for the relational ones; their outputs side by side.

    Each makes the share of the d outputs that its heads have among all.

    Args:
        dim, heads, value_dim, options: those of `OutputProjection`.
        relational_heads: how many heads, the last ones, are relational.
    """

    def __init__(
        self, dim: int, heads: int, value_dim: int, *, relational_heads: int, **options: Any
    ) -> None:
        super().__init__()
        self.own_heads = heads - relational_heads
        width = dim * self.own_heads // heads
        for name, count, size in (
            ("own", self.own_heads, width),
            ("relational", relational_heads, dim - width),
        ):
            part = OutputProjection(size, count, value_dim, **options) if count else None
            setattr(self, name, part)

    def _parts(self) -> list[OutputProjection]:
        return [part for part in (self.own, self.relational) if isinstance(part, OutputProjection)]

    def forward(self, heads: Float[Tensor, "B H L Dv"]) -> Float[Tensor, "B L d"]:
        parts = self._parts()
        if len(parts) == 1:
            return parts[0](heads)
        first, last = heads[:, : self.own_heads], heads[:, self.own_heads :]
        return torch.cat([parts[0](first), parts[1](last)], dim=-1)

    def flops(self, queries: int) -> int:
        """Operations for so many query tokens."""
        return sum(part.flops(queries) for part in self._parts())
