"""Choosing a backend: each says yes or the reason why not, the planner takes the fastest yes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from polyhead.attend.problem import Problem
from polyhead.checks import given
from polyhead.errors import BackendRefused, ConfigError, DenseFallback

__all__ = ["Backend", "Plan", "Request", "pick", "plan", "strict"]

_STRICT: ContextVar[bool] = ContextVar("polyhead_strict", default=False)


@dataclass(frozen=True, eq=False)
class Request:
    """One call of `attend`, checked and complete.

    Attributes:
        q, k, v: the tensors of the call.
        problem: mask, score, normaliser, scale and dropout.
        want_lse: whether the log-sum-exp of the rows is asked for.
        needs_grad: whether autograd has to follow.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    problem: Problem
    want_lse: bool
    needs_grad: bool


class Backend(Protocol):
    """One way to run a call.

    Attributes:
        name: what `backend=` calls it.
        dense: whether it holds O(L·S) scores.
        opt_in: why the planner does not choose it by itself; empty when it may.
    """

    name: str
    dense: bool
    opt_in: str

    def refuse(self, request: Request) -> str:
        """Why this backend cannot run the call; empty when it can."""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Output `(B, H, L, Dv)` and, if wanted, log-sum-exp `(B, H, L)`."""


@dataclass(frozen=True)
class Plan:
    """Which backend runs a call, and why each other one does not.

    Attributes:
        backend: name of the chosen backend.
        refused: for every other backend, its reason.
        dense: whether the chosen one holds O(L·S) scores.
    """

    backend: str
    refused: dict[str, str]
    dense: bool

    def __hash__(self) -> int:
        return hash((self.backend, frozenset(self.refused.items()), self.dense))

    def __str__(self) -> str:
        width = max(map(len, (self.backend, *self.refused)))
        lines = [f"{self.backend:<{width}}  runs" + (", in O(L·S) memory" if self.dense else "")]
        lines += [f"{name:<{width}}  {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


@contextmanager
def strict() -> Iterator[None]:
    """Within this context, a call that only dense O(L·S) memory can serve raises `DenseFallback`.

    It holds for the thread or task that enters it.
    """
    token = _STRICT.set(True)
    try:
        yield
    finally:
        _STRICT.reset(token)


def pick(request: Request, backends: tuple[Backend, ...], name: str) -> Backend:
    """The backend for a call, by name or (`"auto"`) the first that accepts, fastest first.

    Raises:
        ConfigError: no backend has that name.
        BackendRefused: the named backend cannot run the call.
        DenseFallback: under `strict()`, only a dense backend can.
    """
    if isinstance(name, str) and name == "auto":
        chosen = next((b for b in backends if not b.opt_in and not b.refuse(request)), None)
        if chosen is None:
            reasons = "; ".join(f"{b.name}: {b.refuse(request) or b.opt_in}" for b in backends)
            raise BackendRefused(f"no backend can run this call: {reasons}")
    else:
        named = {b.name: b for b in backends}
        if not isinstance(name, str) or name not in named:
            raise ConfigError(
                f"backend must be 'auto' or one of {', '.join(map(repr, named))}; got {given(name)}"
            )
        chosen = named[name]
        reason = chosen.refuse(request)
        if reason:
            raise BackendRefused(f"backend {name!r} cannot run this call: {reason}; leave backend='auto'")
    if chosen.dense and _STRICT.get():
        raise DenseFallback(
            f"under polyhead.strict() the dense O(L·S) backend {chosen.name!r} may not run this call; "
            + "; ".join(f"{b.name}: {b.refuse(request) or b.opt_in}" for b in backends if b is not chosen)
        )
    return chosen


def plan(request: Request, backends: tuple[Backend, ...], name: str) -> Plan:
    """What `pick` picks, and why not the others. Raises as `pick` does."""
    chosen = pick(request, backends, name)
    why = f"{chosen.name} is faster" if name == "auto" else f"{name!r} was asked for"
    refused = {}
    for backend in backends:
        if backend is not chosen:
            reason = backend.refuse(request) or (backend.opt_in if name == "auto" else "")
            refused[backend.name] = reason or f"could run it, but {why}"
    return Plan(chosen.name, refused, chosen.dense)
