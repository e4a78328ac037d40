"""Adaptively sparse attention: α-entmax in place of softmax, with an α that every head learns.

    head_h = α_h-entmax(q_h k_gᵀ / √D) v_g,   α_h = 1 + σ(a_h),   y = concat_h(head_h) W_O
    α-entmax(z)_j = ((α - 1) z_j - τ)_+^(1/(α - 1)),   τ such that a row sums to 1

Low scores get a weight of exactly 0: α near 1 is softmax, α = 2 sparsemax, and a head chooses between them.
q: (B, H, L, D); k, v: (B, G, S, D), g = h // (H/G); a: (H,).

Cost: parameters of grouped-query attention and H more, none where α is given; its FLOPs and its cache. Rows
are made whole, some at a time: memory is O(L), and no fused kernel can serve it. α = 1.5 is the fastest.

Paper 061: Adaptively Sparse Transformers, arXiv 1909.00015. Ours: a starts as a standard normal, which the
paper does not say; α is held at 1.01 or above, as rounding grows with 1/(α - 1) (a head whose a is below
-4.6 stays there); key/value heads may be fewer than heads. Self- and cross-attention have each their own a,
as they are modules of their own.
"""

from __future__ import annotations

from typing import Any

import torch

from polyhead.attend.entmax import check_alpha
from polyhead.attend.normalizers import Entmax, Softmax, entmax
from polyhead.attend.precision import wide
from polyhead.checks import given, real, several
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.learned_alpha import LearnedAlpha
from polyhead.nn.part_module import PartModule
from polyhead.nn.projections import at_least_one

__all__ = ["EntmaxAttention"]


@register(
    "entmax_attention",
    aliases=("adaptively_sparse",),
    paper="061",
    title="Adaptively Sparse Transformers",
    family="weights",
    summary="α-entmax gives low scores a weight of exactly 0; every head learns how sparse it is",
    equation=(
        "head_h = entmax_α(q_h k_gᵀ / √D) v_g,  entmax_α(z)_j = ((α-1) z_j - τ)_+^(1/(α-1)),  α = 1 + σ(a_h)"
    ),
)
class EntmaxAttention(GroupedConfig):
    """Attention through α-entmax.

    Attributes:
        alpha: in (1, 2], a number for all heads or one for each; None, the default: learned.
    """

    alpha: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        at_least_one("EntmaxAttention", heads=self.heads)
        if type(self.normalizer) is not Softmax or self.normalizer.sink is not None:
            raise ConfigError(
                f"entmax_attention: the normaliser is entmax, which alpha= sets; got {given(self.normalizer)}"
            )
        if several(self.alpha):
            alphas = tuple(self.alpha)  # type: ignore[arg-type]
            if len(alphas) != self.heads or not all(map(real, alphas)):
                raise ConfigError(
                    f"alpha must be a number, {self.heads} of them, or None; got {given(self.alpha)}"
                )
            for alpha in alphas:
                check_alpha(alpha)
            object.__setattr__(self, "alpha", tuple(map(float, alphas)))
        elif self.alpha is not None:
            object.__setattr__(self, "alpha", entmax(self.alpha).alpha)  # type: ignore[arg-type]
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        module: MultiHeadAttention = self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype
        )
        place = module.projection.query.weight
        normalizer: LearnedAlpha | PartModule[Entmax]
        if self.alpha is None:
            normalizer = LearnedAlpha(self.heads, device=place.device, dtype=place.dtype)
        else:
            alpha = self.alpha
            own = torch.tensor(alpha, dtype=wide(place.dtype)) if isinstance(alpha, tuple) else alpha
            normalizer = PartModule(entmax(own), device=place.device)
        module.normalizer = normalizer  # type: ignore[assignment]  # it gives a normaliser when called
        return module
