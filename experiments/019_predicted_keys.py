"""Which keys a predictor names: sparsifiner in two stages, against fixed masks and the best there is.

The small check of paper 019. A vision transformer of two layers learns the digits of the league pixel by
pixel, 64 tokens, with dense attention. Stage one: the predictor of every layer learns the layer's own
attention, while nothing else changes. Stage two: every query reads 16 of 64 keys, and all parameters learn
from labels, from the dense model's answers (KL, 0.5) and from its last tokens (squared distance, 0.5). Beside
the predicted keys: the 16 nearest pixels; 16 drawn by lot for every layer, head and query; the 16 that are
most attended to on average over pictures; and the 16 with the largest scores, which only dense attention
knows. And dense attention that learns on. Accuracies before stage two and after it; which share of the 16
best keys of the dense model, and of its attention, each reads; and what the keys of two pictures have in
common (intersection over union).

It shows if predicted keys are among the best more often than nearest, average and random ones, and end within
0.01 of dense attention's accuracy.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from _pictures import Pictures
from _shared import main
from _training import train
from torch import Tensor

import polyhead as ph
from polyhead.attend.selectors import Grid
from polyhead.league import Batch, Recipe, Sizes
from polyhead.league.seeds import generator
from polyhead.league.tasks.digits import DigitsTask

SIZES = Sizes(dim=64, heads=4, layers=2, mlp=128)
DENSE = Recipe(steps=400, batch=64, rate=3e-3, decay=0.05)
FIRST = Recipe(steps=200, batch=64, rate=5e-3, decay=0.0)
SECOND = Recipe(steps=150, batch=64, rate=1e-3, decay=0.05)
PIXELS, KEPT = 64, 16
OWN = {"length": PIXELS, "class_token": False}
PREDICTOR = ("reduce_query", "reduce_key", "tokens_in", "tokens_out")
FIXED = ("nearest", "average", "random")


class PixelDigits(DigitsTask):
    """Digits, a pixel a token."""

    @property
    def width(self) -> int:
        return 1

    @property
    def length(self) -> int:
        return PIXELS

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        found = super().batch(split, number, size, seed)
        wide = found.inputs.unflatten(1, (4, 4)).unflatten(3, (2, 2)).transpose(2, 3)
        return dataclasses.replace(found, inputs=wide.reshape(len(wide), PIXELS, 1))


TASK = PixelDigits()


def pictures(name: str, options: dict[str, Any] | list[dict[str, Any]], state: dict[str, Tensor]) -> Pictures:
    """A model that goes on from what another has learned."""
    model = Pictures(TASK, SIZES, name, options)
    model.load_state_dict(state, strict=False)
    return model


def tokens(model: Pictures, batch: Batch) -> Tensor:
    """What the last layer gives."""
    return model.stack(model.embed(batch.inputs) + model.places)


@torch.no_grad()
def accuracy(model: Pictures) -> float:
    """Of the held-out pictures."""
    batch = TASK.batch("validation", 0, 360, 0)
    return float((model.eval()(batch).argmax(-1) == batch.targets).float().mean())


@torch.no_grad()
def scores(model: Pictures, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Attention (B, H, L, L) of every layer, and what the predictors say of it, if there are any."""
    weights, guesses = [], []
    x = model.embed(batch.inputs) + model.places
    for layer in model.stack.layers:
        attention = layer.attention
        z = layer.norm(x)
        q, k = attention._queries(z, 0), attention._rows(z, 0)[0]
        weights.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
        if hasattr(attention, "predictor"):
            grid = Grid(len(z), q.shape[1], k.shape[1], PIXELS, PIXELS, 1, 1, 1.0)
            guesses.append(attention.predictor.prepare(q, k, grid)(0, PIXELS))
        x = layer(x, None)
    return weights, guesses


def best(numbers: Tensor) -> Tensor:
    """The 16 largest of the last axis, bool."""
    return torch.zeros_like(numbers, dtype=torch.bool).scatter_(-1, numbers.topk(KEPT, -1).indices, True)


def fixed_keys(dense: Pictures, seed: int) -> dict[str, list[Tensor]]:
    """Of every layer, which keys the fixed masks let be read, bool (H or 1, L, L)."""
    places = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    near = best(-torch.cdist(places, places))[None]
    draw = generator("keys by lot", seed)
    lots = [best(torch.rand(SIZES.heads, PIXELS, PIXELS, generator=draw)) for _ in range(SIZES.layers)]
    weights, _ = scores(dense, TASK.batch("train", 0, 256, seed))
    return {
        "nearest": [near] * SIZES.layers,
        "average": [best(w.mean(0)) for w in weights],
        "random": lots,
    }


