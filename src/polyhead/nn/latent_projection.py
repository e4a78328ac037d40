"""From inputs to queries and to one latent a token, of which keys and values of all heads are made.

x ──(query_down, norm)──> c_Q ──query──> q_h = [Dn | dr]          for every head h
c ──latent──> norm(dc) | dr                                       one row a token: what a cache holds
                 └──key──> k_h (Dn)   └──value──> v_h (Dv)        for every head
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polyhead.checks import place, whole
from polyhead.errors import ConfigError
from polyhead.nn.latent_plan import LatentSizes
from polyhead.nn.projections import FanInLinear, HeadNorm, at_least_one, divisors

__all__ = ["Absorbing", "LatentProjection"]


class Absorbing:
    """Maps from rows that all heads share to keys and values; they can move to the queries and the outputs.

    Attributes:
        kv_heads: heads G of keys and values.
        plain_dim, turned_dim: widths of a query that meets a key made of a row, and of one that meets a
            rotary key behind it.
        latent_dim: width of the rows, without the rotary key.
        sizes: what the orders of multiplication cost.
    """

    kv_heads: int
    plain_dim: int
    turned_dim: int
    head_dim: int
    latent_dim: int
    sizes: LatentSizes

    def maps(self, name: str) -> Float[Tensor, "G D dc"]:
        """The map to the "key" or to the "value" of every head."""
        weight: Tensor = getattr(self, name).weight
        return weight.unflatten(0, (self.kv_heads, -1))

    def absorb_key(self, q: Float[Tensor, "B H L Dn"]) -> Float[Tensor, "B H L dc"]:
        """q_h W_UK^h: queries for the rows themselves."""
        groups = q.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)  # B G (H/G · L) Dn
        wide = torch.einsum("bgnd,gdc->bgnc", groups, self.maps("key"))
        return wide.unflatten(2, (q.shape[1] // self.kv_heads, q.shape[2])).flatten(1, 2)

    def absorb_value(self, mixed: Float[Tensor, "B H L dc"]) -> Float[Tensor, "B H L Dv"]:
        """W_UV^h behind the mixing of rows: the outputs of the heads."""
        groups = mixed.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)  # B G (H/G · L) dc
        out = torch.einsum("bgnc,gvc->bgnv", groups, self.maps("value"))
        return out.unflatten(2, (mixed.shape[1] // self.kv_heads, mixed.shape[2])).flatten(1, 2)


class LatentProjection(Absorbing, nn.Module):
    """The maps of latent attention.

    Args:
        dim: width of the inputs d.
        heads: query heads H.
        kv_heads: heads G of keys and values, a divisor of H. Default H.
        head_dim: width Dn of queries and keys, without the rotary part.
        value_dim: width Dv of values.
        latent_dim: width dc of the latent of keys and values.
        rope_dim: width dr of the rotary part; 0 for none.
        query_latent_dim: width of a latent of the queries; None: they are made of the inputs.
        context_dim: width of the context. Default d.
        device, dtype: of the parameters.

    Attributes:
        head_dim: width of what is scored, Dn + dr.
        turned_dim: dr, the width that a position encoding turns.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int,
        value_dim: int,
        latent_dim: int,
        rope_dim: int,
        query_latent_dim: int | None = None,
        context_dim: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        context_dim = dim if context_dim is None else context_dim
        inner = dim if query_latent_dim is None else query_latent_dim
        at_least_one(
            "LatentProjection",
            dim=dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim,
            latent_dim=latent_dim, query_latent_dim=inner, context_dim=context_dim,
        )  # fmt: skip
        whole("rope_dim", rope_dim, 0)
        if heads % kv_heads:
            raise ConfigError(
                f"kv_heads must divide heads={heads}; got kv_heads={kv_heads}; allowed are {divisors(heads)}"
            )
        device, dtype = place("LatentProjection", device, dtype)
        self.dim, self.context_dim = dim, context_dim
        self.query_heads = self.heads = heads
        self.kv_heads = kv_heads
        self.plain_dim, self.turned_dim = head_dim, rope_dim
        self.head_dim, self.value_dim = head_dim + rope_dim, value_dim
        self.latent_dim = latent_dim
        self.sizes = LatentSizes(
            dim, context_dim, heads, kv_heads, inner, latent_dim, rope_dim, head_dim, value_dim,
            query_latent_dim is not None,
        )  # fmt: skip
        kind = {"device": device, "dtype": dtype}
        compressed = query_latent_dim is not None
        self.query_down = FanInLinear(dim, inner, bias=False, **kind) if compressed else None
        self.query_norm = HeadNorm(inner, eps=1e-6, **kind) if compressed else None
        self.query = FanInLinear(inner, heads * self.head_dim, bias=False, **kind)
        self.latent = FanInLinear(context_dim, latent_dim + rope_dim, bias=False, **kind)
        self.latent_norm = HeadNorm(latent_dim, eps=1e-6, **kind)
        self.key = FanInLinear(latent_dim, kv_heads * head_dim, bias=False, **kind)
        self.value = FanInLinear(latent_dim, kv_heads * value_dim, bias=False, **kind)

    @property
    def streams(self) -> tuple[tuple[int, int], ...]:
        """One row a token: the latent and, behind it, the rotary key that all heads share."""
        return ((1, self.latent_dim + self.turned_dim),)

    def query_latents(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B L p"]:
        """What the queries are made of: their latents, or the inputs."""
        if self.query_down is None or self.query_norm is None:
            return x
        return self.query_norm(self.query_down(x))

    def queries(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B H L Dn+dr"]:
        """Queries, not yet turned; the last dr of each are its rotary part."""
        return self.query(self.query_latents(x)).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def latents(self, context: Float[Tensor, "B S dc"]) -> tuple[Tensor, Tensor]:
        """Latents `(B, 1, S, dc)`, normalised, and rotary keys `(B, 1, S, dr)`, not yet turned."""
        both = self.latent(context)[:, None]
        latent, turned = both.split([self.latent_dim, self.turned_dim], dim=-1)
        return self.latent_norm(latent), turned

    def expand(self, rows: Float[Tensor, "B 1 S dc+dr"]) -> tuple[Tensor, Tensor]:
        """Keys `(B, G, S, Dn+dr)` and values `(B, G, S, Dv)` of what a cache holds."""
        latent, turned = rows.split([self.latent_dim, self.turned_dim], dim=-1)
        latent = latent[:, 0]
        k = self.key(latent).unflatten(-1, (self.kv_heads, self.plain_dim)).transpose(1, 2)  # B G S Dn
        v = self.value(latent).unflatten(-1, (self.kv_heads, self.value_dim)).transpose(1, 2)  # B G S Dv
        if self.turned_dim:
            k = torch.cat([k, turned.expand(-1, self.kv_heads, -1, -1)], dim=-1)
        return k, v

    def fold(self) -> Float[Tensor, "H p dc"]:
        """W_UQ^h W_UK^hᵀ of every head, without the rotary part."""
        query = self.query.weight.unflatten(0, (self.kv_heads, -1, self.head_dim))  # G H/G Dn+dr p
        plain = query[:, :, : self.plain_dim]
        return torch.einsum("grdp,gdc->grpc", plain, self.maps("key")).flatten(0, 1)

    def turned_queries(self, inner: Float[Tensor, "B L p"]) -> Float[Tensor, "B H L dr"]:
        """The rotary part of the queries alone, not yet turned."""
        weight = self.query.weight.unflatten(0, (self.heads, self.head_dim))[:, self.plain_dim :]
        turned = nn.functional.linear(inner, weight.flatten(0, 1))
        return turned.unflatten(-1, (self.heads, self.turned_dim)).transpose(1, 2)
