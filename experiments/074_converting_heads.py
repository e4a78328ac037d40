"""A trained language model gets fewer heads of keys and values: which conversion keeps and regains most?

The small checks of papers 074, 076 and 120 that begin from a checkpoint. A model of two layers with eight
heads learns the text of the league for 600 steps. Then its keys and values are shared: in groups of heads in
a row, by their means, by the first head, or drawn anew (074); by means with learned weights, a number for
each head or a vector, that begin as means or at random (120); or by groups of like heads, different ones for
keys and for values (076: clusters by the cosines of their weights, with means; the gradual fusion of the
paper is not built). All are trained on for 60 steps, a tenth, at half of the highest rate. Bits per byte of
held-out text, before, after 30 steps and after 60.

It shows if means begin and end below first and random heads, weights below means, and like heads below heads
in a row with the same cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from _shared import main
from _training import train
from torch import Tensor

from polyhead.league import Recipe, Sizes
from polyhead.league.model import Model, layer_of
from polyhead.league.tasks.text import TextTask
from polyhead.league.training import evaluate
from polyhead.mechanisms.decoupled_head import decoupled
from polyhead.mechanisms.weighted_grouped_query import merged, weighted
from polyhead.nn.attention import MultiHeadAttention

HEADS = 8
SIZES = Sizes(dim=128, heads=HEADS, layers=2, mlp=256)
FIRST = Recipe(steps=600, batch=8, rate=2e-3, warmup=0.05, decay=0.1)
# half of the highest rate; two rounds, so that there is a look between them
HEALING = Recipe(steps=30, batch=8, rate=1e-3, warmup=0.0, decay=0.1)
BATCHES = 6


def grouped(attention: MultiHeadAttention, kv_heads: int, how: str) -> MultiHeadAttention:
    """Grouped-query attention of means, of the first heads of groups, or of heads drawn anew."""
    found = merged(weighted(attention, kv_heads))
    with torch.no_grad():
        for name in ("key", "value"):
            new, old = getattr(found.projection, name).weight, getattr(attention.projection, name).weight
            if how == "first":
                new.copy_(old.unflatten(0, (kv_heads, HEADS // kv_heads, -1))[:, 0].flatten(0, 1))
            elif how == "random":
                new.normal_(std=float(old.std()))
    return found


def clusters(weight: Tensor, count: int) -> tuple[int, ...]:
    """Groups of heads: the two with the largest mean cosine become one, until there are `count`."""
    rows = torch.nn.functional.normalize(weight.detach().unflatten(0, (HEADS, -1)).flatten(1), dim=-1)
    like = rows @ rows.T
    groups = [[h] for h in range(HEADS)]
    while len(groups) > count:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        i, j = max(pairs, key=lambda pair: float(like[groups[pair[0]]][:, groups[pair[1]]].mean()))
        groups[j] += groups.pop(i)
    return tuple(next(n for n, group in enumerate(groups) if h in group) for h in range(HEADS))


def alike(attention: MultiHeadAttention, keys: int, values: int) -> MultiHeadAttention:
    """Decoupled heads with means of like heads."""
    made = attention.projection
    return decoupled(attention, clusters(made.key.weight, keys), clusters(made.value.weight, values))


ARMS: dict[str, Callable[[MultiHeadAttention], MultiHeadAttention]] = {"all 8 heads": copy.deepcopy}
for _g in (4, 2, 1):
    for _how in ("mean", "first", "random"):
        ARMS[f"{_how} of {_g}"] = partial(grouped, kv_heads=_g, how=_how)
ARMS |= {
    "weighted 2, by head": partial(weighted, kv_heads=2),
    "weighted 2, by output": partial(weighted, kv_heads=2, granularity="output"),
    "weighted 2, by input": partial(weighted, kv_heads=2, granularity="input"),
    "weighted 2, random start": partial(weighted, kv_heads=2, start="random"),
    "like heads, 2 keys 2 values": partial(alike, keys=2, values=2),
    "like heads, 1 key 3 values": partial(alike, keys=1, values=3),
}


def run(seed: int) -> dict[str, float]:
    """Train one model, convert it in every way, and go on."""
    task = TextTask(tokens=64, tokenizer=512)
    model = Model(task, SIZES, [layer_of(task, "mha", {}, SIZES.dim, HEADS)])

    def bits(found: Model) -> float:
        return evaluate(found, "validation", 64, BATCHES)

    def learn(found: Model, recipe: Recipe, start: int) -> None:
        def loss(number: int) -> Tensor:
            return found.loss(task.batch("train", start + number, recipe.batch, seed))

        train(found, loss, recipe, seed, start)

    learn(model, FIRST, 0)
    numbers = {"the model, bits": bits(model)}
    for name, convert in ARMS.items():
        torch.manual_seed(seed)
        found = copy.deepcopy(model)
        for layer in found.stack.layers:
            layer.attention = convert(layer.attention)
        numbers[f"{name}, before"] = bits(found)
        for steps in (30, 60):
            learn(found, HEALING, FIRST.steps + steps)
            numbers[f"{name}, after {steps}"] = bits(found)
    return numbers


if __name__ == "__main__":
    pairs = {}
    for arm in ARMS:
        other = "all 8 heads" if arm.startswith("mean") else f"mean of {arm[-1] if ' of ' in arm else 2}"
        for when in ("before", "after 30", "after 60"):
            if arm != "all 8 heads":
                pairs[f"{arm} less {other}, {when}"] = (f"{arm}, {when}", f"{other}, {when}")
    main(__doc__, run, pairs)
