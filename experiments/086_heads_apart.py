"""Gaussian mixture keys after training: how far apart the maps of heads are, against plain heads.

Two layers on recall, as the league trains them: four plain heads, four heads with mixtures of two keys, and
two heads with mixtures. The mean Euclidean distance between rows of the maps of two heads of a layer.

It shows what the paper says if the maps of heads with mixtures lie further apart than those of plain heads.
"""

from __future__ import annotations

from _leagues import accuracy, questions, trained
from _maps import distance, maps_of
from _shared import main

from polyhead.league.tasks.recall import RecallTask

TASK = RecallTask()
KINDS = {
    "plain": "mha",
    "mixtures": "gaussian_mixture_keys",
    "2 mixtures": "gaussian_mixture_keys:heads=2,head_dim=16",
}


def run(seed: int) -> dict[str, float]:
    """Accuracy and distances of every kind."""
    found, batch = {}, questions(TASK)
    for name, contender in KINDS.items():
        model = trained(TASK, contender, seed)
        found[f"{name}: accuracy"] = accuracy(model)
        for layer, one in enumerate(maps_of(model, lambda model=model: model(batch)), 1):
            found[f"{name}: distance, layer {layer}"] = distance(one)
    return found


if __name__ == "__main__":
    measures = ("accuracy", "distance, layer 1", "distance, layer 2")
    main(
        __doc__,
        run,
        {f"{k} - plain: {m}": (f"{k}: {m}", f"plain: {m}") for k in list(KINDS)[1:] for m in measures},
    )
