"""Windows of three tokens, dilated in turns or not: what do they reach, and what does it cost on pictures?

The small checks of papers 153 and 163, in two parts.

Marks: on a line of 27 tokens two are marked, at least 9 apart, each with one of two signs; are the signs the
same? The answer is read from the mean of all tokens, to which each adds by itself: one token has to see both.
Three layers with windows of 3 and dilations 1, 3, 9 reach 27 tokens, three with dilation 1 reach 7.

Digits: the pictures of the league as 8 × 8 pixels, a token each, two layers: windows of 3 × 3 and 5 × 5, of
3 × 3 with dilation 2 in the second layer, and everything.

It shows what the papers say if dilations in turn solve the marks and windows alone do not, and if dilated
windows of 3 × 3 recognise digits no worse than those without.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from _pictures import Pictures
from _shared import main
from _training import train
from torch import Tensor

from polyhead.league import Batch, Recipe, Sizes
from polyhead.league.seeds import generator
from polyhead.league.tasks.digits import DigitsTask

LENGTH, APART = 27, 9
MARKS = Sizes(dim=32, heads=4, layers=3, mlp=64)
MARKS_RECIPE = Recipe(steps=400, batch=64, rate=3e-3, decay=0.05)
DIGITS = Sizes(dim=32, heads=4, layers=2, mlp=64)
DIGITS_RECIPE = Recipe(steps=200, batch=64, rate=3e-3, decay=0.05)
NAME = "neighborhood_attention"
Layers = tuple[str, list[dict[str, Any]]]


class Marks(DigitsTask):
    """Two marks on a line: are their signs the same?"""

    name = "marks"

    @property
    def width(self) -> int:
        return 1

    @property
    def outputs(self) -> int:
        return 2

    @property
    def length(self) -> int:
        return LENGTH

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        draw = generator(self.name, split, number, seed)
        first = torch.randint(LENGTH - APART, (size,), generator=draw)
        room = LENGTH - APART - first
        second = first + APART + (torch.rand(size, generator=draw) * room).long()
        signs = torch.randint(2, (size, 2), generator=draw)
        line = torch.zeros(size, LENGTH)
        line.scatter_(1, torch.stack([first, second], 1), signs * 2.0 - 1.0)
        return Batch(line[..., None], (signs[:, 0] == signs[:, 1]).long())


class Pixels(DigitsTask):
    """The digits, pixel by pixel."""

    @property
    def width(self) -> int:
        return 1

    @property
    def length(self) -> int:
        return 64

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        found = super().batch(split, number, size, seed)
        patches = found.inputs.unflatten(1, (4, 4)).unflatten(3, (2, 2))
        return replace(found, inputs=patches.transpose(2, 3).flatten(1)[..., None])


def line(*dilations: int) -> Layers:
    return NAME, [{"grid": (LENGTH,), "window": 3, "dilation": d} for d in dilations]


def picture(window: int, *dilations: int) -> Layers:
    return NAME, [{"grid": (8, 8), "window": window, "dilation": d} for d in dilations]


ARMS: dict[str, tuple[DigitsTask, Sizes, Recipe, Layers]] = {
    "marks, dilations 1 1 1": (Marks(), MARKS, MARKS_RECIPE, line(1, 1, 1)),
    "marks, dilations 1 3 9": (Marks(), MARKS, MARKS_RECIPE, line(1, 3, 9)),
    "marks, everything": (Marks(), MARKS, MARKS_RECIPE, ("mha", [{}] * 3)),
    "digits, 3 x 3": (Pixels(), DIGITS, DIGITS_RECIPE, picture(3, 1, 1)),
    "digits, 3 x 3 in turns": (Pixels(), DIGITS, DIGITS_RECIPE, picture(3, 1, 2)),
    "digits, 5 x 5": (Pixels(), DIGITS, DIGITS_RECIPE, picture(5, 1, 1)),
    "digits, everything": (Pixels(), DIGITS, DIGITS_RECIPE, ("mha", [{}] * 2)),
}


def run(seed: int) -> dict[str, float]:
    """The share of right answers of every arm."""
    numbers = {}
    for arm, (task, sizes, recipe, (name, layers)) in ARMS.items():
        torch.manual_seed(seed)
        model = Pictures(task, sizes, name, layers)

        def loss(number: int, model: Pictures = model, task: DigitsTask = task, r: Recipe = recipe) -> Tensor:
            return model.loss(task.batch("train", number, r.batch, seed))

        train(model, loss, recipe, seed)
        held_out = task.batch("validation", 0, 360, 0)
        with torch.no_grad():
            right = model(held_out).argmax(-1) == held_out.targets
        numbers[arm] = float(right.float().mean())
    return numbers


if __name__ == "__main__":
    main(
        __doc__,
        run,
        {
            "marks, in turns less alone": ("marks, dilations 1 3 9", "marks, dilations 1 1 1"),
            "digits, in turns less alone": ("digits, 3 x 3 in turns", "digits, 3 x 3"),
            "digits, in turns less everything": ("digits, 3 x 3 in turns", "digits, everything"),
            "digits, 5 x 5 less 3 x 3": ("digits, 5 x 5", "digits, 3 x 3"),
        },
    )
