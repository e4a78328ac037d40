"""Decoupled-head attention: keys and values are shared by query heads in two different ways.

    head_h = softmax(q_h k_a(h)ᵀ / √D) v_b(h),   y = concat_h(head_h) W_O

with maps a: heads → G_K key heads and b: heads → G_V value heads; q: (B, H, L, D), k: (B, G_K, S, D),
v: (B, G_V, S, D). Equal maps of groups in a row are grouped-query attention.

Cost: d·D·(2·H + G_K + G_V) parameters; score FLOPs as with H of each; D·(G_K + G_V) numbers of cache per
token: the distinct heads alone. Where both maps are groups in a row and one of G_K, G_V divides the other,
as by default, calls without a mask or under a causal one or a window copy no keys or values; other calls
repeat those that are shared less finely, for as long as the call takes.

Paper 076: DHA, Learning Decoupled-Head Attention from Transformer Checkpoints via Adaptive Heads Fusion,
arXiv 2406.06567. Its search for the maps and its gradual fusion of a checkpoint's heads are not part of the
mechanism; `decoupled` takes the means of a trained module's heads at once. The paper gives values more heads
than keys; that by default G_K is the largest divisor of H up to H/4, and G_V up to H/2, is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polyhead.attend.masks import Window
from polyhead.checks import given
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import AttentionConfig, largest_divisor
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.decoupled_projection import DecoupledProjection, sharing_map
from polyhead.nn.projections import Projection, at_least_one, divisors

__all__ = ["DecoupledHead", "DecoupledHeadAttention", "decoupled"]


class DecoupledHeadAttention(MultiHeadAttention):
    """Multi-head attention whose projection is a `DecoupledProjection`."""

    projection: DecoupledProjection
    takes_select = True

    def _mix(self, q: Tensor, rows: tuple[Tensor, ...], **options: Any) -> Tensor:
        k, v = rows
        # groups can be items of the batch where nothing goes by the index of an item or a head
        mask = options.get("mask")
        alike = all(value is None for name, value in options.items() if name not in ("mask", "scale"))
        if self.projection.nested and alike and (mask is None or type(mask) is Window):
            folded, k, v = self.projection.folded(q, k, v)
            y = super()._mix(folded, (k, v), **options)
            return y.reshape(*q.shape[:3], v.shape[-1])
        return super()._mix(q, self.projection.gathered(k, v), **options)

    def _weights(self, q: Tensor, rows: tuple[Tensor, ...], **options: Any) -> Tensor:
        k, v = rows
        return super()._weights(q, self.projection.gathered(k, v), **options)


@register(
    "decoupled_head",
    aliases=("dha",),
    paper="076",
    title=("DHA: Learning Decoupled-Head Attention from Transformer Checkpoints via Adaptive Heads Fusion"),
    family="sharing",
    summary="keys and values are shared by different groups of query heads",
    equation=(
        "head_h = softmax(q_h k_a(h)ᵀ / √D) v_b(h), a: heads → G_K, b: heads → G_V; y = concat_h(head_h) W_O"
    ),
)
class DecoupledHead(AttentionConfig):
    """Decoupled-head attention.

    Attributes:
        key_heads: G_K, a divisor of `heads`, for groups in a row; given by `key_map` where that is given.
        value_heads: G_V, likewise.
        key_map: the key head that each query head reads.
        value_map: the value head that each query head reads.
    """

    key_heads: int | None = None
    value_heads: int | None = None
    key_map: tuple[int, ...] | None = None
    value_map: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        at_least_one("DecoupledHead", dim=self.dim, heads=self.heads)
        for name, default in (("key", self.heads // 4), ("value", self.heads // 2)):
            count, shared = getattr(self, f"{name}_heads"), getattr(self, f"{name}_map")
            if shared is None:
                count = largest_divisor(self.heads, default) if count is None else count
                at_least_one("DecoupledHead", **{f"{name}_heads": count})
                if self.heads % count:
                    raise ConfigError(
                        f"{name}_heads must divide heads={self.heads} where there is no {name}_map; got "
                        f"{count}; allowed are {divisors(self.heads)}"
                    )
                shared = tuple(h // (self.heads // count) for h in range(self.heads))
            shared = sharing_map(f"{name}_map", shared, self.heads)
            if count is not None and count != max(shared) + 1:
                raise ConfigError(
                    f"{name}_heads={given(count)} does not fit {name}_map={shared}, which has "
                    f"{max(shared) + 1}; give one of them"
                )
            object.__setattr__(self, f"{name}_map", shared)
            object.__setattr__(self, f"{name}_heads", max(shared) + 1)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> DecoupledHeadAttention:
        """The module."""
        assert self.key_map is not None
        assert self.value_map is not None
        return self.assemble(
            heads=self.heads,
            kv_heads=1,
            device=device,
            dtype=dtype,
            projection=partial(DecoupledProjection, key_map=self.key_map, value_map=self.value_map),
            module=DecoupledHeadAttention,
        )


def decoupled(
    attention: MultiHeadAttention, key_map: Sequence[int], value_map: Sequence[int]
) -> DecoupledHeadAttention:
    """Decoupled-head attention with the means of a trained module's key and value heads.

    Args:
        attention: multi-head attention, built by name.
        key_map, value_map: the groups, as of `DecoupledHead`.
    """
    old, config = getattr(attention, "projection", None), getattr(attention, "config", None)
    if type(old) is not Projection or old.kv_heads != old.heads or not isinstance(config, AttentionConfig):
        raise ConfigError(f"attention must be mha, built by name; got {given(attention)}")
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(AttentionConfig) if f.init}
    new = DecoupledHead(**shared, key_map=tuple(key_map), value_map=tuple(value_map))
    found = new.build(device=old.key.weight.device, dtype=old.key.weight.dtype).train(attention.training)
    found.config = new
    state = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
    for name, groups in (("key", new.key_map), ("value", new.value_map)):
        assert groups is not None
        for kind in ("weight", "bias"):
            if (heads := state.get(f"projection.{name}.{kind}")) is not None:
                heads = heads.unflatten(0, (len(groups), -1))
                pick = torch.tensor(groups, device=heads.device)
                means = [heads[pick == g].mean(0) for g in range(max(groups) + 1)]
                state[f"projection.{name}.{kind}"] = torch.cat(means)
    found.load_state_dict(state)
    return found
