"""Induction: a random word of unknown length repeats, and what comes next is asked."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyhead.checks import whole
from polyhead.errors import ConfigError
from polyhead.league.seeds import generator
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task

__all__ = ["InductionTask"]


class InductionTask(Task):
    """A word of p symbols over and over, with p new in every sequence; from its second time on, what comes.

    No symbol comes twice in a word, so the one before the place that is asked tells what follows: find where
    it came last, and look one further. The distance is p and nothing says p. In the split "longer" sequences
    have twice the length, with words as long as before.

    Attributes:
        tokens: length of a sequence.
        shortest, longest: the least and the greatest p.
        alphabet: different symbols.
    """

    name = "induction"
    summary = "a random word repeats after an unknown distance; what comes next"
    grows = ("tokens", "longest", "alphabet")
    sizes = Sizes(dim=64, heads=4, layers=2, mlp=128)
    recipe = Recipe(steps=800, batch=64, rate=3e-3)

    tokens: int = 64
    shortest: int = 8
    longest: int = 32
    alphabet: int = 64

    def __post_init__(self) -> None:
        whole("shortest", self.shortest, 2)
        whole("longest", self.longest, self.shortest)
        whole("tokens", self.tokens, 2)
        if self.tokens <= self.longest + 1:
            raise ConfigError(f"tokens must be more than longest + 1 = {self.longest + 1}; got {self.tokens}")
        if whole("alphabet", self.alphabet, 2) < self.longest:
            raise ConfigError(f"alphabet must be at least longest={self.longest}; got {self.alphabet}")

    @property
    def vocabulary(self) -> int:
        return self.alphabet

    @property
    def outputs(self) -> int:
        return self.alphabet

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def splits(self) -> tuple[str, ...]:
        return ("validation", "longer")

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        draw = generator(self.name, split, number, seed)
        length = self.tokens * (2 if split == "longer" else 1)
        word = torch.rand(size, self.alphabet, generator=draw).argsort(-1)
        period = torch.randint(self.shortest, self.longest + 1, (size, 1), generator=draw)
        whole_run = word.gather(1, torch.arange(length + 1) % period)
        targets = whole_run[:, 1:].masked_fill(torch.arange(length) < period, -100)
        return Batch(whole_run[:, :-1], targets)

    def yardsticks(self) -> Mapping[str, float]:
        return {"a guess": 1 / self.alphabet}
