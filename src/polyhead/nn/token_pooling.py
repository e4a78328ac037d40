"""Tokens blended with their neighbours, each at scales that it weighs for itself."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polyhead.checks import flag, given, number, whole
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn.projections import HeadNorm

__all__ = ["Layout", "TokenPooling", "check_class_token", "check_layout"]

Layout = str | tuple[int, int]


def check_layout(layout: Any) -> Layout:
    """ "past", "around" or (height, width), or a `ConfigError`."""
    if isinstance(layout, list):
        layout = tuple(layout)
    if layout in ("past", "around"):
        return layout
    if isinstance(layout, tuple) and len(layout) == 2:
        return whole("layout: height", layout[0], 1), whole("layout: width", layout[1], 1)
    raise ConfigError(
        'layout must be "past", "around", or (height, width) of a grid of tokens; got ' + given(layout)
    )


def check_class_token(class_token: bool, layout: Layout) -> bool:
    """Whether a token stands before those of a grid, or a `ConfigError`."""
    flag("class_token", class_token)
    if class_token and isinstance(layout, str):
        raise ConfigError(
            f"class_token: with layout={layout!r} every token has a place among the others; it takes a grid, "
            "layout=(height, width)"
        )
    return class_token


class TokenPooling(nn.Module):
    """Every token becomes a mean of averages over its neighbourhoods, with weights of its own.

        y_t = Σ_{i < K} m_i(t) · avg_i(x)_t,   avg_0(x) = x
        m = softmax_K(conv(norm(conv(x; d → K)); K → K) / T)

    avg_i is over three tokens, i apart, or over 3 × 3 of a grid; what lies beyond the border, and padding, is
    zero and counts all the same. The convolutions are as wide, without dilation and bias.

    Args:
        dim: width d.
        scales: K. With 1 the tokens stay as they are, and there is nothing to learn.
        layout: "past", the token and two before it, so that no later token has a part in it; "around", one
            before and one after; or (height, width), tokens that are rows of a grid one after the other.
        temperature: T.
        class_token: whether a token stands before those of the grid, which has no neighbours and stays as
            it is.
        device, dtype: of the parameters.

    Raises:
        ConfigError: a class token without a grid, or any other value that is not allowed.

    The norm of a grid and of "around" is that of batches; in "past", where the statistics of a batch would
    carry the future into the past, the K numbers of a token are divided by their root mean square.
    """

    acts_on = "queries"

    def __init__(
        self,
        dim: int,
        scales: int = 4,
        *,
        layout: Layout = "past",
        temperature: float = 1.0,
        class_token: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.scales, self.layout = dim, whole("scales", scales, 1), check_layout(layout)
        self.temperature = number("temperature", temperature, above=0)
        self.class_token = check_class_token(class_token, self.layout)
        steps = {"past": (-2, -1, 0), "around": (-1, 0, 1)}.get(str(layout), (-1, 0, 1))
        rows = (0,) if isinstance(self.layout, str) else steps
        self.taps = tuple((dy, dx) for dy in rows for dx in steps)
        self.first = self.second = self.norm = None
        if self.scales > 1:
            kind = {"device": device, "dtype": dtype}
            self.first = nn.Parameter(torch.empty(len(self.taps), scales, dim, **kind))
            self.second = nn.Parameter(torch.empty(len(self.taps), scales, scales, **kind))
            past = layout == "past"
            self.norm = HeadNorm(scales, eps=1e-5, **kind) if past else nn.BatchNorm1d(scales, **kind)
            for weight in (self.first, self.second):
                bound = 1 / math.sqrt(weight.shape[0] * weight.shape[2])
                nn.init.uniform_(weight, -bound, bound)

    @property
    def reach(self) -> int:
        """Tokens before a token that it depends on, with the layout "past"."""
        return max(2 * (self.scales - 1), 4) if self.scales > 1 else 0

    def forward(
        self, x: Float[Tensor, "B L d"], real: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L d"]:
        """Blend tokens, which are zero where they are not `real`."""
        if self.scales == 1:
            return x
        if self.class_token:
            rest = self._blended(x[:, 1:], None if real is None else real[:, 1:])
            return torch.cat([x[:, :1], rest], dim=1)
        return self._blended(x, real)

    def _blended(self, x: Tensor, real: Tensor | None) -> Tensor:
        weights = self.weights(x, real)
        share = 1 / len(self.taps)
        parts: dict[tuple[int, int], Tensor] = {(0, 0): weights[..., 0]}
        for scale in range(1, self.scales):
            for dy, dx in self.taps:
                place, part = (scale * dy, scale * dx), weights[..., scale] * share
                parts[place] = parts[place] + part if place in parts else part
        total = torch.zeros_like(x)
        for place, part in parts.items():
            total = total + part[..., None].to(x.dtype) * self._moved(x, *place)
        return total

    def weights(
        self, x: Float[Tensor, "B L d"], real: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L K"]:
        """m, the share of every scale, of tokens without the class token."""
        if self.first is None or self.second is None or self.norm is None:
            return x.new_ones(*x.shape[:2], 1)
        hidden = self._convolved(x, self.first)
        hidden = self.norm(hidden.flatten(0, 1)).view(hidden.shape).to(hidden.dtype)
        if real is not None:
            hidden = hidden.masked_fill(~real[..., None], 0.0)
        return (self._convolved(hidden, self.second) / self.temperature).softmax(-1)

    def _convolved(self, x: Tensor, weight: Tensor) -> Tensor:
        # all taps in one product, then moved: what is moved is K wide, not d
        each = F.linear(x, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])  # B L taps K
        moved = [self._moved(each[..., n, :], *tap) for n, tap in enumerate(self.taps)]
        return torch.stack(moved).sum(0)

    def _moved(self, x: Tensor, dy: int, dx: int) -> Tensor:
        """At every place what stands dy rows and dx columns on, zero beyond the border."""
        if not dy and not dx:
            return x
        length = x.shape[1]
        height, width = (1, length) if isinstance(self.layout, str) else self.layout
        if height * width != length:
            ahead = " and a class token before them" * self.class_token
            got = length + self.class_token
            raise ShapeError(f"x must have {height}·{width} tokens, those of the grid{ahead}; got {got}")
        if isinstance(self.layout, str):
            padded = F.pad(x, (0, 0, max(-dx, 0), max(dx, 0)))
            return padded[:, max(dx, 0) :][:, :length]
        grid = x.unflatten(1, (height, width))
        grid = F.pad(grid, (0, 0, max(-dx, 0), max(dx, 0), max(-dy, 0), max(dy, 0)))
        return grid[:, max(dy, 0) :, max(dx, 0) :][:, :height, :width].flatten(1, 2)

    def flops(self, tokens: int) -> int:
        """Operations of the matrix products."""
        tokens -= self.class_token
        return 0 if self.scales == 1 else 2 * tokens * len(self.taps) * self.scales * (self.dim + self.scales)
