"""Attention of one group of heads over what it holds: one token at a time, or a chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.attend import attend
from polyhead.attend.backends.sdpa import plain
from polyhead.attend.masks import Mask, causal, padding, prefix, sink, window
from polyhead.attend.normalizers import Normalizer, Softmax
from polyhead.attend.scores import Score
from polyhead.cache.dropped import Dropped, merged, running_means
from polyhead.cache.group import Group
from polyhead.cache.held import Held, HeldScore, of_heads, pointwise
from polyhead.cache.one_token import attend_one
from polyhead.cache.rows import Growing, Ring
from polyhead.cache.step import Step
from polyhead.errors import ConfigError, UnsupportedModel
from polyhead.hf import Call

__all__ = ["Before", "attend_to", "before", "decode", "prefill"]

_CAUSAL = causal()


@dataclass(frozen=True, eq=False)
class Before:
    """A copy of what a ring held when a chunk of several tokens came.

    Attributes:
        k, v: the rows, in the order of their tokens unless there is padding.
        index: which tokens they are, `(B or 1, n)`, -1: none.
        sinks: without padding, how many of the first rows are sinks.
        oldest: without padding, the token after those.
        dropped: what had been dropped.
    """

    k: Tensor
    v: Tensor
    index: Tensor
    sinks: int
    oldest: int
    dropped: Dropped | None


def before(rows: Growing | Ring) -> Before | None:
    """What `rows` hold; None if that is nothing, or everything."""
    if isinstance(rows, Growing) or not rows.seen or rows.keys is None or rows.values is None:
        return None
    device = rows.keys.device
    dropped = None if rows.dropped is None else rows.dropped.copy()
    if rows.counts is not None:
        held = slice(0, rows.used())
        index = rows.tokens(device).clone()
        return Before(rows.keys[:, :, held].clone(), rows.values[:, :, held].clone(), index, 0, 0, dropped)
    sinks, oldest = min(rows.sink, rows.seen), rows.oldest()
    index = torch.cat([torch.arange(sinks, device=device), torch.arange(oldest, rows.seen, device=device)])
    return Before(*rows.ordered(), index[None], sinks, oldest, dropped)


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
    q, score, normalizer = _parts(call, k, group, index)
    return attend(
        q, k, v, mask=mask, score=score, normalizer=normalizer, scale=call.scale, dropout=call.dropout
    )


def _parts(
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


def _is_plain(call: Call) -> bool:
    normalizer = call.normalizer
    return call.score is None and type(normalizer) is Softmax and normalizer.sink is None and not call.dropout


# -- one token at a time -------------------------------------------------------------------------------


def decode(call: Call, group: Group, step: Step) -> Tensor:
    """Attention of the newest token, whose row is in the memory already."""
    rows = group.rows
    if isinstance(rows, Growing):
        k, v = rows.view()
        if step.plain and step.reach is None:
            return _over(call, group, k, v, step.padding, None)
        return attend_to(call, k, v, _for_heads(call.mask, step, group, k), group)
    first, simple = _visible(group, step, rows)
    if simple and (rows.counts is None or rows.least >= rows.size):
        if rows.dropped is not None and rows.any_dropped():
            return _compensated(call, group, rows, None, first)
        k, v = rows.view(first)
        index = None if pointwise(call.score) else rows.tokens(k.device)[:, first:]
        return _over(call, group, k, v, None, index)
    k, v = rows.view()
    index = rows.tokens(k.device)
    if simple:
        mask: Mask = padding(index >= 0)
    else:
        mask = Held(call.mask, index, call.k.shape[2] - index.shape[1], group.index(k.device))
    if rows.dropped is not None and rows.any_dropped():
        return _compensated(call, group, rows, mask, 0)
    return attend_to(call, k, v, mask, group, index)


def _over(call: Call, group: Group, k: Tensor, v: Tensor, mask: Mask | None, index: Tensor | None) -> Tensor:
    if mask is None and _is_plain(call):
        return attend_one(group.of_queries(call.q), k, v, call.scale)
    return attend_to(call, k, v, mask, group, index)


def _visible(group: Group, step: Step, rows: Ring) -> tuple[int, bool]:
    """The first row that the newest token sees, and whether it sees all those after it."""
    horizon = group.keep.horizon
    if not step.plain:
        return 0, False
    if horizon is None:
        return 0, step.reach is None
    if step.reach is None or step.reach > horizon:
        if step.keys > horizon:
            raise ConfigError(
                f"the mask {step.mask!r} lets a query see further than the {horizon} tokens of the layer's "
                "own sliding window, and the cache keeps no more than these; leave the window in the mask"
            )
        return 0, rows.counts is None
    if rows.counts is not None or step.reach < horizon:
        return 0, False
    # sinks beyond the model's own window are not seen any more
    return min(rows.sink, max(0, step.keys - horizon)), True


def _for_heads(mask: Mask | None, step: Step, group: Group, k: Tensor) -> Mask | None:
    """The call's mask over all tokens, for the heads of the group."""
    if mask is None or group.all or step.plain:
        return mask
    return Held(mask, torch.arange(k.shape[2], device=k.device)[None], 0, group.index(k.device))


