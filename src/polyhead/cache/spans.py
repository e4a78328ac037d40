"""Spans of heads that grow with the length, found for a pretrained model by an integer programme.

    found = spans.influence(model, samples)                       # one backward pass a sample
    plans = spans.search(found, 0.5)                              # every plan that no other one beats
    plan = spans.validated(model, plans, longer_samples)[0]
    with ph.sparse(model, plan.selectors()):
        ...

Every head gets a rule (alpha, beta): its span is alpha + beta · N tokens at length N, besides the first block
(`polyhead.attend.selectors.spans`). What a rule loses is the influence of the blocks that it does not read,
summed in absolute value. The programme chooses one rule a head, so that the losses at all lengths are least
while the heads read a given share of the keys in the mean.

Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression" (paper 107, arXiv
2406.14909), later Mixture of Attention Spans.

Our readings: influences are summed over a block, then taken in the mean over samples, then in absolute value.
Query heads that share keys and values share a rule, and what it loses is that of the head that loses most.
Several lengths are several objectives: the longest one is made least under bounds on the others, of which a
grid between their best and worst is tried. No small number is added to 1 - A: see `influence.entries`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from polyhead.cache.duo import Sample
from polyhead.cache.influence import Influence, checked, influence, loss_of
from polyhead.cache.span_plan import Rule, SpanPlan
from polyhead.cache.span_programme import Programme, Table, pareto
from polyhead.checks import finite, flag, given, number, several, whole
from polyhead.errors import ConfigError
from polyhead.hf import sparse
from polyhead.tasks.reading import evaluating

__all__ = ["Influence", "Sample", "SpanPlan", "candidates", "influence", "search", "validated"]


def candidates(
    lengths: Sequence[int], *, longest: int | None = None, step: int = 1024, slopes: int = 9
) -> list[Rule]:
    """The rules (alpha, beta) that the paper searches.

    alpha goes from minus the shortest length to the longest one in multiples of `step`, beta from 0 to 1 in
    `slopes` values; a rule stays if its span is above 0 at the shortest length, and no longer than the
    sequence at any of the lengths and at `longest`.

    Args:
        lengths: those whose influence was taken.
        longest: the longest that the plan is for; default: the longest of `lengths`.
        step: of alpha.
        slopes: values of beta, at least 2.
    """
    if not several(lengths) or not list(lengths):
        raise ConfigError(f"candidates: lengths must be numbers of tokens; got {given(lengths)}")
    for one in lengths:
        whole("candidates: lengths", one, 1)
    whole("candidates: step", step, 1)
    whole("candidates: slopes", slopes, 2)
    short, long = min(lengths), max(lengths)
    most = [*lengths, long if longest is None else whole("candidates: longest", longest, 1)]
    alphas = [step * n for n in range(-(short // step), long // step + 1)]
    betas = [n / (slopes - 1) for n in range(slopes)]
    return [
        (float(a), b)
        for a, b in itertools.product(alphas, betas)
        if a + b * short > 0 and all(a + b * n <= n for n in most)
    ]


def search(
    found: Sequence[Influence],
    density: float,
    *,
    rules: Sequence[Rule] | None = None,
    least: float = 0.9,
    per_layer: int = 2,
    shared: bool = True,
    points: int = 5,
    seconds: float = 60.0,
) -> list[SpanPlan]:
    """Every plan found that no other one beats at all lengths; the best at the longest length first.

        choose one rule r(h) for every head h,    at most `per_layer` different ones in a layer, so that
        Σ_h loss_N(h, r(h))  is least              for the lengths N
        least · density <= mean_h share_N(r(h)) <= density

    share_N is the part of the key blocks that a head keeps at length N. With several lengths the sum at the
    longest is made least, with bounds on the others.

    Args:
        found: of `influence`, one for each length.
        density: above 0, at most 1.
        rules: candidates (alpha, beta); default: `candidates(lengths)`.
        least: share of `density` that has to be used, 0 to 1.
        per_layer: different rules in a layer.
        shared: whether query heads of a key/value head share a rule, so that a cache can forget keys.
        points: bounds that are tried on the sum of each further length.
        seconds: for each programme; where they are not enough, the plan's `gap` says what is left.

    Raises:
        ConfigError: no choice of the rules meets the bounds, or a value is not allowed.
        MissingExtra: scipy is not installed.
    """
    found = _sorted(found)
    density = number("search: density", density, above=0, most=1)
    least = number("search: least", least, least=0, most=1)
    whole("search: per_layer", per_layer, 1)
    whole("search: points", points, 1)
    number("search: seconds", seconds, above=0)
    flag("search: shared", shared)
    lengths = [one.length for one in found]
    own = candidates(lengths) if rules is None else list(rules) if several(rules) else []
    if not own or not all(
        several(rule) and len(tuple(rule)) == 2 and all(finite(x) for x in rule) for rule in own
    ):
        raise ConfigError(f"search: rules must be pairs (alpha, beta); got {given(rules)}")
    table = Table.of(found, own, shared)
    programme = Programme(table, density, least, per_layer, seconds)
    chosen = pareto(programme, points)
    if not chosen:
        raise ConfigError(
            f"of these {len(own)} rules, at most {per_layer} a layer, no choice was found that keeps "
            f"between {least * density:g} and {density:g} of the keys at all lengths, {lengths}; give "
            "other rules, a smaller least or more seconds"
        )
    return [table.plan(picked, gap) for picked, gap in chosen]


def validated(
    model: nn.Module, plans: Sequence[SpanPlan], samples: Iterable[Sample | Tensor]
) -> list[SpanPlan]:
    """The plans in the order of the loss that the model has with them, least first.

    Args:
        model: as for `influence`.
        plans: as `search` gives them.
        samples: as for `influence`, best of a length that the search did not see.
    """
    several_samples = [checked(one) for one in samples]
    if not plans or not several_samples:
        raise ConfigError("validated needs at least one plan and one sample")
    device = next(model.parameters()).device
    losses = []
    for plan in plans:
        with evaluating(model), sparse(model, plan.selectors()):
            each = [loss_of(model, ids.to(device), counted.to(device)) for ids, counted in several_samples]
        losses.append(float(torch.cat(each).mean()))
    return [plans[n] for n in sorted(range(len(plans)), key=lambda n: losses[n])]


def _sorted(found: Sequence[Influence]) -> list[Influence]:
    if isinstance(found, Influence):
        found = [found]
    if not several(found) or not found or not all(isinstance(one, Influence) for one in found):
        raise ConfigError(f"search: found must be what influence(...) gave; got {given(found)}")
    shapes = {(one.block, one.kv_groups, tuple(x is None for x in one.layers)) for one in found}
    if len(shapes) > 1 or len({one.length for one in found}) < len(found):
        raise ConfigError("search: all influences must be of one model and block, each of another length")
    return sorted(found, key=lambda one: one.length)
