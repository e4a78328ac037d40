"""Greedy generation, written out: what is observed while a model generates needs the steps in the open."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.tasks.reading import evaluating

__all__ = ["forward", "greedy", "left_padded", "position_ids"]


def forward(model: nn.Module, ids: Tensor, padding: Tensor | None = None, **arguments: Any) -> Any:
    """One forward pass over the last tokens of sequences; `padding` `(B, S)` is True at their real tokens.

    Arguments that the model does not take are left out, but not a cache.
    """
    accepted = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if padding is not None:
        arguments |= {
            "attention_mask": padding.long(),
            "position_ids": position_ids(padding)[:, -ids.shape[1] :],
        }
    for name in [n for n in arguments if n not in accepted]:
        if name == "past_key_values" and not anything:
            raise ConfigError(f"{type(model).__name__} takes no past_key_values: it cannot read with a cache")
        if name in ("position_ids", "logits_to_keep", "use_cache"):
            del arguments[name]
    return model(input_ids=ids, **arguments)


def position_ids(padding: Tensor) -> Tensor:
    """Positions `(B, S)` of real tokens counted from 0, as transformers' `generate` counts them."""
    return (padding.long().cumsum(-1) - 1).clamp(min=0)


def left_padded(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor | None]:
    """Token ids `(B, S)` and which are real `(B, S)`, None if all are; the sequences end together."""
    size = max(map(len, sequences))
    ids = torch.tensor([[pad] * (size - len(s)) + list(s) for s in sequences], dtype=torch.int64)
    if all(len(s) == size for s in sequences):
        return ids, None
    real = torch.tensor([[False] * (size - len(s)) + [True] * len(s) for s in sequences])
    return ids, real


def greedy(
    model: nn.Module,
    ids: Tensor,
    *,
    steps: int,
    padding: Tensor | None = None,
    cache: Any = None,
    around: AbstractContextManager[Any] | None = None,
) -> Tensor:
    """The most likely next tokens `(B, steps)` after `ids` `(B, S)`, one by one.

    Everything but the last token of the prompt is read in one pass without logits; each step then feeds one
    token. A sequence that has ended goes on with its end token.

    Args:
        model: a causal language model of transformers.
        padding: bool `(B, S)`, True at real tokens; padding stands on the left.
        cache: the transformers `Cache` to fill. Default: a `DynamicCache`.
        around: a context for the steps, entered when the prompt has been read up to its last token.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    ids = ids.to(device)
    padding = None if padding is None else padding.to(device)
    cache = DynamicCache(config=model.config) if cache is None else cache
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    said: list[Tensor] = []
    done = torch.zeros(len(ids), dtype=torch.bool, device=device)
    with evaluating(model), ExitStack() as stack:
        if ids.shape[1] > 1:
            before = None if padding is None else padding[:, :-1]
            forward(model, ids[:, :-1], before, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = ids[:, -1:]
        stack.enter_context(around or nullcontext())
        for _ in range(steps):
            out = forward(model, token, padding, past_key_values=cache, use_cache=True)
            best = out.logits[:, -1].argmax(-1)
            if said:
                best = torch.where(done, said[-1], best)
            for end in ends:
                done |= best == end
            said.append(best)
            if bool(done.all()):
                said += [best] * (steps - len(said))
                break
            token = best[:, None]
            if padding is not None:
                padding = torch.nn.functional.pad(padding, (0, 1), value=True)
    return torch.stack(said, 1)
