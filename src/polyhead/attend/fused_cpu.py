"""Fused attention on a CPU, and its backward, for backends that cut a call into pieces.

By torch's own kernel, or where products of whole rows are quicker by those (`polyhead.attend.cpu_rows`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from polyhead.attend import cpu_rows
from polyhead.attend.plan import Request
from polyhead.attend.refusals import ONE_STEP, beyond_softmax, inside_transform

__all__ = ["HIDDEN", "fused", "fused_backward", "unfit"]

HIDDEN = -1e30  # finite, so that a row that sees nothing of a piece gets a number, and weight 0


def fused(
    q: Float[Tensor, "m h r d"],
    k: Float[Tensor, "m h c d"],
    v: Float[Tensor, "m h c d"],
    added: Float[Tensor, "n 1 r l"] | None,
    scale: float,
    keys: int | None = None,
) -> tuple[Float[Tensor, "m h r d"], Float[Tensor, "m h r"]]:
    """Output and log-sum-exp of softmax attention over the first `keys` keys; None: all.

    `added` goes to the scores of the last l of these, of each m or, with n = 1, of all.
    """
    keys = k.shape[2] if keys is None else keys
    if cpu_rows.pays(q.shape[2], keys, q.dtype):
        return cpu_rows.forward(q, k, v, added, scale, keys)
    k, v = k[:, :, :keys], v[:, :, :keys]
    added = _for_all(added, k)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=added, scale=scale)


def fused_backward(
    grad: Float[Tensor, "m h r d"],
    q: Float[Tensor, "m h r d"],
    k: Float[Tensor, "m h c d"],
    v: Float[Tensor, "m h c d"],
    out: Float[Tensor, "m h r d"],
    lse: Float[Tensor, "m h r"],
    added: Float[Tensor, "n 1 r l"] | None,
    scale: float,
    keys: int | None = None,
) -> tuple[Float[Tensor, "m h r d"], Float[Tensor, "m h keys d"], Float[Tensor, "m h keys d"]]:
    """Gradients for q and the first `keys` of k and v; None: all.

    They are shares of them where `out` and `lse` are those of rows with further keys.
    """
    keys = k.shape[2] if keys is None else keys
    if cpu_rows.pays(q.shape[2], keys, q.dtype):
        return cpu_rows.backward(grad, q, k, v, out, lse, added, scale, keys)
    k, v = k[:, :, :keys], v[:, :, :keys]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, attn_mask=_for_all(added, k), scale=scale
    )


def _for_all(added: Tensor | None, k: Tensor) -> Tensor | None:
    """With zeros for the keys before the last ones."""
    missing = 0 if added is None else k.shape[2] - added.shape[-1]
    return added if added is None or not missing else F.pad(added, (missing, 0))


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
