"""Heads of a whole model that are switched off for a step of training, so that it does not lean on a few.

    head_h ← m_h head_h,   m in {0, 1}, N of all heads of all layers at zero

    with HeadMask(model, masked=18) as heads:
        for batch in data:
            heads.draw()                                         # N heads at random
            step(model, batch)

`heads.draw_important(loss)` masks those N that matter most to the batch instead, at the price of a second
pass. The importance of a head is how much the loss moves with a factor ξ_h = 1 of its output,

    I_h = Σ_x |∂L/∂ξ_h(x)| = Σ_x |Att_h(x)ᵀ ∂L/∂Att_h(x)|

with the sum over the items x of the batch: for a loss that is a mean over items, the mean of their absolute
values. In evaluation no head is masked.

Paper 054: Alleviating the Inequality of Attention Heads for Neural Machine Translation, arXiv 2009.09672; the
importance is that of Are Sixteen Heads Really Better than One?, arXiv 1905.10650, here without its
normalisation by layer. The paper names no rescaling of the heads that are left; `rescale` multiplies them by
H / heads left in the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from polyhead.checks import flag, given, whole
from polyhead.errors import ConfigError, ShapeError
from polyhead.head_scores import HeadScores
from polyhead.nn.attention import MultiHeadAttention

__all__ = ["HeadMask", "attention_layers", "head_importance"]


def attention_layers(model: nn.Module) -> dict[str, MultiHeadAttention]:
    """The attention modules of a model by their path, in the order of its modules: layer 0, 1, ...

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch module; got {given(model)}")
    found = {path: module for path, module in model.named_modules() if isinstance(module, MultiHeadAttention)}
    if not found:
        raise ConfigError(f"model must hold MultiHeadAttention modules; {type(model).__name__} has none")
    return found


def _heads(path: str, layer: MultiHeadAttention, given: tuple[Any, ...]) -> Tensor:
    """What the output projection of a layer was given, if it is heads."""
    heads = given[0] if given else None
    if not isinstance(heads, Tensor) or heads.ndim != 4 or heads.shape[1] != layer.heads:
        found = tuple(heads.shape) if isinstance(heads, Tensor) else given
        raise ShapeError(
            f"{path or type(layer).__name__}: its output must take heads (B, {layer.heads}, L, Dv) to have "
            f"them masked; it takes {found}"
        )
    return heads


class HeadMask:
    """Masks heads of the attention modules of a model, between them and their output projections.

    A context manager: what it adds to the model is gone when it ends.

    Args:
        model: with `MultiHeadAttention` modules.
        masked: how many heads are masked by `draw` and `draw_important`, N of all.
        rescale: multiply what is left in a layer by H / heads left.
        generator: where `draw` has its random numbers from; default torch's own of the CPU.

    Attributes:
        layers: the attention modules by path.
        gates: for every layer, bool `(H,)`: False at masked heads.
    """

    def __init__(
        self,
        model: nn.Module,
        masked: int,
        *,
        rescale: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model = model
        self.layers = attention_layers(model)
        self.widths = tuple(layer.heads for layer in self.layers.values())
        self.masked = whole("masked", masked, 0, sum(self.widths))
        flag("rescale", rescale)
        self.rescale = rescale
        self.generator = generator
        self.gates: tuple[Tensor, ...] = ()
        self._undo: ExitStack | None = None
        self.clear()

    @property
    def heads(self) -> int:
        """All heads of the model."""
        return sum(self.widths)

    def clear(self) -> None:
        """Mask no head."""
        self.mask(())

    def mask(self, heads: Iterable[tuple[int, int]]) -> None:
        """Mask these (layer, head), such as `scores.top(18)`, until something else is masked."""
        gates = tuple(torch.ones(width, dtype=torch.bool) for width in self.widths)
        for layer, head in heads:
            if not (0 <= layer < len(gates) and 0 <= head < self.widths[layer]):
                raise ConfigError(f"heads must be among the layers {self.widths}; got ({layer}, {head})")
            gates[layer][head] = False
        self.gates = gates

    def draw(self) -> None:
        """Mask `masked` heads, drawn from all without putting back."""
        chosen = torch.randperm(self.heads, generator=self.generator)[: self.masked]
        flat = torch.ones(self.heads, dtype=torch.bool)
        flat[chosen] = False
        self.gates = flat.split(self.widths)

    def draw_important(self, loss: Callable[[], Tensor]) -> HeadScores:
        """Mask the `masked` heads that matter most to `loss`, and give the importance of all.

        Args:
            loss: makes the forward pass of the batch and returns its loss; it is called once, no head masked.
        """
        self.clear()
        importance = head_importance(self.model, loss)
        order = np.argsort(-importance.flat, kind="stable")[: self.masked]
        self.mask([importance.pairs[n] for n in order])
        return importance

    def __enter__(self) -> Self:
        if self._undo is not None:
            raise ConfigError("this HeadMask is in use already")
        self._undo = ExitStack()
        for n, (path, layer) in enumerate(self.layers.items()):
            handle = layer.output.register_forward_pre_hook(self._hook(n, path, layer))
            self._undo.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._undo is not None
        self._undo.close()
        self._undo = None

    def _hook(self, n: int, path: str, layer: MultiHeadAttention) -> Callable[..., Any]:
        def gate(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
            gates = self.gates[n]
            if not layer.training or bool(gates.all()):
                return None
            heads = _heads(path, layer, given)
            left = gates.to(heads.device)[:, None, None]
            heads = heads.masked_fill(~left, 0.0)
            if self.rescale and bool(gates.any()):
                heads = heads * (len(gates) / int(gates.sum()))
            return heads, *given[1:]

        return gate


def head_importance(model: nn.Module, loss: Callable[[], Tensor]) -> HeadScores:
    """How much every head matters to a loss: I_h of the module's docstring, from one backward pass.

    Args:
        model: with `MultiHeadAttention` modules; its parameters get no gradient from this.
        loss: makes the forward pass of a batch and returns a scalar.
    """
    layers = attention_layers(model)
    factors: dict[str, list[Tensor]] = {path: [] for path in layers}

    def watch(path: str, layer: MultiHeadAttention) -> Callable[..., Any]:
        def factor(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            heads = _heads(path, layer, given)
            one = heads.new_ones(len(heads), layer.heads, 1, 1).requires_grad_()
            factors[path].append(one)
            return heads * one, *given[1:]

        return factor

    with ExitStack() as undo, torch.enable_grad():
        for path, layer in layers.items():
            undo.callback(layer.output.register_forward_pre_hook(watch(path, layer)).remove)
        value = loss()
        if not isinstance(value, Tensor) or value.ndim:
            raise ConfigError(f"loss must return a scalar tensor; got {given(value)}")
        ones = [one for found in factors.values() for one in found]
        grads = iter(torch.autograd.grad(value, ones, allow_unused=True)) if ones else iter(())
    values = []
    for path, layer in layers.items():
        total = torch.zeros(layer.heads, dtype=torch.float64)
        for _ in factors[path]:
            grad = next(grads)
            if grad is not None:
                total += grad.detach().flatten(1).abs().sum(0).double().cpu()
        values.append(total.numpy())
    return HeadScores(
        tuple(values),
        name="importance",
        meaning="sum over the batch of |∂L/∂ξ|, ξ a factor of the head's output",
        direction="higher: the loss depends more on the head",
    )
