"""Monotonic attention: heads read a source from left to right, and stop before they write.

    p_ij = σ((f_q(x_i)·f_k(c_j) / √D + b) / τ),   α_ij = p_ij Σ_k≤j α_i-1,k Π_k≤l<j (1 - p_il)
    β_ij = Σ_k≥j α_ik exp(e_ij) / Σ_l≤k exp(e_il),   e = q·k / √D,   head_i = Σ_j β_ij v_j

For simultaneous translation. p is the probability that a head stops reading at source j to write target i, α
that it does (expected over all ways to get there), β what it then looks at: a softmax over all it has read.
Without division or clamping, and for p of 0 and 1 too (see `polyhead.nn.monotonic`). `keep_mass` puts what
never stops, 1 - Σ_j α_ij, on the last source that is seen. `module.alignment` gives p, α, β, the delays and
their variance; `latency` and `variance` weigh the losses of the paper, which `ph.auxiliary_losses` collects.
Once trained, p of the last source, `ready` of all heads, says when to write; the output then is of a softmax
over what was read, which this gives for p of 0 and 1.

A context comes with a cache that remembers where the latest target stopped: one target after another gives
what all give at once. The mask and padding hide sources, which are then passed over; a target that sees
nothing takes no step.

Cost: besides grouped-query attention 2·n·(d² + d) parameters for f_q and f_k, of n layers, and b; 2·D FLOPs
more for a pair; H·(D + 1) numbers more of cache. p, α and β take O(H·L·S) memory, which is the idea itself:
every target goes on from where the one before it stopped. L + S steps, one after the other.

Paper 133: Efficient Monotonic Multihead Attention, arXiv 2312.04515. n, b and τ are not settled there: here
n = 1, b = -1/2 and τ = 1. Lagging is DAL. Pooling the keys of the policy (`pre_decision_ratio`), noise on p
and a decoder that stops by a threshold are not here. It aligns two
sequences: there is no self-attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import flag, number, whole
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.flow import Flow, Step
from polyhead.mechanisms.registry import register
from polyhead.nn.emma import MonotonicAttention

__all__ = ["Emma"]

_PICTURE = Flow(
    (
        Step("x", "(L, d)"),
        Step("projection", "query: H heads; f_q: H heads"),
        Step("position", "queries alone"),
    ),
    (
        Step("c", "(S, d), the context"),
        Step("projection", "key, value: G heads; f_k: H heads"),
        Step("position", "keys alone"),
        Step("cache", "keys, values, f_k, and where the latest target stopped"),
    ),
    (
        Step("scores", "e = q·k / √D and f_q·f_k / √D: 2 H maps of L × S"),
        Step("mask", "that of the call, padding: sources that are passed over"),
        Step("stopping", "p = σ((f_q·f_k / √D + b) / τ)"),
        Step("alignment", "α: where each target stops, having stopped for those before"),
        Step("normaliser", "β: softmax of e over what was read, expected over α"),
        Step("values", "β · v"),
        Step("output", "heads → d"),
        Step("y", "(L, d)"),
    ),
)


@register(
    "emma",
    aliases=("monotonic_attention",),
    paper="133",
    title="Efficient Monotonic Multihead Attention",
    family="alignment",
    summary="heads read a source from left to right: where each stops is expected over all ways, in training",
    equation="α_ij = p_ij Σ_k≤j α_i-1,k Π_k≤l<j (1 - p_il);  β_ij = Σ_k≥j α_ik exp(e_ij) / Σ_l≤k exp(e_il)",
    supports=frozenset({"cross", "causal_cross"}),
    facets=Facets(distribution="other"),
    picture=_PICTURE,
)
class Emma(GroupedConfig):
    """Monotonic attention.

    Attributes:
        kv_heads: key/value heads G, a divisor of `heads`; default `heads`. The policy has one for each head.
        policy_layers: n.
        policy_bias: b at the start; 0: there is none.
        temperature: τ.
        keep_mass: whether what never stops goes to the last source that is seen.
        latency: weight of the average lagging among the auxiliary losses.
        variance: weight of the variance of the delays.
    """

    policy_layers: int = 1
    policy_bias: float = -0.5
    temperature: float = 1.0
    keep_mass: bool = True
    latency: float = 0.0
    variance: float = 0.0

    def __post_init__(self) -> None:
        whole("policy_layers", self.policy_layers, 1)
        number("policy_bias", self.policy_bias)
        number("temperature", self.temperature, above=0)
        flag("keep_mass", self.keep_mass)
        number("latency", self.latency, least=0)
        number("variance", self.variance, least=0)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MonotonicAttention:
        """The module."""
        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            module=partial(
                MonotonicAttention,
                layers=self.policy_layers,
                policy_bias=self.policy_bias,
                temperature=self.temperature,
                keep_mass=self.keep_mass,
                latency=self.latency,
                variance=self.variance,
            ),
        )
