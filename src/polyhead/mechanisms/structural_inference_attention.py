"""Attention as inference of an unknown edge, with a window that grows and shrinks with what is seen.

    p(j, r_i | x) ∝ Beta(r_i; a, b) · r_i (1 - r_i)^(i-j) · exp(q_i·k_j / √D)
    head_i = Σ_j w_ij v_j,   w_i = softmax_j(q_i·k_j / √D + λ_i (i - j)),   λ_i = E[log(1 - r_i)]

Softmax attention is the expectation of a value under the posterior of one edge with a uniform prior. Here the
prior is geometric in the distance, and its rate has a prior of its own, Beta(a, b) with a and b learned for
every head. Mean field alternates between where a query looks and how far: r_i ~ Beta(a + 1, b + E[i - j]), so
that a match far away widens the window. The first time λ = digamma(b) - digamma(a + b) for all.
b → ∞ is multi-head attention, a → ∞ leaves the nearest visible token. `module.windows(x, mask=...)` gives
E[i - j]. `polyhead.nn.edge_posterior` has the other posteriors: edges picked by the inputs, as slot attention
does, one edge in all, Gaussian potentials.

A slope λ_i (i - j) is one coordinate more, so an iteration is a call of `attend` for the mean of j; masks,
biases and backends are as ever. Cost: `iterations` times the scores of grouped-query attention, with heads
one wider; 2·H parameters more; its cache. Causal alone: the prior looks back.

Paper 112: Attention: Marginal Probability is All You Need?, arXiv 2304.04556. The updates of the Beta
distribution are derived anew (the paper names the idea, expanding attention); a prior over the tokens that a
mask leaves is not normalised again. That a and b are learned by head, and start at 1, is ours. Attention over
several hops is `multihop_attention`; hard edges and iterated retrieval are not here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import number, whole
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.expanding import ExpandingAttention

__all__ = ["StructuralInference"]


@register(
    "structural_inference_attention",
    aliases=("expanding_attention",),
    paper="112",
    title="Attention: Marginal Probability is All You Need?",
    family="scores",
    summary="the posterior of an unknown edge, with a window that every query infers beside it",
    equation=(
        "w_i = softmax_j(q_i·k_j / √D + λ_i (i - j)),  λ_i = E[log(1 - r_i)],  "
        "r_i ~ Beta(a + 1, b + E[i - j])"
    ),
    supports=frozenset({"causal_self", "causal_cross"}),
)
class StructuralInference(GroupedConfig):
    """Expanding attention.

    Attributes:
        a, b: of the prior of the rate, at the start.
        iterations: how often where a query looks is inferred; 1 is a learned slope for every head.
    """

    a: float = 1.0
    b: float = 1.0
    iterations: int = 3

    def __post_init__(self) -> None:
        number("a", self.a, above=0)
        number("b", self.b, above=0)
        whole("iterations", self.iterations, 1)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> ExpandingAttention:
        """The module."""
        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            module=partial(ExpandingAttention, shape=(self.a, self.b), iterations=self.iterations),
        )
