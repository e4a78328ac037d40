"""A task and contenders tried out before anything is trained, so that what does not work ends in a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyhead.checks import given, whole
from polyhead.errors import ConfigError
from polyhead.league.budget import Fitted
from polyhead.league.model import Model, layer_of
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task
from polyhead.league.tasks.declared import working

__all__ = ["try_contender", "try_out"]


def try_out(task: Task, sizes: Sizes, recipe: Recipe) -> dict[str, Batch]:
    """Take two questions of every split through plain attention, and a gradient back; give the questions.

    Raises:
        PolyheadError: what the task needs is absent, or it does not work.
    """
    # gradients, whatever the caller goes without
    with working(task), torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        model = Model(task, sizes, (layer_of(task, "mha", {}, sizes.dim, sizes.heads),)).eval()
        questions = {split: task.batch(split, 0, 2, 0) for split in ("train", *task.splits)}
        for split, batch in questions.items():
            _check_batch(task, split, batch)
            with torch.set_grad_enabled(split == "train"):
                outputs = model(batch).float()
                if split == "train":
                    _check_loss(task, task.loss(outputs, batch))
                _check_points(task, task.measure(outputs, batch))
            if split != "train":
                whole(f"task {task.name}: batches of {split!r}", task.batches(split, recipe.batch), 1)
        _check_yardsticks(task)
        return questions


def try_contender(task: Task, one: Fitted, questions: Mapping[str, Batch]) -> None:
    """Take questions of every split through the model of a contender.

    Raises:
        ConfigError: it cannot take those of a split, as where they are longer than it has room for.
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        model = one.model(task).eval()
        for split, batch in questions.items():
            try:
                model(batch)
            except Exception as error:
                why = str(error).partition("\n")[0]
                raise ConfigError(
                    f"{one.contender.label}: it cannot take the questions of {split!r}: {why}"
                ) from error


def _check_batch(task: Task, split: str, batch: Batch) -> None:
    length = batch.inputs.shape[1]
    if split == "train" and batch.inputs.shape[:2] != (2, task.length):
        raise ConfigError(
            f"task {task.name}: two questions of length {task.length} were expected; its inputs are "
            f"{tuple(batch.inputs.shape)}"
        )
    wanted = {"label": (2,), "symbols": (2, length), "numbers": (2, length, task.outputs)}[task.answer]
    if batch.targets.shape != wanted:
        raise ConfigError(
            f"task {task.name}: its answer is {task.answer!r}, so the targets of two questions of length "
            f"{length} are {wanted}; they are {tuple(batch.targets.shape)}"
        )


def _check_loss(task: Task, loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        without = " without one" if isinstance(loss, Tensor) and not loss.requires_grad else ""
        raise ConfigError(
            f"task {task.name}: loss must be one number, a tensor with a gradient; got {given(loss)}{without}"
        )
    loss.backward()


def _check_points(task: Task, found: Any) -> None:
    both = found if isinstance(found, tuple | list) else (found,)
    shapes = [tuple(one.shape) if isinstance(one, Tensor) else () for one in both]
    if len(shapes) != 2 or len(shapes[0]) != 1 or shapes[0] != shapes[1]:
        raise ConfigError(
            f"task {task.name}: measure must give two tensors (n,), points and weights of answers; got "
            + ", ".join(map(given, both))
        )


def _check_yardsticks(task: Task) -> None:
    for name, score in task.yardsticks().items():
        try:
            if not isinstance(name, str):
                raise TypeError
            float(score)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(
                f"task {task.name}: yardsticks must be numbers by name; got {given(score)} for {given(name)}"
            ) from None
