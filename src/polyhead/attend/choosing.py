"""What a selector chooses in a call, and the calls that it cannot choose for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.attend.masks import Chosen, Mask
from polyhead.attend.normalizers import Normalizer, Softmax
from polyhead.attend.scores import Score
from polyhead.attend.selectors import Correcting, Recalling, Selector, Summaries, choose
from polyhead.checks import given
from polyhead.errors import ConfigError

__all__ = ["check_correctable", "check_shown", "choice", "resolved"]


def choice(
    q: Tensor,
    k: Tensor,
    mask: Mask | None,
    select: Selector | None,
    scale: float | None,
    summaries: Summaries | None = None,
    score: Score | None = None,
    normalizer: Normalizer | None = None,
) -> Chosen:
    """The blocks that a selector chooses in this call, as a mask.

    `summaries` keep what is derived of the keys, for the next call. `score` and `normalizer` are those of the
    call, for selectors that measure what it gives to keys; None: no maps, softmax.
    """
    if isinstance(select, Recalling):
        summaries = select.summaries
        select = select.selector
    if not isinstance(select, Selector):
        raise ConfigError(
            f"select must be a selector such as select(mean_keys(), keep_share(0.1)), got {given(select)}"
        )
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if torch.compiler.is_compiling():
        from polyhead.attend.opaque_choice import choose_opaque  # imports the compiler, which is here already

        return choose_opaque(select, q, k, mask, scale, score, normalizer)
    return choose(select, q, k, mask, scale, summaries, score, normalizer)


def resolved(
    q: Tensor,
    k: Tensor,
    mask: Mask | None,
    select: Selector | None,
    scale: float | None,
    score: Score | None = None,
    normalizer: Normalizer | None = None,
) -> Mask:
    """A mask with the blocks that a selector chooses in this call; see `choice`."""
    found = choice(q, k, mask, select, scale, None, score, normalizer)
    return found if mask is None else mask & found


def check_correctable(
    select: Selector,
    score: object,
    normalizer: Normalizer,
    weight_map: object,
    dropout: float,
    return_lse: bool = False,
) -> None:
    """Raise a `ConfigError` if a call has more than plain softmax, and its selector corrects the output."""
    if not isinstance(select, Correcting):
        return
    plain_softmax = type(normalizer) is Softmax and normalizer.sink is None
    for name, wrong in (
        ("score", bool(score)),
        ("normalizer", not plain_softmax),
        ("weight_map", bool(weight_map)),
        ("dropout", bool(dropout)),
        ("return_lse", return_lse),
    ):
        if wrong:
            raise ConfigError(
                f"select: {type(select).__name__.lower()} corrects the output of plain softmax, and takes no "
                f"{name}; leave it out, or use the selector that is corrected"
            )


def check_shown(select: Selector | None) -> None:
    """Raise a `ConfigError` if weights are asked for, and they would not be all that makes the output."""
    if isinstance(select, Correcting):
        raise ConfigError(
            f"select: {type(select).__name__.lower()} corrects the output, which is made of more than these "
            "weights; use the selector that is corrected to see what is read"
        )
