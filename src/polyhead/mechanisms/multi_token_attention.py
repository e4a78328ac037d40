"""Multi-token attention: logits and weights are convolved over neighbouring queries and keys.

    a_hij = q_hi · k_gj / √D, 0 where the mask forbids,          l_hij = Σ_a Σ_b Θ_hab a_h,i-a,j+b
    w_hij = softmax_j(Σ_m P_hm l_mij), 0 where it forbids,       u_hij = Σ_a Σ_b Φ_hab w_h,i-a,j+b
    o_hi = Σ_j (Σ_n u_nij R_nh) v_gj over what is allowed,       z = gain · o / √(mean(o²) + ε)
    y = concat_h(z_h σ(w · z_h + b) (1 - λ)) W_O,                λ = 0.8 - 0.6 exp(-0.3·depth)

over 0 <= a < c_q queries before and c_k keys on both sides; g = h // (H/G); P (H, H); R block-diagonal in
groups of c_h heads; gain, w, b are shared by the heads. Θ and Φ start as the pair itself, P and R as the
identity: but for norm and gate training begins as multi-head attention.

Cost: 2·H·c_q·c_k + H² + H·c_h + 2·Dv + 1 parameters more than grouped-query attention, and 4·c_q·c_k
operations more a pair and head. No H × L × L is kept: strips of rows are computed with the 2·(c_q - 1) rows
before them. The cache holds the latest 2·(c_q - 1) queries besides keys and values (and 16 more,
so many tokens can be taken back); a step weighs their pairs again.

Paper 052: Multi-Token Attention, arXiv 2504.00927; the defaults are those of its 830M model, which convolves
in every fourth layer. Our reading: a pair reads what the mask of the call allows around it, so beside the
border of a packed document it reads pairs of the one before: put documents apart in a batch. Queries that are
padding count as pairs that are forbidden. Only one softmax; the gate has one number a head.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from polyhead.checks import flag, given, several, whole
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.multi_token import MultiTokenAttention
from polyhead.nn.projections import at_least_one, divisors

__all__ = ["MultiToken"]


@register(
    "multi_token_attention",
    aliases=("mta",),
    paper="052",
    title="Multi-Token Attention",
    family="interaction",
    summary="logits and weights are convolved over neighbouring queries and keys, and mixed across heads",
    equation=(
        "l = P (Θ ∗ a);  w = softmax(l);  u = R (Φ ∗ w);  o_hi = Σ_j u_hij v_gj;  "
        "y = concat_h(norm(o_h) σ(w · norm(o_h) + b)) W_O"
    ),
)
class MultiToken(GroupedConfig):
    """Multi-token attention.

    Attributes:
        logit_kernel: (c_q, c_k) of the convolution of the logits; None for none.
        weight_kernel: that of the weights.
        side: where the c_k keys stand: on "both" sides of the pair's own, on its "left" or on its "right".
        logit_mixing: mix the logits of the heads, by P.
        group: heads c_h whose weights are mixed, by R; default all, 1 for none. The paper's text has 2.
        norm: normalise the output of every head.
        gate: gate it.
        depth: of the layer, which scales the output by 1 - λ; default no scaling.
    """

    logit_kernel: tuple[int, int] | None = (6, 11)
    weight_kernel: tuple[int, int] | None = (6, 11)
    side: str = "both"
    logit_mixing: bool = True
    group: int | None = None
    norm: bool = True
    gate: bool = True
    depth: int | None = None

    def __post_init__(self) -> None:
        at_least_one("MultiToken", dim=self.dim, heads=self.heads)
        for name in ("logit_kernel", "weight_kernel"):
            object.__setattr__(self, name, _sizes(name, getattr(self, name)))
        if self.side not in ("both", "left", "right"):
            raise ConfigError(f"side must be 'both', 'left' or 'right'; got {given(self.side)}")
        for name in ("logit_mixing", "norm", "gate"):
            flag(name, getattr(self, name))
        group = self.heads if self.group is None else whole("group", self.group, 1)
        if self.heads % group:
            raise ConfigError(
                f"group must divide heads={self.heads}; got group={group}; allowed are {divisors(self.heads)}"
            )
        object.__setattr__(self, "group", group)
        if self.depth is not None:
            object.__setattr__(self, "depth", whole("depth", self.depth, 0))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiTokenAttention:
        """The module."""
        assert self.group is not None
        module = partial(
            MultiTokenAttention,
            logits=self.logit_kernel,
            weights=self.weight_kernel,
            side=self.side,
            mixing=self.logit_mixing,
            group=self.group,
            norm=self.norm,
            gate=self.gate,
            factor=1.0 if self.depth is None else 0.2 + 0.6 * math.exp(-0.3 * self.depth),
        )
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )


def _sizes(name: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not several(value) or len(value) != 2:
        raise ConfigError(
            f"{name} must be (c_q, c_k), numbers of queries and keys such as (6, 11), or None; got "
            f"{given(value)}"
        )
    queries, keys = (whole(name, size, 1, 1 << 10) for size in value)
    return queries, keys
