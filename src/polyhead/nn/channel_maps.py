"""Linear maps between channels, one for each head, that let the channels mix little, somewhat or at will."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polyhead.errors import ConfigError, unknown_name
from polyhead.nn.projections import FanInLinear, Projection

__all__ = [
    "MIXING",
    "ChannelNorm",
    "ChanneledOutput",
    "ChanneledProjection",
    "IndependentMap",
    "KroneckerMap",
    "channel_map",
]

MIXING = ("independent", "kronecker", "dense")


class IndependentMap(nn.Module):
    """Channel m of the outputs is a linear map of channel m of the inputs: diag(W_1, ..., W_n) x + b.

    Args:
        channels: n, a divisor of both widths.
        inputs, outputs: widths of all channels together.
        bias: whether there is b, zeros at the start.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(channels, outputs // channels, inputs // channels, **kind))
        self.bias = nn.Parameter(torch.zeros(outputs, **kind)) if bias else None
        bound = (3 * channels / inputs) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Float[Tensor, "B L i"]) -> Float[Tensor, "B L o"]:
        channels = x.unflatten(-1, (self.weight.shape[0], -1))  # B L n i/n
        y = torch.einsum("blni,noi->blno", channels, self.weight.to(_dtype(x))).flatten(2)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def flops(self, tokens: int) -> int:
        """Operations for so many tokens."""
        return 2 * tokens * self.weight.numel()


class KroneckerMap(nn.Module):
    """Channels are sums of whole channels, (M ⊗ I) x + b: M is as near to the identity as its shape allows.

    Output channel m reads input channel ⌊m·n/N⌋ at the start, and all of them with noise of deviation 0.02.

    Args:
        width: of a channel; it divides both widths.
        inputs, outputs: widths of all channels together; M is (outputs / width, inputs / width).
        bias: whether there is b, zeros at the start.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        width: int,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.width = width
        made, read = outputs // width, inputs // width
        start = 0.02 * torch.randn(made, read, **kind)
        for m in range(made):
            start[m, m * read // made] += 1
        self.weight = nn.Parameter(start)
        self.bias = nn.Parameter(torch.zeros(outputs, **kind)) if bias else None

    def forward(self, x: Float[Tensor, "B L i"]) -> Float[Tensor, "B L o"]:
        y = (self.weight.to(_dtype(x)) @ x.unflatten(-1, (-1, self.width))).flatten(2)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def flops(self, tokens: int) -> int:
        """Operations for so many tokens."""
        return 2 * tokens * self.weight.numel() * self.width


def _dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


ChannelMap = IndependentMap | KroneckerMap | FanInLinear


def channel_map(
    name: str, mixing: str, inputs: int, heads: int, width: int, *, back: bool = False, **options: Any
) -> ChannelMap:
    """The map from `inputs` numbers to heads of a width, or with `back` from those to `inputs` numbers.

    Args:
        name: what messages call `mixing`.
        mixing: one of `MIXING`.
        options: `bias`, `device` and `dtype`.
    """
    if not isinstance(mixing, str) or mixing not in MIXING:
        raise unknown_name(f"{name}: a mixing of channels", mixing, MIXING)
    sizes = (heads * width, inputs) if back else (inputs, heads * width)
    if mixing == "dense":
        return FanInLinear(*sizes, **options)
    parts, of = (heads, "heads") if mixing == "independent" else (width, "the width of a head")
    if inputs % parts:
        raise ConfigError(f"{name}={mixing!r} needs {of}, {parts}, to divide {inputs}; take {name}='dense'")
    return (IndependentMap if mixing == "independent" else KroneckerMap)(parts, *sizes, **options)


def map_flops(part: ChannelMap, tokens: int) -> int:
    """Operations of a channel map for so many tokens."""
    return 2 * tokens * part.weight.numel() if isinstance(part, FanInLinear) else part.flops(tokens)


class ChanneledProjection(Projection):
    """A projection each of whose maps mixes the channels in its own way.

    Args:
        dim, heads, options: those of `Projection`.
        mixing: of the queries, keys and values, out of `MIXING`.
        pair: x and the context are two streams side by side, `(B, L, 2·d)`: queries and keys are made of the
            first, values of the second.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mixing: tuple[str, str, str] = ("dense", "dense", "kronecker"),
        pair: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, **options)
        kind: dict[str, Any] = {"device": self.query.weight.device, "dtype": self.query.weight.dtype}
        kind["bias"] = self.key.bias is not None
        sizes = (
            ("query", self.dim, self.query_heads, self.head_dim),
            ("key", self.context_dim, self.kv_heads, self.head_dim),
            ("value", self.context_dim, self.kv_heads, self.value_dim),
        )
        for (name, *size), how in zip(sizes, mixing, strict=True):
            if how != "dense":
                setattr(self, name, channel_map(f"{name}_map", how, *size, **kind))
        self.pair = pair
        if pair:
            self.dim, self.context_dim = 2 * self.dim, 2 * self.context_dim

    def queries(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B H L D"]:
        return super().queries(x.chunk(2, -1)[0] if self.pair else x)

    def keys_values(
        self, context: Float[Tensor, "B S dc"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S Dv"]]:
        if not self.pair:
            return super().keys_values(context)
        first, second = context.chunk(2, -1)
        k = self.key(first).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.value(second).unflatten(-1, (self.kv_heads, self.value_dim))
        return (k if self.key_norm is None else self.key_norm(k)).transpose(1, 2), v.transpose(1, 2)

    def flops(self, queries: int, keys: int) -> int:
        rows = ((self.query, queries), (self.key, keys), (self.value, keys))
        return sum(map_flops(part, tokens) for part, tokens in rows)


class ChanneledOutput(nn.Module):
    """Heads `(B, H, L, Dv)` brought back to `(B, L, d)` by a map that mixes the channels in one way.

    Args:
        dim, heads, value_dim, options: those of `OutputProjection`.
        mixing: one of `MIXING`.
    """

    def __init__(self, dim: int, heads: int, value_dim: int, *, mixing: str, **options: Any) -> None:
        super().__init__()
        self.map = channel_map("output_map", mixing, dim, heads, value_dim, back=True, **options)

    def forward(self, heads: Float[Tensor, "B H L Dv"]) -> Float[Tensor, "B L d"]:
        return self.map(heads.transpose(1, 2).flatten(2))

    def flops(self, queries: int) -> int:
        """Operations for so many query tokens."""
        return map_flops(self.map, queries)


class ChannelNorm(nn.Module):
    """Layer normalisation of every channel by itself, with a gain and an offset for each number.

    Args:
        dim: width d of all channels.
        channels: H, a divisor of `dim`.
        eps: added to the variance.
        device, dtype: of gain and offset.
    """

    def __init__(
        self, dim: int, channels: int, *, eps: float = 1e-6, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if dim % channels:
            raise ConfigError(f"channels must divide dim={dim}; got {channels}")
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B L d"]:
        width = x.shape[-1] // self.channels
        y = F.layer_norm(x.unflatten(-1, (self.channels, width)), (width,), eps=self.eps).flatten(-2)
        return (y.to(x.dtype) * self.weight.to(x.dtype)) + self.bias.to(x.dtype)
