"""Feed-forward experts: each computes the rows that chose it, and no others."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polyhead.errors import unknown_name
from polyhead.nn.projections import at_least_one

__all__ = ["ACTIVATIONS", "Experts", "maps_of"]

ACTIVATIONS = ("gelu", "swiglu")


def maps_of(activation: str) -> int:
    """Number of linear maps of a feed-forward layer: three where it is gated, else two."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    return 3 if activation == "swiglu" else 2


class Experts(nn.Module):
    """N feed-forward layers of one size.

        f_j(x) = D_j gelu(U_j x)   or   D_j (silu(G_j x) ⊙ U_j x);   y = Σ_{j chosen} g_j f_j(x)

    Rows are sorted by expert; an expert's products have as many rows as chose it.

    Args:
        experts: N.
        dim: width of a row.
        width: inner width m.
        activation: "gelu" or "swiglu".
        bias: whether the maps have a bias.
        device, dtype: of the parameters. They are drawn as those of `FanInLinear`.
    """

    def __init__(
        self,
        experts: int,
        dim: int,
        width: int,
        *,
        activation: str = "gelu",
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        at_least_one("Experts", experts=experts, dim=dim, width=width)
        self.activation, self.maps = activation, maps_of(activation)
        self.experts, self.dim, self.width = experts, dim, width

        def drawn(outputs: int, inputs: int) -> nn.Parameter:
            made = torch.empty(experts, outputs, inputs, device=device, dtype=dtype)
            bound = math.sqrt(3 / inputs)
            return nn.Parameter(nn.init.uniform_(made, -bound, bound))

        def zeros(outputs: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(experts, outputs, device=device, dtype=dtype)) if bias else None

        gated = self.maps == 3
        self.up, self.up_bias = drawn(width, dim), zeros(width)
        self.gate = drawn(width, dim) if gated else None
        self.gate_bias = zeros(width) if gated else None
        self.down, self.down_bias = drawn(dim, width), zeros(dim)

    def forward(
        self, x: Float[Tensor, "P w"], chosen: Bool[Tensor, "P N"], gates: Float[Tensor, "P N"]
    ) -> Float[Tensor, "P w"]:
        """Σ over the chosen experts of gate · expert(row), in the dtype of the gates.

        Every row must choose equally many.
        """
        expert, row = chosen.T.nonzero().unbind(1)
        counts = chosen.sum(0).tolist()
        k = len(row) // max(1, len(x))
        if not len(row):
            return x.to(gates.dtype) * 0
        # one by one, not by indexing: what flows back is put together once and not once for each
        parts = [None if p is None else p.unbind(0) for p in self._parts()]
        made = [
            self._one(rows, *(None if part is None else part[n] for part in parts))
            for n, rows in enumerate(x.index_select(0, row).split(counts))
            if len(rows)
        ]
        # back to the order of the rows: the k outputs of a row side by side
        order = row.argsort(stable=True)
        weights = gates[row, expert][order].view(-1, k, 1)
        return (torch.cat(made).index_select(0, order).view(-1, k, self.dim) * weights).sum(1)

    def alone(self, x: Float[Tensor, "*n w"]) -> Float[Tensor, "*n w"]:
        """What the first expert gives for all rows."""
        return self._one(x, *(None if p is None else p[0] for p in self._parts()))

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.up, self.up_bias, self.gate, self.gate_bias, self.down, self.down_bias

    def _one(
        self,
        x: Tensor,
        up: Any,
        up_bias: Tensor | None,
        gate: Tensor | None,
        gate_bias: Tensor | None,
        down: Any,
        down_bias: Tensor | None,
    ) -> Tensor:
        inner = F.linear(x, up, up_bias)
        inner = F.gelu(inner) if gate is None else F.silu(F.linear(x, gate, gate_bias)) * inner
        return F.linear(inner, down, down_bias)

    def flops(self, rows: int) -> int:
        """Operations of so many pairs of a row and an expert."""
        return 2 * rows * self.maps * self.dim * self.width

    def extra_repr(self) -> str:
        return f"experts={self.experts}, dim={self.dim}, width={self.width}, activation={self.activation!r}"
