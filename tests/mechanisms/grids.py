"""What tests of mechanisms on grids of tokens share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["moved_by"]


def moved_by(module: Any, x: Tensor) -> Tensor:
    """Which outputs each token moves, bool `(L, L)`: output i, token j of `x` (1, L, d)."""
    x = x.detach().clone().requires_grad_()
    out = module(x)
    rows = [
        torch.autograd.grad(out[0, i].sin().sum(), x, retain_graph=True)[0][0].abs().sum(-1)
        for i in range(out.shape[1])
    ]
    return torch.stack(rows) > 1e-14
