"""Torch's fused attention on a CPU, and its backward, for backends that cut a call into pieces."""

from __future__ import annotations

import torch

from polyhead.attend.normalizers import Softmax
from polyhead.attend.plan import Request

__all__ = ["HIDDEN", "fused", "fused_backward", "unfit"]

fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
HIDDEN = -1e30  # finite, so that a row that sees nothing of a piece gets a number, and weight 0


def unfit(request: Request) -> str:
    """Why the kernel is not for a call, whatever its mask; empty if it is."""
    q, problem = request.q, request.problem
    if problem.score is not None:
        return f"it has no score maps, and the call has {problem.score}"
    if problem.weight_map is not None:
        return f"it has no maps of the weights, and the call has {problem.weight_map}"
    if not (isinstance(problem.normalizer, Softmax) and problem.normalizer.sink is None):
        return f"it normalises by plain softmax, not by {problem.normalizer}"
    if problem.dropout:
        return "it has no dropout"
    if q.device.type != "cpu":
        return f"it is for a CPU, not for {q.device.type}"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "it is one step for autograd and cannot be looked into by torch.func transforms (vmap, jvp)"
    return ""
