"""The choice of a selector inside `torch.compile`: one opaque step of the graph.

How many blocks are kept depends on the numbers, and the compiler wants to know every shape beforehand: the
index has a place for every block of keys, most of them -1. Importing this file imports the compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.masks import Chosen, Mask, chosen
from polyhead.attend.normalizers import Normalizer
from polyhead.attend.opaque import constant_name
from polyhead.attend.scores import Score
from polyhead.attend.selectors import Selector, choose
from polyhead.attend.spelling import Spelling, read, spell

__all__ = ["choose_opaque"]


def choose_opaque(
    selector: Selector,
    q: Tensor,
    k: Tensor,
    mask: Mask | None,
    scale: float,
    score: Score | None = None,
    normalizer: Normalizer | None = None,
) -> Chosen:
    """`choose` as one step of the graph that is being compiled."""
    found = Spelling()
    text = spell((selector, mask, score, normalizer), found, constant_name)
    rows, cols = selector.rows, selector.cols
    index = _choose(q.detach(), k.detach(), found.tensors, found.ints, found.floats, text, scale, rows, cols)
    return chosen(index, rows=rows, cols=cols, first=k.shape[2] - q.shape[2])


@torch.library.custom_op(
    "polyhead::choose",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor[] tensors, SymInt[] ints, float[] floats, str text, float scale, "
        "SymInt rows, SymInt cols) -> Tensor"
    ),
)
def _choose(
    q: Tensor,
    k: Tensor,
    tensors: list[Tensor],
    ints: list[int],
    floats: list[float],
    text: str,
    scale: float,
    rows: int,
    cols: int,
) -> Tensor:
    selector, mask, score, normalizer = read(text, tensors, ints, floats)
    own = choose(selector, q, k, mask, scale, None, score, normalizer)
    index = own.index.new_full((*q.shape[:2], own.index.shape[2], -(-k.shape[2] // cols)), -1)
    index[..., : own.index.shape[3]] = own.index
    return index


@_choose.register_fake
def _(
    q: Tensor,
    k: Tensor,
    tensors: list[Tensor],
    ints: list[int],
    floats: list[float],
    text: str,
    scale: float,
    rows: int,
    cols: int,
) -> Tensor:
    shape = (*q.shape[:2], (q.shape[2] + rows - 1) // rows, (k.shape[2] + cols - 1) // cols)
    return q.new_empty(shape, dtype=torch.int64)
