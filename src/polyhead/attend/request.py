"""A call of `attend`, checked and made complete."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.choosing import resolved
from polyhead.attend.masks import Mask
from polyhead.attend.normalizers import Normalizer
from polyhead.attend.plan import Request
from polyhead.attend.problem import Problem
from polyhead.attend.scores import Score, chain
from polyhead.attend.selectors import Selector
from polyhead.attend.weight_maps import WeightMap, weight_chain
from polyhead.checks import finite, flag, given, number
from polyhead.errors import ConfigError, ShapeError

__all__ = ["is_plain", "request_of"]


def request_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    select: Selector | None,
    score: Score | Sequence[Score] | None,
    normalizer: Normalizer,
    weight_map: WeightMap | Sequence[WeightMap] | None,
    scale: float | None,
    dropout: float,
    return_lse: bool,
) -> Request:
    """The request of a call of `attend`, whose arguments it takes: they are checked, and defaults filled in.

    Under autocast q, k and v are cast. What a selector chooses is a part of the mask.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        ConfigError: a value is not allowed.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ShapeError(f"{name} must be a tensor, got {given(x)}")
    kind = q.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = (
            x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v)
        )
    _check_tensors(q, k, v)
    if mask is not None and not isinstance(mask, Mask):
        raise ConfigError(
            f"mask must be a polyhead mask such as causal(), got {given(mask)}; "
            "for a boolean (B, S) tensor of real keys use padding(tensor), for other tensors where(function)"
        )
    if not isinstance(normalizer, Normalizer):
        raise ConfigError(f"normalizer must be one such as softmax() or entmax(1.5), got {given(normalizer)}")
    for own in normalizer.tensors():
        if own.ndim == 1 and own.shape[0] not in (1, q.shape[1]):
            raise ShapeError(
                f"normalizer {normalizer} holds values for {own.shape[0]} heads, but the call has "
                f"{q.shape[1]} query heads; give one value a head, or one for all"
            )
    if isinstance(scale, Tensor):
        raise ConfigError(
            "scale must be a number; a learned one goes into score=temperature(t), with t = 1/scale"
        )
    if scale is not None:
        number("scale", scale)
    if not finite(dropout) or not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout must be at least 0 and below 1, got {given(dropout)}")
    flag("return_lse", return_lse)
    if mask is not None:
        batch, heads, queries, _ = q.shape
        mask.check(batch=batch, heads=heads, queries=queries, keys=k.shape[2], offset=k.shape[2] - queries)
    if not q.shape[-1]:
        # all logits are 0, as with one feature that is 0, which whatever runs the call can take
        q, k = F.pad(q, (0, 1)), F.pad(k, (0, 1))
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    score = chain(score)
    if select is not None:
        mask = resolved(q, k, mask, select, float(scale), score, normalizer)
    problem = Problem(mask, score, normalizer, float(scale), float(dropout), weight_chain(weight_map))
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *problem.tensors()))
    return Request(q, k, v, problem, return_lse, grad)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x, shape in (("q", q, "(B, H, L, D)"), ("k", k, "(B, G, S, D)"), ("v", v, "(B, G, S, Dv)")):
        if x.ndim != 4:
            raise ShapeError(f"{name} must have four dimensions {shape}, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ShapeError(f"{name} must hold floating-point numbers, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ShapeError(f"q, k and v must have one dtype; q has {q.dtype}, {name} has {x.dtype}")
        if x.device != q.device:
            raise ShapeError(f"q, k and v must be on one device; q is on {q.device}, {name} on {x.device}")
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if k.shape[:3] != v.shape[:3]:
        raise ShapeError(f"k and v must agree in batch, heads and length; {shapes}")
    if q.shape[0] != k.shape[0]:
        raise ShapeError(f"q and k must agree in batch; {shapes}")
    if q.shape[-1] != k.shape[-1]:
        raise ShapeError(f"q and k must agree in head dim D; {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"the {q.shape[1]} query heads must be a multiple of the {k.shape[1]} key/value heads; {shapes}"
        )


def is_plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether q, k and v fit together, and plain softmax over them, causal or not, is one call of SDPA."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    shape, kv_shape = q.shape, k.shape
    if not len(shape) == len(kv_shape) == 4:
        return False
    batch, heads, queries, width = shape
    kv_batch, kv_heads, keys, key_width = kv_shape
    return (
        v.shape == kv_shape
        and kv_batch == batch
        and key_width == width
        and keys > 0
        and queries > 0
        and width > 0
        and kv_heads > 0
        and heads % kv_heads == 0
        and (not causal or queries == 1 or queries == keys)
        and q.dtype == k.dtype == v.dtype
        and q.device == k.device == v.device
        and q.is_floating_point()
    )
