"""Written digits: real pictures of 8 × 8 pixels, cut into patches."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from polyhead.errors import MissingExtra, unknown_name
from polyhead.league.seeds import generator
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task

__all__ = ["DigitsTask"]

_TEST = 360  # of 1,797 pictures


class DigitsTask(Task):
    """Which digit is on a picture: 16 patches of 2 × 2 pixels, as a vision transformer reads them.

    The optical recognition data of handwritten digits (UCI; scikit-learn brings them): 1,437 pictures to
    learn from and 360 to be asked about, the same for all seeds. Training pictures are moved by up to one
    pixel.

    Attributes:
        read: what the label is read from: "token", a class token; "mean", the mean of the patches, for
            attention on a grid, which has no place for another token.
    """

    read: Literal["token", "mean"] = "token"

    name = "digits"
    summary = "real pictures of written digits, in patches"
    answer = "label"
    causal = False
    positions = "learned"
    sizes = Sizes(dim=64, heads=4, layers=2, mlp=128)
    recipe = Recipe(steps=1000, batch=64, rate=3e-3, decay=0.05)

    def __post_init__(self) -> None:
        if self.read not in ("token", "mean"):
            raise unknown_name("read", self.read, ("token", "mean"))

    @property
    def read_from(self) -> str:
        return self.read

    @property
    def width(self) -> int:
        return 4

    @property
    def outputs(self) -> int:
        return 10

    @property
    def length(self) -> int:
        return 16

    def batches(self, split: str, size: int) -> int:
        return -(-_TEST // size)

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        pictures, labels = _data()
        if split != "train":
            start = number * size
            return Batch(
                _patches(pictures[:_TEST][start : start + size]), labels[:_TEST][start : start + size]
            )
        draw = generator(self.name, split, number, seed)
        chosen = torch.randint(_TEST, len(labels), (size,), generator=draw)
        moves = torch.randint(3, (2, size), generator=draw)
        wide = torch.nn.functional.pad(pictures[chosen], (1, 1, 1, 1))
        rows, columns = (m[:, None] + torch.arange(8) for m in moves)
        moved = wide[torch.arange(size)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return Batch(_patches(moved), labels[chosen])

    def yardsticks(self) -> Mapping[str, float]:
        labels = _data()[1][:_TEST]
        return {"the most frequent digit": float(labels.bincount().max() / len(labels))}


def _patches(pictures: Tensor) -> Tensor:
    """`(B, 8, 8)` as `(B, 16, 4)`."""
    return pictures.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2)


@cache
def _data() -> tuple[Tensor, Tensor]:
    """Pictures `(1797, 8, 8)` in [-1, 1] and labels, in an order drawn once for all."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra("scikit-learn", "compare", "the task digits") from None
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=generator("digits", "order"))
    pictures = torch.tensor(raw.images, dtype=torch.float32) / 8 - 1
    return pictures[order], torch.tensor(raw.target, dtype=torch.int64)[order]
