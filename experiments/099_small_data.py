"""Two hundred pictures to learn from: which regulariser of attention helps most on those that were not seen?

The small check of paper 099. Written digits as eight tokens, a row of eight pixels each; a model of two
layers and width 64 goes 60 times through 200 pictures, others for each seed, without moving them, and is
asked about 1,000 others. Nothing, attention dropout of 0.1, whole heads dropped (0.1), and tokens cut off
from others, from themselves, or both, 5 or 10 % of them. Accuracy, the gap to the training pictures, and
accuracy where one token of eight is taken away.

It shows if cutting tokens off (both, 5 %) is more accurate than dropping heads and than attention dropout, by
more than seeds differ.
"""

from __future__ import annotations

from typing import Any

import torch
from _pictures import Pictures
from _shared import main
from _training import train
from sklearn.datasets import load_digits
from torch import Tensor

from polyhead.league import Batch, Recipe, Sizes
from polyhead.league.seeds import generator
from polyhead.league.tasks.digits import DigitsTask
from polyhead.nn.regularizers import drop_head, token_masking

LEARNED, ASKED, BATCH = 200, 1000, 50
SIZES = Sizes(dim=64, heads=4, layers=2, mlp=128)
RECIPE = Recipe(steps=60 * LEARNED // BATCH, batch=BATCH, rate=2e-3, decay=0.05)
ARMS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "dropout": {"dropout": 0.1},
    "heads": {"regularizers": drop_head(0.1)},
}
for _mode in ("siblings", "self", "both"):
    for _rate in (0.05, 0.1):
        ARMS[f"tokens, {_mode} {_rate:.0%}"] = {"regularizers": token_masking(_rate, mode=_mode)}


class Rows(DigitsTask):
    """The digits as rows of pixels."""

    name = "rows"

    @property
    def width(self) -> int:
        return 8

    @property
    def length(self) -> int:
        return 8


def run(seed: int) -> dict[str, float]:
    """Train every arm on the same 200 pictures."""
    numbers: dict[str, float] = {}
    raw = load_digits()
    draw = generator("small data", seed)
    order = torch.randperm(len(raw.target), generator=draw)
    pictures = torch.tensor(raw.images, dtype=torch.float32)[order] / 8 - 1
    labels = torch.tensor(raw.target)[order]
    rows = torch.stack([torch.randperm(LEARNED, generator=draw) for _ in range(60)]).view(-1, BATCH)
    seen = Batch(pictures[:LEARNED], labels[:LEARNED])
    new = Batch(pictures[-ASKED:], labels[-ASKED:])
    less = torch.ones(ASKED, 8, dtype=torch.bool)
    less[torch.arange(ASKED), torch.randint(8, (ASKED,), generator=draw)] = False
    task = Rows()
    for arm, options in ARMS.items():
        torch.manual_seed(seed)
        model = Pictures(task, SIZES, "mha", options)

        def loss(number: int, model: Pictures = model) -> Tensor:
            chosen = rows[number]
            return model.loss(Batch(seen.inputs[chosen], seen.targets[chosen]))

        train(model, loss, RECIPE, seed)

        def accuracy(asked: Batch, model: Pictures = model) -> float:
            with torch.no_grad():
                return float((model(asked).argmax(-1) == asked.targets).float().mean())

        numbers[arm] = accuracy(new)
        numbers[f"{arm}: gap"] = accuracy(seen) - numbers[arm]
        numbers[f"{arm}: one token less"] = accuracy(Batch(new.inputs, new.targets, less))
    return numbers


if __name__ == "__main__":
    pairs = {f"{arm} less nothing": (arm, "nothing") for arm in list(ARMS)[1:]}
    for other in ("dropout", "heads"):
        pairs[f"tokens, both 5% less {other}"] = ("tokens, both 5%", other)
    for arm in list(ARMS)[1:]:
        pairs[f"{arm} less nothing, one token less"] = (f"{arm}: one token less", "nothing: one token less")
    main(__doc__, run, pairs, seeds=5)
