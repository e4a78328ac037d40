"""Linear regression in context: pairs (x, y) of a random line, and y asked at every x."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.checks import number as a_number
from polyhead.checks import whole
from polyhead.league.seeds import generator
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task

__all__ = ["RegressionTask"]


class RegressionTask(Task):
    """x_1 y_1 x_2 y_2 ... with y = w·x + noise and w new in every sequence; at each x, its y is asked.

    x ~ N(0, I_n), w ~ N(0, I/n), so y has variance 1 + s². The score is the mean squared error at the last
    x, after N pairs: 1 + s² for whoever learned nothing; ridge regression, the best there is, is a
    yardstick. In the split "longer" there are twice as many pairs.

    Papers 006 (In-Context Linear Regression Demystified, arXiv 2503.12734) and 191 (The Initialization
    Determines Whether In-Context Learning Is Gradient Descent, arXiv 2512.04268) ask about one query; here
    every prefix is a question, and x and y are tokens of their own.

    Attributes:
        pairs: N pairs before the last x.
        features: n.
        noise: s.
    """

    name = "regression"
    summary = "linear regression in context: y at every x, of pairs before it"
    answer = "numbers"
    metric = "squared error"
    better = "lower"
    grows = ("pairs",)
    sizes = Sizes(dim=64, heads=4, layers=2, mlp=128)
    recipe = Recipe(steps=2000, batch=64, rate=2e-3)

    pairs: int = 20
    features: int = 5
    noise: float = 0.1

    def __post_init__(self) -> None:
        whole("pairs", self.pairs, 1)
        whole("features", self.features, 1)
        a_number("noise", self.noise, least=0)

    @property
    def width(self) -> int:
        return self.features + 1

    @property
    def outputs(self) -> int:
        return 1

    @property
    def length(self) -> int:
        return 2 * self.pairs + 1

    @property
    def splits(self) -> tuple[str, ...]:
        return ("validation", "longer")

    def _drawn(self, split: str, number: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        draw = generator(self.name, split, number, seed)
        count = self.pairs * (2 if split == "longer" else 1) + 1
        x = torch.randn(size, count, self.features, generator=draw)
        w = torch.randn(size, self.features, 1, generator=draw) / self.features**0.5
        return x, x @ w + self.noise * torch.randn(size, count, 1, generator=draw)

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        x, y = self._drawn(split, number, size, seed)
        given = torch.cat([x, torch.zeros_like(y)], dim=-1)
        said = torch.cat([torch.zeros_like(x), y], dim=-1)
        inputs = torch.stack([given, said], dim=2).flatten(1, 2)[:, :-1]
        targets = torch.full((*inputs.shape[:2], 1), torch.nan)
        targets[:, ::2] = y
        return Batch(inputs, targets)

    def measure(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        asked = batch.inputs.shape[1] // 2 + 1
        error = (outputs - batch.answers()).square().mean(-1).view(-1, asked)[:, -1]
        return error, torch.ones_like(error)

    def yardsticks(self) -> Mapping[str, float]:
        x, y = (t.double() for t in self._drawn("yardsticks", 0, 2048, 0))
        before, after = (x[:, :-1], y[:, :-1]), (x[:, -1:], y[:, -1:])
        weight = self.features * self.noise**2 * torch.eye(self.features, dtype=x.dtype)
        found = torch.linalg.solve(before[0].mT @ before[0] + weight, before[0].mT @ before[1])
        ridge = float((after[0] @ found - after[1]).square().mean())
        return {"nothing learned": 1 + self.noise**2, "ridge regression": ridge}
