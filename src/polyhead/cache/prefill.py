"""Several tokens at a time: attention of a chunk over what was held before it, and over itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.attend.masks import Mask, causal, prefix, sink, window
from polyhead.cache.dropped import Dropped, running_means
from polyhead.cache.group import Group
from polyhead.cache.held import Held, pointwise
from polyhead.cache.reading import attend_to, attend_with_mean, for_heads
from polyhead.cache.ring import Ring
from polyhead.cache.rows import Growing
from polyhead.cache.step import Step
from polyhead.hf import Call

__all__ = ["Before", "before", "prefill"]

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


def prefill(
    call: Call, group: Group, step: Step, k: Tensor, v: Tensor, earlier: Before | None, dense: bool
) -> Tensor:
    """Attention of L new tokens with the keys `k` and values `v`, and of what was held before they came."""
    if isinstance(group.rows, Growing):
        held_k, held_v = group.rows.view()
        return attend_to(call, held_k, held_v, for_heads(call.mask, step, group, held_k), group)
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
    return attend_with_mean(call, group, k, v, mask, index, *means)


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
