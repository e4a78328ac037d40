"""The mask of a call for some of its items and heads."""

from __future__ import annotations

from torch import Tensor

from polyhead.attend.masks.algebra import And, Mask, Not, Or
from polyhead.attend.masks.content import Documents, Padding
from polyhead.attend.masks.gathered import gathered
from polyhead.attend.masks.neighborhood import Neighborhood
from polyhead.attend.masks.on_grid import OnGrid
from polyhead.attend.masks.positional import Blocks, Dilated, Prefix, Shard, Strided, Window

__all__ = ["some_of"]

# what shows all heads the same, and all items too where it holds no tensor
_ALIKE = (Blocks, Dilated, Documents, Neighborhood, OnGrid, Padding, Prefix, Shard, Strided, Window)


def some_of(mask: Mask, *, batch: Tensor | None = None, heads: Tensor | None = None) -> Mask:
    """`mask` for a call on these items and heads of the call that it is of.

    Masks that treat all of them alike stay as they are, so that backends know them; `gathered` stands for the
    others, without their checks.

    Args:
        mask: the mask of the larger call.
        batch: integer `(B,)`, the item of the larger call for every item; None: the same.
        heads: integer `(H,)`, the head of the larger call for every head; None: the same.
    """
    if isinstance(mask, And | Or):
        return type(mask)(tuple(some_of(term, batch=batch, heads=heads) for term in mask.terms))
    if isinstance(mask, Not):
        return Not(some_of(mask.mask, batch=batch, heads=heads))
    if isinstance(mask, _ALIKE):
        heads = None
        batch = batch if mask.tensors() else None
    return mask if batch is None and heads is None else gathered(mask, batch=batch, heads=heads)
