"""Differential attention that grows while it is trained: copies of signal heads, against heads drawn anew.

A language model of two layers with three signal heads and a noise head is trained for 250 steps. Then every
signal head stands there twice, and it is trained for 150 steps more: as copies, which change nothing at
first (`grown`); as copies whose queries are disturbed by a tenth of their deviation; with new heads whose
queries and outputs are drawn as at the start; and without growth. Bits per byte of held-out text before and
after; and how far the copies have moved from their heads: the distance of their queries' weights over the
length of these.

It shows what the paper says if copies end better than heads drawn anew, and than no growth.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from _shared import learn, main, score

from polyhead.league import Recipe, Sizes, plan
from polyhead.league.model import Model
from polyhead.league.tasks.text import TextTask
from polyhead.mechanisms.grouped_differential import grown
from polyhead.nn.differential import DifferentialAttention

SIZES = Sizes(dim=64, heads=4, layers=2, mlp=256)
SPEC = "grouped_differential:heads=3,noise_heads=1,head_dim=16"
FIRST = Recipe(steps=250, batch=16, rate=3e-3, warmup=0.05, decay=0.1)
GROWN = replace(FIRST, steps=150, rate=1e-3)
ARMS = ("as it is", "copies", "disturbed", "new heads")


def queries(attention: DifferentialAttention) -> torch.Tensor:
    """The query weights of the signal heads, `(H, D, d)`; a view."""
    weight = attention.projection.query.weight
    return weight.unflatten(0, (-1, attention.head_dim))[: attention.heads]


@torch.no_grad()
def changed(attention: DifferentialAttention, arm: str) -> DifferentialAttention:
    """The module as an arm begins with it."""
    if arm == "as it is":
        return attention
    found = grown(attention, 2)
    new = queries(found)[1::2]
    if arm == "disturbed":
        new.add_(torch.randn_like(new) * 0.1 * new.std())
    elif arm == "new heads":
        fresh = copy.deepcopy(found)
        fresh.projection.query.reset_parameters()
        fresh.output.reset_parameters()
        new.copy_(queries(fresh)[1::2])
        columns = found.output.weight.unflatten(1, (found.heads, -1))
        columns[:, ::2] *= 2  # the old heads alone give what they gave
        columns[:, 1::2] = fresh.output.weight.unflatten(1, (found.heads, -1))[:, 1::2]
    return found


@torch.no_grad()
def moved(model: Model) -> float:
    """How far the second of every two heads is from the first, over the length of the first."""
    parts = []
    for layer in model.stack.layers:
        own = queries(layer.attention)
        parts.append(float((own[1::2] - own[::2]).norm() / own[::2].norm()))
    return sum(parts) / len(parts)


def run(seed: int) -> dict[str, float]:
    """One model, grown in every way."""
    league = plan([SPEC], TextTask(tokens=64), sizes=SIZES, recipe=FIRST, budget="params")
    task = league.rules.task
    torch.manual_seed(seed)
    model = league.contenders[0].model(task)
    learn(model, task, FIRST, seed, loss=model.loss)
    numbers = {}
    for arm in ARMS:
        torch.manual_seed(seed)
        found = copy.deepcopy(model)
        for layer in found.stack.layers:
            layer.attention = changed(layer.attention, arm)
        found.eval()
        numbers[f"{arm}: before"] = score(found, task, 32, 8)
        learn(found, task, GROWN, seed + 1000, loss=found.loss)
        found.eval()
        numbers[f"{arm}: after"] = score(found, task, 32, 8)
        if arm != "as it is":
            numbers[f"{arm}: apart"] = moved(found)
    return numbers


if __name__ == "__main__":
    ends = [
        ("copies", "as it is"),
        ("copies", "new heads"),
        ("disturbed", "copies"),
        ("new heads", "as it is"),
    ]
    main(__doc__, run, {f"{a} less {b}: after": (f"{a}: after", f"{b}: after") for a, b in ends})
