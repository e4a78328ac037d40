"""Softmax attention of groups of rows on a CPU, by products of whole rows, and its backward.

    s_i = log2(e) · scale · q_i Kᵀ + added_i,   p_ij = 2^(s_ij - l_i),   out_i = Σ_j p_ij v_j

with l_i the binary logarithm of Σ_j 2^s_ij. The same as torch's fused kernel, which multiplies by MKL: where
that is the slower library, and there are enough pairs, this takes down to half of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from polyhead.attend.cpu_products import onednn_is_quicker, product

__all__ = ["backward", "forward", "pays", "suits", "width"]

_LOG2E = math.log2(math.e)
_PAIRS = 1 << 16  # fewer pairs of a group are not worth the calls,
_ROWS, _KEYS = 48, 256  # nor are few or short rows
_PART = 256  # rows at a time: scores of thousands of keys then stay in the caches of a processor
# oneDNN makes a program for every shape, which takes a millisecond and half a megabyte. So shapes are few:
# rows are filled up to a multiple of 64, keys to one of an eighth of the power of two below.
_MULTIPLE, _EIGHTH = 64, 8


def suits(rows: int, dtype: torch.dtype) -> bool:
    """Whether it may be quicker than torch's fused kernel, if the rows are long."""
    return rows >= _ROWS and dtype == torch.float32 and onednn_is_quicker()


def pays(rows: int, keys: int, dtype: torch.dtype) -> bool:
    """Whether it is quicker than torch's fused kernel."""
    return keys >= _KEYS and rows * keys >= _PAIRS and suits(rows, dtype)


def width(keys: int) -> int:
    """How many keys are multiplied for so many: who gathers keys may fill them up at once."""
    step = max(_MULTIPLE, (1 << (keys.bit_length() - 1)) // _EIGHTH)
    return -(-keys // step) * step


def forward(
    q: Float[Tensor, "m h r d"],
    k: Float[Tensor, "m h c d"],
    v: Float[Tensor, "m h c d"],
    added: Float[Tensor, "n 1 r l"] | None,
    scale: float,
    keys: int,
) -> tuple[Float[Tensor, "m h r d"], Float[Tensor, "m h r"]]:
    """Output and log-sum-exp.

    Only the first `keys` of the keys count. `added`, finite, is for the last l of them, of every group or,
    with n = 1, of all.
    """
    count = q.shape[2]
    queries = _filled(q * (scale * _LOG2E), _rows(count))
    out = torch.empty_like(queries)
    tops, totals = (q.new_empty(*queries.shape[:3], 1) for _ in range(2))
    for group, head in _groups(q):
        own, values = (_filled(x[group, head], width(keys)) for x in (k, v))
        for part in _parts(queries):
            at = group, head, part
            scores = _scores(queries[at], own, keys, added, group, part)
            top = torch.amax(scores, -1, keepdim=True, out=tops[at])
            weights = scores.sub_(top).exp2_()
            torch.sum(weights, -1, keepdim=True, out=totals[at])
            out[at] = product(weights, values.T)
    lse = totals.log2().add_(tops).div_(_LOG2E)[..., 0]
    return out.div_(totals)[:, :, :count], lse[:, :, :count]


def backward(
    grad: Float[Tensor, "m h r d"],
    q: Float[Tensor, "m h r d"],
    k: Float[Tensor, "m h c d"],
    v: Float[Tensor, "m h c d"],
    out: Float[Tensor, "m h r d"],
    lse: Float[Tensor, "m h r"],
    added: Float[Tensor, "n 1 r l"] | None,
    scale: float,
    keys: int,
) -> tuple[Float[Tensor, "m h r d"], Float[Tensor, "m h keys d"], Float[Tensor, "m h keys d"]]:
    """Gradients for q and the first `keys` of k and v, with the output and the log-sum-exp of whole rows:

    dv = Pᵀ g,   ds = P ∘ (g Vᵀ - Σ g · out),   dq = scale · ds K,   dk = scale · dsᵀ q
    """
    count = q.shape[2]
    queries, up = (_filled(x, _rows(count)) for x in (q * (scale * _LOG2E), grad))
    logs, past = (
        _filled(x, _rows(count)) for x in (lse[..., None] * _LOG2E, (grad * out).sum(-1, keepdim=True))
    )
    dq = torch.empty_like(queries)
    dk, dv = (x.new_empty(*x.shape[:2], keys, x.shape[3]) for x in (k, v))
    for group, head in _groups(q):
        own, values = (_filled(x[group, head], width(keys)) for x in (k, v))
        # summed transposed: the products then read the weights in the order of memory
        for_keys, for_values = (x.new_zeros(x.T.shape) for x in (own, values))
        for part in _parts(queries):
            at = group, head, part
            weights = _scores(queries[at], own, keys, added, group, part).sub_(logs[at]).exp2_()
            for_values += product(up[at].T.contiguous(), weights.T)
            down = product(up[at], values).sub_(past[at]).mul_(weights)
            dq[at] = product(down, own.T)
            for_keys += product(queries[at].T.contiguous(), down.T)
        dk[group, head], dv[group, head] = for_keys.T[:keys], for_values.T[:keys]
    return dq[:, :, :count].mul_(scale), dk.div_(_LOG2E), dv


def _groups(q: Tensor) -> Iterator[tuple[int, int]]:
    return ((group, head) for group in range(q.shape[0]) for head in range(q.shape[1]))


def _parts(queries: Tensor) -> Iterator[slice]:
    return (slice(start, start + _PART) for start in range(0, queries.shape[2], _PART))


def _rows(count: int) -> int:
    return -(-count // _MULTIPLE) * _MULTIPLE


def _filled(x: Tensor, length: int) -> Tensor:
    """x `(..., n, d)` with zeros behind its rows, up to a length; of more rows the first ones."""
    missing = length - x.shape[-2]
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x[..., :length, :]


def _scores(
    rows: Tensor, own: Tensor, keys: int, added: Tensor | None, group: int, part: slice
) -> Float[Tensor, "r w"]:
    """-inf at the places of no key."""
    scores = product(rows, own)
    scores[:, keys:] = -math.inf
    if added is not None:
        table = added[min(group, len(added) - 1), 0, part]
        scores[: len(table), keys - table.shape[1] : keys].add_(table, alpha=_LOG2E)
    return scores
