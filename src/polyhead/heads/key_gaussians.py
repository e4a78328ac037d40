"""Mean and covariance of the keys of every head, from a text: what `qada` takes far keys for.

"Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification" (paper 085, arXiv
2502.09647).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.attend.selectors import KeyGaussian
from polyhead.checks import whole
from polyhead.errors import ConfigError
from polyhead.heads.inputs import run, text_model
from polyhead.hf import Call, attach
from polyhead.hf.handles import keys_of
from polyhead.tasks.reading import evaluating, texts

__all__ = ["key_gaussians"]


def key_gaussians(
    model: nn.Module,
    tokenizer: Any = None,
    text: str | Sequence[str] | Tensor | None = None,
    *,
    length: int | None = None,
    first: int = 16,
) -> list[KeyGaussian]:
    """For every attention layer the mean and covariance of its keys, as a text goes through the model once.

    Keys are taken as attention gets them, turned by their positions, so that the moments are means over
    positions too. Use it layer by layer:

        far = ph.heads.key_gaussians(model, tokenizer, text)
        with ph.sparse(model, [ph.qada(0.9, one) for one in far]):
            ...

    Args:
        model: any model that `polyhead.attach` accepts; it is given back as it was.
        tokenizer, text, length: what the model reads, as for `polyhead.profile`.
        first: tokens of each text that do not count, as their keys are always read.

    Raises:
        ConfigError: the text is too short, or longer than the model can read.
        UnsupportedModel: the model's attention cannot be looked into.
    """
    whole("key_gaussians: first", first, 0)
    if text is None:
        from polyhead.tasks import sample_text

        text = sample_text()
    read = texts(model, tokenizer, text, length)
    if any(len(ids) < first + 2 for ids in read):
        raise ConfigError(
            f"the text must have at least {first + 2} tokens, of which the first {first} are left out"
        )
    sums: dict[int, tuple[int, Tensor, Tensor]] = {}

    def look(call: Call) -> Tensor:
        keys = keys_of(call)[:, :, first:].double().transpose(0, 1).flatten(1, 2)  # (G, n, D)
        own = (keys.shape[1], keys.sum(1), keys.mT @ keys)
        count, total, squares = sums.get(
            call.layer.index, (0, torch.zeros_like(own[1]), torch.zeros_like(own[2]))
        )
        sums[call.layer.index] = (count + own[0], total + own[1], squares + own[2])
        return call.proceed()

    with evaluating(model), attach(model) as attachment, attachment.handling(look):
        device = next(model.parameters()).device
        for ids in read:
            run(text_model(model), {"input_ids": ids[None].to(device)})
    found = []
    for layer in attachment.layers:
        count, total, squares = sums[layer.index]
        mean = total / count
        covariance = squares / count - mean[:, :, None] * mean[:, None]
        found.append(KeyGaussian(mean.cpu().float(), covariance.cpu().float()))
    return found
