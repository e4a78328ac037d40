"""A mask of its own for every head: heads in a row that have the same one are a call of their own.

The tile engine reads, for all heads together, what any of them sees. Heads with different windows or shards
of the context see little each and much together; apart, each of them reads its own alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from polyhead.attend.masks import Mask, PerHead, Window, all_of, some_of, terms_of
from polyhead.attend.plan import Backend, Request, pick
from polyhead.attend.scores import GatheredScore
from polyhead.attend.stream import of_heads

__all__ = ["ByHead"]

_PAIRS = 1 << 16  # of fewer, a call is written out; see sdpa


class ByHead:
    """Masks that differ from head to head: one call for all heads in a row that have the same.

    Args:
        others: the backends of those calls.
    """

    name = "by_head"
    dense = False
    opt_in = ""

    def __init__(self, others: tuple[Backend, ...]) -> None:
        self.others = others

    def refuse(self, request: Request) -> str:
        problem = request.problem
        found = _own(problem.mask)
        if found is None:
            return f"{problem.mask} is not one mask for every head, joined by & with others"
        if len(dict.fromkeys(found[0].masks)) == 1:
            return "all heads have the same mask"
        if problem.weight_map is not None and problem.weight_map.whole_heads:
            return f"{problem.weight_map} needs all heads at once"
        if problem.score is not None and not problem.score.positional:
            return f"it gives heads a share of biases alone, and {problem.score} is more"
        if problem.weight_map is not None:
            return f"it has no maps of the weights, and the call has {problem.weight_map}"
        if request.q.shape[2] * request.k.shape[2] <= _PAIRS:
            return "so few pairs are done with sooner in one call"
        return ""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        parts = [pick(part, self.others, "auto").run(part) for part in _parts(request)]
        outs, masses = zip(*parts, strict=True)
        lse = torch.cat([x for x in masses if x is not None], 1) if request.want_lse else None
        return torch.cat(outs, 1), lse


def _own(mask: Mask | None) -> tuple[PerHead, tuple[Mask, ...]] | None:
    """The one mask by head, and the rest; None if there is none, or more than one."""
    found = [term for term in terms_of(mask) if isinstance(term, PerHead)]
    if len(found) != 1:
        return None
    return found[0], tuple(term for term in terms_of(mask) if term is not found[0])


def _parts(request: Request) -> Iterator[Request]:
    """The call of each run of heads."""
    q, k, v, problem = request.q, request.k, request.v, request.problem
    found = _own(problem.mask)
    assert found is not None
    own, rest = found
    heads, first = q.shape[1], 0
    for mask, run in groupby(own.masks):
        last = first + len(list(run))
        terms = (mask, *(some_of(term, heads=torch.arange(first, last)) for term in rest))
        score = problem.score
        kv = _kv_heads(first, last, heads // k.shape[1])
        yield replace(
            request,
            q=q[:, first:last],
            k=k[:, kv],
            v=v[:, kv],
            problem=replace(
                problem,
                mask=_joined(terms),
                score=None if score is None else GatheredScore(score, None, first, heads),
                normalizer=of_heads(problem.normalizer, slice(first, last), heads),
            ),
        )
        first = last


def _joined(terms: tuple[Mask, ...]) -> Mask | None:
    """All terms but those that allow everything."""
    return all_of(t for t in terms if not (isinstance(t, Window) and t.left is None and t.right is None))


def _kv_heads(first: int, last: int, repeat: int) -> slice | list[int]:
    """The key/value heads of query heads `first` to `last` - 1, one for each where they do not fit."""
    low, high = first // repeat, (last - 1) // repeat + 1
    if high - low == 1 or (first % repeat == 0 and last % repeat == 0):
        return slice(low, high)
    return [h // repeat for h in range(first, last)]
