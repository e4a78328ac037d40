"""Differential attention: how much of what heads look at is the answer, and how much are distractors.

Two layers on needles, as the league trains them, with rotary positions: four plain heads; as many noise heads
as signal heads, which is the Differential Transformer; and one noise head for three signal heads. Four
symbols in a filler of 128 tokens say a key and a value each, and the values are asked for. At every question,
of the head that looks at answers most: the share of its weights, in absolute value, that lies on the needle
that is asked for, on the other needles, and on the filler.

It shows what the papers say if the share of the answer is larger with noise heads than without, and with one
for three larger than with one for one.
"""

from __future__ import annotations

import torch
from _leagues import accuracy, questions, trained
from _maps import maps_of
from _shared import main
from torch import Tensor

from polyhead.league import Batch
from polyhead.league.tasks.needle import NeedleTask

TASK = NeedleTask()
KINDS = {
    "plain": "mha",
    "4 + 4": "grouped_differential:heads=4,noise_heads=4,head_dim=8,position=rope()",
    "6 + 2": "grouped_differential:heads=6,noise_heads=2,head_dim=8,position=rope()",
}


def places(batch: Batch) -> tuple[Tensor, Tensor]:
    """Whether a place (B, n, L) holds the needle that a question asks for; and whether another one."""
    x, asking = batch.inputs, TASK.keys * TASK.values
    asked = x[:, -TASK.needles :] - asking
    needle = x < asking
    own = needle[:, None] & ((x // TASK.values)[:, None] == asked[..., None])
    return own, needle[:, None] & ~own


def run(seed: int) -> dict[str, float]:
    """Accuracy and shares of every kind."""
    found, batch = {}, questions(TASK)
    own, others = places(batch)
    for name, contender in KINDS.items():
        model = trained(TASK, contender, seed)
        maps = torch.cat(maps_of(model, lambda model=model: model(batch)), dim=1).abs()
        rows = maps[:, :, -TASK.needles :]
        rows = rows / rows.sum(-1, keepdim=True)
        right, wrong = ((rows * there[:, None]).sum(-1).mean((0, 2)) for there in (own, others))
        head = int(right.argmax())
        found |= {
            f"{name}: accuracy": accuracy(model),
            f"{name}: on the answer": float(right[head]),
            f"{name}: on other needles": float(wrong[head]),
            f"{name}: on the filler": float(1 - right[head] - wrong[head]),
        }
    return found


if __name__ == "__main__":
    measures = ("accuracy", "on the answer", "on other needles", "on the filler")
    kinds = [("4 + 4", "plain"), ("6 + 2", "plain"), ("6 + 2", "4 + 4")]
    main(__doc__, run, {f"{a} less {b}: {m}": (f"{a}: {m}", f"{b}: {m}") for a, b in kinds for m in measures})
