"""Counting matches of three in an order: how many pairs of tokens complete a token to zero."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from polyhead.checks import whole
from polyhead.errors import ConfigError
from polyhead.league.seeds import generator
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task

__all__ = ["CountMatch3Task"]


class CountMatch3Task(Task):
    """y_n = #{(j, k): x_n + 2 x_j + 3 x_k = 0 mod M} over N symbols x drawn from 0..M-1.

    All y_n are asked, in units of how far they spread; the score is the mean squared error, 1 for whoever
    knows the mean alone. j and k do not change places, may be the same token or n itself, and every pair
    counts, which no weight of one token by another tells.

    Paper 058: Interleaved Head Attention, arXiv 2602.21371, names the task (CPM-3, sensitive to order); the
    factors 2 and 3, that counts are answered as numbers, and sizes are ours. The split "longer" has half as
    many tokens again.

    Attributes:
        tokens: N.
        modulus: M.
    """

    name = "cpm3"
    summary = "how many ordered pairs of tokens complete a token to zero"
    answer = "numbers"
    metric = "squared error"
    better = "lower"
    causal = False
    positions = "none"
    grows = ("tokens",)
    sizes = Sizes(dim=64, heads=4, layers=2, mlp=256)
    recipe = Recipe(steps=1500, batch=128, rate=2e-3)

    tokens: int = 12
    modulus: int = 7

    def __post_init__(self) -> None:
        whole("tokens", self.tokens, 2)
        if whole("modulus", self.modulus, 5) % 2 == 0 or self.modulus % 3 == 0:
            raise ConfigError(
                f"modulus must have no factor 2 or 3, so that all sums are as likely; got {self.modulus}"
            )

    @property
    def vocabulary(self) -> int:
        return self.modulus

    @property
    def outputs(self) -> int:
        return 1

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def splits(self) -> tuple[str, ...]:
        return ("validation", "longer")

    def _counted(self, split: str, number: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        draw = generator(self.name, split, number, seed)
        count = self.tokens * 3 // 2 if split == "longer" else self.tokens
        x = torch.randint(self.modulus, (size, count), generator=draw)
        pairs = (2 * x[:, :, None] + 3 * x[:, None, :]).flatten(1) % self.modulus
        sums = torch.zeros(size, self.modulus).scatter_add_(1, pairs, torch.ones(pairs.shape))
        return x, sums.gather(1, -x % self.modulus)

    @cached_property
    def _spread(self) -> tuple[float, float]:
        """Mean and deviation of a count."""
        found = self._counted("spread", 0, 20_000, 0)[1]
        return float(found.mean()), float(found.std())

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        x, count = self._counted(split, number, size, seed)
        mean, deviation = self._spread
        # the mean of a longer sequence grows with the square of its length
        mean, deviation = (v * (x.shape[1] / self.tokens) ** p for v, p in ((mean, 2), (deviation, 1)))
        return Batch(x, ((count - mean) / deviation)[..., None])

    def yardsticks(self) -> Mapping[str, float]:
        return {"nothing learned": float(self.batch("yardsticks", 0, 4096, 0).targets.square().mean())}
