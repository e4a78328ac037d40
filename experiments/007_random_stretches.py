"""Complex rotation: started as rotary attention or with random stretches, and what heads learn of them.

Language models of two layers, 250 steps: rotary attention, complex rotation that starts as it, and one whose
stretches δ start at random. Bits per byte of held-out text; after training the mean of |δ|, its deviation
within the heads, and the deviation of the shifts b.

It shows what the paper says if complex rotation is better than rotary attention, and δ and b move away from
1 and 0.
"""

from __future__ import annotations

import torch
from _shared import learn, main, score

from polyhead.league import Recipe, Sizes, plan
from polyhead.league.tasks.text import TextTask
from polyhead.nn.phase_projection import PhaseProjection

SIZES = Sizes(dim=64, heads=4, layers=2, mlp=256)
RECIPE = Recipe(steps=250, batch=16, rate=3e-3, warmup=0.05, decay=0.1)
KINDS = {
    "rotary": "mha",
    "from rotary": "complex_rotation",
    "from random": 'complex_rotation:start="random"',
}


def run(seed: int) -> dict[str, float]:
    """Bits, and what became of stretches and shifts."""
    found = {}
    for kind, contender in KINDS.items():
        league = plan([contender], TextTask(tokens=64), sizes=SIZES, recipe=RECIPE)
        task = league.rules.task
        torch.manual_seed(seed)
        model = league.contenders[0].model(task)
        learn(model, task, RECIPE, seed, loss=model.loss)
        model.eval()
        found[f"{kind}: bits"] = score(model, task, 32, 8)
        turned = [m for m in model.modules() if isinstance(m, PhaseProjection)]
        if turned:
            stretch = torch.stack([m.stretch.detach() for m in turned])
            found |= {
                f"{kind}: mean |δ|": float(stretch.abs().mean()),
                f"{kind}: deviation of δ": float(stretch.std(-1).mean()),
                f"{kind}: deviation of b": float(torch.stack([m.shift.detach() for m in turned]).std()),
            }
    return found


if __name__ == "__main__":
    main(__doc__, run, {f"{k} - rotary": (f"{k}: bits", "rotary: bits") for k in list(KINDS)[1:]})
