"""Float32 products of matrices on a CPU, by the quicker one of the two libraries that torch carries.

`torch.mm` asks MKL, which takes AVX-512 on processors of its own maker and AVX2 on those of others. There it
has half of the speed that oneDNN has, and its exponential a quarter of that of torch's own powers of two.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["onednn_is_quicker", "product"]


@cache
def onednn_is_quicker() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL does: AVX-512, and not by Intel."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and _vendor() not in ("", "GenuineIntel")
    )


def _vendor() -> str:
    """Who made the processor, as it says itself; empty where that cannot be found."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def product(a: Float[Tensor, "r k"], b: Float[Tensor, "c k"]) -> Float[Tensor, "r c"]:
    """a bᵀ by oneDNN, without a gradient. b may be transposed in memory; an `a` that is, is copied."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
