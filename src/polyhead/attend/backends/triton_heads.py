"""Heads that talk on a CUDA device: softmax between two matrices over the heads, as Triton kernels."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from polyhead.attend.across_heads import HeadMix
from polyhead.attend.plan import Request
from polyhead.attend.problem import Problem
from polyhead.attend.refusals import ONE_STEP, beyond_softmax, inside_transform
from polyhead.attend.stream import stream
from polyhead.attend.triton_heads.sizes import FEWEST, MOST_HEADS, MOST_REPEAT, WIDTHS, near, padded

__all__ = ["TritonHeads"]


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None


def _no_device(device: torch.device) -> str:
    """Why the kernels do not run there; empty when they do."""
    if device.type != "cuda":
        return f"its kernels run on CUDA devices; the call is on {device}"
    if not _installed():
        return "triton is not installed: pip install 'polyhead[triton]'"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels are compiled for NVIDIA devices of compute capability 8.0 or newer"
    return ""


class TritonHeads:
    """`head_mix` before softmax, after it or both, windows, padding; forward and backward in O(L) memory."""

    name = "triton_heads"
    dense = False
    opt_in = ""

    def refuse(self, request: Request) -> str:
        q, k, v, problem = request.q, request.k, request.v, request.problem
        for part in (problem.score, problem.weight_map):
            if part is not None and not isinstance(part, HeadMix):
                return f"it maps logits and weights by one head_mix each, not by {part}"
        if problem.score is None and problem.weight_map is None:
            return "the call has no head_mix"
        reason = beyond_softmax(request, score=True, weight_map=True, lse=True)
        if reason:
            return reason
        if near(problem.mask) is None:
            return f"{problem.mask} is not a window around each query with padding"
        where = _no_device(q.device)
        if where:
            return where
        if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"its kernels have no {str(q.dtype).removeprefix('torch.')}"
        if 0 in (*q.shape, *k.shape, *v.shape):
            return "it does not define attention over nothing"
        if q.shape[2] < FEWEST:
            return f"a program holds tiles of at least {FEWEST} queries; the call has {q.shape[2]}"
        heads, kv_heads = q.shape[1], k.shape[1]
        if padded(kv_heads) * padded(heads // kv_heads) > MOST_HEADS:
            return (
                f"a program holds all heads of a tile, at most {MOST_HEADS} once the numbers of key/value "
                "heads and of query heads for each are padded to powers of two; "
                f"the call has {kv_heads} x {heads // kv_heads}"
            )
        if heads // kv_heads > MOST_REPEAT:
            return (
                f"it runs at most {MOST_REPEAT} query heads for each key/value head; "
                f"the call has {heads // kv_heads}"
            )
        for name, width in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
            if not WIDTHS[0] <= width <= WIDTHS[1]:
                return f"it is made for head widths of {WIDTHS[0]} to {WIDTHS[1]}; {name} have {width}"
        for part in (problem.score, problem.weight_map):
            if isinstance(part, HeadMix) and part.matrix.shape[0] != heads:
                return f"head_mix mixes {part.matrix.shape[0]} heads, but the call has {heads} query heads"
        if inside_transform():
            return ONE_STEP
        return ""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        return stream(
            self, request.q, request.k, request.v, request.problem, seed=0, want_lse=request.want_lse
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, seed: int, want_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        from polyhead.attend.triton_heads import launch  # imports triton

        return launch.forward(q, k, v, problem, want_lse=want_lse)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        problem: Problem,
        grad: Tensor,
        grad_lse: Tensor | None,
        *,
        seed: int,
    ) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
        from polyhead.attend.triton_heads import launch  # imports triton

        return launch.backward(q, k, v, problem, grad, grad_lse)
