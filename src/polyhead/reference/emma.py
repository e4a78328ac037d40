"""Monotonic attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["emma"]


@twin("emma")
def emma(
    x: Tensor,
    context: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    policy_layers: int,
    temperature: float,
    keep_mass: bool,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """α_ij = p_ij sum_k≤j α_i-1,k prod_k≤l<j (1 - p_il); head_i = sum_k α_ik softmax_j≤k(q·k_j) · v_j.

    Args:
        x, context: targets `(B, L, d)` and source `(B, S, d)`.
        parameters: the module's state.
        heads, kv_heads: H and G, g = h // (H / G).
        policy_layers: of `query_policy` and `key_policy`, linear maps each followed by a ReLU.
        temperature: divides the logits of p.
        keep_mass: whether α at the last visible source takes 1 - sum_j α_ij more.
        mask, padding: bool; see `reference`.
    """
    x, source = x.double(), real(context, padding)
    q = heads_of(x, parameters, "query", heads)
    k, v = (heads_of(source, parameters, name, kv_heads) for name in ("key", "value"))
    policies = []
    for name, z in (("query_policy", x), ("key_policy", source)):
        for n in range(policy_layers):
            weight, bias = (parameters[f"{name}.{2 * n}.{part}"].double() for part in ("weight", "bias"))
            z = (z @ weight.T + bias).relu()
        policies.append(torch.stack(z.chunk(heads, dim=-1), dim=1))
    extra = parameters.get("policy_bias", torch.zeros(())).double()
    shape = (len(x), heads, x.shape[1], source.shape[1])
    seen = (torch.ones(shape, dtype=torch.bool) if mask is None else mask).expand(shape)
    seen = seen if padding is None else seen & padding[:, None, None, :]
    outputs = torch.zeros(*shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(shape[0]):
        for h in range(heads):
            keys, values = (t[b, h // (heads // kv_heads)] for t in (k, v))
            before = {0: torch.ones((), dtype=torch.float64)}  # α of the target before, by source
            for i in range(shape[2]):
                own = [j for j in range(shape[3]) if seen[b, h, i, j]]
                if not own:
                    continue
                e = keys @ q[b, h, i] / math.sqrt(q.shape[-1])
                logits = policies[1][b, h] @ policies[0][b, h, i] / math.sqrt(q.shape[-1]) + extra
                p, come, after = (logits / temperature).sigmoid(), torch.zeros(()).double(), {}
                for j in range(shape[3]):
                    come = come + before.get(j, 0.0)
                    if seen[b, h, i, j]:
                        after[j], come = p[j] * come, (1 - p[j]) * come
                stops = dict(after)
                if keep_mass:
                    stops[own[-1]] = stops[own[-1]] + 1 - sum(after.values())
                for n, j in enumerate(own):
                    prefix = own[: n + 1]
                    outputs[b, h, i] = outputs[b, h, i] + stops[j] * (e[prefix].softmax(0) @ values[prefix])
                before = after
    return joined(outputs, parameters)
