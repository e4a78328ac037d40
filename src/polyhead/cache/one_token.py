"""Plain attention of one new token over a long context, with all threads of a CPU.

SDPA gives every (batch item, key/value head) to one thread. Where these are fewer than threads, or do not
divide among them, the context is cut into parts, and the answers are joined by their log-sum-exps:

    o = Σ_p softmax_p(lse_p) o_p
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.attend.backends.sdpa import plain

__all__ = ["attend_one"]

_SHORTEST = 1024  # keys of a part: below, starting threads costs more than they save
_flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def attend_one(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention `(B, H, 1, Dv)` of queries `(B, H, 1, D)` over all keys `(B, G, S, D)`."""
    parts = _parts(q, k, v)
    if parts == 1:
        return plain(q, k, v, causal=False, scale=scale)
    heads, kv_heads, keys = q.shape[1], k.shape[1], k.shape[2]
    length = keys // parts
    rest = parts * length
    grouped = q.view(kv_heads, 1, heads // kv_heads, -1)
    cut = [x[0, :, :rest].unflatten(1, (parts, length)) for x in (k, v)]
    out, lse = _flash(grouped.expand(-1, parts, -1, -1), *cut, scale=scale)  # type: ignore[misc]
    if rest < keys:
        more = [x[0, :, None, rest:] for x in (k, v)]
        out_more, lse_more = _flash(grouped, *more, scale=scale)  # type: ignore[misc]
        out, lse = torch.cat([out, out_more], dim=1), torch.cat([lse, lse_more], dim=1)
    weights = torch.softmax(lse, dim=1).unsqueeze(-1)
    return (out * weights).sum(1).to(q.dtype).view(1, heads, 1, -1)


def _parts(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Into how many parts the context is cut."""
    batch, kv_heads, keys, width = k.shape
    if _flash is None or batch != 1 or keys < 2 * _SHORTEST or q.device.type != "cpu" or v.shape[3] != width:
        return 1
    threads = torch.get_num_threads()
    return min(threads // math.gcd(threads, kv_heads), keys // _SHORTEST)
