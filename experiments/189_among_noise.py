"""Pairs among noise: does a trained dynamic mask keep what will be asked for?

The small check of paper 189, at half of its length. Six pairs of key and value stand among 40 tokens of
noise, then every key is asked for: with all keys to read, with the nearest 16, and with the 16 most important
(`dynamic_mask_attention`). Two layers of four heads, 500 steps.

Accuracy of the answers; and how importances of the tokens of pairs and of noise differ: the share of (pair
token, noise token) of a sequence and head in which the pair token is more important, 0.5 by chance, the mean
over heads and the best head.

It shows if the dynamic mask answers as well as all keys and better than the nearest, and if importances
separate pairs from noise.
"""

from __future__ import annotations

import torch
from _among_noise import ASKED, RECIPE, Reader, accuracy, loss_of, questions
from _shared import main
from _training import train
from torch import Tensor

import polyhead as ph

ARMS: dict[str, tuple[str, dict[str, object]]] = {
    "all keys": ("mha", {}),
    "nearest 16": ("mha", {"mask": ph.window(15)}),
    "dynamic mask 16": ("dynamic_mask_attention", {"keep": 16}),
}


@torch.no_grad()
def separation(model: Reader, tokens: Tensor, pair: Tensor) -> dict[str, float]:
    """How often a token of a pair is more important than noise, in the layers, by head."""
    found: dict[str, float] = {}

    def look(n: int, x: Tensor) -> None:
        rows = model.attention[n]._rows(x, 0)
        delta = rows[0][..., -1][:, :, :ASKED]  # B G S
        own = pair[:, None, :ASKED]
        more = (delta[..., :, None] > delta[..., None, :]).float()
        counted = (own[..., :, None] & ~own[..., None, :]).expand_as(more)
        share = (more * counted).sum((0, 2, 3)) / counted.sum((0, 2, 3))
        found[f"layer {n + 1}: pairs above noise, mean"] = float(share.mean())
        found[f"layer {n + 1}: pairs above noise, best head"] = float(share.max())

    model(tokens, look)
    return found


def run(seed: int) -> dict[str, float]:
    """Train every arm."""
    numbers: dict[str, float] = {}
    tokens, pair = questions("test", 0, 0, 512)
    for arm, (name, options) in ARMS.items():
        torch.manual_seed(seed)
        model = Reader(name, **options)

        def loss(number: int, model: Reader = model) -> Tensor:
            return loss_of(model, questions("train", number, seed, RECIPE.batch)[0])

        train(model, loss, RECIPE, seed)
        numbers[f"{arm}: accuracy"] = accuracy(model, tokens)
        if name == "dynamic_mask_attention":
            numbers |= separation(model, tokens, pair)
    return numbers


if __name__ == "__main__":
    ours = "dynamic mask 16: accuracy"
    main(
        __doc__,
        run,
        {
            "dynamic mask less all keys": (ours, "all keys: accuracy"),
            "dynamic mask less nearest": (ours, "nearest 16: accuracy"),
        },
        seeds=2,
    )
