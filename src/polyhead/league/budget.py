"""Sizes with which a contender costs what the budget says: solved for, not guessed.

    params   parameters of the whole model, within 1 %
    flops    operations of a forward pass over one training sequence, as `cost` counts them, within 1 %
    kv       bytes that a token adds to the KV cache, exactly; parameters as near as an MLP can bring them

Parameters and operations are linear in the width of the MLPs, so the width is solved for; where the attention
alone is too dear at the width d of the model, or too cheap, the nearest other d is taken. Bytes of the cache
are met by the width of the heads where a mechanism has that option, and by d where it has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
_LEAST_MLP, _MOST_MLP = 0.25, 16.0  # widths of an MLP over d that are still a transformer
_DIMS = 4.0  # how much wider or narrower a model may become


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
    for found in tried:
        got = getattr(found.counted, budget)
        if got == wanted or (budget != "kv" and abs(got - wanted) <= _CLOSE * wanted):
            return found
        if nearest is None or abs(got - wanted) < abs(getattr(nearest.counted, budget) - wanted):
            nearest = found
    said = (
        "no size of it can be built"
        if nearest is None
        else f"the nearest has {getattr(nearest.counted, budget):,}"
    )
    limit = "exactly" if budget == "kv" else "within 1 %"
    raise ConfigError(
        f"{one.label}: no size has {wanted:,} {_WORDS[budget]} {limit}; {said}. Choose another budget, or "
        "options with which it can meet this one"
    )


_WORDS = {
    "params": "parameters",
    "flops": "operations a sequence",
    "kv": "bytes of KV cache a token",
}


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
            yield _with_mlp(task, one, replace(own, dim=dim, mlp=1), budget, getattr(target, budget))
        except PolyheadError:
            if dim == own.dim:  # an option that is not allowed, rather than a size that does not fit
                raise


def _with_mlp(
    task: Task,
    one: Contender,
    narrow: Sizes,
    budget: str,
    wanted: int,
    further: dict[str, Any] | None = None,
) -> Fitted:
    layers = _layers(task, one, narrow, further)
    least = count(task, narrow, layers)
    more = count(task, replace(narrow, mlp=2), layers)
    slope = getattr(more, budget) - getattr(least, budget)
    width = 1 + round((wanted - getattr(least, budget)) / slope)
    width = min(max(width, round(_LEAST_MLP * narrow.dim)), round(_MOST_MLP * narrow.dim))
    sizes = replace(narrow, mlp=width)
    return Fitted(one, sizes, layers, count(task, sizes, layers))


def _by_cache(task: Task, one: Contender, own: Sizes, target: Counted) -> Iterator[Fitted]:
    """At every width of the heads, or of the model, that can be built."""
    takes = all("head_dim" in entry(name).config.__dataclass_fields__ for name in one.names)
    fixed = any(option == "head_dim" for options in one.options for option, _ in options)
    if takes and not fixed:
        plain = own.dim // own.heads
        # even ones first: rotary positions turn pairs
        widths = sorted(range(1, 16 * plain + 1), key=lambda w: (w % 2, abs(w - plain), w))
        tries: Iterator[tuple[int, dict[str, Any]]] = ((own.dim, {"head_dim": w}) for w in widths)
    else:
        tries = ((dim, {}) for dim in _dims(own))
    first: PolyheadError | None = None
    built = False
    for dim, further in tries:
        narrow = replace(own, dim=dim, mlp=1)
        try:
            layers = _layers(task, one, narrow, further)
            found = count(task, narrow, layers)
        except PolyheadError as error:
            first = first or error
            continue
        built = True
        if found.kv == target.kv:
            yield _with_mlp(task, one, narrow, "params", target.params, further)
        else:
            yield Fitted(one, narrow, layers, found)
    if first is not None and not built:
        raise first


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
