"""Queries and keys as complex numbers whose phases every head stretches."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polyhead.attend.precision import exact, wide
from polyhead.errors import ConfigError, unknown_name
from polyhead.nn.projections import Projection

__all__ = ["PhaseProjection"]

_STARTS = ("rotary", "random")


class PhaseProjection(Projection):
    """A projection whose queries and keys have their phases stretched, and queries shifted.

        |q| e^{iφ} → |q| e^{i(δφ + b)},   |k| e^{iφ} → |k| e^{iδφ}

    for each of the D/2 complex numbers of a head; coordinate m is a real part, m + D/2 its imaginary one. A
    phase that rounding carries past ±π makes another score, so autocast does not act here.

    Args:
        args, options: those of `Projection`.
        start: "rotary", δ = 1 and b = 0, which leaves everything as it is; or "random", δ normally
            distributed with variance 2/D.

    Attributes:
        stretch: δ, `(G, D/2)`: heads that share a key share it, as the pair has to.
        shift: b, `(H, D/2)`.
    """

    def __init__(self, *args: Any, start: str = "rotary", **options: Any) -> None:
        super().__init__(*args, **options)
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, since its coordinates are pairs; got {self.head_dim}")
        if not isinstance(start, str) or start not in _STARTS:
            raise unknown_name("start of complex rotation", start, _STARTS)
        half, weight = self.head_dim // 2, self.key.weight
        kind: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.stretch = nn.Parameter(torch.ones(self.kv_heads, half, **kind))
        self.shift = nn.Parameter(torch.zeros(self.query_heads, half, **kind))
        if start == "random":
            nn.init.normal_(self.stretch, std=math.sqrt(1 / half))

    def queries(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B H L D"]:
        stretch = self.stretch.repeat_interleave(self.query_heads // self.kv_heads, dim=0)
        dtype = _kept(x)
        with exact(x.device):
            return _turned(super().queries(x.to(self.query.weight.dtype)), stretch, self.shift).to(dtype)

    def keys_values(
        self, context: Float[Tensor, "B S dc"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S Dv"]]:
        dtype = _kept(context)
        with exact(context.device):
            k, v = super().keys_values(context.to(self.key.weight.dtype))
            return _turned(k, self.stretch, None).to(dtype), v.to(dtype)


def _kept(x: Tensor) -> torch.dtype:
    """The dtype of what is made of x, as autocast has it."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast and x.dtype != torch.float64 else x.dtype


def _turned(x: Tensor, stretch: Tensor, shift: Tensor | None) -> Tensor:
    """`(B, H, L, D)` with every phase φ made stretch·φ + shift."""
    re, im = x.to(wide(x.dtype)).chunk(2, dim=-1)
    # the phase of zero is 0, and has a gradient
    phase = torch.atan2(im, torch.where((re == 0) & (im == 0), 1.0, re))
    angle = (stretch.to(re.dtype)[:, None] - 1) * phase
    if shift is not None:
        angle = angle + shift.to(re.dtype)[:, None]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([re * cos - im * sin, re * sin + im * cos], dim=-1).to(x.dtype)
