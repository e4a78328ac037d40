"""Context broadcasting: uniform attention by hand, as one head more that adds the mean of what a token sees.

    y_i = Σ_h head_hi W_Oh + λ ⊙ mean_{j visible to i} c_j

Learned attention is often close to uniform, which softmax finds hard to express; where the mean is supplied
beside it, the heads need not make it and become sparser. λ: (d,) is learned and starts at zero, so that
training begins as multi-head attention; or it is a number that is given. c: (B, S, d) are the inputs, or a
context.

Without a mask, under a causal one and with padding the means are sums and running sums; other masks take
them by attention with equal logits.

Cost: parameters of grouped-query attention and d for λ; its FLOPs, and O(S·d) additions; its cache and d
numbers a token, since which tokens are seen is known only when they are read.

Paper 124: Scratching Visual Transformer's Back with Uniform Attention, arXiv 2210.08457. There the mean is
added inside the MLP branch of a block, (x + mean(x)) / 2 or x + λ ⊙ mean(x): `polyhead.nn.ContextBroadcast`
is that layer. It is the same as a head with uniform weights whose values and output are left as they are,
and that head, in its form with λ, is the mechanism here: the residual stream around it carries x. Our
readings: λ starts at zero, every real token counts in the mean, and with a mask the mean is over what it
shows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import number
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.uniform_head import UniformHeadAttention

__all__ = ["ContextBroadcasting"]


@register(
    "context_broadcasting",
    paper="124",
    title="Scratching Visual Transformer's Back with Uniform Attention",
    family="weights",
    summary="one head more has uniform weights: the mean of what a token sees is added to its output",
    equation="y_i = Σ_h head_hi W_Oh + λ ⊙ mean_{j visible to i} c_j",
)
class ContextBroadcasting(GroupedConfig):
    """Multi-head attention with a uniform head.

    Attributes:
        kv_heads: key/value heads G of the other heads, a divisor of `heads`; default `heads`.
        amount: λ, a number for all channels; None, the default: learned for each.
    """

    amount: float | None = None

    def __post_init__(self) -> None:
        if self.amount is not None:
            object.__setattr__(self, "amount", number("amount", self.amount))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> UniformHeadAttention:
        """The module."""
        module = partial(UniformHeadAttention, amount=self.amount)
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
