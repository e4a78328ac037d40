"""What a task of the league is: batches of questions, made of a seed, and a score of the answers.

A task is a part (a frozen dataclass that goes through JSON). To add one, write a file: subclass `Task`,
give it `name`, what its answers are, sizes and a recipe that teach it to plain attention in minutes, and
`batch`; then

    polyhead compare mha grouped_query --task path/to/file.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.checks import number, whole
from polyhead.description import Part
from polyhead.errors import ConfigError, PolyheadError

__all__ = ["Batch", "Recipe", "Sizes", "Task"]

NOT_ASKED = -100  # as the cross-entropy of torch has it


@dataclass(frozen=True)
class Batch:
    """Questions and answers.

    Attributes:
        inputs: symbols, int64 `(B, L)`, or vectors, float `(B, L, w)`.
        targets: by `Task.answer`: "symbols", int64 `(B, L)`, -100 where nothing is asked; "label", int64
            `(B,)`; "numbers", float `(B, L, outputs)`, NaN where nothing is asked.
        padding: bool `(B, L)`, True at real tokens; None when all are.
    """

    inputs: Tensor
    targets: Tensor
    padding: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        padding = None if self.padding is None else self.padding.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), padding)

    @property
    def asked(self) -> Tensor | None:
        """bool `(B, L)`, where something is asked; None where one label is, of the sequence."""
        if self.targets.ndim == 1:
            return None
        return self.targets != NOT_ASKED if self.targets.ndim == 2 else ~self.targets.isnan().any(-1)

    def answers(self) -> Tensor:
        """The targets of what is asked: `(n,)` or `(n, outputs)`."""
        asked = self.asked
        return self.targets if asked is None else self.targets[asked]


class Sizes(Part):
    """A transformer.

    Attributes:
        dim: width d.
        heads: query heads of a layer.
        layers: attention layers, each with an MLP behind it.
        mlp: width of an MLP; default 4 d.
    """

    dim: int = 64
    heads: int = 4
    layers: int = 2
    mlp: int | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "layers"):
            whole(name, getattr(self, name), 1)
        object.__setattr__(self, "mlp", 4 * self.dim if self.mlp is None else whole("mlp", self.mlp, 1))


class Recipe(Part):
    """How every contender is trained: AdamW, a warm-up, then a cosine down to a tenth.

    Attributes:
        steps: optimiser steps.
        batch: sequences a step.
        rate: the highest learning rate.
        warmup: share of the steps over which the rate rises.
        decay: weight decay of matrices.
        clip: largest norm of the gradient of all parameters.
        looks: how often the validation questions are asked on the way.
    """

    steps: int = 1000
    batch: int = 64
    rate: float = 1e-3
    warmup: float = 0.1
    decay: float = 0.01
    clip: float = 1.0
    looks: int = 20

    def __post_init__(self) -> None:
        whole("steps", self.steps, 1)
        whole("batch", self.batch, 1)
        whole("looks", self.looks, 1)
        number("rate", self.rate, above=0)
        number("warmup", self.warmup, least=0, below=1)
        number("decay", self.decay, least=0)
        number("clip", self.clip, above=0)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0 on."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))

    def looks_at(self) -> frozenset[int]:
        """The numbers of steps after which the validation questions are asked; all steps is one of them."""
        count = min(self.looks, self.steps)
        return frozenset(round(self.steps * (n + 1) / count) for n in range(count))


class Task(Part):
    """A task: fields are its sizes, class attributes what it is.

    Attributes:
        name: as `--task` calls it.
        summary: one line, for people.
        answer: "symbols", a class at every position that is asked; "label", one class of a sequence,
            see `read_from`; "numbers", a vector at every position that is asked.
        metric: what the score is called.
        better: "higher" or "lower".
        causal: whether a token may look at earlier tokens only.
        positions: how tokens know where they stand: "rotary", "alibi" (the latest are nearer; a bias of the
            scores), "learned" (added to the inputs), or "none" for sets.
        grows: fields that `--scale` multiplies.
        sizes: of the transformer that everybody's budget is taken from.
        recipe: how everybody is trained.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    answer: ClassVar[str] = "symbols"
    metric: ClassVar[str] = "accuracy"
    better: ClassVar[str] = "higher"
    causal: ClassVar[bool] = True
    positions: ClassVar[str] = "rotary"
    grows: ClassVar[tuple[str, ...]] = ()
    sizes: ClassVar[Sizes] = Sizes()
    recipe: ClassVar[Recipe] = Recipe()

    @property
    def vocabulary(self) -> int | None:
        """Different input symbols; None where inputs are vectors."""
        return None

    @property
    def width(self) -> int | None:
        """Width of input vectors; None where inputs are symbols."""
        return None

    @property
    def outputs(self) -> int:
        """Classes, or numbers of an answer."""
        raise NotImplementedError("a task must say its outputs")

    @property
    def length(self) -> int:
        """Tokens of a training sequence."""
        raise NotImplementedError("a task must say its length")

    @property
    def read_from(self) -> str:
        """What a label is read from: "token", a class token; "mean", the mean of the real tokens."""
        return "token"

    @property
    def splits(self) -> tuple[str, ...]:
        """What is asked at the end: "validation", and then longer or harder questions of the same kind."""
        return ("validation",)

    def batches(self, split: str, size: int) -> int:
        """How many batches of a split are asked at the end."""
        return 16

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        """The questions of one step: the same for the same arguments, on every machine with this torch.

        Args:
            split: "train" or one of `splits`.
            number: which batch.
            size: sequences.
            seed: of the run; questions of `splits` are asked with seed 0 in all runs.
        """
        raise NotImplementedError("a task must have a method batch")

    def measure(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Points and weights `(n,)` of answers; the score is the sum of the one over that of the other.

        Args:
            outputs: `(n, outputs)`, of everything that is asked, in the order of `batch.answers()`.
            batch: the questions.
        """
        if self.answer == "numbers":
            points = (outputs - batch.answers()).square().mean(-1)
        else:
            points = (outputs.argmax(-1) == batch.answers()).to(torch.float32)
        return points, torch.ones_like(points)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """What training lowers, a mean over what is asked."""
        if self.answer == "numbers":
            return F.mse_loss(outputs, batch.answers())
        return F.cross_entropy(outputs, batch.answers())

    def yardsticks(self) -> Mapping[str, float]:
        """Scores on "validation" that need no training, such as that of a guess or the best possible."""
        return {}

    def looks_good(self, score: float) -> float:
        """A score as a number that is higher for better, for ranking; NaN comes last."""
        if math.isnan(score):
            return -math.inf
        return score if self.better == "higher" else -score

    def scaled(self, scale: float) -> Self:
        """A larger task of the same kind."""
        number("scale", scale, above=0)
        if scale == 1:
            return self
        if not self.grows:
            raise ConfigError(f"scale must be 1: the size of {self.name} is that of its data; got {scale}")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name in self.grows}
        try:
            return replace(self, **{name: max(1, round(value * scale)) for name, value in own.items()})
        except PolyheadError as error:
            raise ConfigError(f"scale={scale} does not fit {self.name}: {error}") from None
