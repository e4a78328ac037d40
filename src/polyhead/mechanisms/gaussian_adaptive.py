"""Gaussian adaptive attention: heads weigh features by how far they lie from a mean that is learned to shift.

    z_g = (x - μ - δ_g) / √(σ² + ε),   m = Π_g exp(-z_g² / (2 c_g²)),   w = m / Σ m,   y = x ⊙ w

over the features of a head, d/H in a row; μ and σ² are their mean and variance, δ_g and c_g, g = 1..G, are
learned. x, y: (B, L, d). There are no queries and no keys: every token is weighed by itself, so a mask
changes nothing, a context is refused, and a cache keeps nothing.

The product is taken as a softmax of its logarithm, which is the same and does not underflow.
`polyhead.nn.gaussian` has the same weights along any axis, such as time to pool over, and
`importance_factor`, how much each index is weighed on average.

Cost: 2·G·H parameters, O(L·d·G) elementwise, no products of matrices.

Paper 012: Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple
Modalities, arXiv 2401.11143. Ours: one Gaussian a head, features as the axis, and c² + 0.0001 for c², since c
starts as a standard normal and might begin as a spike. Along time padding does not count, where the published
code takes it for zeros. Its use behind dot-product attention is a stack: `build_stack(["mha",
"gaussian_adaptive"], ...)`.
"""

from __future__ import annotations

from typing import Any

from polyhead.mechanisms.config import MechanismConfig
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.flow import Flow, Step
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.gaussian import GaussianHeads

__all__ = ["GaussianAdaptive"]


@register(
    "gaussian_adaptive",
    aliases=("gaam",),
    paper="012",
    title=(
        "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple "
        "Modalities"
    ),
    family="weights",
    summary="every head weighs the features of a token by Gaussians around their mean; no queries, no keys",
    equation="y = x ⊙ softmax(-Σ_g z_g² / (2 c_g²)),  z_g = (x - μ - δ_g) / σ, over the features of a head",
    supports=frozenset({"self", "causal_self"}),
    facets=Facets(
        positions="local", representations="multi_dimensional", alignment="other", distribution="softmax"
    ),
    picture=Flow(
        (Step("x", "(L, d)"),),
        (),
        (
            Step("heads", "H chunks of features"),
            Step("distance", "from their mean, shifted, in standard deviations"),
            Step("weights", "a product of G Gaussians, over its sum"),
            Step("y", "(L, d), x times the weights"),
        ),
    ),
    promises=Promises(tokenwise=True),
)
class GaussianAdaptive(MechanismConfig):
    """Gaussian adaptive attention over features.

    Attributes:
        gaussians: G of every head.
    """

    gaussians: int = 1

    def build(self, *, device: Any = None, dtype: Any = None) -> GaussianHeads:
        """The module."""
        return GaussianHeads(self.dim, self.heads, self.gaussians, device=device, dtype=dtype)
