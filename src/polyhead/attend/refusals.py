"""Reasons that several backends have to refuse a call, in one wording."""

from __future__ import annotations

import torch

from polyhead.attend.normalizers import Softmax
from polyhead.attend.plan import Request

__all__ = ["ONE_STEP", "beyond_softmax", "inside_transform"]

# of what has a backward of its own, inside a transform
ONE_STEP = "it is one step for autograd and cannot be looked into by torch.func transforms (vmap, jvp)"


def beyond_softmax(
    request: Request,
    *,
    score: bool = False,
    weight_map: bool = False,
    normalizer: bool = False,
    dropout: bool = False,
    lse: bool = False,
) -> str:
    """What of a request is beyond softmax of q·k, as a reason to refuse it; empty if nothing is.

    Args:
        request: the call, of whatever mask.
        score, weight_map, normalizer, dropout, lse: whether the backend has that, or asks for itself.
    """
    problem = request.problem
    if problem.score is not None and not score:
        return f"it has no score maps, and the call has {problem.score}"
    if problem.weight_map is not None and not weight_map:
        return f"it has no maps of the weights, and the call has {problem.weight_map}"
    plain = isinstance(problem.normalizer, Softmax) and problem.normalizer.sink is None
    if not plain and not normalizer:
        return f"it normalises by plain softmax, not by {problem.normalizer}"
    if problem.dropout and not dropout:
        return "it has no dropout"
    if request.want_lse and not lse:
        return "it does not return the log-sum-exp"
    return ""


def inside_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp) is under way; torch has no public way to ask."""
    return torch._C._functorch.peek_interpreter_stack() is not None
