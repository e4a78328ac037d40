"""Amplified attention: logits times a factor, to see whether heads select or blend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from polyhead.checks import number
from polyhead.errors import ConfigError
from polyhead.hf import attach
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.mixture_keys import MixtureKeys

__all__ = ["amplified"]


@contextmanager
def amplified(model: nn.Module, factor: float) -> Iterator[None]:
    """Within the block, every attention of the model has its q·k times `factor`.

        for factor in (1, 2, 4, 8, 16):
            with amplified(model, factor):
                loss(model)

    A head that selects one token keeps its output as the factor grows, one that blends many does not: at
    infinity every row has its weight on the largest logit. Masks and biases stay as they are.

    Args:
        model: modules of Polyhead, or a transformers model.
        factor: of the logits, above 0; 1 changes nothing.

    Raises:
        ConfigError: the factor is not allowed, or keys are mixtures of Gaussians.

    Paper: The Dual-Stream Transformer, arXiv 2603.07461.
    """
    factor = number("factor", factor, above=0)
    own = [part for part in model.modules() if isinstance(part, MultiHeadAttention)]
    if any(isinstance(part, MixtureKeys) for part in own):
        raise ConfigError(
            "model has keys that are mixtures, whose logits are not one product to be amplified"
        )
    with ExitStack() as stack:
        if own:
            before = [(part, part.scale) for part in own]
            stack.callback(_restore, before)
            for part, scale in before:
                part.scale = factor * (part.head_dim**-0.5 if scale is None else scale)
        else:

            def louder(call: Any) -> Tensor:
                return call.replace(scale=call.scale * factor).proceed()

            stack.enter_context(attach(model, handler=louder))
        yield


def _restore(before: list[tuple[MultiHeadAttention, float | None]]) -> None:
    for part, scale in before:
        part.scale = scale
