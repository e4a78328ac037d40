"""Complex vector attention: heads compare phases of queries and keys, each in its own measure.

    score_hij = Σ_m |q_m| |k_m| cos(δ_hm (φ(q_m) - φ(k_m)) + b_hm + (i - j) ω_m) / √D,   m = 1..D/2

with q_hi and k_gj taken as D/2 complex numbers, φ their phases, ω_m = base^(-2m/D), g = h // (H/G), and δ, b
learned: differences of content and of position make one angle. δ = 1, b = 0 is attention with rotary
positions, δ = 0 looks at magnitudes and positions alone.

Taken apart this is a dot product of turned vectors: |q| e^{i(δφ(q) + b + iω)} and |k| e^{i(δφ(k) + jω)}. So
any backend can serve it, keys are cached once they are turned, and memory is that of the backend. The angles
of the positions are those of the position encoding, which is `rope()` unless another one is given.

Cost: parameters of grouped-query attention and (H + G)·D/2 more; O((L·H + S·G)·D) for the phases; its FLOPs
and its cache.

Paper 007: ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex
Vector Attention, arXiv 2505.10222 (withdrawn). Our readings: scores are divided by √D (`scaled=False` is the
published code); the start is rotary attention (`start="random"`: δ of variance 2/D, as there); query heads
that share a key head share its δ. Where δ is no integer, a score jumps where a phase passes ±π.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import flag
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.phase_projection import PhaseProjection
from polyhead.nn.positions import Position, rope

__all__ = ["ComplexRotation"]


@register(
    "complex_rotation",
    paper="007",
    title=(
        "ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex "
        "Vector Attention"
    ),
    family="scores",
    summary="scores compare the phases of complex queries and keys, stretched and shifted by every head",
    equation="score_ij = Σ_m |q_m| |k_m| cos(δ_m (φ(q_m) - φ(k_m)) + b_m + (i - j) ω_m) / √D",
    facets=Facets(alignment="similarity"),
)
class ComplexRotation(GroupedConfig):
    """Complex vector attention.

    Attributes:
        position: turns queries and keys by their positions; default `rope()`.
        start: "rotary" or "random".
        scaled: divide scores by √D.
    """

    position: Position = rope()
    start: str = "rotary"
    scaled: bool = True

    def __post_init__(self) -> None:
        flag("scaled", self.scaled)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        module: MultiHeadAttention = self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            projection=partial(PhaseProjection, start=self.start),
        )
        if not self.scaled:
            module.scale = 1.0
        return module
