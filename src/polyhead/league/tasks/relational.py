"""A relational game: do two pairs of objects share the relation "same" or "different"?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from polyhead.checks import whole
from polyhead.errors import unknown_name
from polyhead.league.seeds import generator
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task

__all__ = ["RelationalTask"]


class RelationalTask(Task):
    """Objects a b c d, random vectors of a codebook; is (a = b) the same as (c = d)?

    A pair is two times one object or two objects, with equal chance. Objects of training and of "validation"
    come from one codebook; those of "new objects" from another, so that it takes the relation and not the
    objects to answer. The training data are so many samples, again and again: the fewer they are, the more
    a mechanism has to know of relations by itself.

    Paper 049: Disentangling and Integrating Relational and Sensory Information in Transformer Architectures,
    arXiv 2405.16727, plays such games on pictures; vectors in place of pictures, and sizes, are ours.

    Attributes:
        samples: training samples.
        objects: in a codebook.
        features: width of an object.
        read: what the answer is read from: "token", a class token; "mean", the mean of the objects.
    """

    name = "relational"
    summary = "whether two pairs of objects are both same or both different, for objects never seen"
    answer = "label"
    causal = False
    positions = "learned"
    grows = ("samples", "objects")
    sizes = Sizes(dim=64, heads=4, layers=2, mlp=128)
    recipe = Recipe(steps=2000, batch=128, rate=2e-3)

    samples: int = 30_000
    objects: int = 256
    features: int = 32
    read: Literal["token", "mean"] = "token"

    def __post_init__(self) -> None:
        if self.read not in ("token", "mean"):
            raise unknown_name("read", self.read, ("token", "mean"))
        whole("samples", self.samples, 1)
        whole("objects", self.objects, 2)
        whole("features", self.features, 1)

    @property
    def width(self) -> int:
        return self.features

    @property
    def outputs(self) -> int:
        return 2

    @property
    def length(self) -> int:
        return 4

    @property
    def read_from(self) -> str:
        return self.read

    @property
    def splits(self) -> tuple[str, ...]:
        return ("validation", "new objects")

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        which = "new" if split == "new objects" else "known"
        book = torch.randn(self.objects, self.features, generator=generator(self.name, "book", which))
        if split == "train":
            drawn, same = self._pairs(self.samples, generator(self.name, "samples", seed))
            chosen = torch.randint(self.samples, (size,), generator=generator(self.name, split, number, seed))
            drawn, same = drawn[chosen], same[chosen]
        else:
            drawn, same = self._pairs(size, generator(self.name, split, number, seed))
        return Batch(book[drawn].flatten(1, 2), (same[:, 0] == same[:, 1]).long())

    def _pairs(self, count: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Objects `(count, 2, 2)`, and which pairs are the same `(count, 2)`."""
        first = torch.randint(self.objects, (count, 2), generator=draw)
        other = (first + torch.randint(1, self.objects, (count, 2), generator=draw)) % self.objects
        same = torch.rand(count, 2, generator=draw) < 0.5
        return torch.stack([first, torch.where(same, first, other)], dim=-1), same

    def yardsticks(self) -> Mapping[str, float]:
        return {"a guess": 0.5}
