"""The nearest of several points."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.checks import whole
from polyhead.league.seeds import generator
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task

__all__ = ["NearestTask"]


class NearestTask(Task):
    """N points x_i and a query y on the unit sphere of R^n; the x_i with the greatest x_i·y is asked.

    An answer counts where the nearest of the N points to it is the right one; training lowers the squared
    error. Tokens are points with a mark at the query, in no order. In the split "longer" there are four times
    as many points.

    Paper 051: On the Benefits of Rank in Attention Layers, arXiv 2407.16153. One head of full rank does it
    for any N, heads of low rank need many; ours is the metric, and that points stand among tokens of a
    transformer.

    Attributes:
        points: N.
        features: n.
    """

    name = "nearest"
    summary = "which of several points is nearest to a query"
    answer = "numbers"
    causal = False
    positions = "none"
    grows = ("points",)
    sizes = Sizes(dim=64, heads=4, layers=2, mlp=128)
    recipe = Recipe(steps=1500, batch=128, rate=2e-3)

    points: int = 8
    features: int = 16

    def __post_init__(self) -> None:
        whole("points", self.points, 1)
        whole("features", self.features, 1)

    @property
    def width(self) -> int:
        return self.features + 1

    @property
    def outputs(self) -> int:
        return self.features

    @property
    def length(self) -> int:
        return self.points + 1

    @property
    def splits(self) -> tuple[str, ...]:
        return ("validation", "longer")

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        draw = generator(self.name, split, number, seed)
        count = self.points * (4 if split == "longer" else 1)
        x = F.normalize(torch.randn(size, count + 1, self.features, generator=draw), dim=-1)
        points, query = x[:, :-1], x[:, -1]
        best = (points @ query[..., None]).squeeze(-1).argmax(-1)
        mark = torch.zeros(size, count + 1, 1)
        mark[:, -1] = 1
        targets = torch.full((size, count + 1, self.features), torch.nan)
        targets[:, -1] = points[torch.arange(size), best]
        # unit vectors have small coordinates; their lengths do not matter to what is nearest
        return Batch(torch.cat([x * self.features**0.5, mark], dim=-1), targets * self.features**0.5)

    def measure(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        points = batch.inputs[:, :-1, :-1]
        chosen = torch.cdist(outputs[:, None], points).squeeze(1).argmin(-1)
        found = points[torch.arange(len(points), device=points.device), chosen]
        right = (found == batch.answers()).all(-1).to(torch.float32)
        return right, torch.ones_like(right)

    def yardsticks(self) -> Mapping[str, float]:
        return {"a guess": 1 / self.points}
