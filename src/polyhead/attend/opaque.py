"""`attend` inside `torch.compile`: everything but plain attention is one opaque step of the graph.

The compiler sees an operator on tensors. The description travels beside it as a number, the place where its
tensor-free part is kept; which streaming backend runs is decided when the step runs, so that a new length
compiles nothing anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from polyhead.attend.backends import STREAMING
from polyhead.attend.plan import Request, pick
from polyhead.attend.precision import exact, wide
from polyhead.attend.problem import Problem
from polyhead.attend.stream import Kernel, leaves_of
from polyhead.description import read, spell
from polyhead.errors import ConfigError

__all__ = ["attend_opaque"]

_T = TypeVar("_T")

# What was compiled so far: the number of a description in a graph is its place here.
_SPELLED: list[Any] = []
_PLACES: dict[Any, int] = {}
_LOCK = threading.Lock()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _place(spelled: Any) -> int:
    with _LOCK:
        if spelled not in _PLACES:
            _SPELLED.append(spelled)
            _PLACES[spelled] = len(_SPELLED) - 1
        return _PLACES[spelled]


def attend_opaque(request: Request, backend: str) -> tuple[Tensor, Tensor | None]:
    """Run a call as one step of the graph that is being compiled; `backend` is "auto" or a streaming one."""
    if getattr(torch.compiler, "is_exporting", lambda: False)():
        raise ConfigError(
            "torch.export keeps no descriptions, so only plain and causal softmax attention can be exported; "
            f"this call is {request.problem}"
        )
    problem = request.problem
    tensors: list[Tensor] = []
    place = _place(spell((problem.mask, problem.score, problem.normalizer), tensors))
    seed = torch.randint(2**62, ()) if problem.dropout else torch.zeros((), dtype=torch.int64)
    out, lse = _attend(
        request.q,
        request.k,
        request.v,
        tensors,
        place,
        problem.scale,
        problem.dropout,
        seed,
        request.want_lse,
        backend,
    )
    return out, lse if request.want_lse else None


def _problem(spec: int, scale: float, dropout: float, tensors: tuple[Tensor, ...]) -> Problem:
    mask, score, normalizer = read(_SPELLED[spec], tensors)
    return Problem(mask, score, normalizer, scale, dropout)


def _kernel(q: Tensor, k: Tensor, v: Tensor, problem: Problem, want_lse: bool, backend: str) -> Kernel:
    request = Request(q, k, v, problem, want_lse, needs_grad=False)
    chosen: Kernel = pick(request, STREAMING, backend)  # type: ignore[assignment]
    return chosen


def _with_autograd(work: Callable[[], _T], device: torch.device) -> _T:
    """Do `work` where autograd can follow: an operator's body runs below it, a thread of its own does not."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def there() -> _T:
        with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else nullcontext():
            return work()

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(there).result()


_CALL = "Tensor q, Tensor k, Tensor v, Tensor[] tensors, int spec, float scale, float dropout, Tensor seed, "


@torch.library.custom_op(
    "polyhead::attend", mutates_args=(), schema=f"({_CALL}bool want_lse, str backend) -> (Tensor, Tensor)"
)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: list[Tensor],
    spec: int,
    scale: float,
    dropout: float,
    seed: Tensor,
    want_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = _problem(spec, scale, dropout, tuple(tensors))
    kernel = _kernel(q, k, v, problem, want_lse, backend)
    with exact(q.device):
        out, lse = kernel.forward(q, k, v, problem, seed=int(seed), want_lse=want_lse)
    # an operator's results own their memory and are laid out as announced
    return out.contiguous(), q.new_empty(0, dtype=wide(q.dtype)) if lse is None else lse


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: list[Tensor],
    spec: int,
    scale: float,
    dropout: float,
    seed: Tensor,
    want_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3] if want_lse else (0,), dtype=wide(q.dtype))
    return q.new_empty(*q.shape[:3], v.shape[-1]), lse


@torch.library.custom_op(
    "polyhead::attend_backward",
    mutates_args=(),
    schema=f"({_CALL}bool want_lse, str backend, bool[] wanted, Tensor grad, Tensor grad_lse) -> Tensor[]",
)
def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: list[Tensor],
    spec: int,
    scale: float,
    dropout: float,
    seed: Tensor,
    want_lse: bool,
    backend: str,
    wanted: list[bool],
    grad: Tensor,
    grad_lse: Tensor,
) -> list[Tensor]:
    leaves = leaves_of(tensors, tuple(wanted))
    problem = _problem(spec, scale, dropout, leaves)
    kernel = _kernel(q, k, v, problem, want_lse, backend)
    dq, dk, dv, own = _with_autograd(
        lambda: kernel.backward(q, k, v, problem, grad, grad_lse if want_lse else None, seed=int(seed)),
        q.device,
    )
    rest = [own[id(leaf)] for leaf in leaves if leaf.requires_grad]
    return [x.contiguous() for x in (dq, dk, dv, *rest)]


@_attend_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: list[Tensor],
    spec: int,
    scale: float,
    dropout: float,
    seed: Tensor,
    want_lse: bool,
    backend: str,
    wanted: list[bool],
    grad: Tensor,
    grad_lse: Tensor,
) -> list[Tensor]:
    kept = [t for t, need in zip(tensors, wanted, strict=True) if need]
    return [x.new_empty(x.shape) for x in (q, k, v, *kept)]


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, tensors, spec, scale, dropout, seed, want_lse, backend = inputs
    ctx.save_for_backward(q, k, v, seed, *tensors)
    ctx.plan = (spec, scale, dropout, want_lse, backend, [bool(t.requires_grad) for t in tensors])


def _differentiate(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, seed, *tensors = ctx.saved_tensors
    spec, scale, dropout, want_lse, backend, wanted = ctx.plan
    dq, dk, dv, *rest = _attend_backward(
        q, k, v, tensors, spec, scale, dropout, seed, want_lse, backend, wanted, grad, grad_lse
    )
    found = iter(rest)
    own = [next(found) if need else None for need in wanted]
    return dq, dk, dv, own, None, None, None, None, None, None


_attend.register_autograd(_differentiate, setup_context=_setup)
