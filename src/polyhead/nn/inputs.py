"""What the tensors and the mask of a module's call are checked for."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.checks import given, is_integer_tensor
from polyhead.errors import ConfigError, ShapeError

__all__ = ["check_dtype", "check_inputs", "check_mask", "check_positions", "check_real"]


def check_inputs(name: str, x: Tensor, width: int) -> None:
    """Raise a `ShapeError` unless `x` is `(B, n, width)` and holds floating-point numbers."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ShapeError(f"{name} must be a floating-point tensor (B, length, {width}); got {given(x)}")
    if x.ndim != 3 or x.shape[-1] != width:
        raise ShapeError(f"{name} must have shape (B, length, {width}); got {tuple(x.shape)}")


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """Raise a `ShapeError` unless `x` is of the dtype of a weight, or autocast sees to that."""
    if (
        x.dtype != weight.dtype
        and weight.is_floating_point()
        and not torch.is_autocast_enabled(x.device.type)
    ):
        raise ShapeError(
            f"{name} must be {weight.dtype}, as the module's weights are; got {x.dtype}: convert it, or the "
            "module by .to(dtype), or run under torch.autocast"
        )


def check_positions(positions: Tensor, x: Tensor) -> None:
    """Raise a `ShapeError` unless `positions` is an integer tensor `(L,)`, `(1, L)` or `(B, L)` for `x`."""
    batch, length = x.shape[:2]
    if not is_integer_tensor(positions) or tuple(positions.shape) not in (
        (length,),
        (1, length),
        (batch, length),
    ):
        raise ShapeError(
            f"positions must be an integer tensor ({length},) or ({batch}, {length}), one for each token; "
            f"got {given(positions)}"
        )


def check_real(name: str, padding: Tensor, x: Tensor) -> None:
    """Raise a `ShapeError` unless `padding` is a bool tensor for the tokens of `x`."""
    if not isinstance(padding, Tensor) or padding.dtype != torch.bool or padding.shape != x.shape[:2]:
        raise ShapeError(
            f"padding must be a bool tensor {tuple(x.shape[:2])}, True at real tokens of {name}; got "
            f"{given(padding)}"
        )


def check_mask(mask: Mask) -> None:
    """Raise a `ConfigError` unless it is a mask."""
    if not isinstance(mask, Mask):
        raise ConfigError(
            f"mask must be a mask such as causal(); got {given(mask)}; a tensor of real tokens goes to "
            "padding="
        )
