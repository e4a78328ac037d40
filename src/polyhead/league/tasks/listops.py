"""ListOps: nested lists of digits under MAX, MIN, MED and SM."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch

from polyhead.checks import whole
from polyhead.league.seeds import seed_of
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task

__all__ = ["ListOpsTask"]

_OPERATIONS = ("MAX", "MIN", "MED", "SM")
_CLOSE = 10 + len(_OPERATIONS)


class ListOpsTask(Task):
    """[MAX 2 9 [MIN 4 7 ] 0 ] → 9: the value of nested lists of digits, one of ten classes.

    MED is the lower median, SM the sum modulo 10. In the split "deeper" lists nest one level more.
    Nangia and Bowman, "ListOps: A Diagnostic Dataset for Latent Tree Learning", arXiv 1804.06028; lists here
    are short ones.

    Attributes:
        depth: how deep lists nest.
        arguments: most elements of a list; two at the least.
        tokens: longest sequence; longer ones are drawn anew.
    """

    name = "listops"
    summary = "the value of nested lists of digits"
    answer = "label"
    causal = False
    positions = "rotary"
    grows = ("tokens",)
    sizes = Sizes(dim=64, heads=4, layers=2, mlp=128)
    recipe = Recipe(steps=2000, batch=64, rate=1e-3)

    depth: int = 2
    arguments: int = 4
    tokens: int = 32

    def __post_init__(self) -> None:
        whole("depth", self.depth, 1)
        whole("arguments", self.arguments, 2)
        whole("tokens", self.tokens, self.arguments + 2)

    @property
    def vocabulary(self) -> int:
        return _CLOSE + 1

    @property
    def outputs(self) -> int:
        return 10

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def splits(self) -> tuple[str, ...]:
        return ("validation", "deeper")

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        draw = random.Random(seed_of(self.name, split, number, seed))
        depth, most = (self.depth + 1, 2 * self.tokens) if split == "deeper" else (self.depth, self.tokens)
        inputs = torch.zeros(size, most, dtype=torch.int64)
        padding = torch.zeros(size, most, dtype=torch.bool)
        targets = torch.empty(size, dtype=torch.int64)
        for n in range(size):
            written: list[int] = []
            while not 0 < len(written) <= most:
                written, value = self._list(draw, depth)
            inputs[n, : len(written)] = torch.tensor(written)
            padding[n, : len(written)] = True
            targets[n] = value
        return Batch(inputs, targets, padding)

    def _list(self, draw: random.Random, depth: int) -> tuple[list[int], int]:
        """Symbols and value of a list that nests at most so deep."""
        operation = draw.randrange(len(_OPERATIONS))
        written, values = [10 + operation], []
        for _ in range(draw.randint(2, self.arguments)):
            if depth > 1 and draw.random() < 0.3:
                own, value = self._list(draw, depth - 1)
                written += own
            else:
                value = draw.randrange(10)
                written.append(value)
            values.append(value)
        written.append(_CLOSE)
        return written, value_of(_OPERATIONS[operation], values)

    def yardsticks(self) -> Mapping[str, float]:
        targets = self.batch("yardsticks", 0, 2048, 0).targets
        return {"the most frequent value": float(targets.bincount().max() / len(targets))}


def value_of(operation: str, values: list[int]) -> int:
    """MAX, MIN, MED (the lower median) or SM (the sum modulo 10) of digits."""
    if operation == "SM":
        return sum(values) % 10
    return sorted(values)[{"MAX": -1, "MIN": 0, "MED": (len(values) - 1) // 2}[operation]]
