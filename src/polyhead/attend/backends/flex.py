"""torch's compiled FlexAttention: a mask as its block mask, a score by distance as its score_mod."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from polyhead.attend.plan import Request
from polyhead.attend.refusals import beyond_softmax
from polyhead.attend.scores import Positional, Score, SoftCap

__all__ = ["Flex"]


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _score_mod(score: Score, request: Request) -> Callable[..., Tensor]:
    queries, keys = request.q.shape[2], request.k.shape[2]
    if isinstance(score, SoftCap):
        cap = score.cap
        return lambda s, b, h, i, j: torch.tanh(s / cap) * cap
    assert isinstance(score, Positional)
    # every distance i - j of the call, from -(keys - 1) to keys - 1
    table = score.at(torch.arange(-(keys - 1), keys, device=request.q.device)).to(request.q.dtype)
    many, offset = table.shape[0] > 1, keys - queries
    return lambda s, b, h, i, j: s + table[h if many else 0, i + offset - j + keys - 1]


class Flex:
    """FlexAttention, compiled for the shapes and the mask of the call."""

    name = "flex"
    dense = False
    opt_in = "it compiles for seconds to tens of seconds per shape, so it has to be asked for: backend='flex'"

    def refuse(self, request: Request) -> str:
        problem = request.problem
        reason = beyond_softmax(request, score=True, lse=True)
        if reason:
            return reason
        if problem.score is not None and not isinstance(problem.score, Positional | SoftCap):
            return f"it is handed biases by distance and soft caps only, not {problem.score}"
        if request.q.device.type == "cpu":
            if request.needs_grad:
                return "its CPU build has no backward"
            if request.want_lse:
                return "its CPU build does not return the log-sum-exp"
        if 0 in (*request.q.shape, *request.k.shape, *request.v.shape):
            return "it does not define attention over nothing"
        if problem.score is not None and any(t.requires_grad for t in problem.score.tensors()):
            return "gradients of a learned bias would need its slow gather backward"
        if request.q.dtype == torch.float64:
            return "its kernels have no float64"
        return ""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        from torch.nn.attention.flex_attention import create_block_mask

        q, k, v, problem = request.q, request.k, request.v, request.problem
        batch, heads, queries, _ = q.shape
        keys = k.shape[2]
        block_mask = None
        if problem.mask is not None:
            mask, offset = problem.mask.to(q.device), keys - queries

            def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return mask.allowed(b, h, i + offset, j)

            block_mask = create_block_mask(allowed, batch, heads, queries, keys, device=str(q.device))
        out = _compiled()(
            q,
            k,
            v,
            score_mod=None if problem.score is None else _score_mod(problem.score, request),
            block_mask=block_mask,
            scale=problem.scale,
            enable_gqa=k.shape[1] != heads,
            **({"return_lse": True} if request.want_lse else {}),
        )
        if request.want_lse:
            return out[0], out[1].float()
        return out, None
