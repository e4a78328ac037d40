"""Steps whose gradient is that of another function: signs and roundings that are trained through."""

from __future__ import annotations

from torch import Tensor

from polyhead.attend.precision import wide

__all__ = ["channel_codes", "elastic_signs", "signs", "slowed", "through", "weight_signs"]


def through(value: Tensor, path: Tensor) -> Tensor:
    """`value`, exactly, with the gradient of `path`."""
    return value + (path - path.detach()) if path.requires_grad else value


def signs(x: Tensor) -> Tensor:
    """+1 where x ≥ 0, -1 elsewhere; the gradient is passed on where |x| ≤ 1."""
    value = (x.detach() >= 0).to(x.dtype) * 2 - 1
    return through(value, x.clamp(-1, 1)) if x.requires_grad else value


def channel_codes(v: Tensor, size: Tensor) -> Tensor:
    """round(v s) / s with s = 127 / (size + 1e-6); the gradient is passed on where |v| ≤ 2."""
    s = 127 / (size.detach() + 1e-6)
    value = (v.detach() * s).round() / s
    return through(value, v.clamp(-2, 2)) if v.requires_grad else value


def elastic_signs(x: Tensor, step: Tensor) -> Tensor:
    """+1 where x ≥ 0, -1 elsewhere; `step` times it passes its gradient on to x where |x / step| ≤ 1."""
    value = (x.detach() >= 0).to(x.dtype) * 2 - 1
    return through(value, (x / step.detach()).clamp(-1, 1)) if x.requires_grad else value


def slowed(step: Tensor, numbers: int) -> Tensor:
    """A step size that so many numbers share, with 1 / √numbers of its gradient."""
    if not step.requires_grad:
        return step
    rate = max(numbers, 1) ** -0.5
    return step.detach() + (step - step.detach()) * rate


def weight_signs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """sign(W - mean W) and mean |W|: of their product, W takes the gradient as its own."""
    w = weight.detach().to(wide(weight.dtype))
    size = w.abs().mean().clamp(min=1e-30)
    value = ((w - w.mean()) >= 0).to(weight.dtype) * 2 - 1
    size = size.to(weight.dtype)
    return through(value, weight / size) if weight.requires_grad else value, size
