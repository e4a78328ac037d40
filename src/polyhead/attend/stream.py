"""A streaming backend as one node of autograd's graph: O(L) memory kept, the rest computed again."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from polyhead.attend.precision import exact, wide
from polyhead.attend.problem import Problem
from polyhead.description import Part
from polyhead.errors import PolyheadError

__all__ = ["Kernel", "OwnGradients", "leaves_of", "of_heads", "stream", "trainable"]

_P = TypeVar("_P", bound=Part)


class Kernel(Protocol):
    """Forward and backward of a call, both without autograd."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, seed: int, want_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Output `(B, H, L, Dv)` and, if wanted, log-sum-exp `(B, H, L)`; `seed` draws the dropout."""

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        problem: Problem,
        grad: Tensor,
        grad_lse: Tensor | None,
        *,
        seed: int,
    ) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
        """Gradients for q, k and v, and by `id` for the tensors of `problem` that require one."""


def stream(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, seed: int, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Run a kernel; gradients flow to q, k, v and the tensors inside `problem`."""
    spec, tensors = problem.flatten()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *tensors)):
        return _Stream.apply(q, k, v, kernel, spec, seed, want_lse, *tensors)
    with torch.no_grad(), exact(q.device):
        return kernel.forward(q, k, v, problem, seed=seed, want_lse=want_lse)


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel: Kernel,
        spec: Problem,
        seed: int,
        want_lse: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(q, k, v, *tensors)
        ctx.kernel, ctx.spec, ctx.seed = kernel, spec, seed
        ctx.set_materialize_grads(False)
        with exact(q.device):
            return kernel.forward(q, k, v, spec.unflatten(tensors), seed=seed, want_lse=want_lse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise PolyheadError(
                "attend was asked for a gradient that can be differentiated again (create_graph=True), which "
                "only the dense form gives: use backend='reference'"
            )
        q, k, v, *tensors = ctx.saved_tensors
        leaves = leaves_of(tensors, ctx.needs_input_grad[7:])
        grad = q.new_zeros(*q.shape[:3], v.shape[-1]) if grad is None else grad
        problem = ctx.spec.unflatten(leaves)
        with exact(q.device):
            dq, dk, dv, own = ctx.kernel.backward(q, k, v, problem, grad, grad_lse, seed=ctx.seed)
        return (dq, dk, dv, None, None, None, None, *(own.get(id(leaf)) for leaf in leaves))


def leaves_of(tensors: list[Tensor], wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """The tensors cut off from the graph, those that want a gradient as leaves of their own."""
    return tuple(
        t.detach().requires_grad_() if need else t.detach() for t, need in zip(tensors, wanted, strict=True)
    )


def trainable(part: Part | None) -> tuple[Tensor, ...]:
    """The tensors of a part that require a gradient."""
    return () if part is None else tuple(t for t in part.tensors() if t.requires_grad)


class OwnGradients:
    """Gradients of the tensors inside a problem, summed in the wide dtype and rounded once."""

    def __init__(self, problem: Problem) -> None:
        self.leaves = [t for t in problem.tensors() if t.requires_grad]
        self.totals = {id(t): torch.zeros_like(t, dtype=wide(t.dtype)) for t in self.leaves}

    def add(self, leaf: Tensor, grad: Tensor | None, heads: slice | None = None) -> None:
        """Add a share of a leaf's gradient: of all its entries, or of the `heads` of a per-head leaf (H,)."""
        total = self.totals.get(id(leaf))
        if total is None or grad is None:
            return
        if heads is not None and total.shape != grad.shape:
            total = total[heads]
        total.add_(grad.sum_to_size(total.shape))

    def total(self, leaf: Tensor) -> Tensor | None:
        """The sum so far of a leaf's gradient, to be added to in place; None if it requires none."""
        return self.totals.get(id(leaf))

    def done(self) -> dict[int, Tensor]:
        """The gradients by `id` of their tensor, in its dtype."""
        return {id(t): self.totals[id(t)].to(t.dtype) for t in self.leaves}


def of_heads(part: _P, heads: slice | Tensor, total: int) -> _P:
    """A part for some of a call's `total` heads: its per-head tensors (H,) for these."""
    return part.map_tensors(lambda t: t[heads] if t.ndim == 1 and t.shape[0] == total else t)
