"""α-entmax: softmax with exact zeros, differentiable along any dimension.

For a row z of scores and 1 < α ≤ 2, with x = (α - 1) z and p = 1 / (α - 1),

    entmax(z)_i = (x_i - τ)_+^p,     τ such that the row sums to 1.

α → 1 is softmax, α = 2 is sparsemax (the Euclidean projection onto the simplex), α = 1.5 lies between.
Peters et al., "Sparse Sequence-to-Sequence Models", arXiv 1905.05702; Correia et al., "Adaptively Sparse
Transformers", arXiv 1909.00015 (α learned); Martins and Astudillo, "From Softmax to Sparsemax",
arXiv 1602.02068.

How τ is found is told in `polyhead.attend.entmax_rows`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from polyhead.attend.entmax_rows import entmax_, entmax_alpha_vjp, entmax_vjp_
from polyhead.attend.precision import wide
from polyhead.checks import given, real, whole
from polyhead.errors import ConfigError, ShapeError

__all__ = ["as_rows", "check_alpha", "entmax", "entmax15", "sparsemax"]


def check_alpha(alpha: float | Tensor) -> None:
    """Raise ConfigError unless 1 < alpha ≤ 2, for a tensor all of it."""
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise ConfigError(f"alpha must be a number or a floating-point tensor, got {given(alpha)}")
        if torch.compiler.is_compiling() or alpha.numel() == 0:
            return
        low, high = (float(a) for a in alpha.detach().aminmax())
    else:
        if not real(alpha):
            raise ConfigError(f"alpha must be a number or a floating-point tensor, got {given(alpha)}")
        low = high = float(alpha)
    if not (low > 1.0 and high <= 2.0):
        found = f"{low:g}" if low == high else f"values from {low:g} to {high:g}"
        raise ConfigError(
            f"alpha must lie in (1, 2], got {found}; towards 1 it is softmax(), 2 is sparsemax(), "
            "and 1 + sigmoid(a) keeps a learned one in range"
        )


def as_rows(x: Tensor) -> Tensor:
    """`(..., n)` as `(R, n)`, contiguous."""
    return x.contiguous().view(x.shape[:-1].numel(), x.shape[-1])


class _Entmax(torch.autograd.Function):
    """Along the last dimension; a tensor `alpha` has the shape of the scores with a last size of 1."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: float | Tensor) -> Tensor:
        dtype = wide(scores.dtype)
        rows = as_rows(scores.to(dtype, copy=True, memory_format=torch.contiguous_format))
        a = alpha.to(rows).reshape(-1, 1) if isinstance(alpha, Tensor) else alpha
        weights = entmax_(rows, a).view(scores.shape).to(scores.dtype)
        ctx.alpha = alpha if not isinstance(alpha, Tensor) else None
        ctx.save_for_backward(weights, *((alpha,) if isinstance(alpha, Tensor) else ()))
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weights, *held = ctx.saved_tensors
        w = as_rows(weights.to(wide(weights.dtype)))
        g = as_rows(grad.to(w.dtype, copy=True, memory_format=torch.contiguous_format))
        a = held[0].to(w).reshape(-1, 1) if held else ctx.alpha
        own = entmax_alpha_vjp(w, g, a).view_as(held[0]).to(held[0]) if ctx.needs_input_grad[1] else None
        return entmax_vjp_(w, g, a).view(grad.shape).to(grad.dtype), own


def entmax(scores: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """α-entmax along `dim`: softmax's sparse relative, differentiable in the scores and in alpha.

    Args:
        scores: floating point of any shape; half precisions are computed in float32. -inf gives a weight
            of 0, and only -inf along `dim` gives zeros.
        alpha: in (1, 2], a number or a tensor that broadcasts to `scores` and has size 1 along `dim`
            (`(H, 1, 1)` for one a head). Default 1.5. Rounding in a weight grows as eps / (alpha - 1).

    Returns:
        Weights of the shape and dtype of `scores`: nonnegative, with sum 1 along `dim`.

    Raises:
        ConfigError: alpha outside (1, 2].
        ShapeError: alpha that does not broadcast.
    """
    check_alpha(alpha)
    alpha = alpha if isinstance(alpha, Tensor) else float(alpha)
    if not isinstance(scores, Tensor):
        raise ShapeError(f"scores must be a floating-point tensor, got {given(scores)}")
    if not scores.is_floating_point() or scores.ndim == 0:
        raise ShapeError(
            f"scores must be a floating-point tensor with a dimension to normalise, got {scores.dtype} of "
            f"shape {tuple(scores.shape)}"
        )
    if not -scores.ndim <= whole("dim", dim, -scores.ndim) < scores.ndim:
        raise ShapeError(
            f"dim must lie in {-scores.ndim}..{scores.ndim - 1} for scores of shape {tuple(scores.shape)}; "
            f"got {dim}"
        )
    if isinstance(alpha, Tensor):
        sizes = list(scores.shape)
        sizes[dim] = 1
        if alpha.ndim > scores.ndim or any(
            a not in (1, n) for a, n in zip(alpha.shape[::-1], sizes[::-1], strict=False)
        ):
            raise ShapeError(
                f"alpha must broadcast to scores of shape {tuple(scores.shape)} with size 1 along dim {dim}, "
                f"got shape {tuple(alpha.shape)}"
            )
        alpha = alpha.expand(sizes).movedim(dim, -1)
    weights: Tensor = _Entmax.apply(scores.movedim(dim, -1), alpha)
    return weights.movedim(-1, dim)


def sparsemax(scores: Tensor, dim: int = -1) -> Tensor:
    """The Euclidean projection onto the probability simplex along `dim`: `entmax` with alpha 2."""
    return entmax(scores, 2.0, dim)


def entmax15(scores: Tensor, dim: int = -1) -> Tensor:
    """`entmax` with alpha 1.5 along `dim`."""
    return entmax(scores, 1.5, dim)
