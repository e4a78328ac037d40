"""The transformer that every contender is trained in: the same but for its attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyhead.attend.masks import causal
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.league.tasks.base import Batch, Sizes, Task
from polyhead.mechanisms import build, entry
from polyhead.nn.auxiliary import auxiliary_losses
from polyhead.nn.positions import AlibiPosition, NoPosition, Position, Rope, Sinusoidal
from polyhead.nn.stack import AttentionStack

__all__ = ["Layer", "Model", "layer_of", "tokens_of"]

_ENCODINGS: dict[str, Position] = {"rotary": Rope(), "alibi": AlibiPosition()}


class Layer(NamedTuple):
    """A mechanism, its options without `dim`, and how its tokens know where they stand.

    `positions` is "rotary", "alibi", "own" (among the options), "sinusoidal" or "learned" (added to the
    inputs), or "none".
    """

    name: str
    options: dict[str, Any]
    positions: str


def layer_of(task: Task, name: str, options: Mapping[str, Any], dim: int, heads: int) -> Layer:
    """A mechanism as it is built for a task.

    Where a task has rotary positions or ALiBi's, a mechanism that takes them is given them, or else the other
    ones of the two; one that has a position encoding among its options keeps it; to the inputs of any other
    sines and cosines are added.

    Raises:
        UnknownName: no such mechanism.
        UnsupportedPattern: the mechanism cannot do the task.
        ConfigError: an option that it does not have, or a value that is not allowed.
    """
    found = entry(name)
    pattern = "causal_self" if task.causal else "self"
    if pattern not in found.supports:
        raise UnsupportedPattern(
            f"{found.name} does not support {pattern}, which the task {task.name} needs; it supports "
            f"{', '.join(sorted(found.supports))}"
        )
    fields, own = found.config.__dataclass_fields__, {"heads": heads} | dict(options)
    if "dim" in own:
        raise ConfigError(f"{found.name}: dim is solved for, so that budgets are equal; leave it out")
    for option in ("device", "dtype", "name"):  # what `build` takes besides options
        if option in own:
            raise ConfigError(f"{found.name}: {option} is no option of a contender; leave it out")
    if "length" in fields and "length" not in own:
        own["length"] = 4 * task.length  # room for longer questions

    def made(**further: Any) -> None:
        build(found.name, dim=dim, device="meta", **own | further)

    if "position" in own or task.positions not in _ENCODINGS:
        made()
        return Layer(found.name, own, "own" if "position" in own else task.positions)
    if "position" in fields:
        for kind in (task.positions, *(other for other in _ENCODINGS if other != task.positions)):
            try:
                made(position=_ENCODINGS[kind])
            except ConfigError:  # does not go with the mechanism; what else may be wrong is said below
                continue
            return Layer(found.name, own | {"position": _ENCODINGS[kind]}, kind)
    made()
    return Layer(found.name, own, "sinusoidal")


def tokens_of(task: Task) -> int:
    """Tokens of a training sequence in the layers, with the class token that a label is read from."""
    return task.length + _has_token(task)


def _has_token(task: Task) -> bool:
    return task.answer == "label" and task.read_from == "token"


def _with_token(
    token: Tensor, x: Tensor, padding: Tensor | None, *, last: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Put a token before every sequence, or after its last real token; and where it is, bool `(B, L + 1)`."""
    real = x.new_ones(x.shape[:2], dtype=torch.bool) if padding is None else padding
    places = torch.arange(x.shape[1] + 1, device=x.device)
    own = (real * places[1:]).amax(1, keepdim=True) if last else places.new_zeros(len(x), 1)
    here = places == own
    room = x.new_zeros(len(x), 1, x.shape[2])
    x = torch.where(here[..., None], token.to(x.dtype), torch.cat([x, room] if last else [room, x], dim=1))
    if padding is not None:
        end = padding.new_zeros(len(x), 1)
        padding = here | torch.cat([padding, end] if last else [end, padding], dim=1)
    return x, padding, here


class Model(nn.Module):
    """Embeddings, attention layers and MLPs with norms and residuals, a norm, and a linear read-out.

    Args:
        task: says what comes in and what goes out. A label is read from a class token, a learned vector
            that stands before the sequence, or after it where the task is causal; or from the mean of the
            real tokens.
        sizes: width, query heads, layers and width of the MLPs.
        layers: the mechanisms, taken in turn until there are `sizes.layers`.
        device, dtype: of the parameters.
    """

    def __init__(
        self, task: Task, sizes: Sizes, layers: Sequence[Layer], *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.task, self.sizes = task, sizes
        dim = sizes.dim
        if task.vocabulary is not None:
            self.embed: nn.Module = nn.Embedding(task.vocabulary, dim, **kind)
            nn.init.normal_(self.embed.weight, std=dim**-0.5)
        elif task.width is not None:
            self.embed = nn.Linear(task.width, dim, **kind)
        else:
            raise ConfigError(f"the task {task.name} has neither a vocabulary nor a width of its inputs")
        taken = [layers[n % len(layers)] for n in range(sizes.layers)]
        added = {layer.positions for layer in taken}
        self.places: nn.Parameter | None = None
        self.label: nn.Parameter | None = None
        if _has_token(task):
            self.label = nn.Parameter(torch.empty(dim, **kind))
            nn.init.normal_(self.label, std=dim**-0.5)
        if "learned" in added:
            self.places = nn.Parameter(torch.empty(tokens_of(task), dim, **kind))
            nn.init.normal_(self.places, std=dim**-0.5)
        self.added = Sinusoidal() if "sinusoidal" in added else NoPosition()
        self.stack = AttentionStack(
            [build(one.name, dim=dim, **kind, **one.options) for one in taken],
            dim,
            mlp=sizes.mlp,
            final_norm=True,
            **kind,
        )
        self.read = nn.Linear(dim, task.outputs, **kind)
        nn.init.normal_(self.read.weight, std=dim**-0.5)
        self.mask = causal() if task.causal else None

    def forward(self, batch: Batch) -> Tensor:
        """Answers to what is asked, `(n, outputs)`, in the order of `batch.answers()`."""
        x, padding = self.embed(batch.inputs), batch.padding
        read = batch.asked
        if self.label is not None:
            x, padding, read = _with_token(self.label, x, padding, last=self.task.causal)
        if self.places is not None:
            x = x + self.places[: x.shape[1]]
        added = self.added.added(torch.arange(x.shape[1], device=x.device), x.shape[2])
        if added is not None:
            x = x + added.to(x.dtype)
        x = self.stack(x, mask=self.mask, padding=padding)
        if read is not None:
            return self.read(x[read])
        if padding is None:
            return self.read(x.mean(1))
        real = padding[..., None].to(x.dtype)
        return self.read((x * real).sum(1) / real.sum(1).clamp(min=1))

    def loss(self, batch: Batch) -> Tensor:
        """The task's loss and the auxiliary losses of the mechanisms."""
        found = self.task.loss(self(batch).float(), batch)
        for extra in auxiliary_losses(self).values():
            found = found + extra
        return found
