"""Fused attention on a CPU, and its backward, for backends that cut a call into pieces.

By torch's own kernel, or where products of whole rows are quicker by those (`polyhead.attend.cpu_rows`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from polyhead.attend import cpu_rows
from polyhead.attend.plan import Request
from polyhead.attend.precision import wide
from polyhead.attend.refusals import ONE_STEP, beyond_softmax, inside_transform

__all__ = ["HIDDEN", "fused", "fused_backward", "unfit"]

HIDDEN = -1e30  # finite, so that a row that sees nothing of a piece gets a number, and weight 0


def fused(
    q: Float[Tensor, "m h r d"],
    k: Float[Tensor, "m h c d"],
    v: Float[Tensor, "m h c d"],
    added: Float[Tensor, "n g r l"] | None,
    scale: float,
    skipped: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "m h r d"], Float[Tensor, "m h r"]]:
    """Output and log-sum-exp of softmax attention.

    `added` goes to the scores of the last l keys, of each m or, with n = 1, of all, and of each h or, with
    g = 1, of all. Of each m the first `skipped` keys do not count; None: all do.
    """
    if cpu_rows.pays(q.shape[2], k.shape[2], q.dtype):
        return cpu_rows.forward(q, k, v, added, scale, skipped)
    added = _for_all(added, k, skipped)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=added, scale=scale)


def fused_backward(
    grad: Float[Tensor, "m h r d"],
    q: Float[Tensor, "m h r d"],
    k: Float[Tensor, "m h c d"],
    v: Float[Tensor, "m h c d"],
    out: Float[Tensor, "m h r d"],
    lse: Float[Tensor, "m h r"],
    added: Float[Tensor, "n g r l"] | None,
    scale: float,
    skipped: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "m h r d"], Float[Tensor, "m e c d"], Float[Tensor, "m e c d"]]:
    """Gradients for q, k and v; of keys that all heads share, one tensor expanded, summed over heads (e = 1).

    They are shares of them where `out` and `lse` are those of rows with further keys.
    """
    if cpu_rows.pays(q.shape[2], k.shape[2], q.dtype):
        return cpu_rows.backward(grad, q, k, v, out, lse, added, scale, skipped)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, attn_mask=_for_all(added, k, skipped), scale=scale
    )
    if q.shape[1] > 1 and k.stride(1) == 0:
        dk, dv = dk.sum(1, keepdim=True), dv.sum(1, keepdim=True)
    return dq, dk, dv


def _for_all(added: Tensor | None, k: Tensor, skipped: Tensor | None) -> Tensor | None:
    """A table for all keys, which the kernel wants."""
    keys = k.shape[2]
    if added is not None and added.shape[-1] < keys:
        added = F.pad(added, (keys - added.shape[-1], 0))
    if skipped is None:
        return added
    nothing = (torch.arange(keys, device=k.device) < skipped[:, None])[:, None, None]
    if added is None:
        return torch.zeros(nothing.shape, dtype=wide(k.dtype)).masked_fill_(nothing, HIDDEN)
    return added.expand(len(k), -1, -1, -1).masked_fill(nothing, HIDDEN)


def unfit(request: Request) -> str:
    """Why the kernel is not for a call, whatever its mask; empty if it is."""
    reason = beyond_softmax(request, lse=True)
    if reason:
        return reason
    if request.q.device.type != "cpu":
        return f"it is for a CPU, not for {request.q.device.type}"
    if inside_transform():
        return ONE_STEP
    return ""
