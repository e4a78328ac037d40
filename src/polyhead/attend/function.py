"""`attend`: the operator. `explain`: which backend would run it, and why each other one would not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.attend.backends import BACKENDS, STREAMING
from polyhead.attend.backends.reference import dense_weights
from polyhead.attend.backends.sdpa import plain
from polyhead.attend.masks import Chosen, Mask, is_causal
from polyhead.attend.normalizers import Normalizer, Softmax, softmax
from polyhead.attend.plan import Plan, Request, pick, plan
from polyhead.attend.problem import Problem
from polyhead.attend.scores import Score, chain
from polyhead.attend.selectors import Correcting, Recalling, Selector, Summaries, choose
from polyhead.attend.tiles import Consumer, observe_tiles
from polyhead.attend.weight_maps import WeightMap, weight_chain
from polyhead.checks import finite, flag, given, number, several
from polyhead.errors import ConfigError, ShapeError

__all__ = ["attend", "check_correctable", "choice", "explain", "observe", "resolved", "weights_of"]

_SOFTMAX = softmax()
_NUMBER = (float, int)


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    select: Selector | None = None,
    score: Score | Sequence[Score] | None = None,
    normalizer: Normalizer = _SOFTMAX,
    weight_map: WeightMap | Sequence[WeightMap] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    select: Selector | None = None,
    score: Score | Sequence[Score] | None = None,
    normalizer: Normalizer = _SOFTMAX,
    weight_map: WeightMap | Sequence[WeightMap] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def attend(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    *,
    mask: Mask | None = None,
    select: Selector | None = None,
    score: Score | Sequence[Score] | None = None,
    normalizer: Normalizer = _SOFTMAX,
    weight_map: WeightMap | Sequence[WeightMap] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B H L Dv"] | tuple[Float[Tensor, "B H L Dv"], Float[Tensor, "B H L"]]:
    """Multi-head attention: out_i = sum_j w_ij v_j, w_i = weight_map(normalizer(score(scale · q_i·k_j))).

    Query head h reads key/value head h // (H / G). With L queries and S keys, query row r stands at
    position r + S - L: queries are the last positions, as in decoding. A row that may look at nothing
    gives zeros.

    Args:
        q: queries `(B, H, L, D)`.
        k: keys `(B, G, S, D)`, G dividing H.
        v: values `(B, G, S, Dv)`.
        mask: who may look at whom, such as `causal() & window(255)`; None: everybody at everything.
        select: of what the mask lets be seen, the blocks of keys that are read at all, decided from q and k:
            `select(mean_keys(), keep_share(0.1))`. No gradient flows through the choice.
        score: maps of the logits, one or a sequence applied in order, such as `(alibi(8), soft_cap(30.0))`.
        normalizer: how a row's logits become weights. Default `softmax()`.
        weight_map: maps of the weights behind the normaliser, one or a sequence, such as `head_mix(matrix)`.
            Forbidden pairs keep weight 0, and what comes out need not sum to 1. Dropout comes after it.
        scale: factor of q·k. Default 1/sqrt(D).
        dropout: probability with which a weight is dropped; drawn from torch's default generator.
        return_lse: also return the log-sum-exp of each row's logits, -inf where there are none (softmax).
        backend: `"auto"`, or the name of the one that has to run: see `explain`.

    Returns:
        `(B, H, L, Dv)` in the dtype of q; with `return_lse` also `(B, H, L)` in float32 (or float64).

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        ConfigError: a value is not allowed.
        BackendRefused: the named backend cannot run this call; the message says why.
        DenseFallback: under `strict()`, only dense O(L·S) memory can serve the call.
    """
    if (
        backend == "auto"
        and select is None
        and score is None
        and weight_map is None
        and type(normalizer) is Softmax
        and normalizer.sink is None
        and type(dropout) in _NUMBER
        and not dropout
        and return_lse is False
        and (mask is None or is_causal(mask))
        and (scale is None or finite(scale))
        and _is_plain(q, k, v, mask is not None)
    ):
        # the common call, decided without building a plan: the planner would say the same
        return plain(q, k, v, causal=mask is not None, scale=scale)
    if isinstance(select, Correcting):
        check_correctable(select, score, normalizer, weight_map, dropout, return_lse)
        return _corrected(q, k, v, mask, select, scale, backend)
    request = _request(q, k, v, mask, select, score, normalizer, weight_map, scale, dropout, return_lse)
    if torch.compiler.is_compiling() and backend in ("auto", *(b.name for b in STREAMING)):
        from polyhead.attend.opaque import attend_opaque  # imports the compiler, which is here already

        out, lse = attend_opaque(request, backend)
    else:
        out, lse = pick(request, BACKENDS, backend).run(request)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _corrected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    select: Correcting,
    scale: float | None,
    backend: str,
) -> Tensor:
    request = _request(q, k, v, mask, None, None, _SOFTMAX, None, scale, 0.0, False)
    q, k, v, scale = request.q, request.k, request.v, request.problem.scale
    found = choice(q, k, mask, select, scale)
    out = attend(q, k, v, mask=found if mask is None else mask & found, scale=scale, backend=backend)
    return select.correct(out, q, k, v, mask, found, scale)


def check_correctable(
    select: Selector,
    score: object = None,
    normalizer: Normalizer = _SOFTMAX,
    weight_map: object = None,
    dropout: float = 0.0,
    return_lse: bool = False,
) -> None:
    """Raise a `ConfigError` if a call has more than plain softmax, and its selector corrects the output."""
    if not isinstance(select, Correcting):
        return
    plain_softmax = type(normalizer) is Softmax and normalizer.sink is None
    for name, wrong in (
        ("score", bool(score)),
        ("normalizer", not plain_softmax),
        ("weight_map", bool(weight_map)),
        ("dropout", bool(dropout)),
        ("return_lse", return_lse),
    ):
        if wrong:
            raise ConfigError(
                f"select: {type(select).__name__.lower()} corrects the output of plain softmax, and takes no "
                f"{name}; leave it out, or use the selector that is corrected"
            )


def explain(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    *,
    mask: Mask | None = None,
    select: Selector | None = None,
    score: Score | Sequence[Score] | None = None,
    normalizer: Normalizer = _SOFTMAX,
    weight_map: WeightMap | Sequence[WeightMap] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Plan:
    """The plan of the same call of `attend`: the chosen backend, and for each other one why not."""
    request = _request(q, k, v, mask, select, score, normalizer, weight_map, scale, dropout, return_lse)
    return plan(request, BACKENDS, backend)


def observe(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    consumers: Iterable[Consumer],
    *,
    mask: Mask | None = None,
    select: Selector | None = None,
    score: Score | Sequence[Score] | None = None,
    normalizer: Normalizer = _SOFTMAX,
    weight_map: WeightMap | Sequence[WeightMap] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H L Dv"]:
    """The output of `attend`, while `consumers` see all weights, strip by strip, in O(L) memory.

    Every consumer's `visit(tile, logits, weights)` is called for each strip of whole rows: the tile says
    which batch items, heads, query and key positions it holds; pairs outside the tiles have weight 0.
    The buffers are reused: a consumer keeps what it computes, not what it is given. No gradients.
    """
    _check_shown(select)
    request = _request(q, k, v, mask, select, score, normalizer, weight_map, scale, 0.0, False)
    return observe_tiles(request.q, request.k, request.v, request.problem, _consumers(consumers))


def weights_of(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    *,
    mask: Mask | None = None,
    select: Selector | None = None,
    score: Score | Sequence[Score] | None = None,
    normalizer: Normalizer = _SOFTMAX,
    weight_map: WeightMap | Sequence[WeightMap] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H L S"]:
    """The weights of a call of `attend`, all of them at once and differentiable: O(L·S) memory.

    For what needs them whole, such as a loss on them. In float32, or float64 where q is. `observe` shows
    them strip by strip.
    """
    _check_shown(select)
    request = _request(q, k, k, mask, select, score, normalizer, weight_map, scale, 0.0, False)
    return dense_weights(request)[0]


def _check_shown(select: Selector | None) -> None:
    if isinstance(select, Correcting):
        raise ConfigError(
            f"select: {type(select).__name__.lower()} corrects the output, which is made of more than these "
            "weights; use the selector that is corrected to see what is read"
        )


def _consumers(consumers: Iterable[Consumer]) -> tuple[Consumer, ...]:
    if not several(consumers):
        hint = "; put it into a list" if callable(getattr(consumers, "visit", None)) else ""
        raise ConfigError(f"consumers must be a sequence of consumers, got {given(consumers)}{hint}")
    found = tuple(consumers)
    for consumer in found:
        if not callable(getattr(consumer, "visit", None)) or isinstance(consumer, type):
            raise ConfigError(
                "consumers must have a method visit(tile, logits, weights) and an attribute needs_logits, "
                f"True or False; got {given(consumer)}"
            )
        if not isinstance(getattr(consumer, "needs_logits", None), bool):
            raise ConfigError(
                f"consumer {type(consumer).__name__} must have an attribute needs_logits, True if visit "
                f"reads the logits and else False; got {given(getattr(consumer, 'needs_logits', None))}"
            )
    return found


def _is_plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
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


def _request(
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
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    if select is not None:
        mask = resolved(q, k, mask, select, float(scale))
    problem = Problem(mask, chain(score), normalizer, float(scale), float(dropout), weight_chain(weight_map))
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *problem.tensors()))
    return Request(q, k, v, problem, return_lse, grad)


def resolved(q: Tensor, k: Tensor, mask: Mask | None, select: Selector | None, scale: float | None) -> Mask:
    """A mask with the blocks that a selector chooses in this call."""
    found = choice(q, k, mask, select, scale)
    return found if mask is None else mask & found


def choice(
    q: Tensor,
    k: Tensor,
    mask: Mask | None,
    select: Selector | None,
    scale: float | None,
    summaries: Summaries | None = None,
) -> Chosen:
    """The blocks that a selector chooses in this call, as a mask.

    `summaries` keep what is derived of the keys, for the next call.
    """
    if isinstance(select, Recalling):
        summaries = select.summaries
        select = select.selector
    if not isinstance(select, Selector):
        raise ConfigError(
            f"select must be a selector such as select(mean_keys(), keep_share(0.1)), got {given(select)}"
        )
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if torch.compiler.is_compiling():
        from polyhead.attend.opaque_choice import choose_opaque  # imports the compiler, which is here already

        return choose_opaque(select, q, k, mask, scale)
    return choose(select, q, k, mask, scale, summaries)


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
