"""A sentinel: what a token may attend to beside all sources, itself behind a gate.

    s = σ(x W_ψ) ⊗ x

It is one more thing to look at, which a token always sees and no other token does, and which is made anew of
the tokens of a call, so that no cache holds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polyhead.attend.precision import exact, wide
from polyhead.nn.projections import FanInLinear, Projection
from polyhead.nn.regularizers import Regularizer

__all__ = ["Sentinel", "SentinelContext", "SentinelKey"]


class Sentinel(nn.Module):
    """The tokens behind their gate, s = σ(gate(x)) ⊗ x, and what they are mapped to.

    Args:
        gate: d → d.
    """

    def __init__(self, gate: FanInLinear) -> None:
        super().__init__()
        self.gate = gate

    def gated(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B L d"]:
        """s."""
        return torch.sigmoid(self.gate(x)) * x

    def forward(self, x: Float[Tensor, "B L d"]) -> tuple[Tensor, Tensor | None]:
        """What the tokens are shown, and the log-sum-exp `(B, H, L)` of its logits where it has any."""
        raise NotImplementedError

    def flops(self, length: int, batch: int) -> tuple[int, int, int]:
        """Operations of projections, scores and values."""
        return 2 * batch * length * self.gate.weight.numel(), 0, 0


class SentinelContext(Sentinel):
    """A context: s W_O + b, `(B, L, d)`.

    Args:
        gate: d → d.
        output: d → d.
    """

    def __init__(self, gate: FanInLinear, output: FanInLinear) -> None:
        super().__init__(gate)
        self.output = output

    def forward(self, x: Float[Tensor, "B L d"]) -> tuple[Float[Tensor, "B L d"], None]:
        return self.output(self.gated(x)), None

    def flops(self, length: int, batch: int) -> tuple[int, int, int]:
        own = 2 * batch * length * self.output.weight.numel()
        return super().flops(length, batch)[0] + own, 0, 0


class SentinelKey(Sentinel):
    """A key and a value that one query sees: v of s, and the logit q·k / √D with k of s and q of x.

    That is what attention to this one pair gives, with its log-sum-exp. It stands nowhere: neither the
    position encoding nor maps of the scores of pairs act on it.

    Args:
        gate: d → d.
        projection: q from x, by the map of the sources' queries, k and v from s, with as many key/value
            heads as the sources have.
        dropout: probability with which its weight is dropped in training.
        regularizers: those that act on the outputs of heads in training act on v.
    """

    def __init__(
        self,
        gate: FanInLinear,
        projection: Projection,
        *,
        dropout: float = 0.0,
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        super().__init__(gate)
        self.projection = projection
        self.dropout = dropout
        self.regularizers = tuple(regularizers)

    def forward(self, x: Float[Tensor, "B L d"]) -> tuple[Float[Tensor, "B H L Dv"], Float[Tensor, "B H L"]]:
        made = self.projection
        q = made.queries(x)  # B H L D
        k, v = made.keys_values(self.gated(x))  # B G L ·
        kind = wide(q.dtype)
        with exact(x.device):
            shared = q.to(kind).unflatten(1, (made.kv_heads, -1)).transpose(2, 3)  # B G L H/G D
            logits = (shared @ k.to(kind)[..., None])[..., 0]  # B G L H/G
        logits = logits.transpose(2, 3).flatten(1, 2) * made.head_dim**-0.5
        heads = v.repeat_interleave(made.heads // made.kv_heads, dim=1)
        if self.training:
            if self.dropout:
                heads = heads * F.dropout(heads.new_ones(*heads.shape[:3], 1), self.dropout)
            for part in self.regularizers:
                heads = part.on_heads(heads)
        return heads, logits

    def flops(self, length: int, batch: int) -> tuple[int, int, int]:
        made = self.projection
        own = super().flops(length, batch)[0] + batch * made.flops(length, length)
        return own, 2 * batch * length * made.heads * made.head_dim, 0
