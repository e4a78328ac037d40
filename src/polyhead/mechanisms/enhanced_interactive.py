"""Enhanced interactive attention: every query head scores against every key head, and the scores interact.

    s_ag = q_a · k_g / √D, a = 1..H, g = 1..G: H·G maps
    within a head:      u_a = w_a · relu(W_a s_a + b_a) + c_a,   W_a (h, G)
    across the heads:   logits = V' relu(V u + b'),   V (m, H), V' (H, m)
    head_a = softmax(logits_a) v_g,   y = concat_a(head_a) W_O

The efficient variant has one hidden layer, logits = V' relu of all W_a s_a + b_a. With residual=True the
head's own product is added and V' starts at zero: training begins as multi-head attention.

Cost: H·h·(G + 2) + H + m·(2·H + 1) parameters more than multi-head attention, efficient H·h·(G + 1 + H);
2·L·S·H·G·D operations for products, G times those of multi-head attention, and 2·L·S for each weight of the
network. Memory is O(L): H·G maps are made for a few rows and columns at a time, and again for the gradient.
The cache is that of multi-head attention.

Paper 057: EIT: Enhanced Interactive Transformer, arXiv 2212.10197. Our readings: the softmax comes last;
masks act behind the interactions, as do score maps and biases of positions; h = 8 and m = 4·H, efficient
h = 2; V' has no bias, since a softmax forgets it; grouped keys give G maps for each query head. The residual
is ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import flag, whole
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.registry import register
from polyhead.nn.interactive import InteractiveAttention
from polyhead.nn.projections import at_least_one

__all__ = ["EnhancedInteractive"]


@register(
    "enhanced_interactive",
    aliases=("emha", "eit"),
    paper="057",
    title="EIT: Enhanced Interactive Transformer",
    family="interaction",
    summary="every query head scores against every key head, and a small network makes logits of that",
    equation=(
        "s_ag = q_a·k_g / √D;  u_a = w_a·relu(W_a s_a + b_a) + c_a;  logits = V' relu(V u + b');  "
        "head_a = softmax(logits_a) v_g"
    ),
    facets=Facets(alignment="deep"),
)
class EnhancedInteractive(GroupedConfig):
    """Enhanced interactive attention.

    Attributes:
        inner: hidden numbers h of every head; default 8, or 2 where efficient.
        across: hidden numbers m over all heads; default 4·heads, or 0 where efficient.
        efficient: one hidden layer.
        residual: add the head's own product, the network starting at zero.
    """

    inner: int | None = None
    across: int | None = None
    efficient: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        at_least_one("EnhancedInteractive", heads=self.heads)
        flag("efficient", self.efficient)
        flag("residual", self.residual)
        if self.inner is None:
            object.__setattr__(self, "inner", 2 if self.efficient else 8)
        if self.across is None:
            object.__setattr__(self, "across", 0 if self.efficient else 4 * self.heads)
        at_least_one("EnhancedInteractive", inner=self.inner)
        whole("across", self.across, 0 if self.efficient else 1, 0 if self.efficient else 1 << 30)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> InteractiveAttention:
        """The module."""
        assert self.inner is not None
        assert self.across is not None
        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            module=partial(
                InteractiveAttention, inner=self.inner, across=self.across, residual=self.residual
            ),
        )
