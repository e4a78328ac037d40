"""Adaptively sparse attention after training: the α of heads, how many weights are zero, how heads differ.

Two layers of four heads on recall, as the league trains them. α starts as 1 + σ(a), a standard normal. The
least, the greatest and the mean α of the eight heads afterwards; the share of weights among visible keys that
are exactly zero; and the Jensen-Shannon divergence between heads of a layer, of entmax and of softmax.

It shows what the paper says if heads keep different α (some nearer to softmax, some to sparsemax), most
weights are zero, and heads differ more from each other than those of softmax.
"""

from __future__ import annotations

import torch
from _leagues import accuracy, questions, trained
from _maps import divergence, maps_of
from _shared import main

from polyhead.league.tasks.recall import RecallTask
from polyhead.nn.learned_alpha import LearnedAlpha

TASK = RecallTask()


def run(seed: int) -> dict[str, float]:
    """The measures of a seed."""
    found = {}
    batch = questions(TASK)
    visible = torch.ones(batch.inputs.shape[1], batch.inputs.shape[1], dtype=torch.bool).tril()
    for name, contender in {"softmax": "mha", "entmax": "entmax_attention"}.items():
        model = trained(TASK, contender, seed)
        maps = maps_of(model, lambda model=model: model(batch))
        found[f"{name}: accuracy"] = accuracy(model)
        for layer, one in enumerate(maps, 1):
            found[f"{name}: divergence, layer {layer}"] = divergence(one)
        if name == "entmax":
            alphas = torch.cat([m.alpha.detach() for m in model.modules() if isinstance(m, LearnedAlpha)])
            found |= {
                "α: least": float(alphas.min()),
                "α: mean": float(alphas.mean()),
                "α: greatest": float(alphas.max()),
            }
            for layer, one in enumerate(maps, 1):
                found[f"zeros, layer {layer}"] = float((one[..., visible] == 0).double().mean())
    return found


if __name__ == "__main__":
    layers = (1, 2)
    pairs = {
        f"divergence, entmax - softmax, layer {n}": (
            f"entmax: divergence, layer {n}",
            f"softmax: divergence, layer {n}",
        )
        for n in layers
    }
    main(__doc__, run, pairs)
