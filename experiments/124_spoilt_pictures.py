"""Pictures with noise, blur or hidden parts: does it help to blend tokens, or to spread attention?

The small checks of papers 124 and 126. A vision transformer of two layers learns the digits of the league,
which are clean, and is asked about the 360 held-out ones as they are and spoilt: normal noise (deviation 0.5
of a range of 2), a blur over 3 × 3 pixels, four of 16 patches hidden, and a fifth of the pixels at their
darkest. What else is measured: the mean entropy of the attention as a share of log 16, how much the three
most-seen keys take of all weights of a head, and the loss that spreads attention (ADL).

It shows if spoilt pictures are recognised more often than by plain attention, by more than seeds differ.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from _pictures import Pictures
from _shared import main
from _training import train
from torch import Tensor

from polyhead.league import Batch, Recipe, Sizes
from polyhead.league.seeds import generator
from polyhead.league.tasks.digits import DigitsTask
from polyhead.nn.regularizers import Regularizer, attention_diversification

SIZES = Sizes(dim=64, heads=4, layers=2, mlp=128)
RECIPE = Recipe(steps=400, batch=64, rate=3e-3, decay=0.05)
SPREAD = attention_diversification()


class Watch(Regularizer):
    """Keeps the weights that it is shown, when it is told to."""

    reads_weights: ClassVar[bool] = True
    seen: ClassVar[list[Tensor] | None] = None

    def losses(
        self, weights: Tensor, *, queries: Tensor | None = None, keys: Tensor | None = None
    ) -> dict[str, Tensor]:
        if Watch.seen is not None:
            Watch.seen.append(weights)
        return {}


ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("mha", {"regularizers": Watch()}),
    "context broadcasting": ("context_broadcasting", {"regularizers": Watch()}),
    "ADL alone": ("mha", {"regularizers": (SPREAD, Watch())}),
    "pooled tokens": ("tap_adl", {"layout": (4, 4), "regularizers": Watch()}),
    "pooled tokens and ADL": ("tap_adl", {"layout": (4, 4), "regularizers": (SPREAD, Watch())}),
}


def spoilt(patches: Tensor) -> dict[str, Tensor]:
    """The pictures `(B, 16, 4)`, in each way, drawn once for everybody."""
    draw = generator("spoilt pictures")
    wide = patches.unflatten(1, (4, 4)).unflatten(3, (2, 2)).transpose(2, 3).flatten(3).flatten(1, 2)  # B 8 8
    blurred = F.avg_pool2d(F.pad(wide[:, None], (1, 1, 1, 1), value=-1.0), 3, stride=1)[:, 0]
    hidden = torch.rand(patches.shape[:2], generator=draw).argsort(-1) < 4
    dark = torch.rand(patches.shape, generator=draw) < 0.2
    return {
        "clean": patches,
        "noise": patches + 0.5 * torch.randn(patches.shape, generator=draw),
        "blur": blurred.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2),
        "hidden": patches.masked_fill(hidden[..., None], -1.0),
        "dark pixels": patches.masked_fill(dark, -1.0),
    }


def looks(model: Pictures, pictures: Tensor) -> dict[str, float]:
    """Of the weights of all layers: entropy over log 16, the share of three keys, and the loss of ADL."""
    Watch.seen = seen = []
    with torch.no_grad():
        model.train()(Batch(pictures, torch.zeros(len(pictures), dtype=torch.int64)))
    Watch.seen = None
    entropy = torch.stack([torch.special.entr(w).sum(-1).mean() for w in seen]).mean() / math.log(16)
    top = torch.stack([w.mean(-2).topk(3).values.sum(-1).mean() for w in seen]).mean()
    lost = [next(iter(SPREAD.losses(w).values())) for w in seen]
    return {
        "entropy": float(entropy),
        "share of three keys": float(top),
        "ADL": float(torch.stack(lost).mean()),
    }


def run(seed: int) -> dict[str, float]:
    """Train every arm."""
    numbers: dict[str, float] = {}
    task = DigitsTask()
    whole = task.batch("validation", 0, 360, 0)
    for arm, (name, options) in ARMS.items():
        torch.manual_seed(seed)
        model = Pictures(task, SIZES, name, options)

        def loss(number: int, model: Pictures = model) -> Tensor:
            return model.loss(task.batch("train", number, RECIPE.batch, seed))

        train(model, loss, RECIPE, seed)
        with torch.no_grad():
            for how, x in spoilt(whole.inputs).items():
                right = model(Batch(x, whole.targets)).argmax(-1) == whole.targets
                numbers[f"{arm}, {how}"] = float(right.float().mean())
        numbers |= {f"{arm}, {what}": value for what, value in looks(model, whole.inputs).items()}
    return numbers


if __name__ == "__main__":
    asked = ("clean", "noise", "blur", "hidden", "dark pixels", "entropy", "share of three keys")
    main(
        __doc__,
        run,
        {
            f"{arm} less plain, {how}": (f"{arm}, {how}", f"plain, {how}")
            for arm in list(ARMS)[1:]
            for how in asked
        },
    )
