"""Attention to tuples of tokens: the key of a pair is k¹_m ⊙ k²_n, its value v¹_m ⊙ v²_n.

    out_i = Σ_(m,n) A_i(mn) v¹_m ⊙ v²_n,   A_i = softmax over all pairs of  scale · Σ_l q_il k¹_ml k²_nl

For each m alone this is attention from q_i ⊙ k¹_m to k² and v²; the m's are then merged by the sums that each
was divided by, Σ_m w_im v¹_m ⊙ y_im with w_i = softmax_m of their log-sum-exps. That is exact, so the L·S
rows of the inner attention are work for `attend`, and the L × S × S weights are never held.

Paper 175: How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker
Computation, arXiv 2310.04064. It has no masks: that a query sees a pair if it sees both tokens is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polyhead.attend.function import attend
from polyhead.attend.masks import Mask
from polyhead.attend.masks.tuples import TupleRows
from polyhead.checks import given, number, several
from polyhead.errors import ConfigError, ShapeError

__all__ = ["kronecker_attend"]

_MOST = 1 << 24  # numbers in the rows of one inner call: longer calls go query by query


def kronecker_attend(
    q: Float[Tensor, "B H L D"],
    keys: Sequence[Float[Tensor, "B G S D"]],
    values: Sequence[Float[Tensor, "B G S Dv"]],
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H L Dv"]:
    """Attention from every query to all n-tuples of tokens, n = len(keys); with n = 1 it is `attend`.

    2·B·H·L·Sⁿ·(D + Dv) operations, under a causal mask a third of them for n = 2. Memory is O(L·S) for n = 2,
    with gradients too: what is too long for one go is computed for some queries after the other, and again
    in the backward pass.

    Args:
        q: queries.
        keys, values: one tensor each for every place in the tuple.
        mask: who may look at whom; a tuple is visible where all of its tokens are.
        scale: default 1/D.
        dropout: probability with which the weight of a tuple is dropped.

    Raises:
        ShapeError: shapes do not fit; ConfigError: a value is not allowed.
    """
    if not several(keys) or not several(values) or len(keys) != len(values) or not len(keys):
        raise ConfigError(
            f"keys and values must be sequences of as many tensors, at least one; got {given(keys)} and "
            f"{given(values)}"
        )
    for name, own in (("keys", keys), ("values", values)):
        for one in own:
            if not isinstance(one, Tensor) or one.ndim != 4 or one.shape != own[0].shape:
                raise ShapeError(f"{name} must be tensors (B, G, S, D) of one shape; got {given(one)}")
    if not isinstance(q, Tensor) or q.ndim != 4 or not q.shape[-1]:
        raise ShapeError(f"q must be a tensor (B, H, L, D); got {given(q)}")
    if not keys[0].shape[1] or q.shape[1] % keys[0].shape[1]:
        raise ShapeError(f"the {q.shape[1]} query heads must be a multiple of {keys[0].shape[1]} key heads")
    batch, heads, queries, width = q.shape
    count = keys[0].shape[2]
    if mask is not None:
        if not isinstance(mask, Mask):
            raise ConfigError(f"mask must be a mask such as causal(); got {given(mask)}")
        mask.check(batch=batch, heads=heads, queries=queries, keys=count, offset=count - queries)
    scale = 1 / width if scale is None else number("scale", scale)
    call = {"scale": scale, "dropout": dropout}
    tensors = (*keys, *values)
    each = batch * heads * count ** (len(keys) - 1) * max(width, values[0].shape[-1])
    start = count - queries
    if queries * each <= _MOST or len(keys) == 1:
        return _level(q, keys, values, mask, start, call)[0]
    size = max(1, _MOST // each)

    def part(rows: Tensor, first: int, *held: Tensor) -> Tensor:
        return _level(rows, held[: len(keys)], held[len(keys) :], mask, first, call)[0]

    outputs = []
    for at in range(0, queries, size):
        rows = q[:, :, at : at + size]
        if torch.is_grad_enabled():
            outputs.append(checkpoint(part, rows, start + at, *tensors, use_reentrant=False))
        else:
            outputs.append(part(rows, start + at, *tensors))
    return torch.cat(outputs, dim=2)


def _level(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    mask: Mask | None,
    start: int,
    call: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Outputs, and log-sum-exps over all tuples, of queries whose first stands at `start`."""
    batch, heads, queries, width = q.shape
    count = keys[0].shape[2]
    if len(keys) == 1:
        return attend(q, keys[0], values[0], mask=mask, return_lse=True, **call)
    shared = heads // keys[0].shape[1]
    k, v = (t.repeat_interleave(shared, 1) if shared > 1 else t for t in (keys[0], values[0]))
    rows = (q[:, :, :, None] * k[:, :, None]).reshape(batch, heads, queries * count, width)
    first = count - queries * count
    of_rows = mask
    if mask is not None:
        of_rows = TupleRows(mask, torch.tensor(count), torch.tensor(first), torch.tensor(start))
    y, lse = _level(rows, keys[1:], values[1:], of_rows, first, call)
    lse = lse.reshape(batch, heads, queries, count)
    nothing = (lse == -torch.inf).all(-1, keepdim=True)
    lse = lse.masked_fill(nothing, 0.0)
    share = torch.softmax(lse, dim=-1)
    y = y.reshape(batch, heads, queries, count, y.shape[-1])
    out = (share[..., None] * y * v[:, :, None]).sum(3)
    total = lse.logsumexp(-1).masked_fill(nothing[..., 0], -torch.inf)
    return out.to(y.dtype), total
