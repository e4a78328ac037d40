"""Softmax attention of groups of rows on a CPU, by products of whole rows, and its backward.

    s_i = log2(e) · scale · q_i Kᵀ + added_i,   p_ij = 2^(s_ij - l_i),   out_i = Σ_j p_ij v_j

with l_i the binary logarithm of Σ_j 2^s_ij. The same as torch's fused kernel, which multiplies by MKL: where
that is the slower library, and there are enough pairs, this takes half of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.attend.cpu_products import onednn_is_quicker, product

__all__ = ["backward", "forward", "pays"]

_LOG2E = math.log2(math.e)
_PAIRS = 1 << 16  # fewer pairs of a group are not worth the calls,
_ROWS, _KEYS = 16, 256  # nor are few or short rows
_HELD = 1 << 20  # scores at a time: few enough for the caches of a processor


def pays(q: Float[Tensor, "m h r d"], k: Float[Tensor, "m h c d"]) -> bool:
    """Whether it is quicker than torch's fused kernel."""
    rows, keys = q.shape[2], k.shape[2]
    long_enough = rows >= _ROWS and keys >= _KEYS and rows * keys >= _PAIRS
    return long_enough and q.dtype == torch.float32 and onednn_is_quicker()


def forward(
    q: Float[Tensor, "m h r d"],
    k: Float[Tensor, "m h c d"],
    v: Float[Tensor, "m h c d"],
    added: Float[Tensor, "n 1 r c"] | None,
    scale: float,
) -> tuple[Float[Tensor, "m h r d"], Float[Tensor, "m h r"]]:
    """Output and log-sum-exp; `added`, finite, for every group or, with n = 1, for all."""
    out = torch.empty_like(q)
    tops, totals = (q.new_empty(*q.shape[:3], 1) for _ in range(2))
    queries = q * (scale * _LOG2E)
    for group, head in _groups(q):
        rows, keys, values = queries[group, head], k[group, head], v[group, head].T
        for part in _parts(rows, keys):
            at = group, head, part
            scores = _scores(rows[part], keys, added, group, part)
            top = torch.amax(scores, -1, keepdim=True, out=tops[at])
            weights = scores.sub_(top).exp2_()
            torch.sum(weights, -1, keepdim=True, out=totals[at])
            out[at] = product(weights, values)
    return out.div_(totals), totals.log2_().add_(tops).div_(_LOG2E)[..., 0]


def backward(
    grad: Float[Tensor, "m h r d"],
    q: Float[Tensor, "m h r d"],
    k: Float[Tensor, "m h c d"],
    v: Float[Tensor, "m h c d"],
    out: Float[Tensor, "m h r d"],
    lse: Float[Tensor, "m h r"],
    added: Float[Tensor, "n 1 r c"] | None,
    scale: float,
) -> tuple[Float[Tensor, "m h r d"], Float[Tensor, "m h c d"], Float[Tensor, "m h c d"]]:
    """Gradients for q, k and v, with the output and the log-sum-exp of whole rows:

    dv = Pᵀ g,   ds = P ∘ (g Vᵀ - Σ g · out),   dq = scale · ds K,   dk = scale · dsᵀ q
    """
    dq = torch.empty_like(q)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    queries, logs = q * (scale * _LOG2E), lse[..., None] * _LOG2E
    past = (grad * out).sum(-1, keepdim=True)
    for group, head in _groups(q):
        rows, keys, values, up = (x[group, head] for x in (queries, k, v, grad))
        # summed transposed: the products then read the weights in the order of memory
        for_keys, for_values = keys.new_zeros(keys.T.shape), values.new_zeros(values.T.shape)
        for part in _parts(rows, keys):
            at = group, head, part
            weights = _scores(rows[part], keys, added, group, part).sub_(logs[at]).exp2_()
            for_values += product(up[part].T.contiguous(), weights.T)
            down = product(up[part], values).sub_(past[at]).mul_(weights)
            dq[at] = product(down, keys.T)
            for_keys += product(rows[part].T.contiguous(), down.T)
        dk[group, head], dv[group, head] = for_keys.T, for_values.T
    return dq.mul_(scale), dk.div_(_LOG2E), dv


def _groups(q: Tensor) -> Iterator[tuple[int, int]]:
    return ((group, head) for group in range(q.shape[0]) for head in range(q.shape[1]))


def _parts(rows: Tensor, keys: Tensor) -> Iterator[slice]:
    """Equal parts of the rows, of `_HELD` scores at most."""
    count = -(-len(rows) * len(keys) // _HELD)
    step = -(-len(rows) // count)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _scores(rows: Tensor, keys: Tensor, added: Tensor | None, group: int, part: slice) -> Tensor:
    scores = product(rows, keys)
    if added is not None:
        scores += added[min(group, len(added) - 1), 0, part] * _LOG2E
    return scores
