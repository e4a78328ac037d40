"""Masks that part the queries in groups which see the same keys: every group is a small dense call.

Blocks of a sequence, blocks and lattices of a grid, blocks with a halo: the queries of a group and the keys
that it sees are gathered, and all groups together are one batch of SDPA. Other masks and biases by place are
written out within the groups. O(L · keys of a group) memory where there are any, O(L) else.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.masks import Blocks, Chosen, Mask, OnGrid, all_of, terms_of
from polyhead.attend.plan import Request
from polyhead.attend.precision import wide
from polyhead.attend.refusals import beyond_softmax
from polyhead.attend.scores import Chain, GatheredScore, Positional, Score, WindowBias

__all__ = ["Grouped"]

_PAIRS = 1 << 16  # of fewer, a call is written out; see sdpa
_MOST = 0.5  # of all pairs: where the groups hold more, gathering saves too little


class Grouped:
    """Plain softmax where queries in groups see the same keys, with other masks and biases by place."""

    name = "grouped"
    dense = False
    opt_in = ""

    def refuse(self, request: Request) -> str:
        q, k, problem = request.q, request.k, request.problem
        found = _split(problem.mask)
        if found is None:
            return f"{problem.mask} does not part queries in groups that see the same keys"
        if problem.score is not None and not _by_place(problem.score):
            return f"it has biases by place alone, and the call has {problem.score}"
        reason = beyond_softmax(request, score=True)
        if reason:
            return reason
        if 0 in (*q.shape, *k.shape, *request.v.shape):
            return "it does not define attention over nothing"
        if q.shape[2] != k.shape[2]:
            return f"it takes whole sequences, and the call has {q.shape[2]} queries and {k.shape[2]} keys"
        if q.shape[2] * k.shape[2] <= _PAIRS:
            return "so few pairs are done with sooner in one call"
        rows, cols = _groups(found[0], k.shape[2])
        if rows.numel() * cols.shape[1] > _MOST * k.shape[2] ** 2:
            return f"{len(rows)} groups of {rows.shape[1]} queries and {cols.shape[1]} keys save too little"
        return ""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        q, k, v, problem = request.q, request.k, request.v, request.problem
        found = _split(problem.mask)
        assert found is not None
        own, rest = found
        rows, cols = (x.to(q.device) for x in _groups(own, k.shape[2]))
        if problem.score is not None:
            q, k, v = (x.to(wide(x.dtype)) for x in (q, k, v))
        allowed = _allowed(rows, cols, rest, q.shape[0], q.shape[1])
        alive = None
        if allowed is not None:
            # a row that may look at nothing: SDPA leaves it undefined
            alive = allowed.any(-1, keepdim=True)
            allowed = allowed | ~alive
        added = allowed
        if problem.score is not None:
            bias = _bias(problem.score, rows, cols, 0, q.shape[1]).transpose(0, 1).to(q.dtype)  # n H R K
            added = bias if allowed is None else torch.where(allowed, bias, -torch.inf)
        if added is not None:
            added = added.expand(q.shape[0], *added.shape[-4:]).flatten(0, 1)
        out = F.scaled_dot_product_attention(
            _gathered(q, rows),
            _gathered(k, cols),
            _gathered(v, cols),
            attn_mask=added,
            scale=problem.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        out = out.unflatten(0, (q.shape[0], -1))  # B n H R Dv
        if alive is not None:
            out = torch.where(alive, out, 0.0)
        return _returned(out, rows, k.shape[2]).to(request.q.dtype), None


def _split(mask: Mask | None) -> tuple[OnGrid | Blocks, Mask | None] | None:
    """The mask that makes the groups, and the rest; None where there is none, or where blocks are chosen."""
    terms = terms_of(mask)
    if any(isinstance(term, Chosen) for term in terms):
        return None
    for n, term in enumerate(terms):
        if isinstance(term, OnGrid) or (isinstance(term, Blocks) and not isinstance(term.start, Tensor)):
            return term, all_of(terms[:n] + terms[n + 1 :])
    return None


def _groups(mask: OnGrid | Blocks, length: int) -> tuple[Tensor, Tensor]:
    """Queries `(n, R)` and keys `(n, K)` of every group, -1 for none; every query is in one."""
    if isinstance(mask, Blocks):
        assert isinstance(mask.start, int)
        first = mask.start % mask.size
        start = torch.arange(first - mask.size if first else 0, length, mask.size)
        rows = start[:, None] + torch.arange(mask.size)
        rows = rows.masked_fill((rows < 0) | (rows >= length), -1)
        return rows, rows
    grid = (length,) if mask.grid is None else mask.grid
    rows, cols = mask.groups(0, grid[0])
    for axis in range(1, len(grid)):
        more = mask.groups(axis, grid[axis])
        rows, cols = (_crossed(a, b, grid[axis]) for a, b in ((rows, more[0]), (cols, more[1])))
    rows, cols = (x.masked_fill(x >= length, -1) for x in (rows, cols))
    filled = (rows >= 0).any(1)
    return rows[filled], cols[filled]


def _crossed(outer: Tensor, inner: Tensor, length: int) -> Tensor:
    """Groups of the places y · length + x, for y of a group of `outer` and x of one of `inner`."""
    y, x = outer[:, None, :, None], inner[None, :, None, :]
    place = torch.where((y < 0) | (x < 0), -1, y * length + x)
    return place.flatten(2).flatten(0, 1)


def _allowed(rows: Tensor, cols: Tensor, rest: Mask | None, batch: int, heads: int) -> Tensor | None:
    """What a group sees of its keys, `(B or 1, n, H or 1, R or 1, K)`; None: all."""
    there = None if bool((cols >= 0).all()) else (cols >= 0)[None, :, None, None]
    if rest is None:
        return there
    b = torch.arange(batch, device=rows.device).view(-1, 1, 1, 1, 1)
    h = torch.arange(heads, device=rows.device).view(-1, 1, 1)
    i, j = rows.clamp(min=0)[:, None, :, None], cols.clamp(min=0)[:, None, None]
    seen = rest.allowed(b, h, i, j)
    seen = seen if there is None else seen & there
    seen = seen[(None,) * (5 - seen.ndim)]
    return seen.expand(-1, len(rows), -1, -1, cols.shape[1])


def _by_place(score: Score) -> bool:
    if isinstance(score, Chain):
        return all(map(_by_place, score.scores))
    if isinstance(score, GatheredScore):
        return score.positions is None and _by_place(score.score)
    return isinstance(score, Positional | WindowBias)


def _bias(score: Score, rows: Tensor, cols: Tensor, first: int, last: int) -> Tensor:
    """The bias of some heads in every group, `(heads or 1, n, R, K)`."""
    if isinstance(score, Chain):
        return reduce(torch.add, [_bias(one, rows, cols, first, last) for one in score.scores])
    if isinstance(score, GatheredScore):
        return _bias(score.score, rows, cols, score.head + first, score.head + last)
    i, j = rows.clamp(min=0)[:, :, None], cols.clamp(min=0)[:, None]
    if isinstance(score, WindowBias):
        return score.between(i, j, first, last)
    assert isinstance(score, Positional)
    distances, at = (i - j).unique(return_inverse=True)
    found = score.at(distances)
    return (found if found.shape[0] == 1 else found[first:last])[:, at]


def _gathered(x: Tensor, groups: Tensor) -> Tensor:
    """`(B, H, L, D)` as `(B·n, H, R, D)`."""
    found = x.index_select(2, groups.clamp(min=0).view(-1)).unflatten(2, groups.shape)
    return found.transpose(1, 2).flatten(0, 1)


def _returned(out: Tensor, rows: Tensor, length: int) -> Tensor:
    """`(B, n, H, R, D)` as `(B, H, L, D)`."""
    real = (rows >= 0).view(-1).nonzero().view(-1)
    back = torch.empty(length, dtype=torch.int64, device=rows.device)
    back[rows.view(-1)[real]] = real
    return out.transpose(1, 2).flatten(2, 3).index_select(2, back)
