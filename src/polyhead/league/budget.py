"""Sizes with which a contender costs what the budget says: solved for, not guessed.

    params   parameters of the whole model, within 1 %
    flops    operations of a forward pass over one training sequence, as `cost` counts them, within 1 %
    kv       bytes that a token adds to the KV cache, exactly; parameters as near as such sizes can bring them

Parameters and operations are linear in the width of the MLPs, so the width is solved for; where the attention
alone is too dear at the width d of the model, or too cheap, the nearest other d is taken. Bytes of the cache
are met by the width of the heads, where a mechanism has that option, and by d; the d of the league is kept
where parameters then come within 10 %.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from polyhead.checks import given
from polyhead.errors import ConfigError, PolyheadError, unknown_name
from polyhead.league.contender import Contender
from polyhead.league.model import Layer, Model, layer_of, tokens_of
from polyhead.league.tasks.base import Sizes, Task
from polyhead.mechanisms import entry

__all__ = ["BUDGETS", "Counted", "Fitted", "count", "fit", "target_of"]

BUDGETS = ("params", "flops", "kv")
_CLOSE = 0.01
_CLOSE_AT_HOME = 0.1  # parameters beside an exact cache, at the width of the league
_LEAST_MLP, _MOST_MLP = 0.25, 16.0  # widths of an MLP over d that are still a transformer
_DIMS = 4.0  # how much wider or narrower a model may become
_MOST_HEAD = 16  # how much wider a head may become at the width of the league


@dataclass(frozen=True)
class Counted:
    """What a model costs.

    Attributes:
        params: parameters.
        flops: operations of a forward pass over one training sequence; those of the read-out at every
            token, whether something is asked there or not.
        kv: bytes that one token adds to the caches of all layers, in float32.
        state: bytes that the caches hold whatever the length.
    """

    params: int
    flops: int
    kv: int
    state: int = 0


@dataclass(frozen=True)
class Fitted:
    """A contender at sizes that meet a budget, ready to be made.

    Attributes:
        contender: who.
        sizes: of the model.
        layers: the mechanisms with all of their options.
        counted: what it costs.
    """

    contender: Contender
    sizes: Sizes
    layers: tuple[Layer, ...]
    counted: Counted

    def model(self, task: Task, *, device: Any = None, dtype: Any = None) -> Model:
        """The model, with parameters freshly drawn from torch's own generator."""
        return Model(task, self.sizes, self.layers, device=device, dtype=dtype)


def count(task: Task, sizes: Sizes, layers: tuple[Layer, ...]) -> Counted:
    """What a model of these costs."""
    model = Model(task, sizes, layers, device="meta", dtype=torch.float32)
    tokens = tokens_of(task)
    cost = model.stack.step_cost(0, tokens) if task.causal else model.stack.cost(tokens)
    ends = (
        2 * task.length * sizes.dim * task.outputs if task.answer != "label" else 2 * sizes.dim * task.outputs
    )
    if task.width is not None:
        ends += 2 * task.length * task.width * sizes.dim
    params = sum(p.numel() for p in model.parameters())
    return Counted(params, cost.flops + ends, cost.kv_bytes_per_token, cost.state_bytes)


def fit(task: Task, one: Contender, sizes: Sizes, budget: str, target: Counted) -> Fitted:
    """Sizes with which `one` costs what `target` says under `budget`, as near to `sizes` as can be.

    Raises:
        UnknownName: no such budget.
        UnsupportedPattern: the contender cannot do the task.
        ConfigError: no size meets the budget; the message says what the nearest one costs.
    """
    if budget not in BUDGETS:
        raise unknown_name("budget", budget, BUDGETS)
    tried = (
        _by_cache(task, one, sizes, target) if budget == "kv" else _by_mlp(task, one, sizes, budget, target)
    )
    nearest: Fitted | None = None
    wanted = getattr(target, budget)
    limit = 0 if budget == "kv" else _CLOSE
    for found in tried:
        if nearest is None or _off(found, budget, target) < _off(nearest, budget, target):
            nearest = found
        off, beside = _off(nearest, budget, target)
        if off <= limit and beside <= (_CLOSE_AT_HOME if nearest.sizes.dim == sizes.dim else _CLOSE):
            return nearest
    if nearest is not None and _off(nearest, budget, target)[0] <= limit:
        return nearest
    said = (
        "no size of it can be built"
        if nearest is None
        else f"the nearest has {getattr(nearest.counted, budget):,}"
    )
    how = "exactly" if budget == "kv" else "within 1 %"
    raise ConfigError(
        f"{one.label}: no size has {wanted:,} {_WORDS[budget]} {how}; {said}. Choose another budget, or "
        "options with which it can meet this one"
    )


_WORDS = {
    "params": "parameters",
    "flops": "operations a sequence",
    "kv": "bytes of KV cache a token",
}


def _off(found: Fitted, budget: str, target: Counted) -> tuple[float, float]:
    """How far, as a share, the budget is missed; and by how far parameters are, beside a cache."""
    missed = abs(getattr(found.counted, budget) / getattr(target, budget) - 1)
    return missed, abs(found.counted.params / target.params - 1) if budget == "kv" else 0.0


