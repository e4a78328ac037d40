"""Multi-query associative recall: pairs of key and value, then keys whose values are asked."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyhead.checks import whole
from polyhead.errors import ConfigError
from polyhead.league.seeds import generator
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task

__all__ = ["RecallTask"]


class RecallTask(Task):
    """k_1 v_1 k_2 v_2 ... k_n v_n, then the n keys in another order; at each, its value is asked.

    Keys are drawn without replacement, values with, from alphabets of their own. Arora et al., "Zoology:
    Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927, ask so; there, questions
    are strewn over a longer sequence.

    Attributes:
        pairs: n.
        alphabet: different keys, and as many values.
    """

    name = "recall"
    summary = "values of keys that were shown once, all asked"
    positions = "alibi"  # with rotary ones 1,000 steps are not enough to find the token before
    grows = ("pairs", "alphabet")
    sizes = Sizes(dim=64, heads=4, layers=2, mlp=128)
    recipe = Recipe(steps=1000, batch=64, rate=5e-3)

    pairs: int = 8
    alphabet: int = 32

    def __post_init__(self) -> None:
        whole("pairs", self.pairs, 1)
        if whole("alphabet", self.alphabet, 2) < 2 * self.pairs:
            raise ConfigError(
                f"alphabet must be at least {2 * self.pairs}, twice the pairs, so that longer questions have "
                f"keys enough; got {self.alphabet}"
            )

    @property
    def vocabulary(self) -> int:
        return 2 * self.alphabet

    @property
    def outputs(self) -> int:
        return self.alphabet

    @property
    def length(self) -> int:
        return 3 * self.pairs

    @property
    def splits(self) -> tuple[str, ...]:
        return ("validation", "longer")

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        draw = generator(self.name, split, number, seed)
        pairs = self.pairs * (2 if split == "longer" else 1)
        keys = torch.rand(size, self.alphabet, generator=draw).argsort(-1)[:, :pairs]
        values = torch.randint(self.alphabet, (size, pairs), generator=draw)
        order = torch.rand(size, pairs, generator=draw).argsort(-1)
        shown = torch.stack([keys, values + self.alphabet], dim=-1).flatten(1)
        targets = torch.full((size, 3 * pairs), -100)
        targets[:, 2 * pairs :] = values.gather(1, order)
        return Batch(torch.cat([shown, keys.gather(1, order)], dim=1), targets)

    def yardsticks(self) -> Mapping[str, float]:
        return {"a guess": 1 / self.alphabet}
