"""What `attend` is told for one group of heads: its queries, its mask, its score and normaliser."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend import attend
from polyhead.attend.masks import Mask
from polyhead.attend.normalizers import Normalizer, Softmax
from polyhead.attend.scores import Score
from polyhead.cache.dropped import merged
from polyhead.cache.group import Group
from polyhead.cache.held import Held, HeldScore, of_heads, pointwise
from polyhead.cache.step import Step
from polyhead.errors import UnsupportedModel
from polyhead.hf import Call

__all__ = ["attend_to", "attend_with_mean", "for_heads", "is_plain"]


def attend_to(
    call: Call,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    group: Group | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """`attend` of the call's queries, or of the group's, over given keys.

    `index` `(B or 1, n)` says which tokens the keys are, where they are not the tokens 0..S-1.
    """
    q, score, normalizer = parts(call, k, group, index)
    return attend(
        q, k, v, mask=mask, score=score, normalizer=normalizer, scale=call.scale, dropout=call.dropout
    )


def parts(
    call: Call, k: Tensor, group: Group | None, index: Tensor | None
) -> tuple[Tensor, Score | None, Normalizer]:
    """The queries, the score and the normaliser of a group, for its keys."""
    if group is None or (group.all and index is None):
        return call.q, call.score, call.normalizer
    heads, total = group.index(k.device), call.q.shape[1]
    score, normalizer = call.score, call.normalizer
    if score is not None and not pointwise(score):
        tokens = torch.arange(k.shape[2], device=k.device)[None] if index is None else index
        score = HeldScore(score, tokens, call.k.shape[2] - k.shape[2], heads, total)
    if heads is not None and normalizer.tensors():
        normalizer = of_heads(normalizer, heads, total)
    return group.of_queries(call.q), score, normalizer


def is_plain(call: Call) -> bool:
    """Whether the call is softmax attention and nothing else, up to its mask."""
    normalizer = call.normalizer
    return call.score is None and type(normalizer) is Softmax and normalizer.sink is None and not call.dropout


def for_heads(mask: Mask | None, step: Step, group: Group, k: Tensor) -> Mask | None:
    """The call's mask over all tokens, for the heads of the group."""
    if mask is None or group.all or step.plain:
        return mask
    return Held(mask, torch.arange(k.shape[2], device=k.device)[None], 0, group.index(k.device))


def attend_with_mean(
    call: Call,
    group: Group,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    index: Tensor | None,
    k_mean: Tensor,
    v_mean: Tensor,
    log_count: Tensor,
) -> Tensor:
    """Attention over `k` and `v` and one token more for each query, as `merged` takes it."""
    if type(call.normalizer) is not Softmax or not pointwise(call.score):
        raise UnsupportedModel(
            "compensate=True goes with softmax and scores that look at the logit alone; "
            f"{call.layer.name!r} has {call.normalizer} and {call.score}; make the cache with "
            "compensate=False"
        )
    q, score, normalizer = parts(call, k, group, index)
    out, lse = attend(
        q, k, v, mask=mask, score=score, normalizer=normalizer, scale=call.scale, return_lse=True
    )
    return merged(out, lse, q, k_mean, v_mean, log_count, call.scale, score)
