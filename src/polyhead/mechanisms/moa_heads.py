"""Mixture of attention heads: more query heads than a token uses, over keys and values that all share.

    E_i(t) = softmax(x_t W_Qi Kᵀ / √D) V W_Oi,   K = c W_K, V = c W_V
    y_t = Σ_{i chosen} w_i(t) E_i(t),   p = softmax(W_g x_t),  w_i = p_i / Σ_{j chosen} p_j on the k largest

W_Qi: (d, D), W_Oi: (D, d) for every one of E experts, W_K, W_V: (d, D). With G key/value heads an expert is G
query heads, one for each, and a token has k·G = `heads` of them. Experts that a token did not choose are
not computed for it.

Cost: 2·d·D·G·(E + 1) + d·E parameters; arithmetic of k experts, whatever E is, and of the router; 2·G·D
numbers of cache per token. W_g starts at zero: all experts are equally probable, and the first are chosen.

In training, `auxiliary_losses` has "balance", α E Σ_i f_i P_i with f_i the share of expert i in all choices
and P_i the mean of p_i, and "z", β times the mean of (logsumexp W_g x)². Padding does not count.

Paper 043: Mixture of Attention Heads: Selecting Attention Heads Per Token, arXiv 2210.05144. There G = 1;
experts of more heads are those of later models. `renormalise=None` is what the published code does. Our
reading: of equally probable experts the first are chosen; E is 2k by default; the noise and the
sampling of the code are left out. Not to be confused with `moh`, whose heads have keys of their own.
"""

from __future__ import annotations

from typing import Any

from polyhead.checks import given, number, whole
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import AttentionConfig
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.expert_router import ExpertRouter
from polyhead.nn.projections import at_least_one, divisors, head_width
from polyhead.nn.routed_heads import RoutedHeads
from polyhead.nn.routed_output import RoutedOutput

__all__ = ["MixtureOfAttentionHeads"]


@register(
    "moa_heads",
    aliases=("mixture_of_attention_heads",),
    paper="043",
    title="Mixture of Attention Heads: Selecting Attention Heads Per Token",
    family="routing",
    summary="every token chooses k of E query and output projections over shared keys and values",
    equation=(
        "y_t = Σ_{i chosen} w_i(t) softmax(x_t W_Qi Kᵀ / √D) V W_Oi;  w = p / Σ_{chosen} p on the k largest "
        "of p = softmax(W_g x_t)"
    ),
    graph_breaks=1,
    promises=Promises(routed=True),
)
class MixtureOfAttentionHeads(AttentionConfig):
    """Mixture of attention heads; `heads` counts the query heads that a token has, k·G.

    Attributes:
        experts: E, at least k; default 2k.
        kv_heads: G, a divisor of `heads`; default 1.
        renormalise: whether the weights of the chosen sum to one: "detach", then in training no gradient
            flows through the sum; "full"; or None, no.
        balance: α, weight of the load-balance loss.
        z: β, weight of the loss of large scores.
    """

    experts: int | None = None
    kv_heads: int = 1
    renormalise: str | None = "detach"
    balance: float = 0.01
    z: float = 0.001

    def __post_init__(self) -> None:
        at_least_one("MixtureOfAttentionHeads", dim=self.dim, heads=self.heads, kv_heads=self.kv_heads)
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"kv_heads must divide heads={self.heads}, the query heads that a token has; got "
                f"{self.kv_heads}; allowed are {divisors(self.heads)}"
            )
        k = self.heads // self.kv_heads
        name = f"experts (at least heads / kv_heads = {k}, those that a token has)"
        if self.renormalise not in ("detach", "full", None):
            raise ConfigError(f'renormalise must be "detach", "full" or None; got {given(self.renormalise)}')
        for field, value in (
            ("experts", whole(name, 2 * k if self.experts is None else self.experts, k)),
            ("head_dim", head_width(self.dim, self.heads, self.head_dim)),
            ("balance", number("balance", self.balance, least=0)),
            ("z", number("z", self.z, least=0)),
        ):
            object.__setattr__(self, field, value)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> RoutedHeads:
        """The module."""
        assert self.experts is not None
        router = ExpertRouter(
            self.dim,
            self.experts,
            self.heads // self.kv_heads,
            heads=self.kv_heads,
            renormalise=self.renormalise,
            balance=self.balance,
            z=self.z,
            device=device,
            dtype=dtype,
        )

        def module(*parts: Any, **options: Any) -> RoutedHeads:
            return RoutedHeads(*parts, router=router, **options)

        return self.assemble(
            heads=self.experts * self.kv_heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            output=RoutedOutput,
            module=module,
        )
