"""A model of short texts is tuned on longer ones: within LongLoRA's groups, or with returned heads and sinks.

A language model of two layers and 4 heads learns sequences of 128 tokens for 400 steps. Then it is tuned for
100 steps on 512 tokens: with attention to everything; within groups of 128 tokens, which half of the heads
shift by 64 (LongLoRA); and so that half of these heads are not shifted and all see the first 4 tokens
(SinkLoRA). Each is then read with attention to everything. Bits per byte of held-out texts of 512 tokens;
"gain kept" is the drop of bits by the tuning over the drop that attention to everything brings.

It shows what the paper says if groups with returned heads and sinks keep more of the gain than LongLoRA's.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from _shared import learn, main, score

from polyhead.league import Recipe, Sizes
from polyhead.league.model import Model, layer_of
from polyhead.league.tasks.text import TextTask
from polyhead.nn.regularizers import Regularizer, check_regularizers, shifted_groups

SIZES = Sizes(dim=96, heads=4, layers=2, mlp=384)
FIRST = Recipe(steps=400, batch=16, rate=3e-3, warmup=0.05, decay=0.1)
TUNING = Recipe(steps=100, batch=4, rate=1e-3, warmup=0.1, decay=0.1)
SHORT, LONG, GROUP = 128, 512, 128
ARMS: dict[str, tuple[Regularizer, ...]] = {
    "everything": (),
    "groups": (shifted_groups(GROUP, returned=0.0, sinks=0),),
    "groups, returned, sinks": (shifted_groups(GROUP, returned=0.5, sinks=4),),
}


def run(seed: int) -> dict[str, float]:
    """One model of short texts, tuned in every way."""
    short = TextTask(tokens=SHORT, tokenizer=512)
    long = replace(short, tokens=LONG, digest=None)
    torch.manual_seed(seed)
    model = Model(short, SIZES, [layer_of(short, "mha", {}, SIZES.dim, SIZES.heads)])
    learn(model, short, FIRST, seed, loss=model.loss)

    def bits(found: Model) -> float:
        found.eval()
        return score(found, long, 8, 16)

    model.task = long
    before = bits(model)
    numbers = {"before": before}
    for name, parts in ARMS.items():
        found = copy.deepcopy(model)
        for layer in found.stack.layers:
            layer.attention.regularizers = check_regularizers(parts)
        learn(found, long, TUNING, seed + 1000, loss=found.loss)
        numbers[f"{name}: bits"] = bits(found)
    gain = before - numbers["everything: bits"]
    for name in list(ARMS)[1:]:
        numbers[f"{name}: gain kept"] = (before - numbers[f"{name}: bits"]) / gain
    return numbers


if __name__ == "__main__":
    own, other = "groups, returned, sinks", "groups"
    main(
        __doc__,
        run,
        {
            f"{own} less {other}: {what}": (f"{own}: {what}", f"{other}: {what}")
            for what in ("bits", "gain kept")
        },
    )
