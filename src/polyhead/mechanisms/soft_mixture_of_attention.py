"""Soft mixture of attention: whole attention layers as experts, all of them active, weighed for every token.

    y_t = Σ_i r_i(x_t) Attn_i(x)_t,   r = softmax(W x_t),   i = 1..N
    Attn_i = multi-head attention with queries and output of its own, and keys and values of its own or shared

Nothing is left out: it costs N attention layers, and its gradient reaches all of them in every step. Their
heads are those of one call: heads (B, N·H, L, D), those of expert i times r_i before the output projection.
What a score map, a mask or a normaliser has for every head, it has for N·H heads.

Cost, H heads of D: with keys and values of their own N times the parameters, operations and cache of an
attention layer; with `share_kv` its keys and values once; and N·d parameters of the router.

`soft_mixture([attention, ...])` makes it of trained layers. Expert i has the heads i·H .. i·H + H - 1; with
`share_kv` the heads stand key/value head by key/value head, in each of which the experts follow one another.

Paper 092: BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts, arXiv
2408.08274: branches of a seed model, each trained on a domain, become the experts; shared keys and values are
the means of theirs. Its mixture of the feed-forward layers, beside attention in one block, is not part of
this. Ours: the router starts at normal numbers of 0.02; with `bias` all experts have one bias of the output;
in training "z" of `auxiliary_losses` is ζ times the mean of (logsumexp W x)², with ζ 0.001.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyhead.checks import flag, given, number, several
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import AttentionConfig, key_value_heads
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.gated_heads import ExpertGate, GatedHeads
from polyhead.nn.projections import Projection, at_least_one, head_width

__all__ = ["SoftMixtureOfAttention", "soft_mixture"]


@register(
    "soft_mixture_of_attention",
    aliases=("bam",),
    paper="092",
    title="BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
    family="routing",
    summary="whole attention layers are experts, all active, weighed for every token",
    equation="y_t = Σ_i r_i(x_t) Attn_i(x)_t;  r = softmax(W x_t)",
)
class SoftMixtureOfAttention(AttentionConfig):
    """Soft mixture of attention; `heads` are those of one expert.

    Attributes:
        experts: N; default 4.
        kv_heads: key/value heads G of an expert, a divisor of `heads`; default `heads`.
        share_kv: whether all experts read the same G key/value heads.
        z: ζ, weight of the loss of large scores.
    """

    experts: int = 4
    kv_heads: int | None = None
    share_kv: bool = False
    z: float = 0.001

    def __post_init__(self) -> None:
        name = "SoftMixtureOfAttention"
        at_least_one(name, dim=self.dim, heads=self.heads, experts=self.experts)
        flag("share_kv", self.share_kv)
        for field, value in (
            ("kv_heads", key_value_heads(name, self.heads, self.kv_heads)),
            ("head_dim", head_width(self.dim, self.heads, self.head_dim)),
            ("z", number("z", self.z, least=0)),
        ):
            object.__setattr__(self, field, value)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> GatedHeads:
        """The module."""
        assert self.kv_heads is not None
        gate = ExpertGate(
            self.dim,
            self.experts,
            self.heads,
            groups=self.kv_heads if self.share_kv else 1,
            z=self.z,
            device=device,
            dtype=dtype,
        )

        def module(*parts: Any, **options: Any) -> GatedHeads:
            return GatedHeads(*parts, gate=gate, **options)

        return self.assemble(
            heads=self.experts * self.heads,
            kv_heads=self.kv_heads * (1 if self.share_kv else self.experts),
            device=device,
            dtype=dtype,
            module=module,
        )


def soft_mixture(attentions: Sequence[MultiHeadAttention], *, share_kv: bool = False) -> GatedHeads:
    """A soft mixture of trained layers, with a fresh router.

    Args:
        attentions: plain or grouped attention, built by name with the same options.
        share_kv: take the mean of their keys' and values' projections.

    Returns:
        The module. Norms of queries and keys and biases of the output are the means.
    """
    found = list(attentions) if several(attentions) else []
    configs = [getattr(one, "config", None) for one in found]
    plain = all(isinstance(c, AttentionConfig) for c in configs) and all(
        type(one) is MultiHeadAttention
        and type(one.projection) is Projection
        and one.projection.query_heads == one.heads
        for one in found
    )
    if not found or not plain or any(c != configs[0] for c in configs):
        raise ConfigError(
            "attentions must be layers of plain or grouped attention, at least one, built by name with the "
            f"same options; got {given(attentions)}"
        )
    first, config = found[0], configs[0]
    assert isinstance(config, AttentionConfig)
    by_head = {
        "score": first.score,
        "weight_map": first.weight_map,
        "mask": first.mask,
        "select": first.select,
        "normalizer": first.normalizer,
        "position": first.position.score,
    }
    told = [name for name, part in by_head.items() if part is not None]
    if told:
        raise ConfigError(
            f"attentions must have none of {', '.join(by_head)} that may tell heads apart, since those of "
            f"the mixture are counted anew; got {told[0]}={given(getattr(config, told[0]))}"
        )
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(AttentionConfig) if f.init}
    new = SoftMixtureOfAttention(
        **shared | {"heads": first.heads}, experts=len(found), kv_heads=first.kv_heads, share_kv=share_kv
    )
    weight = first.projection.query.weight
    module = new.build(device=weight.device, dtype=weight.dtype).train(first.training)
    module.config = new
    states = [one.state_dict() for one in found]
    groups = first.kv_heads if share_kv else 1

    def merged(name: str, tensors: list[Tensor]) -> Tensor:
        part, _, kind = name.removeprefix("projection.").partition(".")
        if part == "query" or (part in ("key", "value") and not share_kv):
            own = groups if part == "query" else 1
            return torch.cat([t.unflatten(0, (own, -1)) for t in tensors], dim=1).flatten(0, 1)
        if part == "output" and kind == "weight":
            return torch.cat([t.unflatten(1, (groups, -1)) for t in tensors], dim=2).flatten(1, 2)
        return torch.stack(tensors).mean(0)

    state = {name: merged(name, [s[name] for s in states]) for name in states[0]}
    module.load_state_dict(module.state_dict() | state)
    return module
