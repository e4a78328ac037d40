"""Weighted groups of heads whose weights alone are trained, against means of heads.

A language model of two layers with eight heads learns the text of the league for 600 steps. Then its keys
and values are shared by 4, 2 or 1 heads: means of heads, and sums whose weights, a number or a vector of
each, learn for 60 steps at a rate of 3e-2 while everything else stays as it is. Bits per byte of held-out
text.

It shows what the paper says if weights alone make the loss smaller than means leave it.
"""

from __future__ import annotations

import copy

import torch
from _shared import main
from _training import train
from torch import Tensor

from polyhead.league import Recipe, Sizes
from polyhead.league.model import Model, layer_of
from polyhead.league.tasks.text import TextTask
from polyhead.league.training import evaluate
from polyhead.mechanisms.weighted_grouped_query import weighted

SIZES = Sizes(dim=128, heads=8, layers=2, mlp=256)
FIRST = Recipe(steps=600, batch=8, rate=2e-3, warmup=0.05, decay=0.1)
WEIGHTS = Recipe(steps=60, batch=8, rate=3e-2, warmup=0.1, decay=0.0)
GROUPS, KINDS = (4, 2, 1), ("head", "output")


def run(seed: int) -> dict[str, float]:
    """Train one model, share its heads, and train the weights."""
    task = TextTask(tokens=64, tokenizer=512)
    torch.manual_seed(seed)
    model = Model(task, SIZES, [layer_of(task, "mha", {}, SIZES.dim, SIZES.heads)])

    def bits(found: Model) -> float:
        return evaluate(found, "validation", 64, 6)

    def learn(found: Model, recipe: Recipe, start: int) -> None:
        def loss(number: int) -> Tensor:
            return found.loss(task.batch("train", start + number, recipe.batch, seed))

        train(found, loss, recipe, seed, start)

    learn(model, FIRST, 0)
    numbers = {"all heads": bits(model)}
    for count in GROUPS:
        for kind in KINDS:
            found = copy.deepcopy(model)
            for layer in found.stack.layers:
                layer.attention = weighted(layer.attention, count, granularity=kind)
            numbers[f"{count}: means"] = bits(found)  # which all weights begin as
            for name, parameter in found.named_parameters():
                parameter.requires_grad_(name.endswith(("key_weights", "value_weights")))
            learn(found, WEIGHTS, FIRST.steps)
            numbers[f"{count}: weights by {kind}"] = bits(found)
    return numbers


if __name__ == "__main__":
    pairs = {
        f"{count}: weights by {kind}, less means": (f"{count}: weights by {kind}", f"{count}: means")
        for count in GROUPS
        for kind in KINDS
    }
    main(__doc__, run, pairs)
