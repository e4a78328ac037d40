"""One query a head by the keys that were chosen for it: the step of decoding.

The blocks that any head of a group chose are gathered once for the group, and what a head did not choose is
hidden from it, so that a key is read once and not once a head. Where they are most of all blocks, keys are
read where they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.attend.few_rows import few_rows
from polyhead.attend.fused_cpu import HIDDEN, unfit
from polyhead.attend.masks import Chosen, Mask, all_of, runs_of_last, terms_of
from polyhead.attend.pieces import split
from polyhead.attend.plan import Request
from polyhead.attend.precision import wide

__all__ = ["attend_row", "pays"]

_MOST = 0.4  # of the blocks: gathering more, a copy, takes longer than reading all of them
_BYTES = 1 << 24  # of keys and values that are gathered at a time: more does not stay near a core
_MANY = 512  # keys: fewer are read as quickly as some of them are found


def pays(request: Request) -> bool:
    """Whether the call is one query by chosen blocks of many keys: reading them all is slower then."""
    found = split(request.problem.mask)
    return (
        request.q.shape[2] == 1
        and request.k.shape[2] >= _MANY
        and found is not None
        and found[0].cols <= request.k.shape[2]
        and not request.needs_grad
        and not unfit(request)
    )


def attend_row(
    q: Tensor, k: Tensor, v: Tensor, choice: Chosen, rest: Mask | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `(B, H, 1, D)` and log-sum-exp `(B, H, 1)`, without gradients.

    Args:
        q, k, v: `(B, H, 1, D)` and `(B, G, S, D)`, S at least the length of a block.
        choice: the blocks that each head reads.
        rest: what else hides keys.
        scale: factor of q·k.
    """
    batch, heads, _, width = q.shape
    kv_heads, keys, cols = k.shape[1], k.shape[2], choice.cols
    blocks, repeat, device = -(-keys // cols), heads // kv_heads, q.device
    rest = _hiding(rest, keys)
    grouped = _table(choice.index, blocks).expand(batch, heads, -1).unflatten(1, (kv_heads, repeat))
    either = grouped.any(2)  # (B, G, N)
    counts = either.sum(-1).flatten().tolist()
    most = max(counts)
    everything = most > _MOST * blocks
    if everything:
        j = torch.arange(keys, device=device)
        added = _for_keys(grouped, cols, wide(q.dtype))[..., :keys]
    else:
        # the chosen blocks come first, others behind them where groups chose unequally many
        index = either.to(torch.uint8).topk(max(most, 1), dim=-1).indices
        start = (index * cols).clamp(max=keys - cols)  # the last block reaches back for a whole one,
        read = grouped.gather(-1, index[:, :, None].expand(-1, -1, repeat, -1))
        added = _for_keys(read, cols, wide(q.dtype))
        within = torch.arange(cols, device=device)
        if keys % cols:  # whose first keys are not its own
            others = (index == blocks - 1)[:, :, None, :, None] & (within < blocks * cols - keys)
            added.unflatten(-1, (-1, cols)).masked_fill_(others, HIDDEN)
        j = (start[..., None] + within).flatten(2)[:, :, None]
    if rest is not None:
        b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        h = torch.arange(heads, device=device).view(kv_heads, repeat, 1)
        i = torch.full((1, 1), keys - 1, device=device)
        added = added.masked_fill(~rest.allowed(b, h, i, j), HIDDEN)
    added = added.flatten(0, 1)
    queries = q.reshape(batch * kv_heads, repeat, width)
    if everything:
        all_keys, all_values = ((x if x.stride(3) == 1 else x.contiguous()).flatten(0, 1) for x in (k, v))
        out, lse = few_rows(queries, all_keys, all_values, added, scale)
    else:
        runs = [_Runs(x, cols) for x in (k, v)]
        step = max(1, _BYTES // (2 * max(most, 1) * cols * width * k.element_size()))
        found = []
        for at in range(0, len(counts), step):
            n = max(1, *counts[at : at + step])
            gathered = [x.at(start, slice(at, at + step), n) for x in runs]
            part = added[at : at + step, ..., : n * cols]
            found.append(few_rows(queries[at : at + step], gathered[0], gathered[1], part, scale))
        out, lse = (torch.cat(parts) for parts in zip(*found, strict=True))
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3])
    nothing = lse < HIDDEN / 2
    return out.masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, -math.inf)


def _hiding(mask: Mask | None, keys: int) -> Mask | None:
    """What of a mask hides anything from the last query, which may look at all that lies before."""
    return all_of(term for term in terms_of(mask) if runs_of_last(term, keys) != [(0, keys)])


def _table(index: Tensor, blocks: int) -> Tensor:
    """Which blocks are listed in `(B, H, 1, K)`, bool `(B, H, blocks)`."""
    listed = index[:, :, 0]
    table = torch.zeros(*listed.shape[:2], blocks + 1, dtype=torch.bool, device=index.device)
    return table.scatter_(-1, torch.where(listed < 0, blocks, listed), True)[..., :blocks]


def _for_keys(read: Tensor, cols: int, dtype: torch.dtype) -> Tensor:
    """What goes to the scores of the keys of blocks, of which `(..., n)` are read: `(..., n·C)`."""
    return (~read).to(dtype).mul_(HIDDEN).repeat_interleave(cols, -1)


class _Runs:
    """`(B, G, S, D)` as all its runs of `cols` rows, so that a block is one copy wherever it starts."""

    def __init__(self, x: Tensor, cols: int) -> None:
        self.width, self.cols = x.shape[3], cols
        apart = any(x.stride(n) % self.width for n in (0, 1) if x.shape[n] > 1)
        if x.stride(3) != 1 or x.stride(2) != self.width or apart:
            x = x.contiguous()
        last = sum((size - 1) * step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True))
        strides = (self.width, self.width, 1)
        self.runs = x.as_strided((last // self.width + 2 - cols, cols, self.width), strides)
        own = torch.arange(x.shape[0], device=x.device)[:, None] * (x.stride(0) // self.width)
        self.base = own + torch.arange(x.shape[1], device=x.device) * (x.stride(1) // self.width)
        self.held: Tensor | None = None

    def at(self, start: Tensor, groups: slice, count: int) -> Tensor:
        """`count` runs of some of the B·G groups, from `start` `(B, G, n)` on: `(m, count·cols, D)`.

        What was given before is written over, so that memory stays in the cache of a core.
        """
        place = (self.base[..., None] + start).flatten(0, 1)[groups, :count]
        rows = place.numel()
        if self.held is None or len(self.held) < rows:
            self.held = self.runs.new_empty(rows, self.cols, self.width)
        into = self.held[:rows]
        torch.index_select(self.runs, 0, place.flatten(), out=into)
        return into.view(len(place), -1, self.width)
