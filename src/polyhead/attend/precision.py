"""In which dtype the arithmetic is done."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["exact", "wide"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: half precisions are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast: a kernel has chosen its precision, and rounds once, at the end."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
