"""A task tried out before anything is trained, so that one that does not work ends in a line."""

from __future__ import annotations

import torch

from polyhead.checks import given
from polyhead.errors import ConfigError, PolyheadError
from polyhead.league.model import Model, layer_of
from polyhead.league.tasks.base import Sizes, Task

__all__ = ["try_out"]


def try_out(task: Task, sizes: Sizes) -> None:
    """Take two questions of every split through plain attention.

    Raises:
        PolyheadError: what the task needs is absent, or it does not work.
    """
    name = getattr(task, "name", type(task).__name__)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            layers = (layer_of(task, "mha", {}, sizes.dim, sizes.heads),)
            model = Model(task, sizes, layers).eval()
            for split in ("train", *task.splits):
                batch = task.batch(split, 0, 2, 0)
                length = batch.inputs.shape[1]
                if split == "train" and batch.inputs.shape[:2] != (2, task.length):
                    raise ConfigError(
                        f"task {name}: two questions of length {task.length} were expected; "
                        f"its inputs are {tuple(batch.inputs.shape)}"
                    )
                wanted = {"label": (2,), "symbols": (2, length), "numbers": (2, length, task.outputs)}
                if task.answer not in wanted:
                    raise ConfigError(
                        f"task {name}: answer must be one of {', '.join(wanted)}; got {given(task.answer)}"
                    )
                if batch.targets.shape != wanted[task.answer]:
                    raise ConfigError(
                        f"task {name}: its answer is {task.answer!r}, so the targets of two questions of "
                        f"length {length} are {wanted[task.answer]}; they are {tuple(batch.targets.shape)}"
                    )
                outputs = model(batch).float()
                task.loss(outputs, batch)
                task.measure(outputs, batch)
            _ = task.summary, dict(task.yardsticks())
    except PolyheadError:
        raise
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"task {name}: it does not work: {type(error).__name__}: {why}") from error
