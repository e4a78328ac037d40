"""Copying: a word of random symbols, then the same again."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyhead.checks import whole
from polyhead.league.seeds import generator
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task

__all__ = ["CopyTask"]


class CopyTask(Task):
    """s_1 ... s_n | s_1 ... s_n: behind the separator every symbol of the word is asked, in its order.

    In the split "longer" words have twice the length.

    Attributes:
        word: n.
        alphabet: different symbols.
    """

    name = "copy"
    summary = "a random word, written a second time"
    grows = ("word",)
    sizes = Sizes(dim=64, heads=4, layers=2, mlp=128)
    recipe = Recipe(steps=800, batch=64, rate=3e-3)

    word: int = 24
    alphabet: int = 16

    def __post_init__(self) -> None:
        whole("word", self.word, 1)
        whole("alphabet", self.alphabet, 2)

    @property
    def vocabulary(self) -> int:
        return self.alphabet + 1

    @property
    def outputs(self) -> int:
        return self.alphabet

    @property
    def length(self) -> int:
        return 2 * self.word

    @property
    def splits(self) -> tuple[str, ...]:
        return ("validation", "longer")

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        draw = generator(self.name, split, number, seed)
        n = self.word * (2 if split == "longer" else 1)
        word = torch.randint(self.alphabet, (size, n), generator=draw)
        bar = torch.full((size, 1), self.alphabet)
        inputs = torch.cat([word, bar, word[:, :-1]], dim=1)
        targets = torch.full_like(inputs, -100)
        targets[:, n:] = word
        return Batch(inputs, targets)

    def yardsticks(self) -> Mapping[str, float]:
        return {"a guess": 1 / self.alphabet}
