"""The integer programme that gives every head of a model a rule for its span, and its best solutions.

    x_ur in {0, 1}    unit u, a head or the heads that share a rule, has the rule r:  Σ_r x_ur = 1
    y_lr in {0, 1}    layer l has units with the rule r:  x_ur <= y_lr,  Σ_r y_lr <= per_layer
    least Σ_ur loss_N(u, r) x_ur,  with  least · density <= mean_u Σ_r share_M(r) x_ur <= density  at all M

Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression" (paper 107, arXiv
2406.14909).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyhead.cache.influence import Influence
from polyhead.cache.span_plan import Array, Rule, SpanPlan, span_blocks
from polyhead.errors import MissingExtra

__all__ = ["Programme", "Table", "dropped", "pareto"]


class Table:
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
    def of(cls, found: list[Influence], rules: list[Rule], shared: bool) -> Table:
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
            span = span_blocks(alpha, beta, one.length, one.block)
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


class Programme:
    """The programme for scipy, with bounds on the sums at all lengths but one."""

    def __init__(self, table: Table, density: float, least: float, per_layer: int, seconds: float) -> None:
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


def pareto(programme: Programme, points: int) -> list[tuple[NDArray[Any], float]]:
    """Solutions with the longest length as the objective and a grid of bounds on the others."""
    count = len(programme.scaled)
    alone = [programme.solve(np.eye(count)[n], {}) for n in range(count)]
    ends = [one for one in alone if one is not None]
    if len(ends) < count or count == 1:
        return ends
    sums = np.stack([programme.sums(picked) for picked, _ in ends])
    low, high = sums.min(0), sums.max(0)
    weights = np.full(count, 1e-3)  # of equal ones, that which is better at the other lengths
    weights[-1] = 1.0
    found = list(ends)
    grids = [np.linspace(low[n], high[n], points) for n in range(count - 1)]
    for bounds in itertools.product(*grids):
        one = programme.solve(weights, {n: bound + 1e-9 for n, bound in enumerate(bounds)})
        if one is not None:
            found.append(one)
    found.sort(key=lambda one: programme.sums(one[0])[::-1].tolist())
    kept: list[tuple[NDArray[Any], float]] = []
    for picked, gap in found:
        mine = programme.sums(picked)
        if not any(bool((programme.sums(other) <= mine + 1e-12).all()) for other, _ in kept):
            kept.append((picked, gap))
    return kept
