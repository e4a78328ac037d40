"""Mixture of heads on digits: how evenly the routed heads are used, with and without the loss of balance.

The vision transformer of the league, eight heads: two for every patch and, of six more, four that the patch
chooses; with the loss of balance at 0.01, at 0.1, and without it. Of each layer the shares of patches that
choose each routed head, over the held-out pictures: their entropy over that of even use, and the least and
the greatest share; the mean of both layers. An even share is 2/3.

It shows what the paper says if the loss brings the shares nearer to even ones at no loss of accuracy, and
heads keep different shares.
"""

from __future__ import annotations

import torch
from _pictures import Pictures
from _shared import learn, main, score

from polyhead.league import Recipe, Sizes
from polyhead.league.tasks.digits import DigitsTask
from polyhead.nn.routed_heads import RoutedHeads
from polyhead.nn.routing import Choice

SIZES = Sizes(dim=64, heads=8, layers=2, mlp=128)
TASK = DigitsTask(read="mean")
RECIPE = Recipe(steps=600, batch=64, rate=TASK.recipe.rate)
SHARED = 2
LOSSES = (0.0, 0.01, 0.1)


@torch.no_grad()
def loads(model: Pictures) -> list[torch.Tensor]:
    """Of every layer the share of held-out patches that choose each routed head."""
    chosen: list[list[torch.Tensor]] = []
    hooks = []
    for layer in (m for m in model.modules() if isinstance(m, RoutedHeads)):
        seen: list[torch.Tensor] = []
        chosen.append(seen)

        def watch(router: object, inputs: object, choice: Choice, seen: list[torch.Tensor] = seen) -> None:
            seen.append(choice.active.flatten(0, 1))

        hooks.append(layer.router.register_forward_hook(watch))
    for number in range(4):
        model(TASK.batch("validation", number, 64, 0))
    for hook in hooks:
        hook.remove()
    return [torch.cat(seen).double().mean(0)[SHARED:] for seen in chosen]


def run(seed: int) -> dict[str, float]:
    """Accuracy and shares for every weight of the loss."""
    found = {}
    for weight in LOSSES:
        torch.manual_seed(seed)
        options = {"shared_heads": SHARED, "top_k": 4, "balance": weight}
        model = Pictures(TASK, SIZES, "moh", options)
        learn(model, TASK, RECIPE, seed, loss=model.loss)
        model.eval()
        shares = torch.stack(loads(model))
        p = shares / shares.sum(-1, keepdim=True)
        entropy = -(p * p.clamp(min=1e-12).log()).sum(-1) / torch.tensor(p.shape[-1]).log()
        found |= {
            f"{weight:g}: accuracy": score(model, TASK, 64, 5),
            f"{weight:g}: entropy": float(entropy.mean()),
            f"{weight:g}: least": float(shares.amin(-1).mean()),
            f"{weight:g}: greatest": float(shares.amax(-1).mean()),
        }
    return found


if __name__ == "__main__":
    measures = ("accuracy", "entropy", "least", "greatest")
    main(
        __doc__, run, {f"{w:g} - none: {m}": (f"{w:g}: {m}", f"0: {m}") for w in LOSSES[1:] for m in measures}
    )
