"""Tokens with a role: read for ever, until the next one that is, or for a while."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.tile import Tile
from polyhead.attend.weight_maps import WeightMap
from polyhead.checks import floating

__all__ = ["NEVER", "RoleWeights", "Spans", "kept_pairs", "spans_of", "stops_of"]

NEVER = 1 << 40  # the end of a token that is read for ever


@dataclass(frozen=True, eq=False)
class Spans:
    """What follows from roles `(B, G, S, 3)` about who is read until when.

    Attributes:
        roles: one-hot, 0: global, 1: local, 2: sliding; none where there is no token.
        passed: `(B, G, S + 1)`, global tokens before each place.
        next: int64 `(B, G, S)`, place of the first global token after each one; S where there is none.
        ender: `(B, G, S)`, how global that one is: 1, or 0 where there is none; its gradient is its own.
    """

    roles: Tensor
    passed: Tensor
    next: Tensor
    ender: Tensor


def spans_of(roles: Tensor) -> Spans:
    """The `Spans` of roles `(B, G, S, 3)`."""
    marks = roles[..., 0]
    length = marks.shape[-1]
    places = torch.arange(length, device=roles.device)
    ahead = torch.where(marks.detach() > 0, places, length)
    ahead = F.pad(ahead[..., 1:], (0, min(length, 1)), value=length)
    following = ahead.flip(-1).cummin(-1).values.flip(-1) if length else ahead
    ender = F.pad(marks, (0, 1)).gather(-1, following)
    return Spans(roles, F.pad(marks.cumsum(-1), (1, 0)), following, ender)


def stops_of(spans: Spans, places: Tensor, window: int) -> Tensor:
    """int64 `(B, G, S)`: the first place in the sequence that does not read the token any more.

    Args:
        spans: of the tokens.
        places: int64 that broadcasts to `(B, G, S)`, where they stand.
        window: W, tokens after itself that read a sliding one.
    """
    last = places.expand(spans.next.shape)
    end = F.pad(last + 1, (0, 1), value=NEVER).gather(-1, spans.next)
    kind = spans.roles.detach()
    stop = torch.where(kind[..., 1] > 0, end, torch.where(kind[..., 2] > 0, last + window + 1, NEVER))
    return torch.where(kind.sum(-1) > 0, stop, -1)


class RoleWeights(WeightMap):
    """w_ij ← M_ij w_ij / Σ_m M_im w_im: the softmax over what roles let be read; roles get a gradient.

        M_ij = T_j0 + T_j1 Π_{j<m<i} (1 - T_m0) + T_j2 [i - j <= W]

    Attributes:
        roles, passed, ender: of `Spans`, `(B, G, ...)`.
        window: W.
        repeat: query heads of a key/value head.
    """

    roles: Tensor
    passed: Tensor
    ender: Tensor
    window: int
    repeat: int

    def __post_init__(self) -> None:
        floating("roles", self.roles, 4, "(B, G, S, 3)")

    def apply(self, weights: Tensor, tile: Tile) -> Tensor:
        heads = torch.arange(tile.head_start, tile.head_start + weights.shape[1], device=weights.device)
        groups, own = heads // self.repeat, tile.batch_slice
        roles = self.roles[own][:, groups][:, :, tile.key_index].to(weights)
        passed = self.passed[own][:, groups].to(weights)
        ender = self.ender[own][:, groups][:, :, tile.key_index].to(weights)[:, :, None]
        i, j = tile.i, tile.j
        # of the product, which of the factors are zero: none, and it falls by each that becomes one; or one,
        # and it rises as that one falls; or more, and nothing changes it
        between = passed[..., tile.rows, None] - passed[..., None, tile.cols + 1]
        with torch.no_grad():
            none, one = between == 0, between == 1
        open_ = torch.where(none, 1 - between, torch.where(one, 1 - ender, torch.zeros_like(between)))
        open_ = torch.where(i == j, torch.ones_like(open_), open_)
        near = (i - j <= self.window).to(weights)
        kinds = roles[:, :, None]
        seen = weights * (kinds[..., 0] + kinds[..., 1] * open_ + kinds[..., 2] * near)
        total = seen.sum(-1, keepdim=True)
        return seen / total.clamp(min=torch.finfo(total.dtype).tiny)


def kept_pairs(spans: Spans, window: int, real: Tensor | None) -> Tensor:
    """Σ_ij M_ij over real queries, for the keys that have a role, `(B, G)`; in O(S)."""
    roles, length = spans.roles, spans.roles.shape[2]
    rows = roles.new_ones(1, 1, length) if real is None else real[:, None].to(roles.dtype)
    count = F.pad(rows.cumsum(-1), (1, 0))  # real rows before each place
    before, after = count[..., :-1], spans.passed[..., 1:]
    met = F.pad((rows * spans.passed[..., :-1]).cumsum(-1), (1, 0))
    places = torch.arange(length, device=roles.device)
    first = spans.next
    second = F.pad(first, (0, 1), value=length).gather(-1, first)

    def until(sums: Tensor, place: Tensor) -> Tensor:
        """The sum up to a place, itself among them."""
        whole = sums.expand(*place.shape[:2], -1)
        return whole.gather(-1, (place + 1).clamp(max=length).expand(place.shape))

    at_end, at_own = until(count, first), count[..., 1:]
    open_ = (at_end - at_own) * (1 + after) - (until(met, first) - met[..., 1:])
    open_ = rows + open_ + (until(count, second) - at_end) * (1 - spans.ender)
    near = until(count, (places + window).clamp(max=length - 1).expand(first.shape)) - before
    total = count[..., -1:] - before
    return (roles[..., 0] * total + roles[..., 1] * open_ + roles[..., 2] * near).sum(-1)
