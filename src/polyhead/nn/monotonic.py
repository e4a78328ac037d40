"""Expected monotonic alignments: where a reader who never goes back stops, for each word that he writes.

    α_ij = p_ij c_ij,   c_ij = (1 - p_i,j-1) c_i,j-1 + α_i-1,j

p_ij is the probability of stopping at source j for target i, c_ij that of coming by there. Along an
antidiagonal i + j nothing depends on anything else, so it is L + S steps, O(L·S) work and memory, no division
and no product of many factors: p may be 0 or 1. The gradient is the same recurrence backwards.

Paper 133: Efficient Monotonic Multihead Attention, arXiv 2312.04515. Its closed form, one upper triangular
S × S matrix of products for every target, is the same in O(L·S²) work.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polyhead.checks import given
from polyhead.errors import ShapeError

__all__ = ["aligned", "aligned_backward", "lookback", "monotonic_alignment"]


def monotonic_alignment(
    p: Float[Tensor, "*b L S"], start: Float[Tensor, "*b S"] | None = None
) -> Float[Tensor, "*b L S"]:
    """α: the probability that target i stops at source j, having stopped for the targets before it.

    Rows sum to at most one, the less the later: what is missing never stopped.

    Args:
        p: probabilities of stopping, in [0, 1].
        start: α of the target before the first; default at the first source.
    """
    if not isinstance(p, Tensor) or p.ndim < 2 or not p.is_floating_point():
        raise ShapeError(f"p must be a floating-point tensor (..., L, S); got {given(p)}")
    shape = (*p.shape[:-2], p.shape[-1])
    if start is None:
        start = (torch.arange(p.shape[-1], device=p.device) == 0).to(p.dtype).expand(shape)
    elif not isinstance(start, Tensor) or start.shape != shape:
        raise ShapeError(f"start must be a tensor {shape}; got {given(start)}")
    start = start.to(p.dtype)
    if torch.compiler.is_compiling():
        from polyhead.nn.monotonic_opaque import aligned_opaque  # imports the compiler, which is here already

        return aligned_opaque(p, start)
    found: Tensor = _Aligned.apply(p, start)
    return found


def lookback(
    alpha: Float[Tensor, "*b L S"], energies: Float[Tensor, "*b L S"], seen: Bool[Tensor, "*b L S"]
) -> Float[Tensor, "*b L S"]:
    """β_ij = Σ_k≥j α_ik exp(e_ij) / Σ_l≤k exp(e_il): a softmax over all that was read before the stop.

    The share of j in the prefix that it ends, u_ij, is a number in [0, 1], and β_ij = u_ij r_ij with
    r_ij = α_ij + (1 - u_i,j+1) r_i,j+1: an alignment of one target, from the last source to the first.

    Args:
        alpha: α.
        energies: e, the logits.
        seen: what may be looked at; the others have weight 0 and must have α = 0.
    """
    e = energies.masked_fill(~seen, -1e30)
    share = (e - torch.logcumsumexp(e, dim=-1)).exp().masked_fill(~seen, 0.0)
    return monotonic_alignment(share.flip(-1)[..., None, :], alpha.flip(-1))[..., 0, :].flip(-1)


def _slanted(x: Tensor) -> Tensor:
    """`(..., L, S)` as antidiagonals `(L + S - 1, ..., L)`, zeros outside."""
    rows, columns = x.shape[-2:]
    count = rows + columns - 1
    wide = torch.cat([x, x.new_zeros(*x.shape[:-1], rows)], dim=-1).flatten(-2)
    return wide[..., : rows * count].unflatten(-1, (rows, count)).movedim(-1, 0).contiguous()


def _upright(x: Tensor, columns: int) -> Tensor:
    """What `_slanted` made, as it was."""
    rows = x.shape[-1]
    flat = x.movedim(0, -1).flatten(-2)
    wide = torch.cat([flat, flat.new_zeros(*flat.shape[:-1], rows)], dim=-1)
    return wide.unflatten(-1, (rows, rows + columns))[..., :columns].contiguous()


def aligned(p: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """α, and c in antidiagonals."""
    rows, columns = p.shape[-2:]
    if not p.numel():
        return torch.zeros_like(p), p.new_zeros(max(rows + columns - 1, 0), *p.shape[:-1])
    stop = _slanted(p)
    come, alpha = torch.empty_like(stop), torch.empty_like(stop)
    here = torch.zeros_like(stop[0])
    for n in range(len(stop)):
        if n:
            here = here - alpha[n - 1]  # (1 - p) c
            here[..., 1:] += alpha[n - 1, ..., :-1]
        if n < columns:
            here[..., 0] += start[..., n]
        come[n] = here
        torch.mul(stop[n], here, out=alpha[n])
    return _upright(alpha, columns), come


def aligned_backward(grad: Tensor, p: Tensor, come: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for p and for the start."""
    columns = p.shape[-1]
    if not p.numel():
        return torch.zeros_like(p), p.new_zeros(*p.shape[:-2], columns)
    stop, flow = _slanted(p), _slanted(grad)
    of_p = torch.empty_like(stop)
    of_start = p.new_zeros(*p.shape[:-2], columns)
    later = torch.zeros_like(stop[0])
    for n in range(len(stop) - 1, -1, -1):
        own = flow[n]
        own[..., :-1] += later[..., 1:]
        torch.mul(come[n], own - later, out=of_p[n])
        later = later + stop[n] * (own - later)
        if n < columns:
            of_start[..., n] = later[..., 0]
    return _upright(of_p, columns), of_start


class _Aligned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, start: Tensor) -> Tensor:
        alpha, come = aligned(p, start)
        ctx.save_for_backward(p, come)
        return alpha

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return aligned_backward(grad, *ctx.saved_tensors)
