"""`attend`: the operator. `explain`: which backend would run it, and why each other one would not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.attend.backends import BACKENDS, STREAMING
from polyhead.attend.backends.reference import dense_weights
from polyhead.attend.backends.sdpa import plain
from polyhead.attend.choosing import check_correctable, check_shown, choice
from polyhead.attend.masks import Mask, is_causal
from polyhead.attend.normalizers import Normalizer, Softmax, softmax
from polyhead.attend.plan import Plan, pick, plan
from polyhead.attend.request import is_plain, request_of
from polyhead.attend.scores import Score
from polyhead.attend.selectors import Correcting, Selector
from polyhead.attend.tiles import Consumer, observe_tiles
from polyhead.attend.weight_maps import WeightMap
from polyhead.checks import finite, given, several
from polyhead.errors import ConfigError

__all__ = ["attend", "explain", "observe", "weights_of"]

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
        q: queries `(B, H, L, D)`; with D = 0 all q·k are 0.
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
        and is_plain(q, k, v, mask is not None)
    ):
        # the common call, decided without building a plan: the planner would say the same
        return plain(q, k, v, causal=mask is not None, scale=scale)
    if isinstance(select, Correcting):
        check_correctable(select, score, normalizer, weight_map, dropout, return_lse)
        return _corrected(q, k, v, mask, select, scale, backend)
    request = request_of(q, k, v, mask, select, score, normalizer, weight_map, scale, dropout, return_lse)
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
    request = request_of(q, k, v, mask, None, None, _SOFTMAX, None, scale, 0.0, False)
    q, k, v, scale = request.q, request.k, request.v, request.problem.scale
    found = choice(q, k, mask, select, scale)
    out = attend(q, k, v, mask=found if mask is None else mask & found, scale=scale, backend=backend)
    return select.correct(out, q, k, v, mask, found, scale)


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
    """Which backend would run a call of `attend`, and why each other one would not; nothing is attended.

    Args:
        q, k, v, mask, select, score, normalizer, weight_map, scale, dropout, return_lse, backend: as of
            `attend`, defaults included. A selector chooses as it would in the call.

    Returns:
        The `Plan`, which prints one backend a line.

    Raises:
        ShapeError, ConfigError, BackendRefused, DenseFallback: where `attend` would.
    """
    request = request_of(q, k, v, mask, select, score, normalizer, weight_map, scale, dropout, return_lse)
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

    Args:
        q, k, v, mask, select, score, normalizer, weight_map, scale: as of `attend`, defaults included.
        consumers: objects with `visit(tile, logits, weights)` and the attribute `needs_logits`, True where
            `visit` reads the logits: see `Consumer`.

    Returns:
        `(B, H, L, Dv)` in the dtype of q.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        ConfigError: a value is not allowed, something is no consumer, or the selector corrects the output,
            which is then made of more than the weights.
    """
    check_shown(select)
    request = request_of(q, k, v, mask, select, score, normalizer, weight_map, scale, 0.0, False)
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
    them strip by strip, and takes the same arguments.
    """
    check_shown(select)
    request = request_of(q, k, k, mask, select, score, normalizer, weight_map, scale, 0.0, False)
    return dense_weights(request)[0]


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
