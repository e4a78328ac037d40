"""Attention without pairs: every key has one logit, whoever looks.

    g_j = Σ_d silu(c_j W_Q)_d (c_j W_K)_d / √D,   head_i = Σ_j softmax_j(g_j) v_j over the j that i may see

with c the context, or x itself. One of the paper's probes of what attention needs: there is no similarity of
a query with a key, and two rows that see the same keys give the same. A query says nothing but where it
stands.

Cost: 4·d² parameters, as multi-head attention has; H·(1 + Dv) numbers of cache per token, since of the key
only its logit is kept; 2·L·S·H·Dv operations for the values. Under a causal mask the sums could be carried
along in O(L); here every mask is allowed, and the weights go through `attend` as logits of width one.

Paper 010: Deconstructing Attention, Investigating Design Principles for Effective Language Modeling, arXiv
2510.11602, the non-approximate variant, head by head in our reading. With no pairs there is nothing that a
rotary encoding could turn, and heads that share keys and values would be copies: there is no `kv_heads`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.mechanisms.config import AttentionConfig
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.positions import Position
from polyhead.nn.projections import Projection

__all__ = ["GateProjection", "SelfGate"]


class GateProjection(Projection):
    """One logit for every key and head in place of queries and keys; see the module.

    Attributes:
        gate_dim: width D of the two factors of a gate.
    """

    def __init__(self, dim: int, heads: int, *, context_dim: int | None = None, **options: Any) -> None:
        # both factors are made of the context: to the constructor that is the width of all inputs
        super().__init__(dim if context_dim is None else context_dim, heads, **options)
        self.dim = dim
        self.gate_dim, self.head_dim = self.head_dim, 1

    def queries(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B H L 1"]:
        """Ones: a query does not choose."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return torch.ones(x.shape[0], self.heads, x.shape[1], 1, device=x.device, dtype=dtype)

    def keys_values(
        self, context: Float[Tensor, "B S dc"]
    ) -> tuple[Float[Tensor, "B H S 1"], Float[Tensor, "B H S Dv"]]:
        """The gates, and the values."""
        shape = (self.heads, self.gate_dim)
        q, k = self.query(context).unflatten(-1, shape), self.key(context).unflatten(-1, shape)  # B S H D
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        gates = (F.silu(q) * k).sum(-1, keepdim=True) / math.sqrt(self.gate_dim)  # B S H 1
        v = self.value(context).unflatten(-1, (self.heads, self.value_dim))
        return gates.transpose(1, 2), v.transpose(1, 2)

    def flops(self, queries: int, keys: int) -> int:
        """Operations for so many query tokens and key tokens."""
        return 2 * keys * self.context_dim * self.heads * (2 * self.gate_dim + self.value_dim)


@register(
    "self_gate",
    paper="010",
    title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    family="ablation",
    summary="no pairs: a key has one logit for all queries, made of itself",
    equation="g_j = Σ_d silu(c_j W_Q)_d (c_j W_K)_d / √D;  head_i = Σ_j softmax_j(g_j) v_j",
    facets=Facets(alignment="other"),
)
class SelfGate(AttentionConfig):
    """Attention without pairs. `head_dim` is the width of the factors of a gate."""

    def __post_init__(self) -> None:
        if isinstance(self.position, Position) and type(self.position).turned is not Position.turned:
            raise ConfigError(
                "position must not turn queries and keys: self_gate has none; "
                f"got {self.position!r}; allowed are no_position(), sinusoidal(), alibi_position()"
            )
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""

        def module(*parts: Any, **options: Any) -> MultiHeadAttention:
            return MultiHeadAttention(*parts, scale=1.0, **options)

        return self.assemble(
            heads=self.heads,
            kv_heads=self.heads,
            device=device,
            dtype=dtype,
            projection=GateProjection,
            module=module,
        )
