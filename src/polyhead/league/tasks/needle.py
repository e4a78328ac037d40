"""Needles: a few pairs of key and value in a long filler, asked at the end."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyhead.checks import whole
from polyhead.errors import ConfigError
from polyhead.league.seeds import generator
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task

__all__ = ["NeedleTask"]


class NeedleTask(Task):
    """Pairs of key and value at random places of a filler; the last tokens are the keys, in another order.

    Whoever sees recent tokens only can answer for the needles that lie among them. In the split "longer" the
    filler has twice the length.

    Attributes:
        tokens: length of a sequence.
        needles: pairs.
        keys, values: different ones of each.
        filler: different symbols of the filler.
    """

    name = "needle"
    summary = "a few pairs of key and value in a long filler, asked at the end"
    positions = "alibi"
    grows = ("tokens",)
    sizes = Sizes(dim=64, heads=4, layers=2, mlp=128)
    recipe = Recipe(steps=1000, batch=32, rate=3e-3)

    tokens: int = 128
    needles: int = 4
    keys: int = 16
    values: int = 16
    filler: int = 16

    def __post_init__(self) -> None:
        for name in ("tokens", "needles", "keys", "values", "filler"):
            whole(name, getattr(self, name), 1)
        if self.keys < self.needles:
            raise ConfigError(f"keys must be at least needles={self.needles}; got {self.keys}")
        if self.tokens < 4 * self.needles:
            raise ConfigError(
                f"tokens must be at least {4 * self.needles} for {self.needles} needles; got {self.tokens}"
            )

    @property
    def vocabulary(self) -> int:
        return self.keys + self.values + self.filler

    @property
    def outputs(self) -> int:
        return self.values

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def splits(self) -> tuple[str, ...]:
        return ("validation", "longer")

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        draw = generator(self.name, split, number, seed)
        length, n = self.tokens * (2 if split == "longer" else 1), self.needles
        inputs = torch.randint(self.filler, (size, length), generator=draw) + self.keys + self.values
        keys = torch.rand(size, self.keys, generator=draw).argsort(-1)[:, :n]
        values = torch.randint(self.values, (size, n), generator=draw)
        room = (length - n) // 2
        at = 2 * torch.rand(size, room, generator=draw).argsort(-1)[:, :n]
        inputs.scatter_(1, at, keys)
        inputs.scatter_(1, at + 1, values + self.keys)
        order = torch.rand(size, n, generator=draw).argsort(-1)
        inputs[:, length - n :] = keys.gather(1, order)
        targets = torch.full((size, length), -100)
        targets[:, length - n :] = values.gather(1, order)
        return Batch(inputs, targets)

    def yardsticks(self) -> Mapping[str, float]:
        return {"a guess": 1 / self.values}
