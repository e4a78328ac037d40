"""Symbols of tokens: vectors that stand for a token without being made of its features."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polyhead.attend.function import attend
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn.projections import FanInLinear, at_least_one, divisors

__all__ = ["PositionalSymbols", "RelativeSymbols", "SymbolRetriever", "SymbolicAttention"]


class SymbolRetriever(nn.Module):
    """Makes the symbols of tokens. Layers may share one: set the attribute `symbols` of each to it."""

    acts_on = "keys"

    def forward(self, x: Float[Tensor, "B S dc"], places: int | Tensor) -> Float[Tensor, "B S d"]:
        """Symbols of the inputs `x`, which stand at `places`: from there on, or `(S,)`, or `(B, S)`."""
        raise NotImplementedError

    def flops(self, tokens: int) -> int:
        """Operations for so many tokens."""
        return 0


class SymbolicAttention(SymbolRetriever):
    """Symbols out of a library: s_i = concat_m(softmax((x_i W_m + b_m) T_mᵀ / √w) S_m), w = dim / heads.

    The templates T and the symbols S are drawn from the normal distribution.

    Args:
        inputs: width of x.
        dim: width d of a symbol.
        size: symbols n in the library.
        heads: m = 1..heads, a divisor of `dim`.
        device, dtype: of the parameters.
    """

    def __init__(
        self, inputs: int, dim: int, size: int, heads: int, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        at_least_one("SymbolicAttention", inputs=inputs, dim=dim, size=size, heads=heads)
        if dim % heads:
            raise ConfigError(
                f"symbol_heads must divide dim={dim}; got symbol_heads={heads}; allowed are {divisors(dim)}"
            )
        kind = {"device": device, "dtype": dtype}
        self.heads = heads
        self.query = FanInLinear(inputs, dim, bias=True, **kind)
        self.templates = nn.Parameter(torch.randn(size, dim, **kind))
        self.library = nn.Parameter(torch.randn(size, dim, **kind))

    def forward(self, x: Float[Tensor, "B S dc"], places: int | Tensor) -> Float[Tensor, "B S d"]:
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B m S w
        k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(0, 1).expand(len(x), -1, -1, -1)  # B m n w
            for t in (self.templates, self.library)
        )
        return attend(q, k, v).transpose(1, 2).flatten(2)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * (self.query.weight.numel() + 2 * self.library.numel())


class PositionalSymbols(SymbolRetriever):
    """A learned symbol for every position: s_i = library[i], drawn from the normal distribution.

    Args:
        dim: width d of a symbol.
        size: positions that have one.
        device, dtype: of the parameters.
    """

    def __init__(self, dim: int, size: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        at_least_one("PositionalSymbols", dim=dim, size=size)
        self.library = nn.Parameter(torch.randn(size, dim, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "B S dc"], places: int | Tensor) -> Float[Tensor, "B S d"]:
        if not isinstance(places, Tensor):
            size, stop = self.library.shape[0], places + x.shape[1]
            if stop > size:
                raise ShapeError(
                    f"there are symbols for {size} positions, but the call has {stop}; build with a larger "
                    "library, or with symbols='attention' or 'relative'"
                )
            places = torch.arange(places, stop, device=x.device)
        return self.library[places].expand(len(x), -1, -1)


class RelativeSymbols(nn.Module):
    """A learned symbol for every relative position: s_ij = library[reach + clip(j - i, -reach, reach)].

    They are drawn from the normal distribution. No token has one by itself, so that none is cached. Layers
    may share them as they do a `SymbolRetriever`.

    Args:
        dim: width d of a symbol.
        reach: distance from which on, in either direction, all symbols are the same; at least 1.
        device, dtype: of the parameters.
    """

    acts_on = "keys"

    def __init__(self, dim: int, reach: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        at_least_one("RelativeSymbols", dim=dim, reach=reach)
        self.reach = reach
        self.library = nn.Parameter(torch.randn(2 * reach + 1, dim, device=device, dtype=dtype))
