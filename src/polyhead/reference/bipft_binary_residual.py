"""Binary attention with estimates of its residuals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyhead.reference.projection import normed, real
from polyhead.reference.registry import twin

__all__ = ["bipft_binary_residual"]


class _Binary(torch.autograd.Function):
    """clamp(round(x / α), low, 1) of signs (low = -1) or weights (low = 0), α times which is x's code."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, low: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.low = low
        return torch.where(x >= 0, 1.0, -1.0).to(x) if low else (x / alpha).round().clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, alpha = ctx.saved_tensors
        g, ratio = grads[0] / alpha, x / alpha
        inside = (ratio >= ctx.low) & (ratio <= 1)  # the code's own dependence on α, besides its factor α
        own = None if ctx.low else (-g * ratio * inside).sum(-1, keepdim=True)
        return g * inside, own, None


def _slow(alpha: Tensor, numbers: int) -> Tensor:
    return alpha.detach() + (alpha - alpha.detach()) / numbers**0.5


@twin("bipft_binary_residual")
def bipft_binary_residual(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """A = softmax((q_b k_bᵀ + E1 + E2 + E3) / √D); y = concat_h(A_b v_b + A_b u_vp) W_O, maps binary too.

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state; maps without a `step` are not binary.
        heads, kv_heads: H and G, g = h // (H / G).
        mask, padding: bool; see `reference`.
    """
    state = {name: p.double() for name, p in parameters.items()}
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()

    def linear(z: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias", torch.zeros(()).double())
        if f"{name}.step" not in state:
            return z @ weight.T + bias
        step, size = state[f"{name}.step"].clamp(min=1e-5), weight.detach().abs().mean()
        signs = torch.where(weight >= weight.mean(), 1.0, -1.0).detach() + (weight - weight.detach()) / size
        bits = _Binary.apply(z + state[f"{name}.shift"], step.detach(), -1)
        return bits @ signs.T * size * _slow(step, z.numel()) + bias

    def split(z: Tensor, name: str, count: int) -> Tensor:
        made = linear(z, f"projection.{name}").chunk(count, -1)
        z = torch.stack([normed(part, state, name) for part in made], 1)
        step = state[f"{name}_step"].clamp(min=1e-5)
        return _Binary.apply(z, step.detach(), -1) * _slow(step, z.numel())

    q, k, v = split(x, "query", heads), split(source, "key", kv_heads), split(source, "value", kv_heads)
    qm, qp = linear(x, "query_estimates").unbind(-1)
    kp, km, vp = linear(source, "key_estimates").unbind(-1)
    e = qm[:, :, None] * kp[:, None] + qp[:, :, None] * km[:, None] + qp[:, :, None] * kp[:, None]
    seen = torch.ones(len(x), heads, x.shape[1], source.shape[1], dtype=torch.bool)
    for hidden in (mask, None if padding is None else padding[:, None, None, :]):
        seen = seen if hidden is None else seen & hidden
    tau = _slow(state["weight_step"].clamp(min=1e-5), seen.numel())
    alpha = (4 * tau / seen.sum(-1, keepdim=True).clamp(min=1)).clamp(max=1)
    found = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        logits = (q[:, h] @ k[:, g].mT + e) / q.shape[-1] ** 0.5
        a = logits.masked_fill(~seen[:, h], -1e300).softmax(-1) * seen[:, h]
        step = alpha.expand(-1, heads, -1, -1)[:, h]
        found.append((step, _Binary.apply(a, step, 0), v[:, g]))
    return linear(torch.cat([s * (a @ v + a @ vp[..., None]) for s, a, v in found], -1), "output")
