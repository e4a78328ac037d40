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
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyhead.attend.selectors import Selector, Spans
from polyhead.cache.duo import Sample
from polyhead.cache.influence import Influence, checked, influence, loss_of
from polyhead.checks import flag, given, number, several, whole
from polyhead.description import Part
from polyhead.errors import ConfigError, MissingExtra, ShapeError
from polyhead.head_scores import HeadScores
from polyhead.hf import sparse
from polyhead.tasks.reading import evaluating

__all__ = ["Influence", "Sample", "SpanPlan", "candidates", "influence", "search", "validated"]

Rule = tuple[float, float]
Array = NDArray[np.float64]


class SpanPlan(Part):
    """A span for every head of a model. Goes through JSON: `ph.to_json(plan)`, `ph.from_json(data)`.

    Attributes:
        alpha, beta: by layer `(H,)` of its query heads, None for layers that stay dense.
        block: keys of a block; the first one is always read.
        lengths: those that were looked at.
        losses: at each of them, the influence of what is not read, in absolute value, summed over heads (of
            those that share a rule, the one that loses most counts).
        densities: at each of them, the share of the keys that heads keep, in the mean.
        gap: how far from the best the solver may have stopped, as a share of the objective; 0: nothing left.
    """

    alpha: tuple[Tensor | None, ...]
    beta: tuple[Tensor | None, ...]
    block: int = 64
    lengths: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    gap: float = 0.0

    def __post_init__(self) -> None:
        whole("SpanPlan: block", self.block, 1)
        if len(self.alpha) != len(self.beta) or any(
            (a is None) != (b is None) or (a is not None and b is not None and a.shape != b.shape)
            for a, b in zip(self.alpha, self.beta, strict=False)
        ):
            raise ShapeError("SpanPlan: alpha and beta must be of the same layers and heads")

    def selectors(self, *, rows: int | None = None, length: int | None = None) -> list[Selector | None]:
        """One selector a layer, as `ph.sparse` takes them.

        Args:
            rows: queries that are taken together; default: as many as keys.
            length: of the prompt, by which spans are fixed while the model decodes; None: they grow.
        """
        rows = self.block if rows is None else rows
        return [
            None if a is None or b is None else Spans(a, b, self.block, rows, self.block, length)
            for a, b in zip(self.alpha, self.beta, strict=True)
        ]

    def kept(self, length: int) -> HeadScores:
        """How many tokens every head can see from the end of a sequence of `length`; NaN: a dense layer."""
        found = []
        for a, b in zip(self.alpha, self.beta, strict=True):
            if a is None or b is None:
                found.append(np.full(1, math.nan))
                continue
            spans = _spans(a.double().numpy(), b.double().numpy(), length, self.block)
            found.append(np.minimum((spans + 1) * self.block, length))
        return HeadScores(
            tuple(found),
            name="span",
            meaning=f"tokens that the head can see at length {length}, first block included",
            unit="tokens",
            direction="higher: sees more",
        )


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
    rules = candidates(lengths) if rules is None else list(rules)
    if not rules or not all(
        several(rule) and len(tuple(rule)) == 2 and all(math.isfinite(x) for x in rule) for rule in rules
    ):
        raise ConfigError(f"search: rules must be pairs (alpha, beta); got {given(rules)}")
    table = _Table.of(found, rules, shared)
    problem = _Problem(table, density, least, per_layer, seconds)
    chosen = _pareto(problem, points)
    if not chosen:
        raise ConfigError(
            f"of these {len(rules)} rules, at most {per_layer} a layer, no choice was found that keeps "
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


def _spans(alpha: Array, beta: Array, length: int, block: int) -> Array:
    """Blocks of a span, as the selector counts them."""
    most = max(1, -(-length // block))
    return np.clip(np.floor((alpha + beta * length) / block), 1, most)


class _Table:
    """What every rule loses and keeps: the numbers of the programme.

    Attributes:
        losses: `(lengths, units, rules)`; a unit is a head, or the heads that share a rule.
        shares: `(lengths, rules)`.
        layer: of each unit.
    """

    def __init__(
        self, found: list[Influence], rules: list[Rule], losses: Array, shares: Array, layer: NDArray[Any]
    ) -> None:
        self.found, self.rules = found, rules
        self.losses, self.shares, self.layer = losses, shares, layer

    @classmethod
    def of(cls, found: list[Influence], rules: list[Rule], shared: bool) -> _Table:
        alpha, beta = (np.array(x, dtype=np.float64) for x in zip(*rules, strict=True))
        layer = [
            n
            for n, (x, group) in enumerate(zip(found[0].layers, found[0].kv_groups, strict=True))
            if x is not None
            for _ in range(len(x) // (group if shared else 1))
        ]
        losses, shares = [], []
        for one in found:
            blocks = -(-one.length // one.block)
            span = _spans(alpha, beta, one.length, one.block)
            shares.append(np.minimum(span + 1, blocks) / blocks)
            rows = []
            for x, group in zip(one.layers, one.kv_groups, strict=True):
                if x is None:
                    continue
                heads = dropped(x)[:, span.astype(np.int64)]
                rows.append(heads.reshape(-1, group, len(rules)).max(1) if shared else heads)
            losses.append(np.concatenate(rows))
        return cls(found, rules, np.stack(losses), np.stack(shares), np.array(layer))

    def plan(self, picked: NDArray[Any], gap: float) -> SpanPlan:
        """The plan in which unit u has the rule picked[u]."""
        alpha: list[Tensor | None] = []
        beta: list[Tensor | None] = []
        for n, x in enumerate(self.found[0].layers):
            own = picked[self.layer == n]
            if x is None:
                alpha.append(None)
                beta.append(None)
                continue
            own = own.repeat(len(x) // len(own))
            alpha.append(torch.tensor([self.rules[r][0] for r in own], dtype=torch.float64))
            beta.append(torch.tensor([self.rules[r][1] for r in own], dtype=torch.float64))
        return SpanPlan(
            tuple(alpha),
            tuple(beta),
            self.found[0].block,
            tuple(one.length for one in self.found),
            tuple(self.lost(picked).tolist()),
            tuple(self.shares[:, picked].mean(1).tolist()),
            gap,
        )

    def lost(self, picked: NDArray[Any]) -> Array:
        """The sum over units at each length."""
        return np.asarray(self.losses[:, np.arange(len(picked)), picked].sum(1))


def dropped(x: Tensor) -> Array:
    """What a head loses with a span of s blocks and the first block, for s = 0..N: `(H, N + 1)`."""
    heads, blocks, _ = x.shape
    i = torch.arange(blocks)
    size = x.abs().double().clone()
    size[:, :, 0] = 0.0
    away = (i[:, None] - i).clamp(min=0)
    size = size * (i[:, None] >= i)
    by_distance = torch.zeros(heads, blocks + 1, dtype=torch.float64)
    by_distance.index_add_(1, away.flatten(), size.flatten(1))
    # the sum over distances of s and more, added up from the far end: what is all read loses exactly nothing
    return by_distance.flip(1).cumsum(1).flip(1).numpy()


class _Problem:
    """The programme for scipy, with bounds on the sums at all lengths but one."""

    def __init__(self, table: _Table, density: float, least: float, per_layer: int, seconds: float) -> None:
        try:
            from scipy import optimize, sparse
        except ImportError as error:
            raise MissingExtra("scipy", "search", "the search for spans") from error
        self.optimize, self.table = optimize, table
        self.seconds = seconds
        _, units, rules = table.losses.shape
        layers = np.unique(table.layer)
        self.size = units * rules
        extra = len(layers) * rules if per_layer < rules else 0
        nothing = sparse.csr_array((units, extra))
        one = sparse.hstack([sparse.kron(sparse.eye_array(units), np.ones((1, rules))), nothing])
        self.constraints = [optimize.LinearConstraint(one, 1, 1)]
        for share in table.shares:
            row = np.concatenate([np.tile(share, units) / units, np.zeros(extra)])
            # sums of shares in another order differ in the last bits
            self.constraints.append(
                optimize.LinearConstraint(row[None], least * density - 1e-9, density + 1e-9)
            )
        if extra:
            of_layer = (table.layer[:, None] == layers).astype(np.float64)
            uses = sparse.hstack(
                [sparse.eye_array(self.size), -sparse.kron(of_layer, sparse.eye_array(rules))]
            )
            few = sparse.hstack(
                [
                    sparse.csr_array((len(layers), self.size)),
                    sparse.kron(sparse.eye_array(len(layers)), np.ones((1, rules))),
                ]
            )
            self.constraints.append(optimize.LinearConstraint(uses, -np.inf, 0))
            self.constraints.append(optimize.LinearConstraint(few, 0, per_layer))
        self.extra = extra
        # objectives of the order of one, whatever the unit of the loss
        worst = table.losses.max(2).sum(1)
        self.scaled = table.losses / np.where(worst > 0, worst, 1.0)[:, None, None]

    def solve(self, weights: Array, bounds: dict[int, float]) -> tuple[NDArray[Any], float] | None:
        """The choice `(units,)` with the least weighted sum of losses, and its gap; None if there is none."""
        units, rules = self.scaled.shape[1:]
        cost = np.concatenate([np.tensordot(weights, self.scaled, 1).ravel(), np.zeros(self.extra)])
        constraints = list(self.constraints)
        for n, bound in bounds.items():
            row = np.concatenate([self.scaled[n].ravel(), np.zeros(self.extra)])
            constraints.append(self.optimize.LinearConstraint(row[None], -np.inf, bound))
        found = self.optimize.milp(
            cost,
            constraints=constraints,
            integrality=np.ones(len(cost)),
            bounds=self.optimize.Bounds(0, 1),
            options={"time_limit": self.seconds, "mip_rel_gap": 1e-6},
        )
        if found.x is None:
            return None
        picked = found.x[: self.size].reshape(units, rules).argmax(1)
        return picked, float(found.mip_gap or 0.0)

    def sums(self, picked: NDArray[Any]) -> Array:
        """The scaled sums at each length."""
        return np.asarray(self.scaled[:, np.arange(len(picked)), picked].sum(1))


def _pareto(problem: _Problem, points: int) -> list[tuple[NDArray[Any], float]]:
    """Solutions with the longest length as the objective and a grid of bounds on the others."""
    count = len(problem.scaled)
    alone = [problem.solve(np.eye(count)[n], {}) for n in range(count)]
    ends = [one for one in alone if one is not None]
    if len(ends) < count or count == 1:
        return ends
    sums = np.stack([problem.sums(picked) for picked, _ in ends])
    low, high = sums.min(0), sums.max(0)
    weights = np.full(count, 1e-3)  # of equal ones, that which is better at the other lengths
    weights[-1] = 1.0
    found = list(ends)
    grids = [np.linspace(low[n], high[n], points) for n in range(count - 1)]
    for bounds in itertools.product(*grids):
        one = problem.solve(weights, {n: bound + 1e-9 for n, bound in enumerate(bounds)})
        if one is not None:
            found.append(one)
    found.sort(key=lambda one: problem.sums(one[0])[::-1].tolist())
    kept: list[tuple[NDArray[Any], float]] = []
    for picked, gap in found:
        mine = problem.sums(picked)
        if not any(bool((problem.sums(other) <= mine + 1e-12).all()) for other, _ in kept):
            kept.append((picked, gap))
    return kept
