"""Key/value heads that are weighted sums of more heads, with weights that are learned."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polyhead.errors import ConfigError, unknown_name
from polyhead.nn.projections import Projection, at_least_one, divisors

__all__ = ["PooledProjection"]

_GRANULARITIES = ("head", "output", "input")


class PooledProjection(Projection):
    """A projection with the key and value weights of K heads, pooled to G before they are used.

        W_Kg = Σ_{h in g} a_h ⊙ W_Kh,   W_Vg = Σ_{h in g} b_h ⊙ W_Vh,   g = K/G heads in a row

    Pooling is K·(D + Dv)·context_dim multiplications and additions a call, elementwise, whatever the length;
    `merged` does it once and for all.

    Args:
        dim, heads, kv_heads, options: those of `Projection`; kv_heads is G.
        pooled_heads: K, a multiple of G. Default `heads`.
        granularity: what a_h and b_h are: `"head"`, a number; `"output"`, a vector over the head's width;
            `"input"`, a vector over the width of the context, and a bias is then pooled by the mean.
        start: `"mean"`, all weights G/K; or `"random"`, normally distributed.

    Attributes:
        key_weights, value_weights: a and b, `(K,)`, `(K, D)` and `(K, Dv)`, or `(K, context_dim)`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        pooled_heads: int | None = None,
        granularity: str = "head",
        start: str = "mean",
        **options: Any,
    ) -> None:
        at_least_one("PooledProjection", dim=dim, heads=heads)
        pooled_heads = heads if pooled_heads is None else pooled_heads
        kv_heads = pooled_heads if kv_heads is None else kv_heads
        at_least_one("PooledProjection", kv_heads=kv_heads, pooled_heads=pooled_heads)
        for name, many in (("heads", heads), ("pooled_heads", pooled_heads)):
            if many % kv_heads:
                raise ConfigError(
                    f"kv_heads must divide {name}={many}; got {kv_heads}; allowed are {divisors(many)}"
                )
        for name, value, known in (
            ("granularity", granularity, _GRANULARITIES),
            ("start", start, ("mean", "random")),
        ):
            if not isinstance(value, str) or value not in known:
                raise unknown_name(f"{name} of pooled heads", value, known)
        super().__init__(dim, heads, kv_heads=pooled_heads, **options)
        self.pooled_heads, self.kv_heads = pooled_heads, kv_heads
        self.heads = heads
        self.granularity = granularity
        for name, width in (("key", self.head_dim), ("value", self.value_dim)):
            extra = {"head": (), "output": (width,), "input": (self.context_dim,)}[granularity]
            weights = self.key.weight.new_empty((pooled_heads, *extra))
            if start == "random":
                nn.init.normal_(weights)
            else:
                nn.init.constant_(weights, kv_heads / pooled_heads)
            self.register_parameter(f"{name}_weights", nn.Parameter(weights))

    def _pooled(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight `(G·width, context_dim)` and bias of the pooled heads."""
        linear, by = getattr(self, name), getattr(self, f"{name}_weights")
        groups = (self.kv_heads, self.pooled_heads // self.kv_heads)
        weight = linear.weight.unflatten(0, (*groups, -1))  # G K/G width d
        shape = {"head": (1, 1), "output": (-1, 1), "input": (1, -1)}[self.granularity]
        factor = by.view(*groups, *shape)
        pooled = (factor * weight).sum(1).flatten(0, 1)
        if linear.bias is None:
            return pooled, None
        bias = linear.bias.unflatten(0, (*groups, -1))  # G K/G width
        bias = bias.mean(1) if self.granularity == "input" else (factor[..., 0] * bias).sum(1)
        return pooled, bias.flatten()

    def keys_values(
        self, context: Float[Tensor, "B S dc"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S Dv"]]:
        k, v = (
            F.linear(context, *self._pooled(name)).unflatten(-1, (self.kv_heads, -1))  # B S G width
            for name in ("key", "value")
        )
        if self.key_norm is not None:
            k = self.key_norm(k)
        return k.transpose(1, 2), v.transpose(1, 2)

    def merged(self) -> Projection:
        """A plain projection of G key/value heads that gives the same."""
        found = self._plain()
        with torch.no_grad():
            state = {name: tensor for name, tensor in self.state_dict().items() if name in found.state_dict()}
            for name in ("key", "value"):
                weight, bias = self._pooled(name)
                state[f"{name}.weight"] = weight
                if bias is not None:
                    state[f"{name}.bias"] = bias
            found.load_state_dict(state)
        return found.train(self.training)
