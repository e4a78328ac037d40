"""Affine-scaled attention under a learning rate that is too high: gradients, first tokens, entropy.

Language models of two layers with 4 heads, 250 steps, at learning rates of 3e-3, 3e-2 and 0.3: softmax;
softmax with a learned sink; weights that are scaled alone; and the whole of it, scaled and shifted. Bits per
byte of held-out text; the largest norm of a gradient after the warm-up, before clipping; the mean share of
absolute weights on the first token, and the mean entropy of weights in nats over the rows from the 33rd on.

It shows what the paper says if the whole of it rises least from its best rate to the highest, with smaller
gradients and less mass on the first token than softmax.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from _maps import maps_of
from _shared import learn, main, score

from polyhead.league import Recipe, Sizes, plan
from polyhead.league.tasks.text import TextTask

SIZES = Sizes(dim=64, heads=4, layers=2, mlp=256)
RECIPE = Recipe(steps=250, batch=16, warmup=0.05, decay=0.1)
RATES = (3e-3, 3e-2, 0.3)  # 3e-2 turned out to be better than 3e-3 for all
KINDS = {
    "softmax": "mha",
    "sink": "mha:normalizer=softmax(sink=0.0)",
    "scaled": "affine_scaled:shift=False",
    "affine": "affine_scaled",
}


def trained(contender: str, rate: float, seed: int) -> dict[str, float]:
    """One model."""
    recipe = replace(RECIPE, rate=rate)
    league = plan([contender], TextTask(tokens=64), sizes=SIZES, recipe=recipe)
    task = league.rules.task
    torch.manual_seed(seed)
    model = league.contenders[0].model(task)
    norms = learn(model, task, recipe, seed, loss=model.loss)
    model.eval()
    batch = task.batch("validation", 0, 16, 0)
    rows = torch.stack(maps_of(model, lambda: model(batch)))[..., 32:, :].abs()
    # a sink or a scale may take a row's whole mass; such rows count as zeros
    rows = rows / rows.sum(-1, keepdim=True).clamp(min=1e-30)
    return {
        "bits": score(model, task, 32, 8),
        "largest gradient": max(norms[round(recipe.steps * recipe.warmup) :]),
        "on the first token": float(rows[..., 0].mean()),
        "entropy": float(-(rows * rows.clamp(min=1e-12).log()).sum(-1).mean()),
    }


def run(seed: int) -> dict[str, float]:
    """Every kind at every rate, and how much the loss rises."""
    found = {}
    for kind, contender in KINDS.items():
        for rate in RATES:
            found |= {f"{kind} at {rate:g}: {k}": v for k, v in trained(contender, rate, seed).items()}
        *lower, highest = (found[f"{kind} at {rate:g}: bits"] for rate in RATES)
        found[f"{kind}: rise"] = highest - min(lower)
    return found


if __name__ == "__main__":
    columns = (
        *(
            f" at {r:g}: {m}"
            for r in RATES
            for m in ("bits", "largest gradient", "on the first token", "entropy")
        ),
        ": rise",
    )
    main(
        __doc__, run, {f"{k} - softmax{c}": (k + c, "softmax" + c) for k in list(KINDS)[1:] for c in columns}
    )
