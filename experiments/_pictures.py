"""The vision transformer of the experiments: a label is read from the mean of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import polyhead as ph
from polyhead.league import Batch, Sizes, Task


class Pictures(nn.Module):
    """Tokens with learned places, attention layers and MLPs, and a linear read-out of their mean.

    `options` are those of every layer, or a list with those of each.
    """

    def __init__(
        self, task: Task, sizes: Sizes, name: str, options: dict[str, Any] | list[dict[str, Any]]
    ) -> None:
        super().__init__()
        self.task, dim = task, sizes.dim
        self.embed = nn.Linear(task.width or 1, dim)
        self.places = nn.Parameter(torch.empty(task.length, dim))
        nn.init.normal_(self.places, std=dim**-0.5)
        each = options if isinstance(options, list) else [options] * sizes.layers
        layers = [ph.build(name, dim=dim, heads=sizes.heads, **own) for own in each]
        self.stack = ph.nn.AttentionStack(layers, dim, mlp=sizes.mlp, final_norm=True)
        self.read = nn.Linear(dim, task.outputs)
        nn.init.normal_(self.read.weight, std=dim**-0.5)

    def forward(self, batch: Batch) -> Tensor:
        """Answers (B, outputs)."""
        x = self.stack(self.embed(batch.inputs) + self.places, padding=batch.padding)
        if batch.padding is None:
            return self.read(x.mean(1))
        real = batch.padding[..., None].to(x.dtype)
        return self.read((x * real).sum(1) / real.sum(1))

    def loss(self, batch: Batch) -> Tensor:
        """The task's loss and the auxiliary losses of the mechanisms."""
        return self.task.loss(self(batch), batch) + sum(ph.auxiliary_losses(self).values(), torch.zeros(()))
