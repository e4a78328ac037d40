"""Steps whose gradient is that of another function: signs and roundings that are trained through."""

from __future__ import annotations

from torch import Tensor

__all__ = ["channel_codes", "signs"]


def _through(value: Tensor, path: Tensor) -> Tensor:
    """`value`, exactly, with the gradient of `path`."""
    return value + (path - path.detach()) if path.requires_grad else value


def signs(x: Tensor) -> Tensor:
    """+1 where x ≥ 0, -1 elsewhere; the gradient is passed on where |x| ≤ 1."""
    value = (x.detach() >= 0).to(x.dtype) * 2 - 1
    return _through(value, x.clamp(-1, 1)) if x.requires_grad else value


def channel_codes(v: Tensor, size: Tensor) -> Tensor:
    """round(v s) / s with s = 127 / (size + 1e-6); the gradient is passed on where |v| ≤ 2."""
    s = 127 / (size.detach() + 1e-6)
    value = (v.detach() * s).round() / s
    return _through(value, v.clamp(-2, 2)) if v.requires_grad else value
