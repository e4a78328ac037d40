"""Perplexity of a text, read in chunks through a cache, so that a smaller cache shows its price."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.tasks.generate import forward
from polyhead.tasks.reading import evaluating, texts

__all__ = ["Perplexity", "perplexity"]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens.

    Attributes:
        value: the perplexity.
        nats: the mean negative log-likelihood.
        tokens: number of scored tokens.
    """

    value: float
    nats: float
    tokens: int

    def __float__(self) -> float:
        return self.value


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | Tensor,
    *,
    length: int | None = None,
    skip: int = 1,
    chunk: int = 128,
    cache: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """exp(-mean_t log p(x_t | x_<t)) over the tokens t >= skip, predicted from what the cache then holds.

    The text is read `chunk` tokens at a time; a cache that drops tokens has dropped them by the next chunk.
    Logits of more than one chunk are never held.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; not needed for token ids.
        text: a text, or token ids `(S,)`.
        length: use the first `length` tokens. Default: all.
        skip: the first token that is scored; those before it are context only. At least 1.
        chunk: tokens read at once; 1 is decoding.
        cache: a fresh transformers `Cache`. Default: a `DynamicCache`.
        progress: called as progress(done, total) in tokens.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    ids = texts(model, tokenizer, text, length)[0][None].to(device)
    size = ids.shape[1]
    if chunk < 1:
        raise ConfigError(f"chunk must be at least 1, got {chunk}")
    if not 1 <= skip < size:
        raise ConfigError(f"skip must be at least 1 and below the {size} tokens of the text, got {skip}")
    cache = DynamicCache(config=model.config) if cache is None else cache
    total, count = 0.0, 0
    with evaluating(model):
        # the last token predicts nothing that is known, so it is not read
        for start in range(0, size - 1, chunk):
            stop = min(start + chunk, size - 1)
            targets = ids[0, start + 1 : stop + 1]
            wanted = max(0, stop - max(start, skip - 1))  # scored tokens of this chunk: its last ones
            out = forward(
                model,
                ids[:, start:stop],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=max(wanted, 1),
            )
            if wanted:
                logits = out.logits[0, -wanted:].float()
                total += float(torch.nn.functional.cross_entropy(logits, targets[-wanted:], reduction="sum"))
                count += wanted
            if progress is not None:
                progress(stop + 1, size)
    nats = total / count
    return Perplexity(math.exp(nats) if nats < 700 else math.inf, nats, count)
