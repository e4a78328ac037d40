"""Tokens of several sequences packed one after another into rows of one length, and laid back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polyhead.checks import given, whole
from polyhead.errors import ConfigError, ShapeError

__all__ = ["Packed", "pack", "unpack"]


class Packed(NamedTuple):
    """What `pack` gives.

    Attributes:
        tokens: `(R, C, ...)`, zeros where nothing is left to pack.
        segments: int64 `(R, C)`, the sequence that a token is of, -1 for none; ids for `ph.documents`.
        places: int64 `(R, C)`, where a token stands in its sequence, 0 for none.
    """

    tokens: Tensor
    segments: Tensor
    places: Tensor


def pack(
    x: Float[Tensor, "B L *rest"],
    chosen: Bool[Tensor, "B L"],
    length: int | None = None,
    order: Int[Tensor, " L"] | None = None,
) -> Packed:
    """The chosen tokens, sequence by sequence, in ⌈n / length⌉ rows of which only the last is not full.

    A sequence may begin in one row and end in the next; `ph.documents(segments)` keeps those of a row apart.

    Args:
        x: what is packed.
        chosen: of which tokens.
        length: of a row; None: one row that holds all.
        order: a permutation of 0..L-1, the order in which the tokens of a sequence are packed; default as
            they stand.
    """
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != x.shape[:2]:
        raise ShapeError(f"pack: chosen must be a bool tensor {tuple(x.shape[:2])}; got {given(chosen)}")
    if length is not None:
        whole("pack: length", length, 1)
    if order is None:
        item, place = chosen.nonzero(as_tuple=True)
    else:
        if not isinstance(order, Tensor) or order.shape != x.shape[1:2] or order.dtype != torch.int64:
            raise ConfigError(f"pack: order must be an int64 tensor ({x.shape[1]},); got {given(order)}")
        item, at = chosen[:, order].nonzero(as_tuple=True)
        place = order[at]
    total = len(item)
    length = max(total, 1) if length is None else length
    rows = -(-total // length)
    spare = rows * length - total

    def row(values: Tensor, fill: int) -> Tensor:
        return torch.cat([values, values.new_full((spare, *values.shape[1:]), fill)]).unflatten(
            0, (rows, length)
        )

    return Packed(row(x[item, place], 0), row(item, -1), row(place, 0))


def unpack(tokens: Float[Tensor, "R C *rest"], packed: Packed, shape: tuple[int, int]) -> Tensor:
    """Packed tokens `(R, C, ...)` where they stood, `(B, L, ...)`; zeros for tokens that were not chosen.

    Args:
        tokens: what has become of `packed.tokens`.
        packed: what `pack` gave.
        shape: B and L.
    """
    real = packed.segments >= 0
    found = tokens.new_zeros(*shape, *tokens.shape[2:])
    return found.index_put((packed.segments[real], packed.places[real]), tokens[real])
