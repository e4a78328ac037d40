"""Attention to tuples in time linear in the length, where the logits are small.

exp(s) ≈ Σ_(t ≤ g) sᵗ / t!, and a power of Σ_l q_l k¹_l k²_l is a sum over monomials, in which query and keys
stand apart: exp(s_i(mn)) ≈ Σ_μ c_μ q_i^μ (k¹_m)^μ (k²_n)^μ, c_μ = scale^|μ| / Π μ_l!. So the sums over m and
over n are taken once, for all queries.

Paper 175: How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker
Computation, arXiv 2310.04064: almost linear time holds where entries stay below (log n)^(1/3). The paper
speaks of polynomials of least degree; Taylor's are ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.checks import given, number, several, whole
from polyhead.errors import ConfigError, ShapeError

__all__ = ["kronecker_taylor"]

_MOST = 1 << 16  # monomials


def kronecker_taylor(
    q: Float[Tensor, "B H L D"],
    keys: Sequence[Float[Tensor, "B H S D"]],
    values: Sequence[Float[Tensor, "B H S Dv"]],
    *,
    degree: int = 4,
    scale: float | None = None,
) -> Float[Tensor, "B H L Dv"]:
    """What `kronecker_attend` gives without a mask, up to the remainder of the Taylor polynomial.

    O((L + n·S)·r·Dv) operations and O((L + S)·r) memory, with r = binomial(D + degree, degree) monomials:
    for small D alone. An odd degree may divide by a sum that is zero or negative, where logits are large.

    Args:
        q, keys, values, scale: those of `kronecker_attend`; as many key heads as query heads.
        degree: g.
    """
    whole("degree", degree, 0)
    if not several(keys) or not several(values) or len(keys) != len(values) or not len(keys):
        raise ConfigError(
            f"keys and values must be sequences of as many tensors, at least one; got {given(keys)} and "
            f"{given(values)}"
        )
    if any(k.shape[:2] != q.shape[:2] or k.shape[-1] != q.shape[-1] for k in keys):
        raise ShapeError(f"keys must have the batch, heads and width of q {tuple(q.shape)}")
    width = q.shape[-1]
    count = math.comb(width + degree, degree)
    if count > _MOST:
        raise ConfigError(
            f"degree={degree} and a head width of {width} make {count} monomials, and at most {_MOST} are "
            "taken; lower the degree, or take kronecker_attend"
        )
    scale = 1 / width if scale is None else number("scale", scale)
    powers = [m for total in range(degree + 1) for m in combinations_with_replacement(range(width), total)]
    factors = [scale ** len(m) / math.prod(map(math.factorial, Counter(m).values())) for m in powers]
    of_query = _monomials(q, powers) * torch.tensor(factors, dtype=q.dtype, device=q.device)
    top: Tensor | None = None
    bottom: Tensor | None = None
    for k, v in zip(keys, values, strict=True):
        own = _monomials(k, powers)  # B H S r
        sums, totals = own.transpose(-1, -2) @ v, own.sum(-2)
        top = sums if top is None else top * sums
        bottom = totals if bottom is None else bottom * totals
    assert top is not None
    assert bottom is not None
    return (of_query @ top) / (of_query @ bottom[..., None])


def _monomials(x: Tensor, powers: Sequence[tuple[int, ...]]) -> Tensor:
    """Π of the named columns for every name, `(..., r)`; each is one already made times a column."""
    made: dict[tuple[int, ...], Tensor] = {(): torch.ones_like(x[..., 0])}
    for m in powers[1:]:
        made[m] = made[m[:-1]] * x[..., m[-1]]
    return torch.stack([made[m] for m in powers], dim=-1)
