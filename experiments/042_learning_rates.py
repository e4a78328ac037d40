"""Explicit multi-head attention at three learning rates, and which part of it helps.

Language models of two layers with 8 heads, 250 steps, as many parameters each: plain heads; plain heads whose
outputs are normalised; heads that combine stored heads, without the norm; and both. Bits per byte of held-out
text at learning rates of 1e-3, 3e-3 and 1e-2; "rise" is the loss at the highest rate less the best of the
three.

It shows what the paper says if the whole is better than plain heads at every rate, and rises less.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from _shared import learn, main, score

from polyhead.league import Recipe, Sizes, plan
from polyhead.league.tasks.text import TextTask

SIZES = Sizes(dim=64, heads=8, layers=2, mlp=256)
RECIPE = Recipe(steps=250, batch=8, warmup=0.05, decay=0.1)
RATES = (1e-3, 3e-3, 1e-2)
SPECS = {
    "plain": "mha",
    "norm": "explicit_multihead",  # its combinations stay at the identity
    "combined": "explicit_multihead:norm_at=None",
    "both": "explicit_multihead",
}


def trained(kind: str, rate: float, seed: int) -> float:
    """Bits per byte of one model."""
    recipe = replace(RECIPE, rate=rate)
    league = plan([SPECS[kind]], TextTask(tokens=64), sizes=SIZES, recipe=recipe)
    task = league.rules.task
    torch.manual_seed(seed)
    model = league.contenders[0].model(task)
    if kind == "norm":
        for name, parameter in model.named_parameters():
            if name.endswith(("key_mix", "value_mix")):
                parameter.requires_grad_(False)
    learn(model, task, recipe, seed, loss=model.loss)
    model.eval()
    return score(model, task, 32, 8)


def run(seed: int) -> dict[str, float]:
    """Bits of every kind at every rate, and how much they rise at the highest."""
    found = {}
    for kind in SPECS:
        bits = [trained(kind, rate, seed) for rate in RATES]
        found |= {f"{kind} at {rate:g}": one for rate, one in zip(RATES, bits, strict=True)}
        found |= {f"{kind}: best": min(bits), f"{kind}: rise": bits[-1] - min(bits)}
    return found


if __name__ == "__main__":
    columns = (*(f" at {rate:g}" for rate in RATES), ": best", ": rise")
    main(
        __doc__,
        run,
        {
            f"{kind} - plain{c}": (kind + c, "plain" + c)
            for kind in ("norm", "combined", "both")
            for c in columns
        },
    )
