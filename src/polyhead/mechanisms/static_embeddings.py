"""Attention whose maps come from the token embeddings in every layer; only the values follow the layer.

    q, k = e W_Q, e W_K,   v = x W_V,   head_h = softmax(q_h k_gᵀ / √D) v_g

with e the embeddings of the tokens, the same in all layers, and x the layer's own inputs. One of the paper's
probes of what attention needs: where a token looks no longer depends on what earlier layers have made of it,
and the maps of all layers can be worked out side by side.

    attn(x, embeddings=e, mask=causal())

Without `embeddings`, x itself is taken, as in a first layer. In an `AttentionStack` every such layer is given
the inputs of the stack.

Cost: as grouped-query attention.

Paper 010: Deconstructing Attention, Investigating Design Principles for Effective Language Modeling, arXiv
2510.11602, its StaticEmbQK. Grouped key/value heads are ours; the default has none. Encodings that add to the
inputs are refused: they would belong into the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.errors import ConfigError, ShapeError
from polyhead.mechanisms.config import AttentionConfig, key_value_heads
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.inputs import check_inputs
from polyhead.nn.kv_cache import ContextCache
from polyhead.nn.positions import Position
from polyhead.nn.projections import Projection, at_least_one

__all__ = ["StaticAttention", "StaticEmbeddings", "StaticProjection"]

M = TypeVar("M", bound="StaticAttention")


class StaticProjection(Projection):
    """Takes inputs and embeddings side by side: values of the former, queries and keys of the latter."""

    def __init__(self, dim: int, heads: int, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        self.dim, self.context_dim = 2 * self.dim, 2 * self.context_dim

    def queries(self, x: Float[Tensor, "B L d2"]) -> Float[Tensor, "B Hq L D"]:
        """Of the embeddings."""
        return super().queries(x[..., self.query.in_features :])

    def keys_values(
        self, context: Float[Tensor, "B S dc2"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S Dv"]]:
        """Keys of the embeddings, values of the inputs."""
        x, e = context.chunk(2, dim=-1)
        k = self.key(e).unflatten(-1, (self.kv_heads, self.head_dim))  # B S G D
        v = self.value(x).unflatten(-1, (self.kv_heads, self.value_dim))  # B S G Dv
        if self.key_norm is not None:
            k = self.key_norm(k)
        return k.transpose(1, 2), v.transpose(1, 2)

    def flops(self, queries: int, keys: int) -> int:
        """Operations for so many query tokens and key tokens."""
        return super().flops(queries, keys) // 2  # each map reads one of the two halves


class StaticAttention(MultiHeadAttention):
    """Multi-head attention over a `StaticProjection`, with `embeddings` beside every input."""

    takes_embeddings = "inputs"

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        context: Float[Tensor, "B S dc"] | None = None,
        *,
        embeddings: Float[Tensor, "B L d"] | None = None,
        context_embeddings: Float[Tensor, "B S dc"] | None = None,
        **call: Any,
    ) -> Float[Tensor, "B L d"]:
        """Attend; see `MultiHeadAttention.forward`.

        Args:
            x, context, call: as there.
            embeddings: of the tokens of x, `(B, L, d)`; default x.
            context_embeddings: of those of the context; default the context.
        """
        x = _beside("x", x, embeddings, self.projection.query.in_features)
        if context is not None:
            context = self._context(context, context_embeddings)
        elif context_embeddings is not None:
            raise ConfigError("context_embeddings were given without a context")
        return super().forward(x, context, **call)

    def new_context_cache(
        self,
        context: Float[Tensor, "B S dc"],
        *,
        context_embeddings: Float[Tensor, "B S dc"] | None = None,
        **options: Any,
    ) -> ContextCache:
        return super().new_context_cache(self._context(context, context_embeddings), **options)

    def _context(self, context: Tensor, embeddings: Tensor | None) -> Tensor:
        return _beside("context", context, embeddings, self.projection.key.in_features)


def _beside(name: str, x: Tensor, embeddings: Tensor | None, width: int) -> Tensor:
    check_inputs(name, x, width)
    if embeddings is None:
        embeddings = x
    elif not isinstance(embeddings, Tensor) or embeddings.shape != x.shape:
        shape = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else embeddings
        raise ShapeError(f"embeddings of {name} must have its shape {tuple(x.shape)}; got {shape}")
    return torch.cat([x, embeddings.to(x.dtype)], dim=-1)


@register(
    "static_embeddings",
    aliases=("static", "static_emb_qk"),
    paper="010",
    title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    family="ablation",
    summary="queries and keys of the token embeddings in every layer, values of the layer's inputs",
    equation="head_h = softmax(q_h k_gᵀ / √D) v_g,  q, k = e W_Q, e W_K, v = x W_V; y = concat_h(head_h) W_O",
)
class StaticEmbeddings(AttentionConfig):
    """Attention with static maps.

    Attributes:
        kv_heads: key/value heads, a divisor of `heads`; default `heads`.
    """

    kv_heads: int | None = None

    def __post_init__(self) -> None:
        at_least_one("StaticEmbeddings", dim=self.dim, heads=self.heads)
        kv_heads = key_value_heads("StaticEmbeddings", self.heads, self.kv_heads)
        if isinstance(self.position, Position) and type(self.position).added is not Position.added:
            raise ConfigError(
                "position must not add to the inputs: add it to the embeddings; "
                f"got {self.position!r}; allowed are rope(), alibi_position(), no_position()"
            )
        object.__setattr__(self, "kv_heads", kv_heads)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> StaticAttention:
        """The module."""
        return self._static(StaticAttention, device, dtype)

    def _static(self, module: Callable[..., M], device: Any, dtype: Any) -> M:
        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            projection=StaticProjection,
            module=module,
        )
