"""Queries, keys and values of calls, drawn in float64, and what a backend makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

import polyhead as ph

__all__ = ["draw", "results", "tensors"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers for one seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int = 8) -> list[Tensor]:
    """q `(B, H, L, D)`, k and v `(B, G, S, D)`, others for other lengths."""
    generator = torch.Generator().manual_seed(queries + keys)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(batch, h, n, width, generator=generator, dtype=torch.float64) for h, n in sizes]


def results(backend: str, given: list[Tensor], **call: object) -> list[Tensor]:
    """The output on q, k, v, the first three of `given`, and the gradients of all that is given.

    They are those of a weighted sum of the output, whose weights differ from place to place.
    """
    out = ph.attend(*given[:3], backend=backend, **call)  # type: ignore[call-overload]
    weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()
    return [out, *torch.autograd.grad((out * weights).sum(), given)]
