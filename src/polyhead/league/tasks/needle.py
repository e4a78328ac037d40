"""Needles: a few marked symbols in a long filler, asked at the end."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyhead.checks import whole
from polyhead.errors import ConfigError
from polyhead.league.seeds import generator
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task

__all__ = ["NeedleTask"]


class NeedleTask(Task):
    """Needles, symbols that say a key and its value, at random places of a filler; then their keys.

    At each of the last tokens the value of its key is asked. Whoever sees recent tokens only can answer for
    the needles that lie among them. In the split "longer" the filler has four times the length.

    Attributes:
        tokens: length of a sequence.
        needles: how many there are, and are asked.
        keys, values: different ones of each; there is a symbol for every pair of them.
        filler: different symbols of the filler.
    """

    name = "needle"
    summary = "a few marked symbols in a long filler, asked at the end"
    grows = ("tokens",)
    sizes = Sizes(dim=64, heads=4, layers=2, mlp=128)
    recipe = Recipe(steps=600, batch=32, rate=3e-3)

    tokens: int = 128
    needles: int = 4
    keys: int = 8
    values: int = 16
    filler: int = 32

    def __post_init__(self) -> None:
        for name in ("tokens", "needles", "keys", "values", "filler"):
            whole(name, getattr(self, name), 1)
        if self.keys < self.needles:
            raise ConfigError(f"keys must be at least needles={self.needles}; got {self.keys}")
        if self.tokens < 2 * self.needles:
            raise ConfigError(
                f"tokens must be at least {2 * self.needles} for {self.needles} needles; got {self.tokens}"
            )

    @property
    def vocabulary(self) -> int:
        return self.keys * self.values + self.keys + self.filler

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
        length, n = self.tokens * (4 if split == "longer" else 1), self.needles
        asking = self.keys * self.values  # the first of the symbols that ask for a key
        inputs = torch.randint(self.filler, (size, length), generator=draw) + asking + self.keys
        keys = torch.rand(size, self.keys, generator=draw).argsort(-1)[:, :n]
        values = torch.randint(self.values, (size, n), generator=draw)
        at = torch.rand(size, length - n, generator=draw).argsort(-1)[:, :n]
        inputs.scatter_(1, at, keys * self.values + values)
        order = torch.rand(size, n, generator=draw).argsort(-1)
        inputs[:, length - n :] = keys.gather(1, order) + asking
        targets = torch.full((size, length), -100)
        targets[:, length - n :] = values.gather(1, order)
        return Batch(inputs, targets)

    def yardsticks(self) -> Mapping[str, float]:
        return {"a guess": 1 / self.values}
