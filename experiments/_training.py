"""The training loop of the experiments that train modules of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polyhead.league import Recipe
from polyhead.league.seeds import seed_of


def train(module: nn.Module, loss: Callable[[int], Tensor], recipe: Recipe, *what: object) -> float:
    """Train as a league does: AdamW, a warm-up, a cosine; the gradient is clipped.

    Args:
        module: whose parameters learn.
        loss: of a step, by its number.
        recipe: how.
        what: that the seeds of the steps are made of.

    Returns:
        The largest norm of a gradient before clipping.
    """
    module.train()
    learned = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": recipe.decay},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    steps = torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.rate, betas=(0.9, 0.98))
    most = 0.0
    for number in range(recipe.steps):
        torch.manual_seed(seed_of("experiment", *what, number))
        for group in steps.param_groups:
            group["lr"] = recipe.rate_at(number)
        steps.zero_grad(set_to_none=True)
        loss(number).backward()
        most = max(most, float(nn.utils.clip_grad_norm_(learned, recipe.clip)))
        steps.step()
    module.eval()
    return most
