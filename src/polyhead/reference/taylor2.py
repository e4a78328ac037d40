"""Taylor attention."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["taylor2"]


def _polynomial(logits: Tensor) -> Tensor:
    powers = 1 + logits + logits**2 / 2
    return powers / powers.sum()


@twin("taylor2")
def taylor2(
    x: Tensor,
    context: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """w_ij = p(s_ij) / sum_j p(s_ij) with p(s) = 1 + s + s²/2 and s = q·k / √D, where softmax has exp(s).

    Args:
        x: `(B, L, d)`.
        context: `(B, S, d)`; default x.
        parameters: the module's state.
        heads, kv_heads: H and G.
        mask, padding: bool; see `reference`.
    """
    source = real(x if context is None else context, padding)
    x = source if context is None else x.double()
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    if padding is not None:
        seen = padding[:, None, None, :]
        mask = seen if mask is None else mask & seen
    return joined(attend(q, k, v, mask=mask, normalize=_polynomial), parameters)
