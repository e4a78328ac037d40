"""Queries, keys and values in a small latent, mixed with those of the tokens just before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.attend.precision import wide
from polyhead.checks import flag, place, whole
from polyhead.errors import ConfigError
from polyhead.nn.projections import FanInLinear, at_least_one, divisors

__all__ = ["CompressedProjection"]

_EPS = 1e-6


class CompressedProjection(nn.Module):
    """What `compressed_convolutional` makes of its inputs; the equations are in its file.

    Args:
        dim: width d of the inputs.
        heads: query heads H.
        kv_heads: key/value heads G, a divisor of `heads`.
        head_dim: width D of a head in the latent.
        kernels: t0 and t1, tokens that the two convolutions reach over; 1 for none but the token itself.
        bias: whether the linear maps have a bias.
        qk_norm: give queries and keys one length, keys times exp(temperature).
        qk_mean: add the means of queries and keys.
        value_shift: the second half of the values is that of the token before.
        device, dtype: of the parameters.

    Attributes:
        reach: tokens before a token that its rows depend on.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int,
        head_dim: int,
        kernels: tuple[int, int] = (2, 2),
        bias: bool = False,
        qk_norm: bool = True,
        qk_mean: bool = True,
        value_shift: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        at_least_one("CompressedProjection", dim=dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        if heads % kv_heads:
            raise ConfigError(
                f"kv_heads must divide heads={heads}; got kv_heads={kv_heads}; allowed are {divisors(heads)}"
            )
        t0, t1 = (whole("kernels", t, 1) for t in kernels)
        for name, value in (("bias", bias), ("qk_mean", qk_mean), ("value_shift", value_shift)):
            flag(name, value)
        flag("qk_norm", qk_norm)
        device, dtype = place("CompressedProjection", device, dtype)
        kind = {"device": device, "dtype": dtype}
        self.dim = self.context_dim = dim
        self.heads = self.query_heads = heads
        self.kv_heads, self.head_dim, self.value_dim = kv_heads, head_dim, head_dim
        self.kernels, self.qk_mean, self.qk_norm = (t0, t1), qk_mean, qk_norm
        self.reach = max(t0 + t1 - 2, int(value_shift))
        latent, channels = kv_heads * head_dim, (heads + kv_heads) * head_dim
        earlier = latent // 2 if value_shift else 0
        self.query = FanInLinear(dim, heads * head_dim, bias=bias, **kind)
        self.key = FanInLinear(dim, latent, bias=bias, **kind)
        self.value = FanInLinear(dim, latent - earlier, bias=bias, **kind)
        self.previous = FanInLinear(dim, earlier, bias=bias, **kind) if earlier else None
        self.channels = nn.Conv1d(channels, channels, t0, groups=channels, **kind)
        self.within = nn.Conv1d(channels, channels, t1, groups=heads + kv_heads, **kind)
        self.temperature = nn.Parameter(torch.zeros(kv_heads, **kind)) if qk_norm else None

    @property
    def streams(self) -> tuple[tuple[int, int], ...]:
        """(heads, width) of what a cache holds: keys, then values."""
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)

    def forward(self, x: Tensor, begun: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, H, L, D)`, keys and values `(B, G, L, D)`.

        Args:
            x: `(B, L, d)`; where it has `begun`, `(B, reach + L, d)` with the tokens before.
        """
        before = self.reach if begun else 0
        if x.shape[1] == before:  # no token: that of one made up, which is cut off
            q, k, v = self.forward(F.pad(x, (0, 0, 0, 1)), begun)
            return q[:, :, :0], k[:, :, :0], v[:, :, :0]
        q, k = self.query(x), self.key(x)
        z, v = torch.cat([q, k], dim=-1), self.value(x)
        if self.previous is not None:
            late = self.previous(x)
            first = late[:, :0] if begun else self._nothing(late, 1, self.previous)
            late = torch.cat([first, late[:, :-1] if not begun else late[:, before - 1 : -1]], dim=1)
            v = torch.cat([v[:, before:], late], dim=-1)
        t0, t1 = self.kernels
        if begun:
            z = z[:, before - (t0 + t1 - 2) :]
        elif t0 + t1 > 2:
            both = None if self.query.bias is None else torch.cat([self.query.bias, self.key.bias])
            z = torch.cat([self._nothing(z, t0 + t1 - 2, both), z], dim=1)
        mixed = self.within(self.channels(z.transpose(1, 2))).transpose(1, 2)  # B L channels
        mixed = mixed.unflatten(-1, (self.heads + self.kv_heads, self.head_dim))
        new_q, new_k = mixed.split([self.heads, self.kv_heads], dim=2)  # B L H D
        if self.qk_mean:
            q, k = (own[:, before:].unflatten(-1, (-1, self.head_dim)) for own in (q, k))
            group = self.heads // self.kv_heads
            means = (q.unflatten(2, (-1, group)) + k[:, :, :, None]) / 2  # B L G H/G D
            new_q, new_k = new_q + means.flatten(2, 3), new_k + means.mean(3)
        if self.temperature is not None:
            new_q = self._of_length(new_q)
            new_k = self._of_length(new_k, self.temperature.exp()[:, None])
        v = v.unflatten(-1, (self.kv_heads, self.head_dim))
        return new_q.transpose(1, 2), new_k.transpose(1, 2), v.transpose(1, 2)

    def _nothing(self, like: Tensor, count: int, bias: Any) -> Tensor:
        """What a linear map gives for `count` tokens of zeros, its bias."""
        bias = bias.bias if isinstance(bias, nn.Linear) else bias
        shape = (like.shape[0], count, like.shape[2])
        return like.new_zeros(shape) if bias is None else bias.to(like.dtype).expand(shape)

    def _of_length(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        found = F.normalize(x.to(wide(x.dtype)), dim=-1, eps=_EPS) * self.head_dim**0.5
        return (found if factor is None else found * factor).to(x.dtype)

    def spread(self, q: Tensor) -> Tensor:
        """Queries for all heads that attend."""
        return q

    def flops(self, queries: int, keys: int) -> int:
        """Operations for a sequence of so many tokens."""
        t0, t1 = self.kernels
        channels = (self.heads + self.kv_heads) * self.head_dim
        linear = queries * self.dim * (channels + self.kv_heads * self.head_dim)
        return 2 * (linear + (queries + t1 - 1) * channels * t0 + queries * channels * self.head_dim * t1)
