"""Interleaved heads: every head attends over P pseudo-tokens a token, learned mixtures of all heads.

    q̃_h,nP+p = Σ_m A_hpm q_mn, and k̃, ṽ likewise with mixtures of their own
    õ_h = softmax(q̃_h k̃_hᵀ / √D) ṽ_h over the P·S virtual keys
    o_hn = Σ_p R_hp õ_h,nP+p  (collapse="head")  or  Σ_gp R_hgp õ_g,nP+p  (collapse="all")
    y = concat_h(o_h) W_O

q: (B, H, L, D); k, v: (B, G, S, D), mixed among the G; q̃: (B, H, L·P, D). A head can so pair the queries of
P heads with the keys of P heads in one softmax.

Cost: P·(H² + 2·G²) + H·P (or H²·P) parameters more than grouped-query attention; P² times its scores and
values: windows of about S / (2·P²) tokens cost what causal heads of plain attention do. Memory is O(P·L).
The cache holds the G heads themselves, 2·G·D numbers a token; each step mixes them again: see `step_cost`.

A mask is one of tokens. order="token": a token that is seen is seen with all its pseudo-tokens.
order="flat": a query does not see the later pseudo-tokens of the token that stands where it does; with a
causal mask that is a causal mask of the virtual sequence, which fused kernels know. Biases of scores go by
tokens. Rotary positions are nP + p, or n with `virtual_positions=False`; since turns add up, the cache holds
keys turned by nP, and scalings that stretch with the length are refused there.

Paper 058: Interleaved Head Attention, arXiv 2602.21371. Its mask is the flat one; the default here is
"token", because it has a meaning in every pattern, and because with noise=0 training then starts as
grouped-query attention exactly. The paper takes P = H. Our choices: every mixture starts as the head itself
with noise of 0.02, R as the mean (or as the first pseudo-token); mixtures of grouped keys are of the G heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import flag, number
from polyhead.errors import unknown_name
from polyhead.mechanisms.config import AttentionConfig, key_value_heads
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.registry import register
from polyhead.nn.interleaved import InterleavedAttention
from polyhead.nn.projections import at_least_one

__all__ = ["InterleavedHeads"]


@register(
    "interleaved_heads",
    aliases=("iha",),
    paper="058",
    title="Interleaved Head Attention",
    family="interaction",
    summary="every token stands several times in the sequence, as learned mixtures of its heads",
    equation=(
        "q̃_h,nP+p = Σ_m A_hpm q_mn, k̃ and ṽ likewise;  õ_h = softmax(q̃_h k̃_hᵀ / √D) ṽ_h;  "
        "o_hn = Σ_p R_hp õ_h,nP+p;  y = concat_h(o_h) W_O"
    ),
    facets=Facets(representations="multi"),
)
class InterleavedHeads(AttentionConfig):
    """Interleaved-head attention.

    Attributes:
        pseudo: pseudo-tokens P of a token; default `heads`.
        kv_heads: key/value heads G, a divisor of `heads`; default `heads`.
        order: "token" or "flat", what a query sees of its own token.
        collapse: "head" or "all", whether a head's output is made of its own P or of those of all heads.
        virtual_positions: whether each pseudo-token has a rotary position of its own.
        noise: standard deviation of the mixtures around the heads themselves at the start. Without any, and
            without virtual positions, equal mixtures stay equal in training with order="token".
    """

    pseudo: int | None = None
    kv_heads: int | None = None
    order: str = "token"
    collapse: str = "head"
    virtual_positions: bool = True
    noise: float = 0.02

    def __post_init__(self) -> None:
        at_least_one("InterleavedHeads", dim=self.dim, heads=self.heads)
        pseudo = self.heads if self.pseudo is None else self.pseudo
        at_least_one("InterleavedHeads", pseudo=pseudo)
        object.__setattr__(self, "pseudo", pseudo)
        object.__setattr__(self, "kv_heads", key_value_heads("InterleavedHeads", self.heads, self.kv_heads))
        for name, kind, allowed in (
            ("order", "order of pseudo-tokens", ("token", "flat")),
            ("collapse", "collapse of pseudo-tokens", ("head", "all")),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise unknown_name(kind, value, allowed)
        flag("virtual_positions", self.virtual_positions)
        object.__setattr__(self, "noise", number("noise", self.noise, least=0))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> InterleavedAttention:
        """The module."""
        assert self.pseudo is not None
        module = partial(
            InterleavedAttention,
            pseudo=self.pseudo,
            ordered=self.order == "flat",
            across=self.collapse == "all",
            virtual_positions=self.virtual_positions,
            noise=self.noise,
        )
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
