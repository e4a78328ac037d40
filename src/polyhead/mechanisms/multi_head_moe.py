"""Multi-head mixture of experts: a feed-forward layer whose heads choose experts, each for itself.

    x̂ = W_head x = [x¹, ..., x^h];   p = softmax(E x^s);   o^s = Σ_{j in the k largest} p_j f_j(x^s)
    y = W_merge [o¹, ..., o^h] (+ shared(x))

x: (B, L, d), x^s: d / h numbers. Expert j of N, f_j: d/h → m → d/h, is D gelu(U x) or, with "swiglu",
D (silu(G x) ⊙ U x).
It stands where a transformer has its MLP: `build_stack(["mha", "multi_head_moe"] * layers, dim=, heads=)`.
Every token is mapped by itself: a mask changes nothing, a context is refused, and a cache keeps nothing.

Cost, with n = 2 maps in an expert (3 gated): n·N·m·d/h + 2·d² + N·d/h parameters, 2·n·k·m·d + 4·d² + 2·N·d
operations a token. Experts that a sub-token did not choose are not computed for it. The head layer and the
router work in float32 or better: sub-tokens rounded to half precision would choose other experts.

In training `auxiliary_losses` has "balance", α N Σ_j f_j P_j over all sub-tokens, f_j the share of expert j
in all choices and P_j the mean of its probability: α when even. Padding does not count.

`MultiHeadMoE.matching` gives the sizes with which it costs what a plain mixture of experts costs:

    operations and parameters   m' = m − 2d / (n k),   N' = h (N m − 2d / n) / m'       (paper 104)
    parameters alone            m' = h (m − 2d / (n N)),   N' = N                        (paper 065)

Paper 065: Multi-Head Mixture-of-Experts, arXiv 2404.15045; paper 104: MH-MoE: Multi-Head Mixture-of-Experts,
arXiv 2411.16205. With one head and neither map it is the plain mixture. Ours: the residual x^s inside o^s is
off; 8 experts of width 4·d, of which 2 are chosen; of equally probable experts the first are chosen; no noise
on scores, no limit on an expert's load; the one-bit weights of paper 104 are left out.
"""

from __future__ import annotations

from math import floor
from typing import Any, Self

from polyhead.checks import flag, given, number, place, whole
from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import MechanismConfig
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.flow import Flow, Step
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.expert_router import ExpertRouter
from polyhead.nn.experts import Experts, maps_of
from polyhead.nn.multi_head_moe import MultiHeadExperts
from polyhead.nn.projections import FanInLinear, at_least_one, divisors
from polyhead.nn.routing import RouterLinear

__all__ = ["MultiHeadMoE"]


