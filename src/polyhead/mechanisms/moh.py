"""Mixture of heads: every token chooses which heads attend for it; the others are not computed.

    y_t = Σ_h g_h(x_t) head_h(x_t) W_Oh,   g_h = 0 but for Hs shared heads and k of the R = H - Hs routed ones

Gates from learned routers (`router="learned"`), s = softmax(W_s x), r = softmax(W_r x), α = softmax(W_h x):

    g_shared = 2 α_1 Hs s;   g_routed = 2 α_2 k r' with r' = r on its k largest over their sum

or from the lengths of the queries (`router="query_norm"`): the k routed heads with the longest queries, all
gates 1, no parameters, which suits a checkpoint that was trained without.

q: (B, H, L, D), of which (Hs + k) / H are made; k, v: (B, G, S, D), all of them, since any later token may
read them. Cost: parameters of grouped-query attention and d·(Hs + R + 2) for the routers; query and output
projections, scores and values (Hs + k) / H of those of all heads (with "query_norm" all queries are made).
The cache is that of grouped-query attention.

In training a load-balance loss β R Σ_i f_i P_i, f_i the share of tokens that chose head i and P_i the mean
of r_i, is left for `auxiliary_losses` under the name "balance". Padding does not count.

Paper 002: MoH, Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842. The factors 2, Hs, k
and the sum under r' are those of its code; the equations of the paper are `rescale=False`,
`renormalise=False`. Our reading: shared heads are the first; of equally probable heads the first are
chosen; the spread of the lengths is the root of their mean squared deviation; the straight-through
gradient reaches active heads only. Default heads: three quarters active, a quarter (learned) or half
(query_norm) of all heads shared.
"""

from __future__ import annotations

from typing import Any

from polyhead.checks import flag, number, whole
from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import AttentionConfig
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.head_routers import LearnedRouter, QueryNormRouter
from polyhead.nn.projections import at_least_one
from polyhead.nn.routed_heads import RoutedHeads
from polyhead.nn.routed_output import RoutedOutput

__all__ = ["MixtureOfHeads"]


@register(
    "moh",
    aliases=("mixture_of_heads",),
    paper="002",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    family="routing",
    summary="every token chooses its heads; those that it does not choose are not computed",
    equation=(
        "y_t = Σ_h g_h(x_t) head_h(x_t) W_Oh;  g_shared = 2 α_1 Hs softmax(W_s x),  "
        "g_routed = 2 α_2 k r',  r' = top-k of softmax(W_r x) over its sum,  α = softmax(W_h x)"
    ),
    graph_breaks=1,
    promises=Promises(routed=True),
)
class MixtureOfHeads(AttentionConfig):
    """Mixture of heads.

    Attributes:
        kv_heads: G, a divisor of `heads`; default `heads`.
        router: "learned" or "query_norm".
        shared_heads: Hs, heads that are active for every token; default H/4, or H/2 with "query_norm".
        top_k: k, active heads among the others; default H/2, or H/4 with "query_norm", at least 1.
        rescale: the factors 2, Hs and k, with which the mean gate is 1.
        renormalise: whether the scores of the chosen heads are divided by their sum.
        balance: β, weight of the load-balance loss.
    """

    kv_heads: int | None = None
    router: str = "learned"
    shared_heads: int | None = None
    top_k: int | None = None
    rescale: bool = True
    renormalise: bool = True
    balance: float = 0.01

    def __post_init__(self) -> None:
        at_least_one("MixtureOfHeads", dim=self.dim, heads=self.heads)
        if not isinstance(self.router, str) or self.router not in ("learned", "query_norm"):
            raise unknown_name("router of heads", self.router, ("learned", "query_norm"))
        learned = self.router == "learned"
        shared = self.heads // (4 if learned else 2) if self.shared_heads is None else self.shared_heads
        shared = whole("shared_heads", shared, 0, self.heads)
        routed = self.heads - shared
        k = min(routed, max(1, self.heads // (2 if learned else 4))) if self.top_k is None else self.top_k
        k = whole(f"top_k (with {routed} heads to choose from)", k, min(1, routed), routed)
        flag("rescale", self.rescale)
        flag("renormalise", self.renormalise)
        flag("qk_norm", self.qk_norm)
        if self.qk_norm and not learned:
            raise ConfigError(
                'qk_norm makes all queries equally long; router="query_norm" needs qk_norm=False'
            )
        for name, value in (
            ("shared_heads", shared),
            ("top_k", k),
            ("kv_heads", self.heads if self.kv_heads is None else self.kv_heads),
            ("balance", number("balance", self.balance, least=0)),
        ):
            object.__setattr__(self, name, value)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> RoutedHeads:
        """The module."""
        assert self.shared_heads is not None
        assert self.top_k is not None
        at_least_one("MixtureOfHeads", kv_heads=self.kv_heads)
        sizes = (self.heads, self.shared_heads, self.top_k)
        router = (
            LearnedRouter(
                self.dim,
                *sizes,
                balance=self.balance,
                rescale=self.rescale,
                renormalise=self.renormalise,
                device=device,
                dtype=dtype,
            )
            if self.router == "learned"
            else QueryNormRouter(*sizes, balance=self.balance)
        )

        def module(*parts: Any, **options: Any) -> RoutedHeads:
            return RoutedHeads(*parts, router=router, **options)

        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            output=RoutedOutput,
            module=module,
        )
