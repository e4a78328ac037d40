"""The tile engine as a backend: whatever can be said, in O(L) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend import tiles
from polyhead.attend.normalizers import Softmax
from polyhead.attend.plan import Request
from polyhead.attend.refusals import ONE_STEP, inside_transform
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
        if inside_transform():
            return ONE_STEP
        return ""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        seed = int(torch.randint(2**62, ())) if request.problem.dropout else 0
        return stream(
            self, request.q, request.k, request.v, request.problem, seed=seed, want_lse=request.want_lse
        )
