"""Normalisers, one row at a time.

Each takes the logits `(n,)` that a row sees and returns its weights `(n,)` in float64; -inf weighs nothing,
and a row of only -inf gives zeros. They fit `reference("attend")` as its `normalize`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["entmax", "entmax15", "sigmoid", "softmax", "sparsemax", "top_k"]


@twin("softmax")
def softmax(logits: Tensor, *, sink: float | None = None) -> Tensor:
    """w_j = exp(z_j) / (exp(sink) + sum_k exp(z_k))."""
    z = logits.double().tolist()
    terms = z if sink is None else [*z, sink]
    top = max(terms)
    if top == -math.inf:
        return torch.zeros(len(z), dtype=torch.float64)
    total = math.fsum(math.exp(t - top) for t in terms)
    return torch.tensor([math.exp(t - top) / total for t in z], dtype=torch.float64)


@twin("sigmoid")
def sigmoid(logits: Tensor, *, bias: float = 0.0) -> Tensor:
    """w_j = 1 / (1 + exp(-(z_j + bias)))."""
    weights = []
    for z in logits.double().tolist():
        t = z + bias
        weights.append(1 / (1 + math.exp(-t)) if t > -700 else 0.0)
    return torch.tensor(weights, dtype=torch.float64)


@twin("top_k")
def top_k(logits: Tensor, *, k: int) -> Tensor:
    """Softmax over those that are not below the k-th largest; the others weigh 0."""
    z = logits.double()
    least = sorted(z.tolist(), reverse=True)[:k][-1]
    return softmax(torch.where(z >= least, z, -math.inf))


@twin("sparsemax")
def sparsemax(logits: Tensor) -> Tensor:
    """w_j = (z_j - tau)_+: with z sorted down, the support is the largest k with 1 + k z_k > z_1 + ... + z_k.

    Martins and Astudillo, arXiv 1602.02068, algorithm 1.
    """
    z = sorted(logits.double().tolist(), reverse=True)
    total, tau = 0.0, math.inf
    for k, value in enumerate(z, start=1):
        if value == -math.inf:
            break
        total += value - z[0]  # relative to the largest: the weights do not change
        if 1 + k * (value - z[0]) > total:
            tau = z[0] + (total - 1) / k
    return (logits.double() - tau).clamp(min=0.0)


@twin("entmax15")
def entmax15(logits: Tensor) -> Tensor:
    """w_j = (x_j - tau)_+^2 with x = z / 2, from the sorted row: alpha 1.5 in closed form.

    For the k largest, sum (x - tau)^2 = 1 is solved by tau_k = M - sqrt((1 - k V) / k) with their mean M and
    variance V; the support is the largest k with tau_k <= x_k. Peters et al., arXiv 1905.05702, section 3.
    """
    x = [value / 2 for value in sorted(logits.double().tolist(), reverse=True)]
    tau = math.inf
    for k in range(1, len(x) + 1):
        if x[k - 1] == -math.inf:
            break
        mean = math.fsum(x[:k]) / k
        spread = math.fsum((value - mean) ** 2 for value in x[:k])
        tau_k = mean - math.sqrt(max(1 - spread, 0.0) / k)
        if tau_k <= x[k - 1]:
            tau = tau_k
    return (logits.double() / 2 - tau).clamp(min=0.0) ** 2


@twin("entmax")
def entmax(logits: Tensor, *, alpha: float = 1.5) -> Tensor:
    """w_j = ((alpha - 1) z_j - tau)_+^(1 / (alpha - 1)), tau halved in until the row sums to 1.

    Correia et al., arXiv 1909.00015, algorithm 1.
    """
    x = (alpha - 1) * logits.double()
    top = float(x.max())
    if top == -math.inf:
        return torch.zeros_like(x)
    x = x - top
    low, high = -1.0, -((1 / len(x)) ** (alpha - 1))
    weights = x
    for _ in range(100):
        tau = (low + high) / 2
        weights = (x - tau).clamp(min=0.0) ** (1 / (alpha - 1))
        low, high = (tau, high) if float(weights.sum()) >= 1 else (low, tau)
    return weights / weights.sum()