def mask_of(keys: Tensor) -> ph.Mask:
    """A mask of the algebra from a table (H or 1, L, L)."""
    return ph.chosen(keys.nonzero()[:, 2].view(1, len(keys), PIXELS, KEPT), rows=1, cols=1)


def second(model: Pictures, dense: Pictures, seed: int) -> None:
    """Stage two."""

    def loss(number: int) -> Tensor:
        batch = TASK.batch("train", number, SECOND.batch, seed + 1000)
        with torch.no_grad():
            goal = tokens(dense, batch)
            said = dense.read(goal.mean(1)).log_softmax(-1)
        x = tokens(model, batch)
        answers = model.read(x.mean(1))
        taught = F.kl_div(answers.log_softmax(-1), said, reduction="batchmean", log_target=True)
        beside = sum(ph.auxiliary_losses(model).values(), torch.zeros(()))
        return TASK.loss(answers, batch) + 0.5 * taught + 0.5 * F.mse_loss(x, goal) + beside

    train(model, loss, SECOND, seed)


def union(keys: Tensor) -> float:
    """Intersection over union of the keys of neighbouring pictures, bool (B, H, L, L)."""
    one, other = keys[1:], keys[:-1]
    return float(((one & other).sum(-1) / (one | other).sum(-1)).mean())


def run(seed: int) -> dict[str, float]:
    """Learn dense, then sparse in each way."""
    torch.manual_seed(seed)
    dense = Pictures(TASK, SIZES, "mha", {})
    train(dense, lambda n: dense.loss(TASK.batch("train", n, DENSE.batch, seed)), DENSE, seed)
    state = dense.state_dict()
    numbers = {"dense: accuracy": accuracy(dense)}

    first = pictures("sparsifiner", OWN, state)
    for name, p in first.named_parameters():
        p.requires_grad_(any(own in name for own in PREDICTOR))

    def own_loss(number: int) -> Tensor:
        first(TASK.batch("train", number, FIRST.batch, seed + 500))
        return torch.stack(list(ph.auxiliary_losses(first).values())).sum()

    train(first, own_loss, FIRST, seed)
    fixed = fixed_keys(dense, seed)
    held_out = TASK.batch("validation", 0, 360, 0)
    weights, guesses = scores(first.eval(), held_out)
    keys = {name: [k.expand_as(w) for k, w in zip(fixed[name], weights, strict=True)] for name in FIXED}
    keys |= {"predicted": [best(g) for g in guesses], "best": [best(w) for w in weights]}
    for name, tables in keys.items():
        pairs = list(zip(tables, weights, keys["best"], strict=True))
        numbers[f"{name}: of the attention"] = sum(float((w * t).sum(-1).mean()) for t, w, _ in pairs) / 2
        if name != "best":
            numbers[f"{name}: of the best 16"] = sum(float((t & b).sum() / b.sum()) for t, _, b in pairs) / 2
    for name in ("predicted", "best"):
        numbers[f"{name}: in common between pictures"] = sum(map(union, keys[name])) / SIZES.layers

    arms: dict[str, tuple[str, Any, dict[str, Tensor]]] = {
        "predicted": ("sparsifiner", OWN | {"keep": KEPT / PIXELS}, first.state_dict()),
        "best": ("mha", {"select": ph.select(ph.mean_keys(), ph.keep_blocks(KEPT), rows=1, cols=1)}, state),
        "dense, on": ("mha", {}, state),
    }
    arms |= {name: ("mha", [{"mask": mask_of(k)} for k in fixed[name]], state) for name in FIXED}
    for name, (mechanism, options, learned) in arms.items():
        model = pictures(mechanism, options, learned)
        numbers[f"{name}: accuracy before"] = accuracy(model)
        second(model, dense, seed)
        numbers[f"{name}: accuracy after"] = accuracy(model)
    return numbers


if __name__ == "__main__":
    others = ("nearest", "average", "random")
    main(
        __doc__,
        run,
        {
            f"predicted less {name}, {what}": (f"predicted: {what}", f"{name}: {what}")
            for what in ("of the best 16", "of the attention", "accuracy before", "accuracy after")
            for name in others
        }
        | {
            f"{name} less dense, after": (f"{name}: accuracy after", "dense, on: accuracy after")
            for name in ("predicted", "best", *others)
        },
    )
