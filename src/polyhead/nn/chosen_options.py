"""Mask, score and normaliser of a call, for some of its heads and rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyhead.attend.function import attend
from polyhead.attend.masks import And, Documents, Mask, Not, Or, Padding, Prefix, Window, gathered
from polyhead.attend.scores import GatheredScore
from polyhead.nn.chosen_rows import Group
from polyhead.nn.kv_cache.places import PlacedMask, place_score, place_weight_map

__all__ = ["attend_one", "of_first", "of_lanes", "of_range", "of_rows"]

Options = dict[str, Any]

# So few keys are copied for the heads of a token: calls of their own would cost more.
_FEW_KEYS = 256


def of_lanes(
    options: Options, group: Group, positions: Tensor, first: int, total: int, start: int
) -> Options:
    """The options of a call for the lanes of a group.

    Args:
        options: those of the whole call: `mask` and `score`, each perhaps None, and others.
        group: the lanes; one alone where there is a score.
        positions: where the rows stand, int64 `(lanes, rows)`.
        first: the head that the lanes count from.
        total: heads of the whole call.
        start: where the call of the group puts its first row.
    """
    if options["mask"] is None and options["score"] is None and "normalizer" not in options:
        return options
    heads = group.at("head") + first
    found = _normalized(options, heads, total)
    if options["mask"] is not None:
        found["mask"] = gathered(options["mask"], positions, items=group.at("item"), heads=heads, first=start)
    if options["score"] is not None:
        (lane,) = group.lanes
        found["score"] = GatheredScore(options["score"], positions[0], first + lane.head, total, lane.item)
    return found


def of_first(options: Options, heads: int, total: int) -> Options:
    """The options of a call for the first `heads` heads of `total`."""
    return of_range(options, 0, heads, total)


def of_range(options: Options, start: int, stop: int, total: int) -> Options:
    """The options of a call for the heads `start` to `stop` - 1 of `total`."""
    if (start, stop) == (0, total):
        return options
    found = _normalized(options, slice(start, stop), total)
    mask = options["mask"]
    if mask is not None and not _same_for_heads(mask):
        found["mask"] = gathered(mask, heads=torch.arange(start, stop) if start else None)
    if options["score"] is not None:
        found["score"] = GatheredScore(options["score"], None, start, total)
    return found


class RowsMask(PlacedMask):
    """The mask of a call for some of its queries; it was checked for all of them."""

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        pass


def of_rows(options: Options, start: int, count: int, total: int, lacking: int = 0) -> Options:
    """The options of a call for `count` queries from the `start`-th on, of `total`.

    Args:
        lacking: how many of the last keys are left out.

    That the mask fits the whole call is taken for granted.
    """
    if count == total:
        return options
    shift, found = start + count - total + lacking, dict(options)
    if options["mask"] is not None:
        found["mask"] = RowsMask(options["mask"], torch.tensor(shift))
    if options["score"] is not None:
        found["score"] = place_score(options["score"], shift=shift, keys=None)
    if "weight_map" in options:
        found["weight_map"] = place_weight_map(options["weight_map"], shift=shift, keys=None)
    return found


def attend_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: list[int],
    heads: list[int],
    item: int,
    total: int,
    options: Options,
) -> Tensor:
    """Attention of one token's chosen heads, `(1, n, 1, Dv)`.

    Args:
        q: queries `(1, n, 1, D)`.
        k, v: of the token's batch item, `(G, S, ·)`.
        reads: the key/value head of each query.
        heads: the head that each query is, of `total` heads.
        item: the batch item.
        options: those of the whole call.
    """
    plain = options["mask"] is None and options["score"] is None and "normalizer" not in options
    if plain and k.shape[1] <= _FEW_KEYS:
        return attend(q, k[reads][None], v[reads][None], **options)
    outs = []
    for n, (head, read) in enumerate(zip(heads, reads, strict=True)):
        own = options
        if not plain:
            one = torch.tensor([head], device=q.device)
            own = _normalized(options, one, total)
            if options["mask"] is not None:
                at = torch.tensor([item], device=q.device)
                own["mask"] = gathered(options["mask"], items=at, heads=one)
            if options["score"] is not None:
                own["score"] = GatheredScore(options["score"], None, head, total, item)
        outs.append(attend(q[:, n : n + 1], k[None, read : read + 1], v[None, read : read + 1], **own))
    return torch.cat(outs, dim=1)


def _normalized(options: Options, heads: slice | Tensor, total: int) -> Options:
    """The options, with the share of these heads in what the normaliser holds for every head."""
    if "normalizer" not in options:
        return dict(options)

    def share(held: Tensor) -> Tensor:
        return held[heads] if held.ndim == 1 and len(held) == total else held

    return options | {"normalizer": options["normalizer"].map_tensors(share)}


def _same_for_heads(mask: Mask) -> bool:
    """Whether a mask is known not to tell heads apart, nor to ask how many there are."""
    if isinstance(mask, And | Or):
        return all(map(_same_for_heads, mask.terms))
    if isinstance(mask, Not | PlacedMask):
        return _same_for_heads(mask.mask)
    return isinstance(mask, Window | Prefix | Padding | Documents)
