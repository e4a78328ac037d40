"""HeadMask in training: how evenly heads matter, what one head is worth, and how many can be pruned.

A language model of 3 layers with 8 heads each is trained for 200 steps: as it is; with 3 of its 24 heads
masked at random in every step; with the 3 most important ones masked; and at random with the others scaled
up, as dropout of heads does. Then, on held-out text: bits per byte, the Gini coefficient of the importance of
heads, what the worst single head costs, and what it costs to prune the 6 or 12 least important heads.

It shows what the paper says if masking lowers the Gini coefficient and what pruning costs, and does not raise
the loss.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from _shared import learn, main, score
from torch import Tensor

from polyhead.league import Batch, Recipe, Sizes, plan
from polyhead.league.model import Model
from polyhead.league.tasks.text import TextTask
from polyhead.nn.head_mask import HeadMask, head_importance

SIZES = Sizes(dim=64, heads=8, layers=3, mlp=256)
RECIPE = Recipe(steps=200, batch=16, rate=2e-3, warmup=0.05, decay=0.1)
MASKED = 3
KINDS = ("none", "random", "important", "rescaled")


def gini(values: np.ndarray) -> float:
    """0 where all are equal, near 1 where one has everything."""
    ordered = np.sort(values)
    share = ordered.cumsum() / ordered.sum()
    return float(1 - 2 * share.mean() + 1 / len(ordered))


def trained(kind: str, seed: int) -> Model:
    """The model, trained with one kind of mask."""
    league = plan(["mha"], TextTask(tokens=64), sizes=SIZES, recipe=RECIPE)
    torch.manual_seed(seed)
    model = league.contenders[0].model(league.rules.task)
    heads = HeadMask(model, MASKED, rescale=kind == "rescaled")

    def draw(step: int, batch: Batch) -> nullcontext[None]:
        if kind == "important":
            heads.draw_important(lambda: model.loss(batch))
        elif kind != "none":
            heads.draw()
        return nullcontext()

    with heads:
        learn(model, model.task, RECIPE, seed, loss=model.loss, around=draw)
    return model


def measured(model: Model) -> dict[str, float]:
    """What the module's docstring lists."""
    task = model.task
    held_out = task.batch("validation", 0, 64, 0)
    model.eval()
    importance = head_importance(model, lambda: model.loss(held_out))
    least = np.argsort(importance.flat, kind="stable")
    model.train()  # masks act in training only, and nothing else here does

    def bits(*without: int, batches: int) -> float:
        with HeadMask(model, 0) as heads:
            heads.mask([importance.pairs[n] for n in without])

            def forward(batch: Batch) -> Tensor:
                return model(batch)

            return score(forward, task, 32, batches)

    whole, quick = bits(batches=8), bits(batches=2)
    return {
        "bits": whole,
        "gini": gini(importance.flat),
        "worst head": max(bits(n, batches=2) for n in range(len(least))) - quick,
        "6 pruned": bits(*least[:6], batches=8) - whole,
        "12 pruned": bits(*least[:12], batches=8) - whole,
    }


def run(seed: int) -> dict[str, float]:
    """The measures of every kind."""
    found = {}
    for kind in KINDS:
        found |= {f"{kind}: {name}": value for name, value in measured(trained(kind, seed)).items()}
    return found


if __name__ == "__main__":
    measures = ("bits", "gini", "worst head", "6 pruned", "12 pruned")
    pairs = {
        f"{kind} - none: {name}": (f"{kind}: {name}", f"none: {name}")
        for kind in KINDS[1:]
        for name in measures
    }
    main(__doc__, run, pairs)
