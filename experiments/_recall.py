"""Models of the league of recall, trained here so that their weights can be looked at."""

from __future__ import annotations

import torch
from _shared import learn, score
from torch import Tensor

from polyhead.league import Batch, plan
from polyhead.league.model import Model
from polyhead.league.tasks.recall import RecallTask

TASK = RecallTask()


def trained(contender: str, seed: int) -> Model:
    """A contender as the league trains it, in evaluation."""
    league = plan([contender], TASK, sizes=TASK.sizes, recipe=TASK.recipe)
    torch.manual_seed(seed)
    model = league.contenders[0].model(TASK)
    learn(model, TASK, TASK.recipe, seed, loss=model.loss)
    return model.eval()


def accuracy(model: Model) -> float:
    """On validation questions."""
    return score(model, TASK, 64, 8)


def questions() -> Batch:
    """What weights are looked at on."""
    return TASK.batch("validation", 0, 64, 0)


def places(batch: Batch) -> tuple[Tensor, Tensor]:
    """Of every question its own place (B, n), and the place of its answer among the pairs (B, n)."""
    shown = 2 * TASK.pairs
    own = torch.arange(shown, 3 * TASK.pairs).expand(len(batch.inputs), -1)
    keys = batch.inputs[:, 0:shown:2]
    asked = batch.inputs[:, shown:]
    return own, 2 * (keys[:, None] == asked[..., None]).long().argmax(-1) + 1
