"""Explicit multi-head attention: the keys and values of every head are learned combinations of stored heads.

    k_h = Σ_n M_K[n, h] c_n,  v_h = Σ_n M_V[n, h] u_n,   head_h = softmax(q_h k_hᵀ / √D) v_h
    y = concat_h(γ_h ⊙ norm(head_h) + β_h) W_O,   norm(z) = (z - mean z) / √(var z + 1e-5)

c, u: (S, N, D) are projected and cached, turned by positions already; M: (N, H), at the start the identity,
or for N < H head h reads stored head ⌊h·N/H⌋; γ, β: (H, Dv). Without the norm, N = H begins as multi-head
attention and a divisor N of H as grouped-query attention. `merged` writes M into the projections; `virtual`
finds the N stored heads that are nearest to the H heads of a trained module.

Cost: 2·N·H + 2·H·Dv parameters more than N key/value heads need; 4·S·N·H·D FLOPs to mix; 2·N·D numbers of
cache per token. A single query reads the stored heads in place, with N times the products of its scores.

Paper 042: Explicit Multi-head Attention for Inter-head Interaction in Large Language Models, arXiv
2601.19611. Our readings: the norm is a mean-centred GroupNorm with a head for a group; the paper says that it
evens out the mixed heads, not where: it stands between attention and W_O, or with `norm_at="kv"` behind the
mixing, before positions turn the keys, so that H normalised heads are cached; how M starts; the truncated
singular value decomposition of `virtual`; `qk_norm` normalises stored keys.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polyhead.checks import given
from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import AttentionConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.mixed_projection import (
    HeadNormOutput,
    MixedAttention,
    MixedProjection,
    NormedMixedProjection,
)
from polyhead.nn.projections import OutputProjection, Projection, at_least_one

_NORMS = ("out", "kv")

__all__ = ["ExplicitMultihead", "merged", "virtual"]


@register(
    "explicit_multihead",
    aliases=("mea", "hlc"),
    paper="042",
    title="Explicit Multi-head Attention for Inter-head Interaction in Large Language Models",
    family="interaction",
    summary="keys and values of a head are learned sums of stored heads; the outputs of heads are normalised",
    equation=(
        "head_h = softmax(q_h k_hᵀ / √D) v_h;  k_h = Σ_n M_K[n, h] c_n, v_h = Σ_n M_V[n, h] u_n;  "
        "y = concat_h(norm(head_h)) W_O"
    ),
)
class ExplicitMultihead(AttentionConfig):
    """Explicit multi-head attention.

    Attributes:
        stored_heads: heads N that are projected and cached; default `heads`.
        norm_at: "out", the outputs of the heads are normalised; "kv", their keys and values; or None.
    """

    stored_heads: int | None = None
    norm_at: str | None = "out"

    def __post_init__(self) -> None:
        at_least_one("ExplicitMultihead", dim=self.dim, heads=self.heads)
        stored = self.heads if self.stored_heads is None else self.stored_heads
        at_least_one("ExplicitMultihead", stored_heads=stored)
        if self.norm_at is not None and (not isinstance(self.norm_at, str) or self.norm_at not in _NORMS):
            raise unknown_name("norm_at", self.norm_at, _NORMS)
        object.__setattr__(self, "stored_heads", stored)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        assert self.stored_heads is not None
        return self.assemble(
            heads=self.heads,
            kv_heads=self.heads,
            device=device,
            dtype=dtype,
            projection=partial(
                NormedMixedProjection if self.norm_at == "kv" else MixedProjection,
                stored_heads=self.stored_heads,
            ),
            output=HeadNormOutput if self.norm_at == "out" else OutputProjection,
            module=MultiHeadAttention if self.norm_at == "kv" else MixedAttention,
        )


def merged(attention: MultiHeadAttention) -> MultiHeadAttention:
    """Explicit multi-head attention with the combinations written out, as many key/value heads as queries.

    It has the output projection of the old module, with its norm. Not for `qk_norm` and `norm_at="kv"`, which
    are not linear.
    """
    mixed = getattr(attention, "projection", None)
    if not isinstance(mixed, MixedProjection):
        raise ConfigError(f"attention must be explicit multi-head attention; got {given(attention)}")
    if isinstance(mixed, NormedMixedProjection):
        raise ConfigError('norm_at="kv" is no linear map of the stored heads: they cannot be merged')
    if mixed.key_norm is not None:
        raise ConfigError("qk_norm stands between the stored keys and their mixing: they cannot be merged")
    found = Projection(
        mixed.dim,
        mixed.heads,
        head_dim=mixed.head_dim,
        value_dim=mixed.value_dim,
        context_dim=mixed.context_dim,
        bias=mixed.key.bias is not None,
        device=mixed.key.weight.device,
        dtype=mixed.key.weight.dtype,
    )
    state = {k: v for k, v in mixed.state_dict().items() if k in found.state_dict()}
    with torch.no_grad():
        for name in ("key", "value"):
            for part in ("weight", "bias"):
                if f"{name}.{part}" in state:
                    stored = state[f"{name}.{part}"].unflatten(0, (mixed.stored_heads, -1))
                    sums = torch.einsum("n...,nh->h...", stored, getattr(mixed, f"{name}_mix"))
                    state[f"{name}.{part}"] = sums.flatten(0, 1)
        found.load_state_dict(state)
    plain = MultiHeadAttention(
        found.train(attention.training),
        copy.deepcopy(attention.output),
        scale=attention.scale,
        dropout=attention.dropout,
        regularizers=attention.regularizers,
    )
    for name in ("position", "score", "normalizer", "weight_map", "mask", "select"):
        setattr(plain, name, copy.deepcopy(getattr(attention, name)))
    return plain.train(attention.training)


def virtual(attention: MultiHeadAttention, stored_heads: int) -> MixedAttention:
    """Explicit multi-head attention of N stored heads, as near as can be to a trained multi-head attention.

    The weights of the H key heads, a row each, are factored by a truncated singular value decomposition, as
    are those of the values; what is lost are the singular values that are cut off. There is no norm.

    Args:
        attention: multi-head attention.
        stored_heads: N, at most H.
    """
    old, config = getattr(attention, "projection", None), getattr(attention, "config", None)
    # a kind of its own, such as one that chooses what it reads, would lose what it is
    other = type(attention) is not MultiHeadAttention or type(old) is not Projection
    if other or old is None or old.heads != old.kv_heads or not isinstance(config, AttentionConfig):
        raise ConfigError(f"attention must be multi-head attention made by its name; got {given(attention)}")
    at_least_one("virtual", stored_heads=stored_heads)
    if stored_heads > old.heads:
        raise ConfigError(f"stored_heads must be at most heads={old.heads}; got {stored_heads}")
    if old.key_norm is not None:
        raise ConfigError("qk_norm normalises every key head by itself: combinations would not be those")
    fields = (f.name for f in dataclasses.fields(AttentionConfig) if f.init)
    shared = {name: getattr(config, name) for name in fields}
    new = ExplicitMultihead(**shared, stored_heads=stored_heads, norm_at=None)
    weight = old.key.weight
    found = new.build(device=weight.device, dtype=weight.dtype)
    assert isinstance(found, MixedAttention)
    state = {k: v for k, v in attention.state_dict().items() if k in found.state_dict()}
    for name in ("key", "value"):
        linear = getattr(old, name)
        columns = [linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]]
        stored, mix = _factored(torch.cat(columns, dim=1).detach(), old.heads, stored_heads)
        state[f"projection.{name}.weight"] = stored[:, : linear.in_features]
        if linear.bias is not None:
            state[f"projection.{name}.bias"] = stored[:, -1]
        state[f"projection.{name}_mix"] = mix
    found.load_state_dict(state)
    found.config = new
    return found.train(attention.training)


def _factored(weight: Tensor, heads: int, stored: int) -> tuple[Tensor, Tensor]:
    """The stored heads `(N·width, columns)` and their mix `(N, H)` of the weights of H heads."""
    rows = weight.unflatten(0, (heads, -1)).flatten(1).double()
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    root = s[:stored].sqrt()
    kept = (root[:, None] * v[:stored]).unflatten(1, (-1, weight.shape[1])).flatten(0, 1)
    return kept.to(weight.dtype), (u[:, :stored] * root).T.to(weight.dtype)
