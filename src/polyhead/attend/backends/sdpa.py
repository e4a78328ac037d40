"""torch's scaled_dot_product_attention, where it is exact and fused: plain softmax attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.chosen_row import pays
from polyhead.attend.few_rows import attend_one
from polyhead.attend.masks import And, Mask, Padding, causal, densify
from polyhead.attend.normalizers import Softmax
from polyhead.attend.plan import Request

__all__ = ["Sdpa", "plain"]

_CAUSAL = causal()
# Up to so many pairs (256 x 256) a mask of any kind is written out: nothing else is as quick for so few.
_SMALL = 1 << 16


def plain(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None, allowed: Tensor | None = None
) -> Tensor:
    """Softmax attention by SDPA with grouped heads; `causal` needs L == S or L == 1."""
    # a fused kernel wants its last dimension dense, and holds all L × S scores otherwise
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, queries, width = q.shape
    kv_heads = k.shape[1]
    if queries == 1 and allowed is None:
        found = attend_one(q, k, v, scale)
        if found is not None:
            return found
    if queries == 1 and kv_heads == heads and allowed is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)  # microseconds count in decoding
    if queries == 1 and kv_heads != heads and (allowed is None or allowed.shape[1] == 1):
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
    """Plain softmax: no mask, causal, padding; for few tokens any mask."""

    name = "sdpa"
    dense = False
    opt_in = ""

    def refuse(self, request: Request) -> str:
        q, k, v, problem = request.q, request.k, request.v, request.problem
        if problem.score is not None:
            return f"it has no score maps, and the call has {problem.score}"
        if problem.weight_map is not None:
            return f"it has no maps of the weights, and the call has {problem.weight_map}"
        if not (isinstance(problem.normalizer, Softmax) and problem.normalizer.sink is None):
            return f"it normalises by plain softmax, not by {problem.normalizer}"
        if request.want_lse and (q.device.type != "cpu" or request.needs_grad or v.shape[-1] != k.shape[-1]):
            return "it does not return the log-sum-exp on this device, nor with gradients"
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
        if request.want_lse:
            return (
                "it returns the log-sum-exp without a mask, and with a causal one for as many queries as keys"
            )
        if cpu and pays(request):
            return f"of {keys} keys it would read all, and blocks of them were chosen"
        if queries * keys <= _SMALL and not problem.dropout:
            return ""
        if mask == _CAUSAL:
            return (
                f"its causal mask starts at the first key, and here L = {queries} queries end S = {keys} keys"
            )
        if _only_padding(mask, queries) is not None:
            return "" if cpu else "its fused kernels on this device take no padding mask"
        return f"it would need {mask} as an L × S tensor"

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        problem = request.problem
        if request.want_lse:
            return _with_lse(request)
        allowed = self._allowed(request)
        causal = problem.mask == _CAUSAL and allowed is None
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
            # a row that may look at nothing: SDPA leaves it undefined
            out = torch.where(allowed.any(-1, keepdim=True), out, 0.0)
        return out, None

    def _allowed(self, request: Request) -> Tensor | None:
        """The mask as SDPA takes it, `(B or 1, H or 1, L or 1, S)`; None: no mask, or its own causal one."""
        mask, queries, keys = request.problem.mask, request.q.shape[2], request.k.shape[2]
        if mask is None or (mask == _CAUSAL and queries in (1, keys)):
            return None
        real = _only_padding(mask, queries)
        if real is not None:
            return real.mask.to(request.q.device)[:, None, None, :]
        batch, heads = request.q.shape[:2]
        return densify(mask, batch=batch, heads=heads, queries=queries, keys=keys, device=request.q.device)


def _with_lse(request: Request) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by the kernel that SDPA runs on a CPU, which gives both."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (request.q, request.k, request.v))
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:  # every query head reads the keys where they are
        k, v = (x[:, :, None].expand(-1, -1, repeat, -1, -1).flatten(0, 1) for x in (k, v))
        q = q.unflatten(1, (-1, repeat)).flatten(0, 1)
    causal = request.problem.mask is not None and q.shape[2] > 1
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, scale=request.problem.scale
    )
    return out.reshape(request.q.shape), lse.reshape(request.q.shape[:3])


def _only_padding(mask: Mask, queries: int) -> Padding | None:
    """The padding, if the mask hides nothing else: the last query alone may look at all that lies before."""
    if queries == 1 and isinstance(mask, And) and len(mask.terms) == 2 and _CAUSAL in mask.terms:
        mask = mask.terms[1 - mask.terms.index(_CAUSAL)]
    return mask if isinstance(mask, Padding) else None
