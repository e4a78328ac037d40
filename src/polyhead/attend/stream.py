"""A streaming backend as one node of autograd's graph: O(L) memory kept, the rest computed again."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from polyhead.attend.problem import Problem
from polyhead.description import Part

__all__ = ["Kernel", "leaves_of", "stream", "trainable"]


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
    with torch.no_grad():
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
        return kernel.forward(q, k, v, spec.unflatten(tensors), seed=seed, want_lse=want_lse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, *tensors = ctx.saved_tensors
        leaves = leaves_of(tensors, ctx.needs_input_grad[7:])
        grad = q.new_zeros(*q.shape[:3], v.shape[-1]) if grad is None else grad
        problem = ctx.spec.unflatten(leaves)
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
