"""One token at a time: attention over the rows that are held, none of which is copied."""

from __future__ import annotations

from torch import Tensor

from polyhead.attend.backends.sdpa import plain
from polyhead.attend.masks import Mask, padding
from polyhead.cache.group import Group
from polyhead.cache.held import Held, pointwise
from polyhead.cache.reading import attend_to, attend_with_mean, for_heads, is_plain
from polyhead.cache.ring import Ring
from polyhead.cache.rows import Growing
from polyhead.cache.step import Step
from polyhead.errors import ConfigError
from polyhead.hf import Call

__all__ = ["decode"]


def decode(call: Call, group: Group, step: Step) -> Tensor:
    """Attention of the newest token, whose row is in the memory already."""
    rows = group.rows
    if isinstance(rows, Growing):
        k, v = rows.view()
        if step.plain and step.reach is None:
            return _over(call, group, k, v, step.padding, None)
        return attend_to(call, k, v, for_heads(call.mask, step, group, k), group)
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
    if mask is None and is_plain(call):
        return plain(group.of_queries(call.q), k, v, causal=False, scale=call.scale)
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


def _compensated(call: Call, group: Group, rows: Ring, mask: Mask | None, first: int) -> Tensor:
    """Attention over the rows and the one that stands for all that were dropped."""
    assert rows.dropped is not None
    if mask is None and is_plain(call):
        k, v = rows.view(mean=True)
        log = rows.dropped.log_count(k.device)
        bias = k.new_zeros(log.numel(), 1, 1, k.shape[2])
        bias[..., -1] = log.view(-1, 1, 1)  # -inf where nothing was dropped
        return plain(group.of_queries(call.q), k, v, causal=False, scale=call.scale, allowed=bias)
    k, v = rows.view(first)
    index = rows.tokens(k.device)[:, first:]
    k_mean, v_mean = rows.dropped.means()
    log = rows.dropped.log_count(k.device)
    return attend_with_mean(
        call, group, k, v, mask, index, k_mean[:, :, None], v_mean[:, :, None], log.view(-1, 1)
    )
