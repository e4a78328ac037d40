"""One softmax over keys that were attended to in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["merged"]


def merged(
    outputs: Sequence[Float[Tensor, "B H L Dv"]], sums: Sequence[Float[Tensor, "B H L"]]
) -> Float[Tensor, "B H L Dv"]:
    """What attention to all parts together gives: Σ_p softmax_p(sum_p) output_p.

    Args:
        outputs: of attention to every part.
        sums: the log-sum-exps of its logits, -inf where a row saw nothing there. A row that saw nothing
            anywhere gives zeros.
    """
    logits = torch.stack(list(sums))  # P B H L
    nothing = (logits == -torch.inf).all(0)
    share = torch.softmax(logits.masked_fill(nothing, 0.0), dim=0)[..., None]
    total = share[0] * outputs[0].to(share.dtype)
    for part, y in zip(share[1:], outputs[1:], strict=True):
        total = total + part * y.to(share.dtype)
    return total.to(outputs[0].dtype)