def _compensated(call: Call, group: Group, rows: Ring, mask: Mask | None, first: int) -> Tensor:
    """Attention over the rows and the one that stands for all that were dropped."""
    assert rows.dropped is not None
    if mask is None and _is_plain(call):
        k, v = rows.view(mean=True)
        log = rows.dropped.log_count(k.device)
        bias = k.new_zeros(log.numel(), 1, 1, k.shape[2])
        bias[..., -1] = log.view(-1, 1, 1)  # -inf where nothing was dropped
        return plain(group.of_queries(call.q), k, v, causal=False, scale=call.scale, allowed=bias)
    k, v = rows.view(first)
    index = rows.tokens(k.device)[:, first:]
    k_mean, v_mean = rows.dropped.means()
    log = rows.dropped.log_count(k.device)
    return _merge(call, group, k, v, mask, index, k_mean[:, :, None], v_mean[:, :, None], log.view(-1, 1))


def _merge(
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
    q, score, normalizer = _parts(call, k, group, index)
    out, lse = attend(
        q, k, v, mask=mask, score=score, normalizer=normalizer, scale=call.scale, return_lse=True
    )
    return merged(out, lse, q, k_mean, v_mean, log_count, call.scale, score)


# -- several tokens ------------------------------------------------------------------------------------


def prefill(
    call: Call, group: Group, step: Step, k: Tensor, v: Tensor, earlier: Before | None, dense: bool
) -> Tensor:
    """Attention of L new tokens with the keys `k` and values `v`, and of what was held before they came."""
    if isinstance(group.rows, Growing):
        held_k, held_v = group.rows.view()
        return attend_to(call, held_k, held_v, _for_heads(call.mask, step, group, held_k), group)
    keep = group.keep
    assert keep.window is not None
    mask, first, index = _chunk_mask(call, group, step, k, earlier, dense)
    if earlier is not None:
        k, v = torch.cat([earlier.k[:, :, first:], k], dim=2), torch.cat([earlier.v[:, :, first:], v], dim=2)
    if group.rows.dropped is None or not group.rows.any_dropped():
        return attend_to(call, k, v, mask, group, index)
    if dense:
        if earlier is None or earlier.dropped is None or not earlier.dropped.tensors():
            return attend_to(call, k, v, mask, group, index)
        means = (
            *(mean[:, :, None] for mean in earlier.dropped.means()),
            earlier.dropped.log_count(k.device).view(-1, 1),
        )
    else:
        tokens = _tokens(step, earlier, first, k.device)
        means = running_means(
            k, v, tokens, step, keep.sink, keep.window, None if earlier is None else earlier.dropped
        )
    return _merge(call, group, k, v, mask, index, *means)


def _tokens(step: Step, earlier: Before | None, first: int, device: torch.device) -> Tensor:
    """Which tokens the keys of a chunk are, `(B or 1, n)`: those held before, then the new ones."""
    new = torch.arange(step.keys - step.queries, step.keys, device=device)[None]
    if earlier is None:
        return new
    return torch.cat([earlier.index[:, first:], new.expand(len(earlier.index), -1)], dim=1)


def _chunk_mask(
    call: Call, group: Group, step: Step, k: Tensor, earlier: Before | None, dense: bool
) -> tuple[Mask | None, int, Tensor | None]:
    """The mask of a chunk over (rows held before from `first` on, new rows); `first`; which tokens these are.

    The tokens are None where the mask and the scores need not know them.
    """
    keep = group.keep
    assert keep.window is not None
    short: Mask = window(keep.window - 1) | sink(keep.sink) if keep.sink else window(keep.window - 1)
    simple = pointwise(call.score) and step.plain
    if earlier is None:  # all tokens so far are here
        if simple and (dense or keep.window == keep.horizon):
            return call.mask, 0, None
        if simple and step.real is None:
            return _and(call.mask, short), 0, None
        if simple and step.starts is not None:
            return _and(call.mask, window(keep.window - 1) | prefix(step.starts + keep.sink)), 0, None
    elif simple and step.real is None and step.reach == keep.horizon:
        if keep.horizon is None:
            # what lies between the sinks and the rest is not there: all else keeps its distance
            return (_CAUSAL if dense else _CAUSAL & short), 0, None
        reach = keep.horizon if dense else min(keep.horizon, keep.window)
        if earlier.sinks == 0 or step.keys - step.queries - keep.horizon >= earlier.sinks - 1:
            return window(reach - 1), earlier.sinks, None  # no query sees a sink any more
    index = _tokens(step, earlier, 0, k.device)
    mask = Held(
        call.mask,
        index,
        step.keys - index.shape[1],
        group.index(k.device),
        step.ranks,
        keep.sink,
        None if dense else keep.window,
    )
    return mask, 0, index


def _and(mask: Mask | None, other: Mask) -> Mask:
    return other if mask is None else mask & other
