"""The tile engine as a backend: whatever can be said, in O(L) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend import tiles
from polyhead.attend.normalizers import Softmax
from polyhead.attend.plan import Request
from polyhead.attend.stream import stream

__all__ = ["Tiles"]


class Tiles:
    """Any mask, score, normaliser and weight map; forward and backward in O(L) memory."""

    name = "tiles"
    dense = False
    opt_in = ""
    forward = staticmethod(tiles.forward)
    backward = staticmethod(tiles.backward)

    def refuse(self, request: Request) -> str:
        if request.want_lse and not isinstance(request.problem.normalizer, Softmax):
            return f"return_lse is defined for softmax only, not for {request.problem.normalizer}"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return (
                "it is one step for autograd and cannot be looked into by torch.func transforms (vmap, jvp)"
            )
        return ""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        seed = int(torch.randint(2**62, ())) if request.problem.dropout else 0
        return stream(
            self, request.q, request.k, request.v, request.problem, seed=seed, want_lse=request.want_lse
        )
