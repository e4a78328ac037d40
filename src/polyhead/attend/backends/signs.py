"""Queries and keys of signs and magnitudes: the scores as integer products, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend import tiles
from polyhead.attend.normalizers import Softmax
from polyhead.attend.plan import Request
from polyhead.attend.refusals import inside_transform
from polyhead.attend.signs import SignOperands, of_one_magnitude

__all__ = ["Signs"]


class Signs:
    """Any mask, score, normaliser and weight map; forward only, in O(L) memory."""

    name = "signs"
    dense = False
    opt_in = "for rows that differ in their signs alone: ask for it with backend='signs'"

    def refuse(self, request: Request) -> str:
        q, k = request.q, request.k
        if q.device.type != "cpu":
            return f"it multiplies integers on a CPU; the call is on {q.device}"
        if request.needs_grad:
            return "it has no backward"
        if inside_transform():
            return "torch.func transforms (vmap, jvp) cannot look into it"
        if q.dtype == torch.float64:
            return "float64 is multiplied as it is"
        if q.shape[-1] < 2:
            return f"torch's product of integers needs a width of at least 2; q and k have {q.shape[-1]}"
        if request.want_lse and not isinstance(request.problem.normalizer, Softmax):
            return f"return_lse is defined for softmax only, not for {request.problem.normalizer}"
        if not (of_one_magnitude(q) and of_one_magnitude(k)):
            return "the numbers of a row of q or k differ in more than their signs"
        return ""

    @torch.no_grad()
    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        seed = int(torch.randint(2**62, ())) if request.problem.dropout else 0
        return tiles.forward(
            request.q,
            request.k,
            request.v,
            request.problem,
            seed=seed,
            want_lse=request.want_lse,
            operands=SignOperands,
        )
