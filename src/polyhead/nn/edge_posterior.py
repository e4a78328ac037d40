"""Which edges there are, given how well each fits: the posterior that attention reads values by.

    p(φ | x) ∝ p(φ) Π_e exp(φ_e ψ_e(x)),   out(x) = Σ_φ p(φ | x) v(x, φ)

Paper 112: Attention: Marginal Probability is All You Need?, arXiv 2304.04556. With one edge for every query
this is softmax attention, with one for every input it is slot attention (one step of it is the
responsibilities of a Gaussian mixture), with one edge in all it is a softmax over all pairs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.checks import given
from polyhead.errors import ShapeError, unknown_name

__all__ = ["edge_posterior", "gaussian_potentials"]

_EDGES = {"keys": (-1,), "slots": (-2,), "joint": (-2, -1)}


def edge_posterior(
    potentials: Float[Tensor, "*b L S"],
    log_prior: Tensor | None = None,
    *,
    over: str = "keys",
) -> Float[Tensor, "*b L S"]:
    """The probability of every edge (i, j).

    Args:
        potentials: ψ.
        log_prior: log p(φ), broadcastable; -inf forbids an edge: masks and biases are such priors. Default
            uniform.
        over: "keys", one edge for every query i; "slots", one for every key j, which picks a query;
            "joint", one edge in all.

    Returns:
        The posterior; zeros where nothing is allowed.
    """
    if not isinstance(over, str) or over not in _EDGES:
        raise unknown_name("choice of edges", over, _EDGES)
    if not isinstance(potentials, Tensor) or potentials.ndim < 2:
        raise ShapeError(f"potentials must be a tensor (..., L, S); got {given(potentials)}")
    logits = potentials if log_prior is None else potentials + log_prior
    total = torch.logsumexp(logits, _EDGES[over], keepdim=True)
    return (logits - total.masked_fill(total == -torch.inf, 0.0)).exp()


def gaussian_potentials(
    q: Float[Tensor, "*b L D"], k: Float[Tensor, "*b S D"], variance: float = 1.0
) -> Float[Tensor, "*b L S"]:
    """ψ_ij = -|q_i - k_j|² / (2 variance)."""
    return (
        q @ k.transpose(-1, -2) - q.square().sum(-1)[..., None] / 2 - k.square().sum(-1)[..., None, :] / 2
    ) / variance
