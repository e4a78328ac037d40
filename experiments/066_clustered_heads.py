"""Heads that use one another's attention maps: does it matter which, and how many are needed?

The small check of paper 066. SmolLM2-135M, 30 layers of 9 heads that share keys by three; two stretches
of 512 tokens of held-out prose; 7, 5 and 3 clusters in every layer: by the maps of the first five tokens
of the sequence, by mean maps of 40 other stretches once for all, and at random; besides, the counts at
the bend of the error over the same 40 stretches. Nats of the tokens behind the first ten. A seed draws
the stretches and the random clusters.

It shows if clusters by maps lose less than random ones at equal numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from _shared import main
from torch import Tensor

import polyhead as ph
from polyhead.cache.duo import Sample
from polyhead.cache.influence import loss_of
from polyhead.heads import clustered, head_maps
from polyhead.tasks import held_out_text, sample_text

LENGTH, HEADS, LAYERS = 512, 9, 30

model, tokenizer = ph.hf.load("smollm2")


def stretches(text: str, length: int, count: int, draw: torch.Generator) -> Tensor:
    """Some stretches of a text, `(count, length)`."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    starts = torch.randint(len(ids) - length, (count,), generator=draw).tolist()
    return torch.stack([ids[s : s + length] for s in starts])


def at_random(count: int, draw: torch.Generator) -> list[Tensor]:
    """Clusters none of which is empty."""
    found = []
    for _ in range(LAYERS):
        labels = torch.cat([torch.arange(count), torch.randint(count, (HEADS - count,), generator=draw)])
        found.append(labels[torch.randperm(HEADS, generator=draw)])
    return found


@torch.no_grad()
def nats(sample: Sample, counts: Any, **how: Any) -> tuple[float, ph.heads.Saved]:
    """Loss of the sample where it counts, and what was saved."""
    with clustered(model, counts, **how) as sharing:
        lost = float(loss_of(model, *sample).mean())
    return lost, sharing.saved()


def run(seed: int) -> dict[str, float]:
    """Two stretches."""
    draw = torch.Generator().manual_seed(seed)
    ids = stretches(held_out_text(), LENGTH, 2, draw)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    counted[:, 10:-1] = True
    sample = Sample(ids, counted)
    maps = head_maps(model, text=stretches(sample_text(), 5, 40, draw))
    numbers = {"dense": nats(sample, HEADS)[0]}
    alike = np.stack(maps.similarity().values).mean(1)
    numbers |= {f"similarity, layer {n}": float(alike[n]) for n in (0, 5, 10, 15, 20, 25, 29)}
    for drop in (0.05, 0.01):
        counts = [HEADS if c is None else c for c in maps.counts(drop)]
        for what, part in (("", counts), (" of layers 0-9", counts[:10]), (" of layers 20-29", counts[20:])):
            numbers[f"bend at {drop:.0%}, clusters{what}"] = float(np.mean(part))
        numbers[f"bend at {drop:.0%}"], saved = nats(sample, counts)
        numbers[f"bend at {drop:.0%}, scores saved"] = saved.scores
        numbers[f"bend at {drop:.0%}, cache that could be saved"] = saved.cache
    for count in (7, 5, 3):
        numbers[f"{count} by sequence"], saved = nats(sample, count)
        numbers[f"{count} by sequence, cache that could be saved"] = saved.cache
        numbers[f"{count} once for all"], _ = nats(sample, count, labels=maps.labels(count))
        numbers[f"{count} at random"], _ = nats(sample, count, labels=at_random(count, draw))
    return numbers


if __name__ == "__main__":
    main(
        __doc__,
        run,
        {
            f"{count} by sequence less {arm}": (f"{count} by sequence", f"{count} {arm}")
            for count in (7, 5, 3)
            for arm in ("once for all", "at random")
        },
    )
