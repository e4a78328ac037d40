"""`monotonic_alignment` inside `torch.compile`: one step of the graph, whatever the lengths are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyhead.nn.monotonic import aligned, aligned_backward

__all__ = ["aligned_opaque"]


@torch.library.custom_op("polyhead::aligned", mutates_args=())
def _aligned(p: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    return aligned(p, start)


@_aligned.register_fake
def _(p: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = p.shape[-2:]
    return p.new_empty(p.shape), p.new_empty(rows + columns - 1, *p.shape[:-1])


@torch.library.custom_op("polyhead::aligned_backward", mutates_args=())
def _aligned_backward(grad: Tensor, p: Tensor, come: Tensor) -> tuple[Tensor, Tensor]:
    return aligned_backward(grad, p, come)


@_aligned_backward.register_fake
def _(grad: Tensor, p: Tensor, come: Tensor) -> tuple[Tensor, Tensor]:
    return p.new_empty(p.shape), p.new_empty(*p.shape[:-2], p.shape[-1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])


def _back(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    p, come = ctx.saved_tensors
    of_p, of_start = _aligned_backward(grad, p, come)
    return of_p, of_start


_aligned.register_autograd(_back, setup_context=_keep)


def aligned_opaque(p: Tensor, start: Tensor) -> Tensor:
    """α, as `monotonic_alignment` gives it."""
    alpha: Tensor = _aligned(p, start)[0]
    return alpha