def _layers(
    task: Task, one: Contender, sizes: Sizes, further: dict[str, Any] | None = None
) -> tuple[Layer, ...]:
    return tuple(
        layer_of(task, name, dict(options) | (further or {}), sizes.dim, sizes.heads)
        for name, options in zip(one.names, one.options, strict=True)
    )


def _dims(sizes: Sizes) -> Iterator[int]:
    """Widths that the heads divide evenly, the nearest first; even head widths, which can be turned."""
    step = 2 * sizes.heads
    near = range(step, int(_DIMS * sizes.dim) + 1, step)
    yield from sorted((d for d in near if d * _DIMS >= sizes.dim), key=lambda d: (abs(d - sizes.dim), d))


def _by_mlp(task: Task, one: Contender, own: Sizes, budget: str, target: Counted) -> Iterator[Fitted]:
    """At every width of the model, the MLPs that come nearest."""
    for dim in _dims(own):
        try:
            narrow = replace(own, dim=dim, mlp=1)
            layers = _layers(task, one, narrow)
            yield _with_mlp(task, one, narrow, layers, budget, getattr(target, budget))
        except PolyheadError:
            if dim == own.dim:  # an option that is not allowed, rather than a size that does not fit
                raise


def _with_mlp(
    task: Task, one: Contender, narrow: Sizes, layers: tuple[Layer, ...], budget: str, wanted: int
) -> Fitted:
    least = count(task, narrow, layers)
    more = count(task, replace(narrow, mlp=2), layers)
    slope = getattr(more, budget) - getattr(least, budget)
    width = 1 + round((wanted - getattr(least, budget)) / slope)
    width = min(max(width, round(_LEAST_MLP * narrow.dim)), round(_MOST_MLP * narrow.dim))
    sizes = replace(narrow, mlp=width)
    return Fitted(one, sizes, layers, count(task, sizes, layers))


def _by_cache(task: Task, one: Contender, own: Sizes, target: Counted) -> Iterator[Fitted]:
    """At every width of the model, the widths of the heads that meet the cache, and one on either side."""
    takes = all("head_dim" in entry(name).config.__dataclass_fields__ for name in one.names)
    fixed = any(option == "head_dim" for options in one.options for option, _ in options)
    plain = own.dim // own.heads
    first: list[PolyheadError] = []
    built = False
    for dim in dict.fromkeys((own.dim, *_dims(own))):
        narrow = replace(own, dim=dim, mlp=1)

        def made(width: int, narrow: Sizes = narrow) -> Fitted | None:
            try:
                layers = _layers(task, one, narrow, {"head_dim": width} if width else {})
                return Fitted(one, narrow, layers, count(task, narrow, layers))
            except PolyheadError as error:
                first[:] = first or [error]
                return None

        rows: tuple[Sequence[int], ...] = ((0,),)  # the mechanism's own width
        if takes and not fixed and dim == own.dim:
            # odd ones, which rotary positions cannot turn, where nothing else is left
            rows = tuple(range(least, _MOST_HEAD * plain + 1, 2) for least in (2, 1))
        elif takes and not fixed:  # not a narrow model of very wide heads
            rows = (range(2, int(_DIMS * plain) + 1, 2),)
        for widths in rows:
            found = _around(widths, plain, cache(made), target.kv)
            met = [near for near in found if near.counted.kv == target.kv]
            built = built or bool(found)
            for near in met:
                yield _with_mlp(task, one, narrow, near.layers, "params", target.params)
            if met:
                break
            yield from found
        if not built and takes and not fixed:  # an option that is not allowed: no width would help
            break
    if first and not built:
        raise first[0]


def _around(
    widths: Sequence[int], plain: int, made: Callable[[int], Fitted | None], wanted: int
) -> list[Fitted]:
    """The models whose caches are met, and one on either side, the width next to `plain` first.

    Wider heads never have a smaller cache, so the widths are found by bisection.
    """

    def kv(place: int) -> int:
        buildable = (found.counted.kv for found in map(made, widths[place:]) if found is not None)
        return next(buildable, wanted + 1)

    places = range(len(widths))
    least = bisect_left(places, wanted, key=kv)
    most = bisect_right(places, wanted, least, key=kv)
    near = sorted(widths[max(0, least - 1) : most + 1], key=lambda width: abs(width - plain))
    return [found for found in map(made, near) if found is not None]


def target_of(task: Task, sizes: Sizes, budget: str = "params", limit: int | None = None) -> Counted:
    """What plain attention costs at these sizes; `limit` takes the place of the budget's own number.

    Raises:
        ConfigError: a limit that is no positive integer.
    """
    found = count(task, sizes, (layer_of(task, "mha", {}, sizes.dim, sizes.heads),))
    if limit is None:
        return found
    if type(limit) is not int or limit < 1:
        raise ConfigError(f"budget: {budget} must be a positive integer; got {given(limit)}")
    return replace(found, **{budget: limit})
