"""Models of leagues, trained here so that their weights can be looked at."""

from __future__ import annotations

import torch
from _shared import learn, score

from polyhead.league import Batch, Task, plan
from polyhead.league.model import Model


def trained(task: Task, contender: str, seed: int) -> Model:
    """A contender as the league of a task trains it, in evaluation."""
    league = plan([contender], task, sizes=task.sizes, recipe=task.recipe)
    torch.manual_seed(seed)
    model = league.contenders[0].model(task)
    learn(model, task, task.recipe, seed, loss=model.loss)
    return model.eval()


def accuracy(model: Model) -> float:
    """On validation questions."""
    return score(model, model.task, 64, 8)


def questions(task: Task) -> Batch:
    """What weights are looked at on."""
    return task.batch("validation", 0, 64, 0)
