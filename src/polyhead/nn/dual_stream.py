"""Transformer layers over two streams: one that attention writes, one that the MLPs write."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polyhead.attend.masks import Mask
from polyhead.checks import given, number, several
from polyhead.errors import ConfigError
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.channel_maps import ChanneledProjection, ChannelNorm
from polyhead.nn.cost import Cost
from polyhead.nn.inputs import check_inputs
from polyhead.nn.projections import at_least_one
from polyhead.nn.stack import Mlp, StackCache

__all__ = ["DualStreams", "StreamBlock"]


class StreamBlock(nn.Module):
    """One layer: t ← t + attention(norm(t + c)), c ← c + mlp(norm(t + c)).

    Values are made of norm(t) alone where the attention's projection is a `ChanneledProjection` of a pair.

    Args:
        attention: the attention module.
        dim: width d of each stream.
        mlp: width of the MLP.
        channels: of the norms; 1 is ordinary layer normalisation.
        frozen: the token stream stays as it is, attention writes to the context stream.
        device, dtype: of norms and MLP.
    """

    def __init__(
        self,
        attention: MultiHeadAttention,
        dim: int,
        *,
        mlp: int,
        channels: int,
        frozen: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        at_least_one("StreamBlock", dim=dim, mlp=mlp, channels=channels)
        kind = {"device": device, "dtype": dtype}
        projection = attention.projection
        self.norm = ChannelNorm(dim, channels, **kind)
        self.value_norm = None
        if isinstance(projection, ChanneledProjection) and projection.pair:
            self.value_norm = ChannelNorm(dim, channels, **kind)
        self.attention = attention
        self.mlp_norm = ChannelNorm(dim, channels, **kind)
        self.mlp = Mlp(dim, mlp, **kind)
        self.frozen = frozen

    def forward(
        self, token: Tensor, context: Tensor, shares: tuple[float, float] = (1.0, 1.0), **call: Any
    ) -> tuple[Tensor, Tensor]:
        """Both streams behind the layer; `shares` are the factors with which it reads them."""
        x = self.norm(_sum(token, context, shares))
        if self.value_norm is not None:
            x = torch.cat([x, self.value_norm(shares[0] * token)], dim=-1)
        y = self.attention(x, **call)
        if self.frozen:
            context = context + y
        else:
            token = token + y
        return token, context + self.mlp(self.mlp_norm(_sum(token, context, shares)))


def _sum(token: Tensor, context: Tensor, shares: tuple[float, float]) -> Tensor:
    if shares == (1.0, 1.0):
        return token + context
    return shares[0] * token + shares[1] * context


class DualStreams(nn.Module):
    """Layers over two streams, called as a stack of attention layers is: y = norm(t + c).

    The token stream t starts as x, the context stream c as zeros.

    Args:
        blocks: first to last.
        dim: width d.
        channels: of the norm of the output.
        device, dtype: of that norm.
    """

    def __init__(
        self,
        blocks: Sequence[StreamBlock],
        dim: int,
        *,
        channels: int,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        found = list(blocks) if several(blocks) else []
        if not found or not all(isinstance(block, StreamBlock) for block in found):
            raise ConfigError(f"blocks must be StreamBlocks, at least one; got {given(blocks)}")
        self.dim = dim
        self.blocks: Any = nn.ModuleList(found)
        self.norm = ChannelNorm(dim, channels, device=device, dtype=dtype)
        self._shares = self._read = (1.0, 1.0)

    @property
    def attention(self) -> tuple[MultiHeadAttention, ...]:
        """The attention modules, first to last."""
        return tuple(block.attention for block in self.blocks)

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        *,
        mask: Mask | None = None,
        padding: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "*B L"] | None = None,
        cache: StackCache | None = None,
    ) -> Float[Tensor, "B L d"]:
        """Run the layers; the arguments are those of `MultiHeadAttention.forward`."""
        streams = self.streams(x, mask=mask, padding=padding, positions=positions, cache=cache)
        return self.norm(_sum(*streams, self._read))

    def streams(
        self, x: Float[Tensor, "B L d"], *, cache: StackCache | None = None, **call: Any
    ) -> tuple[Float[Tensor, "B L d"], Float[Tensor, "B L d"]]:
        """The token stream and the context stream behind the last layer."""
        check_inputs("x", x, self.dim)
        if cache is not None and (not isinstance(cache, StackCache) or len(cache.layers) != len(self.blocks)):
            raise ConfigError(f"cache must be what new_cache of this module gives; got {given(cache)}")
        token, context = x, torch.zeros_like(x)
        for n, block in enumerate(self.blocks):
            own = None if cache is None else cache.layers[n]
            token, context = block(token, context, self._shares, cache=own, **call)
        return token, context

    @contextmanager
    def sharing(
        self, token: float = 1.0, context: float = 1.0, *, everywhere: bool = False
    ) -> Iterator[None]:
        """Within the block, the streams are read with these factors: 0 ablates one.

        Args:
            token, context: the factors.
            everywhere: also where layers read them, not only at the output.
        """
        shares = (number("token", token), number("context", context))
        before = self._shares, self._read
        self._read = shares
        self._shares = shares if everywhere else self._shares
        try:
            yield
        finally:
            self._shares, self._read = before

    def new_cache(self, batch: int = 1, **options: Any) -> StackCache:
        """An empty cache for every layer; the options are those of `AttentionModule.new_cache`."""
        return StackCache([layer.new_cache(batch, **options) for layer in self.attention])

    def cost(self, length: int, batch: int = 1, *, dtype: torch.dtype | None = None) -> Cost:
        """What one forward pass of all layers costs; the products of MLPs count as projections."""
        costs = [layer.cost(length, batch, dtype=dtype) for layer in self.attention]
        fields = {f.name: sum(getattr(cost, f.name) for cost in costs) for f in dataclasses.fields(Cost)}
        weights = sum(block.mlp.up.weight.numel() + block.mlp.down.weight.numel() for block in self.blocks)
        fields["projections"] += 2 * batch * length * weights
        fields["parameters"] = sum(p.numel() for p in self.parameters())
        return Cost(**fields)
