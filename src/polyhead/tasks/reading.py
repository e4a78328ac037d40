"""Texts as a model reads them: token ids that fit, and the model set to reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError

__all__ = ["context_length", "encode", "evaluating", "frozen", "texts"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients; the modes of all modules are given back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients for the weights, and everything given back."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, grad in wanted:
            parameter.requires_grad_(grad)


def context_length(model: nn.Module) -> int | None:
    """How many tokens the model can read, if its config says so."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            # RoBERTa's positions begin after its padding index
            offset = (getattr(config, "pad_token_id", None) or 0) + 1
            roberta = "roberta" in str(getattr(config, "model_type", "")) or getattr(
                config, "model_type", ""
            ) in (
                "camembert",
                "mpnet",
                "longformer",
            )
            return limit - offset if roberta else limit
    return None


def encode(tokenizer: Any, text: str, length: int | None = None) -> Tensor:
    """The ids `(S,)` of a text, with the special tokens that the tokenizer puts around one.

    Args:
        length: cut the text so that there are at most so many tokens, special ones included. Default: never.
    """
    # some tokenizers warn about texts longer than the model; the caller decides about that
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    if length is not None and len(ids) > length:
        ids = tokenizer(text, truncation=True, max_length=length, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def texts(
    model: nn.Module, tokenizer: Any, text: str | Sequence[str] | Tensor, length: int | None
) -> tuple[Tensor, ...]:
    """The ids of the text(s), checked against what the model can read, cut to `length` tokens.

    Raises:
        ConfigError: there is no text, it is too short, or longer than the model can read.
    """
    limit = context_length(model)
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 2):
        raise ConfigError(f"length must be a number of tokens, at least 2; got {length!r}")
    if length is not None and limit is not None and length > limit:
        raise ConfigError(f"length={length} is longer than the {limit} tokens that the model can read")
    several: list[Any]
    if isinstance(text, Tensor):
        if text.is_floating_point() or text.ndim not in (1, 2):
            raise ConfigError(
                f"token ids must be integers (S,) or (N, S), got {text.dtype} {tuple(text.shape)}"
            )
        several = [ids.long() for ids in (text if text.ndim == 2 else text[None])]
    else:
        several = [text] if isinstance(text, str) else list(text)
        if not several or not all(isinstance(t, str) for t in several):
            raise ConfigError(
                "text must be a string or several, token ids, or a mapping of the model's inputs"
            )
        if tokenizer is None:
            raise ConfigError("a text needs the model's tokenizer; without one, give token ids (S,)")
        several = [encode(tokenizer, t, length) for t in several]
    return tuple(_fitting(ids, length, limit) for ids in several)


def _fitting(ids: Tensor, length: int | None, limit: int | None) -> Tensor:
    if len(ids) < 2:
        raise ConfigError(f"the text has {len(ids)} tokens; it needs at least 2, one to look at another")
    if length is not None and len(ids) < length:
        raise ConfigError(f"the text has {len(ids)} tokens, length asks for {length}; give a longer text")
    if length is None and limit is not None and len(ids) > limit:
        raise ConfigError(
            f"the text has {len(ids)} tokens, the model reads {limit}; length={limit} uses its beginning"
        )
    return ids[:length]
