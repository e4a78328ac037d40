"""`attend` inside `torch.compile`: everything but plain attention is one opaque step of the graph.

The compiler sees an operator on tensors. The description travels beside it as a text with its numbers taken
out, which may be symbolic: neither a new length nor a new window compiles anything anew, and which streaming
backend runs is decided when the step runs. Importing this file imports the compiler: `attend` does so when
it is being compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from polyhead.attend.backends import STREAMING
from polyhead.attend.plan import Request, pick
from polyhead.attend.precision import exact, wide
from polyhead.attend.problem import Problem
from polyhead.attend.spelling import Spelling, function_name, read, spell
from polyhead.attend.stream import Kernel, leaves_of

__all__ = ["attend_opaque", "constant_name"]

_T = TypeVar("_T")

# The compiler does not look into it: a name is a constant of the graph.
constant_name = torch.compiler.assume_constant_result(function_name)


def attend_opaque(request: Request, backend: str) -> tuple[Tensor, Tensor | None]:
    """Run a call as one step of the graph that is being compiled; `backend` is "auto" or a streaming one."""
    problem = request.problem
    found = Spelling()
    text = spell((problem.mask, problem.score, problem.normalizer, problem.weight_map), found, constant_name)
    seed = torch.randint(2**62, ()) if problem.dropout else torch.zeros((), dtype=torch.int64)
    out, lse = _attend(
        request.q,
        request.k,
        request.v,
        found.tensors,
        found.ints,
        found.floats,
        text,
        problem.scale,
        problem.dropout,
        seed,
        request.want_lse,
        backend,
    )
    return out, lse if request.want_lse else None


def _problem(
    text: str, tensors: Sequence[Tensor], ints: list[int], floats: list[float], scale: float, dropout: float
) -> Problem:
    mask, score, normalizer, weight_map = read(text, tensors, ints, floats)
    return Problem(mask, score, normalizer, scale, dropout, weight_map)


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


_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor[] tensors, SymInt[] ints, float[] floats, str text, "
    "float scale, float dropout, Tensor seed, "
)


@torch.library.custom_op(
    "polyhead::attend", mutates_args=(), schema=f"({_CALL}bool want_lse, str backend) -> (Tensor, Tensor)"
)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: list[Tensor],
    ints: list[int],
    floats: list[float],
    text: str,
    scale: float,
    dropout: float,
    seed: Tensor,
    want_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = _problem(text, tensors, ints, floats, scale, dropout)
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
    ints: list[int],
    floats: list[float],
    text: str,
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
    ints: list[int],
    floats: list[float],
    text: str,
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
    problem = _problem(text, leaves, ints, floats, scale, dropout)
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
    ints: list[int],
    floats: list[float],
    text: str,
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
    q, k, v, tensors, ints, floats, text, scale, dropout, seed, want_lse, backend = inputs
    ctx.save_for_backward(q, k, v, seed, *tensors)
    ctx.plan = (
        ints,
        floats,
        text,
        scale,
        dropout,
        want_lse,
        backend,
        [bool(t.requires_grad) for t in tensors],
    )


def _differentiate(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, seed, *tensors = ctx.saved_tensors
    ints, floats, text, scale, dropout, want_lse, backend, wanted = ctx.plan
    dq, dk, dv, *rest = _attend_backward(
        q, k, v, tensors, ints, floats, text, scale, dropout, seed, want_lse, backend, wanted, grad, grad_lse
    )
    found = iter(rest)
    own = [next(found) if need else None for need in wanted]
    # an empty list counts as one of tensors
    return dq, dk, dv, own, None if ints else [], None if floats else [], *(None,) * 6


_attend.register_autograd(_differentiate, setup_context=_setup)
