"""torch's scaled_dot_product_attention, where it is exact and fused: plain softmax attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.masks import Padding, causal
from polyhead.attend.normalizers import Softmax
from polyhead.attend.plan import Request

__all__ = ["Sdpa", "plain"]

_CAUSAL = causal()


def plain(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None, allowed: Tensor | None = None
) -> Tensor:
    """Softmax attention by SDPA with grouped heads; `causal` needs L == S or L == 1."""
    batch, heads, queries, width = q.shape
    kv_heads = k.shape[1]
    if queries == 1 and kv_heads != heads:
        # the queries of a group become rows, so that its keys are read once and not once a head
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, width)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=allowed, scale=scale)
        return out.reshape(batch, heads, 1, v.shape[-1])
    # a branch, not an expression: under torch.compile the length may be symbolic
    first_to_last = bool(causal) if queries > 1 else False
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=allowed,
        is_causal=first_to_last,
        scale=scale,
        enable_gqa=kv_heads != heads,
    )


class Sdpa:
    """Plain softmax, no mask, causal or padding."""

    name = "sdpa"
    dense = False
    opt_in = ""

    def refuse(self, request: Request) -> str:
        q, k, v, problem = request.q, request.k, request.v, request.problem
        if problem.score is not None:
            return f"it has no score maps, and the call has {problem.score}"
        if not (isinstance(problem.normalizer, Softmax) and problem.normalizer.sink is None):
            return f"it normalises by plain softmax, not by {problem.normalizer}"
        if request.want_lse:
            return "it does not return the log-sum-exp"
        if 0 in (*q.shape, *k.shape, *v.shape):
            return "it does not define attention over nothing"
        cpu = q.device.type == "cpu"
        if cpu and problem.dropout:
            return "on CPU it holds all L × S scores under dropout"
        if cpu and v.shape[-1] != k.shape[-1]:
            return (
                f"on CPU it holds all L × S scores when the value width ({v.shape[-1]}) "
                f"is not the key width ({k.shape[-1]})"
            )
        mask, queries, keys = problem.mask, q.shape[2], k.shape[2]
        if mask is None or (mask == _CAUSAL and queries in (1, keys)):
            return ""
        if mask == _CAUSAL:
            return (
                f"its causal mask starts at the first key, and here L = {queries} queries end S = {keys} keys"
            )
        if isinstance(mask, Padding):
            return "" if cpu else "its fused kernels on this device take no padding mask"
        return f"it would need {mask} as an L × S tensor"

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        problem = request.problem
        allowed = None
        if isinstance(problem.mask, Padding):
            allowed = problem.mask.mask.to(request.q.device)[:, None, None, :]
        causal = problem.mask == _CAUSAL
        if problem.dropout:
            out = F.scaled_dot_product_attention(
                request.q,
                request.k,
                request.v,
                dropout_p=problem.dropout,
                is_causal=causal and request.q.shape[2] > 1,
                scale=problem.scale,
                enable_gqa=request.k.shape[1] != request.q.shape[1],
            )
            return out, None
        out = plain(request.q, request.k, request.v, causal=causal, scale=problem.scale, allowed=allowed)
        if allowed is not None:
            # an item without a single real key: SDPA leaves it undefined
            out = torch.where(allowed.any(-1, keepdim=True), out, 0.0)
        return out, None
