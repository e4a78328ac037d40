"""Keys and values with numbers and sharing maps of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.checks import given, several
from polyhead.errors import ConfigError
from polyhead.nn.projections import FanInLinear, Projection, at_least_one

__all__ = ["DecoupledProjection", "sharing_map"]


def sharing_map(name: str, value: Any, heads: int) -> tuple[int, ...]:
    """Which of the shared heads each of `heads` query heads reads, or a `ConfigError`.

    Args:
        name: of the argument, for messages.
        value: one index for every query head, every index from 0 to the largest used.
    """
    found = tuple(value) if several(value) else ()
    whole = all(isinstance(g, int) and not isinstance(g, bool) for g in found)
    if len(found) != heads or not whole or set(found) != set(range(max(found) + 1)):
        raise ConfigError(
            f"{name} must have an index for each of the {heads} heads, and use every index from 0 to its "
            f"largest; got {given(value)}"
        )
    return found


def _even(shared: Sequence[int]) -> bool:
    """Whether a map is that of groups in a row, all of one size."""
    groups = max(shared) + 1
    return len(shared) % groups == 0 and list(shared) == [
        h // (len(shared) // groups) for h in range(len(shared))
    ]


class DecoupledProjection(Projection):
    """Query head h reads key head `key_map[h]` and value head `value_map[h]`.

    Args:
        dim, heads, options: as of `Projection`.
        key_map, value_map: the maps, as `sharing_map` takes them.

    Attributes:
        key_heads, value_heads: distinct heads G_K and G_V; a cache holds these alone.
        kv_heads: key/value heads that the operator is given: as few as query heads that stand in a row and
            read the same pair allow.
        nested: groups in a row, the larger of G_K and G_V a multiple of the smaller: see `folded`.
    """

    key_pick: Tensor
    value_pick: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_map: Sequence[int],
        value_map: Sequence[int],
        kv_heads: int | None = None,
        **options: Any,
    ) -> None:
        at_least_one("DecoupledProjection", dim=dim, heads=heads)
        maps = sharing_map("key_map", key_map, heads), sharing_map("value_map", value_map, heads)
        key_heads, value_heads = (max(shared) + 1 for shared in maps)
        super().__init__(dim, heads, kv_heads=1, **options)
        kind = {"device": self.key.weight.device, "dtype": self.key.weight.dtype}
        for name, count, width in (
            ("key", key_heads, self.head_dim),
            ("value", value_heads, self.value_dim),
        ):
            bias = self.key.bias is not None
            setattr(self, name, FanInLinear(self.context_dim, count * width, bias=bias, **kind))
        self.heads = heads
        self.key_map, self.value_map = maps
        self.key_heads, self.value_heads = key_heads, value_heads
        few, many = sorted((key_heads, value_heads))
        self.nested = _even(self.key_map) and _even(self.value_map) and many % few == 0
        pairs = list(zip(*maps, strict=True))
        edges = [h for h in range(heads) if h == 0 or pairs[h] != pairs[h - 1]]
        each = math.gcd(heads, *edges)  # heads of a group: none straddles an edge
        self.kv_heads = heads // each
        for name, shared in zip(("key_pick", "value_pick"), maps, strict=True):
            pick = torch.tensor(shared[::each], device=self.key.weight.device)
            self.register_buffer(name, pick, persistent=False)

    @property
    def streams(self) -> tuple[tuple[int, int], ...]:
        return (self.key_heads, self.head_dim), (self.value_heads, self.value_dim)

    def keys_values(
        self, context: Float[Tensor, "B S dc"]
    ) -> tuple[Float[Tensor, "B Gk S D"], Float[Tensor, "B Gv S Dv"]]:
        k = self.key(context).unflatten(-1, (self.key_heads, self.head_dim))  # B S Gk D
        v = self.value(context).unflatten(-1, (self.value_heads, self.value_dim))  # B S Gv Dv
        if self.key_norm is not None:
            k = self.key_norm(k)
        return k.transpose(1, 2), v.transpose(1, 2)

    def gathered(
        self, k: Float[Tensor, "B Gk S D"], v: Float[Tensor, "B Gv S Dv"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S Dv"]]:
        """Keys and values in pairs; what is not shared unequally, or by all, is not copied."""
        return self._picked(k, self.key_map, self.key_pick), self._picked(v, self.value_map, self.value_pick)

    def _picked(self, z: Tensor, shared: tuple[int, ...], pick: Tensor) -> Tensor:
        if z.shape[1] == 1:
            return z.expand(-1, self.kv_heads, -1, -1)
        if z.shape[1] == self.kv_heads and _even(shared):
            return z
        return z.index_select(1, pick)

    def folded(
        self, q: Float[Tensor, "B H L D"], k: Float[Tensor, "B Gk S D"], v: Float[Tensor, "B Gv S Dv"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same pairs for nested maps, the groups of the fewer heads as items of the batch.

        (B·few, H/few, L, D), (B·few, many/few, S, D) and as many values: whichever of keys and values there
        are fewer of has one head an item, which is read several times where it stands. No row of a cache is
        copied.
        """
        few, many = sorted((self.key_heads, self.value_heads))

        def fold(z: Tensor) -> Tensor:
            z = z.unflatten(1, (few, z.shape[1] // few)).flatten(0, 1)
            return z.expand(-1, many // few, -1, -1) if z.shape[1] == 1 else z

        return q.unflatten(1, (few, self.heads // few)).flatten(0, 1), fold(k), fold(v)

    def flops(self, queries: int, keys: int) -> int:
        width = self.key_heads * self.head_dim + self.value_heads * self.value_dim
        return 2 * (queries * self.dim * self.heads * self.head_dim + keys * self.context_dim * width)
