"""Plain attention of few rows over many keys, with all threads of a CPU: a step of decoding.

torch's fused kernel gives every group of rows to one thread. Where groups are fewer than threads, or do not
divide among them, the keys are cut into parts, whose outputs are joined by their log-sum-exps:

    o = Σ_p e^(l_p - l) o_p,   l = log Σ_p e^l_p

as "FlashDecoding" does on a GPU (Dao, Haziza, Massa and Sizov, 2023).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.attend.refusals import inside_transform

__all__ = ["attend_one", "few_rows", "parts_for"]

_SHORTEST = 512  # keys of a part: below, starting threads costs more than they save
_IDLE = 1.2  # threads' time over what groups need, from which on parts are worth their joining
_kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def parts_for(groups: int, keys: int) -> int:
    """Into how many parts the keys of so many groups of rows are cut."""
    threads = torch.get_num_threads()
    if -(-groups // threads) * threads < _IDLE * groups:
        return 1
    return max(1, min(threads // math.gcd(threads, groups), keys // _SHORTEST))


def few_rows(
    q: Float[Tensor, "m r d"],
    k: Float[Tensor, "m n d"],
    v: Float[Tensor, "m n d"],
    added: Float[Tensor, "m r n"] | None,
    scale: float,
) -> tuple[Float[Tensor, "m r d"], Float[Tensor, "m r"]]:
    """Output and log-sum-exp of softmax attention; `added`, finite, goes to the scores."""
    assert _kernel is not None
    parts = parts_for(*k.shape[:2])
    length = k.shape[1] // parts
    cut = parts * length
    pieces = [x[:, :cut].unflatten(1, (parts, length)) for x in (k, v)]
    mask = None if added is None else added[..., :cut].unflatten(-1, (parts, length)).transpose(1, 2)
    out, lse = _kernel(q[:, None].expand(-1, parts, -1, -1), *pieces, attn_mask=mask, scale=scale)
    if parts == 1:
        return out[:, 0], lse[:, 0]
    if cut < k.shape[1]:
        mask = None if added is None else added[:, None, :, cut:]
        more = _kernel(q[:, None], k[:, None, cut:], v[:, None, cut:], attn_mask=mask, scale=scale)
        out, lse = (torch.cat(both, 1) for both in zip((out, lse), more, strict=True))
    weights = lse.softmax(1)
    return (out * weights[..., None]).sum(1).to(q.dtype), lse.logsumexp(1)


def attend_one(
    q: Float[Tensor, "B H 1 D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S D"], scale: float | None
) -> Float[Tensor, "B H 1 D"] | None:
    """One query a head over all keys, these cut into parts; None where SDPA is as quick, or has to be asked.

    `scale`: default 1/√D.
    """
    if (
        k.shape[2] < 2 * _SHORTEST
        or q.device.type != "cpu"
        or _kernel is None
        or torch.compiler.is_compiling()
    ):
        return None
    (batch, heads, _, width), kv_heads = q.shape, k.shape[1]
    if (
        torch.compiler.is_compiling()
        or parts_for(batch * kv_heads, k.shape[2]) == 1
        or v.shape[3] != width
        or not k.stride(3) == v.stride(3) == 1
        or (batch > 1 and any(x.stride(0) != kv_heads * x.stride(1) for x in (k, v)))  # they would be copied
        or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or torch.is_autocast_enabled("cpu")
        or inside_transform()
    ):
        return None
    rows = q.reshape(batch * kv_heads, heads // kv_heads, width)
    scale = 1 / math.sqrt(width) if scale is None else scale
    return few_rows(rows, k.flatten(0, 1), v.flatten(0, 1), None, scale)[0].view(q.shape)