@register(
    "multi_head_moe",
    aliases=("mh_moe", "multi_head_moe_parity"),
    paper="065",
    title="Multi-Head Mixture-of-Experts",
    family="routing",
    summary="in place of an MLP: tokens are split into heads, each of which chooses k of N experts",
    equation=(
        "[x¹, ..., x^h] = W_head x;  o^s = Σ_{j in top-k} p_j f_j(x^s), p = softmax(E x^s);  "
        "y = W_merge [o¹, ..., o^h]"
    ),
    supports=frozenset({"self", "causal_self"}),
    graph_breaks=1,
    facets=Facets(positions="local", alignment="other", distribution="other"),
    picture=Flow(
        (Step("x", "(L, d)"), Step("head", "d → h sub-tokens of d / h")),
        (),
        (
            Step("router", "every sub-token chooses k of N experts"),
            Step("experts", "d / h → m → d / h, those that are chosen"),
            Step("heads", "times their probabilities, added up, side by side"),
            Step("merge", "d → d"),
            Step("y", "(L, d)"),
        ),
    ),
    promises=Promises(routed=True, tokenwise=True),
)
class MultiHeadMoE(MechanismConfig):
    """Multi-head mixture of experts; `heads` divides `dim`.

    Attributes:
        experts: N.
        top_k: k, experts of a sub-token; default 2, or N where that is less.
        width: m, inner width of an expert; default 4 · dim.
        activation: "gelu" or "swiglu".
        head_layer, merge_layer: whether there are W_head and W_merge; without, the identity.
        shared_width: inner width of an expert that every token has in one piece; 0: none.
        inner_residual: add x^s to o^s.
        renormalise: whether the k probabilities are divided by their sum: "detach", then in training no
            gradient flows through the sum; "full"; or None, no.
        bias: whether the maps have a bias.
        balance: α, weight of the load-balance loss.
    """

    experts: int = 8
    top_k: int | None = None
    width: int | None = None
    activation: str = "gelu"
    head_layer: bool = True
    merge_layer: bool = True
    shared_width: int = 0
    inner_residual: bool = False
    renormalise: str | None = None
    bias: bool = False
    balance: float = 0.01

    def __post_init__(self) -> None:
        at_least_one("MultiHeadMoE", dim=self.dim, heads=self.heads, experts=self.experts)
        if self.dim % self.heads:
            raise ConfigError(
                f"heads must divide dim={self.dim}, which they split; got {self.heads}; allowed are "
                f"{divisors(self.dim)}"
            )
        top_k = min(2, self.experts) if self.top_k is None else self.top_k
        top_k = whole(f"top_k (of {self.experts} experts)", top_k, 1, self.experts)
        width = 4 * self.dim if self.width is None else self.width
        at_least_one("MultiHeadMoE", width=width)
        maps_of(self.activation)
        whole("shared_width", self.shared_width, 0)
        for name in ("head_layer", "merge_layer", "inner_residual", "bias"):
            flag(name, getattr(self, name))
        if self.renormalise not in ("detach", "full", None):
            raise ConfigError(f'renormalise must be "detach", "full" or None; got {given(self.renormalise)}')
        balance = number("balance", self.balance, least=0)
        for name, value in (("top_k", top_k), ("width", width), ("balance", balance)):
            object.__setattr__(self, name, value)
        super().__post_init__()

    @classmethod
    def matching(
        cls,
        dim: int,
        heads: int,
        *,
        experts: int,
        width: int,
        top_k: int = 1,
        activation: str = "gelu",
        match: str = "operations",
        head_layer: bool = True,
        merge_layer: bool = True,
        **options: Any,
    ) -> Self:
        """The configuration that costs what a plain mixture of experts costs, routers aside.

        Args:
            dim, heads: of the layer.
            experts, width, top_k, activation: of the plain mixture: N experts d → m → d, of which a token
                has k.
            match: "operations": as many operations and, within an expert, as many parameters. "parameters":
                as many parameters with as many experts, at about h times the operations.
            head_layer, merge_layer: what the layer shall have; what it lacks is not paid for.
            options: further options of the layer.

        Raises:
            ConfigError: the two maps alone cost more than the mixture.
        """
        at_least_one("matching", dim=dim, heads=heads, experts=experts, width=width)
        k = whole(f"top_k (of {experts} experts)", top_k, 1, experts)
        if not isinstance(match, str) or match not in ("operations", "parameters"):
            raise unknown_name("match", match, ("operations", "parameters"))
        flag("head_layer", head_layer)
        flag("merge_layer", merge_layer)
        n, outer = maps_of(activation), (head_layer + merge_layer) * dim
        if match == "operations":
            inner = floor(width - outer / (n * k))
            count = floor(heads * (experts * width - outer / n) / inner) if inner > 0 else 0
        else:
            inner, count = floor(heads * (width - outer / (n * experts))), experts
        if inner < 1 or count < k:
            least = outer / (n * k) if match == "operations" else outer / (n * experts)
            raise ConfigError(
                f"width must be greater than {least:g}, what the maps before and after the experts cost, for "
                f"a match of {match} with dim={dim}, experts={experts} and top_k={k}; got {width}"
            )
        own: dict[str, Any] = {
            "head_layer": head_layer,
            "merge_layer": merge_layer,
            "activation": activation,
            **options,
        }
        return cls(dim, heads, experts=count, top_k=k, width=inner, **own)

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadExperts:
        """The module."""
        assert self.top_k is not None
        assert self.width is not None
        device, dtype = place("multi_head_moe", device, dtype)
        kind = {"device": device, "dtype": dtype}
        own = {"activation": self.activation, "bias": self.bias, **kind}
        part = self.dim // self.heads
        router = ExpertRouter(
            part,
            self.experts,
            self.top_k,
            renormalise=self.renormalise,
            balance=self.balance,
            z=0.0,
            **kind,
        )
        router.gate.reset_parameters()  # from zero, all sub-tokens would choose the same experts
        outer = (self.dim, self.dim)
        return MultiHeadExperts(
            self.dim,
            self.heads,
            Experts(self.experts, part, self.width, **own),
            router,
            head=RouterLinear(*outer, bias=self.bias, **kind) if self.head_layer else None,
            merge=FanInLinear(*outer, bias=self.bias, **kind) if self.merge_layer else None,
            shared=Experts(1, self.dim, self.shared_width, **own) if self.shared_width else None,
            inner_residual=self.inner_residual,
        )
