"""Float32 products of matrices on a CPU, by the quicker one of the two libraries that torch carries.

`torch.mm` asks MKL, which takes AVX-512 on processors of its own maker and AVX2 on those of others. There it
has half of the speed that oneDNN has, and its exponential a quarter of that of torch's own powers of two.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.machine import vendor

__all__ = ["onednn_is_quicker", "product"]


@cache
def onednn_is_quicker() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL does: AVX-512, and not by Intel."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and vendor() not in ("", "GenuineIntel")
    )


def product(a: Float[Tensor, "r k"], b: Float[Tensor, "c k"]) -> Float[Tensor, "r c"]:
    """a bᵀ by oneDNN, without a gradient. b may be transposed in memory; an `a` that is, is copied."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
